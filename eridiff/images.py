"""Images in and out: tensors in [-1, 1], 8-bit PNGs with the settings that they were generated with, contact sheets."""

import base64
import io
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from eridiff.errors import ConfigError, EridiffError
from eridiff.files import replacing

log = logging.getLogger(__name__)
METADATA_KEY = "eridiff"  # of the PNG text chunk that holds the settings as JSON


def to_images(images: Tensor, truncate: bool = False) -> list[Image.Image]:
    """`[B, 3, H, W]` in [-1, 1] -> 8-bit images, clamped and rounded to the nearest level, or to the level below.

    The original Flux truncates and so is up to one level darker. Raises EridiffError for values that are not finite.
    """
    if not bool(torch.isfinite(images).all()):
        raise EridiffError("the image has values that are not finite and is not written")
    levels = (images.float().clamp(-1, 1) + 1) * 127.5
    levels = (levels if truncate else levels.round()).to(torch.uint8)
    return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in levels]


def to_tensor(image: Image.Image | Tensor, width: int, height: int, *, mask: bool = False) -> Tensor:
    """An image `[B, 3, H, W]` in [-1, 1], or a mask `[B, 1, H, W]` in [0, 1], float32 on the CPU, resized by Lanczos.

    Images of every mode are taken: turned upright as their EXIF orientation says, 16 bits and floats from 0 to 1 scaled,
    transparent ones laid on white with a warning. Tensors are already in that form and must have the size. Raises ConfigError
    for a tensor of another shape, for numbers that are not levels of brightness, and for a mask that is transparent in places,
    where it is not clear what must be painted.
    """
    if isinstance(image, Tensor):
        channels = 1 if mask else 3
        if image.ndim != 4 or image.shape[1:] != (channels, height, width):
            raise ConfigError(
                f"an image tensor has the shape {list(image.shape)}, [B, {channels}, {height}, {width}] is needed"
            )
        return image.to("cpu", torch.float32)
    whole: Image.Image = upright(image)
    deep = _deep_grey(whole)
    found = _opaque(whole, mask).convert("L" if mask else "RGB") if deep is None else deep
    if found.size != (width, height):
        found = found.resize((width, height), Image.Resampling.LANCZOS)
    values = torch.from_numpy(np.array(found, dtype=np.float32) / (255 if deep is None else 1)).clamp(0, 1)
    if values.ndim == 2:
        values = values[..., None].expand(-1, -1, 1 if mask else 3)
    values = values.permute(2, 0, 1)[None].contiguous()
    return values if mask else values * 2 - 1


def upright(image: Any) -> Any:
    """An image turned as its EXIF orientation says, as every viewer shows it; a tensor or None as it is."""
    return ImageOps.exif_transpose(image) if isinstance(image, Image.Image) else image


def _deep_grey(image: Image.Image) -> Image.Image | None:
    """A grey image of more than 8 bits with its levels from 0 to 1, in mode F; None for one of 8 bits, which Pillow converts.

    Pillow's own conversion clips these modes to 255, so that a depth map of 16 bits becomes white.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return None
    levels = np.asarray(image, dtype=np.float32)
    if image.mode != "F":
        levels = levels / np.float32(65535)  # what 16 bits hold; PNGs of 16 bits come as I too
    low, high = (float(levels.min()), float(levels.max())) if levels.size else (0.0, 0.0)
    if not 0 <= low <= high <= 1:
        most = "1" if image.mode == "F" else "65535"
        raise ConfigError(
            f"an image of mode {image.mode} must have levels from 0 to {most}: scale it, it is not clear how"
        )
    return Image.fromarray(levels)


def _opaque(image: Image.Image, mask: bool) -> Image.Image:
    """An image without its transparency: white shows through."""
    if not image.has_transparency_data:
        return image
    whole = image.convert("RGBA")
    if whole.getchannel("A").getextrema() == (255, 255):
        return image
    if mask:
        raise ConfigError("the mask is transparent in places: give a grey image, white where it must paint, or set mask_alpha (--mask-alpha) to paint where it is transparent")  # fmt: skip
    log.warning("the image is transparent in places, which become white")
    return Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole)


def transparency(image: Image.Image | Tensor) -> Image.Image:
    """A grey image of how transparent another is, white where it is wholly. Raises ConfigError for one that is nowhere."""
    if not isinstance(image, Image.Image) or not image.has_transparency_data:
        raise ConfigError("mask_alpha asks for a mask with an alpha channel, and this one has none")
    return ImageOps.invert(image.convert("RGBA").getchannel("A"))


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """An image from a file, upright; raises ConfigError when it is missing, damaged or not an image."""
    try:
        with Image.open(path) as image:
            image.load()
            return upright(image)
    except UnidentifiedImageError:
        raise ConfigError(f"'{path}' is not an image that can be read") from None
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's for files that are cut or damaged
        raise ConfigError(f"'{path}' cannot be read: {getattr(error, 'strerror', None) or error}") from None


SAMPLER_NAMES = {  # as A1111 calls them
    "euler": "Euler", "euler_ancestral": "Euler a", "heun": "Heun", "ddim": "DDIM", "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE", "lcm": "LCM",
}  # fmt: skip
SCHEDULE_NAMES = {"karras": "Karras", "exponential": "Exponential"}


def parameters_text(settings: Mapping[str, Any]) -> str:
    """The settings as A1111's "parameters" text: prompt, negative prompt, one line of pairs.

    Its readers look for LoRAs in the prompt, as `<lora:NAME:SCALE>`, and for their hashes beside. Files are named, not
    their folders, which are nobody's business.
    """
    prompt, negative = (first_text(settings.get(key) or "").strip() for key in ("prompt", "negative"))
    given = settings.get("loras") or ()
    known = (settings.get("hashes") or {}).get("loras") or [None] * len(given)
    loras = [(Path(e["file"]).stem, e["scale"], h) for e, h in zip(given, known, strict=True) if e["file"]]
    shown = [f"<lora:{name}:{scale:g}>" for name, scale, _ in loras if isinstance(scale, int | float)]
    prompt = " ".join([prompt, *shown]).strip()
    hashes = ", ".join(f"{name}: {known_by}" for name, _, known_by in loras if known_by)
    pairs = {
        "Steps": settings["steps"],
        "Sampler": SAMPLER_NAMES.get(settings["sampler"], settings["sampler"]),
        "Schedule type": SCHEDULE_NAMES.get(str(settings.get("schedule"))),
        "CFG scale": settings.get("cfg_scale"),
        "Distilled CFG Scale": settings.get("guidance_scale"),
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": Path(settings["model"]).stem if settings.get("model") else None,
        "Lora hashes": hashes,
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
    return re.sub(r"[^a-z0-9]+", "-", first_text(prompt).lower()).strip("-")[:40] or "image"


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
        told = with_paths(settings, lambda file: relative(file, target.parent))
        information.add_text(METADATA_KEY, json.dumps(told, ensure_ascii=False))
    with replacing(target) as temporary:
        image.save(temporary, format="PNG", pnginfo=information)
    return target


PATHS = ("model", "parts", "refiner", "loras", "image", "mask", "control", "references")  # settings that name files


def with_paths(settings: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Settings with every file's path changed."""

    def changed(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: each if key == "scale" else changed(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [changed(each) for each in value]
        return change(value) if isinstance(value, str) else value

    return {key: changed(value) if key in PATHS else value for key, value in settings.items()}


def relative(file: str, folder: Path) -> str:
    """A file as seen from a folder, so that both can be moved together; absolute where there is no way between them."""
    try:
        return os.path.relpath(file, folder)
    except ValueError:  # on another drive
        return os.path.abspath(file)


def contact_sheet(
    images: Sequence[Image.Image], columns: int | None = None, gap: int = 4, captions: Sequence[str] | None = None
) -> Image.Image:
    """All images on one white sheet, row by row, about square; smaller ones are in the cell's upper left corner.

    - columns: how many, all rows but the last.
    - gap: pixels around each image.
    - captions: one below each image, shortened where it is wider; images below 160 pixels are then enlarged by a whole factor.
    """
    text = 0
    if captions is not None:
        factor = max(1, math.ceil(160 / max(max(image.size) for image in images)))
        images = [
            image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC) for image in images
        ]
        text = 18
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = max(image.width for image in images) + gap, max(image.height for image in images) + gap + text
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, image in enumerate(images):
        left, top = gap + i % columns * width, gap + i // columns * height
        sheet.paste(image, (left, top))
        if captions is not None:
            words = captions[i]
            while pen.textlength(words, font) > width - gap:
                words = words.removesuffix("...")[:-1] + "..."
            pen.text((left, top + height - gap - text + 2), words, "black", font)
    return sheet


def described(images: Sequence[Image.Image]) -> str:
    """How many images of which size: "9 images 64 x 64"."""
    sizes = " and ".join(dict.fromkeys(f"{image.width} x {image.height}" for image in images))
    return f"{len(images)} image{'s' * (len(images) != 1)}{' ' * bool(sizes)}{sizes}"


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def html_of(images: Sequence[Image.Image], captions: Sequence[str]) -> str:
    """Images with captions side by side, in HTML without links, as notebooks show it."""
    figures = (
        f'<figure style="margin:4px"><img src="data:image/png;base64,{base64.b64encode(png_bytes(image)).decode()}" '
        f'width="{max(image.width, 128)}" alt=""><figcaption>{escape(caption)}</figcaption></figure>'
        for image, caption in zip(images, captions, strict=True)
    )
    return f'<div style="display:flex;flex-wrap:wrap">{"".join(figures)}</div>'
