"""Inputs of a network that differ from another program's: which known mistake makes one of the other.

What a network is given is made before any of its modules runs, so no change of the network explains it. Here each known
mistake is a function of the right input. Where a trace has the input, the mistake that gives it is the cause; where it does
not, the mistake is tried as any other cause, on what the network is called with.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from eridiff.models import autoencoder
from eridiff.models.layers import sinusoid
from eridiff.schedulers import EXACT
from eridiff.schedulers.flow_match import even_sigmas, shifted
from eridiff.trace.causes import Cause
from eridiff.trace.record import relative_l2

SD3_SHIFT = 3.0
SIZES = 256  # numbers of the sinusoid of each of SDXL's sizes
TRIED = 64  # orders of what is joined, where the trace does not have it
Mistake = tuple[str, Callable[[Tensor], Tensor]]


def cause_of(name: str, found: Tensor, expected: Tensor, bound: float) -> tuple[str, float] | None:
    """The mistake that makes `found` of `expected`, and what is left; None if none does, or the shapes differ.

    What is left is at most `bound`, or a ten-thousandth of the difference: sinusoids in float32 are not nearer to each other.

    - name: of the input, `forward:latents`, `prepare:times`; which mistakes are tried depends on the argument.
    """
    if found.shape != expected.shape or not expected.is_floating_point() or not expected.numel():
        return None
    argument = name.partition("@")[0].rpartition(":")[2]
    found, wide = (t.to("cpu", torch.float64) for t in (found, expected))
    factor = float((found * wide).sum() / wide.square().sum().clamp_min(1e-300))
    for says, mistake in [
        *_mistakes(argument, wide, found),
        (f"it is {factor:.4g} times as large", lambda x: factor * x),
    ]:
        wrong = mistake(wide)
        left = relative_l2(found, wrong) if wrong.shape == found.shape else float("inf")
        if left <= max(bound, 1e-4 * relative_l2(found, wide)):
            return says, left
    return None


def causes_of_inputs(function: str, arguments: Mapping[str, Tensor]) -> list[Cause]:
    """The mistakes in what a network is called with, `Flux.forward` and its arguments, as causes."""
    return [
        Cause(says, function, _called_with(argument, mistake), argument)
        for argument, value in arguments.items()
        if value.is_floating_point() and value.numel()
        for says, mistake in _mistakes(argument, value.detach().to("cpu", torch.float64))
    ]


def _called_with(argument: str, mistake: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    def make(right: Any) -> Any:
        @wraps(right)
        def wrong(*args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(right).bind(*args, **kwargs)
            value = bound.arguments[argument]
            bound.arguments[argument] = mistake(value.to("cpu", torch.float64)).to(value)
            return right(*bound.args, **bound.kwargs)

        return wrong

    return make


def _mistakes(argument: str, expected: Tensor, found: Tensor | None = None) -> Iterator[Mistake]:
    """What is done wrong to an argument, in the order in which it is tried; some of it can be read off what was found."""
    if argument == "latents":
        yield from _latents(expected)
    if argument == "times":
        yield "times are on the scale of 1 in place of 1000, or divided by 1000 twice", lambda t: t / 1000
        yield "times are on the scale of 1000 in place of 1", lambda t: 1000 * t
        yield "times run from the image to the noise, 1 - t in place of t", lambda t: 1 - t
        yield "times are in the other order", lambda t: t.flip(0)
        yield "each step has the next one's time", lambda t: torch.cat([t[1:], 0 * t[:1]])
        thousand = float(expected.max()) <= 1
        yield (
            "times are rounded to whole numbers of 1000",
            lambda t: (1000 * t).round() / 1000 if thousand else t.round(),
        )
        yield "times are one of 1000 too late", lambda t: t + (0.001 if thousand else 1)
        yield "times are rounded to float16", lambda t: t.half()
        if expected.ndim == 1 and len(expected) > 2 and thousand:
            yield from _schedule(expected)
    if argument == "guidance":
        yield "the guidance is on the scale of 1000 in place of 1", lambda g: 1000 * g
        yield "the guidance is on the scale of 1 in place of 1000", lambda g: g / 1000
    if argument in ("text", "pooled", "vector"):
        if argument == "vector":
            yield from _sizes(expected)
        yield from _joined(expected, argument, found)
        if len(expected) > 1:
            yield "the prompts are in the other order, positive and negative", lambda x: x.flip(0)
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
        count = expected.shape[1]
        for height in (h for h in range(2, count) if count % h == 0):
            turned = expected.unflatten(1, (height, -1)).transpose(1, 2).flatten(1, 2)
            yield "tokens run column by column in place of row by row", lambda _, x=turned: x  # type: ignore[misc]
    if expected.ndim == 4:
        yield "rows and columns are exchanged", lambda x: x.transpose(2, 3)
    if expected.ndim == 4 and expected.shape[1] == 9:  # SDXL's inpainting: latents, mask, masked latents
        yield "the channels are latents, masked image, mask", lambda x: x[:, [0, 1, 2, 3, 5, 6, 7, 8, 4]]
        yield "the mask is inverted", lambda x: torch.cat([x[:, :4], 1 - x[:, 4:5], x[:, 5:]], dim=1)
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


def _joined(expected: Tensor, argument: str, found: Tensor | None) -> Iterator[Mistake]:
    """The parts of several encoders in the other order: the tokens of CLIP and T5, the features of both CLIPs.

    Features that only other tokens have, SD 3's zeros beside CLIP, are not moved.
    """
    rows = expected if expected.ndim == 3 else expected[:, None]
    used = int(rows[:, 0].any(0).nonzero().max()) + 1 if bool(rows[:, 0].any()) else 0
    narrow = ~rows[..., used:].any(-1).any(0)  # [T]

    def features_last(x: Tensor, n: int) -> Tensor:
        whole = x if x.ndim == 3 else x[:, None]
        moved = torch.cat([whole[..., n:used], whole[..., :n], whole[..., used:]], dim=-1)
        return torch.where(narrow[:, None], moved, whole).reshape(x.shape)

    wrong = None if found is None else found.reshape(rows.shape)
    for n in _ends(rows, wrong, rows.shape[1], 1):
        yield f"the text's parts are in the other order, the first {n} tokens last", lambda x, n=n: x.roll(-n, 1)  # type: ignore[misc]
    what = "features" if argument == "text" else "numbers"
    for n in _ends(rows[:, narrow], None if wrong is None else wrong[:, narrow], used, 2):
        yield (
            f"the encoders' parts are in the other order, the first {n} {what} last",
            lambda x, n=n: features_last(x, n),  # type: ignore[misc]
        )


def _ends(rows: Tensor, found: Tensor | None, count: int, dim: int) -> list[int]:
    """Where the first part may end: what now is first says it, else a few places and those of the published encoders."""
    if found is not None:
        gaps = (rows.narrow(dim, 0, count) - found.narrow(dim, 0, 1)).square()
        nearest = int(gaps.movedim(dim, 0).flatten(1).sum(1).argmin()) if count else 0
        return [nearest] if nearest else []
    every = max(1, -(-count // TRIED))
    return sorted({n for n in (*range(every, count, every), 77, count - 77) if 0 < n < count})


def _sizes(expected: Tensor) -> Iterator[Mistake]:
    """SDXL's numbers behind the pooled text, each as a sinusoid: two of the original, of the crop, of the target."""
    count = 0
    while expected.shape[1] > (count + 1) * SIZES and _is_sinusoid(expected, count):
        count += 1
    if not count:
        return
    begin = expected.shape[1] - count * SIZES
    told = expected[:, begin:].unflatten(1, (count, 2, -1))
    # the last frequency is so low that no number goes around
    lowest = float(sinusoid(torch.ones(1, **EXACT), SIZES)[0, SIZES - 1].asin())
    numbers = (2 * torch.atan2(told[:, :, 1, -1], told[:, :, 0, -1]) / lowest).round() / 2

    def with_numbers(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.cat([x[:, :begin], sinusoid(change(numbers), SIZES).flatten(1)], dim=1)

    yield "the sizes come before the pooled text", lambda x: torch.cat([x[:, begin:], x[:, :begin]], dim=1)
    yield "the pooled text is zero", lambda x: torch.cat([0 * x[:, :begin], x[:, begin:]], dim=1)
    yield "the sizes are zero", with_numbers(lambda n: 0 * n)
    swapped = [i ^ 1 if i ^ 1 < count else i for i in range(count)]
    yield "the sizes are (width, height) in place of (height, width)", with_numbers(lambda n: n[:, swapped])
    if count == 6:
        yield "the crop comes after the target size", with_numbers(lambda n: n[:, [0, 1, 4, 5, 2, 3]])
    if count == 5:
        yield "the aesthetic score is 2.5", with_numbers(lambda n: torch.cat([n[:, :4], 0 * n[:, 4:] + 2.5], dim=1))
        yield "the aesthetic score is 6.0", with_numbers(lambda n: torch.cat([n[:, :4], 0 * n[:, 4:] + 6.0], dim=1))
    yield "the sizes are in units of latents, an eighth", with_numbers(lambda n: n / 8)
    yield "the sizes are rounded to bfloat16", with_numbers(lambda n: n.bfloat16().double())
    yield (
        "the sizes' sinusoids have sines first in place of cosines",
        lambda x: torch.cat([x[:, :begin], told.flip(2).flatten(1)], dim=1),
    )


def _is_sinusoid(expected: Tensor, number: int) -> bool:
    end = expected.shape[1] - number * SIZES
    cosines, sines = expected[:, end - SIZES : end].chunk(2, dim=1)
    return bool(((cosines.square() + sines.square() - 1).abs() < 1e-2).all())
