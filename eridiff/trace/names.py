"""Whose name is whose: the names of any trace as those of our modules, by the key maps."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from eridiff.errors import TraceError
from eridiff.models import autoencoder, flux, mmdit, unet
from eridiff.trace import text
from eridiff.trace.watch import METHODS
from eridiff.weights import load
from eridiff.weights.detect import sizes_of
from eridiff.weights.keymap import key_map

NATIVE = "native"
NETWORKS: dict[str, Any] = {**load.NETWORKS, **text.ENCODERS}
PRESETS: dict[str, Mapping[str, Any]] = {
    "flux": flux.PRESETS, "mmdit": mmdit.PRESETS, "unet": unet.PRESETS, "vae": autoencoder.PRESETS,
    **{name: {"published": config()} for name, config in text.CONFIGS.items()},
}  # fmt: skip
RECORDED = ("network.", "model.", "autoencoder.", "clip.", "clip_g.", "t5.")  # prefixes beside those of checkpoints
BETWEEN = re.compile(r"^(?P<place>[^@]*?)(?P<call>@\d+)?$")


@dataclass(frozen=True)
class Source:
    """How an eridiff tensor is made from those of a trace."""

    names: tuple[str, ...]  # in the trace
    # rows: joined on the last axis; swap_halves: of the last axis; part: of `total` on it; element: of axis 0
    operation: str = "same"
    index: int = 0
    total: int = 1

    @property
    def name(self) -> str:
        if self.operation == "part":
            return f"{self.names[0]}[{self.index} of {self.total}]"
        return self.names[0] if len(self.names) == 1 else f"{self.names[0]} ... {self.names[-1].rpartition('.')[2]}"

    def read(self, trace: Mapping[str, Tensor]) -> Tensor:
        tensors = [torch.as_tensor(trace[name]) for name in self.names]
        if self.operation == "rows":
            return torch.cat(tensors, dim=-1)
        if self.operation == "swap_halves":
            return torch.cat(tensors[0].chunk(2, dim=-1)[::-1], dim=-1)
        if self.operation == "part":
            return tensors[0].chunk(self.total, dim=-1)[self.index]
        return tensors[0][self.index] if self.operation == "element" else tensors[0]


@dataclass(frozen=True)
class Aligned:
    """A trace's tensors by our names, and what has none."""

    network: str  # "" if the names are compared as they are
    layout: str
    sources: dict[str, Source]  # in the trace's order
    unknown: tuple[str, ...]  # the trace's names


@dataclass(frozen=True)
class Piece:
    """A module of a layout as a part of one of eridiff's."""

    native: str
    kind: str = "same"
    index: int = 0
    total: int = 1


class Names:
    """The names of one network in one layout, for module outputs and inputs."""

    def __init__(self, network: str, layout: str, config: Any) -> None:
        self.network, self.layout = network, layout
        self.values = key_map(network).value_rules
        self.sizes = sizes_of(config)
        with torch.device("meta"):
            module = NETWORKS[network](config)
        # lists and parts that never run themselves have no values
        self.owners: set[str] = set()  # the layout's names of modules that have parameters themselves
        self.ends: set[str] = set()  # the layout's names of modules that give what the last in them gives
        self.around: set[str] = set()  # the layout's names of modules around them
        self.paths = {n for n, m in module.named_modules() if n and type(m).forward is not nn.Module.forward}
        # modules with one argument, which others have too
        self.single = {n for n, m in module.named_modules() if len(signature(m.forward).parameters) == 1}
        natives = list(module.state_dict())
        self.fused: dict[str, list[Piece]] = defaultdict(list)  # the layout's module -> several of eridiff's
        if layout == NATIVE:
            self.modules = {path: Piece(path) for path in self.paths}
        else:
            self.modules = self._foreign(natives)
        self.of_native: dict[str, list[str]] = defaultdict(list)  # our module -> the layout's
        for name, piece in self.modules.items():
            for native in {piece.native, *(p.native for p in self.fused.get(name, ()))}:
                self.of_native[native].append(name)
        self.native = cache(self._native)

    def _foreign(self, natives: Iterable[str]) -> dict[str, Piece]:
        """Each module's name in the layout, by its parameters; and each block's, by the common name of what is in it."""
        table: dict[str, Piece] = {}
        beneath: dict[str, list[str]] = defaultdict(list)  # of each eridiff module: foreign names
        everywhere: list[str] = []
        for entry in key_map(self.network).layouts[self.layout].entries(natives, self.sizes):
            native, _, last = entry.native.rpartition(".")
            if last not in ("weight", "bias"):
                continue  # a table: what a module gives is not it
            parts = [_module(name, last) for name in entry.foreign]
            everywhere += parts
            for above in _above(native):
                beneath[above] += parts
            for i, name in enumerate(parts):
                if entry.operation == "part" and (piece := Piece(native, "part", *entry.sizes)) not in self.fused[name]:
                    self.fused[name].append(piece)
                kind = entry.operation if entry.operation in ("rows", "swap_halves", "part") else "same"
                table.setdefault(name, Piece(native, kind, i, len(parts)))
        distinct = set(everywhere)
        self.owners = set(table)
        self.around = {above for name in distinct for above in _above(name)} - self.owners
        for path in sorted(beneath.keys() & self.paths, key=len, reverse=True):
            for common in [*_above(_common(beneath[path]))][::-1]:
                inside = {name for name in distinct if name == common or name.startswith(f"{common}.")}
                if not common or common in table or not inside <= set(beneath[path]):
                    continue
                within = next(iter(inside))
                if len(inside) > 1 or within.rpartition(".")[2].isdigit():  # an nn.Sequential gives what its last gives
                    table[common] = table[within] if len(inside) == 1 else Piece(path)
                    self.ends |= {common} if len(inside) == 1 else set()
        return table

    def _native(self, name: str) -> tuple[str, Piece] | None:
        """A name of the trace -> eridiff's name, and how it belongs there; None if it has none."""
        found = BETWEEN.match(name)
        place, call = (found["place"], found["call"] or "") if found else (name, "")
        for rule in self.values:
            entry = rule.entry(place, self.sizes)
            if entry is not None:
                return None if entry.foreign[0] == "-" else (entry.foreign[0] + call, Piece(entry.foreign[0]))
        base, colon, argument = place.partition(":")
        if (
            colon
            and self.network not in text.ENCODERS  # whose modules are transformers' own
            and base in self.around
            and (base in self.ends or self.modules.get(base, Piece("")).native not in self.single)
        ):
            return None  # a block's arguments have no name here, nor has what a Sequential gives to the activation before its layer
        for path in [base] if colon else [*_above(base)][::-1]:
            part = base[len(path) :]
            if path in self.modules and self._is_output(self.modules[path].native, part):
                return self.modules[path].native + part + colon + argument + call, self.modules[path]
        known = base in self.paths or base.partition(".")[0] in ("forward", *METHODS)
        return (name, Piece(base)) if known else None

    def _is_output(self, native: str, part: str) -> bool:
        """Whether `part`, `.0`, transformers' name or nothing, is an element of a module's output, and not a module inside."""
        return part in ("", ".last_hidden_state", ".pooler_output") or (
            part.replace(".", "0").isdigit() and native + part not in self.paths
        )

    def foreign(self, native: str) -> str:
        """An eridiff name in this layout; `-` if it has none."""
        found = BETWEEN.match(native)
        place, call = (found["place"], found["call"] or "") if found else (native, "")
        base, colon, argument = place.partition(":")
        names = self.of_native.get(base, [])
        owners = [name for name in names if name in self.owners]
        parts = [name for name in owners if self.modules[name].kind == "rows"] or owners[:1] or names[-1:]
        return " + ".join(f"{name}{colon}{argument}{call}" for name in (parts[:1] if colon else parts)) or "-"

    def align(self, names: Sequence[str]) -> Aligned:
        """The tensors of a trace by our names; a fused projection needs all its parts."""
        sources: dict[str, Source] = {}
        unknown: list[str] = []
        parts: dict[str, dict[int, str]] = defaultdict(dict)
        cut = {entry.partition("[")[0] for rule in self.values for entry in rule.foreign if "[" in entry}
        prefix = self._prefix(names)
        for name in names:
            found = self.native(name.removeprefix(prefix))
            if found is None:
                unknown.append(name)
                continue
            native, piece = found
            if piece.kind == "rows" and ":" not in native:
                parts[native][piece.index] = name
                if len(parts[native]) == piece.total:
                    sources[native] = Source(tuple(parts[native][i] for i in range(piece.total)), "rows")
            elif piece.kind == "part" and ":" not in native:
                for other in self.fused[name.removeprefix(prefix).partition("@")[0]]:
                    place = other.native + native.removeprefix(piece.native)
                    sources.setdefault(place, Source((name,), "part", other.index, other.total))
            elif native in cut:
                for i in range(2):
                    sources.setdefault(f"{native}[{i}]", Source((name,), "element", i))
            elif native not in sources:
                sources[native] = Source(
                    (name,), "swap_halves" if piece.kind == "swap_halves" and ":" not in native else "same"
                )
        unknown += [name for native, found in parts.items() if native not in sources for name in found.values()]
        return Aligned(self.network, self.layout, sources, tuple(unknown))

    def _prefix(self, names: Sequence[str]) -> str:
        """What stands before most names: `transformer.`, `model.diffusion_model.`."""
        layouts = key_map(self.network).layouts
        known = {prefix for layout in layouts.values() for prefix in layout.prefixes} | set(RECORDED)
        return max(
            sorted(known),
            key=lambda p: sum(n.startswith(p) and self.native(n.removeprefix(p)) is not None for n in names),
        )


def _module(name: str, last: str) -> str:
    """`a.b.weight`, `a.b.scale` -> `a.b`; OpenCLIP has `attn.in_proj_weight` -> `attn.in_proj`, `text_projection` as it is."""
    return name.removesuffix(f"_{last}") if name.endswith(f"_{last}") else name.rpartition(".")[0] or name


def _above(path: str) -> Iterator[str]:
    """`a.b.c` -> `a`, `a.b`, `a.b.c`."""
    parts = path.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def _common(names: Sequence[str]) -> str:
    columns = zip(*(name.split(".") for name in names), strict=False)
    shared = []
    for column in columns:
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared)


@cache
def _first_words(network: str, layout: str) -> set[str]:
    """With what the names of a layout begin."""
    whole = key_map(network)
    rules = [rule for found in whole.layouts.values() for rule in found.rules]
    own = [rule.native for rule in rules] if layout == NATIVE else [name for rule in rules for name in rule.foreign]
    words = {word for name in [*own, *(rule.native for rule in whole.value_rules)] for word in name.split(".")}
    return {word for word in words if word.isidentifier()} - {"weight", "bias"} | {"forward", *METHODS}


@cache
def names_of(network: str, layout: str, config: Any) -> Names:
    """Made once."""
    return Names(network, layout, config)


def align(
    names: Sequence[str],
    configs: Mapping[str, Any] | None = None,
    layout: str | None = None,
    network: str | None = None,
) -> Aligned:
    """The names of a trace as eridiff's, in the network and layout by which most of them are known.

    - configs: network -> its configuration; the published sizes where it is not given, which have enough blocks of each kind.
    - network, layout: what is known of the trace.

    Names that no map knows are left as they are if nearly all are, and the network is not known.
    """
    best = Aligned("", NATIVE, {name: Source((name,)) for name in names}, ())
    score = 0.0 if network else len(names) / 4
    for kind in [network] if network else [name for name in NETWORKS if not configs or name in configs]:
        candidates = [configs[kind]] if configs and kind in configs else list(PRESETS[kind].values())
        for name in [layout] if layout else [NATIVE, *key_map(kind).layouts]:
            if sum(_first_words(kind, name).intersection(n.split(":")[0].split(".")) != set() for n in names) <= score:
                continue  # which spares making the network
            for config in dict.fromkeys(candidates):
                found = names_of(kind, name, config).align(names)
                if len(found.sources) > score:
                    best, score = found, len(found.sources)
        if score > 0.9 * len(names):
            break
    return best


def twin(native: str) -> str:
    """The other of a module's two outputs, `a.1@2` for `a.0@2`; empty for what is not one of two."""
    base, at, call = native.partition("@")
    module, _, index = base.rpartition(".")
    return f"{module}.{1 - int(index)}{at}{call}" if index in ("0", "1") else ""


def parse_map(text: str) -> tuple[str, str | None]:
    """`flux:diffusers` -> both; raises TraceError for what there is not."""
    network, _, layout = text.partition(":")
    if network not in NETWORKS:
        raise TraceError(f"there is no map '{network}'; there are {', '.join(NETWORKS)}")
    known = [NATIVE, *key_map(network).layouts]
    if layout and layout not in known:
        raise TraceError(f"the map {network} has no layout '{layout}'; it has {', '.join(known)}")
    return network, layout or None


def nearest(name: str, known: Iterable[str]) -> str:
    """The name that is most like `name`; empty if none is."""
    return next(iter(get_close_matches(name, list(known), 1, 0.8)), "")
