"""CLIP and T5."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eridiff.trace.wrong.parts import Wrong


def positions(change: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]) -> Callable[[Wrong], Wrong]:
    """Of the embedding of positions alone: `change(positions, look_up)`."""

    def make(right: Wrong) -> Wrong:
        def wrong(ids: Tensor, table: Tensor, *rest: Any, **named: Any) -> Tensor:
            def look_up(places: Tensor) -> Tensor:
                return right(places.clamp_max(len(table) - 1), table, *rest, **named)

            counted = torch.arange(ids.shape[-1], device=ids.device)
            return change(ids, look_up) if ids.shape[0] == 1 and torch.equal(ids[0], counted) else look_up(ids)

        return wrong

    return make


def widened(right: Wrong) -> Wrong:
    return lambda ids, table, *rest, **named: right(ids, table, *rest, **named) * table.shape[-1] ** 0.5


def padded_with(value: Callable[[int], int]) -> Callable[[Wrong], Wrong]:
    def wrong(ids: Tensor, end: int) -> Tensor:
        ends = ids == end
        return ids.masked_fill(ends.cumsum(1) > ends.int(), value(end))

    return lambda _: wrong


def pooled_of(
    choose: Callable[[Sequence[Tensor]], Tensor] | None = None, at: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Callable[[Wrong], Wrong]:
    """Of CLIP's pooled state: taken from other hidden states, or `at(last, ids)` in place of the first end token."""

    def make(right: Wrong) -> Wrong:
        def wrong(last: Tensor, ids: Tensor, end: int, hidden: Sequence[Tensor]) -> Any:
            return at(last, ids) if at else right(choose(hidden) if choose else last, ids, end, hidden)

        return wrong

    return make


def unprojected(_: Wrong) -> Wrong:
    def wrong(pooled: Tensor, projection: Any) -> Any:
        try:
            projection.forward = lambda x: x
            return projection(pooled)
        finally:
            del projection.forward

    return wrong


def padding_hidden(_: Wrong) -> Wrong:
    def unseen(ids: Tensor, end: int | None = None) -> Tensor:
        return ids != 0 if end is None else (ids == end).int().cumsum(1) - (ids == end).int() == 0

    return unseen


def buckets(change: Callable[[Wrong, Tensor], Tensor]) -> Callable[[Any], Any]:
    """Of T5's relative positions, key minus query."""
    return lambda right: staticmethod(lambda distance, *_, **__: change(right, distance))


def bias_once(right: Wrong) -> Wrong:
    """T5's relative bias in the first block alone."""

    def forward(self: Any, hidden: Tensor, *rest: Any, **named: Any) -> Any:
        return right(self, hidden, *rest, **named | {"position_bias": None})

    return forward


def gate_behind(right: Wrong) -> Wrong:
    """Of T5's gated MLP: the activation is on wi_1."""

    def forward(self: Any, x: Tensor) -> Any:
        return self.wo(self.wi_0(x) * self.act(self.wi_1(x)))

    return forward
