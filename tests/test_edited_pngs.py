"""A PNG whose settings were edited generates, or ends in one sentence: every setting, in turn, of every wrong kind."""

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import eridiff
from eridiff.blocks import compile_blocks
from eridiff.errors import EridiffError
from eridiff.inference import compiled
from eridiff.inference.again import generate_again, load_again, read_settings
from eridiff.request import FIELDS
from tests import tiny

WRONG: list[Any] = [1.5, "x", True, [1], {"x": "y"}, [{"file": 3, "scale": "x"}]]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("edited")
    model = eridiff.load(tiny.write_model(folder / "model"), device="cpu", progress=False)
    return folder, model.generate("swan", steps=1, width=32, height=32, seed=1)


def written(settings: dict[str, Any], image: Image.Image, path: Path) -> Path:
    info = PngInfo()
    info.add_itxt("eridiff", json.dumps(settings))
    image.save(path, pnginfo=info)
    return path


def test_no_edited_setting_ends_in_anything_but_a_sentence(
    generated: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # inductor takes 15 s and changes nothing of this
    monkeypatch.setattr(compiled, "compile_blocks", partial(compile_blocks, backend="eager"))
    folder, result = generated
    outcomes: Counter[str] = Counter()
    loaded = load_again(result.settings[0], progress=False)
    for name in result.settings[0]:
        for wrong in WRONG:
            path = written({**result.settings[0], name: wrong}, result.images[0], folder / "edited.png")
            try:
                settings = read_settings(path)
                generate_again(loaded if name in FIELDS else load_again(settings, progress=False), settings)
                outcomes["generated"] += 1
            except EridiffError as error:
                assert "\n" not in str(error), (name, wrong)
                outcomes["refused"] += 1
            except Exception as error:
                raise AssertionError(f"{name} = {wrong!r}: {error!r}") from error
    assert outcomes["refused"] > 4 * outcomes["generated"] > 0
    path = written(result.settings[0], result.images[0], folder / "same.png")
    again = generate_again(load_again(read_settings(path), progress=False), read_settings(path))
    assert again.images[0].tobytes() == result.images[0].tobytes()
