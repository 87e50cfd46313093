"""What goes into the generation of an image, what is on the way and what comes out: plain tensors in dataclasses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from eridiff.block_cache import Reuse
from eridiff.images import contact_sheet, described, first_text, html_of, png_bytes
from eridiff.schedulers.step import Draw, Past
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


Callback = Callable[[Step], object]


@dataclass
class Run:
    """How far a run has come; another network can take it over."""

    x: Tensor  # latents [B, C, H / 8, W / 8] float32
    noise: Tensor  # the same shape: what it began from
    draw: Draw | None  # of samplers that draw noise on the way, which goes on
    start: int = 0  # the step that it began with
    past: Sequence[Past] = ()  # what multi-step samplers remember: (clean, noise) of the last steps
    stopped: bool = False  # by the callback
    reuse: Reuse | None = None  # what a block_cache left out in this part, and its error


@dataclass(frozen=True)
class HandedIn:
    """What a caller gives of an image's way and wants of it; the rest of what is asked is a `Request`."""

    conditioning: Prompt | None = None
    noise: Tensor | Run | None = None
    keep: Sequence[str] = ()
    callback: Callback | None = None


@dataclass(frozen=True)
class Result:
    """The images of one call, and what was asked to be kept of the way to them."""

    images: list[Image.Image]
    settings: list[dict[str, Any]]  # one per image: everything needed to generate it again
    conditioning: Prompt | None = None
    noise: Tensor | None = None  # [B, C, H / 8, W / 8], as generated
    latents: Tensor | None = None  # [B, C, H / 8, W / 8], as decoded
    run: Run | None = None  # as far as it came, for a part that goes on

    def __repr__(self) -> str:
        kept = [name for name in ("conditioning", "noise", "latents", "run") if getattr(self, name) is not None]
        seeds = ", ".join(str(settings.get("seed")) for settings in self.settings)
        return f"Result({described(self.images)}, seed {seeds}{', kept: ' + ', '.join(kept) if kept else ''})"

    def _repr_html_(self) -> str:
        """The images with their prompts, as notebooks show them."""
        return html_of(self.images, [first_text(settings.get("prompt")) for settings in self.settings])

    def _repr_png_(self) -> bytes:
        """The images as one, for notebooks that show no HTML."""
        return png_bytes(contact_sheet(self.images))
