"""Rows of a LoRA: a change of a fused weight taken apart, changes of its parts put together, halves exchanged.

Everything is exact: matrices are cut, stacked or moved, never multiplied out.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from eridiff.errors import LoraError
from eridiff.lora.deltas import Item
from eridiff.lora.names import Target

ROWS = ("up", "up_bias", "diff_b", "diff", "set_weight", "magnitude", "w_norm", "b_norm")  # one row an output
FOLDED = ("up", "up_bias")  # what alpha / rank multiplies
HADAMARD = ("hada_w1_a", "hada_w2_a")


def part_of(items: Sequence[Item], part: Target, rows: int) -> Item | None:
    """What items of one tensor of so many `rows` do to a part of it, as one item in the part's order; None if nothing.

    Raises LoraError where that is not an item of a known kind.
    """
    start, stop = part.rows or (0, rows)
    pieces = [(*(item.target.rows or (0, rows)), in_native_order(item)) for item in items]
    touching = sorted((p for p in pieces if p[0] < stop and start < p[1]), key=lambda piece: piece[0])
    if not touching:
        return None
    first, last, item = touching[0]
    if len(touching) == 1 and first <= start and stop <= last:
        found = item if (first, last) == (start, stop) else cut(item, start - first, stop - first)
    elif all(start <= begin and end <= stop for begin, end, _ in touching):
        found = stacked(touching, start, stop)
    else:
        raise LoraError(f"{items[0].target.module}: the rows of its LoRA cross those of {part}")
    return None if found is None else replace(in_native_order(replace(found, target=part)), target=part)


def along_rows(item: Item, name: str) -> bool:
    """Whether a tensor of an item has a row for each row of the weight, and moves with them."""
    if name in ("dora_scale", "multiplier"):  # of columns as well
        return item.tensors[name].shape[0] > 1 if name == "dora_scale" else not bool(item.tensors["on_input"].any())
    if name in HADAMARD and "hada_t1" in item.tensors:
        raise LoraError(f"{item.target}: rows of a {item.kind} with a Tucker core cannot be taken apart or exchanged")
    return name in ROWS or name in HADAMARD


def in_native_order(item: Item) -> Item:
    """The same item with rows in our order; exchanging halves is its own inverse."""
    if not item.target.swapped:
        return item
    moved: dict[str, Tensor] = {}
    for name, tensor in item.tensors.items():
        blocks = name in ("lokr_w1", "lokr_w1_a")  # the outer factor counts blocks of rows
        if blocks and tensor.shape[0] % 2:
            raise LoraError(f"{item.target}: the halves of a lokr of {tensor.shape[0]} blocks cannot be exchanged")
        moved[name] = tensor.roll(tensor.shape[0] // 2, 0) if blocks or along_rows(item, name) else tensor
    return replace(item, tensors=moved, target=replace(item.target, swapped=False))


def cut(item: Item, start: int, stop: int) -> Item | None:
    """Rows [start, stop) of an item; None if they are all zero.

    Of a block-diagonal `up` only the columns that these rows use stay, as before the parts were stacked.
    """
    if item.kind == "lokr":
        raise LoraError(f"{item.target}: a lokr of a fused weight cannot be split")
    moved = {n: tensor[start:stop] if along_rows(item, n) else tensor for n, tensor in item.tensors.items()}
    if item.kind == "lora" and "mid" not in moved:
        used = moved["up"].flatten(1).any(0)
        count = int(used.sum())
        idle = not any(bool(moved[n].any()) for n in ("up_bias", "diff_b") if n in moved) and not item.dora
        if count == 0 and idle and bool(item.tensors["up"].any()):
            return None
        if 0 < count < len(used) and item.ratio * count / count == item.ratio:
            moved |= {"up": moved["up"][:, used], "down": moved["down"][used]}
            alpha = None if item.alpha is None else item.ratio * count
            return replace(item, tensors=moved, rank=count, alpha=alpha)
    elif item.kind == "full" and not any(bool(tensor.any()) for tensor in moved.values()):
        return None
    return replace(item, tensors=moved)


def stacked(pieces: Sequence[tuple[int, int, Item]], start: int, stop: int) -> Item:
    """Items of disjoint rows as one of rows [start, stop); rows without an item stay unchanged."""
    items = [item for _, _, item in pieces]
    first = items[0]
    whole = sum(last - begin for begin, last, _ in pieces) == stop - start
    kinds = {item.kind for item in items}
    if len(kinds) > 1 or first.kind not in ("lora", "full", "set") or any("mid" in item.tensors for item in items):
        raise LoraError(
            f"{first.target.module}: changes of the kind {' and '.join(sorted(kinds))} of some of its rows make none of the whole weight"
        )
    for name in ("magnitude", "dora_scale", "set_weight"):
        having = [name in item.tensors for item in items]
        if any(having) and not (whole and all(having)):
            raise LoraError(
                f"{first.target.module}: some of its rows have no {name}, which cannot be left out of a whole"
            )
    if not all(along_rows(item, "dora_scale") for item in items if "dora_scale" in item.tensors):
        raise LoraError(f"{first.target.module}: lengths of columns of parts are none of the whole; write diffusers")
    same_ratio = len({item.ratio for item in items}) == 1
    ratio = first.ratio if same_ratio else 1.0
    if not same_ratio and any(_rounds(i.tensors[n], i.ratio) for i in items for n in FOLDED if n in i.tensors):
        items = [replace(i, tensors={n: t.float() for n, t in i.tensors.items()}) for i in items]
    tensors, rank, shared = dict[str, Tensor](), first.rank, False
    if first.kind == "lora":
        downs = [item.tensors["down"] for item in items]
        shared = all(torch.equal(down, downs[0]) for down in downs)
        tensors["down"] = torch.cat(downs[:1] if shared else downs)
        rank = len(tensors["down"])
    column = 0
    for (begin, last, _), item in zip(pieces, items, strict=True):
        for name, tensor in item.tensors.items():
            if name == "down":
                continue
            shape = (rank or 0, *tensor.shape[2:]) if name == "up" else tensor.shape[1:]
            own = tensors.setdefault(name, tensor.new_zeros(stop - start, *shape))[begin - start : last - start]
            if name == "up":
                own = own.narrow(1, column, tensor.shape[1])
                column += 0 if shared else tensor.shape[1]
            own.copy_(tensor if same_ratio or name not in FOLDED else tensor * item.ratio)
    alpha = None if rank is None or all(item.alpha is None for item in items) and ratio == 1 else ratio * rank
    return replace(first, tensors=tensors, ratio=ratio, alpha=alpha, rank=rank)


def _rounds(tensor: Tensor, factor: float) -> bool:
    """Whether a product, which float32 may round, is rounded further by the tensor's narrower dtype."""
    return tensor.itemsize < 4 and not torch.equal((tensor * factor).float(), tensor.float() * factor)
