"""Tables of SDXL: networks trained at 1000 discrete noise levels, asked at some of them.

Sources: `discretization.py` of Stability-AI/generative-models; Ho et al. 2020 (DDPM); Karras et al. 2022 (the rho table);
Lin et al. 2023 (zero terminal SNR); Luo et al. 2023 (LCM); diffusers' schedulers where a name says so. Noise levels are
`sigma = sqrt((1 - a) / a)` of the training's table; `a` is the product of `1 - beta`. All float64.
"""

import math

import torch
from torch import Tensor

from eridiff.errors import ConfigError
from eridiff.schedulers import EXACT, Schedule
from eridiff.schedulers.flow_match import even_sigmas

LEVELS = 1000


def alphas_cumprod(zero_terminal_snr: bool = False) -> Tensor:
    """`[1000]`: the share of the image's variance at each level; the last is 0 with zero terminal SNR."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, LEVELS, **EXACT) ** 2
    alphas = torch.cumprod(1 - betas, dim=0)
    if not zero_terminal_snr:
        return alphas
    roots = alphas.sqrt()
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2


def sigma_table(alphas: Tensor) -> Tensor:
    """The noise level of each entry of `alphas`; infinite where it is 0."""
    return ((1 - alphas) / alphas).sqrt()


def finite_sigma_table(alphas: Tensor) -> Tensor:
    """The same for what needs finite ends: an alpha of 0 counts as 2 ** -24, a noise level of 4096, as in diffusers."""
    return sigma_table(alphas.clamp(min=2.0**-24))


def legacy_timesteps(steps: int) -> Tensor:
    """sgm's LegacyDDPMDiscretization: from 999 down in even strides, rounded down; the last stride leads to no noise."""
    even_sigmas(steps)
    strides = torch.arange(steps, **EXACT) * ((0 - (LEVELS - 1)) / steps)  # as numpy computes its linspace
    return (strides + (LEVELS - 1)).floor()


def leading_timesteps(steps: int, offset: int = 1) -> Tensor:
    """The first level of each of `steps` equal parts, plus an offset: what SDXL's published scheduler does."""
    even_sigmas(steps)
    return torch.arange(steps - 1, -1, -1, **EXACT) * (LEVELS // steps) + offset


def trailing_timesteps(steps: int) -> Tensor:
    """The last level of each of `steps` equal parts: begins at 999, for few steps and for zero terminal SNR."""
    even_sigmas(steps)
    return (LEVELS - torch.arange(steps, **EXACT) * (LEVELS / steps)).round() - 1


def linspace_timesteps(steps: int) -> Tensor:
    """Evenly from 999 to 0, both included; fractions."""
    even_sigmas(steps)
    return torch.linspace(LEVELS - 1, 0, steps, **EXACT)


def dpm_leading_timesteps(steps: int, offset: int = 1) -> Tensor:
    """diffusers' leading spacing of DPM-Solvers, UniPC and DEIS: of one step more, whose last is left out."""
    even_sigmas(steps)
    return torch.arange(steps, 0, -1, **EXACT) * (LEVELS // (steps + 1)) + offset


def dpm_linspace_timesteps(steps: int) -> Tensor:
    """diffusers' linspace of the same: evenly from 999 to 0, rounded, without the 0."""
    even_sigmas(steps)
    return torch.linspace(LEVELS - 1, 0, steps + 1, **EXACT)[:-1].round()


def lcm_timesteps(steps: int) -> Tensor:
    """Of the 50 levels 19, 39, ... 999 that LCM was distilled on, `steps` from the top; ConfigError for more than 50."""
    if not 1 <= steps <= 50:
        raise ConfigError(f"LCM knows 1 to 50 steps, not {steps}")
    places = torch.arange(steps, **EXACT) * (50 / steps)
    return LEVELS - 1 - 20 * places.floor()


def turbo_timesteps(steps: int) -> Tensor:
    """sgm's for SDXL Turbo: 999, 899, 799, 699, as many of them as there are steps; ConfigError for more than 4."""
    if not 1 <= steps <= 4:
        raise ConfigError(f"Turbo's own schedule has 1 to 4 steps, not {steps}")
    return LEVELS - 1 - 100 * torch.arange(steps, **EXACT)


def sigmas_at(timesteps: Tensor, alphas: Tensor) -> Tensor:
    """Noise levels at timesteps `[steps]`; between entries linear in sigma, as diffusers."""
    table = sigma_table(alphas)
    low = timesteps.floor().long().clamp(0, LEVELS - 2)
    share = timesteps - low
    between = table[low] * (1 - share) + table[low + 1] * share
    return torch.where(share == 1, table[low + 1], torch.where(share == 0, table[low], between))


def levels_at(timesteps: Tensor, alphas: Tensor) -> Tensor:
    """Noise levels at timesteps `[steps]`; between entries linear in log sigma, as k-diffusion and ComfyUI."""
    table = finite_sigma_table(alphas).log()
    low = timesteps.floor().long().clamp(0, LEVELS - 2)
    return (table[low] + (timesteps - low) * (table[low + 1] - table[low])).exp()


def timesteps_at(sigmas: Tensor, alphas: Tensor) -> Tensor:
    """Where in the table noise levels `[steps]` stand: linear in log sigma between entries, as k-diffusion; clamped."""
    table = finite_sigma_table(alphas).log()
    logs = sigmas.log()
    low = (torch.searchsorted(table, logs, right=True) - 1).clamp(0, LEVELS - 2)
    share = ((logs - table[low]) / (table[low + 1] - table[low])).clamp(0, 1)
    return low + share


def karras_sigmas(steps: int, high: float, low: float, rho: float = 7.0) -> Tensor:
    """`[steps]` from high to low, even in sigma ** (1 / rho) (Karras et al. 2022, equation 5)."""
    even_sigmas(steps)
    ends = high ** (1 / rho), low ** (1 / rho)
    return torch.linspace(*ends, steps, **EXACT) ** rho


def exponential_sigmas(steps: int, high: float, low: float) -> Tensor:
    """`[steps]` from high to low, even in log sigma."""
    even_sigmas(steps)
    return torch.linspace(math.log(high), math.log(low), steps, **EXACT).exp()


def discrete_schedule(
    timesteps: Tensor, sigmas: Tensor, prediction: str = "epsilon", final_sigma: float = 0.0
) -> Schedule:
    """The schedule through noise levels `[steps]`, told to the network as timesteps, and on to `final_sigma`.

    Variance-preserving: latents keep the size of noise, so a run begins with plain noise and an infinite sigma (zero
    terminal SNR) is a point like any other. DDIM ends at the table's lowest sigma, all others at 0.
    """
    sigmas = torch.cat([sigmas, sigmas.new_tensor([final_sigma])])
    alphas = (1 + sigmas**2).rsqrt()
    amounts = torch.where(sigmas.isinf(), 1.0, sigmas * alphas)
    return Schedule(alphas, amounts, timesteps, torch.ones_like(timesteps), prediction, -sigmas.log())


def discrete_points(ratios: Tensor | None, times: Tensor | None, alphas: Tensor, prediction: str) -> Schedule:
    """The points at noise levels, or else at timesteps, `[steps]`, of a table of alphas: for `samplers.with_inside`."""
    if ratios is not None:
        return discrete_schedule(timesteps_at(ratios, alphas), ratios, prediction)
    assert times is not None
    return discrete_schedule(times, sigmas_at(times, alphas), prediction)


def exploding(schedule: Schedule) -> Schedule:
    """The same points in variance-exploding space, `x = clean + sigma * noise`, in which sgm and k-diffusion work."""
    sigmas = schedule.sigmas / schedule.alphas
    return Schedule(
        torch.ones_like(sigmas),
        sigmas,
        schedule.times,
        schedule.alphas[:-1],
        schedule.prediction,
        schedule.half_log_snr,
        None if schedule.inside is None else exploding(schedule.inside),
        schedule.clip,
    )
