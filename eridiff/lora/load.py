"""Read a LoRA file of any format for the networks it was made for; nothing in it is dropped without a word."""

import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor, nn

from eridiff.errors import CheckpointError, LoraError
from eridiff.lora.check import ALLOWED, EITHER, NEEDED, check_overlaps, check_shapes, kind_of
from eridiff.lora.deltas import Item, widened
from eridiff.lora.formats import UNKNOWN_FAMILY, Scaling, Source, family_of, nearest_ending, sort_names
from eridiff.lora.ledger import APPLIED, Row, counted
from eridiff.lora.names import Names, Target, could_be, find, known_names, meant_networks, names_of, network_of
from eridiff.weights.detect import DESCRIPTIONS
from eridiff.weights.header import Checkpoint, open_checkpoint, read_json_file
from eridiff.weights.hub import resolve
from eridiff.weights.locate import DENOISERS, TEXT_ENCODERS

log = logging.getLogger(__name__)
Network = nn.Module | Mapping[str, Tensor]  # or a text encoder's native state dict
OPTIONAL = {  # role of a tensor -> what a module lacks without it
    "up_bias": "bias", "diff_b": "bias", "b_norm": "bias", "diff": "weight", "w_norm": "weight",
    "dora_scale": "DoRA lengths", "magnitude": "DoRA lengths",
}  # fmt: skip
FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")


@dataclass(frozen=True)
class Lora:
    """A LoRA, resolved: what it does to which tensor, and the ledger of its file."""

    items: tuple[Item, ...]
    ledger: tuple[Row, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = None

    @property
    def networks(self) -> tuple[str, ...]:
        """flux, mmdit, unet, clip, clip_g, t5: which it changes."""
        return tuple(dict.fromkeys(item.target.network for item in self.items))

    def of(self, *networks: str) -> "Lora":
        """Its part for one network, or for some."""
        return replace(self, items=tuple(i for i in self.items if i.target.network in networks))


class Refusal(LoraError):
    """Why a file is not loaded, with the ledger as far as it could be written."""

    def __init__(self, message: str, ledger: tuple[Row, ...] = ()) -> None:
        super().__init__(message)
        self.ledger = ledger


def load_lora(
    path: str | os.PathLike[str],
    networks: nn.Module | Mapping[str, Network],
    *,
    allow_partial: bool = False,
    without_text_encoders: bool = False,
) -> Lora:
    """Read a file, a peft folder or a hub id for a network, or for several by kind: `{"unet": ..., "clip": ...}`.

    Nothing is changed in the networks, which may be on the meta device. `allow_partial` loads what fits and leaves the rest
    in the ledger; `without_text_encoders` leaves the rows of text encoders that are not given there. Raises LoraError, one
    sentence that names the file and the tensor, for anything that would be dropped, guessed or spread (NaN), and for a file
    in which nothing fits.
    """
    given = {network_of(networks): networks} if isinstance(networks, nn.Module) else dict(networks)
    wrong = next((name for name in given if name not in (*DENOISERS, *TEXT_ENCODERS, "")), None)
    if wrong is not None or not given:
        what = "no network is given" if wrong is None else f"'{wrong}' is no kind of network"
        raise LoraError(f"{what}; a LoRA is for {', '.join((*DENOISERS, *TEXT_ENCODERS))}, or another module alone")
    tables = {name: names_of(name, network) for name, network in given.items()}
    states = {n: (m.state_dict() if isinstance(m, nn.Module) else m) for n, m in given.items()}
    try:
        checkpoint, scaling = _open(path)
        lora = _Reader(checkpoint, scaling, tables, states).read(allow_partial, without_text_encoders)
    except (LoraError, CheckpointError) as error:
        text = str(error) if os.fspath(path) in str(error) else f"{os.fspath(path)}: {error}"
        raise Refusal(text, getattr(error, "ledger", ())) from None
    if any(row.status not in APPLIED for row in lora.ledger):
        log.warning("%s: %s; the ledger says which", os.fspath(path), counted(lora.ledger))
    return lora


def _open(path: str | os.PathLike[str]) -> tuple[Checkpoint, Scaling]:
    location = resolve(path)
    config = None
    if location.is_dir():
        file = next((location / name for name in FOLDER_FILES if (location / name).is_file()), None)
        if file and (location / "adapter_config.json").is_file():
            config = read_json_file(location / "adapter_config.json")
            if config.get("peft_type", "LORA") != "LORA":
                raise LoraError(
                    f"its adapter_config.json says {config['peft_type']}; of peft's folders only LORA is read"
                )
        location = file or location
    checkpoint = open_checkpoint(location)
    if not checkpoint.tensors:
        raise LoraError("it holds no tensors")
    return checkpoint, Scaling.read(checkpoint.metadata, config)


class _Reader:
    """One file on its way to a `Lora`."""

    def __init__(
        self, checkpoint: Checkpoint, scaling: Scaling, tables: Mapping[str, Names],
        states: Mapping[str, Mapping[str, Tensor]],
    ) -> None:  # fmt: skip
        self.checkpoint, self.scaling, self.tables, self.states = checkpoint, scaling, tables, states
        names = list(checkpoint.tensors)
        self.control = any(n.endswith(("norm.scale", ".set_weight")) for n in names)
        self.sources, self.unknown = sort_names(names)
        self.hints = 5  # for how many names the nearest is looked for, which takes a tenth of a second each
        self.parts: dict[str, set[str]] = {}  # kind -> which optional parts some module of that kind has
        for source in self.sources.values():
            self.parts.setdefault(kind_of(set(source.names)), set()).update(_parts(source.names))

    def read(self, allow_partial: bool, without_text_encoders: bool) -> Lora:
        rows, items, problems, misshapen = [], [], [], []
        if self.unknown and not self.sources:
            raise LoraError(
                f"its names are of no known LoRA format, the first are {', '.join(map(repr, self.unknown[:3]))}"
            )
        for source in self.sources.values():
            target = find(source.key, self.tables)
            if target is None:
                status, problem = self._unmatched(source)
                if not (without_text_encoders and status == "no text encoder here"):
                    problems.append(problem)
                rows.append(self._row(source, status, note=problem))
                continue
            try:
                item = self._item(source, target)
            except LoraError as error:
                if self.unknown and "is incomplete" in str(error):
                    raise Refusal(self._strange(), tuple(rows)) from None
                if "shape" not in str(error):
                    raise Refusal(str(error), tuple(rows)) from None
                misshapen.append(str(error))
                rows.append(self._row(source, "shape mismatch", target, str(error)))
                continue
            items.append(item)
            rows.append(self._applied(item))
        rows += [Row(name, "", "?", None, None, None, None, "unmatched", "unknown ending") for name in self.unknown]
        ledger = tuple(rows)
        try:
            check_overlaps(items)
        except LoraError as error:
            raise Refusal(str(error), ledger) from None
        given = set(DENOISERS) & self.tables.keys()
        strangers = [row for row in rows if row.status == "unmatched" and given & set(meant_networks(row.key)[1])]
        ours = [item for item in items if item.target.network in given]
        other = len(strangers) > len(ours) and not allow_partial
        if other or not (items or misshapen):
            looks = family_of([row.key for row in strangers] or list(self.sources))
            networks = [n for n in self.tables if n not in TEXT_ENCODERS] or list(self.tables)
            remedy = (
                "" if looks == UNKNOWN_FAMILY or "not supported" in looks else ", so give the network it was made for"
            )
            text = f"{'little' if items else 'nothing'} in it fits {_described(networks, ' and ')}; its names look like {looks}{self._claimed()}{remedy}"
            raise Refusal(text + (f"; {problems[0]}" if problems and looks == UNKNOWN_FAMILY else ""), ledger)
        if misshapen and not (items and allow_partial):
            raise Refusal(misshapen[0], ledger)
        if self.unknown and not allow_partial:
            raise Refusal(self._strange(), ledger)
        if problems and not allow_partial:
            others = f"; {len(problems) - 1} more modules do not fit" if len(problems) > 1 else ""
            raise Refusal(f"{problems[0]}{others}; allow_partial loads the rest", ledger)
        if all(row.status == "dead" for row in rows if row.module) and not allow_partial:
            raise Refusal(
                "it changes nothing: all its matrices are zero, as before the first training step; allow_partial loads it",
                ledger,
            )
        return Lora(tuple(items), ledger, dict(self.checkpoint.metadata), self.checkpoint.path)

    def _strange(self) -> str:
        name, others = self.unknown[0], len(self.unknown) - 1
        return f"'{name}' has an unknown ending, the nearest known is '{nearest_ending(name)}'" + (
            f"; {others} more are unknown" if others else ""
        )

    def _claimed(self) -> str:
        said = self.checkpoint.metadata.get("ss_base_model_version") or self.checkpoint.metadata.get(
            "modelspec.architecture"
        )
        return f" (its metadata say '{said}')" if said else ""

    def _unmatched(self, source: Source) -> tuple[str, str]:
        """Status and sentence of a module that no given network has."""
        prefix, meant = meant_networks(source.key)
        name = source.key.removeprefix(prefix)
        what = _described([n for n in meant if n in self.tables or set(meant) <= set(TEXT_ENCODERS)], " or ")
        if set(meant) <= set(TEXT_ENCODERS) and not any(could_be(network, name) for network in meant):
            return "unmatched", f"'{source.key}' is not in {what}, which never has such a module"
        if set(meant).isdisjoint(self.tables) and set(meant) <= set(TEXT_ENCODERS):
            return "no text encoder here", (
                f"'{source.key}' belongs to {what}, which is not given; give the encoder, or leave its rows out by "
                "without_text_encoders"
            )
        known = known_names(self.tables, [n for n in meant if n in self.tables] or [""], "." not in source.key)
        if not known:
            return "unmatched", f"'{source.key}' belongs to no network that is given"
        numbers = _beyond(name, set(known))
        if numbers:
            return "unmatched", f"'{source.key}' is not in the network, which has {numbers}"
        near = get_close_matches(name, known, n=1, cutoff=0.6) if self.hints else []
        self.hints = max(0, self.hints - 1)
        hint = f", the nearest is '{prefix}{near[0]}'" if near else ""
        return "unmatched", f"'{source.key}' ({len(source.names)} tensors) is not in {what or 'the network'}{hint}"

    def _row(self, source: Source, status: str, target: Target | None = None, note: str = "") -> Row:
        roles = set(source.names)
        rank = self.checkpoint.tensors[source.names["down"]].shape[:1] if "down" in roles else ()
        return Row(
            source.key,
            str(target) if target else "",
            kind_of(roles) or "?",
            rank[0] if rank else None,
            None,
            None,
            None,
            status,
            note,
        )

    def _applied(self, item: Item) -> Row:
        """The row of an item; a weight on the meta device has no length to compare with."""
        notes = []
        if item.kind in ("lora", "loha", "lokr") and item.alpha is None:
            notes.append("no alpha: scale 1")
        lacking = self.parts[item.kind] - _parts(item.tensors)
        if self._bias(item.target) is None:
            lacking -= {"bias"}
        notes += [f"no {part}, which other modules have" for part in sorted(lacking)]
        if item.ratio < 0:
            notes.append("negative scale")
        metadata = self.checkpoint.metadata
        if item.kind == "lora" and re.search(r'"split_qkv"\s*:\s*"?[Tt]rue', metadata.get("ss_network_args", "")):
            parts = 4 if item.key.endswith("linear1") else 3 if item.key.endswith("qkv") else 1
            if parts > 1:
                notes.append(f"trained with split_qkv: {parts} times stronger in training than any loader makes it")
        if item.kind == "lokr" and item.alpha is not None and {"lokr_w1", "lokr_w2"} <= item.tensors.keys():
            dimension = metadata.get("ss_network_dim")
            if dimension and dimension not in ("None", f"{item.alpha:g}"):
                notes.append(
                    f"both factors are whole, so alpha {item.alpha:g} has no effect; the metadata say dim {dimension}"
                )
        dead = item.dead
        if dead:
            notes.append("all zero: changes nothing")
        kind = item.kind + "+dora" * item.dora + "+bias" * (item.changes_bias and item.kind != "norm")
        status = "dead" if dead else APPLIED[item.target.rows is not None]
        return Row(
            item.key,
            str(item.target),
            kind,
            item.rank,
            item.alpha,
            item.ratio,
            self._change(item),
            status,
            "; ".join(notes),
        )

    def _change(self, item: Item) -> float | None:
        if not item.changes_weight:
            return None
        base = item.target.take(self.states[item.target.network][item.target.name])
        if base.is_meta:
            return None
        base = widened(base.float(), item)
        change, length = (float(torch.linalg.vector_norm(t)) for t in (item.change(base), base))
        return change / length if length else float("inf")

    # one module

    def _item(self, source: Source, target: Target) -> Item:
        """A module's tensors, read and checked against its target."""
        roles = set(source.names)
        kind = kind_of(roles)
        if not kind:
            raise LoraError(f"{source} is incomplete: it has only {', '.join(map(repr, source.names.values()))}")
        for group in NEEDED[kind]:
            if not roles.intersection(group):
                raise LoraError(f"{source} is incomplete: '{self._missing(source, group[0])}' is missing")
        strange = roles - {name for group in NEEDED[kind] for name in group} - ALLOWED.get(kind, set())
        if strange:
            raise LoraError(f"'{source.names[min(strange)]}' has no place in a module of the kind {kind}")
        for whole, factors in EITHER:
            if whole <= roles and factors & roles:
                both = [source.names[min(whole)], source.names[min(factors & roles)]]
                raise LoraError(f"'{both[0]}' and '{both[1]}' are two forms of one matrix; keep one")
        tensors = {role: self._tensor(name, role) for role, name in source.names.items()}
        shape = self._shape(source, target, tensors)
        check_shapes(source, target, kind, tensors, shape)
        if any(role in roles for role in ("up_bias", "diff_b", "b_norm")) and self._bias(target) is None:
            raise LoraError(f"{source} changes a bias, and {target} has none")
        alpha, rank, ratio = self._scale(source, kind, tensors)
        tensors = {role: t for role, t in tensors.items() if role not in ("alpha", "reshape_weight")}
        return Item(source.key, target, kind, tensors, ratio, alpha, rank)

    def _missing(self, source: Source, role: str) -> str:
        """How the file would spell a tensor that it lacks."""
        other = {"up": "down", "down": "up"}.get(role)
        if other in source.names:
            spelling = [("lora_up", "lora_down"), ("lora_B", "lora_A"), (".up.", ".down.")]
            for up, down in spelling:
                old, new = (up, down) if role == "down" else (down, up)
                if old in source.names[other]:
                    return source.names[other].replace(old, new)
        return f"{source.key}.{ {'down': 'lora_down.weight', 'up': 'lora_up.weight'}.get(role, role) }"

    def _tensor(self, name: str, role: str) -> Tensor:
        tensor = self.checkpoint.read(name)
        if role in ("on_input", "reshape_weight"):
            return tensor
        if not tensor.numel():
            raise LoraError(f"'{name}' of the shape {list(tensor.shape)} is empty")
        if tensor.is_complex() or not (tensor.is_floating_point() or role == "alpha"):
            raise LoraError(f"'{name}' holds {tensor.dtype}, and a LoRA's matrices are floating point numbers")
        if not bool(torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all()):
            raise LoraError(f"'{name}' holds values that are not finite")
        return tensor

    def _bias(self, target: Target) -> Tensor | None:
        return self.states[target.network].get(f"{target.module}.bias")

    def _shape(self, source: Source, target: Target, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """The shape of the rows that a module of the file changes; a control LoRA's first layer is wider than the network's."""
        shape = tuple(self.states[target.network][target.name].shape)
        if target.rows:
            shape = (target.rows[1] - target.rows[0], *shape[1:])
        down = tensors.get("down")
        if self.control and target.module == "image_in" and down is not None and down.shape[1] == 2 * shape[1]:
            return (shape[0], 2 * shape[1])
        if "reshape_weight" in tensors and "set_weight" not in tensors:
            raise LoraError(f"{source} enlarges a weight, which only a set_weight may")
        return shape

    def _scale(
        self, source: Source, kind: str, tensors: Mapping[str, Tensor]
    ) -> tuple[float | None, int | None, float]:
        """(alpha as stored, rank, scale)."""
        alpha = None
        if "alpha" in tensors:
            if tensors["alpha"].numel() != 1:
                raise LoraError(
                    f"'{source.names['alpha']}' has {tensors['alpha'].numel()} values, and an alpha is one number"
                )
            alpha = float(tensors["alpha"])
        whole = {"lokr_w1", "lokr_w2"} <= tensors.keys()
        first = {"lora": ("down",), "loha": ("hada_w1_b",), "lokr": ("lokr_w2_b", "lokr_w1_b")}.get(kind, ())
        ranks = [tensors[name].shape[0] for name in first if name in tensors]
        if not ranks:
            return alpha, None, 1.0
        rank = ranks[0]
        said = self.scaling.of(source.key, rank) if kind == "lora" else None
        if alpha == 0 and not whole or said and said[0] == 0:
            where = f"'{source.names['alpha']}'" if alpha == 0 else f"the alpha that the metadata say for {source}"
            raise LoraError(
                f"{where} is 0, which some tools read as 'alpha is the rank' (scale 1) and others as scale 0; write {rank} or "
                "remove the module"
            )
        if said and alpha is None:
            return said[0], rank, said[1]
        if said and alpha is not None and not math.isclose(said[1], alpha / rank, rel_tol=2**-8):  # bfloat16's rounding
            raise LoraError(
                f"'{source.names['alpha']}' makes the scale {alpha / rank:g} and the metadata lora_adapter_metadata make it "
                f"{said[1]:g}; remove one of them"
            )
        return alpha, rank, 1.0 if alpha is None else alpha / rank


def _described(networks: Iterable[str], link: str) -> str:
    """A denoiser by its bare name."""
    return link.join(
        DESCRIPTIONS[n] if n in TEXT_ENCODERS else DESCRIPTIONS[n].split(" ", 1)[1] if n else "this module"
        for n in networks
    )


def _parts(roles: Iterable[str]) -> set[str]:
    """Which parts a module has of those that it may lack and still load."""
    return {OPTIONAL[role] for role in roles if role in OPTIONAL}


def _beyond(name: str, known: set[str]) -> str:
    """What the network has, "double_blocks 0 to 18", if the name fits but for a number that is too high."""
    for match in re.finditer(r"\d+", name):
        there = [number for number in range(200) if f"{name[: match.start()]}{number}{name[match.end() :]}" in known]
        if there:
            what = re.sub(r"[._]$", "", name[: match.start()])
            return f"{what} {there[0]} to {there[-1]}" if len(there) > 1 else f"{what} {there[0]} alone"
    return ""
