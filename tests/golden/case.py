"""What every case has: weights through a file and the ordinary loader, inputs, rows of a table."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eridiff.lora.names import network_of
from eridiff.models import flux, mmdit, unet
from eridiff.trace.cases import inputs_of as inputs_of
from eridiff.trace.cases import load_case as load_case
from eridiff.trace.names import NATIVE, names_of
from eridiff.trace.record import relative_l2


@dataclass(frozen=True)
class Row:
    """One comparison: relative L2 distance and the bound it must keep."""

    case: str
    dtype: str
    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


def placed(recording: Mapping[str, Tensor], name: str, model: Any) -> Tensor:
    """A golden's tensor among what was recorded of `model`, by the names of its key map."""
    for layout in (NATIVE, "original"):
        aligned = names_of(network_of(model), layout, model.config).align([name])
        for native in aligned.sources:
            whole, _, index = native.rstrip("]").partition("[")
            return recording[whole][int(index)] if index else recording[whole]
    raise KeyError(name)


def float32_sinusoid(values: Tensor, width: int = 256) -> Tensor:
    """As the originals compute it: from float32 on; float64 out."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2, dtype=torch.float32) / (width // 2))
    angles = values.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).double()


class Float32Sinusoid:
    """Within the block, the networks' sinusoid is computed in float32 whatever their dtype, as the originals do."""

    def __enter__(self) -> None:
        self.wide, self.plain = flux.timestep_sinusoid, unet.sinusoid
        unet.sinusoid = float32_sinusoid
        flux.timestep_sinusoid = mmdit.timestep_sinusoid = lambda times: float32_sinusoid(1000.0 * times)

    def __exit__(self, *_: object) -> None:
        flux.timestep_sinusoid = mmdit.timestep_sinusoid = self.wide
        unet.sinusoid = self.plain


def row(case: Mapping[str, Any], dtype: torch.dtype, name: str, found: Tensor, expected: Tensor, bound: float) -> Row:
    return Row(case["case"], str(dtype).removeprefix("torch."), name, relative_l2(found, expected), bound)
