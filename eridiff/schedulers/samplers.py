"""How to move from one point of a schedule to the next: pure functions, written once for every prediction and space.

Every point is `x = alpha * clean + sigma * noise`. A network's output says which clean image and which noise the latents
are made of (`clean_noise`), and a sampler goes to the next point with them. All samplers have the same arguments:
`predict(x, i)`, the network's raw output at point `i`; latents `x`, float32 or float64; the schedule and the point;
`previous`, the clean image that the step before saw, None on the first; `draw()`, new noise of the latents' shape, which
only some ask for. They give the next latents and this step's clean image.
"""

import math
from collections.abc import Callable

from torch import Tensor

from eridiff.schedulers import Schedule

Predict = Callable[[Tensor, int], Tensor]
Draw = Callable[[], Tensor]
Sampler = Callable[[Predict, Tensor, Schedule, int, Tensor | None, Draw | None], tuple[Tensor, Tensor]]


def clean_noise(x: Tensor, output: Tensor, schedule: Schedule, i: int) -> tuple[Tensor, Tensor]:
    """(clean, noise) that latents `x` at point `i` and the network's raw `output` imply; all of one shape.

    velocity is noise - clean, as rectified flow trains it; v is alpha * noise - sigma * clean (Salimans and Ho 2022), with
    the alpha and sigma of variance-preserving space.
    """
    alpha, sigma = float(schedule.alphas[i]), float(schedule.sigmas[i])
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


def mixed(clean: Tensor, noise: Tensor, schedule: Schedule, i: int) -> Tensor:
    """The latents at point `i` that a clean image and a noise make."""
    return float(schedule.alphas[i]) * clean + float(schedule.sigmas[i]) * noise


def ask(predict: Predict, x: Tensor, schedule: Schedule, i: int) -> tuple[Tensor, Tensor]:
    """(clean, noise) that the network sees in `x` at point `i`."""
    output = predict(float(schedule.input_scale[i]) * x, i)
    return clean_noise(x, output.to(x.dtype), schedule, i)


def euler(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, previous: Tensor | None = None, draw: Draw | None = None
) -> tuple[Tensor, Tensor]:
    """The Euler step (Karras et al. 2022, algorithm 1 without its correction; DDIM, Song et al. 2021, is the same line)."""
    clean, noise = ask(predict, x, schedule, i)
    return mixed(clean, noise, schedule, i + 1), clean


def heun(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, previous: Tensor | None = None, draw: Draw | None = None
) -> tuple[Tensor, Tensor]:
    """Heun's step (Karras et al. 2022, algorithm 1): the mean of the directions here and where Euler's step ends.

    Asks the network twice, on the last step once; from an infinite sigma it goes by Euler's step.
    """
    clean, noise = ask(predict, x, schedule, i)
    end = mixed(clean, noise, schedule, i + 1)
    if i + 1 == schedule.steps:
        return end, clean
    clean2, noise2 = ask(predict, end, schedule, i + 1)
    if schedule.prediction == "velocity":  # the direction is noise - clean, over sigma
        return end + float(schedule.sigmas[i + 1] - schedule.sigmas[i]) * (noise2 - clean2 - noise + clean) / 2, clean
    ratios = schedule.sigmas[i : i + 2] / schedule.alphas[i : i + 2]  # else the noise, over sigma / alpha
    change = float(schedule.alphas[i + 1] * ratios.diff())
    return (end + change * (noise2 - noise) / 2 if math.isfinite(change) else end), clean


def euler_ancestral(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, previous: Tensor | None = None, draw: Draw | None = None,
    eta: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Euler's step to less noise than the next point has, and new noise for the rest (k-diffusion's ancestral sampler).

    With `eta` 1 as much as DDPM's posterior has; DDIM with its eta (Song et al. 2021, equation 16) is the same line.
    """
    clean, noise = ask(predict, x, schedule, i)
    alpha, sigma = float(schedule.alphas[i + 1]), float(schedule.sigmas[i + 1])
    kept = (sigma / alpha) * float(schedule.alphas[i]) / float(schedule.sigmas[i])  # of the two noise levels' ratio
    new = eta * sigma * math.sqrt(max(0.0, 1 - kept**2))
    moved = alpha * clean + math.sqrt(max(0.0, sigma**2 - new**2)) * noise
    return (moved + new * draw() if new and draw else moved), clean


def dpmpp_2m(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, previous: Tensor | None = None, draw: Draw | None = None
) -> tuple[Tensor, Tensor]:
    """DPM-Solver++ (2M) of Lu et al. 2022: the clean image is extrapolated from this step's and the step's before.

    First order on the first step and on a last one to sigma 0.
    """
    clean, _ = ask(predict, x, schedule, i)
    mean = clean
    if previous is not None and schedule.sigmas[i + 1] > 0:
        mean = clean + (clean - previous) * _length(schedule, i) / (2 * _length(schedule, i - 1))
    keep = float(schedule.sigmas[i + 1] / schedule.sigmas[i])
    return keep * x + (float(schedule.alphas[i + 1]) - float(schedule.alphas[i]) * keep) * mean, clean


def dpmpp_2m_sde(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, previous: Tensor | None = None, draw: Draw | None = None,
    eta: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The stochastic form of DPM-Solver++ (2M), by the midpoint rule, as in k-diffusion with noise of unit variance."""
    clean, _ = ask(predict, x, schedule, i)
    alpha, sigma = float(schedule.alphas[i + 1]), float(schedule.sigmas[i + 1])
    if sigma == 0:
        return alpha * clean, clean
    length = _length(schedule, i)
    mean = clean
    if previous is not None:
        mean = clean + (clean - previous) * length / (2 * _length(schedule, i - 1))
    keep = float(schedule.sigmas[i + 1] / schedule.sigmas[i]) * math.exp(-eta * length)
    moved = keep * x + (alpha - float(schedule.alphas[i]) * keep) * mean
    return (moved + sigma * math.sqrt(-math.expm1(-2 * eta * length)) * draw() if draw else moved), clean


def lcm(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, previous: Tensor | None = None, draw: Draw | None = None
) -> tuple[Tensor, Tensor]:
    """Latent consistency (Luo et al. 2023): straight to the clean image, and new noise for the next point.

    The boundary condition keeps a share of `x`, which matters only below timestep 1; in variance-preserving space.
    """
    clean, _ = ask(predict, x, schedule, i)
    unit = 1000 if schedule.prediction == "velocity" else 1  # a timestep, in what the network is given
    place = (10 * unit * float(schedule.times[i])) ** 2
    clean = clean * math.sqrt(place / (place + 0.25)) + x * 0.25 / (place + 0.25)
    return (mixed(clean, draw(), schedule, i + 1) if draw and i + 1 < schedule.steps else clean), clean


def _length(schedule: Schedule, i: int) -> float:
    return float(schedule.half_log_snr[i + 1] - schedule.half_log_snr[i])


SAMPLERS: dict[str, Sampler] = {
    "euler": euler, "euler_ancestral": euler_ancestral, "heun": heun, "ddim": euler, "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde, "lcm": lcm,
}  # fmt: skip
EXPLODING = ("euler", "euler_ancestral", "heun")  # diffusers has their latents in variance-exploding space
STOCHASTIC = ("euler_ancestral", "dpmpp_2m_sde", "lcm")  # these draw noise on the way
