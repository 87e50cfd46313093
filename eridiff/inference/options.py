"""What can be set when a model is loaded: the shared options, once, and those of the families together for `eridiff.load`."""

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import TypedDict

import torch

from eridiff.errors import ConfigError
from eridiff.request import FIELDS


class Options(TypedDict, total=False):
    """The options that every family has.

    - variant: a published variant of the family; None decides by the network's sizes, and among equal sizes by the file's name.
    - device: where a model is loaded to; None is CUDA where there is any, else the CPU. Modules that are passed stay where
      they are, and images are computed there.
    - dtype: one for all components or by component (flux, vae, t5, ...); None is the file's on a GPU, and float32 on a CPU
      with room for it.
    - vram: how much memory the device has ("24GiB", or bytes), which chooses `offload` and `vae_rows`, for a larger image again as far
      as the loaded model can change; one that would not fit is refused before it is begun.
    - offload: "stages" keeps every component on the CPU and moves it to the device only for its stage, its
      layers of modulation for their calls alone. "stream" keeps a few blocks of the network and the text encoders there and copies
      the next while one computes (CUDA; on the CPU it has no effect); with `vram` as many stay as fit. "layers" moves each linear layer of the network and the text encoders for its
      calls alone: the least memory, at the price of the whole network over the bus in each step.
    - vae_rows: the autoencoder works in strips of so many rows, exactly and in less memory (memory/strips.py).
    - compile: the network's blocks are compiled (`eridiff.blocks.compile_blocks`), which the first image waits for. Another image
      size compiles them once more, further sizes do not. The last digits of an image are others than without.
    - progress: whether to show progress bars, True by default.
    - allow_unknown: tensors of a file that its network does not use are left out with a warning, and are not an error.
    """

    variant: str | None
    device: torch.device | str | None
    dtype: torch.dtype | Mapping[str, torch.dtype] | None
    vram: int | str | None
    offload: str | None
    vae_rows: int | None
    compile: bool
    progress: bool
    allow_unknown: bool


class LoadOptions(Options, total=False):
    """The options of all families; a family's constructor says what its own mean, and refuses the others."""

    prediction: str | None  # SDXL
    zero_terminal_snr: bool | None


def check_names(owner: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raises ConfigError, with the nearest known name, unless all given options are known."""
    for name in given:
        if name not in known and name in FIELDS:
            raise ConfigError(
                f"{owner} has no option '{name}': it is asked of each image, by generate(..., {name}=...) or the key of a section"
            )
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(known)}"
            raise ConfigError(f"{owner} has no option '{name}'; {hint}")
