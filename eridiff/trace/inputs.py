"""Inputs of a network that differ from another program's: which known difference turns one into the other.

What a network is given is made before any of its modules runs, so no change of the network explains it. Here each known
mistake is a function of the right input, and the one that gives the wrong input is the cause.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from eridiff.models import autoencoder
from eridiff.schedulers import EXACT
from eridiff.schedulers.flow_match import even_sigmas, shifted
from eridiff.trace.record import relative_l2

SD3_SHIFT = 3.0
Mistake = tuple[str, Callable[[Tensor], Tensor]]


def cause_of(name: str, found: Tensor, expected: Tensor, bound: float) -> tuple[str, float] | None:
    """The mistake that makes `found` of `expected` to `bound`, and what is left; None if none does, or the shapes differ.

    - name: of the input, `forward:latents`, `prepare:times`; which mistakes are tried depends on the argument.
    """
    if found.shape != expected.shape or not expected.is_floating_point() or not expected.numel():
        return None
    argument = name.partition("@")[0].rpartition(":")[2]
    wide = expected.to("cpu", torch.float64)
    for says, mistake in _mistakes(argument, wide):
        wrong = mistake(wide)
        left = relative_l2(found, wrong) if wrong.shape == found.shape else float("inf")
        if left <= bound:
            return says, left
    return None


def _mistakes(argument: str, expected: Tensor) -> Iterator[Mistake]:
    if argument == "latents":
        yield from _latents(expected)
    if argument == "times":
        yield "times are on the scale of 1 in place of 1000, or divided by 1000 twice", lambda t: t / 1000
        yield "times are on the scale of 1000 in place of 1", lambda t: 1000 * t
        yield "times run from the image to the noise, 1 - t in place of t", lambda t: 1 - t
        yield "times are in the other order", lambda t: t.flip(0)
        yield "each step has the next one's time", lambda t: torch.cat([t[1:], 0 * t[:1]])
        if expected.ndim == 1 and len(expected) > 2 and float(expected.max()) <= 1:
            yield from _schedule(expected)
    if argument == "guidance":
        yield "the guidance is on the scale of 1000 in place of 1", lambda g: 1000 * g
        yield "the guidance is on the scale of 1 in place of 1000", lambda g: g / 1000
    if argument in ("text", "pooled", "vector"):
        yield from _joined(expected, argument)
    if argument == "pictures":
        yield "images are in [0, 1] in place of [-1, 1]", lambda x: (x + 1) / 2
        yield "images are in [0, 255] in place of [-1, 1]", lambda x: (x + 1) * 127.5
        yield "the colours are blue, green, red in place of red, green, blue", lambda x: x.flip(1)
    yield "it is rounded to bfloat16", lambda x: x.bfloat16()
    yield "it is zero", lambda x: 0 * x


def _latents(expected: Tensor) -> Iterator[Mistake]:
    if expected.ndim == 3 and expected.shape[-1] % 4 == 0:
        inside = "2 x 2 patches are packed as ({}) in place of (channel, row, column)"
        patches = expected.unflatten(-1, (-1, 2, 2))
        yield inside.format("row, column, channel"), lambda _: patches.movedim(2, -1).flatten(2)
        yield inside.format("column, row, channel"), lambda _: patches.movedim(2, -1).transpose(2, 3).flatten(2)
        yield inside.format("channel, column, row"), lambda _: patches.transpose(-1, -2).flatten(2)
        side = round(expected.shape[1] ** 0.5)
        if side * side == expected.shape[1]:
            grid = expected.unflatten(1, (side, side))
            yield "tokens run column by column in place of row by row", lambda _: grid.transpose(1, 2).flatten(1, 2)
    if expected.ndim == 4:
        yield "rows and columns are exchanged", lambda x: x.transpose(2, 3)
    for family, config in autoencoder.PRESETS.items():
        scale, shift = config.scale, config.shift
        yield f"the latents' scale and shift, {family}'s, are left out", lambda x, a=scale, b=shift: x / a + b  # type: ignore[misc]
        yield f"the latents' scale, {family}'s, is left out", lambda x, a=scale: x / a  # type: ignore[misc]
        if shift:
            yield f"the latents' shift, {family}'s, is left out", lambda x, a=scale, b=shift: x + a * b  # type: ignore[misc]
            yield (
                f"the latents are shifted behind the scale, {family}'s",
                lambda x, a=scale, b=shift: x + a * b - b,  # type: ignore[misc]
            )


def _schedule(expected: Tensor) -> Iterator[Mistake]:
    """Of flow matching. Its shift adds a number to logit(t), so that the right times tell the shift."""
    steps = len(expected)
    even = even_sigmas(steps)[:-1]  # Flux's
    low = float(shifted(torch.tensor(0.001, **EXACT), SD3_SHIFT))
    for right in (even, torch.linspace(1, low, steps, **EXACT)):  # SD 3's
        by = float((torch.logit(expected[1:]) - torch.logit(right[1:])).mean())
        if relative_l2(_moved(right, by), expected) < 1e-5:
            break
    else:
        return
    for says, points, shift in (
        (
            "the schedule ends at 0: as many points as steps, in place of one more",
            torch.linspace(1, 0, steps, **EXACT),
            by,
        ),
        ("the schedule ends at 1/1000", torch.linspace(1, 1e-3, steps, **EXACT), by),
        ("the schedule ends at 1/steps, as Flux's", even, by),
        ("the schedule ends at 1/1000 that is shifted, as SD 3's", torch.linspace(1, low, steps, **EXACT), by),
        ("the schedule has its points in the middle of each step", even - 0.5 / steps, by),
        ("the schedule is not shifted", right, 0.0),
        ("the schedule is shifted twice", right, 2 * by),
        ("the schedule is shifted towards the image in place of the noise", right, -by),
    ):
        yield says, lambda _, points=points, shift=shift: _moved(points, shift)  # type: ignore[misc]


def _moved(points: Tensor, by: float) -> Tensor:
    return torch.sigmoid(torch.logit(points.double()) + by)


def _joined(expected: Tensor, argument: str) -> Iterator[Mistake]:
    if expected.ndim == 3:
        for n in range(1, expected.shape[1]):
            yield f"the text's parts are in the other order, the first {n} tokens last", lambda x, n=n: x.roll(-n, 1)  # type: ignore[misc]
    used = int(expected.reshape(-1, expected.shape[-1]).any(0).nonzero().max()) + 1 if bool(expected.any()) else 0
    what = "features" if argument == "text" else "numbers"
    for n in range(1, used):
        yield (
            f"the encoders' parts are in the other order, the first {n} {what} last",
            lambda x, n=n: torch.cat([x[..., n:used], x[..., :n], x[..., used:]], dim=-1),  # type: ignore[misc]
        )
