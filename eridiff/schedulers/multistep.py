"""Samplers that go on with what the network saw in the steps before. The arguments are those of all samplers (`samplers`).

Each begins with the order that its past allows, so that a run may begin anywhere.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from eridiff.schedulers import EXACT, Schedule
from eridiff.schedulers.step import (
    REMEMBERED,
    Draw,
    Past,
    Predict,
    along,
    ask,
    ask_inside,
    direction,
    half_log_snr,
    inner,
    mixed,
    pair,
    place,
    ratio,
    straight,
    toward,
)

FEW_STEPS = 15  # below which diffusers' DEIS ends with a step of the first order
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def dpmpp_2m_rf(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, past: Sequence[Past] = (), draw: Draw | None = None
) -> tuple[Tensor, Past]:
    """DPM-Solver++ (2M) of Lu et al. 2022 in rectified flow's own log SNR, ln((1 - sigma) / sigma), as in diffusers.

    SD 3's original measures in -ln(sigma): that is `dpmpp_2m`.
    """
    seen = ask(predict, x, schedule, i)
    mean = _extrapolated(seen[0], past, schedule, i)
    return toward(x, mean, pair(schedule, i), pair(schedule, i + 1)), seen


def dpmpp_2s(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, past: Sequence[Past] = (), draw: Draw | None = None
) -> tuple[Tensor, Past]:
    """DPM-Solver++ (2S) of Lu et al. 2022 over the points of the schedule: every second step begins anew at the one before.

    An odd step takes the place of the one before it, whose clean image is extrapolated to this one's; the last one is of
    the first order (diffusers' DPMSolverSinglestepScheduler of order 2).
    """
    seen = ask(predict, x, schedule, i)
    end = pair(schedule, i + 1)
    if not i % 2 or i + 1 == schedule.steps or not past:
        return toward(x, seen[0], pair(schedule, i), end), seen
    start = half_log_snr(schedule, i - 1)
    share = (half_log_snr(schedule, i + 1) - start) / (half_log_snr(schedule, i) - start)
    before = past[-1][0]
    mean = before + (1.0 if math.isnan(share) else share) * (seen[0] - before) / 2  # nan: from an infinite sigma
    return toward(mixed(*past[-1], schedule, i - 1), mean, pair(schedule, i - 1), end), seen


def dpmpp_3m_sde(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, past: Sequence[Past] = (), draw: Draw | None = None,
    eta: float = 1.0,
) -> tuple[Tensor, Past]:  # fmt: skip
    """The stochastic DPM-Solver++ of the third order, as in k-diffusion with noise of unit variance."""
    seen = clean, _ = ask(predict, x, schedule, i)
    (alpha, sigma), (alpha2, sigma2) = pair(schedule, i), pair(schedule, i + 1)
    if not sigma2:
        return alpha2 * clean, seen
    length = _length(schedule, i)
    whole = (1 + eta) * length
    mean = clean
    if past and 0 < whole < math.inf:
        reach = -math.expm1(-whole)
        second = 1 - reach / whole
        slope = (clean - past[-1][0]) * (length / _length(schedule, i - 1))
        if len(past) > 1:
            r, r2 = _length(schedule, i - 1) / length, _length(schedule, i - 2) / length
            bend = slope - (past[-1][0] - past[-2][0]) / r2
            slope = slope + bend * (r / (r + r2))
            mean = mean - bend / (r + r2) * ((second / whole - 0.5) / reach)
        mean = mean + slope * (second / reach)
    keep = sigma2 / sigma * math.exp(-eta * length)
    moved = keep * x + (alpha2 - alpha * keep) * mean
    new = sigma2 * math.sqrt(-math.expm1(-2 * eta * length)) if eta else 0.0
    return (moved + new * draw() if new and draw else moved), seen


def unipc(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, past: Sequence[Past] = (), draw: Draw | None = None
) -> tuple[Tensor, Past]:
    """UniPC of Zhao et al. 2023 (B2, order 2, predicting the clean image): what the network saw corrects the step before.

    The prediction is DPM-Solver++ (2M), of the first order on the first and the last step.
    """
    seen = clean, noise = ask(predict, x, schedule, i)
    if past:
        x = _corrected(x, clean, past, schedule, i)
        alpha, sigma = pair(schedule, i)
        noise = (x - alpha * clean) / sigma
        seen = clean, noise
    mean = clean if i + 1 == schedule.steps else _extrapolated(clean, past, schedule, i)
    return toward(x, mean, pair(schedule, i), pair(schedule, i + 1)), seen


def _corrected(x: Tensor, clean: Tensor, past: Sequence[Past], schedule: Schedule, i: int) -> Tensor:
    """The latents at point `i`, gone to again with what the network saw in them."""
    before = past[-1][0]
    length = _length(schedule, i - 1)
    if len(past) == 1:
        mean = (before + clean) / 2
    else:
        far = -_length(schedule, i - 2) / length
        reach = -math.expm1(-length)
        first = 1 / reach - 1 / length  # b of the paper's equation 8, whose R is [[1, 1], [far, 1]]
        second = 1 / reach - 2 * first / length
        weight = (first - second) / (1 - far)
        slope = (past[-2][0] - before) / far
        mean = before + weight * slope + (first - weight) * (clean - before)
    return toward(mixed(*past[-1], schedule, i - 1), mean, pair(schedule, i - 1), pair(schedule, i))


def deis(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, past: Sequence[Past] = (), draw: Draw | None = None
) -> tuple[Tensor, Past]:
    """DEIS of Zhang and Chen 2023 (order 2, over ln rho): the noise is extrapolated over the logarithm of sigma / alpha.

    Of the first order on the first step, and on the last of fewer than 15, as in diffusers.
    """
    seen = ask(predict, x, schedule, i)
    start, end = pair(schedule, i), pair(schedule, i + 1)
    short = i + 1 == schedule.steps and schedule.steps < FEW_STEPS
    if short or not past or not math.isfinite(ratio(schedule, i - 1)):
        return _first(x, seen, schedule, i), seen
    rhos = [ratio(schedule, i - 1), ratio(schedule, i), ratio(schedule, i + 1)]

    def weight(own: float, other: float) -> float:
        """The integral of (ln rho - ln other) / (ln own - ln other) over the step."""
        ends = [rho * (math.log(rho / other) - 1) if rho else 0.0 for rho in rhos[1:]]
        return (ends[1] - ends[0]) / math.log(own / other)

    moved = weight(rhos[1], rhos[0]) * seen[1] + weight(rhos[0], rhos[1]) * past[-1][1]
    return straight(x, moved, schedule, start, end), seen


def lms(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, past: Sequence[Past] = (), draw: Draw | None = None
) -> tuple[Tensor, Past]:
    """The linear multistep method of k-diffusion: the polynomial through up to four directions, integrated over the step."""
    seen = ask(predict, x, schedule, i)
    recent = [(p, place(schedule, i - back)) for back, p in enumerate([seen, *past[: -1 - REMEMBERED : -1]])]
    finite = [(p, where) for p, where in recent if math.isfinite(where)]
    far = place(schedule, i + 1) - recent[0][1]
    if not far or math.isinf(far):
        return _first(x, seen, schedule, i), seen
    powers = torch.arange(len(finite), **EXACT)
    places = torch.tensor([(where - recent[0][1]) / far for _, where in finite], **EXACT)  # the step is from 0 to 1
    weights = torch.linalg.solve(places[None] ** powers[:, None], 1 / (powers + 1))
    moved = sum(far * float(w) * direction(p, schedule) for (p, _), w in zip(finite, weights, strict=True))
    return straight(x, moved, schedule, pair(schedule, i), pair(schedule, i + 1)), seen


def plms(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, past: Sequence[Past] = (), draw: Draw | None = None
) -> tuple[Tensor, Past]:
    """Pseudo linear multistep (Liu et al. 2022, F-PNDM without its warm-up, as latent diffusion has it).

    Adams and Bashforth's weights for the noise of up to four steps, as if they were evenly spaced. Asks the network twice on
    the first step, whose noise is the mean of both ends'.
    """
    seen = ask(predict, x, schedule, i)
    if past or i + 1 == schedule.steps or not math.isfinite(ratio(schedule, i)):
        return _adams(x, seen, past, schedule, i), seen
    end = _first(x, seen, schedule, i)
    noise = (seen[1] + ask(predict, end, schedule, i + 1)[1]) / 2
    return _first(x, (seen[0], noise), schedule, i), seen


def pndm(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, past: Sequence[Past] = (), draw: Draw | None = None
) -> tuple[Tensor, Past]:
    """F-PNDM of Liu et al. 2022: three pseudo Runge-Kutta steps, each of four calls of the network, then as `plms`."""
    seen = ask(predict, x, schedule, i)
    if len(past) >= REMEMBERED or i + 1 == schedule.steps or not math.isfinite(ratio(schedule, i)):
        return _adams(x, seen, past, schedule, i), seen
    start, middle, end = pair(schedule, i), pair(inner(schedule), i), pair(schedule, i + 1)
    second = ask_inside(predict, along(x, seen, schedule, start, middle), schedule, i)
    third = ask_inside(predict, along(x, second, schedule, start, middle), schedule, i)
    last = ask(predict, along(x, third, schedule, start, end), schedule, i + 1)
    noise = (seen[1] + 2 * second[1] + 2 * third[1] + last[1]) / 6
    return _first(x, (seen[0], noise), schedule, i), seen


def between(schedule: Schedule) -> Tensor:
    """`[steps]`: the timesteps inside the steps that `pndm` asks at, rounded down from the middle; the last is not asked."""
    lower = schedule.times[1:]
    return torch.cat([lower + ((schedule.times[:-1] - lower) / 2).floor(), schedule.times[-1:]])


def _adams(x: Tensor, seen: Past, past: Sequence[Past], schedule: Schedule, i: int) -> Tensor:
    recent = [seen, *past[: -1 - REMEMBERED : -1]]
    noise = sum(w * p[1] for w, p in zip(ADAMS_BASHFORTH[len(recent) - 1], recent, strict=True))
    assert isinstance(noise, Tensor)
    return _first(x, (seen[0], noise), schedule, i)


def _first(x: Tensor, seen: Past, schedule: Schedule, i: int) -> Tensor:
    """A step of the first order; from an infinite sigma to the mixture of what was seen."""
    if not math.isfinite(place(schedule, i)):
        return mixed(*seen, schedule, i + 1)
    return along(x, seen, schedule, pair(schedule, i), pair(schedule, i + 1))


def _extrapolated(clean: Tensor, past: Sequence[Past], schedule: Schedule, i: int) -> Tensor:
    """The clean image of the middle of a step, by those of this step and the one before; on a step to sigma 0 this one's."""
    if not past or not schedule.sigmas[i + 1]:
        return clean
    return clean + (clean - past[-1][0]) * (_length(schedule, i) / (2 * _length(schedule, i - 1)))


def _length(schedule: Schedule, i: int) -> float:
    return half_log_snr(schedule, i + 1) - half_log_snr(schedule, i)
