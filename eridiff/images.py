"""Pictures in and out: tensors in [-1, 1], 8-bit PNGs that say how they were drawn, contact sheets."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from eridiff.errors import ConfigError, EridiffError
from eridiff.files import replacing

METADATA_KEY = "eridiff"  # of the PNG text chunk that holds the settings as JSON


def to_images(pictures: Tensor) -> list[Image.Image]:
    """`[B, 3, H, W]` in [-1, 1] -> 8-bit pictures, clamped and rounded to the nearest level.

    The original Flux truncates instead and so is up to one level darker. Raises EridiffError for values that are not
    finite.
    """
    if not bool(torch.isfinite(pictures).all()):
        raise EridiffError("the picture has values that are not finite and is not written")
    levels = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()) for picture in levels]


def to_tensor(image: Image.Image | Tensor, width: int, height: int, *, mask: bool = False) -> Tensor:
    """A picture `[B, 3, H, W]` in [-1, 1], or a mask `[B, 1, H, W]` in [0, 1], of the size wanted (Lanczos).

    On the CPU, as images are. Tensors are already in that form and must have the size: ConfigError otherwise.
    """
    if isinstance(image, Tensor):
        channels = 1 if mask else 3
        if image.ndim != 4 or image.shape[1:] != (channels, height, width):
            raise ConfigError(
                f"a picture tensor has the shape {list(image.shape)}, [B, {channels}, {height}, {width}] is needed"
            )
        return image.to("cpu", torch.float32)
    image = image.convert("L" if mask else "RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    values = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
    return values[None, None] if mask else values.permute(2, 0, 1)[None] * 2 - 1


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """A picture from a file; raises ConfigError when it is missing or no picture."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except UnidentifiedImageError:
        raise ConfigError(f"'{path}' is no picture that can be read") from None
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read: {error.strerror or error}") from None


SAMPLER_NAMES = {  # as A1111 calls them
    "euler": "Euler", "euler_ancestral": "Euler a", "heun": "Heun", "ddim": "DDIM", "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE", "lcm": "LCM",
}  # fmt: skip
SCHEDULE_NAMES = {"karras": "Karras", "exponential": "Exponential"}


def parameters_text(settings: Mapping[str, Any]) -> str:
    """The settings as A1111's "parameters" text: prompt, negative prompt, one line of pairs."""
    prompt, negative = (first_text(settings.get(key) or "").strip() for key in ("prompt", "negative_prompt"))
    pairs = {
        "Steps": settings["steps"],
        "Sampler": SAMPLER_NAMES.get(settings["sampler"], settings["sampler"]),
        "Schedule type": SCHEDULE_NAMES.get(str(settings.get("schedule"))),
        "CFG scale": settings.get("cfg_scale"),
        "Distilled CFG Scale": settings.get("guidance_scale"),
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": settings.get("model"),
        "Denoising strength": settings.get("strength"),
        "RNG": "CPU",
        "Version": f"eridiff {settings['version']}",
    }
    line = ", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items() if value not in (None, ""))
    return "\n".join([prompt, *([f"Negative prompt: {negative}"] if negative else []), line])


def first_text(prompt: Any) -> str:
    """A prompt, or the first of those for each text encoder."""
    return str(next(iter(prompt.values()), "")) if isinstance(prompt, Mapping) else str(prompt)


def slug(prompt: Any) -> str:
    """A prompt as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", first_text(prompt).lower()).strip("-")[:40] or "picture"


def _quoted(value: object) -> str:
    """A1111's reader ends a value at a comma unless it is a JSON string."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search('[,:\n"]', text) else text


def save_png(image: Image.Image, path: str | os.PathLike[str], settings: Mapping[str, Any] | None = None) -> Path:
    """Write a PNG, whole or not at all, with the settings as A1111 text and as JSON.

    The folder is made. Raises EridiffError when it cannot be written.
    """
    target = Path(path)
    information = PngImagePlugin.PngInfo()
    if settings is not None:
        information.add_text("parameters", parameters_text(settings))
        information.add_text(METADATA_KEY, json.dumps(dict(settings), ensure_ascii=False))
    with replacing(target) as temporary:
        image.save(temporary, format="PNG", pnginfo=information)
    return target


def contact_sheet(images: Sequence[Image.Image], columns: int | None = None, gap: int = 4) -> Image.Image:
    """All pictures on one white sheet, row by row, about square; smaller ones stand in the cell's upper left corner."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = max(image.width for image in images) + gap, max(image.height for image in images) + gap
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (gap + i % columns * width, gap + i // columns * height))
    return sheet
