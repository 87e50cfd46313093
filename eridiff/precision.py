"""How precisely torch computes right now, which trainers change for the whole process: autocast and TF32."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from eridiff.errors import ConfigError

Precision = Any  # what `matmul_precision` gives and `set_matmul_precision` takes


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raises ConfigError unless it is a floating-point dtype, or None."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype must be torch.bfloat16, torch.float16 or torch.float32, not {dtype!r}")


def check_autocast(dtype: torch.dtype | None) -> None:
    """Raises ConfigError unless autocast takes it on every device, or it is None."""
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise ConfigError(f"autocast must be torch.bfloat16 or torch.float16, not {dtype!r}")


@contextmanager
def outside_autocast(device: torch.device) -> Iterator[None]:
    """Within the block nothing is cast, on the CPU and on the device."""
    with ExitStack() as stack:
        for kind in {"cpu", device.type} - {"meta"}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Within the block matrix products of float32 are computed in float32, whatever TF32 and autocast do outside."""
    before = matmul_precision()
    try:
        set_matmul_precision("highest" if isinstance(before, str) else ("ieee", "ieee"))
        with outside_autocast(device):
            yield
    finally:
        set_matmul_precision(before)


def matmul_precision() -> Precision:
    """Of float32 matrix products, on CUDA and oneDNN: by name before torch 2.9, later one per backend."""
    matmul = torch.backends.cuda.matmul
    if hasattr(torch.backends, "fp32_precision"):  # torch refuses to mix this with the older calls
        return matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return torch.get_float32_matmul_precision()


def set_matmul_precision(value: Precision) -> None:
    """Restore what `matmul_precision` gave."""
    if isinstance(value, str):
        torch.set_float32_matmul_precision(value)
    else:
        torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = value  # type: ignore[attr-defined]


def cudnn_precision() -> Precision:
    """Of float32 convolutions and recurrent networks in cuDNN."""
    cudnn = torch.backends.cudnn
    if hasattr(torch.backends, "fp32_precision"):
        return cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    return cudnn.allow_tf32


def set_cudnn_precision(value: Precision) -> None:
    """Restore what `cudnn_precision` gave."""
    cudnn = torch.backends.cudnn
    if isinstance(value, bool):
        cudnn.allow_tf32 = value
    else:
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = value  # type: ignore[attr-defined]
