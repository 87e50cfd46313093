"""What all samplers are written with: points, what the network sees in latents, and the two ways to another point.

Every point is `x = alpha * clean + sigma * noise`; a pair (alpha, sigma) stands for it. The place of a point is what a
straight step is measured in: sigma / alpha, and in rectified flow sigma.
"""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from eridiff.schedulers import Schedule

Predict = Callable[[Tensor, int], Tensor]
Draw = Callable[[], Tensor]
Past = tuple[Tensor, Tensor]  # (clean, noise) that the network saw in the latents of a step
Sampler = Callable[[Predict, Tensor, Schedule, int, Sequence[Past], Draw | None], tuple[Tensor, Past]]
Pair = tuple[float, float]  # (alpha, sigma)
REMEMBERED = 3  # steps before, at most, that a sampler looks back on
NEARLY_ALL_NOISE = 1e-6  # the least alpha that a log SNR of rectified flow is measured at, as in diffusers' UniPC


def clean_noise(x: Tensor, output: Tensor, schedule: Schedule, i: int) -> Past:
    """(clean, noise) that latents `x` at point `i` and the network's raw `output` imply; all of one shape.

    velocity is noise - clean, as rectified flow trains it; v is alpha * noise - sigma * clean (Salimans and Ho 2022), with
    the alpha and sigma of variance-preserving space.
    """
    alpha, sigma = pair(schedule, i)
    if schedule.prediction == "velocity":
        return x - sigma * output, x + alpha * output
    if schedule.prediction == "epsilon":
        return (x - sigma * output) / alpha, output
    if schedule.prediction == "sample":
        return output, (x - alpha * output) / sigma
    if schedule.prediction == "v":
        size = math.hypot(alpha, sigma)  # 1 in variance-preserving space
        x, alpha, sigma = x / size, alpha / size, sigma / size
        return alpha * x - sigma * output, sigma * x + alpha * output
    raise ValueError(f"unknown prediction type {schedule.prediction!r}")


def pair(schedule: Schedule, i: int) -> Pair:
    """(alpha, sigma) of point `i`."""
    return float(schedule.alphas[i]), float(schedule.sigmas[i])


def ratio(schedule: Schedule, i: int) -> float:
    """sigma / alpha of point `i`; infinite where all is noise."""
    alpha, sigma = pair(schedule, i)
    return sigma / alpha if alpha else math.inf


def is_flow(schedule: Schedule) -> bool:
    """Whether the network learned rectified flow."""
    return schedule.prediction == "velocity"


def half_log_snr(schedule: Schedule, i: int) -> float:
    """ln(alpha / sigma), also of rectified flow, whose schedules measure in -ln(sigma)."""
    alpha, sigma = pair(schedule, i)
    if not is_flow(schedule):
        return float(schedule.half_log_snr[i])
    return math.log(max(alpha, NEARLY_ALL_NOISE) / sigma) if sigma else math.inf


def mixed(clean: Tensor, noise: Tensor, schedule: Schedule, i: int) -> Tensor:
    """The latents at point `i` that a clean image and a noise make."""
    return float(schedule.alphas[i]) * clean + float(schedule.sigmas[i]) * noise


def ask(predict: Predict, x: Tensor, schedule: Schedule, i: int) -> Past:
    """(clean, noise) that the network sees in `x` at point `i`; both of the clipped image if there is a `clip`."""
    clean, noise = raw(predict, x, schedule, i)
    return clipped(clean, noise, x, schedule, i)


def raw(predict: Predict, x: Tensor, schedule: Schedule, i: int) -> Past:
    """The same, never clipped."""
    output = predict(float(schedule.input_scale[i]) * x, i)
    return clean_noise(x, output.to(x.dtype), schedule, i)


def ask_inside(predict: Predict, x: Tensor, schedule: Schedule, i: int) -> Past:
    """(clean, noise) that the network sees in `x` at the point inside step `i`."""
    inside = inner(schedule)
    output = predict(float(inside.input_scale[i]) * x, schedule.steps + i)
    clean, noise = clean_noise(x, output.to(x.dtype), inside, i)
    return clipped(clean, noise, x, inside, i)


def clipped(clean: Tensor, noise: Tensor, x: Tensor, schedule: Schedule, i: int) -> Past:
    """The clean image clipped as the schedule says, and the noise that `x` then has."""
    if schedule.clip is None:
        return clean, noise
    alpha, sigma = pair(schedule, i)
    clean = clean.clamp(-schedule.clip, schedule.clip)
    return clean, (x - alpha * clean) / sigma


def inner(schedule: Schedule) -> Schedule:
    """The points inside the steps. Raises ValueError where there are none, which `samplers.with_inside` adds."""
    if schedule.inside is None:
        raise ValueError("this sampler asks the network inside a step: give it a schedule of `with_inside`")
    return schedule.inside


def place(schedule: Schedule, i: int) -> float:
    """What straight steps are measured in."""
    return float(schedule.sigmas[i]) if is_flow(schedule) else ratio(schedule, i)


def direction(seen: Past, schedule: Schedule) -> Tensor:
    """Along which latents move, per place."""
    return seen[1] - seen[0] if is_flow(schedule) else seen[1]


def straight(x: Tensor, moved: Tensor | float, schedule: Schedule, start: Pair, end: Pair) -> Tensor:
    """From a point to another along `moved`, a direction times the distance of their places."""
    return x + moved if is_flow(schedule) else end[0] / start[0] * x + end[0] * moved


def along(x: Tensor, seen: Past, schedule: Schedule, start: Pair, end: Pair) -> Tensor:
    """From a point to another, straight, as the noise that was seen says (an Euler step of any length)."""
    far = end[1] - start[1] if is_flow(schedule) else end[1] / end[0] - start[1] / start[0]
    return straight(x, far * direction(seen, schedule), schedule, start, end)


def toward(x: Tensor, mean: Tensor, start: Pair, end: Pair) -> Tensor:
    """From a point to another while the clean image is `mean` (the exponential integrator of Lu et al. 2022)."""
    keep = end[1] / start[1]
    return keep * x + (end[0] - start[0] * keep) * mean
