"""Recipes say how other programs generate, and the command why two images of one seed differ."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin

from eridiff import Prompt
from eridiff.cli import main
from eridiff.config import parse_config
from eridiff.errors import ConfigError
from eridiff.foreign_pngs import foreign_settings
from eridiff.inference.choices import Move, differences, moves
from eridiff.inference.section import requests_of
from eridiff.recipe import FAMILIES, families, recipe, recipes
from eridiff.request import FIELDS, Request
from eridiff.schedulers.samplers import SAMPLERS
from tests.families import conditioning, inference

ALL = [(name, family) for name in recipes() for family in families(name)]


@pytest.mark.parametrize(("name", "family"), ALL)
def test_every_choice_of_a_recipe_is_a_value_of_a_field_with_its_source(name: str, family: str) -> None:
    found = recipe(name, family)
    assert found.seen in ("run", "reading") and found.program
    assert set(found.samplers) <= set(SAMPLERS)
    for sampler in (None, *found.samplers):
        for field, choice in found.of(sampler).items():
            assert field in FIELDS and FIELDS[field].default is None, field
            if choice.value is not None:
                read = FIELDS[field].metadata["kind"].read(field, choice.value)
                Request.of({field: read}).check()
            assert re.search(r"\S+\.\w+(:\d+)?$", choice.source), f"{field}: {choice.source!r} names no file"
    for sentence in found.apart:
        assert sentence.endswith(".")


@pytest.mark.parametrize(("name", "family"), ALL)
def test_every_recipe_generates_with_each_of_its_samplers(name: str, family: str) -> None:
    model = inference(family)
    given = Prompt(conditioning(model), conditioning(model, seed=5))
    for sampler in (None, *recipe(name, family).samplers):
        request = Request(recipe=name, sampler=sampler, steps=2, width=64, height=64, seed=1)
        image = model.generate(request, conditioning=given)
        assert image.settings[0]["recipe"] == name and image.settings[0]["steps"] == 2


def test_what_is_asked_wins_over_the_recipe_and_the_recipe_over_the_model() -> None:
    model = inference("unet")
    asked: Any = Request(recipe="kohya", steps=7).checked(model)
    assert (asked.steps, asked.sampler, asked.cfg_scale, asked.clip_clean) == (7, "ddim", 7.5, 1.0)
    other: Any = Request(recipe="kohya", sampler="euler", cfg_scale=3.0).checked(model)
    assert (other.schedule, other.cfg_scale, other.clip_clean) == ("linspace", 3.0, None)
    said: Any = Request(recipe="kohya", noise_scale="one", sampler="euler").checked(model)
    assert said.noise_scale == "one" and other.noise_scale == "sigma"  # also where what is asked is what None means


def test_a_choice_without_effect_on_the_model_is_left_out() -> None:
    model = inference("flux")
    model.set_variant("dev")
    asked: Any = Request(recipe="diffusers", cfg_scale=1.0).checked(model)
    assert asked.strength is None and asked.cfg_batch == "positive_first"  # no image to begin from, and no guidance


def test_the_dtype_of_the_weights_is_that_of_the_network() -> None:
    model = inference("flux")
    wide: Any = Request(recipe="kohya").checked(model)
    model.network.bfloat16()
    narrow: Any = Request(recipe="kohya").checked(model)
    assert (wide.guidance_dtype, narrow.guidance_dtype, narrow.noise_dtype) == ("float32", "bfloat16", "bfloat16")
    stepwise: Any = Request(recipe="diffusers").checked(model)
    assert stepwise.time_dtype == "bfloat16_timestep"


def test_a_recipe_of_another_family_is_one_sentence() -> None:
    model = inference("unet")
    with pytest.raises(ConfigError, match="the recipe 'bfl' is for Flux, not for SDXL"):
        Request(recipe="bfl").checked(model)
    with pytest.raises(ConfigError, match="'khoya' is not a recipe; did you mean 'kohya'"):
        Request(recipe="khoya").checked(model)


def test_a_png_of_a_recipe_gives_the_same_image_when_the_recipe_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings hold every choice by itself."""
    model = inference("unet")
    given = Prompt(conditioning(model), conditioning(model, seed=5))
    first = model.generate(Request(recipe="kohya", steps=2, width=64, height=64, seed=1), conditioning=given)
    again = Request.from_json({**first.settings[0], "prompt": ""})
    assert again.recipe == "kohya" and again.sampler == "ddim" and again.clip_clean == 1.0
    monkeypatch.setattr("eridiff.request.recipe", lambda name, family: recipe("comfyui", family))
    second = model.generate(replace(again, seed=1), conditioning=given)
    assert second.images[0].tobytes() == first.images[0].tobytes()


def test_one_generator_goes_on_over_the_images_of_a_section() -> None:
    """log_validation of diffusers' trainers: one generator for all calls of the pipeline, ancestral steps included."""
    model = inference("unet")
    section = {
        "samples": [{"prompt": "a"}] * 3,
        "steps": 2,
        "width": 64,
        "height": 64,
        "seed": 5,
        "recipe": "diffusers-log-validation",
    }
    for sampler, each in (("euler", 1), ("euler_ancestral", 3)):
        requests, _ = requests_of(parse_config({"sample": {**section, "sampler": sampler}}).sample, model)
        assert [request.noise_skip for request in requests] == [0, each, 2 * each]
    generator = torch.Generator().manual_seed(5)
    noise = [torch.randn((1, 4, 8, 8), generator=generator) for _ in range(3)]
    given = Prompt(conditioning(model), conditioning(model, seed=5))
    plain, _ = requests_of(parse_config({"sample": section}).sample, model)
    found = [model.generate(request.encoded(), conditioning=given, keep=("noise",)).noise for request in plain]
    assert all(torch.equal(a, b) for a, b in zip(found, noise, strict=True))
    other = parse_config({"sample": {**section, "samples": [{"prompt": "a"}, {"prompt": "a", "width": 96}]}}).sample
    with pytest.raises(ConfigError, match="must be of one size"):
        requests_of(other, model)


# how far a choice moves the image ---------------------------------------------------------------------------------------


class Plain:
    """A model whose prompts are passed, as `moves` asks it."""

    def __init__(self, family: str) -> None:
        self.model = inference(family)
        self.given = Prompt(conditioning(self.model), conditioning(self.model, seed=5))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def generate(self, request: Request, **asked: Any) -> Any:
        return self.model.generate(request.encoded(), conditioning=self.given, **asked)


def test_each_choice_alone_and_all_together_are_measured() -> None:
    model: Any = Plain("unet")
    base = {"steps": 4, "width": 64, "height": 64, "seed": 1}
    one, other = Request(**base, recipe="kohya"), Request(**base, recipe="kohya", sampler="euler")
    found = differences(one, other, model)
    names = [difference.name for difference in found]
    assert {"sampler", "schedule", "clip_clean", "noise_scale"} <= set(names) and "steps" not in names
    told = list(moves(one, other, model, found))
    assert [difference.name if difference else None for difference, _ in told] == [*names, None]
    distances = {difference.name if difference else None: move for difference, move in told}
    assert all(isinstance(move, Move | str) for move in distances.values())
    whole = distances[None]
    images = [model.generate(request, keep=("latents",)) for request in (one, other)]
    expected = float((images[1].latents - images[0].latents).norm() / images[0].latents.norm())
    assert isinstance(whole, Move) and whole.latents == pytest.approx(expected, rel=1e-6) and expected > 1e-3
    own = model.generate(replace(one, clip_clean=None, recipe=None, **{
        name: value for name, value in vars(one.filled(model)).items() if name not in ("clip_clean", "recipe", "prompt", "seed", *base)
    }), keep=("latents",))  # fmt: skip
    alone = distances["clip_clean"]
    assert isinstance(alone, Move)
    assert alone.latents == pytest.approx(
        float((own.latents - images[0].latents).norm() / images[0].latents.norm()), rel=1e-5
    )


def test_equal_requests_differ_in_nothing() -> None:
    model = inference("flux")
    asked = Request(recipe="kohya", steps=2)
    assert differences(asked, replace(asked, recipe="kohya"), model) == []


# the command ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_command_answers_with_the_choice_that_moves_the_image_most_first(
    family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipe", "diff", "kohya", "comfyui", "--family", family, "--steps", "2"]) == 0
    text = capsys.readouterr().out
    rows = re.findall(r"^(\w+)\s.*?([\d.e-]+) of 255 levels", text, re.MULTILINE)
    sizes = [float(size) for name, size in rows if name != "all"]
    assert len(sizes) > 2 and sizes == sorted(sizes, reverse=True) and "all of them" in text
    assert "comfyui" in text and "from reading" in text
    assert "step" in text and "noise level" in text or "the same noise levels" in text


def test_the_page_shows_what_the_command_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "docs" / "same-image.md").read_text(encoding="utf-8")
    command, shown = re.search(r"\$ eridiff (recipe diff [^\n]*)\n(.*?)```", page, re.DOTALL).groups()  # type: ignore[union-attr]
    assert main(command.split()) == 0
    text = capsys.readouterr().out
    row = re.compile(r"^(\w+)  +(.*?)  +([\d.e-]+) of 255 levels", re.MULTILINE)
    told, printed = (row.findall(each) for each in (shown, text))
    assert len(told) > 3 and [each[:2] for each in told] == [each[:2] for each in printed]
    assert [float(each[2]) for each in told] == pytest.approx([float(each[2]) for each in printed], rel=0.05)
    assert all(
        line in text for line in shown.splitlines() if not row.match(line) and not line.startswith("all of them")
    )


def test_the_command_needs_a_family_where_recipes_are_for_several(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "diff", "kohya", "diffusers"]) == 2
    assert "say --family flux or sd3 or sdxl" in capsys.readouterr().err
    assert main(["recipe", "show", "kohya", "--family", "sdxl"]) == 0
    assert re.search(r"clip_clean \(ddim\)\s+1\s+diffusers", capsys.readouterr().out)
    assert main(["recipe", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(re.search(rf"^{name}\s", listed, re.MULTILINE) for name in recipes())


def sample(folder: Path, name: str, *flags: str) -> str:
    path = str(folder / name)
    line = ["sample", "--prompt", "a robot on the sea", "--seed", "3", "--steps", "2", "--quiet", "--out", path, *flags]
    assert main(line) == 0
    return path


def test_two_pngs_say_why_they_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = sample(tmp_path, "one.png", "--recipe", "kohya", "--size", "64x64"), sample(tmp_path, "other.png")
    assert main(["recipe", "explain", one, "--against", other]) == 0
    text = capsys.readouterr().out
    assert re.search(r"noise_layout\s+packed\s+latents\s+[\d.]+ of 255 levels", text)
    assert main(["recipe", "explain", other, "--against", other]) == 0
    assert "nothing differs" in capsys.readouterr().out


def test_pngs_of_two_families_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = sample(tmp_path, "one.png"), sample(tmp_path, "other.png", "--model", "tiny-sdxl")
    assert main(["recipe", "explain", one, "--against", other]) == 2
    assert "one.png was generated by Flux, and other.png by SDXL" in capsys.readouterr().err


def test_a_png_of_another_program_is_taken_as_its_recipe_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = sample(tmp_path, "mine.png")
    information = PngImagePlugin.PngInfo()
    information.add_text("parameters", "a robot on the sea\nSteps: 2, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Distilled CFG Scale: 2, Seed: 3, Size: 64x64, Clip skip: 2")  # fmt: skip
    Image.new("RGB", (64, 64)).save(tmp_path / "foreign.png", pnginfo=information)
    assert main(["recipe", "explain", mine, "--against", str(tmp_path / "foreign.png")]) == 0
    text = capsys.readouterr().out
    assert "foreign.png was generated by another program, taken as the recipe 'forge' says" in text
    assert "Clip skip: 2" in text and re.search(r"guidance_scale\s+1.5\s+2\s", text)
    assert main(["recipe", "explain", str(tmp_path / "foreign.png"), "--against", str(tmp_path / "foreign.png")]) == 2
    assert "say --family" in capsys.readouterr().err


# PNGs of other programs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a swan\nSteps: 30, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 42, Size: 832x1216, RNG: CPU",
         {"prompt": "a swan", "steps": 30, "sampler": "dpmpp_2m", "schedule": "karras", "cfg_scale": 7.5, "seed": 42, "width": 832, "height": 1216, "noise_device": "cpu"}),
        ("one\ntwo\nNegative prompt: n1\nn2\nSteps: 4, Sampler: Euler a, Schedule type: Exponential, Seed: 1",
         {"prompt": "one\ntwo", "negative": "n1\nn2", "steps": 4, "sampler": "euler_ancestral", "schedule": "exponential", "noise_device": "model"}),
        ('a\nSteps: 4, Sampler: Euler, Seed: 1, Lora hashes: "one: abc, two: def", Denoising strength: 0.6',
         {"strength": 0.6, "steps": 4}),
    ],
)  # fmt: skip
def test_a1111s_text_is_read_as_its_own_reader_reads_it(text: str, values: dict[str, Any]) -> None:
    found = foreign_settings({"parameters": text})
    assert found is not None
    assert {name: found[0][name] for name in values} == values and found[0]["recipe"] == "forge"


@pytest.mark.parametrize("letter", ["a", " ", "a ", 'a:"', "a:b,"])
def test_a_long_text_is_read_once(letter: str) -> None:
    """A pattern that begins anew at each letter would take hours for these."""
    found = foreign_settings({"parameters": "x\n" + letter * 300_000})
    assert found is None or found[0]["prompt"] == "x"


def test_two_pairs_are_part_of_a_prompt() -> None:
    assert foreign_settings({"parameters": "a swan\nSteps: 30, Seed: 42"}) is None


def test_comfyuis_graph_is_read_from_the_node_that_samples() -> None:
    graph = {
        "3": {"class_type": "KSampler", "inputs": {
            "seed": 5, "steps": 20, "cfg": 8.0, "sampler_name": "dpm_2", "scheduler": "karras", "denoise": 0.5,
            "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x.safetensors"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a swan", "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["4", 1]}},
    }  # fmt: skip
    found = foreign_settings({"prompt": json.dumps(graph)})
    assert found is not None and found[0] == {
        "recipe": "comfyui", "prompt": "a swan", "negative": "blurry", "seed": 5, "steps": 20, "cfg_scale": 8.0,
        "sampler": "dpm2", "schedule": "karras", "strength": 0.5, "width": 512, "height": 768,
    }  # fmt: skip


def test_a_graph_of_flux_has_its_guidance_and_its_noise_in_nodes_of_their_own() -> None:
    graph = {
        "1": {"class_type": "SamplerCustomAdvanced", "inputs": {
            "noise": ["2", 0], "guider": ["3", 0], "sampler": ["4", 0], "sigmas": ["5", 0], "latent_image": ["6", 0]}},
        "2": {"class_type": "RandomNoise", "inputs": {"noise_seed": 9}},
        "3": {"class_type": "BasicGuider", "inputs": {"model": ["8", 0], "conditioning": ["7", 0]}},
        "4": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "5": {"class_type": "BasicScheduler", "inputs": {"scheduler": "simple", "steps": 25, "denoise": 1.0, "model": ["8", 0]}},
        "6": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 1024, "height": 1024}},
        "7": {"class_type": "FluxGuidance", "inputs": {"guidance": 2.5, "conditioning": ["9", 0]}},
        "8": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux1-dev.safetensors"}},
        "9": {"class_type": "CLIPTextEncode", "inputs": {"text": "a swan"}},
    }  # fmt: skip
    found = foreign_settings({"prompt": json.dumps(graph)})
    assert found is not None and found[0] == {
        "recipe": "comfyui", "prompt": "a swan", "seed": 9, "steps": 25, "guidance_scale": 2.5, "sampler": "euler",
        "schedule": "simple", "width": 1024, "height": 1024,
    }  # fmt: skip


@pytest.mark.parametrize("text", ["[1, 2]", "{", '{"3": 1}', '{"3": {"class_type": "KSampler"}}', "null"])
def test_what_is_not_a_graph_has_no_settings(text: str) -> None:
    assert foreign_settings({"prompt": text}) is None


def test_a_graph_that_turns_in_a_circle_is_read_once() -> None:
    graph = {"1": {"class_type": "KSampler", "inputs": {"model": ["1", 0], "positive": ["1", 0], "steps": 3}}}
    found = foreign_settings({"prompt": json.dumps(graph)})
    assert found is not None and found[0] == {"recipe": "comfyui", "steps": 3}
