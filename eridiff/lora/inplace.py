"""Tensors of a network that a LoRA changes in place: computed from the originals, which are kept, and restored bit for bit.

Who has changed what is kept by the layer, as `.to()` and FSDP2 may give it other parameter objects. Attached LoRAs share a
`Change` for each tensor, so that they come and go in any order; merges lie on top of each other and come off in reverse.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eridiff.errors import LoraError
from eridiff.lora.deltas import Item, widened
from eridiff.precision import full_float32
from eridiff.weights.save import originals as originals


class Part(NamedTuple):
    """What an item does to one tensor."""

    item: Item
    scale: float
    bias: bool  # whether it is the item's change of the bias
    dora: str


def tensors_of(item: Item) -> list[tuple[str, bool]]:
    """(native tensor, whether it is a bias) of what an item changes."""
    weight, bias = (item.target.name, False), (f"{item.target.module}.bias", True)
    return [weight] * item.changes_weight + [bias] * item.changes_bias


def parts_of(items: Iterable[tuple[Item, float]], dora: str) -> dict[str, list[Part]]:
    """What items, each at its scale, do to each tensor."""
    result: dict[str, list[Part]] = {}
    for item, scale in items:
        for name, bias in tensors_of(item):
            result.setdefault(name, []).append(Part(item, scale, bias, dora))
    return result


def changed_tensor(base: Tensor, parts: Sequence[Part]) -> Tensor:
    """A weight or a bias with changes in it, all computed on `base`, in its dtype; what replaces it comes first.

    Of a weight that FSDP2 shards every rank computes the whole and keeps its share, so all ranks must ask.
    """
    if is_sharded(base):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = base
        whole = changed_tensor(sharded.full_tensor(), parts)
        return distribute_tensor(whole, sharded.device_mesh, sharded.placements)
    new = base.clone()
    with full_float32(base.device), torch.autocast(base.device.type, enabled=False):
        for item, scale, bias, dora in sorted(parts, key=lambda part: part.item.kind != "set"):
            target, rows = item.target, item.target.take(base)
            place = new if target.rows is None else new[target.rows[0] : target.rows[1]]
            if item.kind == "set":
                place.copy_(target.exchanged(item.tensors["set_weight"].to(base).reshape(rows.shape)))
            else:
                place += target.exchanged(scale * item.bias_delta(rows) if bias else item.change(rows, scale, dora))
    return new


@dataclass
class Change:
    """What attached LoRAs do to one tensor of a layer together."""

    original: Tensor
    before: int  # who had changed it already, a merge
    parts: dict[int, list[Part]] = field(default_factory=dict)  # by the set's identity; an empty list widens alone
    enlarging: dict[int, Item] = field(default_factory=dict)  # whose branch needs more inputs

    def value(self) -> Tensor:
        base = self.original
        for item in self.enlarging.values():
            base = widened(base, item)
        parts = [part for own in self.parts.values() for part in own]
        if not parts:
            return base
        wide = base if base.dtype == torch.float64 else base.float()
        return changed_tensor(wide, parts).to(base.dtype)


class Changes(dict[str, Change]):
    """The changes of a layer's tensors, by short name. A copied layer keeps its values and is nobody's."""

    def __deepcopy__(self, memo: object) -> "Changes":
        return Changes()


def change_in_place(network: nn.Module, name: str, by: int, parts: list[Part], enlarging: Item | None = None) -> None:
    """Let a set change a tensor, or change it otherwise than before; the tensor stays the same object."""
    layer, short = _layer(network, name)
    changes = vars(layer).setdefault("lora_in_place", Changes())
    change = changes.get(short)
    if change is None:
        change = Change(_kept(_held(layer, short)), changed_by(network, name))
    change.parts[by] = parts
    if enlarging is not None:
        change.enlarging[by] = enlarging
    exchange(network, name, change.value(), id(change))
    changes[short] = change


def check_changeable(network: nn.Module, name: str) -> None:
    """Raises LoraError when a tensor that attached LoRAs hold changed has been merged into since."""
    layer, short = _layer(network, name)
    change = vars(layer).get("lora_in_place", {}).get(short)
    if change is not None:
        check_last_change(network, [name], id(change))


def restore(network: nn.Module, name: str, by: int) -> None:
    """Take a set's change of a tensor away; without others it is, bit for bit, what it was."""
    layer, short = _layer(network, name)
    changes = vars(layer).get("lora_in_place", {})
    change = changes.get(short)
    if change is None or by not in change.parts:
        return
    del change.parts[by]
    change.enlarging.pop(by, None)
    if change.parts:
        exchange(network, name, change.value(), id(change))
    else:
        exchange(network, name, change.original, change.before)
        del changes[short]


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
    tensor = _held(layer, short)
    old: Tensor = _kept(tensor)
    if is_sharded(tensor):
        tensor.data.copy_(new)
    else:
        tensor.data = new.to(old)  # a module may have been moved since
    if new.shape != old.shape:
        layer.in_features = new.shape[1]  # type: ignore[assignment]
        module.config = replace(module.config, in_channels=new.shape[1])  # type: ignore[type-var]
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


def is_sharded(tensor: Tensor) -> bool:
    """Whether FSDP2 keeps a share of it on each rank."""
    return hasattr(tensor, "full_tensor")


def _kept(tensor: Tensor) -> Tensor:
    """A tensor's values, to come back; FSDP2 reads a share where it lies, so that it is overwritten."""
    return tensor.data.clone() if is_sharded(tensor) else tensor.data


def _held(layer: nn.Module, short: str) -> Any:
    """A layer's own tensor, while it may work with a copy on a device."""
    tensor = getattr(layer, short)
    return getattr(tensor, "copy_of", tensor)


def _layer(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, short = name.rpartition(".")
    return module.get_submodule(path), short
