"""The command line generates, says what it did, and refuses in one sentence."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from eridiff.cli import main


def pngs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_without_anything_every_built_in_model_generates_a_row_and_it_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", "--steps", "1", "--out", str(tmp_path / "s")]) == 0
    out, err = capsys.readouterr()
    for name in ("tiny-flux", "tiny-sd35", "tiny-sdxl"):
        assert f"eridiff: the built-in {name} (--list shows its words), " in err
    assert len(pngs(tmp_path / "s")) == 16 and "0000-contact-sheet.png" in pngs(tmp_path / "s")
    assert sorted(Path(line).name for line in out.splitlines()) == pngs(tmp_path / "s")
    with Image.open(tmp_path / "s" / "0000-contact-sheet.png") as sheet:
        assert sheet.width > 5 * 192 and 3 * 192 < sheet.height < 4 * 192  # five columns, three rows, enlarged


def test_a_built_in_model_without_a_prompt_generates_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", "--model", "tiny-sd35", "--steps", "1", "--out", str(tmp_path / "s")]) == 0
    assert len(pngs(tmp_path / "s")) == 6 and "the built-in tiny-sd35 (" in capsys.readouterr().err


def test_a_name_that_is_not_a_model_lists_the_built_in_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--model", "tiny-sd", "--prompt", "a swan on mars", "--out", str(tmp_path)]) == 2
    assert "built in are tiny-flux, tiny-sd35, tiny-sdxl" in capsys.readouterr().err


def test_a_png_generates_itself_again(tmp_path: Path) -> None:
    assert (
        main(["sample", "--prompt", "a fox on snow", "--seed", "9", "--out", str(tmp_path / "a.png"), "--quiet"]) == 0
    )
    with Image.open(tmp_path / "a.png") as first:
        s = json.loads(first.info["eridiff"])
        pixels = first.tobytes()
        assert first.info["parameters"].startswith("a fox on snow\nSteps: 8, Sampler: Euler")
    again = [
        "--prompt",
        s["prompt"],
        "--seed",
        str(s["seed"]),
        "--steps",
        str(s["steps"]),
        "--size",
        f"{s['width']}x{s['height']}",
    ]
    assert main(["sample", *again, "--out", str(tmp_path / "b.png"), "--quiet"]) == 0
    with Image.open(tmp_path / "b.png") as second:
        assert second.tobytes() == pixels


def test_nothing_is_overwritten_in_a_folder(tmp_path: Path) -> None:
    for _ in range(2):
        assert main(["sample", "--prompt", "a fox on snow", "--steps", "1", "--out", str(tmp_path), "--quiet"]) == 0
    assert pngs(tmp_path) == ["0000-a-fox-on-snow.png", "0001-a-fox-on-snow.png"]


def test_quiet_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--prompt", "a fox on snow", "--steps", "1", "--out", str(tmp_path), "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")


def test_the_plans_file_generates_with_its_notices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(
        "sample:\n  prompts: ['a swan on mars', 'a dog at night']\n  sample_every: 100\n  sample_steps: 2\n  cfg_scale: 7.5\n"
        f"  seed: 42\n  walk_seed: true\n  use_lora: true\n  lora_scale: 1.0\n  out: {tmp_path / 'out'}\n"
    )
    assert main(["sample", str(tmp_path / "run.yaml")]) == 0
    err = capsys.readouterr().err
    for notice in (
        "without effect here: sample_every (it is for training)",
        "without effect here: use_lora (",
        "lora_scale has no effect without a LoRA",
        "cfg_scale 7.5 is taken as guidance_scale",
    ):
        assert err.count(notice) == 1
    seeds = {}
    for name in pngs(tmp_path / "out"):
        with Image.open(tmp_path / "out" / name) as image:
            seeds[name] = json.loads(image.info.get("eridiff", "{}")).get("seed")
    assert seeds == {"0000-a-swan-on-mars.png": 42, "0000-contact-sheet.png": None, "0001-a-dog-at-night.png": 43}


def test_options_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"sample:\n  prompts: [a swan on mars]\n  sample_steps: 5\n  out: {tmp_path / 'wrong'}\n"
    )
    arguments = [
        "--prompt",
        "a pig on grass",
        "--steps",
        "1",
        "--seed",
        "3",
        "--out",
        str(tmp_path / "a.png"),
        "--quiet",
    ]
    assert main(["sample", str(tmp_path / "run.yaml"), *arguments]) == 0
    with Image.open(tmp_path / "a.png") as image:
        s = json.loads(image.info["eridiff"])
    assert (s["prompt"], s["steps"], s["seed"]) == ("a pig on grass", 1, 3) and not (tmp_path / "wrong").exists()


def test_an_image_and_a_mask_from_files(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "in.png")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "mask.png")
    files = [
        "--image",
        str(tmp_path / "in.png"),
        "--mask",
        str(tmp_path / "mask.png"),
        "--out",
        str(tmp_path / "a.png"),
    ]
    assert main(["sample", "--prompt", "a fox on snow", *files, "--quiet"]) == 0
    with Image.open(tmp_path / "a.png") as image:
        assert image.getpixel((60, 30)) == (200, 30, 30) and image.getpixel((4, 30)) != (200, 30, 30)
        assert json.loads(image.info["eridiff"])["mask"].endswith("mask.png")


def test_an_unwritable_place_is_found_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("eridiff.cli.sample.load", lambda *a, **k: pytest.fail("loaded"))
    for out in ("file/a.png", "file/folder", "file", "/proc/x"):
        assert main(["sample", "--prompt", "x", "--out", str(tmp_path / out)]) == 2
        assert re.search("file' is not a folder|'/proc' takes no new files", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_list_shows_the_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--list"]) == 0
    out = capsys.readouterr().out
    assert "swan" in out and "on mars" in out and "big" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--steps", "0"], "at least one step, not 0"),
        (["--steps", "-2"], "at least one step, not -2"),
        (["--size", "1000x1000"], "width must be a multiple of 16, not 1000; the nearest is 992"),
        (["--size", "64x63"], "height must be a multiple of 16, not 63; the nearest is 64"),
        (["--size", "big"], "--size must be WIDTHxHEIGHT such as 1024x768, not 'big'"),
        (["--seed", "-1"], "the seed must be a whole number from 0"),
        (["--model", "nowhere"], "'nowhere' does not exist"),
        (["--model", ".", "--prompt", "x"], "holds no safetensors file|twice|missing"),
        (["--device", "gpu"], "the device 'gpu' is not there; this machine has cpu"),
        (["--device", "hpu"], "the device 'hpu' is not there; this machine has cpu"),
        (["--out", "/proc/none"], "cannot be written|cannot be read"),
        (["--image", "none.png"], "'none.png' cannot be read"),
        (["--mask", "none.png"], "mask has no effect without the image that it is for"),
        (["--strength", "0.5"], "strength has no effect without the image that it is for"),
        (["--guidance", "nan"], "guidance_scale must be between 0 and 1000, not nan"),
        (["--prompt", "a", "--prompt", "b", "--out", "a.png"], "'a.png' is one file and there are 2 prompts"),
        (["none.yaml"], "none.yaml: is not a file"),
        (["--model", "x", "--steps", "3"], "no prompt is given"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--model" in arguments and "--prompt" not in arguments and "no prompt" not in says:
        arguments = [*arguments, "--prompt", "x"]
    assert main(["sample", "--quiet", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.search(says, err), err
    assert list(tmp_path.iterdir()) == []


def test_a_negative_prompt_without_guidance_is_refused_as_a_flag_and_told_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["sample", "--steps", "1", "--out", str(tmp_path / "out")]
    assert main([*options, "--prompt", "a fox on snow", "--negative", "x"]) == 2
    assert "negative has no effect without classifier-free guidance" in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text("sample: {prompts: [a fox on snow, a dog at night], neg: blurry}\n")
    assert main([*options, str(tmp_path / "run.yaml")]) == 0
    assert capsys.readouterr().err.count("negative has no effect without classifier-free guidance") == 1
