"""Tables of rectified flow: alpha = 1 - sigma, the network is given sigma.

Sources: `sampling.py` of black-forest-labs/flux; `sd3_impls.py` of Stability-AI/sd3.5; Esser et al. 2024, section 5.3.2
(the shift by resolution).
"""

import math

import torch
from torch import Tensor

from eridiff.errors import ConfigError
from eridiff.schedulers import EXACT, Schedule


def shifted(sigmas: Tensor, shift: float) -> Tensor:
    """`shift * sigma / (1 + (shift - 1) * sigma)`, written so that 0 and 1 stay; above 1 it moves towards the noise."""
    return sigmas / (sigmas + (1 - sigmas) / shift)


def flux_mu(tokens: int) -> float:
    """Flux's shift for an image of `tokens` tokens, as e^mu: the line through 0.5 at 256 and 1.15 at 4096, not clamped."""
    return 0.5 + (1.15 - 0.5) / (4096 - 256) * (tokens - 256)


def flux_shift(tokens: int) -> float:
    """e^mu: by how much Flux's times are shifted (`shifted`) for an image of `tokens` tokens."""
    return math.exp(flux_mu(tokens))


def even_sigmas(steps: int) -> Tensor:
    """`[steps + 1]` float64, evenly spaced from 1 to 0; ConfigError for fewer than one step."""
    if steps < 1:
        raise ConfigError(f"a run needs at least one step, not {steps}")
    return torch.linspace(1, 0, steps + 1, **EXACT)


def flux_schedule(steps: int, tokens: int, shift: bool = True) -> Schedule:
    """The original's points from 1 to 0: evenly spaced, then shifted (dev and its relatives; schnell has no shift).

    Raises ConfigError for fewer than one step.
    """
    sigmas = even_sigmas(steps)
    return flow_schedule(shifted(sigmas, flux_shift(tokens)) if shift else sigmas)


def flux_scheduler_schedule(steps: int, tokens: int, shift: bool = True) -> Schedule:
    """The points of diffusers' scheduler when it is asked for a number of steps: from 1 to 1 / 1000 evenly, shifted, then 0.

    diffusers' own pipeline gives the scheduler the original's points; programs that call it themselves may not. Raises
    ConfigError for fewer than one step.
    """
    even_sigmas(steps)
    sigmas = torch.cat([torch.linspace(1, 1 / 1000, steps, **EXACT), torch.zeros(1, **EXACT)])
    return flow_schedule(shifted(sigmas, flux_shift(tokens)) if shift else sigmas)


def sd3_sigmas(steps: int, shift: float) -> Tensor:
    """The original's table of SD 3 `[steps + 1]`, in float64 (there float32, off by 1.3e-7).

    The steps are spaced evenly between the shifted ends of the training's times, 1 and 1 / 1000, and then shifted: the low
    end is shifted twice, so with shift 3 the last step always begins at 0.00893.
    """
    even_sigmas(steps)
    low = float(shifted(torch.tensor(0.001, **EXACT), shift))
    sigmas = shifted(torch.linspace(1, low, steps, **EXACT), shift)
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def diffusers_sigmas(steps: int, shift: float) -> Tensor:
    """The table of diffusers' FlowMatchEulerDiscreteScheduler `[steps + 1]`: SD 3's original with its float32 roundings."""
    even_sigmas(steps)
    # of a float32 table of the training's times
    lowest = shifted(torch.tensor(1 / 1000, dtype=torch.float32, device="cpu"), shift)
    evenly = torch.linspace(1, float(lowest), steps, **EXACT)
    sigmas = shifted(evenly, shift).float().double()
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def candle_sigmas(steps: int, shift: float) -> Tensor:
    """candle's table for SD 3 `[steps + 1]`: evenly spaced from 1 to 0, shifted once."""
    return shifted(even_sigmas(steps), shift)


def trained_sigmas(shift: float, count: int = 1000) -> Tensor:
    """`[count]` rising: the noise levels of evenly spaced times, shifted, as ComfyUI holds them (10000 of Flux)."""
    return shifted(torch.arange(1, count + 1, **EXACT) / count, shift)


def sgm_uniform_sigmas(steps: int, shift: float, count: int = 1000) -> Tensor:
    """ComfyUI's `[steps + 1]`: as SD 3's original with one step more, of which the last is left out."""
    even_sigmas(steps)
    low = float(trained_sigmas(shift, count)[0])
    return torch.cat([shifted(torch.linspace(1, low, steps + 1, **EXACT)[:-1], shift), torch.zeros(1, **EXACT)])


def normal_sigmas(steps: int, shift: float, count: int = 1000) -> Tensor:
    """ComfyUI's `[steps + 1]`: SD 3's original, of as many training times."""
    even_sigmas(steps)
    low = float(trained_sigmas(shift, count)[0])
    return torch.cat([shifted(torch.linspace(1, low, steps, **EXACT), shift), torch.zeros(1, **EXACT)])


def dpm_sigmas(steps: int, shift: float) -> Tensor:
    """diffusers' DPM-Solvers and DEIS with flow sigmas, `[steps + 1]`: evenly from 0.999 to 0, shifted."""
    even_sigmas(steps)
    return shifted(torch.linspace(0.999, 0, steps + 1, **EXACT), shift)


def unipc_sigmas(steps: int, shift: float) -> Tensor:
    """diffusers' UniPC with flow sigmas, `[steps + 1]`: evenly from 1 towards 1 / 1000, shifted; the first is 1 - 1e-6."""
    even_sigmas(steps)
    sigmas = shifted(torch.linspace(1, 0.001, steps + 1, **EXACT)[:-1], shift)
    return torch.cat([sigmas.clamp(max=1 - 1e-6), sigmas.new_zeros(1)])


def flow_schedule(sigmas: Tensor) -> Schedule:
    """The schedule through the given sigmas `[steps + 1]`, which become float64.

    Multistep solvers measure a step in -ln(sigma), as SD 3's original does; the papers of solvers for rectified flow take
    ln((1 - sigma) / sigma) and give other images.

    Raises ConfigError unless they fall strictly, from at most 1 to at least 0.
    """
    sigmas = sigmas.to(**EXACT)
    falling = bool((sigmas.diff() < 0).all())
    if sigmas.ndim != 1 or len(sigmas) < 2 or not falling or sigmas[0] > 1 or sigmas[-1] < 0:
        raise ConfigError(f"sigmas must be at least two numbers that fall, from at most 1 to 0, not {sigmas.tolist()}")
    return _through(sigmas)


def flow_points(ratios: Tensor) -> Schedule:
    """The points where sigma / (1 - sigma) is `ratios` `[steps]`, infinite at pure noise: for `samplers.with_inside`."""
    sigmas = torch.where(ratios.isinf(), 1.0, ratios / (1 + ratios))
    return _through(torch.cat([sigmas, sigmas.new_zeros(1)]))


def _through(sigmas: Tensor) -> Schedule:
    return Schedule(1 - sigmas, sigmas, sigmas[:-1], torch.ones_like(sigmas[:-1]), "velocity", -sigmas.log())
