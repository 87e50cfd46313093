"""What several commands share: a device, a place to write to, a LoRA with its scale."""

import os
from pathlib import Path

import torch

from eridiff.errors import ConfigError, EridiffError

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64,
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip


def check_writable(out: Path) -> None:
    """Before hours of work, and without making anything: the nearest folder that exists must take new files."""
    home = out.absolute().parent if out.suffix.lower() == ".png" else out.absolute()
    while not home.exists():
        home = home.parent
    if not home.is_dir() or not os.access(home, os.W_OK):
        raise EridiffError(f"'{out}' cannot be written: '{home}' is no folder that takes new files")


def device_of(name: str | None) -> torch.device | None:
    """A device by name, which must be there; None is torchrun's own, or the library's choice."""
    if name is None and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:  # of torchrun
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError, ImportError):  # asserted: built with CUDA; imported: another maker's package
        raise ConfigError(
            f"the device '{name}' is not there; this machine has cpu"
            + (f" and cuda ({torch.cuda.device_count()} of them)" if torch.cuda.is_available() else "")
        ) from None


def scaled(text: str) -> tuple[str, float | None]:
    """FILE[:SCALE] -> both; None when no scale is given."""
    file, colon, scale = text.rpartition(":")
    try:
        return (file, float(scale)) if colon and file else (text, None)
    except ValueError:
        return text, None  # a colon in the name


def dtype_of(name: str | None) -> torch.dtype | None:
    """A dtype by torch's name or a short one; raises ConfigError for another."""
    if name is None:
        return None
    if name not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not '{name}'")
    return DTYPES[name]
