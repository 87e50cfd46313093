"""Samplers that ask the network at a point inside each step too, or with more noise than the step begins with.

These points depend on the sampler, not on the schedule alone: `RATIOS` says where, sigma / alpha of the point inside step
`i`. The arguments are those of all samplers (`samplers`). Ancestral ones go to less noise than the next point has, and new
noise is added for the rest; in rectified flow by the rule of ComfyUI's RF samplers.
"""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from eridiff.schedulers import Schedule
from eridiff.schedulers.step import (
    NEARLY_ALL_NOISE,
    Draw,
    Pair,
    Past,
    Predict,
    along,
    ask,
    ask_inside,
    direction,
    inner,
    is_flow,
    mixed,
    pair,
    place,
    ratio,
    straight,
    toward,
)


def lower(schedule: Schedule, start: float, end: float, eta: float) -> float:
    """sigma / alpha of where an ancestral step between two such ratios goes before the new noise."""
    if not eta or not end:
        return end
    if not is_flow(schedule):
        return end * math.sqrt(max(0.0, 1 - eta**2 * (1 - (end / start) ** 2)))
    first, last = sigma_of(start), sigma_of(end)
    down = last * (1 + (last / first - 1) * eta)
    return down / (1 - down)


def sigma_of(found: float) -> float:
    """Rectified flow's sigma of a ratio sigma / (1 - sigma)."""
    return 1.0 if math.isinf(found) else found / (1 + found)


def landing(schedule: Schedule, i: int, eta: float) -> Pair:
    """The point that an ancestral step `i` goes to before the new noise."""
    if not eta:
        return pair(schedule, i + 1)
    down = lower(schedule, ratio(schedule, i), ratio(schedule, i + 1), eta)
    alpha = 1 - sigma_of(down) if is_flow(schedule) else float(schedule.alphas[i + 1])
    return alpha, alpha * down


def renewed(x: Tensor, landed: Pair, schedule: Schedule, i: int, eta: float, noise: Tensor | None) -> Tensor:
    """Latents at the point of an ancestral step's landing -> at the next point of the schedule."""
    alpha, sigma = pair(schedule, i + 1)
    scale = alpha / landed[0]
    new = math.sqrt(max(0.0, sigma**2 - (scale * landed[1]) ** 2)) if eta else 0.0
    x = x if scale == 1 else scale * x
    return x + new * noise if new and noise is not None else x


def euler_ancestral_rf(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, past: Sequence[Past] = (), draw: Draw | None = None,
    eta: float = 1.0,
) -> tuple[Tensor, Past]:  # fmt: skip
    """Euler's ancestral step of rectified flow as in ComfyUI: with `eta` 1 it lands at sigma'^2 / sigma."""
    seen = ask(predict, x, schedule, i)
    landed = landing(schedule, i, eta)
    moved = toward(x, seen[0], pair(schedule, i), landed)
    return renewed(moved, landed, schedule, i, eta, draw() if draw and eta and landed[1] else None), seen


def dpm2(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, past: Sequence[Past] = (), draw: Draw | None = None
) -> tuple[Tensor, Past]:
    """DPM-Solver-2 (Lu et al. 2022, algorithm 1) as k-diffusion takes it: a straight step with the noise of its middle.

    The middle is that of ln(sigma). Asks the network twice, on a step to sigma 0 or from an infinite one once.
    """
    return dpm2_ancestral(predict, x, schedule, i, eta=0.0)


def dpm2_ancestral(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, past: Sequence[Past] = (), draw: Draw | None = None,
    eta: float = 1.0,
) -> tuple[Tensor, Past]:  # fmt: skip
    """`dpm2` to less noise than the next point has, and new noise for the rest."""
    seen = ask(predict, x, schedule, i)
    start, landed = pair(schedule, i), landing(schedule, i, eta)
    if not landed[1] or not math.isfinite(place(schedule, i)):
        moved = toward(x, seen[0], start, landed)
    else:
        middle = along(x, seen, schedule, start, pair(inner(schedule), i))
        moved = along(x, ask_inside(predict, middle, schedule, i), schedule, start, landed)
    return renewed(moved, landed, schedule, i, eta, draw() if draw and eta and landed[1] else None), seen


def dpmpp_2s_ancestral(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, past: Sequence[Past] = (), draw: Draw | None = None,
    eta: float = 1.0,
) -> tuple[Tensor, Past]:  # fmt: skip
    """DPM-Solver++(2S) of Lu et al. 2022 with the clean image of the middle of ln(alpha / sigma), ancestral (k-diffusion)."""
    seen = ask(predict, x, schedule, i)
    start, landed, mean = pair(schedule, i), landing(schedule, i, eta), seen[0]
    if landed[1] and (is_flow(schedule) or start[0]):
        middle = toward(x, mean, start, pair(inner(schedule), i))
        mean, _ = ask_inside(predict, middle, schedule, i)
    moved = toward(x, mean, start, landed)
    return renewed(moved, landed, schedule, i, eta, draw() if draw and eta and landed[1] else None), seen


def dpmpp_sde(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, past: Sequence[Past] = (), draw: Draw | None = None,
    eta: float = 1.0,
) -> tuple[Tensor, Past]:  # fmt: skip
    """The stochastic DPM-Solver++ of k-diffusion: an ancestral step to the middle, and one with the clean image seen there.

    Both noises are of one Brownian motion over sigma: the step's goes on where the middle's ended. k-diffusion and diffusers
    take the same motion from torchsde's tree, which gives other values for a seed.
    """
    seen = ask(predict, x, schedule, i)
    start, end, mean = pair(schedule, i), pair(schedule, i + 1), seen[0]
    own, following = place(schedule, i), place(schedule, i + 1)
    draw = draw if eta and end[1] and own != following else None
    if end[1] and (is_flow(schedule) or start[0]):
        inside = inner(schedule)
        middle = pair(inside, i)
        first = draw() if draw else None
        mean, _ = ask_inside(predict, _noisier(x, mean, start, middle, eta, first), schedule, i)
        if draw and first is not None:
            share = (own - place(inside, i)) / (own - following)
            noise = math.sqrt(share) * first + math.sqrt(1 - share) * draw()
            return _noisier(x, mean, start, end, eta, noise), seen
    return _noisier(x, mean, start, end, eta, draw() if draw else None), seen


def _noisier(x: Tensor, mean: Tensor, start: Pair, end: Pair, eta: float, noise: Tensor | None) -> Tensor:
    """An ancestral step by the rule of sigma / alpha, which this sampler has in rectified flow too."""
    alpha, sigma = end
    kept = sigma / alpha * start[0] / start[1]
    down = sigma * math.sqrt(max(0.0, 1 - eta**2 * (1 - kept**2))) if eta else sigma
    moved = toward(x, mean, start, (alpha, down))
    return moved if noise is None else moved + math.sqrt(max(0.0, sigma**2 - down**2)) * noise


def euler_churned(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, past: Sequence[Past] = (), draw: Draw | None = None,
    churn: float = 0.0,
) -> tuple[Tensor, Past]:  # fmt: skip
    """Algorithm 2 of Karras et al. 2022 with Euler's step: first `churn` / steps more noise, at most sqrt(2) - 1 of it."""
    _, seen = _churned(predict, x, schedule, i, draw)
    return mixed(*seen, schedule, i + 1), seen


def heun_churned(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, past: Sequence[Past] = (), draw: Draw | None = None,
    churn: float = 0.0,
) -> tuple[Tensor, Past]:  # fmt: skip
    """Algorithm 2 of Karras et al. 2022 with its correction of the second order."""
    x, seen = _churned(predict, x, schedule, i, draw)
    end = mixed(*seen, schedule, i + 1)
    start, far = pair(inner(schedule), i), place(schedule, i + 1) - place(inner(schedule), i)
    if i + 1 == schedule.steps or math.isinf(far):
        return end, seen
    mean = (direction(seen, schedule) + direction(ask(predict, end, schedule, i + 1), schedule)) / 2
    return straight(x, far * mean, schedule, start, pair(schedule, i + 1)), seen


def _churned(predict: Predict, x: Tensor, schedule: Schedule, i: int, draw: Draw | None) -> tuple[Tensor, Past]:
    """Latents with more noise, at the point inside, and what the network sees there."""
    inside = inner(schedule)
    own, more = ratio(schedule, i), ratio(inside, i)
    if draw and math.isfinite(own):
        scale = float(inside.alphas[i] / schedule.alphas[i])
        x = scale * x + float(inside.alphas[i]) * math.sqrt(more**2 - own**2) * draw()
    return x, ask_inside(predict, x, schedule, i)


def _middle(schedule: Schedule, i: int, eta: float, churn: float) -> float:
    """Of ln(sigma), towards the landing; in rectified flow of its sigma."""
    start = ratio(schedule, i)
    end = lower(schedule, start, ratio(schedule, i + 1), eta)
    if not end or (math.isinf(start) and not is_flow(schedule)):
        return start  # not asked for
    if not is_flow(schedule):
        return math.sqrt(start * end)
    sigma = math.sqrt(sigma_of(start) * sigma_of(end))
    return sigma / (1 - sigma)


def _middle_of_snr(schedule: Schedule, i: int, eta: float, churn: float) -> float:
    """Of ln(alpha / sigma), towards the landing; from rectified flow's pure noise at sigma 0.9999, as in ComfyUI."""
    start = ratio(schedule, i)
    end = lower(schedule, start, ratio(schedule, i + 1), eta)
    if math.isinf(start) and is_flow(schedule) and end:
        return 0.9999 / (1 - 0.9999)
    return start if not end or math.isinf(start) else math.sqrt(start * end)


def _middle_of_step(schedule: Schedule, i: int, eta: float, churn: float) -> float:
    """Of ln(alpha / sigma), towards the next point."""
    start, end = ratio(schedule, i), ratio(schedule, i + 1)
    if math.isinf(start) and is_flow(schedule) and end:
        start = 1 / NEARLY_ALL_NOISE
    return start if not end or math.isinf(start) else math.sqrt(start * end)


def _more(schedule: Schedule, i: int, eta: float, churn: float) -> float:
    """More noise than the step begins with."""
    return ratio(schedule, i) * (1 + min(churn / schedule.steps, math.sqrt(2) - 1))


RATIOS: dict[str, Callable[[Schedule, int, float, float], float]] = {
    "dpm2": _middle, "dpm2_ancestral": _middle, "dpmpp_2s_ancestral": _middle_of_snr, "dpmpp_sde": _middle_of_step,
    "euler": _more, "heun": _more,
}  # fmt: skip
