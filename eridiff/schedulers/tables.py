"""Spacings that programs name alike for every family, and what they do to timesteps.

Each takes the noise levels that a network was trained at, rising, and gives `[steps + 1]` of them, falling to 0. They are
ComfyUI's (`comfy/samplers.py`) and, where said, k-diffusion's (`k_diffusion/sampling.py`); from reading, in float64.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from eridiff.errors import ConfigError
from eridiff.schedulers import EXACT, Schedule
from eridiff.schedulers.discrete import exponential_sigmas, karras_sigmas
from eridiff.schedulers.flow_match import (
    diffusers_sigmas,
    dpm_sigmas,
    even_sigmas,
    normal_sigmas,
    sgm_uniform_sigmas,
    trained_sigmas,
    unipc_sigmas,
)

ROUNDINGS = ("none", "down", "nearest")
SHAPE = 0.6  # both parameters of the beta distribution (Lee et al. 2024)


def ending(sigmas: Tensor) -> Tensor:
    """Noise levels, and 0."""
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def simple(levels: Tensor, steps: int) -> Tensor:
    """Every (count / steps)-th level from the top, rounded down."""
    even_sigmas(steps)
    places = (torch.arange(steps, **EXACT) * (len(levels) / steps)).long()
    return ending(levels.flip(0)[places])


def ddim_uniform(levels: Tensor, steps: int) -> Tensor:
    """Every (count // steps)-th level from the second on: one step more where the strides do not fill the table."""
    even_sigmas(steps)
    return ending(levels[1 :: max(len(levels) // steps, 1)].flip(0))


def beta(levels: Tensor, steps: int) -> Tensor:
    """Levels at quantiles of the beta distribution, many at both ends; a level that comes twice is one step."""
    even_sigmas(steps)
    shares = 1 - torch.arange(steps, **EXACT) / steps
    places = torch.tensor([round(beta_quantile(float(s)) * (len(levels) - 1)) for s in shares])
    return ending(levels[places.unique_consecutive()])


def beta_between(steps: int, high: float, low: float) -> Tensor:
    """`[steps]`: diffusers' and A1111's: the quantiles are taken of noise levels, from high to low."""
    even_sigmas(steps)
    shares = torch.linspace(1, 0, steps, **EXACT)
    return low + torch.tensor([beta_quantile(float(s)) for s in shares], **EXACT) * (high - low)


def kl_optimal(levels: Tensor, steps: int) -> Tensor:
    """Even in the arctangent of the noise level, of the training's ends (Sabour et al. 2024)."""
    even_sigmas(steps)
    ends = math.atan(float(levels[-1])), math.atan(float(levels[0]))
    return ending(torch.linspace(*ends, steps, **EXACT).tan())


def karras(levels: Tensor, steps: int) -> Tensor:
    """`karras_sigmas` of the training's ends."""
    return ending(karras_sigmas(steps, float(levels[-1]), float(levels[0])))


def exponential(levels: Tensor, steps: int) -> Tensor:
    """`exponential_sigmas` of the training's ends; k-diffusion's polyexponential with rho 1 is the same."""
    return ending(exponential_sigmas(steps, float(levels[-1]), float(levels[0])))


SPACINGS = {
    "simple": simple, "ddim_uniform": ddim_uniform, "beta": beta, "kl_optimal": kl_optimal, "karras": karras,
    "exponential": exponential, "polyexponential": exponential,
}  # fmt: skip


def beta_quantile(share: float) -> float:
    """Below which the share of a beta distribution with both parameters 0.6 lies; share and result in [0, 1]."""
    if share > 0.5:
        return 1 - beta_quantile(1 - share)
    low, high = 0.0, 0.5
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _beta_share(middle) < share else (low, middle)
    return (low + high) / 2


def _beta_share(x: float) -> float:
    """The share of the distribution below x in [0, 0.5], by the series of the incomplete beta function."""
    term, total, n = 1.0, 1 / SHAPE, 0
    while term > 1e-18:
        n += 1
        term *= (n - SHAPE) / n * x
        total += term / (SHAPE + n)
    whole = math.gamma(SHAPE) ** 2 / math.gamma(2 * SHAPE)
    return x**SHAPE * total / whole


def rounded_times(schedule: Schedule, rounding: str) -> Schedule:
    """The schedule whose network is given whole timesteps, of 1000: "down" or "nearest", or as they are, "none"."""
    if rounding not in ROUNDINGS:
        raise ConfigError(f"timestep_rounding must be {', '.join(ROUNDINGS)}, not '{rounding}'")
    if rounding == "none":
        return schedule
    unit = 1000 if schedule.prediction == "velocity" else 1
    times = schedule.times * unit
    return replace(schedule, times=(times.floor() if rounding == "down" else times.round()) / unit)


def _of_diffusers(spread: Callable[[int, float, float], Tensor]) -> Callable[[int, float, int], Tensor]:
    def sigmas(steps: int, shift: float, count: int) -> Tensor:
        own = diffusers_sigmas(steps, shift)
        return ending(spread(steps, float(own[0]), float(own[-2])).float().double())

    return sigmas


def _of_spacing(spacing: Callable[[Tensor, int], Tensor]) -> Callable[[int, float, int], Tensor]:
    return lambda steps, shift, count: spacing(trained_sigmas(shift, count), steps)


FLOW_TABLES: dict[str, Callable[[int, float, int], Tensor]] = {  # steps, shift, number of training's times
    "normal": normal_sigmas, "sgm_uniform": sgm_uniform_sigmas,
    **{name: _of_spacing(spacing) for name, spacing in SPACINGS.items()},
    "diffusers_karras": _of_diffusers(karras_sigmas),
    "diffusers_exponential": _of_diffusers(exponential_sigmas),
    "diffusers_beta": _of_diffusers(beta_between),
    "diffusers_dpm": lambda steps, shift, count: dpm_sigmas(steps, shift),
    "diffusers_unipc": lambda steps, shift, count: unipc_sigmas(steps, shift),
}  # fmt: skip
