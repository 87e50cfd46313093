"""Tensors of a network that a LoRA changes in place: computed from the originals, which are kept, and restored bit for bit.

Who changes what is kept by the layer, as `.to()` and FSDP2 may give it other parameter objects. All LoRAs, attached and merged,
share a `Change` for each tensor, so that they come and go in any order.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eridiff.lora.deltas import Item, widened
from eridiff.precision import full_float32
from eridiff.weights.save import changes_of


class Part(NamedTuple):
    """What an item does to one tensor."""

    item: Item
    scale: float | None  # None: nothing is added, and a first layer gets the inputs that a branch needs
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


def enlarged(base: Tensor, parts: Iterable[Part]) -> Tensor:
    """A weight with the inputs that a control LoRA among the parts has more; all others stay."""
    for part in parts:
        base = base if part.bias else widened(base, part.item)
    return base


def changed_tensor(base: Tensor, parts: Sequence[Part]) -> Tensor:
    """A weight or a bias with changes in it, all computed on `base`, in its dtype; what replaces it comes first.

    Of a weight that FSDP2 shards every rank computes the whole and keeps its share, so all ranks must ask.
    """
    if is_sharded(base):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = base
        whole = changed_tensor(sharded.full_tensor(), parts)
        return distribute_tensor(whole, sharded.device_mesh, sharded.placements)
    base = enlarged(base, parts)
    new = base.clone()
    with full_float32(base.device), torch.autocast(base.device.type, enabled=False):
        for item, scale, bias, dora in sorted(parts, key=lambda part: part.item.kind != "set"):
            target, rows = item.target, item.target.take(base)
            place = new if target.rows is None else new[target.rows[0] : target.rows[1]]
            if item.kind == "set":
                place.copy_(target.exchanged(item.tensors["set_weight"].to(base).reshape(rows.shape)))
            elif scale is not None:
                place += target.exchanged(scale * item.bias_delta(rows) if bias else item.change(rows, scale, dora))
    return new


@dataclass
class Change:
    """What LoRAs do to one tensor of a layer together, all computed on the tensor as it was before the first."""

    original: Tensor
    parts: dict[object, list[Part]] = field(default_factory=dict)  # by who does it
    merges: set[object] = field(default_factory=set)  # who of them is merged, and not attached: a file gets these
    dtype: torch.dtype = torch.float32  # in which it is computed; where the tensor is float64, in that

    def value(self, of: Collection[object] | None = None) -> Tensor:
        """The tensor with what all do to it, or some."""
        base = self.original
        parts = [part for by, own in self.parts.items() if of is None or by in of for part in own]
        if not parts:
            return base
        wide = base if base.dtype == torch.float64 else base.to(self.dtype)
        return changed_tensor(wide, parts).to(base.dtype)


class Changes(dict[str, Change]):
    """The changes of a layer's tensors, by short name. A copied layer keeps its values and is nobody's."""

    def __deepcopy__(self, memo: object) -> "Changes":
        return Changes()


def change_in_place(
    network: nn.Module, name: str, by: object, parts: list[Part], *, merged: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Let somebody change a tensor, or change it otherwise than before; the tensor stays the same object.

    `merged` is what it becomes if nobody else changes it, of a merge.
    """
    layer, short = _layer(network, name)
    tensor = _held(layer, short)
    # FSDP2 reads a share where it lies, so that it is overwritten
    own = tensor.data.clone() if is_sharded(tensor) else tensor.data
    change = vars(layer).setdefault("lora_in_place", Changes()).setdefault(short, Change(own))
    change.parts[by] = parts
    if merged is not None:
        change.merges.add(by)
    change.dtype = torch.promote_types(change.dtype, dtype)
    exchange(network, name, change.value() if merged is None or len(change.parts) > 1 else merged)


@torch.no_grad()
def restore(network: nn.Module, by: object) -> None:
    """Take away what somebody changes; what nobody else changes is, bit for bit, what it was."""
    for name in originals(network, by):
        layer, short = _layer(network, name)
        changes = vars(layer)["lora_in_place"]
        change = changes[short]
        del change.parts[by]
        change.merges.discard(by)
        exchange(network, name, change.value())
        if not change.parts:
            del changes[short]


def originals(network: nn.Module, by: object) -> dict[str, Tensor]:
    """The network's own tensors of those that somebody changes."""
    return {name: change.original for name, change in changes_of(network) if by in change.parts}


def original(network: nn.Module, name: str) -> Tensor:
    """A network's own tensor, whoever changes it now."""
    layer, short = _layer(network, name)
    change = vars(layer).get("lora_in_place", {}).get(short)
    return _held(layer, short).data if change is None else change.original


def exchange(module: nn.Module, name: str, new: Tensor) -> None:
    """Give a module's tensor, which stays the same object, another value.

    While a module works with copies on a device (`memory.stages.on_device`), both the copy and its original get it.
    """
    layer, short = _layer(module, name)
    tensor: Any = getattr(layer, short)
    if hasattr(tensor, "copy_of"):
        tensor.data = new.to(tensor)
    tensor = _held(layer, short)
    columns = tensor.shape[1:2]
    if is_sharded(tensor):
        tensor.data.copy_(new)
    else:
        tensor.data = new.to(tensor)  # a module may have been moved since
    if new.shape[1:2] != columns:
        layer.in_features = new.shape[1]  # type: ignore[assignment]
        module.config = replace(module.config, in_channels=new.shape[1])  # type: ignore[type-var]


def is_sharded(tensor: Tensor) -> bool:
    """Whether FSDP2 keeps a share of it on each rank."""
    return hasattr(tensor, "full_tensor")


def _held(layer: nn.Module, short: str) -> Any:
    """A layer's own tensor, while it may work with a copy on a device."""
    tensor = getattr(layer, short)
    return getattr(tensor, "copy_of", tensor)


def _layer(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, short = name.rpartition(".")
    return module.get_submodule(path), short
