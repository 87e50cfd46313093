"""PNGs appear whole, say how they were drawn, and are read by A1111's rules."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from eridiff.errors import ConfigError, EridiffError
from eridiff.images import contact_sheet, parameters_text, read_image, save_png, to_images, to_tensor

SETTINGS: dict[str, Any] = {
    "prompt": "a swan, 1: on mars", "negative_prompt": "blurry\ntext", "steps": 8, "sampler": "Euler", "cfg_scale": 1.0,
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
    assert (prompt, negative) == (SETTINGS["prompt"], SETTINGS["negative_prompt"])
    assert (
        pairs["Seed"] == "42"
        and pairs["Size"] == "64x48"
        and pairs["Model"] == "a, b: c.safetensors"
        and pairs["RNG"] == "CPU"
    )
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


def test_non_finite_pictures_are_never_written() -> None:
    with pytest.raises(EridiffError, match="not finite"):
        to_images(torch.full((1, 3, 2, 2), float("nan")))


@given(st.integers(1, 12), st.integers(1, 5))
def test_a_contact_sheet_shows_every_picture(count: int, columns: int) -> None:
    pictures = [Image.new("RGB", (6, 4), (10 + i, 0, 0)) for i in range(count)]
    sheet = contact_sheet(pictures, columns)
    found = {pixel for _, pixel in sheet.getcolors(10_000) or []}
    assert {(10 + i, 0, 0) for i in range(count)} <= found


def test_a_picture_becomes_a_tensor_and_back() -> None:
    image = Image.frombytes("RGB", (16, 8), bytes(range(256)) + bytes(128))
    assert to_images(to_tensor(image, 16, 8))[0].tobytes() == image.tobytes()
    assert to_tensor(image.convert("L"), 8, 4, mask=True).shape == (1, 1, 4, 8)


def test_what_is_no_picture_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("x")
    for name, says in (("a.png", "no picture"), ("none.png", "cannot be read")):
        with pytest.raises(ConfigError, match=says):
            read_image(tmp_path / name)
