"""One tensor in two arrangements: found by shape, confirmed by value, and said."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eridiff.trace.format import give_back, parts_of
from eridiff.trace.record import relative_l2


@dataclass(frozen=True)
class Fitted:
    """A tensor in the other's arrangement; `how` is empty where nothing was done but adding or dropping ones."""

    tensor: Tensor
    how: str


def fit(tensor: Tensor, like: Tensor) -> Fitted | None:
    """`tensor` arranged as `like`: of the arrangements that its shape allows the one that is nearest in value; None if none.

    Ones are dropped and added; axes exchanged, joined and split (channels last, heads first, tokens of an image); a table
    that is the same for all rows is repeated; of a rotary table that holds each value twice one is taken.
    """
    if tensor.shape == like.shape:
        return Fitted(tensor, "")
    sizes = _without_ones(tensor)
    if sizes == _without_ones(like) and len(set(sizes)) == len(sizes):
        return Fitted(tensor.reshape(like.shape), "")
    best: Fitted | None = None
    distance = math.inf
    for found in _arrangements(tensor, like):
        if best is None:
            best = found
        elif distance == math.inf:
            distance = relative_l2(best.tensor, like)
        if found is not best and (there := relative_l2(found.tensor, like)) < distance:
            best, distance = found, there
        if distance == 0:
            break
    return best


def _without_ones(tensor: Tensor) -> list[int]:
    return [size for size in tensor.shape if size != 1]


def _arrangements(tensor: Tensor, like: Tensor) -> Iterator[Fitted]:
    shapes = f"{list(tensor.shape)} against {list(like.shape)}"
    if tensor.numel() == like.numel():
        plain = tensor.reshape(_without_ones(tensor))
        if _without_ones(tensor) == _without_ones(like):
            yield Fitted(tensor.reshape(like.shape), "")
        yield from _permuted(plain, like, shapes)
        target = _without_ones(like)
        for order in _orders(len(target)):  # the other way round: split, then exchange
            if [target[i] for i in order] != _without_ones(plain):
                back = sorted(range(len(order)), key=lambda i: order[i])
                split = plain.reshape([target[i] for i in order]).permute(back)
                yield Fitted(split.reshape(like.shape), f"{shapes}: axes split, order {order}")
        return
    if tensor.numel() < like.numel():
        lacking = like.numel() // tensor.numel()
        bare = tensor.reshape(_without_ones(tensor))
        if list(like.shape[-bare.ndim :]) == list(bare.shape):
            yield Fitted(bare.expand(like.shape), f"{shapes}: the same for each row")
        elif lacking * tensor.numel() == like.numel() and like.ndim > 1 and like.shape[0] > 1:
            rows = [like.shape[0] if i == 0 else 1 for i in range(like.ndim)]
            for found in _arrangements(tensor, like[:1]):
                yield Fitted(found.tensor.repeat(rows), f"{shapes}: the same for each row")
        return
    if tensor.shape[0] > 1 and tensor.numel() == like.numel() * tensor.shape[0] and bool((tensor == tensor[:1]).all()):
        inner = fit(tensor[0], like)
        if inner is not None:
            yield Fitted(inner.tensor, f"{shapes}: equal for each row")
    if tensor.numel() == 2 * like.numel():
        for how, half in (("each value twice", tensor[..., ::2]), ("its halves equal", tensor.chunk(2, dim=-1)[0])):
            inner = fit(half, like)
            if inner is not None:
                yield Fitted(inner.tensor, f"{shapes}: {how}")


def _permuted(plain: Tensor, like: Tensor, shapes: str) -> Iterator[Fitted]:
    target = _without_ones(like)
    for order in _orders(plain.ndim):
        moved = plain.permute(order)
        if list(moved.shape) == target:
            yield Fitted(moved.reshape(like.shape), f"{shapes}: axes in the order {order}")
        elif order == sorted(order) or _joins(list(moved.shape), target):
            how = "reshaped" if order == sorted(order) else f"axes in the order {order}, then joined"
            yield Fitted(moved.reshape(like.shape), f"{shapes}: {how}")


def _joins(sizes: list[int], target: list[int]) -> bool:
    """Whether neighbouring sizes multiply to the target's."""
    rest = list(sizes)
    for size in target:
        product = 1
        while product < size and rest:
            product *= rest.pop(0)
        if product != size:
            return False
    return not rest


def _orders(axes: int) -> list[list[int]]:
    return [list(order) for order in permutations(range(axes))] if axes <= 5 else [list(range(axes))]


def distances(found: Tensor, expected: Tensor) -> dict[str, Any]:
    """Of two tensors of one shape, in float64: relative L2, largest absolute and relative difference, cosine, ULP, first bad index.

    - ulp: the largest distance in units of the last place of the narrower dtype.
    - first: the index of the first value that is not finite or differs by more than 1000 ULP of the largest value.
    """
    narrow = max(
        (t.dtype for t in (found, expected) if t.is_floating_point()), key=lambda d: torch.finfo(d).eps, default=None
    )
    eps = torch.finfo(narrow).eps if narrow else torch.finfo(torch.float64).eps
    sums = torch.zeros(4, dtype=torch.float64)  # squares of difference, found, expected; product
    worst = worst_relative = worst_ulp = 0.0
    first = -1
    scale = max((float(part.double().abs().max()) for part in parts_of(expected) if part.numel()), default=0.0)
    begin = 0
    for a, b in zip(parts_of(found), parts_of(expected), strict=True):
        a, b = a.to("cpu", torch.float64), b.to("cpu", torch.float64)
        gap = (a - b).abs()
        sums += torch.stack([(a - b).square().sum(), a.square().sum(), b.square().sum(), (a * b).sum()])
        worst = max(worst, float(gap.max()))
        worst_relative = max(worst_relative, float((gap / b.abs().clamp_min(1e-3 * scale + 1e-300)).max()))
        worst_ulp = max(worst_ulp, float((gap / (b.abs().clamp_min(1e-3 * scale + 1e-300) * eps)).max()))
        bad = ~(gap <= 1000 * eps * scale)
        if first < 0 and bool(bad.any()):
            first = begin + int(bad.nonzero()[0])
        begin += len(a)
    gap2, a2, b2, product = sums.tolist()
    relative = math.sqrt(gap2) / max(math.sqrt(b2), 1e-300)
    return {
        "relative": relative if math.isfinite(relative) else math.inf,
        "max_abs": worst, "max_rel": worst_relative,
        "cosine": product / max(math.sqrt(a2) * math.sqrt(b2), 1e-300), "ulp": worst_ulp,
        "first": [int(i) for i in np.unravel_index(first, tuple(found.shape))] if first >= 0 else [],
    }  # fmt: skip


def heat(found: Tensor, expected: Tensor) -> list[list[float]]:
    """`[16, 48]` at most: the largest absolute difference in each part of a tensor, as rows of its last axis.

    Band by band, as a whole difference would be the largest tensor of a comparison.
    """
    width = found.shape[-1] if found.ndim else 1
    rows = [side.detach().reshape(-1, width) for side in (found, expected)]
    count = min(16, len(rows[0]))
    bands = []
    for i in range(count):
        band = slice(i * len(rows[0]) // count, -(-(i + 1) * len(rows[0]) // count))
        gap = (rows[0][band].to("cpu", torch.float32) - rows[1][band].to("cpu", torch.float32)).abs().amax(dim=0)
        give_back(found)
        give_back(expected)
        bands.append(torch.nn.functional.adaptive_max_pool1d(gap[None], min(48, width))[0].tolist())
    return bands
