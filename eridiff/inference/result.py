"""What goes into a picture's drawing and what comes out of it: plain tensors in frozen dataclasses."""

from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from eridiff.text import Conditioning


@dataclass(frozen=True)
class Prompt:
    """A prompt, encoded; `negative` None stands for the family's default."""

    positive: Conditioning
    negative: Conditioning | None = None


@dataclass(frozen=True)
class Step:
    """What a callback sees after each step."""

    index: int  # from 0
    count: int  # of the whole schedule; image to image begins later than 0
    sigma: float  # the noise that is left
    latents: Tensor  # [B, C, H / 8, W / 8] float32, not a copy
    clean: Tensor  # the same shape: the clean latents that the network saw in this step


@dataclass(frozen=True)
class Result:
    """The pictures of one call, and what was asked to be kept of the way to them."""

    images: list[Image.Image]
    settings: list[dict[str, Any]]  # one a picture: everything needed to draw it again
    conditioning: Prompt | None = None
    noise: Tensor | None = None  # [B, C, H / 8, W / 8], as drawn
    latents: Tensor | None = None  # [B, C, H / 8, W / 8], as decoded
