"""What tests of a GPU share: `python -m pytest -m gpu` runs what is marked so; the same code runs on the CPU with all other tests.

A float32 result is as far from the same computation in float64 as rounding takes it. Another device rounds in another order,
and convolutions after Winograd add before they multiply, which costs up to a digit: so a result on a device may be FAR times
as far from float64 as the CPU's is, and no further. TF32 or a wrong number is hundreds of times as far.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from eridiff.precision import cudnn_precision, set_cudnn_precision
from eridiff.trace.record import relative_l2

FAR = 10
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def float32_convolutions() -> Iterator[None]:
    """torch's default on a GPU is TF32, whose rounding is not float32's."""
    before = cudnn_precision()
    set_cudnn_precision(False if isinstance(before, bool) else ("ieee", "ieee"))
    yield
    set_cudnn_precision(before)


def far(plain: Tensor, wide: Tensor) -> float:
    """How far a device's float32 result may be from the float64 one, by the CPU's float32 result."""
    return FAR * max(relative_l2(plain, wide), torch.finfo(torch.float32).eps)
