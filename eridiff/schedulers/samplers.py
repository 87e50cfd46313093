"""How to move from one point of a schedule to the next; pure functions, float32 or float64 latents.

Every point is `x = alpha * clean + sigma * noise`; `clean_noise` reads both off a network's output, and a sampler step
is written on the pair, so one step serves every prediction type and every space.
"""

from torch import Tensor

from eridiff.schedulers import Schedule


def clean_noise(x: Tensor, output: Tensor, schedule: Schedule, i: int) -> tuple[Tensor, Tensor]:
    """(clean, noise) that latents `x` at point `i` and the network's raw `output` imply; all of one shape.

    velocity is noise - clean, as rectified flow trains it.
    """
    alpha, sigma = float(schedule.alphas[i]), float(schedule.sigmas[i])
    if schedule.prediction == "velocity":
        return x - sigma * output, x + alpha * output
    raise ValueError(f"unknown prediction type {schedule.prediction!r}")


def euler(x: Tensor, output: Tensor, schedule: Schedule, i: int) -> Tensor:
    """The Euler step from point `i` to `i + 1` (Song et al. 2021, DDIM, is the same line)."""
    clean, noise = clean_noise(x, output, schedule, i)
    return float(schedule.alphas[i + 1]) * clean + float(schedule.sigmas[i + 1]) * noise
