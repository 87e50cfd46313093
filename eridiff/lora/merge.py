"""LoRAs become part of the weights: `W' = W + scale * up @ down`, rounded once; and back, bit for bit.

Weights are never restored by subtraction, which in bfloat16 loses up to a quarter of them: the originals are kept.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eridiff.errors import LoraError, quoted
from eridiff.lora import inplace
from eridiff.lora.deltas import Item, check_dora_rule
from eridiff.lora.inplace import Part, parts_of
from eridiff.lora.load import Lora
from eridiff.weights.detect import Component, sizes_of
from eridiff.weights.header import PICKLED_SUFFIXES
from eridiff.weights.load import NETWORKS, WORDS, native_reader, said_by_file
from eridiff.weights.locate import DENOISERS
from eridiff.weights.save import Stored, copies, stored, write_file, write_shards

# networks and text encoders of a file or a folder, by kind, each with its module, which may be on the meta device
Held = Mapping[str, tuple[Component, nn.Module]]
Loras = Sequence[tuple[Lora, float]]  # with their scales


@dataclass(frozen=True)
class Merged:
    """What a merge made of a state dict."""

    state: dict[str, Tensor] = field(repr=False)  # the given tensors, and new ones in place of those that changed
    tensors: tuple[str, ...]  # which changed
    changed: int  # single weights that should change
    rounded_away: int  # of these, those that are in their dtype what they were

    def __str__(self) -> str:
        share = self.rounded_away / self.changed if self.changed else 0.0
        return f"{len(self.tensors)} tensors changed; {share:.1%} of {self.changed} weights were rounded away"


@torch.no_grad()
def merge_lora(
    state_dict: Mapping[str, Tensor], lora: Lora | Loras, scale: float = 1.0, *, dtype: torch.dtype = torch.float32,
    dora: str = "peft",
) -> Merged:  # fmt: skip
    """A state dict of native names, whole or a part, with a LoRA in it, or several with their scales; nothing given changes.

    Computed in `dtype`, float32 or float64, and rounded once to each weight's own dtype. Several changes of one weight are
    all computed on the unmerged one. `dora` is the rule for a scale that is not 1: `Item.change`. Raises LoraError when a
    LoRA changes nothing of the state dict, or has parts for several networks of these names.
    """
    check_dora_rule(dora)
    loras = [(lora, 1.0)] if isinstance(lora, Lora) else lora
    _check_scales([scale, *(weight for _, weight in loras)])
    if dtype not in (torch.float32, torch.float64):
        raise LoraError(f"a merge is computed in float32 or float64, not in {dtype}")
    items: list[tuple[Item, float]] = []
    for one, weight in loras:
        own = [item for item in one.items if any(name in state_dict for name, _ in inplace.tensors_of(item))]
        networks = sorted({item.target.network for item in own})
        if len(networks) > 1:
            raise LoraError(f"the LoRA has parts for {' and '.join(networks)}; choose one by lora.of(network)")
        if not own:
            raise LoraError("the LoRA changes nothing of this state dict, whose names must be native ones")
        items += [(item, scale * weight) for item in own]
    count, parts = _Count(), parts_of(items, dora)
    held = {name: state_dict[name] for name in parts if name in state_dict}
    found = {name: count.merged(name, old, parts[name], dtype, old.dtype) for name, old in held.items()}
    return count.told(dict(state_dict) | found)


@torch.no_grad()
def merge_file(
    held: Held, loras: Loras, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> tuple[Path, Merged]:
    """Write a checkpoint's file anew with LoRAs in its weights, a tensor in memory at a time.

    `held` are the networks and text encoders of one file, `dtype` is of the parameters; None keeps the file's. Layout,
    metadata and marker tensors stay. Returns the file, and what was changed, without the tensors. Raises LoraError when a LoRA
    changes what the file does not hold, or nothing.
    """
    _check(held, loras, "file; choose its part for the network, give the file of that, or a folder to be written")
    count = _Count()
    tensors, metadata = _file(held, loras, dtype, count)
    return write_file(tensors, path, metadata), count.told({})


@torch.no_grad()
def merge_folder(
    folder: Path, held: Held, loras: Loras, out: Path, *, dtype: torch.dtype | None = None
) -> tuple[list[Path], Merged]:
    """Write a model's folder anew with LoRAs in its weights: the parts that change as by `merge_file`, copies of the rest.

    - folder: a diffusers folder, or one of whole files side by side; `held` are its networks and text encoders.
    - out: the new folder. Weights that no part of the model is read from are not copied.

    Returns the files of the parts that changed, and what was changed. Raises LoraError for a control LoRA too, as the folder's
    config.json says the sizes of the first layer.
    """
    _check(held, loras, "folder; choose its part for the network")
    if out.resolve().is_relative_to(folder.resolve()) or folder.resolve().is_relative_to(out.resolve()):
        raise LoraError(f"{quoted(out)} and {quoted(folder)} are one in the other; give another folder")
    changed = {network for lora, _ in loras for network in lora.networks}
    by_place: dict[Path, dict[str, Any]] = {}
    for name, (component, module) in held.items():
        by_place.setdefault(component.checkpoint.path, {})[name] = (component, module)
    new = {place: group for place, group in by_place.items() if changed & group.keys()}
    kept = {file for place, group in by_place.items() if place not in new for file in _files(group)}
    for path in sorted(out.rglob("*.safetensors*")):
        inside = path.relative_to(out)
        if folder / inside.parent not in new and not (folder / inside).is_file():  # a reader might take it in place
            raise LoraError(f"{quoted(out)} holds {inside} of another model or layout; give another folder")
    count, written = _Count(), []
    for place, group in new.items():
        target = out / place.relative_to(folder)
        tensors, metadata = _file(group, loras, dtype, count)
        if not place.is_dir():
            written.append(write_file(tensors, target, metadata))
            continue
        if count.widened:
            raise LoraError(
                f"the LoRA enlarges {count.widened}, which {place.name}/config.json says: give a file to be written"
            )
        sizes = [file.stat().st_size for file in _files(group)]
        limit = max(sizes) if len(sizes) > 1 else sum(tensor.bytes for tensor in tensors)
        stem = "diffusion_pytorch_model" if group.keys() & NETWORKS.keys() else "model"
        written.append(write_shards(tensors, target, stem, metadata, limit))
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        inside = file.relative_to(folder)
        index = ".safetensors.index" in file.name
        if any(part.startswith(".") for part in inside.parts) or (index and file.parent in new):
            continue
        if file in kept or not file.name.endswith((".safetensors", ".gguf", *PICKLED_SUFFIXES)):
            (out / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / inside)
    return written, count.told({})


def _files(group: Held) -> set[Path]:
    return {entry.file for component, _ in group.values() for entry in component.checkpoint.tensors.values()}


def _check(held: Collection[str], loras: Loras, where: str) -> None:
    """Raises LoraError for a scale that is not a number, and for a LoRA of a network that is not held."""
    _check_scales([weight for _, weight in loras])
    lacking = next((network for lora, _ in loras for network in lora.networks if network not in held), None)
    if lacking is not None:
        raise LoraError(f"the LoRA changes {lacking}, which is not in the {where}")


def _check_scales(scales: Sequence[float]) -> None:
    wrong = next((scale for scale in scales if not math.isfinite(scale)), None)
    if wrong is not None:
        raise LoraError(f"a scale is a finite number, not {wrong}")


def _file(held: Held, loras: Loras, dtype: torch.dtype | None, count: "_Count") -> tuple[list[Stored], dict[str, str]]:
    """The tensors and the metadata of a checkpoint's file with LoRAs in it."""
    tensors: list[Stored] = []
    metadata: dict[str, str] = {}
    configs: dict[str, Any] = {}
    for network, (component, module) in held.items():
        read, shapes, dtypes = native_reader(component, module)
        if dtype is not None:
            dtypes |= {name: dtype for name, _ in module.named_parameters() if name in dtypes}
        items = [(item, weight) for lora, weight in loras for item in lora.items if item.target.network == network]
        parts = parts_of(items, "peft")
        config = component.config
        for name, changes in parts.items():
            wider = inplace.enlarged(torch.empty(shapes[name], device="meta"), changes)
            if wider.shape != shapes[name]:
                shapes[name], config = tuple(wider.shape), replace(config, in_channels=wider.shape[1])
                count.widened = name
        merged = partial(count.made, read, parts, dtypes)
        own = stored(component.layout, shapes, sizes_of(config), dtypes, merged, prefix=component.prefix)
        tensors += [tensor for tensor in own if tensor.name.removeprefix(component.prefix) in component.keys]
        tensors += copies(component, component.prefix)
        told = said_by_file(component)
        metadata = told | metadata if network not in DENOISERS else metadata | told
        configs[network] = dict(config) if isinstance(config, Mapping) else asdict(config)
    markers = {name: component.checkpoint for component, _ in held.values() for name in component.markers}
    for name, checkpoint in markers.items():
        entry = checkpoint.tensors[name]
        tensors.append(Stored(name, entry.dtype, entry.shape, partial(checkpoint.read, name)))
    metadata.pop(WORDS, None)  # a LoRA may have brought others
    return tensors, {**metadata, "eridiff.config": json.dumps(configs, sort_keys=True)}


def counted(where: Tensor) -> int:
    """How many are true, over all ranks of a sharded tensor."""
    number: Any = where.sum()
    return int(number.full_tensor() if inplace.is_sharded(number) else number)


class _Count:
    """What a merge changes, counted while its tensors are made."""

    def __init__(self) -> None:
        self.tensors, self.changed, self.lost = dict[str, None](), 0, 0
        self.widened = ""  # the first layer that a control LoRA enlarges

    def made(
        self, read: Callable[[str], Tensor], parts: Mapping[str, list[Part]], dtypes: Mapping[str, torch.dtype], name: str
    ) -> Tensor:  # fmt: skip
        """A file's tensor, changed if parts are for it."""
        old = read(name)
        wide = torch.promote_types(old.dtype, torch.float32)
        return self.merged(name, old, parts[name], wide, dtypes[name]) if name in parts else old

    def merged(self, name: str, old: Tensor, parts: Sequence[Part], within: torch.dtype, dtype: torch.dtype) -> Tensor:
        """A tensor with changes in it, computed `within` a dtype and rounded once to its own."""
        base = inplace.enlarged(old.to(within), parts)
        exact = inplace.changed_tensor(base, parts)
        new, differ = exact.to(dtype), exact != base
        self.tensors[name] = None
        self.changed, self.lost = self.changed + counted(differ), self.lost + counted(differ & (new == base.to(dtype)))
        return new

    def told(self, state: dict[str, Tensor]) -> Merged:
        return Merged(state, tuple(self.tensors), self.changed, self.lost)


class MergedModule(AbstractContextManager["MergedModule"]):
    """A module with a LoRA in its weights, and its own weights kept beside it; `restore()`, or the end of a `with`, brings them back."""

    def __init__(self, module: nn.Module, merged: Merged) -> None:
        self.module, self.merged = module, merged

    def restore(self) -> None:
        """The module's own tensors again, bit for bit, or with what other LoRAs do to them; a second call does nothing."""
        inplace.restore(self.module, self)

    @property
    def originals(self) -> dict[str, Tensor]:
        """The module's own tensors, until `restore`."""
        return inplace.originals(self.module, self)

    def __exit__(self, *_: object) -> None:
        self.restore()


@torch.no_grad()
def merge_into(
    module: nn.Module, lora: Lora, scale: float = 1.0, *, dtype: torch.dtype = torch.float32, dora: str = "peft"
) -> MergedModule:
    """Merge in place: the module's parameters stay the same objects and get new values, the old ones are kept in memory.

    Several merges, and what attached LoRAs change in place, add up on the module's own tensors, and come off in any order. To
    merge for good, without a second copy, load what `merge_lora` returns. Arguments and errors as for `merge_lora`; a LoRA that
    enlarges a layer is not merged in place, nor is a LoRA of a layer whose weight is not a parameter, as in float8.
    """
    changed = {item.target.module for item in lora.items if item.changes_weight}
    for path, layer in module.named_modules():
        if path in changed and isinstance(layer, nn.Linear) and "weight" not in layer._parameters:
            raise LoraError(
                f"the weight of {path} is not a parameter (in float8?): attach the LoRA, or merge it before"
            )
    names = [*dict(module.named_parameters()), *dict(module.named_buffers())]
    merged = merge_lora({name: inplace.original(module, name) for name in names}, lora, scale, dtype=dtype, dora=dora)
    wider = next((n for n in merged.tensors if merged.state[n].shape != inplace.original(module, n).shape), None)
    if wider:
        raise LoraError(f"the LoRA enlarges {wider}: attach it, or merge it into a state dict")
    found = MergedModule(module, replace(merged, state={}))
    for name, parts in parts_of([(item, scale) for item in lora.items], dora).items():
        if name in merged.tensors:
            inplace.change_in_place(module, name, found, parts, merged=merged.state[name], dtype=dtype)
    return found
