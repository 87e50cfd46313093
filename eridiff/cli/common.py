"""What several commands share: a device, a place to write to, a model that is there, a LoRA with its scale."""

import os
import sys
import tempfile
from difflib import get_close_matches
from pathlib import Path

import torch

from eridiff.errors import CheckpointError, ConfigError, EridiffError, quoted
from eridiff.weights.hub import built_in

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64,
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip


PUBLISHED = {  # names by which sizes are known -> the repository of the weights
    "flux-dev": "black-forest-labs/FLUX.1-dev", "flux-schnell": "black-forest-labs/FLUX.1-schnell",
    "flux-krea": "black-forest-labs/FLUX.1-Krea-dev", "flux-kontext": "black-forest-labs/FLUX.1-Kontext-dev",
    "flux-fill": "black-forest-labs/FLUX.1-Fill-dev", "flux-canny": "black-forest-labs/FLUX.1-Canny-dev",
    "flux-depth": "black-forest-labs/FLUX.1-Depth-dev", "sd3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium", "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
    "sd3.5-large-turbo": "stabilityai/stable-diffusion-3.5-large-turbo",
    "sdxl-base": "stabilityai/stable-diffusion-xl-base-1.0", "sdxl-refiner": "stabilityai/stable-diffusion-xl-refiner-1.0",
}  # fmt: skip
OTHER_IMAGES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jxl")


def note(text: str) -> None:
    """A notice, on stderr, so that stdout holds only paths."""
    print(f"eridiff: {text}", file=sys.stderr)


def check_writable(out: Path) -> None:
    """Before hours of work, and without leaving anything: the nearest folder that exists must take new files."""
    if out.suffix.lower() in OTHER_IMAGES:
        raise EridiffError(f"'{out}' cannot be written: images are PNG; pass a name ending in .png, or a folder")
    home = out.absolute().parent if out.suffix.lower() == ".png" else out.absolute()
    while not home.exists():
        home = home.parent
    try:
        tempfile.TemporaryFile(dir=home).close()
    except OSError as error:
        why = "is not a folder" if not home.is_dir() else f"takes no new files ({error.strerror})"
        raise EridiffError(f"'{out}' cannot be written: '{home}' {why}") from None


def check_model(name: str) -> None:
    """Raises CheckpointError, with what may be meant, for a path that is not there. What may be a hub id is left to the hub."""
    path = Path(name).expanduser()
    if not path.exists() and name in PUBLISHED:
        raise CheckpointError(f"'{name}' names sizes, not weights; pass a file, a folder or {PUBLISHED[name]}")
    elif not path.exists() and path.suffix and path.parent.is_dir():
        near = get_close_matches(path.name, sorted(entry.name for entry in path.parent.iterdir()), 1, 0.6)
        if near:
            raise CheckpointError(f"{quoted(name)} does not exist; did you mean {quoted(path.with_name(near[0]))}?")


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
    except ValueError:  # a colon in the name, or no number
        if not Path(text).exists() and (Path(file).exists() or file in built_in("lora")):
            raise ConfigError(f"the scale of the LoRA {quoted(file)} must be a number, not '{scale}'") from None
        return text, None


def dtype_of(name: str | None) -> torch.dtype | None:
    """A dtype by torch's name or a short one; raises ConfigError for another."""
    if name is None:
        return None
    if name not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not '{name}'")
    return DTYPES[name]
