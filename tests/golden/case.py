"""What every case has: weights through a file and the ordinary loader, inputs, rows of a table."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eridiff.lora.names import network_of
from eridiff.models import layers, unet
from eridiff.trace.cases import Case
from eridiff.trace.cases import inputs_of as inputs_of
from eridiff.trace.cases import load_case as load_case
from eridiff.trace.names import NATIVE, names_of
from eridiff.trace.record import relative_l2

SINUSOID = layers.sinusoid


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


def opened(case: Mapping[str, Any]) -> Case:
    return Case(case["case"], case, {})


def placed(recording: Mapping[str, Tensor], name: str, model: Any) -> Tensor:
    """A golden's tensor among what was recorded of `model`, by the names of its key map."""
    for layout in (NATIVE, "original"):
        aligned = names_of(network_of(model), layout, model.config).align([name])
        for native in aligned.sources:
            whole, _, index = native.rstrip("]").partition("[")
            if whole in recording:
                return recording[whole][int(index)] if index else recording[whole]
    raise KeyError(name)


def float32_sinusoid(values: Tensor, *width: int) -> Tensor:
    """As the originals compute it: from float32 on; float64 out."""
    return SINUSOID(values.float(), *width).double()


@contextmanager
def Float32Sinusoid() -> Iterator[None]:
    """Within the block, the networks' sinusoid is computed in float32 whatever their dtype, as the originals do."""
    layers.sinusoid = unet.sinusoid = float32_sinusoid
    try:
        yield
    finally:
        layers.sinusoid = unet.sinusoid = SINUSOID


def row(case: Mapping[str, Any], dtype: torch.dtype, name: str, found: Tensor, expected: Tensor, bound: float) -> Row:
    return Row(case["case"], str(dtype).removeprefix("torch."), name, relative_l2(found, expected), bound)
