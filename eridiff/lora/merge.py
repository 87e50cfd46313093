"""LoRAs become part of the weights: `W' = W + scale * up @ down`, rounded once; and back, bit for bit.

Weights are never restored by subtraction, which in bfloat16 loses up to a quarter of them: the originals are kept.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eridiff.errors import LoraError
from eridiff.lora.deltas import Item, check_dora_rule, widened
from eridiff.lora.inplace import (
    Part,
    changed_by,
    changed_tensor,
    check_last_change,
    exchange,
    is_sharded,
    parts_of,
    tensors_of,
)
from eridiff.lora.load import Lora
from eridiff.weights.detect import Component, sizes_of
from eridiff.weights.load import WORDS, native_reader, said_by_file
from eridiff.weights.locate import DENOISERS
from eridiff.weights.save import Stored, stored, write_file


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
    state_dict: Mapping[str, Tensor], lora: Lora | Sequence[tuple[Lora, float]], scale: float = 1.0, *,
    dtype: torch.dtype = torch.float32, dora: str = "peft",
) -> Merged:  # fmt: skip
    """A state dict of native names, whole or a part, with a LoRA in it, or several with their scales; nothing given changes.

    Computed in `dtype`, float32 or float64, and rounded once to each weight's own dtype. Several changes of one weight are
    all computed on the unmerged one. `dora` is the rule for a scale that is not 1: `Item.change`. Raises LoraError when a
    LoRA changes nothing of the state dict, or has parts for several networks of these names.
    """
    check_dora_rule(dora)
    weights = [scale] if isinstance(lora, Lora) else [scale, *(weight for _, weight in lora)]
    wrong = next((weight for weight in weights if not math.isfinite(weight)), None)
    if wrong is not None:
        raise LoraError(f"a scale is a finite number, not {wrong}")
    if dtype not in (torch.float32, torch.float64):
        raise LoraError(f"a merge is computed in float32 or float64, not in {dtype}")
    items: list[tuple[Item, float]] = []
    for one, weight in [(lora, 1.0)] if isinstance(lora, Lora) else lora:
        own = [item for item in one.items if any(name in state_dict for name, _ in tensors_of(item))]
        networks = sorted({item.target.network for item in own})
        if len(networks) > 1:
            raise LoraError(f"the LoRA has parts for {' and '.join(networks)}; choose one by lora.of(network)")
        if not own:
            raise LoraError("the LoRA changes nothing of this state dict, whose names must be native ones")
        items += [(item, scale * weight) for item in own]
    found: dict[str, Tensor] = {}
    changed = lost = 0
    for name, parts in parts_of(items, dora).items():
        if name not in state_dict:
            continue
        old = state_dict[name]
        base = old.to(dtype)
        for part in parts:
            base = base if part.bias else widened(base, part.item)
        new = changed_tensor(base, parts)
        found[name] = new.to(old.dtype)
        differ = new != base
        changed += counted(differ)
        lost += counted(differ & (found[name].to(dtype) == base))
    return Merged(dict(state_dict) | found, tuple(found), changed, lost)


@torch.no_grad()
def merge_file(
    held: Mapping[str, tuple[Component, nn.Module]], loras: Sequence[tuple[Lora, float]], path: str | os.PathLike[str], *,
    dtype: torch.dtype | None = None,
) -> tuple[Path, Merged]:  # fmt: skip
    """Write a checkpoint's file anew with LoRAs in its weights, a tensor in memory at a time.

    - held: the networks and text encoders of one file, by kind, each with its module, which may be on the meta device.
    - loras: with their scales.
    - dtype: of the parameters; None keeps the file's.

    Layout, metadata and marker tensors stay. Returns the file, and what was changed, without the tensors. Raises LoraError when a
    LoRA changes what the file does not hold, or nothing.
    """
    wrong = next((weight for _, weight in loras if not math.isfinite(weight)), None)
    if wrong is not None:
        raise LoraError(f"a scale is a finite number, not {wrong}")
    lacking = next((network for lora, _ in loras for network in lora.networks if network not in held), None)
    if lacking is not None:
        raise LoraError(
            f"the LoRA changes {lacking}, which is not in the file; choose its part for the network, or give the file of that"
        )
    tensors: list[Stored] = []
    metadata: dict[str, str] = {}
    configs: dict[str, Any] = {}
    count = _Count()
    for network, (component, module) in held.items():
        read, shapes, dtypes = native_reader(component, module)
        if dtype is not None:
            dtypes |= {name: dtype for name, _ in module.named_parameters() if name in dtypes}
        items = [(item, weight) for lora, weight in loras for item in lora.items if item.target.network == network]
        parts = parts_of(items, "peft")
        config = component.config
        for name in parts:
            for part in parts[name]:
                wider = widened(torch.empty(shapes[name], device="meta"), part.item)
                if not part.bias and tuple(wider.shape) != shapes[name]:  # a control LoRA's first layer
                    shapes[name], config = tuple(wider.shape), replace(config, in_channels=wider.shape[1])
        merged = partial(count.merged, read, parts, dtypes)
        own = stored(component.layout, shapes, sizes_of(config), dtypes, merged, prefix=component.prefix)
        copied = [*component.keys.intersection(component.layout.carry), *component.markers]
        tensors += [tensor for tensor in own if tensor.name.removeprefix(component.prefix) in component.keys]
        for name in (component.prefix + n if n in component.keys else n for n in copied):
            entry = component.checkpoint.tensors[name]
            if all(tensor.name != name for tensor in tensors):
                tensors.append(Stored(name, entry.dtype, entry.shape, partial(component.checkpoint.read, name)))
        metadata = (
            said_by_file(component) | metadata if network not in DENOISERS else metadata | said_by_file(component)
        )
        configs[network] = dict(config) if isinstance(config, Mapping) else asdict(config)
    metadata.pop(WORDS, None)  # a LoRA may have brought others
    written = write_file(tensors, path, {**metadata, "eridiff.config": json.dumps(configs, sort_keys=True)})
    return written, Merged({}, tuple(count.tensors), count.changed, count.lost)


def counted(where: Tensor) -> int:
    """How many are true, over all ranks of a sharded tensor."""
    number: Any = where.sum()
    return int(number.full_tensor() if is_sharded(number) else number)


class _Count:
    """What a merge changes, counted while its tensors are made."""

    def __init__(self) -> None:
        self.tensors, self.changed, self.lost = dict[str, None](), 0, 0

    def merged(
        self,
        read: Callable[[str], Tensor],
        parts: Mapping[str, list[Part]],
        dtypes: Mapping[str, torch.dtype],
        name: str,
    ) -> Tensor:
        old = read(name)
        if name not in parts:
            return old
        base = old if old.dtype == torch.float64 else old.float()
        for part in parts[name]:
            base = base if part.bias else widened(base, part.item)
        new = changed_tensor(base, parts[name])
        rounded, differ, before = new.to(dtypes[name]), new != base, base.to(dtypes[name])
        self.tensors[name] = None
        self.changed += counted(differ)
        self.lost += counted(differ & (rounded == before))
        return rounded


class MergedModule:
    """A module with a LoRA in its weights, and its own weights kept beside it; `restore()`, or the end of a `with`, brings them back."""

    def __init__(self, module: nn.Module, merged: Merged) -> None:
        """Puts `merged` in place."""
        self.module = module
        self.merged = replace(merged, state={})  # the counts
        self._before = {name: changed_by(module, name) for name in merged.tensors}
        self.originals = {name: exchange(module, name, merged.state[name], id(self)) for name in merged.tensors}

    def restore(self) -> None:
        """The module's own tensors again, the very ones; a second call does nothing.

        Raises LoraError while another LoRA that was merged or attached later has changed the same tensors in place.
        """
        check_last_change(self.module, self.originals, id(self))
        for name, original in self.originals.items():
            exchange(self.module, name, original, self._before[name])
        self.originals = {}

    def __enter__(self) -> "MergedModule":
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


@torch.no_grad()
def merge_into(
    module: nn.Module, lora: Lora, scale: float = 1.0, *, dtype: torch.dtype = torch.float32, dora: str = "peft"
) -> MergedModule:
    """Merge in place: the module's parameters stay the same objects and get new values, the old ones are kept.

    Arguments and errors as for `merge_lora`; a LoRA that enlarges a layer is not merged in place.
    """
    tensors = _tensors(module)
    merged = merge_lora({name: t.data for name, t in tensors.items()}, lora, scale, dtype=dtype, dora=dora)
    wider = next((name for name in merged.tensors if merged.state[name].shape != tensors[name].shape), None)
    if wider:
        raise LoraError(f"the LoRA enlarges {wider}: attach it, or merge it into a state dict")
    return MergedModule(module, merged)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
