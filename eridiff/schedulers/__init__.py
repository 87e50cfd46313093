"""Numbers only: where to look (tables), how to move (samplers), guidance."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eridiff.errors import ConfigError

EXACT: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}  # of every table, whatever torch's defaults are


@dataclass(frozen=True)
class Schedule:
    """The points of one run, each `x = alpha * clean + sigma * noise`; all fields float64 on the CPU.

    `times` has one entry less than the others: the network is not asked at the last point.
    """

    alphas: Tensor  # [steps + 1]
    sigmas: Tensor  # [steps + 1]
    times: Tensor  # [steps], what the network is given
    input_scale: Tensor  # [steps], what the latents are multiplied with before they enter it
    prediction: str  # "velocity", "epsilon", "v" or "sample"
    half_log_snr: Tensor  # [steps + 1], ln(alpha / sigma): in this multistep solvers measure a step
    inside: "Schedule | None" = None  # a point inside each step, and the end; asked for as point `steps + i`
    clip: float | None = None  # the clean image that a step sees is clipped to [-clip, clip]

    @property
    def steps(self) -> int:
        return len(self.times)

    @property
    def asked(self) -> Tensor:
        """`[steps]`, or `[2 * steps]` with points inside: what the network may be given, by the number it is asked with."""
        return self.times if self.inside is None else torch.cat([self.times, self.inside.times])


def first_step(steps: int, strength: float, rounding: str = "up") -> int:
    """Where image to image begins: the share `strength` of the steps is run, at least one unless it is 0.

    - up: a share that is a whole number of steps is that number: 25 * 0.28 is 7, though the product of floats is above it.
    - float_up: as diffusers computes for Flux and SD 3, in floats: 25 * 0.56 is 15.
    - down: as diffusers computes for SDXL: 28 * 0.3 is 8, and 9 by the others. Raises ConfigError where nothing is left.
    """
    if rounding == "float_up":
        return int(max(steps - min(steps * strength, steps), 0))
    if rounding == "down":
        if strength > 0 and steps * strength < 1:
            raise ConfigError(
                f"strength {strength:g} of {steps} steps, rounded down, leaves none: raise it, or the steps"
            )
        return steps - int(steps * strength)
    return steps - max(math.ceil(round(steps * strength, 4)), int(strength > 0))
