"""LoRAs become part of the weights: `W' = W + scale * up @ down`, rounded once; and back, bit for bit.

Weights are never restored by subtraction, which in bfloat16 loses up to a quarter of them: the originals are kept.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from eridiff.errors import LoraError
from eridiff.lora.deltas import Item, check_dora_rule, widened
from eridiff.lora.load import Lora
from eridiff.precision import full_float32


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
    if dtype not in (torch.float32, torch.float64):
        raise LoraError(f"a merge is computed in float32 or float64, not in {dtype}")
    items: list[tuple[Item, float]] = []
    for part, weight in [(lora, 1.0)] if isinstance(lora, Lora) else lora:
        own = [item for item in part.items if any(name in state_dict for name, _ in tensors_of(item))]
        networks = sorted({item.target.network for item in own})
        if len(networks) > 1:
            raise LoraError(f"the LoRA has parts for {' and '.join(networks)}; choose one by lora.of(network)")
        if not own:
            raise LoraError("the LoRA changes nothing of this state dict, whose names must be native ones")
        items += [(item, scale * weight) for item in own]
    found: dict[str, Tensor] = {}
    changed = lost = 0
    for (name, bias), pairs in by_tensor(items).items():
        if name not in state_dict:
            continue
        old = state_dict[name]
        base = old.to(dtype)
        for item, _ in pairs:
            base = base if bias else widened(base, item)
        with full_float32(base.device):
            new = merged_tensor(base, pairs, bias, dora)
        found[name] = new.to(old.dtype)
        differ = new != base
        changed += int(differ.sum())
        lost += int((differ & (found[name].to(dtype) == base)).sum())
    return Merged(dict(state_dict) | found, tuple(found), changed, lost)


def tensors_of(item: Item) -> list[tuple[str, bool]]:
    """(native tensor, whether it is a bias) of what an item changes."""
    weight, bias = (item.target.name, False), (f"{item.target.module}.bias", True)
    return [weight] * item.changes_weight + [bias] * item.changes_bias


def by_tensor(items: Sequence[tuple[Item, float]]) -> dict[tuple[str, bool], list[tuple[Item, float]]]:
    """The items that change each tensor, with their scales."""
    result: dict[tuple[str, bool], list[tuple[Item, float]]] = {}
    for item, scale in items:
        for place in tensors_of(item):
            result.setdefault(place, []).append((item, scale))
    return result


def merged_tensor(base: Tensor, items: Sequence[tuple[Item, float]], bias: bool, dora: str) -> Tensor:
    """A weight or a bias with items in it, each at its scale; in base's dtype and of its shape."""
    new = base.clone()
    for item, scale in items:
        target, rows = item.target, item.target.take(base)
        place = new if target.rows is None else new[target.rows[0] : target.rows[1]]
        if item.kind == "set":
            place.copy_(target.exchanged(item.tensors["set_weight"].to(base).reshape(rows.shape)))
        else:
            place += target.exchanged(scale * item.bias_delta(rows) if bias else item.change(rows, scale, dora))
    return new


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


# what is changed in place, and by whom: kept by the layer, as `.to()` and FSDP2 may give it other parameter objects


def changed_by(module: nn.Module, name: str) -> int:
    """Who has changed a module's tensor in place last, by `id`; 0 for nobody."""
    layer, short = _layer(module, name)
    changes: dict[str, int] = vars(layer).get("changed_by_lora", {})
    return changes.get(short, 0)


def exchange(module: nn.Module, name: str, new: Tensor, by: int) -> Tensor:
    """Give a module's tensor, which stays the same object, another value; returns the one it had.

    While a module works with copies on a device (`memory.stages.on_device`), both the copy and its original get it.
    """
    layer, short = _layer(module, name)
    tensor: Any = getattr(layer, short)
    if hasattr(tensor, "copy_of"):
        tensor.data = new.to(tensor)
        tensor = tensor.copy_of
    old: Tensor = tensor.data
    tensor.data = new.to(old)  # a module may have been moved since
    changes = vars(layer).setdefault("changed_by_lora", {})
    changes[short] = by
    if not by:
        del changes[short]
    return old


def check_last_change(module: nn.Module, names: Iterable[str], by: int) -> None:
    """Raises LoraError for originals that would come back under somebody else's change, and undo it."""
    name = next((name for name in names if changed_by(module, name) != by), None)
    if name:
        raise LoraError(f"another LoRA has changed {name} since; take that one away first")


def _layer(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, short = name.rpartition(".")
    return module.get_submodule(path), short


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
