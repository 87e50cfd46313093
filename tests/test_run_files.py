"""Files that people already have, of ai-toolkit, EriDiffusion, the plan and kohya, generate what their authors meant."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from eridiff import FluxInference, SD35Inference, SDXLInference
from eridiff.cli import main
from eridiff.config import RunConfig, TrainingSchedule, parse_config
from eridiff.errors import ConfigError
from eridiff.prompt_files import FLAGS, UNUSED_FLAGS, split_flags
from eridiff.run_files import ai_toolkit, load_config
from eridiff.run_files.ai_toolkit import MODEL_KEYS
from eridiff.yaml_reader import read_yaml
from tests import tiny

FLUX = """
job: extension
config:
  name: glass_heron_flux
  process:
    - type: sd_trainer
      training_folder: "${RUNS}/flux"
      device: cuda:0
      trigger_word: gl4ssheron
      performance_log_every: 1000
      network: {type: lora, linear: 32, linear_alpha: 16}
      save: {dtype: bf16, save_every: 500, max_step_saves_to_keep: 3}
      datasets:
        - folder_path: data/heron
          caption_ext: txt
          caption_dropout_rate: 0.05
          resolution: [512, 768, 1024]
      train:
        batch_size: 1
        steps: 3000
        gradient_checkpointing: true
        noise_scheduler: flowmatch
        optimizer: adamw8bit
        lr: 1e-4
        ema_config: {use_ema: true, ema_decay: 0.99}
        dtype: bf16
      model:
        name_or_path: MODEL
        is_flux: true
        quantize: true
      sample:
        sampler: flowmatch
        sample_every: 250
        sample_start_step: 0
        width: 64
        height: 96
        neg: ""
        seed: 42
        walk_seed: true
        guidance_scale: 3.5
        sample_steps: 4
        prompts:
          - "[trigger] standing in a marsh at dawn, mist, long lens"
          - "poster: a paper-cut [trigger] --w 103 --h 64 --d 7"
          - "a teapot shaped like [trigger], by [name] --s 3 --m 0.6"
meta:
  name: "[name]"
  version: '1.0'
"""

SD35 = """
job: extension
config:
  name: tile_pattern_sd35
  process:
    - type: sd_trainer
      training_folder: runs
      device: cuda:0
      network: {type: lora, linear: 16, linear_alpha: 16}
      save: {dtype: float16, save_every: 250}
      datasets:
        - folder_path: data/tiles
          caption_ext: txt
          resolution: [1024]
      train:
        batch_size: 1
        steps: 2000
        noise_scheduler: flowmatch
        timestep_type: linear
        optimizer: adamw8bit
        lr: 5.0e-5
        dtype: bf16
      model:
        name_or_path: MODEL
        is_v3: true
      sample:
        sampler: flowmatch
        sample_every: 200
        width: 64
        height: 64
        guidance_scale: 4.5
        sample_steps: 4
        seed: 1234
        samples:
          - prompt: "a floor of blue and white azulejo tiles, seen from above"
          - prompt: "azulejo tiles, a ship in the centre"
            neg: "blurry, watermark"
            width: 96
            height: 64
            seed: 5
          - prompt: "azulejo tiles around a window"
            guidance_scale: 3.0
            sample_steps: 5
            network_multiplier: 0.8
meta: {name: "[name]"}
"""

SDXL = """
job: extension
config:
  name: charcoal_sdxl
  process:
    - type: sd_trainer
      training_folder: runs
      device: cuda:0
      trigger_word: "ch4rcoal style"
      network: {type: locon, linear: 32, linear_alpha: 16, conv: 16, conv_alpha: 8}
      save: {dtype: float16, save_every: 400}
      datasets:
        - folder_path: data/charcoal
          caption_ext: txt
          resolution: [1024]
      train:
        batch_size: 2
        steps: 2400
        train_text_encoder: true
        noise_scheduler: ddpm
        optimizer: adamw
        lr: 0.0001
        skip_first_sample: true
        dtype: bf16
      model:
        name_or_path: MODEL
        is_xl: true
      sample:
        sampler: euler
        sample_every: 200
        width: 64
        height: 64
        neg: "photo, colour"
        seed: 42
        walk_seed: false
        guidance_scale: 6.5
        guidance_rescale: 0.0
        sample_steps: 3
        format: png
        prompts:
          - "portrait of an old sailor, [trigger]"
          - "harbour at night, [trigger] --n photo, colour, text --w 96 --h 72 --l 5"
"""

ERIDIFFUSION = """
job: extension
config:
  name: moss_garden
  process:
    - type: sd_trainer
      training_folder: output/moss
      device: cuda:0
      trigger_word: m0ss
      network: {type: lora, linear: 16, linear_alpha: 16}
      save: {dtype: float16, save_every: 250, max_step_saves_to_keep: 4}
      datasets:
        - folder_path: data/moss
          caption_ext: txt
          caption_dropout_rate: 0.05
          shuffle_tokens: false
          cache_latents_to_disk: true
          resolution: [1024]
      train:
        batch_size: 1
        steps: 2000
        gradient_accumulation: 1
        train_unet: true
        train_text_encoder: false
        gradient_checkpointing: true
        noise_scheduler: ddpm
        optimizer: adamw8bit
        lr: 5e-5
        dtype: bf16
      model:
        name_or_path: MODEL
        is_sdxl: true
      sample:
        sampler: ddim
        sample_every: 250
        width: 64
        height: 64
        prompts:
          - a bench in a garden of [trigger]
          - "[trigger] on a stone lantern, rain"
        seed: 42
        walk_seed: true
        neg: ugly
        guidance_scale: 7
        sample_steps: 3
meta: {name: moss_garden, version: '1.0'}
"""

PLAN = """
model: MODEL
sample:
  prompts: ["a white swan on mars"]
  sample_every: 100
  sample_steps: 4
  cfg_scale: 7.5
  seed: 42
  use_lora: true
  lora_scale: 1.0
"""

LINES = """# prompts of the heron run
a glass heron in a marsh, dawn --w 64 --h 96 --d 1 --s 3 --l 1.0 --g 3.5

a glass heron --W 96 --H 64 --D 2 --S 4 --n blurry, low quality --l 4 --g 2.5 --ss euler_a
"""
TOML = """
[prompt]
width = 64
height = 96
sample_steps = 3
scale = 1.0
guidance_scale = 3.5
sample_sampler = "euler"

[[prompt.subset]]
prompt = "a glass heron in a marsh, dawn"
seed = 1

[[prompt.subset]]
prompt = "a glass heron"
negative_prompt = "blurry, low quality"
seed = 2
width = 96
height = 64
sample_steps = 4
scale = 4.0
guidance_scale = 2.5
sample_sampler = "euler_a"
"""
JSON = [
    "a glass heron in a marsh, dawn --w 64 --h 96 --d 1 --s 3 --l 1.0 --g 3.5",
    {
        "prompt": "a glass heron", "negative_prompt": "blurry, low quality", "seed": 2, "width": 96, "height": 64,
        "sample_steps": 4, "scale": 4.0, "guidance_scale": 2.5, "sample_sampler": "euler_a",
    },
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "flux": tiny.write_model(folder / "flux"),
        "sd3": tiny.write_sd3_model(folder / "sd3"),
        "sdxl": tiny.write_sdxl_model(folder / "sdxl"),
    }


def drawn(folder: Path, *arguments: Any) -> list[tuple[dict[str, Any], bytes]]:
    """The settings and pixels of each image that a command generates."""
    assert main(["sample", *map(str, arguments), "--device", "cpu", "--out", str(folder)]) == 0
    found = []
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            if "eridiff" in image.info:
                settings = json.loads(image.info["eridiff"])
                assert image.size == (settings["width"], settings["height"])
                found.append((settings, image.tobytes()))
    return found


def values(pictures: list[tuple[dict[str, Any], bytes]], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(settings[name] for name in names) for settings, _ in pictures]


def again(kind: type[Any], model: Path, settings: dict[str, Any], **options: Any) -> bytes:
    """The pixels that the same settings give in Python."""
    names = ("width", "height", "steps", "seed", "sampler", "schedule", "cfg_scale", "cfg_rescale")
    given = {name: settings[name] for name in names} | {"negative": settings["negative"]} | options
    return bytes(tiny.load(kind, model).generate(settings["prompt"], **given).images[0].tobytes())


def written(folder: Path, text: str, model: Path, name: str = "train.yaml") -> Path:
    (folder / name).write_text(text.replace("MODEL", str(model)))
    return folder / name


def test_ai_toolkits_flux_run_generates(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RUNS", "/somewhere")
    pictures = drawn(tmp_path / "out", written(tmp_path, FLUX, models["flux"]))
    out = capsys.readouterr().err
    assert values(pictures, "prompt", "seed", "width", "height", "steps", "guidance_scale", "cfg_scale", "sampler") == [
        ("gl4ssheron standing in a marsh at dawn, mist, long lens", 42, 64, 96, 4, 3.5, 1.0, "euler"),
        ("poster: a paper-cut gl4ssheron", 7, 96, 64, 4, 3.5, 1.0, "euler"),
        ("a teapot shaped like gl4ssheron, by glass_heron_flux", 44, 64, 96, 3, 3.5, 1.0, "euler"),
    ]
    assert out.count("without effect here: ") == 1
    told = next(line for line in out.splitlines() if "without effect here" in line)
    for key in (
        "job",
        "meta",
        "datasets",
        "save",
        "network",
        "train",
        "sample_every",
        "sample_start_step",
        "device",
        "model: quantize",
    ):
        assert f" {key}" in told
    assert "the width 103 becomes 96, a multiple of 16" in out
    assert pictures[1][1] == again(
        FluxInference, models["flux"], pictures[1][0], recipe="ai-toolkit", guidance_scale=3.5
    )


def test_ai_toolkits_sd35_run_generates(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = drawn(tmp_path / "out", written(tmp_path, SD35, models["sd3"]))
    assert values(pictures, "seed", "width", "height", "steps", "cfg_scale", "negative", "sampler") == [
        (1234, 64, 64, 4, 4.5, None, "euler"),
        (5, 96, 64, 4, 4.5, "blurry, watermark", "euler"),
        (1234, 64, 64, 5, 3.0, None, "euler"),
    ]
    out = capsys.readouterr().err
    assert "prompt 3 has no seed and takes the section's; ai-toolkit would go on with 5" in out
    assert pictures[1][1] == again(SD35Inference, models["sd3"], pictures[1][0], recipe="ai-toolkit")


def test_ai_toolkits_sdxl_run_generates(models: dict[str, Path], tmp_path: Path) -> None:
    pictures = drawn(tmp_path / "out", written(tmp_path, SDXL, models["sdxl"]))
    assert values(pictures, "prompt", "seed", "width", "height", "steps", "cfg_scale", "negative") == [
        ("portrait of an old sailor, ch4rcoal style", 42, 64, 64, 3, 6.5, "photo, colour"),
        ("harbour at night, ch4rcoal style", 42, 96, 64, 3, 5.0, "photo, colour, text"),
    ]
    assert pictures[1][1] == again(SDXLInference, models["sdxl"], pictures[1][0], recipe="ai-toolkit")


def test_eridiffusions_run_generates(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = drawn(tmp_path / "out", written(tmp_path, ERIDIFFUSION, models["sdxl"]))
    assert values(pictures, "prompt", "seed", "steps", "cfg_scale", "negative", "sampler") == [
        ("a bench in a garden of m0ss", 42, 3, 7.0, "ugly", "ddim"),
        ("m0ss on a stone lantern, rain", 43, 3, 7.0, "ugly", "ddim"),
    ]
    assert capsys.readouterr().err.count("without effect here") == 1
    assert pictures[0][1] == again(SDXLInference, models["sdxl"], pictures[0][0], recipe="ai-toolkit")


def test_a_run_in_json_with_comments_generates(models: dict[str, Path], tmp_path: Path) -> None:
    document = read_yaml(SDXL.replace("MODEL", str(models["sdxl"])))
    text = json.dumps(document, indent="\t").replace("\n", " // as YAML\n", 1)
    (tmp_path / "train.jsonc").write_text(f"/* a run */\n{text}")
    yaml = drawn(tmp_path / "yaml", written(tmp_path, SDXL, models["sdxl"]))
    assert drawn(tmp_path / "json", tmp_path / "train.jsonc") == yaml


def test_the_plans_section_generates(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = drawn(tmp_path / "out", written(tmp_path, PLAN, models["flux"]))
    assert values(pictures, "prompt", "seed", "steps", "guidance_scale", "cfg_scale") == [
        ("a white swan on mars", 42, 4, 7.5, 1.0)
    ]
    told = capsys.readouterr().err
    assert "without effect here: sample_every (it is for training)" in told
    assert "without effect here: use_lora (no LoRA file is given)" in told
    assert "lora_scale has no effect without a LoRA that has no scale of its own" in told
    assert pictures[0][1] == again(FluxInference, models["flux"], pictures[0][0], guidance_scale=7.5)


@pytest.mark.parametrize(("name", "text"), [("p.txt", LINES), ("p.toml", TOML), ("p.json", json.dumps(JSON))])
def test_kohyas_prompt_files_generate(name: str, text: str, models: dict[str, Path], tmp_path: Path) -> None:
    """The same images whether the file stands alone or beside a configuration, whose numbers it replaces."""
    (tmp_path / name).write_text(text)
    pictures = drawn(tmp_path / "out", tmp_path / name, "--model", models["flux"])
    assert values(
        pictures, "prompt", "seed", "width", "height", "steps", "guidance_scale", "cfg_scale", "negative", "sampler"
    ) == [
        ("a glass heron in a marsh, dawn", 1, 64, 96, 3, 3.5, 1.0, None, "euler"),
        ("a glass heron", 2, 96, 64, 4, 2.5, 4.0, "blurry, low quality", "euler_ancestral"),
    ]  # fmt: skip
    assert pictures[1][1] == again(FluxInference, models["flux"], pictures[1][0], guidance_scale=2.5)
    beside = drawn(tmp_path / "beside", written(tmp_path, PLAN, models["flux"]), "--prompts-file", tmp_path / name)
    assert beside == pictures


@pytest.mark.parametrize("family", ["sd3", "sdxl"])
def test_kohyas_scale_is_the_guidance_of_other_families(family: str, models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a heron --n blurry --l 5.5 --s 3 --w 64 --h 64 --ss k_euler\n")
    pictures = drawn(tmp_path / "out", tmp_path / "p.txt", "--model", models[family])
    assert values(pictures, "cfg_scale", "negative", "sampler", "schedule") == [(5.5, "blurry", "euler", None)]


def test_options_win_over_every_prompts_own_settings(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(LINES)
    options = ["--model", models["flux"], "--seed", 9, "--steps", 1, "--cfg", 1, "--size", "64x64"]
    pictures = drawn(tmp_path / "out", tmp_path / "p.txt", *options)
    assert values(pictures, "seed", "steps", "cfg_scale", "width", "guidance_scale") == [
        (9, 1, 1.0, 64, 3.5), (9, 1, 1.0, 64, 3.5)  # a word of guidance takes away the file's words of guidance
    ]  # fmt: skip

    section = "{lenient: true, width: 40, samples: [{prompt: a, cfg_scale: 7.5, height: 100}]}"
    own = written(tmp_path, f"model: MODEL\nsample: {section}", models["flux"])
    assert values(drawn(tmp_path / "own", own, "--cfg", 2), "cfg_scale", "width", "height") == [(2.0, 64, 96)]


def test_a_runs_refiner_finishes_each_image_where_it_says(models: dict[str, Path], tmp_path: Path) -> None:
    refiner = tiny.write_sdxl_model(tmp_path / "refiner", tiny.SDXL_REFINER)
    text = SDXL.replace("is_xl: true", f"is_xl: true\n        refiner_name_or_path: {refiner}")
    text = text.replace("format: png", "refiner_start_at: 0.5").replace('[trigger]"', '[trigger] --ref 0.7"', 1)
    pictures = drawn(tmp_path / "out", written(tmp_path, text, models["sdxl"]))
    assert values(pictures, "hand_over", "width", "height") == [(0.7, 64, 64), (0.5, 64, 64)]


def test_a_file_whose_family_is_not_the_models_is_refused(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(written(tmp_path, SDXL, models["flux"])), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "the model holds" in error and "is expected" in error.splitlines()[-1]
    other = written(tmp_path, SDXL, Path("nowhere"))
    assert len(drawn(tmp_path / "out", other, "--model", models["flux"])) == 2


WHITE = "a white swan on mars"
ROWS: list[tuple[str, dict[str, Any] | str]] = [  # of a line: its entry, or what its error says
    (WHITE, {"prompt": WHITE}),
    (
        f"{WHITE} --n blurry, low quality --w 832 --h 1216 --d 42 --l 5.5 --s 30",
        {"prompt": WHITE, "negative_prompt": "blurry, low quality", "width": 832, "height": 1216, "seed": 42, "scale": 5.5,
         "sample_steps": 30},
    ),
    ("a swan --W 640 --H 640 --S 12", {"width": 640, "height": 640, "sample_steps": 12}),
    ("a swan --g 3.5 --l 1.0 --s 20 --d 7", {"guidance_scale": 3.5, "scale": 1.0, "sample_steps": 20, "seed": 7}),
    ("a swan --d -1", {"seed": -1}),
    ("a swan --d 4.5", "line 1: --d must be a whole number, not '4.5'"),
    ("a swan --s 0", {"sample_steps": 0}),
    ("a swan --s 5000", {"sample_steps": 5000}),
    ("a swan --l 1.2.3 --s 8", "line 1: --l must be a number, not '1.2.3'"),
    ("a swan --l .5", {"scale": 0.5}),
    ("a swan--w 640", {"prompt": "a swan--w 640"}),
    ("a swan -- n blurry", {"prompt": "a swan -- n blurry"}),
    ("a swan --w640 --h=640", "line 1: '--w640' is not a flag; a blank stands between a flag and its value: --w 640"),
    ("a swan --h=640", "line 1: '--h=640' is not a flag; a blank stands between a flag and its value: --h 640"),
    ("a swan --n", {"negative_prompt": ""}),
    ("a swan --ss euler_a --n watery --fs 3.1", {"sampler": "euler_a", "negative_prompt": "watery", "unused": ["--fs"]}),
    ("a swan --cn images/edge 1.png --w 512", {"width": 512, "unused": ["--cn"]}),
    ("a semi--transparent swan, 50 -- 60 feathers", {"prompt": "a semi--transparent swan, 50 -- 60 feathers"}),
    ("d 20 dice on a table --w 512", {"prompt": "d 20 dice on a table", "width": 512}),
    ("s 100 percent cotton shirt", {"prompt": "s 100 percent cotton shirt"}),
    ("a swan   --w   512", {"width": 512}),
    ("a swan --m 0.8 --am 0.7 --i in.png", {"lora_scale": 0.8, "unused": ["--am", "--i"]}),
    ("a swan --w 512 --w 768", {"width": 768}),
    ("a swan --n ugly --width 512", "line 1: '--width' is not a flag; did you mean --w?"),
    ("a swan --seed 5 --cfg 4 --steps 9", {"seed": 5, "scale": 4.0, "sample_steps": 9}),
    ("a swan --s", "line 1: --s must be a whole number, not ''"),
    ("a swan --negative ugly", "line 1: '--negative' is not a flag; did you mean --n?"),
    ("a swan --flying high", r"line 1: '--flying' is not a flag \(text goes on with a blank after '--'\); there are --n"),
    ("--w 512", {"prompt": "", "width": 512}),
]  # fmt: skip


@pytest.mark.parametrize(("line", "wanted"), ROWS, ids=[line for line, _ in ROWS])
def test_a_line_is_read_as_its_author_meant_or_refused(line: str, wanted: dict[str, Any] | str) -> None:
    unused: dict[str, str] = {}
    if isinstance(wanted, str):
        with pytest.raises(ConfigError, match=wanted):
            split_flags(line, "line 1", unused)
    else:
        expected = {"prompt": "a swan", "unused": []} | wanted
        assert split_flags(line, "line 1", unused) | {"unused": list(unused)} == expected


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 2**40), st.floats(0, 100))
def test_flags_never_change_a_prompt_without_flags(text: str, seed: int, scale: float) -> None:
    prompt = " ".join(text.replace("--", "").split())
    assert split_flags(f"{prompt} --d {seed} --l {scale:f} --n {prompt}", "", {}) == {
        "prompt": prompt, "seed": seed, "scale": float(f"{scale:f}"), "negative_prompt": prompt,
    }  # fmt: skip
    assert not set(FLAGS) & set(UNUSED_FLAGS)


def read(folder: Path, text: str, name: str = "run.yaml") -> RunConfig:
    (folder / name).write_text(text)
    return load_config(folder / name)


def toolkit(sample: str, **process: Any) -> str:
    """A short run of ai-toolkit whose `sample` section is written as one mapping."""
    rest = "".join(f"      {key}: {json.dumps(value)}\n" for key, value in process.items())
    return f"job: extension\nconfig:\n  name: run\n  process:\n    - type: sd_trainer\n{rest}      sample: {sample}\n"


def test_a_text_file_skips_comments_and_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfa swan\r\n\r\n# no\r\n # yes\r\n  \r\na fox --d 3\r\n")
    config = load_config(tmp_path / "p.txt")
    assert config.sample.prompts == ("a swan", "# yes", "a fox") and config.sample.each()[2]["seed"] == 3


def test_a_tomls_subset_wins_over_its_prompt(tmp_path: Path) -> None:
    text = "[prompt]\nwidth = 64\nprompt = 'a'\n[[prompt.subset]]\nwidth = 96\n[[prompt.subset]]\nprompt = 'b'\n"
    assert [(e["prompt"], e["width"]) for e in read(tmp_path, text, "p.toml").sample.each()] == [("a", 96), ("b", 64)]


def test_a_seed_of_minus_one_is_random_of_each_prompt(tmp_path: Path) -> None:
    text = toolkit("{seed: -1, samples: [{prompt: a}, {prompt: b}, {prompt: c, seed: 5}]}")
    first, second = (read(tmp_path, text).sample.each() for _ in range(2))
    seeds = [entry["seed"] for entry in (*first, *second)]
    assert len(set(seeds)) == 5 and seeds[2] == seeds[5] == 5 and all(0 <= seed < 2**32 for seed in seeds)
    one = read(tmp_path, "a\nb --d -1\n", "p.txt").sample.each()
    assert one[0]["seed"] == 42 and one[1]["seed"] not in (42, -1)


def test_a_walk_from_a_random_seed_goes_on_from_it(tmp_path: Path) -> None:
    """ai-toolkit generates with random, 0, 1, 2."""
    text = toolkit("{seed: -1, walk_seed: true, prompts: [a, b, c --d 9, d]}")
    seeds = [entry["seed"] for entry in read(tmp_path, text).sample.each()]
    assert (seeds[1], seeds[2], seeds[3]) == (seeds[0] + 1, 9, seeds[0] + 3) and seeds[0] >= 0


def test_the_trigger_is_put_in_where_it_stands_and_nowhere_else(tmp_path: Path) -> None:
    prompts = '["a [trigger] --n no [trigger]", "a plain one"]'
    first, second = read(tmp_path, toolkit(f"{{prompts: {prompts}}}", trigger_word="gl4ss")).sample.each()
    assert (first["prompt"], first["negative"], second["prompt"]) == ("a gl4ss", "no gl4ss", "a plain one")
    assert read(tmp_path, toolkit(f"{{prompts: {prompts}}}")).sample.prompts[0] == "a [trigger]"
    assert read(tmp_path, toolkit('{prompts: ["a [name] [trigger]"]}', trigger_word="x")).sample.prompts == ("a run x",)


def test_an_environment_variable_that_is_not_set_names_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPS", "7")
    monkeypatch.delenv("NOT_THERE", raising=False)
    assert read(tmp_path, toolkit("{prompts: [a], sample_steps: ${STEPS}}")).sample.shared["steps"] == 7
    with pytest.raises(ConfigError, match="line 6: the environment variable NOT_THERE is not set"):
        read(tmp_path, toolkit("{prompts: [a], neg: ${NOT_THERE}}"))
    assert read(tmp_path, "sample: {prompts: ['${NOT_THERE}']}").sample.prompts == ("${NOT_THERE}",)


def test_samples_stand_before_prompts_in_trainers_files_and_clash_in_eridiffs(tmp_path: Path) -> None:
    section = "{prompts: [a], samples: [{prompt: b}]}"
    config = read(tmp_path, toolkit(section))
    assert config.sample.prompts == ("b",) and "prompts (samples is given too)" in config.notices[0]
    with pytest.raises(ConfigError, match="'prompts' and 'samples' both list prompts"):
        read(tmp_path, f"sample: {section}")


def test_a_multiplier_that_is_not_a_number_means_one(tmp_path: Path) -> None:
    section = '{network_multiplier: "0.7", samples: [{prompt: a}, {prompt: b, network_multiplier: strong}]}'
    config = read(tmp_path, toolkit(section))
    assert [entry["lora_scale"] for entry in config.sample.each()] == [0.7, 1.0]
    assert "strong (it is not a number and means 1)" in config.notices[0]


def test_a_prompt_for_the_second_encoder(tmp_path: Path) -> None:
    for arch, wanted in (
        ("flux", {"clip": "a", "t5": "b"}),
        ("sd3", {"clip": "a", "clip_g": "b", "t5": "a"}),
        ("sdxl", {"clip": "a", "clip_g": "b"}),
    ):
        config = read(tmp_path, toolkit("{prompts: [a --p2 b]}", model={"arch": arch}))
        assert config.sample.prompts == (wanted,)


def test_flux_with_true_guidance_takes_the_scale_for_it(tmp_path: Path) -> None:
    model = {"arch": "flux", "use_flux_cfg": True}
    first, second = read(tmp_path, toolkit("{guidance_scale: 2, prompts: [a, b --l 3]}", model=model)).sample.each()
    assert (first["true_cfg_scale"], second["true_cfg_scale"]) == (2.0, 3.0) and "guidance_scale" not in first


def test_a_runs_refiner_takes_over_where_the_run_says(tmp_path: Path) -> None:
    section = "{refiner_start_at: 0.6, prompts: [a, b --ref 0.9]}"
    config = read(tmp_path, toolkit(section, model={"is_xl": True, "refiner_name_or_path": "r"}))
    assert config.refiner == "r" and [entry["hand_over"] for entry in config.sample.each()] == [0.6, 0.9]
    config = read(tmp_path, toolkit(section, model={"is_xl": True}))
    assert "hand_over" not in config.sample.shared and "refiner_start_at (no refiner is given)" in config.notices[0]


def test_when_a_training_run_generates_is_read_beside_what_it_generates(tmp_path: Path) -> None:
    section = "{prompts: [a], sample_every: 250, sample_start_step: 500, sample_max_seconds: 60}"
    config = read(tmp_path, toolkit(section, train={"skip_first_sample": True, "lr": 1e-4}))
    assert config.training == TrainingSchedule(250, 500, True, True, 60.0)
    never = TrainingSchedule(sample_every=0, at_end=False)
    assert read(tmp_path, toolkit("{prompts: [a]}", train={"disable_sampling": True})).training == never
    for off in ("0", "null", "false"):
        assert read(tmp_path, f"sample: {{prompts: [a], sample_every: {off}}}").training.sample_every == 0
    assert read(tmp_path, "sample: {prompts: [a]}").training == TrainingSchedule()


def test_the_first_images_of_a_training_have_a_section_of_their_own(tmp_path: Path) -> None:
    first = {"prompts": ["a [trigger] --d 3"], "sample_steps": 5}
    config = read(tmp_path, toolkit("{prompts: [b]}", trigger_word="x", first_sample=first))
    assert config.first_sample is not None and config.sample.prompts == ("b",)
    assert [(e["prompt"], e["seed"], e["steps"]) for e in config.first_sample.each()] == [("a x", 3, 5)]


def test_a_guidance_of_its_own_replaces_the_sections_under_every_name() -> None:
    section: dict[str, Any] = {"cfg_scale": 7.5, "samples": [{"prompt": "a"}, {"prompt": "b", "true_cfg_scale": 3.0}]}
    first, second = parse_config({"sample": section}).sample.each()
    assert (first["cfg_scale"], second["true_cfg_scale"]) == (7.5, 3.0) and "cfg_scale" not in second
    section = {"true_cfg_scale": 3.0, "samples": [{"prompt": "a"}, {"prompt": "b", "cfg_scale": 7.5}]}
    first, second = parse_config({"sample": section}).sample.each()
    assert (first["true_cfg_scale"], second["cfg_scale"]) == (3.0, 7.5) and "true_cfg_scale" not in second


def test_a_negative_prompt_of_false_is_none(tmp_path: Path) -> None:
    assert read(tmp_path, toolkit("{prompts: [a], neg: false}")).sample.shared == {"recipe": "ai-toolkit"}


def test_the_first_process_with_images_generates(tmp_path: Path) -> None:
    processes = [{"type": "extract"}, {"sample": {"prompts": ["a"]}}, {"sample": {"prompts": ["b"]}}]
    config = read(tmp_path, json.dumps({"config": {"name": "x", "process": processes}}), "run.json")
    assert config.sample.prompts == ("a",) and "process 1, process 3 (one process is used)" in config.notices[0]


def test_a_list_in_json_is_a_prompt_file_behind_comments_too(tmp_path: Path) -> None:
    text = '/* prompts [of a run] */ // and "more"\n["a // b", "c /* d */ --d 3"]'
    assert read(tmp_path, text, "p.json").sample.prompts == ("a // b", "c /* d */")


ANYTHING = st.sampled_from([
    None, True, False, -1, 0, 3, 0.5, float("nan"), "", "flux", "a --s 3", "a --s", [], {}, [None], ["a"], [3], [["a"]], [{}],
    {"x": 3}, {"prompt": "a"}, [{"prompt": "a", "seed": -1}], [{"prompt": None}], {"prompts": ["a"]}, {"samples": 3},
])  # fmt: skip
PLACES = [
    *[("sample", key) for key in ("prompts", "samples", "seed", "sampler", "width", "sample_every", "network_multiplier")],
    *[("model", key) for key in (*MODEL_KEYS, "x")], *[("train", key) for key in ("skip_first_sample", "x")],
    *[("", key) for key in ("sample", "model", "train", "trigger_word", "first_sample", "x")],
]  # fmt: skip


@given(st.dictionaries(st.sampled_from(PLACES), ANYTHING, max_size=3))
def test_whatever_is_in_a_trainers_file_is_read_or_refused_in_a_sentence(
    places: dict[tuple[str, str], Any],
) -> None:
    process: dict[str, Any] = {"sample": {"prompts": ["a"]}, "model": {}, "train": {}}
    for (section, key), value in places.items():
        target = process.get(section) if section else process
        if isinstance(target, dict):
            target[key] = value
    try:
        config = ai_toolkit.read({"config": {"process": [process]}})
        assert all(entry["seed"] is not None for entry in config.sample.each())
    except ConfigError as error:
        assert str(error)


BAD = {
    "an unknown key of the section": (toolkit("{prompts: [a], sample_step: 3}"), "'sample_step' is not a key of sample; did you mean 'sample_steps'"),
    "an unknown key of an entry": (toolkit("{samples: [{prompt: a, widht: 3}]}"), "'widht' is not a key of sample: entry 1; did you mean 'width'"),
    "a misspelt key of the process": (toolkit("{prompts: [a]}", triger_word="x"), "did you mean 'trigger_word'"),
    "a misspelt key of the model": (toolkit("{prompts: [a]}", model={"name_or_pth": "x"}), "did you mean 'name_or_path'"),
    "another family": (toolkit("{prompts: [a]}", model={"arch": "wan21"}), "model: arch: wan21 is not one of the supported families: flux, flex1, sd3, sdxl"),
    "an old family": (toolkit("{prompts: [a]}", model={"is_v2": True}), "model: is_v2 is not one of the supported families"),
    "two families": (toolkit("{prompts: [a]}", model={"is_v3": True, "arch": "flux"}), "is_v3, arch contradict each other"),
    "an unknown dtype": (toolkit("{prompts: [a]}", model={"dtype": "fp4"}), "model: dtype must be one of bf16, .*, not 'fp4'"),
    "no process": ("config: {name: x}\n", "config needs a list 'process'"),
    "no section": ("config: {name: x, process: [{type: sd_trainer}]}\n", "no process has a section 'sample'"),
    "an unknown flag": (toolkit("{prompts: ['a --q 3']}"), "sample: prompt 1: '--q' is not a flag"),
    "an entry without a prompt": (toolkit("{samples: [{seed: 3}]}"), "sample: prompt 1 must be text, not None"),
    "samples that are a text": (toolkit("{samples: swan}"), "samples must be a list of mappings, each with a prompt"),
    "a flag that is text": (toolkit("{prompts: [a]}", model={"low_vram": "yes"}), "model: low_vram must be true or false, not 'yes'"),
    "a trigger that is a number": (toolkit("{prompts: [a]}", trigger_word=3), "trigger_word must be text, not 3"),
    "no steps": (toolkit("{prompts: [a --s 0]}"), "at least one step, not 0"),
    "a negative interval": ("sample: {prompts: [a], sample_every: -1}\n", "sample_every must not be negative, but is -1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_in_a_trainers_file_is_one_sentence(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    text, says = BAD[case]
    (tmp_path / "run.yaml").write_text(text)
    assert main(["sample", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out"), "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.search(says, err), err


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("p.txt", "a swan\na fox --s ten\n", "p.txt: line 2: --s must be a whole number, not 'ten'"),
        ("p.txt", "# nothing\n", "p.txt: the file holds no prompt"),
        ("p.json", "[]", "the file holds no prompt"),
        ("p.json", '["a", {"width": 3}]', "entry 2 must be a text, or a mapping with a prompt"),
        ("p.json", '["a",\n "b"', "line 2: is not JSON"),
        ("p.json", '[{"prompt": "a", "prompt": "b"}]', "the key 'prompt' is repeated"),
        ("p.json", '[{"prompt": "a", "widht": 3}]', "'widht' is not a key of sample: entry 1; did you mean 'width'"),
        ("p.json", '[{"prompt": "a", "width": "3"}]', "width must be a whole number, not '3'; write 3"),
        ("p.toml", "[prompt]\nwidth = 3\n", r"a table \[prompt\] with entries \[\[prompt.subset\]\] is expected"),
        ("p.toml", "[prompt\n", "is not TOML"),
    ],
)
def test_a_mistake_in_a_prompt_file_is_one_sentence(name: str, text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        read(tmp_path, text, name)
