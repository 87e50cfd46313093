"""Tables of rectified flow: alpha = 1 - sigma, the network is told sigma.

Sources: `sampling.py` of black-forest-labs/flux; Esser et al. 2024, section 5.3.2 (the shift by resolution).
"""

import math

import torch
from torch import Tensor

from eridiff.errors import ConfigError
from eridiff.schedulers import Schedule


def shifted(sigmas: Tensor, mu: float) -> Tensor:
    """`e^mu / (e^mu + 1 / sigma - 1)`, written so that 0 stays 0; float64 in, float64 out, sigmas in [0, 1]."""
    return math.exp(mu) * sigmas / (1 + (math.exp(mu) - 1) * sigmas)


def flux_mu(tokens: int) -> float:
    """Flux's shift for a picture of `tokens` tokens: the line through 0.5 at 256 and 1.15 at 4096, not clamped."""
    return 0.5 + (1.15 - 0.5) / (4096 - 256) * (tokens - 256)


def flux_schedule(steps: int, tokens: int, shift: bool = True) -> Schedule:
    """The original's points from 1 to 0: evenly spaced, then shifted (dev and its relatives; schnell has no shift).

    Raises ConfigError for fewer than one step.
    """
    if steps < 1:
        raise ConfigError(f"a run needs at least one step, not {steps}")
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return flow_schedule(shifted(sigmas, flux_mu(tokens)) if shift else sigmas)


def flow_schedule(sigmas: Tensor) -> Schedule:
    """The schedule through the given sigmas `[steps + 1]`, falling and in [0, 1]; they become float64."""
    sigmas = sigmas.double()
    return Schedule(1 - sigmas, sigmas, sigmas[:-1], torch.ones_like(sigmas[:-1]), "velocity")
