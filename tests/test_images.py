"""PNGs appear whole, say how they were generated, and are read by A1111's rules."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from eridiff.errors import ConfigError, EridiffError
from eridiff.images import contact_sheet, parameters_text, read_image, save_png, to_images, to_tensor, upright
from eridiff.inference import Prompt, Result
from eridiff.inference.again import read_settings
from eridiff.request import settle_size
from eridiff.text import Conditioning
from eridiff.training import Samples

SETTINGS: dict[str, Any] = {
    "prompt": "a swan, 1: on mars", "negative": "blurry\ntext", "steps": 8, "sampler": "Euler", "cfg_scale": 1.0,
    "guidance_scale": 3.5, "seed": 42, "width": 64, "height": 48, "model": "a, b: c.safetensors", "version": "0.1", "strength": None,
}  # fmt: skip


def a1111(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and pairs, by the rules of modules/infotext_utils.py."""
    *lines, last = text.strip().split("\n")
    pattern = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    if len(pattern.findall(last)) < 3:
        lines, last = [*lines, last], ""
    prompt, negative, done = [], [], False
    for line in lines:
        if line.startswith("Negative prompt:"):
            done, line = True, line.removeprefix("Negative prompt:")
        (negative if done else prompt).append(line.strip())
    pairs = {key: json.loads(value) if value.startswith('"') else value for key, value in pattern.findall(last)}
    return "\n".join(prompt), "\n".join(negative), pairs


def test_a1111s_reader_understands_the_text() -> None:
    prompt, negative, pairs = a1111(parameters_text(SETTINGS))
    assert (prompt, negative) == (SETTINGS["prompt"], SETTINGS["negative"])
    assert pairs["Seed"] == "42" and pairs["Size"] == "64x48" and pairs["Model"] == "a, b: c" and pairs["RNG"] == "CPU"
    assert "Denoising strength" not in pairs


def test_the_exact_settings_come_back(tmp_path: Path) -> None:
    path = save_png(Image.new("RGB", (64, 48)), tmp_path / "new" / "a.png", SETTINGS | {"prompt": "猫 ☃ \n x"})
    with Image.open(path) as image:
        image.load()
        assert json.loads(image.info["eridiff"])["prompt"] == "猫 ☃ \n x"
        assert image.info["parameters"].startswith("猫")


def test_an_unwritable_place_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "a.png", Path("/proc/none/a.png")):
        with pytest.raises(EridiffError, match="cannot be written"):
            save_png(Image.new("RGB", (8, 8)), target)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_levels_are_rounded_to_the_nearest() -> None:
    for level in range(256):
        assert to_images(torch.full((1, 3, 1, 1), level / 127.5 - 1))[0].getpixel((0, 0)) == (level,) * 3
    assert to_images(torch.tensor([-7.0, 7.0, 0.0]).view(1, 3, 1, 1))[0].getpixel((0, 0)) == (0, 255, 128)


def test_non_finite_images_are_never_written() -> None:
    with pytest.raises(EridiffError, match="not finite"):
        to_images(torch.full((1, 3, 2, 2), float("nan")))


@given(st.integers(1, 12), st.integers(1, 5))
def test_a_contact_sheet_shows_every_image(count: int, columns: int) -> None:
    pictures = [Image.new("RGB", (6, 4), (10 + i, 0, 0)) for i in range(count)]
    sheet = contact_sheet(pictures, columns)
    found = {pixel for _, pixel in sheet.getcolors(10_000) or []}
    assert {(10 + i, 0, 0) for i in range(count)} <= found


def test_captions_are_below_enlarged_images_and_are_shortened() -> None:
    images = [Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")]
    sheet = contact_sheet(images, 2, captions=["a swan", "a prompt that is much longer than its image is wide"])
    assert sheet.size == (2 * (192 + 4) + 4, 4 + 192 + 18 + 4)
    assert sheet.getpixel((100, 100)) == (255, 0, 0) and sheet.getpixel((300, 190)) == (0, 0, 255)
    below = sheet.crop((0, 197, sheet.width, sheet.height))
    dark = [x for x in range(below.width) if any(below.getpixel((x, y))[0] < 100 for y in range(below.height))]
    assert min(dark) < 20 and 250 < max(dark) < sheet.width - 4  # both captions, the second within its image
    assert not any(60 < x < 195 for x in dark)  # the first is short


def test_results_are_shown_by_notebooks_and_described_in_a_line() -> None:
    images = [Image.new("RGB", (64, 48), "red"), Image.new("RGB", (64, 48), "blue")]
    settings = [{"prompt": "a <b>swan</b>", "seed": 7}, {"prompt": {"clip": "a fox"}, "seed": 8}]
    result = Result(images, settings, latents=torch.zeros(2, 16, 6, 8))
    assert repr(result) == "Result(2 images 64 x 48, seed 7, 8, kept: latents)"
    html = result._repr_html_()
    assert html.count("<img ") == 2 and "a &lt;b&gt;swan&lt;/b&gt;" in html and "a fox" in html and "http" not in html
    with Image.open(io.BytesIO(result._repr_png_())) as sheet:
        assert sheet.size == (2 * 68 + 4, 56)
    samples = Samples(5, images=images, settings=settings, seconds=1.25, failure="TimeoutError: late")
    assert repr(samples) == "Samples(step 5, 2 images 64 x 48, 1.2 s, failed: TimeoutError: late)"
    assert "a fox, step 5" in samples._repr_html_()
    prompt = Prompt(Conditioning(torch.zeros(1, 12, 64), torch.zeros(1, 64)))
    assert repr(prompt) == (
        "Prompt(positive=Conditioning(text [1, 12, 64], pooled [1, 64], torch.float32), negative=None)"
    )


def test_an_image_becomes_a_tensor_and_back() -> None:
    image = Image.frombytes("RGB", (16, 8), bytes(range(256)) + bytes(128))
    assert to_images(to_tensor(image, 16, 8))[0].tobytes() == image.tobytes()
    assert to_tensor(image.convert("L"), 8, 4, mask=True).shape == (1, 1, 4, 8)


def test_what_is_not_an_image_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("x")
    for name, says in (("a.png", "is not an image"), ("none.png", "cannot be read")):
        with pytest.raises(ConfigError, match=says):
            read_image(tmp_path / name)


RAMP = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
DEEP = {  # an even ramp from black to white as people's files hold it
    "16-bit PNG": (Image.fromarray(RAMP.astype(np.uint16)), "png"),
    "16-bit TIFF of the other byte order": (Image.fromarray(RAMP.astype(">u2"), mode=None), "tiff"),
    "32-bit whole numbers": (Image.fromarray(RAMP.astype(np.int32)), "tiff"),
    "floats": (Image.fromarray((RAMP / 65535).astype(np.float32)), "tiff"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_more_than_8_bits_of_grey_are_scaled(kind: str, tmp_path: Path) -> None:
    image, ending = DEEP[kind]
    image.save(tmp_path / f"ramp.{ending}")
    read = read_image(tmp_path / f"ramp.{ending}")
    expected = torch.from_numpy(RAMP / 65535).float()
    assert torch.allclose(to_tensor(read, 64, 64, mask=True)[0, 0], expected, atol=2e-5)
    picture = to_tensor(read, 64, 64)
    assert picture.shape == (1, 3, 64, 64) and torch.allclose(
        picture, (expected * 2 - 1).expand(1, 3, 64, 64), atol=4e-5
    )
    smaller = to_tensor(read, 32, 16)
    assert smaller.shape == (1, 3, 16, 32) and -1 <= float(smaller.min()) < -0.9 < 0.9 < float(smaller.max()) <= 1
    eight = to_tensor(Image.fromarray((RAMP / 257).astype(np.uint8)), 32, 16)
    assert float((smaller - eight).abs().mean()) < 0.01


@pytest.mark.parametrize(
    ("levels", "says"),
    [
        (np.full((8, 8), 70000, np.int32), "mode I must have levels from 0 to 65535"),
        (np.full((8, 8), 200.0, np.float32), "mode F must have levels from 0 to 1"),
        (np.full((8, 8), -0.5, np.float32), "mode F must have levels from 0 to 1"),
        (np.full((8, 8), np.nan, np.float32), "mode F must have levels from 0 to 1"),
    ],
)
def test_numbers_that_are_not_levels_are_refused(levels: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        to_tensor(Image.fromarray(levels), 8, 8)


def test_a_photo_is_held_as_its_orientation_says(tmp_path: Path) -> None:
    lying = Image.new("RGB", (96, 64), "navy")
    lying.paste("white", (0, 0, 96, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to view
    lying.save(tmp_path / "photo.png", exif=exif)
    with Image.open(tmp_path / "photo.png") as opened:  # a user's own, too
        for image in (read_image(tmp_path / "photo.png"), opened):
            picture = to_tensor(image, 64, 96)
            assert float(picture[0, 0, :, -20:].min()) == 1.0 and float(picture[0, 0, :, :40].max()) < 0
    assert settle_size(None, None, upright(image), {}) == (64, 96)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_becomes_white_with_a_warning(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 8, 4))
    if mode == "P":
        made = Image.new("P", (8, 8), 1)
        made.putpalette([0, 0, 0, 9, 9, 9])
        made.paste(0, (0, 0, 8, 4))
        made.info["transparency"] = 1
    else:
        made = image.convert(mode)
    picture = to_tensor(made, 8, 8)
    assert float(picture[..., :4, :].max()) == -1.0 and float(picture[..., 4:, :].min()) == 1.0
    assert "transparent in places, which become white" in caplog.text
    with pytest.raises(ConfigError, match="the mask is transparent in places"):
        to_tensor(made, 8, 8, mask=True)
    caplog.clear()
    assert torch.equal(
        to_tensor(Image.new("RGBA", (8, 8), "red"), 8, 8), to_tensor(Image.new("RGB", (8, 8), "red"), 8, 8)
    )
    assert to_tensor(Image.new("LA", (8, 8), (255, 255)), 8, 8, mask=True).min() == 1 and not caplog.text


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_a_file_that_is_cut_is_one_sentence(share: float, tmp_path: Path) -> None:
    whole = save_png(Image.effect_noise((64, 64), 50).convert("RGB"), tmp_path / "a.png", SETTINGS).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: int(len(whole) * share)])
    for read in (read_image, read_settings):
        with pytest.raises(ConfigError, match="cannot be read|not an image"):
            read(tmp_path / "cut.png")
