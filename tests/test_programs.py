"""Files of kohya's scripts, OneTrainer, SimpleTuner and ai-toolkit's generating job, as these write them, generate what they say."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from eridiff import Prompt
from eridiff.cli import main
from eridiff.config import RunConfig, TrainingSchedule
from eridiff.errors import ConfigError
from eridiff.inference.section import requests_of
from eridiff.run_files import ai_toolkit, kohya, load_config, onetrainer, simpletuner
from eridiff.training import Sampler
from tests import families, tiny

KOHYA = """
[model]
pretrained_model_name_or_path = "MODEL"
v_parameterization = false

[training]
output_dir = "runs"
output_name = "heron"
network_module = "MODULE"
network_dim = 16
network_weights = "older.safetensors"
optimizer_type = "AdamW8bit"
learning_rate = 1e-4
mixed_precision = "no"
clip_skip = 2
save_every_n_steps = 500
train_data_dir = "data/heron"

[sampling]
sample_prompts = "prompts.txt"
sample_sampler = "k_euler_a"
sample_every_n_steps = 250
sample_at_first = true
"""
LINES = "a glass heron, dawn --w 64 --h 64 --s 2 --d 7\na heron --n fog --l 3 --w 70 --h 64 --s 2 --ss dpmsolver++\n"
SAMPLE = {  # as OneTrainer's window writes one
    "__version": 0, "enabled": True, "prompt": "a glass heron", "negative_prompt": "", "height": 64, "width": 64, "frames": 1,
    "length": 10.0, "seed": 42, "random_seed": False, "diffusion_steps": 2, "cfg_scale": 7.0, "noise_scheduler": "EULER_A",
    "text_encoder_1_layer_skip": 0, "text_encoder_1_sequence_length": None, "text_encoder_2_layer_skip": 0,
    "text_encoder_2_sequence_length": None, "text_encoder_3_layer_skip": 0, "text_encoder_4_layer_skip": 0,
    "transformer_attention_mask": False, "force_last_timestep": False, "sample_inpainting": False, "base_image_path": "",
    "mask_image_path": "",
}  # fmt: skip
SIMPLETUNER = {
    "--resume_from_checkpoint": "latest", "--data_backend_config": "config/backend.json", "--seed": 42,
    "--output_dir": "output/heron", "--lora_type": "standard", "--model_type": "lora", "--model_family": "flux",
    "--pretrained_model_name_or_path": "MODEL", "--train_batch_size": 1, "--learning_rate": "1e-4", "--push_to_hub": "true",
    "--validation_step_interval": 500, "--validation_resolution": "64x96,64", "--validation_guidance": "3.0",
    "--validation_guidance_rescale": "0.0", "--validation_num_inference_steps": "2", "--validation_prompt": "a heron",
    "--user_prompt_library": "library.json", "--validation_torch_compile": "false", "--num_validation_images": 1,
}  # fmt: skip
LIBRARY = {"marsh": "a heron in a marsh", "weak": {"prompt": "a faint heron", "adapter_strength": 0.5}}
GENERATE: dict[str, Any] = {
    "job": "generate",
    "config": {
        "name": "generate",
        "process": [{
            "type": "to_folder", "output_folder": "output/gen", "device": "cuda:0",
            "generate": {
                "sampler": "ddpm", "width": 64, "height": 64, "neg": "cartoon", "seed": -1, "guidance_scale": 7, "sample_steps": 2,
                "ext": ".png", "prompt_file": False, "num_repeats": 2, "prompts": ["a heron", "a swan --n fog --seed 3 --w 96"],
            },
            "model": {"name_or_path": "MODEL", "is_v2": False, "is_v_pred": False, "is_xl": True, "dtype": "fp32"},
        }],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "flux": tiny.write_model(folder / "flux"),
        "mmdit": tiny.write_sd3_model(folder / "sd3"),
        "unet": tiny.write_sdxl_model(folder / "sdxl"),
    }


def written(folder: Path, name: str, document: Any, model: object = "MODEL") -> Path:
    text = document if isinstance(document, str) else json.dumps(document, indent=4)
    (folder / name).write_text(text.replace("MODEL", str(model)))
    return folder / name


def read(folder: Path, name: str, document: Any) -> RunConfig:
    return load_config(written(folder, name, document))


def generated(path: Path, *options: object) -> list[dict[str, Any]]:
    """The settings of the images of a command; they lie in the folder that the file names, beside it."""
    assert main(["sample", str(path), "--device", "cpu", *map(str, options)]) == 0
    found = []
    for file in sorted(path.parent.rglob("0*.png")):
        with Image.open(file) as image:
            if "eridiff" in image.info:
                found.append(json.loads(image.info["eridiff"]))
    return found


def values(settings: list[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(each[name] for name in names) for each in settings]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_kohyas_sdxl_training_generates_with_its_sampler_and_numbers(
    models: dict[str, Path], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "prompts.txt").write_text(LINES)
    path = written(here, "train.toml", KOHYA.replace("MODULE", "networks.lora"), models["unet"])
    found = generated(path)
    names = ("prompt", "seed", "width", "height", "steps", "cfg_scale", "negative", "sampler", "schedule")
    assert values(found, *names) == [
        ("a glass heron, dawn", 7, 64, 64, 2, 7.5, None, "euler_ancestral", "linspace"),
        ("a heron", 42, 64, 64, 2, 3.0, "fog", "dpmpp_2m", "dpm_linspace"),
    ]  # fmt: skip
    assert len(list((here / "runs" / "sample").glob("0*.png"))) == 3  # with the contact sheet
    told = capsys.readouterr().err
    assert (
        "output_name, network_module (it is for training; what it trains is runs/heron.safetensors, which --lora takes)"
        in told
    )
    assert "network_weights (it is for training; --lora takes them)" in told
    assert "clip_skip (the text encoders are read at the layer of the published models)" in told
    assert "optimizer_type" in told and "train_data_dir" in told and "save_every_n_steps" in told


def test_kohyas_flux_training_is_sampled_by_euler_with_fluxs_numbers(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a heron\na swan --g 2 --ss heun\na fox --l 4 --s 3\n")
    config = read(tmp_path, "train.toml", KOHYA.replace("MODULE", "networks.lora_flux"))
    found, told = requests_of(config.sample, families.inference("flux"))
    assert [(r.steps, r.width, r.guidance_scale, r.cfg_scale, r.sampler) for r in found] == [
        (20, 512, 3.5, 1.0, "euler"), (20, 512, 2.0, 1.0, "euler"), (3, 512, 3.5, 4.0, "euler")
    ]  # fmt: skip
    assert config.family == "flux" and [t.split(" has")[0] for t in told if "sampler" in t] == [
        "the sampler euler_ancestral", "the sampler heun"
    ]  # fmt: skip


def test_a_kohya_training_without_a_family_is_sampled_by_its_sampler_with_sdxl_alone(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a heron\n")
    config = read(tmp_path, "train.toml", 'sample_prompts = "prompts.txt"\n')
    assert config.family is None
    for family, sampler in (("unet", "ddim"), ("mmdit", "euler"), ("flux", "euler")):
        (request,), told = requests_of(config.sample, families.inference(family))
        assert request.sampler == sampler and not any("sampler" in text for text in told)
    config = read(tmp_path, "train.toml", 'sample_prompts = "prompts.txt"\nsample_sampler = "heun"\n')
    for family, sampler in (("unet", "heun"), ("mmdit", "euler"), ("flux", "euler")):
        (request,), told = requests_of(config.sample, families.inference(family))
        assert request.sampler == sampler and any("sampler" in text for text in told) == (family != "unet")


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ("", TrainingSchedule(0, 0, True, False)),
        ("sample_every_n_steps = 250\n", TrainingSchedule(250, 0, True, False)),
        ("sample_every_n_steps = 250\nsample_at_first = true\n", TrainingSchedule(250, 0, False, False)),
        ("sample_every_n_steps = 250\nsample_every_n_epochs = 1\n", TrainingSchedule(0, 0, True, False)),
    ],
)
def test_a_sampler_samples_when_kohya_does(keys: str, wanted: TrainingSchedule, tmp_path: Path) -> None:
    assert read(tmp_path, "train.toml", f'sample_sampler = "euler"\n{keys}').training == wanted


def test_a_file_of_prompts_is_found_from_here_and_then_beside_the_configuration(
    here: Path,
) -> None:
    (here / "runs").mkdir()
    (here / "runs" / "prompts.txt").write_text("beside\n")
    path = written(here / "runs", "train.toml", 'sample_prompts = "prompts.txt"\n')
    assert load_config(path).sample.prompts == ("beside",)
    (here / "prompts.txt").write_text("from here\n")
    assert load_config(path).sample.prompts == ("from here",)
    (here / "prompts.txt").unlink()
    (here / "runs" / "prompts.txt").write_text("a fox --w ten\n")
    with pytest.raises(
        ConfigError, match=r"train.toml: runs/prompts.txt: line 1: --w must be a whole number, not 'ten'"
    ):
        load_config(Path("runs/train.toml"))


def test_kohyas_masked_padding_is_fluxs_alone(tmp_path: Path) -> None:
    flux = read(tmp_path, "a.toml", 'ae = "ae.safetensors"\napply_t5_attn_mask = true\n')
    other = read(tmp_path, "b.toml", 'clip_g = "g.safetensors"\napply_t5_attn_mask = true\n')
    assert flux.sample.shared["t5_mask"] is True and "t5_mask" not in other.sample.shared and other.family == "mmdit"
    assert "kohya puts zeros in place of T5's padding" in other.notices[0]


def test_onetrainers_samples_generate(models: dict[str, Path], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [
        SAMPLE,
        SAMPLE | {"enabled": False},
        SAMPLE | {"negative_prompt": "fog", "noise_scheduler": "DPMPP_KARRAS"},
    ]
    path = written(here, "samples.json", samples)
    names = ("prompt", "negative", "seed", "steps", "cfg_scale", "sampler", "schedule")
    assert values(generated(path, "--model", models["unet"], "--out", "sdxl"), *names) == [
        ("a glass heron", "", 42, 2, 7.0, "euler_ancestral", "linspace"), ("a glass heron", "fog", 42, 2, 7.0, "dpmpp_2m", "karras")
    ]  # fmt: skip
    assert "without effect" not in capsys.readouterr().err


@pytest.mark.parametrize("family", ["flux", "mmdit"])
def test_onetrainer_samples_other_families_by_euler(family: str, tmp_path: Path) -> None:
    samples = [SAMPLE, SAMPLE | {"noise_scheduler": "EULER_KARRAS"}]
    config = read(tmp_path, "samples.json", samples)
    found, told = requests_of(config.sample, families.inference(family))
    assert [(r.sampler, r.schedule) for r in found] == [("euler", "diffusers")] * 2
    guided = [(r.guidance_scale, r.cfg_scale) for r in found]
    assert guided == ([(7.0, 1.0)] if family == "flux" else [(None, 7.0)]) * 2
    assert any("the sampler euler_ancestral has no effect" in text for text in told)
    by_hand, _ = requests_of(config.sample.over({"sampler": "heun"}), families.inference(family), {"sampler"})
    assert [r.sampler for r in by_hand] == ["heun"] * 2


def test_a_random_seed_of_onetrainer_is_another_each_time(tmp_path: Path) -> None:
    seeds = {read(tmp_path, "s.json", [SAMPLE | {"random_seed": True}]).sample.each()[0]["seed"] for _ in range(3)}
    assert len(seeds) == 3 and 42 not in seeds


def test_onetrainers_training_names_its_samples_and_its_model(tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_text(json.dumps([SAMPLE]))
    training = {
        "__version": 11, "training_method": "LORA", "model_type": "FLUX_DEV_1", "workspace_dir": "work", "learning_rate": 3e-4,
        "base_model_name": "black-forest-labs/FLUX.1-dev", "output_model_destination": "models/heron.safetensors",
        "transformer": {"__version": 0, "model_name": "", "train": True, "attention_mask": False}, "samples": None,
        "sample_definition_file_name": "samples.json", "sample_after": 10, "sample_after_unit": "MINUTE", "sample_skip_first": 0,
    }  # fmt: skip
    config = read(tmp_path, "train.json", training)
    assert (config.model, config.family, config.sample.out) == ("black-forest-labs/FLUX.1-dev", "flux", "work/samples")
    assert config.sample.prompts == ("a glass heron",) and config.training.sample_every == 0 and config.options == {}
    told = config.notices[0]
    assert "what it trains is models/heron.safetensors, which --lora takes" in told
    assert "sample_after_unit (a Sampler counts steps, not MINUTE)" in told and "learning_rate" in told


def test_simpletuners_configuration_generates(
    models: dict[str, Path], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "library.json").write_text(json.dumps(LIBRARY))
    path = written(here, "config.json", SIMPLETUNER, models["flux"])
    found = generated(path)
    assert values(found, "prompt", "width", "height", "steps", "guidance_scale", "cfg_scale", "seed") == [
        (prompt, width, height, 2, 3.0, 1.0, 42)
        for prompt in ("", "a heron in a marsh", "a faint heron", "a heron")
        for width, height in ((64, 96), (64, 64))
    ]
    assert (here / "output" / "heron" / "validation_images").is_dir()
    told = capsys.readouterr().err
    assert (
        "model_type (it is for training; what it trains is output/heron/pytorch_lora_weights.safetensors, which --lora takes)"
        in told
    )
    assert "num_validation_images" not in told and "validation_guidance_rescale" not in told  # nothing changes by them


def test_simpletuners_toml_says_what_its_json_says(tmp_path: Path) -> None:
    (tmp_path / "library.json").write_text(json.dumps(LIBRARY))
    toml = "".join(f"{key.lstrip('-')} = {json.dumps(value)}\n" for key, value in SIMPLETUNER.items())
    assert read(tmp_path, "config.toml", toml) == read(tmp_path, "config.json", SIMPLETUNER)


def test_simpletuners_numbers_are_taken_where_the_file_has_none(tmp_path: Path) -> None:
    negative = "blurry, cropped, ugly"
    for name, family, guidance, sampler, text in (
        ("flux", "flux", (7.5, 1.0), "euler", None),
        ("sd3", "mmdit", (None, 7.5), "euler", negative),
        ("sdxl", "unet", (None, 7.5), "ddim", negative),
    ):
        config = read(tmp_path, "config.json", {"model_family": name})
        (found,), _ = requests_of(config.sample, families.inference(family))
        assert (found.prompt, found.width, found.height, found.steps, found.seed) == ("", 256, 256, 30, 0)
        assert ((found.guidance_scale, found.cfg_scale), found.sampler, found.negative) == (guidance, sampler, text)
    assert config.model == "stabilityai/stable-diffusion-xl-base-1.0"
    config = read(tmp_path, "config.json", {"model_family": "sdxl", "validation_negative_prompt": ""})
    assert requests_of(config.sample, families.inference("unet"))[0][0].negative == ""
    guided = {"model_family": "flux", "validation_guidance_real": 3.0}
    (found,), _ = requests_of(read(tmp_path, "config.json", guided).sample, families.inference("flux"))
    assert (found.cfg_scale, found.cfg_interval, found.negative) == (3.0, (2 / 30, 1.0), negative)


def test_simpletuners_shift_is_sd3s_with_its_own_scheduler(tmp_path: Path) -> None:
    for family, scheduler, shift in (
        ("sd3", "euler", 5.0),
        ("sd3", None, 5.0),
        ("sd3", "ddim", None),
        ("flux", "euler", None),
    ):
        document = {"model_family": family, "validation_noise_scheduler": scheduler, "flow_schedule_shift": 5.0}
        config = read(tmp_path, "config.json", document)
        assert config.sample.each()[0].get("shift") == shift
        assert any("flow_schedule_shift" in text for text in config.notices) == (shift is None)


def test_a_prompt_library_generates_alone_and_beside_a_configuration(tmp_path: Path) -> None:
    path = written(tmp_path, "library.json", LIBRARY)
    entries = load_config(path).sample.entries
    assert entries == ({"prompt": "a heron in a marsh"}, {"prompt": "a faint heron", "lora_scale": 0.5})
    with pytest.raises(ConfigError, match="'prompts' belongs under 'sample:'"):
        read(tmp_path, "run.json", {"prompts": "a fox"})
    with pytest.raises(ConfigError, match="'modle' is not a key of the file; did you mean 'model'"):
        read(tmp_path, "run.json", {"modle": "flux.safetensors"})


def test_ai_toolkits_generating_job_generates(
    models: dict[str, Path], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each prompt as often as it says, every random seed another; flags are read as their author meant them."""
    found = generated(written(here, "generate.json", GENERATE, models["unet"]))
    names = ("prompt", "width", "steps", "cfg_scale", "negative", "sampler")
    first = ("a heron", 64, 2, 7.0, "cartoon", "ddpm")
    second = ("a swan", 96, 2, 7.0, "fog", "ddpm")
    assert values(found, *names) == [first, second, first, second]
    seeds = [seed for (seed,) in values(found, "seed")]
    assert seeds[1] == seeds[3] == 3 and len(set(seeds)) == 3
    assert len(list((here / "output" / "gen").glob("0*.png"))) == 5
    told = capsys.readouterr().err
    assert "ext (images are PNG)" in told and "job" not in told and "prompt_file" not in told


def test_the_prompts_of_a_generating_job_may_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a fox\n\n  \na dog --d 3\n")
    document = json.loads(json.dumps(GENERATE))
    document["config"]["process"][0]["generate"] |= {"prompts": "p.txt", "num_repeats": 1}
    assert [entry["prompt"] for entry in read(tmp_path, "generate.json", document).sample.each()] == ["a fox", "a dog"]


def trained(folder: Path, **process: Any) -> RunConfig:
    process = {"sample": {"prompts": ["a fox"]}, "training_folder": str(folder / "runs")} | process
    return read(folder, "train.json", {"config": {"name": "heron", "process": [process]}})


@pytest.mark.parametrize("arch", ["flux", "flux:schnell", "flex1", "flex1:dev", "flux_kontext"])
def test_an_architecture_of_ai_toolkit_may_have_a_tag(arch: str, tmp_path: Path) -> None:
    assert trained(tmp_path, model={"arch": arch}).family == "flux"


def test_the_notice_about_a_network_names_the_trained_lora(tmp_path: Path) -> None:
    config = trained(tmp_path, network={"type": "lora"}, adapter={"type": "redux"})
    file = tmp_path / "runs" / "heron" / "heron.safetensors"
    assert f"network (it is for training; what it trains is {file}, which --lora takes)" in config.notices[0]
    assert "adapter (the trainer's images are guided by an adapter, and these are not)" in config.notices[0]
    assert [text for text in config.notices_in_training if "network" in text] == []
    assert any("adapter" in text for text in config.notices_in_training)


def test_a_sampler_writes_into_the_trainers_folder_of_samples(models: dict[str, Path], tmp_path: Path) -> None:
    """Beside the trainer's own images, whatever these are."""
    config = trained(tmp_path, sample={"prompts": ["a fox"], "width": 64, "height": 64, "sample_steps": 1})
    folder = tmp_path / "runs" / "heron" / "samples"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "1700000000000__000000000_0.png")
    (folder / "1700000000000__000000000_1.jpg").write_bytes(b"not an image")
    sampler = Sampler(tiny.load(families.FluxInference, models["flux"]), config, raise_errors=True)
    sampler.maybe_sample(0)
    assert sampler.out == folder and len(list(folder.glob("step-00000000-*.png"))) == 1


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("p.txt", "a heron --m 0.6\n"),
        ("run.json", {"config": {"process": [{"sample": {"prompts": ["a heron"], "network_multiplier": 0.6}}]}}),
        ("library.json", {"heron": {"prompt": "a heron", "adapter_strength": 0.6}}),
    ],
)
def test_the_strength_of_a_lora_is_reported_where_there_is_none(name: str, document: Any, tmp_path: Path) -> None:
    (request,), told = requests_of(read(tmp_path, name, document).sample, families.inference("flux"))
    assert request.lora_scale is None
    assert "lora_scale has no effect without a LoRA that has no scale of its own" in told


PICKED = {  # a file of each trainer's training -> its recipe
    "ai-toolkit": ("a.json", {"config": {"process": [{"sample": {"prompts": ["a fox"]}, "first_sample": {"prompts": ["a dog"]}}]}}),
    "kohya": ("a.toml", 'sample_prompts = "prompts.txt"\n'),
    "onetrainer": ("a.json", {"base_model_name": "M", "workspace_dir": "w", "samples": [{"prompt": "a fox"}]}),
    "simpletuner": ("a.json", {"model_family": "flux"}),
}  # fmt: skip


@pytest.mark.parametrize("program", PICKED)
def test_a_trainers_configuration_picks_its_recipe_and_says_so_once(program: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a fox\n")
    config = read(tmp_path, *PICKED[program])
    for section in (config.sample, config.first_sample):
        assert section is None or [each["recipe"] for each in section.each()] == [program]
    said = f"generated as {program} generates: recipe {program}; recipe eridiff takes the published numbers"
    assert config.notices.count(said) == config.notices_in_training.count(said) == 1
    assert [text for text in config.notices if "recipe" in text] == [said]
    other = replace(config, sample=config.sample.over({"recipe": "eridiff"}))
    assert [text for text in other.notices if "recipe" in text] == []
    (request,), _ = requests_of(other.sample, families.inference("flux"))
    assert (request.recipe, request.noise_dtype, request.latents_dtype) == ("eridiff", None, None)


def test_recipe_eridiff_takes_none_in_the_file_and_on_the_command_line(
    models: dict[str, Path], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = {"prompts": ["a fox"], "width": 64, "height": 64, "sample_steps": 1}
    own = trained(here, sample=sample | {"recipe": "eridiff"})
    assert own.sample.shared["recipe"] == "eridiff" and not any("generated as" in text for text in own.notices)
    trained(here, sample=sample, model={"name_or_path": str(models["flux"])})
    (found,) = generated(here / "train.json", "--recipe", "eridiff")
    assert found["recipe"] == "eridiff" and found["latents_dtype"] == "float32" and found["schedule"] is None
    assert "generated as" not in capsys.readouterr().err


def test_a_sampler_takes_a_recipe_over_the_sections(tmp_path: Path) -> None:
    model = families.inference("unet")
    section = {"prompts": ["a fox"], "recipe": "kohya", "out": str(tmp_path)}
    encoded = Prompt(families.conditioning(model), families.conditioning(model, seed=5))
    for recipe, expected in ((None, "kohya"), ("comfyui", "comfyui"), ("eridiff", "eridiff")):
        sampler = Sampler(model, section, conditioning=[encoded], recipe=recipe)
        assert [(request.recipe, request.clip_clean) for request in sampler.requests] == [
            (expected, 1.0 if recipe is None else None)
        ]
    with pytest.raises(ConfigError, match="'koya' is not a recipe; did you mean 'kohya'"):
        Sampler(model, section, conditioning=[encoded], recipe="koya")


def test_a_sampler_of_a_training_generates_what_its_recipe_generates(models: dict[str, Path], tmp_path: Path) -> None:
    sample = {"prompts": ["a fox"], "width": 64, "height": 64, "sample_steps": 2, "guidance_scale": 4.0, "seed": 7}
    config = trained(tmp_path, sample=sample, model={"arch": "sdxl"})
    model = tiny.load(families.SDXLInference, models["unet"])
    Sampler(model, config, raise_errors=True).maybe_sample(0)
    (file,) = (tmp_path / "runs").rglob("step-00000000-*.png")
    asked = {"width": 64, "height": 64, "steps": 2, "cfg_scale": 4.0, "seed": 7}
    with Image.open(file) as image:
        assert image.tobytes() == model.generate("a fox", recipe="ai-toolkit", **asked).images[0].tobytes()
        assert image.tobytes() != model.generate("a fox", **asked).images[0].tobytes()


def test_the_rows_of_t5_are_those_of_the_program(tmp_path: Path) -> None:
    def length(name: str, document: Any) -> int | None:
        return read(tmp_path, name, document).sample.shared.get("t5_length")

    onetrainer_flux = {"base_model_name": "M", "model_type": "FLUX_DEV_1", "samples": [SAMPLE]}
    key = "text_encoder_2_sequence_length"
    assert [length("a.json", onetrainer_flux | {key: n}) for n in (256, None)] == [256, 512]
    assert length("a.json", onetrainer_flux | {"model_type": "STABLE_DIFFUSION_35", key: 77}) is None
    sd3 = {"model_family": "sd3"}
    assert [length("a.json", sd3 | {"tokenizer_max_length": n}) for n in (77, 256)] == [77, 154]
    assert length("a.json", sd3 | {"tokenizer_max_length": 256, "i_know_what_i_am_doing": True}) == 256
    assert length("a.json", {"model_family": "flux", "tokenizer_max_length": 256}) is None


def test_onetrainers_mask_is_named_and_is_not_t5_mask(tmp_path: Path) -> None:
    training = {
        "base_model_name": "M",
        "model_type": "FLUX_DEV_1",
        "samples": [SAMPLE],
        "transformer": {"attention_mask": True},
    }
    config = read(tmp_path, "a.json", training)
    assert "t5_mask" not in config.sample.shared
    assert "transformer: attention_mask (OneTrainer puts zeros in place of T5's padding" in config.notices[0]


def test_ai_toolkits_pndm_is_without_its_warm_up(tmp_path: Path) -> None:
    assert trained(tmp_path, sample={"prompts": ["a fox"], "sampler": "pndm"}).sample.shared["sampler"] == "plms"


def test_simpletuners_unipc_takes_the_schedule_of_its_family(tmp_path: Path) -> None:
    for name, family, schedule in (("sd3", "mmdit", "diffusers_unipc"), ("sdxl", "unet", "trailing")):
        config = read(tmp_path, "a.json", {"model_family": name, "validation_noise_scheduler": "unipc"})
        (request,), _ = requests_of(config.sample, families.inference(family))
        assert (request.sampler, request.schedule) == ("unipc", schedule)


def test_a_notice_has_the_first_keys_of_a_training_and_the_number_of_the_others(tmp_path: Path) -> None:
    config = trained(tmp_path, **{f"unknown_{n:02}": 1 for n in range(30)}, network={"type": "lora"})
    told, _ = config.notices
    assert re.search(r"unknown_19, and 10 more \(it is for training\)$", told) and "network" in told


KOHYA_TRAINS = 'sample_sampler = "euler"\n'
BAD = {
    "a misspelt key of kohya": ("a.toml", KOHYA_TRAINS + 'sample_prompt = "p.txt"\n', "'sample_prompt' is not a key of kohya's configuration of a training; did you mean 'sample_prompts'"),
    "no file of prompts": ("a.toml", 'sample_prompts = "none.txt"\n', "none.txt: is not a file"),
    "a pipe of prompts": ("a.toml", 'sample_prompts = "pipe.txt"\n', "pipe.txt: is not a file"),
    "a file of prompts that is not one": ("a.toml", 'sample_prompts = "a.json"\n', "a.json: a list of prompts or, in TOML, a table"),
    "a number for a file": ("a.toml", "sample_prompts = 3\n", "sample_prompts must be text, not 3"),
    "a text for a flag": ("a.toml", 'v_parameterization = "yes"\n', "v_parameterization must be true or false, not 'yes'"),
    "an unknown sampler": ("a.toml", 'sample_sampler = "eulr"\n', "'eulr' is not a sampler; did you mean 'euler'"),
    "an unknown dtype": ("a.toml", 'mixed_precision = "fp4"\nsample_sampler = "ddim"\n', "mixed_precision must be one of bf16, .*, no, not 'fp4'"),
    "an old family": ("a.toml", "v2 = true\n", "v2 is not one of the supported families: SDXL, SD 3 and Flux"),
    "another family of kohya": ("a.toml", 'network_module = "networks.lora_lumina"\n', "networks.lora_lumina is not one of the supported families"),
    "chroma": ("a.toml", 'model_type = "chroma"\nsample_sampler = "ddim"\n', "model_type: chroma is not one of the supported families"),
    "a negative interval": ("a.toml", "sample_every_n_steps = -1\n", "sample_every_n_steps must not be negative, but is -1"),
    "a configuration of datasets": ("a.toml", "[general]\nshuffle_caption = true\n[[datasets]]\nresolution = 512\n", "is kohya's configuration of datasets"),
    "another TOML": ("a.toml", "a = 1\n", "or kohya's or SimpleTuner's configuration of a training, is expected"),
    "a misspelt key of a sample": ("a.json", [SAMPLE | {"diffusion_step": 3}], "'diffusion_step' is not a key of sample 1; did you mean 'diffusion_steps'"),
    "a text for steps": ("a.json", [SAMPLE | {"diffusion_steps": "20"}], "sample 1: diffusion_steps must be a whole number, not '20'; write 20"),
    "a number for a prompt": ("a.json", [SAMPLE, SAMPLE | {"prompt": 3}], "sample 2: prompt must be text, not 3"),
    "no prompt": ("a.json", [{"diffusion_steps": 3}], "sample 1 has no prompt"),
    "an unknown scheduler": ("a.json", [SAMPLE | {"noise_scheduler": "HEUN"}], "sample 1: noise_scheduler must be one of DDIM, .*, not 'HEUN'"),
    "a text among samples": ("a.json", [SAMPLE, "a fox"], "sample 2 must be a mapping with a prompt, not 'a fox'"),
    "no sample": ("a.json", [SAMPLE | {"enabled": False}], "every sample of the file is switched off"),
    "another model type": ("a.json", {"base_model_name": "M", "model_type": "SANA"}, "model_type: SANA is not one of the supported models: FLUX_DEV_1"),
    "a misspelt key of OneTrainer": ("a.json", {"base_model_name": "M", "workspace_dir": "w", "sample_aftr": 3}, "'sample_aftr' is not a key of OneTrainer's configuration of a training; did you mean 'sample_after'"),
    "a number beyond all": ("a.json", [SAMPLE | {"cfg_scale": 10**400}], "sample 1: cfg_scale is too large a number"),
    "infinite steps": ("a.json", {"base_model_name": "M", "workspace_dir": "w", "sample_after": float("inf"), "sample_after_unit": "STEP"}, "sample_after must be a number of steps, not inf"),
    "another family of SimpleTuner": ("a.json", {"model_family": "sana"}, "model_family: sana is not one of the supported families: flux, sd3, sdxl"),
    "a misspelt key of SimpleTuner": ("a.json", {"model_family": "flux", "validation_promt": "a"}, "'validation_promt' is not a key of SimpleTuner's configuration; did you mean 'validation_prompt'"),
    "another flavour": ("a.json", {"model_family": "flux", "model_flavour": "libreflux"}, "model_flavour must be one of krea, dev, schnell, kontext, not 'libreflux'"),
    "a size in megapixels": ("a.json", {"model_family": "flux", "validation_resolution": "0.5"}, "validation_resolution must be a size such as 1024x768 or 1024, not '0.5'"),
    "another source of seeds": ("a.json", {"model_family": "sdxl", "validation_seed_source": "tpu"}, "validation_seed_source must be cpu or gpu, not 'tpu'"),
    "another scheduler": ("a.json", {"model_family": "sdxl", "validation_noise_scheduler": "heun"}, "validation_noise_scheduler must be one of ddim, .*, not 'heun'"),
    "a list for a library": ("a.json", {"model_family": "flux", "user_prompt_library": "a.txt"}, "a.txt: "),
    "a number in a library": ("a.json", {"a": "a fox", "b": {"prompt": 3}}, "the prompt 'b' must be text, not 3"),
    "a misspelt key in a library": ("a.json", {"b": {"prompt": "a", "adapter_strenth": 3}}, "'adapter_strenth' is not a key of the prompt 'b'; did you mean 'adapter_strength'"),
    "another generator": ("a.json", {"config": {"process": [{"type": "batch_img2img", "generate": {}}]}}, "the type 'batch_img2img' of a process with 'generate' is not read; to_folder is"),
    "an unknown key of generate": ("a.json", {"config": {"process": [{"generate": {"qqqq": 3}}]}}, "'qqqq' is not a key of generate; there are sampler"),
    "a misspelt key of generate": ("a.json", {"config": {"process": [{"generate": {"widht": 3}}]}}, "'widht' is not a key of generate; did you mean 'width'"),
    "no repeats": ("a.json", {"config": {"process": [{"generate": {"num_repeats": 0}}]}}, "generate: num_repeats must be between 1 and 10000, not 0"),
    "a folder that is a number": ("a.json", {"config": {"process": [{"sample": {}, "training_folder": 3}]}}, "config: training_folder must be text, not 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_in_a_programs_file_is_one_sentence(case: str, here: Path) -> None:
    name, document, says = BAD[case]
    (here / "a.txt").write_text("a fox")
    (here / "a.json").write_text('{"prompts": ["a fox"]}')
    os.mkfifo(here / "pipe.txt")
    with pytest.raises(ConfigError, match=says) as caught:
        read(here, name, document)
    assert "\n" not in str(caught.value) and name in str(caught.value)


LIKE_A_KEY = {  # keys that the programs have, which are near to one that is read
    "kohya": ["save_every_n_steps", "save_every_n_epochs", "validate_every_n_steps", "network_args", "vae_batch_size", "clip_l_dropout_rate", "sample_ratio"],
    "OneTrainer": ["save_skip_first", "samples_to_tensorboard", "validate_after_unit", "train_device", "unconditional_transformer", "output_model_format"],
    "SimpleTuner": ["validation_method", "flow_schedule_auto_shift", "validate_after_epoch", "eval_epoch_interval", "validation_preview"],
}  # fmt: skip


@pytest.mark.parametrize("program", LIKE_A_KEY)
def test_a_key_that_the_program_has_is_never_taken_for_a_mistake(program: str, tmp_path: Path) -> None:
    start = {"kohya": {"sample_sampler": "euler"}, "OneTrainer": {"base_model_name": "M", "workspace_dir": "w"}, "SimpleTuner": {"model_family": "flux"}}  # fmt: skip
    document: dict[str, Any] = start[program] | {key: "x" for key in LIKE_A_KEY[program]}
    toml = "".join(f"{key} = {json.dumps(value)}\n" for key, value in document.items())
    config = read(tmp_path, *(("a.toml", toml) if program == "kohya" else ("a.json", document)))
    assert all(key in config.notices[0] for key in LIKE_A_KEY[program])


ANYTHING = st.sampled_from([
    None, True, False, -1, 0, 3, 0.5, float("nan"), float("inf"), 10**400, "", "flux", "3", "1e999", "a --s", "64x64,", [], {}, [None],
    ["a"], [3], [{}], {"x": 3}, {"prompt": "a"}, [{"prompt": "a", "seed": -1}], [{"prompt": None}], {"model_name": 3}, "\x00", "../.",
])  # fmt: skip
READERS: dict[str, tuple[Any, Any, list[str]]] = {
    "kohya": (kohya.read_training, {}, [*kohya.TRAINING_KEYS, "clip_skip", "x"]),
    "OneTrainer": (onetrainer.read_training, {"samples": [SAMPLE]}, [*onetrainer.TRAINING_KEYS, "lora_model_name", "x"]),
    "a sample of OneTrainer": (lambda d, _: onetrainer.of_samples([d], {}), SAMPLE, [*SAMPLE, "x"]),
    "SimpleTuner": (simpletuner.read_training, {"model_family": "sd3"}, [*simpletuner.KNOWN_KEYS, "control", "x"]),
    "a prompt of a library": (lambda d, _: simpletuner.of_library({"a": d}, {}), {"prompt": "a"}, ["prompt", "caption", "adapter_strength", "lyrics", "x"]),
    "ai-toolkit's generate": (
        lambda d, folder: ai_toolkit.read({"config": {"process": [{"generate": d}]}}, folder), {"prompts": ["a"]},
        [*ai_toolkit.GENERATE_KEYS, "ext", "x"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("program", READERS)
@given(data=st.data())
def test_whatever_is_in_a_programs_file_is_read_or_refused_in_a_sentence(program: str, data: st.DataObject) -> None:
    reader, document, keys = READERS[program]
    changes = data.draw(st.dictionaries(st.sampled_from(keys), ANYTHING, max_size=3))
    try:
        config = reader(document | changes, Path("nowhere"))
        assert all(entry["seed"] is not None for entry in config.sample.each())
    except ConfigError as error:
        assert str(error)
