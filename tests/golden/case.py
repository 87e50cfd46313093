"""What every case has: weights through a file and the ordinary loader, inputs, rows of a table."""

import math
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

SINUSOID, FREQUENCIES = layers.sinusoid, layers.frequencies
# by how many there are, the places where float32's exponential of the machine that made the goldens was a step too large
ABOVE = {32: [3], 128: [12, 106]}


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


def golden_frequencies(values: Tensor, count: int) -> Tensor:
    """`layers.frequencies` with the last bits of the machine that made the goldens.

    MKL's float32 exponential is another one on each make of CPU: a last bit, of which times up to 1000 make 5e-5.
    """
    if layers.wide(values.dtype) == torch.float64:
        return FREQUENCIES(values, count)
    exponents = -math.log(10000) * torch.arange(count, dtype=torch.float32) / count
    nearest = exponents.double().exp().float()
    above = ABOVE.get(count, [])
    nearest[above] = nearest[above].nextafter(torch.tensor(1.0))
    return nearest


@contextmanager
def GoldenFrequencies() -> Iterator[None]:
    """Within the block, networks take `golden_frequencies`."""
    before, layers.frequencies = layers.frequencies, golden_frequencies
    try:
        yield
    finally:
        layers.frequencies = before


def row(case: Mapping[str, Any], dtype: torch.dtype, name: str, found: Tensor, expected: Tensor, bound: float) -> Row:
    return Row(case["case"], str(dtype).removeprefix("torch."), name, relative_l2(found, expected), bound)
