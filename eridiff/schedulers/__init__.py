"""Numbers only: where to look (tables), how to move (samplers), guidance."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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

    @property
    def steps(self) -> int:
        return len(self.times)
