"""How to move from one point of a schedule to the next: pure functions, written once for every prediction and space.

Every point is `x = alpha * clean + sigma * noise`. A network's output says which clean picture and which noise the latents
are made of (`clean_noise`), and a sampler goes to the next point with them. All samplers have the same arguments:
`predict(x, i)`, the network's raw output at point `i`; latents `x`, float32 or float64; the schedule and the point;
`previous`, the clean picture that the step before saw, None on the first. They give the next latents and this step's clean
picture.
"""

import math
from collections.abc import Callable

from torch import Tensor

from eridiff.schedulers import Schedule

Predict = Callable[[Tensor, int], Tensor]
Sampler = Callable[[Predict, Tensor, Schedule, int, Tensor | None], tuple[Tensor, Tensor]]


def clean_noise(x: Tensor, output: Tensor, schedule: Schedule, i: int) -> tuple[Tensor, Tensor]:
    """(clean, noise) that latents `x` at point `i` and the network's raw `output` imply; all of one shape.

    velocity is noise - clean, as rectified flow trains it.
    """
    alpha, sigma = float(schedule.alphas[i]), float(schedule.sigmas[i])
    if schedule.prediction == "velocity":
        return x - sigma * output, x + alpha * output
    raise ValueError(f"unknown prediction type {schedule.prediction!r}")


def mixed(clean: Tensor, noise: Tensor, schedule: Schedule, i: int) -> Tensor:
    """The latents at point `i` that a clean picture and a noise make."""
    return float(schedule.alphas[i]) * clean + float(schedule.sigmas[i]) * noise


def ask(predict: Predict, x: Tensor, schedule: Schedule, i: int) -> tuple[Tensor, Tensor]:
    """(clean, noise) that the network sees in `x` at point `i`."""
    output = predict(float(schedule.input_scale[i]) * x, i)
    return clean_noise(x, output.to(x.dtype), schedule, i)


def euler(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, previous: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The Euler step (Karras et al. 2022, algorithm 1 without its correction; DDIM, Song et al. 2021, is the same line)."""
    clean, noise = ask(predict, x, schedule, i)
    return mixed(clean, noise, schedule, i + 1), clean


def heun(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, previous: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Heun's step (Karras et al. 2022, algorithm 1): the mean of the directions here and where Euler's step ends.

    Asks the network twice, on the last step once.
    """
    clean, noise = ask(predict, x, schedule, i)
    end = mixed(clean, noise, schedule, i + 1)
    if i + 1 == schedule.steps:
        return end, clean
    clean2, noise2 = ask(predict, end, schedule, i + 1)
    d_alpha, d_sigma = (float(values[i + 1] - values[i]) for values in (schedule.alphas, schedule.sigmas))
    return end + (d_alpha * (clean2 - clean) + d_sigma * (noise2 - noise)) / 2, clean


def dpmpp_2m(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, previous: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """DPM-Solver++ (2M) of Lu et al. 2022: the clean picture is extrapolated from this step's and the step's before.

    The step's length is taken in -ln(sigma), as in k-diffusion and in the original of SD 3. In variance-exploding space
    that is the paper's half log-SNR; for rectified flow, where the paper would take ln((1 - sigma) / sigma), it is not:
    solvers that do so give other pictures. Stops being second order on the first step and on a last one to sigma 0.
    """
    clean, _ = ask(predict, x, schedule, i)
    sigma, then = float(schedule.sigmas[i]), float(schedule.sigmas[i + 1])
    mean = clean
    if previous is not None and then > 0:
        ratio = math.log(float(schedule.sigmas[i - 1]) / sigma) / math.log(sigma / then)
        mean = clean + (clean - previous) / (2 * ratio)
    keep = then / sigma
    return keep * x + (float(schedule.alphas[i + 1]) - float(schedule.alphas[i]) * keep) * mean, clean


SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}
