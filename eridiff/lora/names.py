"""Where a name of a LoRA file lands: every name that a key map knows, with dots or with underscores, and nothing else.

No second table of names: what a published layout calls a tensor, a LoRA file calls the module that owns it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from eridiff.errors import CheckpointError, LoraError
from eridiff.weights.detect import sizes_of
from eridiff.weights.keymap import WRAPPERS, Entry, Layout, Shape, key_map
from eridiff.weights.load import NETWORKS
from eridiff.weights.locate import DENOISERS

# what stands before a module's name -> the networks it may belong to; sd-scripts counts the text encoders of SD 3 as
# te1, te2, te3 and those of Flux as te1, te3, OneTrainer those of Flux as te1, te2
PREFIXES: dict[str, tuple[str, ...]] = {
    "lora_unet_": DENOISERS, "lora_transformer_": DENOISERS, "lycoris_": DENOISERS,
    "lora_te1_": ("clip",), "lora_te2_": ("clip_g", "t5"), "lora_te3_": ("t5",), "lora_te_": ("clip",),
    "model.diffusion_model.": DENOISERS, "diffusion_model.": DENOISERS, "base_model.model.": DENOISERS,
    "unet.": DENOISERS, "transformer.": DENOISERS,
    "text_encoder.": ("clip",), "text_encoder_2.": ("clip_g", "t5"), "text_encoder_3.": ("t5",),
    "text_encoders.clip_l.transformer.": ("clip",), "text_encoders.clip_g.transformer.": ("clip_g",),
    "text_encoders.t5xxl.transformer.": ("t5",), "": DENOISERS,
}  # fmt: skip

COMPUTED = ("positions.table", "encoder.embed_tokens.weight")  # MMDiT's is not a parameter, T5's is shared.weight again
PEFT = "base_model.model."
IN_DOTS = re.compile(rf"(?:(?<=\.)|^)(?:{'|'.join(WRAPPERS)}|base_layer)\.")
IN_UNDERSCORES = re.compile(rf"(?:{'|'.join(name for name in WRAPPERS if name != 'module')})_|^module_")


@dataclass(frozen=True)
class Target:
    """A tensor of a network, or a range of its rows; `swapped` if a file stores the halves of these rows exchanged."""

    network: str  # flux, mmdit, unet, clip, clip_g, t5, or "" for any other module
    module: str  # native name
    parameter: str = "weight"
    rows: tuple[int, int] | None = None  # of the native tensor; None is all of them
    swapped: bool = False

    @property
    def name(self) -> str:
        """The native name of the tensor."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter

    def __str__(self) -> str:
        return self.module + (f"[{self.rows[0]}:{self.rows[1]}]" if self.rows else "")

    def take(self, tensor: Tensor) -> Tensor:
        """The rows of a native tensor, in the file's order."""
        rows = tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]
        return self.exchanged(rows)

    def exchanged(self, rows: Tensor) -> Tensor:
        """Rows in the file's order <-> in eridiff's."""
        return rows.roll(rows.shape[0] // 2, 0) if self.swapped else rows


def network_of(module: nn.Module) -> str:
    """flux, mmdit, unet or vae; "" for another module, which is known by its own names."""
    return next((name for name, kind in NETWORKS.items() if isinstance(module, kind)), "")


class Names:
    """Every name by which a LoRA file may mean a module of one network."""

    def __init__(self, network: str, shapes: Mapping[str, Shape], config: Any = None) -> None:
        """`shapes` are those of the network's tensors, by native name."""
        self.network, self.shapes, self.sizes = network, shapes, sizes_of(config)
        self.targets: dict[str, Target] = {}  # by published names; by its own for another module
        self.own: dict[str, Target] = {}  # by eridiff's names, which are in files without a prefix alone
        for native in shapes:
            self._add(self.own if network in DENOISERS else self.targets, native, Target(network, *_split(native)))
        # what stands before the names of a CLIP in the key map, and not in a module of transformers 5.6 and later
        flat = network in ("clip", "clip_g") and not any(name.startswith("text_model.") for name in shapes)
        self.lacks = "text_model." if flat else ""
        if network:
            natives, rules = [rooted(name, self.lacks) for name in shapes], key_map(network).lora_rules
            entries = [e for layout in layouts_of(network) for e in layout.spellings(natives, self.sizes)]
            entries += [e for native in shapes for rule in rules if (e := rule.entry(native, self.sizes))]
            for entry in entries:
                self._add_entry(entry)
        self.underscored = {name.replace(".", "_"): target for name, target in self.targets.items()}

    def _add_entry(self, entry: Entry) -> None:
        native = entry.native.removeprefix(self.lacks)
        for name, target in targets_of(entry, Target(self.network, *_split(native)), self.shapes[native]).items():
            if name and entry.operation != "transpose":  # of which no LoRA file has a name
                self._add(self.targets, name, target)

    def _add(self, table: dict[str, Target], foreign: str, target: Target) -> None:
        """A tensor is known by its own name, and a weight, or a norm's scale, by its module's too."""
        for name in (foreign, module_of(foreign)):
            known = table.setdefault(name, target)
            if known != target:
                raise LoraError(f"the name '{name}' means both {known} and {target}; the key map must tell them apart")

    def find(self, name: str, own: bool = True) -> Target | None:
        """The target of a module's name without prefix; `own` lets it be one of our names."""
        return self.targets.get(name) or self.underscored.get(name) or (self.own.get(name) if own else None)


def _split(name: str) -> tuple[str, str]:
    module, _, last = name.rpartition(".")
    return module, last


def targets_of(entry: Entry, target: Target, shape: Shape) -> dict[str, Target]:
    """What each foreign tensor of an entry is of a native one of this shape."""
    if entry.operation == "rows":
        return {name: replace(target, rows=rows) for name, rows in entry.rows_of(shape).items()}
    return dict.fromkeys(entry.foreign, replace(target, swapped=entry.operation == "swap_halves"))


def module_of(name: str) -> str:
    """The module of a weight or of a norm's scale; another tensor is known by its own name."""
    module, last = _split(name)
    return module if last in ("weight", "scale") else name


def names_of(network: str, module: nn.Module | Mapping[str, Tensor]) -> Names:
    """The names of a module, or of a text encoder's native state dict."""
    tensors = dict(module.named_parameters()) if isinstance(module, nn.Module) else module  # a shared one once
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in COMPUTED:
        shapes.pop(name, None)
    try:
        return Names(network, shapes, getattr(module, "config", None))
    except CheckpointError as error:
        raise LoraError(f"what is given as '{network}' has other names than this package's modules: {error}") from None


def rooted(name: str, root: str) -> str:
    """A text encoder's name as the key map has it."""
    return name if name.startswith("text_projection.") else root + name


def layouts_of(network: str) -> list[Layout]:
    """The layouts whose names LoRA files use."""
    layouts = key_map(network).layouts
    return [layout for name, layout in layouts.items() if network in DENOISERS or name in ("huggingface", "flat")]


def find(name: str, tables: Mapping[str, Names]) -> Target | None:
    """The target that a module's name in a file, prefix included, has in the given networks."""
    prefix, networks, inside = inner(name)
    if prefix == PEFT and len(tables) == 1:  # it does not show the network: a text encoder's folder looks the same
        networks = tuple(tables)
    for network in networks:
        target = tables[network].find(inside, prefix in ("", PEFT)) if network in tables else None
        if target:
            return target
    if "" not in tables:
        return None
    return tables[""].find(name) or tables[""].find(IN_DOTS.sub("", name)) or tables[""].find(inside)


def inner(name: str) -> tuple[str, tuple[str, ...], str]:
    """The prefix of a name, the networks to which it points, and the rest, without what wrappers put into it."""
    plain = IN_DOTS.sub("", name)
    prefix, networks = next((prefix, networks) for prefix, networks in PREFIXES.items() if plain.startswith(prefix))
    rest = plain.removeprefix(prefix)
    if prefix == PEFT and inner(rest)[0]:
        further, networks, rest = inner(rest)
        prefix += further
    return prefix, networks, rest if "." in rest else IN_UNDERSCORES.sub("", rest)
