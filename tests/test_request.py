"""One `Request`: what can be asked of an image is asked by one name at every door, has an effect, or is an error."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

import eridiff
from eridiff import SDXLInference
from eridiff.cli import _parser, main
from eridiff.cli.sample import _asked
from eridiff.config import SAID, parse_config
from eridiff.errors import ConfigError
from eridiff.files import tensors_hash
from eridiff.images import read_image, to_tensor
from eridiff.inference.section import early
from eridiff.lora.save import save_lora
from eridiff.request import ENCODING, FIELDS, GUIDANCE, WORDS, Request, merged
from eridiff.run_files import load_config
from eridiff.schedulers.guidance import SkipLayers
from eridiff.yaml_reader import read_yaml
from tests import families, tiny
from tests.loras import some_lora

ASKED = [name for name, told in FIELDS.items() if not told.metadata["python"] and name != "prompt"]


def example(name: str) -> Any:
    """A value of a field that is not its default, as a file has it."""
    return read_yaml(f"v: {FIELDS[name].metadata['kind'].example}")["v"]


def said(config: Any) -> Request:
    return early(config.sample.each()[0])


@pytest.mark.parametrize("name", ASKED)
def test_a_field_is_the_same_at_every_door(name: str, tmp_path: Path) -> None:
    """Python, section, entry, flag, PNG, ai-toolkit's file and kohya's: each gives one value."""
    told = FIELDS[name].metadata
    expected = getattr(Request.of({name: told["kind"].read(name, example(name))}), name)
    assert expected != FIELDS[name].default
    found = {}
    for key in (key for key, field in SAID.items() if WORDS.get(field, field) == name):
        found[f"section {key}"] = said(parse_config({"sample": {"prompts": ["a"], key: example(name)}}))
        found[f"entry {key}"] = said(parse_config({"sample": {"samples": [{"prompt": "a", key: example(name)}]}}))
        process = {"sample": {"prompts": ["a"], key: example(name)}}
        (tmp_path / "run.json").write_text(json.dumps({"config": {"process": [process]}}))
        if key != "refiner_start_at":  # which needs the refiner that such a file names
            found[f"ai-toolkit {key}"] = said(load_config(tmp_path / "run.json"))
        (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": "a", key: example(name)}]))
        found[f"kohya {key}"] = said(load_config(tmp_path / "prompts.json"))
    values = example(name) if isinstance(example(name), list) else [example(name)]
    for flag in (*told["flags"], name):
        flag_ = f"--{flag.replace('_', '-')}"
        line = ["sample", flag_, *(str(v) for v in values if v is not True)]
        if told["kind"].flag.get("action") == "append":
            line = ["sample", *(word for v in values for word in (flag_, v))]
        found[f"flag {flag}"] = early(_asked(_parser().parse_args(line)))
    found["PNG"] = Request.from_json(json.loads(json.dumps(Request.of({name: expected}).to_json())))
    assert {door: getattr(request, name) for door, request in found.items()} == dict.fromkeys(found, expected)


def test_names_of_settings_are_checked_in_python_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'widht' is not a setting of a request; did you mean 'width'"):
        families.inference("flux").generate("a", widht=3)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": "4"}, "steps must be a whole number, not '4'"), ({"width": 64.0}, "width must be a whole number, not 64.0"),
        ({"cfg_scale": "high"}, "cfg_scale must be a number, not 'high'"), ({"shift": True}, "shift must be a number, not True"),
        ({"steps": 0}, "a run needs at least one step, not 0"), ({"seed": "x"}, "the seed must be a whole number"),
        ({"strength": -0.1}, "strength must be between 0 and 1, not -0.1"), ({"hand_over": 1.0}, "hand_over must be above 0 and below 1"),
        ({"height": 16400}, "height must be between 16 and 16384, not 16400"), ({"eta": 1.5}, "eta must be between 0 and 1"), ({"timestep_rounding": "up"}, "timestep_rounding must be none, down or nearest"),
        ({"crop": (1, 2, 3)}, "crop must be two whole numbers"), ({"part": (0.5, 0.5)}, "part must be two rising shares"),
        ({"noise_dtype": "int8"}, "noise_dtype must be float32, float16, bfloat16, weights or float64, not 'int8'"),
        ({"skip_layers": SkipLayers((), 2.5, 0, 1)}, "skip_layers needs blocks"),
        ({"skip_layers": {"blocks": [1]}}, "skip_layers must be True, False or an eridiff.schedulers.guidance.SkipLayers, not {'blocks'"),
        ({"skip_layers": [7, 8]}, "skip_layers must be True, False or"), ({"part": 0.5}, "part must be two rising shares .* not 0.5"),
        ({"cfg_interval": ("a", "b")}, "cfg_interval must be two rising shares"), ({"part": (0, None)}, "part must be two rising"),
        ({"crop": 3}, "crop must be two whole numbers of pixels"), ({"original_size": "64x64"}, "original_size must be two whole numbers"),
        ({"noise_row": 1}, "noise_row must be a row and the number of rows"),
        ({"skip_layers": SkipLayers((-1,), 2.5, 0, 1)}, "skip_layers needs blocks"),
        ({"skip_layers": SkipLayers((1,), 2.5, 0.5, 0.5)}, "skip_layers must have a scale .* and rising shares of the steps"),
        ({"skip_layers": SkipLayers((1,), float("nan"), 0, 1)}, "skip_layers must have a scale between -1000 and 1000"),
        ({"pixels": "floor"}, "pixels must be round or truncate, not 'floor'"), ({"noise_skip": -1}, "noise_skip must be between 0"),
        ({"noise_row": (2, 2), "noise_generator": "one"}, "noise_row must be a row and the number of rows"),
        ({"noise_generator": "one", "seed": [1, 2]}, "noise_generator one begins with one seed, not with 2"),
        ({"t5_length": 513}, "t5_length must be between 1 and 512, not 513"), ({"t5_mask": "yes"}, "t5_mask must be true or false"),
        ({"t5_padding": "max"}, "t5_padding must be original or diffusers, not 'max'"),
        ({"prompt_weights": "webui"}, "prompt_weights must be none, kohya, a1111 or comfyui, not 'webui'"),
    ],
)  # fmt: skip
def test_an_impossible_value_is_one_sentence(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=f"^{says}"):
        Request(**settings).check()


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (None, "not None"),
        (["a", 3], "not 3"),
        ({"t5": 3}, "not 3"),
        ("a \ud800", "half a character"),
        (b"a", "not b'a'"),
    ],
)
def test_what_is_not_text_is_not_a_prompt(prompt: Any, says: str) -> None:
    model = families.inference("flux")
    for ask in (model.encode_prompt, model.generate, lambda p: model.encode_prompt("a", p) if p else model.generate(p)):
        with pytest.raises(ConfigError, match=says):
            ask(prompt)


# merging --------------------------------------------------------------------------------------------------------------

LAYERS = st.lists(
    st.dictionaries(st.sampled_from([*sorted(GUIDANCE), "steps", "seed", "width"]), st.integers(1, 9), max_size=4),
    min_size=1, max_size=4,
)  # fmt: skip


@given(LAYERS)
def test_the_strongest_layer_that_says_a_setting_decides(layers: list[dict[str, int]]) -> None:
    found = merged(*layers)
    for name in ("steps", "seed", "width"):
        assert found.get(name) == next((layer[name] for layer in reversed(layers) if name in layer), None)
    strongest = next((layer for layer in reversed(layers) if GUIDANCE & layer.keys()), {})
    assert {n: v for n, v in found.items() if n in GUIDANCE} == {n: v for n, v in strongest.items() if n in GUIDANCE}


@given(LAYERS)
def test_merging_by_twos_is_merging_at_once(layers: list[dict[str, int]]) -> None:
    assert merged(merged(*layers[:2]), *layers[2:]) == merged(*layers)


def test_steps_and_sigmas_remove_each_other() -> None:
    sigmas = {"schedule": (1.0, 0.5, 0.0)}
    assert merged({"steps": 8}, sigmas) == sigmas and merged(sigmas, {"steps": 8}) == {"steps": 8}
    assert merged({"schedule": "karras"}, {"steps": 8}) == {"schedule": "karras", "steps": 8}


# nothing is silent ----------------------------------------------------------------------------------------------------

PICTURE = Image.new("RGB", (32, 32), "teal")
IDLE: list[tuple[str, str, dict[str, Any], str]] = [  # field, family, settings, why
    ("negative", "flux", {"negative": "x"}, "without classifier-free guidance"),
    ("negative", "mmdit", {"negative": ["x"], "cfg_scale": 1.0}, "without classifier-free guidance"),
    ("cfg_rescale", "unet", {"cfg_rescale": 0.5, "cfg_scale": 1}, "without classifier-free guidance"),
    ("cfg_interval", "flux", {"cfg_interval": (0, 0.5)}, "without classifier-free guidance"),
    ("guidance_scale", "mmdit", {"guidance_scale": 3.0}, "this network has no guidance embedding"),
    ("guidance_scale", "unet", {"guidance_scale": 3.0}, "this network has no guidance embedding"),
    ("shift", "flux", {"shift": 3.0}, "on the schedules of Flux dev"),
    ("shift", "mmdit", {"shift": 2.0, "schedule": (1.0, 0.0)}, "on sigmas that are given"),
    ("steps", "flux", {"steps": 4, "schedule": (1.0, 0.5, 0.0)}, "beside 3 sigmas, which are 2 steps"),
    ("skip_layers", "flux", {"skip_layers": SkipLayers((1,), 2.5, 0, 1)}, "on Flux dev"),
    ("skip_layers", "unet", {"skip_layers": True}, "on SDXL base"),
    ("skip_layers", "mmdit", {"skip_layers": SkipLayers((0, 9), 2.5, 0, 1)}, "on block 9: this network has 3, from 0 on"),
    ("skip_layers", "mmdit", {"skip_layers": SkipLayers((0,), 0.0, 0, 1)}, "at scale 0"),
    ("skip_layers", "mmdit", {"skip_layers": SkipLayers((0,), 2.5, 0.01, 0.2), "steps": 5}, "on a run of 5 steps, none of which"),
    ("hand_over", "unet", {"hand_over": 0.5}, "without a refiner"), ("crop", "flux", {"crop": (0, 8)}, "on Flux dev"),
    ("original_size", "mmdit", {"original_size": (64, 64)}, "on sd3"),
    ("target_size", "flux", {"target_size": (64, 64)}, "on Flux dev"),
    ("aesthetic_score", "unet", {"aesthetic_score": 5.0}, "on SDXL base"),
    ("negative_aesthetic_score", "flux", {"negative_aesthetic_score": 5.0}, "on Flux dev"),
    ("negative_aesthetic_score", "refiner", {"negative_aesthetic_score": 5.0, "cfg_scale": 1.0}, "without classifier-free guidance"),
    ("strength", "flux", {"strength": 0.5}, "without the image that it is for"),
    ("mask", "flux", {"mask": PICTURE.convert("L")}, "without the image that it is for"),
    ("mask_alpha", "flux", {"mask_alpha": True}, "without a mask"),
    ("control", "mmdit", {"control": PICTURE}, "Flux Canny and Depth follow a control image"),
    ("references", "flux", {"references": [PICTURE]}, "Flux Kontext edits references"),
    ("image", "kontext", {"image": PICTURE}, "without a strength: what it edits are references"),
    ("lora_scale", "flux", {"lora_scale": 0.5}, "without a LoRA that has no scale of its own"),
    ("block_cache", "unet", {"block_cache": 0.1}, "on SDXL base: the last blocks of a UNet read what the first ones gave"),
    ("sampler", "flux", {"sampler": "pndm"}, "on Flux dev: pndm is for discrete noise levels, not for rectified flow"),
    ("sampler", "unet", {"sampler": "dpmpp_2m_rf"}, "on SDXL base: dpmpp_2m_rf is for rectified flow, not for discrete"),
    ("timestep_offset", "unet", {"timestep_offset": 0, "schedule": "karras"}, "on the schedule karras"),
    ("timestep_offset", "unet", {"timestep_offset": 0, "sampler": "lcm"}, "on the schedule lcm"),
    ("timestep_offset", "unet", {"timestep_offset": 0, "schedule": (9.0, 0.0)}, "on sigmas that are given"),
    ("timestep_offset", "mmdit", {"timestep_offset": 0}, "on the schedule original"),
    ("final_noise", "mmdit", {"final_noise": "zero"}, "on sd3"),
    ("final_noise", "unet", {"final_noise": "lowest", "schedule": (9.0, 0.0)}, "on sigmas that are given"),
    ("final_noise", "unet", {"final_noise": "lowest", "sampler": "lcm"}, "on the sampler lcm, whose last step gives the clean image"),
    ("eta", "unet", {"eta": 0.5, "sampler": "euler"}, "on the sampler euler, whose share of new noise is fixed"),
    ("churn", "unet", {"churn": 9.0, "sampler": "lms"}, "on the sampler lms; euler and heun take it"),
    ("churn", "flux", {"churn": 9.0}, "on Flux dev: Karras' churn is for discrete noise levels"),
    ("noise_scale", "flux", {"noise_scale": "sigma"}, "on Flux dev"),
    ("noise_scale", "unet", {"noise_scale": "sigma", "image": PICTURE}, "on a run that begins from an image"),
    ("noise_layout", "unet", {"noise_layout": "packed"}, "on SDXL base"), ("noise_row", "flux", {"noise_row": (0, 2)}, "without noise_generator: one"),
    ("guidance_dtype", "unet", {"guidance_dtype": "bfloat16"}, "on SDXL base"),
    ("cfg_dtype", "flux", {"cfg_dtype": "bfloat16"}, "without classifier-free guidance"),
    ("cfg_batch", "flux", {"cfg_batch": "apart"}, "without classifier-free guidance"),
    ("strength_rounding", "flux", {"strength_rounding": "down"}, "without the image that it is for"),
    ("t5_length", "unet", {"t5_length": 128}, "on SDXL base"), ("t5_mask", "unet", {"t5_mask": True}, "on SDXL base"),
    ("t5_padding", "flux", {"t5_padding": "diffusers"}, "on Flux dev"), ("without_t5", "unet", {"without_t5": "none"}, "on SDXL base"),
    ("clip_windows", "flux", {"clip_windows": "all"}, "on Flux dev"), ("empty_negative", "mmdit", {"empty_negative": "zeros"}, "on sd3"),
    ("empty_negative", "unet", {"empty_negative": "encoded", "negative": "x"}, "beside a negative prompt"),
    ("empty_negative", "unet", {"empty_negative": "encoded", "cfg_scale": 1.0}, "without classifier-free guidance"),
    ("prompt_weights", "mmdit", {"prompt_weights": "kohya"}, "kohya's scripts weigh the prompts of SDXL alone"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "family", "settings", "why"), IDLE)
def test_a_setting_without_effect_is_an_error_that_says_why(
    name: str, family: str, settings: dict[str, Any], why: str
) -> None:
    model = families.inference({"kontext": "flux", "refiner": "unet"}.get(family, family))
    if family == "kontext":
        model.set_variant("kontext")
    if family == "refiner":
        model = SDXLInference(tiny.unet(tiny.SDXL_REFINER), model.autoencoder, device="cpu", progress=False)
    with pytest.raises(ConfigError, match=f"^{name} has no effect .*{why}"):
        model.generate("a", width=32, height=32, **settings)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_guidance_that_no_step_has_is_an_error(family: str) -> None:
    model = families.inference(family)
    steps = {"cfg_scale": 2.0, "steps": 4}
    for asked, run in (
        ({"cfg_interval": (0.3, 0.4)}, 4),
        ({"cfg_interval": (0.8, 1.0)}, 4),
        ({"cfg_interval": (0.0, 0.5), "image": PICTURE, "strength": 0.5}, 2),
    ):
        with pytest.raises(
            ConfigError, match=f"^no step would be guided: of {run} steps none lies in the cfg_interval"
        ):
            Request(**steps, **asked).checked(model)
    Request(**steps, cfg_interval=(0.75, 1.0)).checked(model)
    Request(**steps, cfg_interval=(0.5, 0.6), image=PICTURE, strength=0.5).checked(model)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_run_that_keeps_all_or_nothing_of_its_image_says_so(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = families.inference(family)
    asked: dict[str, Any] = {
        "conditioning": eridiff.Prompt(families.conditioning(model)), "width": 32, "height": 32, "steps": 2, "cfg_scale": 1.0,
        "image": PICTURE, "keep": ["latents"],
    }  # fmt: skip
    kept = model.generate(**asked, strength=0).latents
    assert torch.equal(kept, model.encode_vae(to_tensor(PICTURE, 32, 32)))
    assert caplog.messages == ["a strength of 0 denoises nothing: the image is only encoded and decoded"]
    caplog.clear()
    model.generate(**asked, strength=0.5)
    assert not caplog.messages
    model.generate(**asked, strength=0.75)
    nothing = ["a strength of 0.75 of 2 steps keeps nothing of the image: the run begins from noise alone"]
    assert caplog.messages == (nothing if model.flow else [])  # SDXL's first point is not all noise
    caplog.clear()
    model.generate(**asked, strength=1.0, mask=Image.linear_gradient("L").resize((32, 32)))
    assert not caplog.messages
    del asked["image"]
    with pytest.raises(
        ConfigError, match=r"^a part from 0\.3 on continues a run: pass the run of the part before as noise"
    ):
        model.generate(**asked, part=(0.3, 1.0))
    begun = model.generate(**asked | {"part": (0.0, 0.3), "keep": ("run",)}).run
    caplog.clear()
    model.generate(**asked, part=(0.3, 0.4), noise=begun)
    assert "the part 0.3 to 0.4 of the run holds none of its 2 steps" in caplog.messages


def test_every_field_with_a_condition_is_tried_where_it_has_no_effect() -> None:
    assert {name for name, told in FIELDS.items() if told.metadata["effect"]} == {name for name, *_ in IDLE}


GUIDED: dict[str, Any] = {"cfg_scale": 2.0}
BEGUN: dict[str, Any] = {"image": PICTURE, "strength": 0.6}
BETWEEN: dict[str, Any] = {"schedule": "karras", "steps": 3}  # with a time between whole numbers
TAKEN: list[tuple[str, Any, dict[str, Any]]] = [  # field, value, beside which others
    ("width", 64, {}), ("height", 64, {}), ("steps", 3, {}), ("seed", 2, {}), ("sampler", "heun", {}), ("schedule", "karras", {}),
    ("shift", 2.0, {}), ("shift", 2.0, {"schedule": "karras"}), ("guidance_scale", 2.0, {}), ("cfg_scale", 2.0, {}), ("cfg_rescale", 0.5, GUIDED),
    ("cfg_interval", (0.5, 1.0), GUIDED), ("skip_layers", SkipLayers((1,), 2.5, 0.0, 1.0), {}), ("original_size", (96, 64), {}),
    ("crop", (8, 0), {}), ("target_size", (96, 64), {}), ("aesthetic_score", 3.0, {}), ("negative_aesthetic_score", 3.0, GUIDED),
    ("image", PICTURE, {"steps": 4}), ("strength", 0.3, {"image": PICTURE}), ("mask", Image.linear_gradient("L").resize((32, 32)), BEGUN),
    ("control", PICTURE, {}), ("references", [PICTURE], {}), ("timestep_offset", 7, {}), ("timestep_rounding", "down", BETWEEN),
    ("final_noise", "lowest", {}), ("clip_clean", 0.1, {}), ("eta", 0.5, {"sampler": "euler_ancestral"}), ("churn", 1.0, {"sampler": "euler"}),
    ("noise_scale", "sigma", {}), ("noise_layout", "packed", {}), ("noise_dtype", "float64", {}), ("noise_skip", 1, {}),
    ("noise_row", (1, 2), {"noise_generator": "one"}), ("latents_dtype", "bfloat16", {}), ("time_dtype", "bfloat16", BETWEEN),
    ("guidance_dtype", "bfloat16", {"guidance_scale": 3.3}), ("cfg_dtype", "bfloat16", GUIDED),
    ("strength_rounding", "down", {"image": PICTURE, "strength": 0.7}),
    ("pixels", "truncate", {}), ("block_cache", 100.0, {}),
]  # fmt: skip
ALIKE = {  # fields that may change nothing
    "noise_device": "on a CPU", "noise_generator": "of one image", "cfg_batch": "but rounding", "mask_alpha": "as another mask does",
    "prompt": "conditioning is passed", "negative": "conditioning is passed", "recipe": "others follow from it", "lora_scale": "without LoRAs",
    "hand_over": "without a refiner", "part": "is the run's",
}  # fmt: skip


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_setting_that_is_taken_changes_the_image(family: str) -> None:
    model, taken = families.inference(family), set()
    both = eridiff.Prompt(families.conditioning(model), families.conditioning(model, seed=5))
    rest: dict[str, Any] = {
        "conditioning": both, "width": 32, "height": 32, "steps": 2, "seed": 1, "cfg_scale": 1.0, "keep": ["latents"],
    }  # fmt: skip
    before: dict[str, Any] = {}
    for name, value, beside in TAKEN:
        try:
            base = before.get(repr(beside)) or before.setdefault(repr(beside), model.generate(**{**rest, **beside}))
            found = model.generate(**{**rest, **beside, name: value})
        except ConfigError as error:
            assert "has no effect" in str(error), name
            continue
        same = found.latents.shape == base.latents.shape and torch.equal(found.latents, base.latents)
        assert not same or found.images[0].tobytes() != base.images[0].tobytes(), (name, beside)
        taken.add(name)
    assert taken >= {"width", "steps", "sampler", "image", "mask", "noise_dtype", "pixels"} and len(taken) > 20


def test_every_field_is_tried_where_it_is_taken() -> None:
    assert {name for name, *_ in TAKEN} | ALIKE.keys() | {*ENCODING} == FIELDS.keys()


@pytest.mark.parametrize("settings", [{"prompt": "a swan"}, {"negative": "x", "cfg_scale": 2.0}])
def test_a_prompt_beside_its_conditioning_is_an_error(settings: dict[str, Any]) -> None:
    model = families.inference("flux")
    prompt = eridiff.Prompt(families.conditioning(model), families.conditioning(model, seed=5))
    with pytest.raises(ConfigError, match="has no effect beside conditioning"):
        model.generate(conditioning=prompt, **settings)


MADE = {
    "noise_layout": "packed", "noise_dtype": "bfloat16", "noise_device": "model", "noise_generator": "one", "noise_skip": 2,
    "noise_row": (0, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_how_noise_is_made_has_no_effect_beside_noise_unless_the_sampler_makes_more(name: str) -> None:
    model = families.inference("flux")
    asked: dict[str, Any] = {
        "conditioning": eridiff.Prompt(families.conditioning(model)), "noise": model.noise([1], 32, 32), "width": 32, "height": 32,
        "steps": 2, name: MADE[name], **({"noise_generator": "one"} if name == "noise_row" else {}),
    }  # fmt: skip
    first = "noise_generator" if name == "noise_row" else name
    for sampler in ({}, {"sampler": "euler_ancestral", "eta": 0.0}):
        with pytest.raises(ConfigError, match=f"^{first} has no effect beside noise, as euler.* makes none on the way"):
            model.generate(**asked, **sampler)
    rest = {key: value for key, value in asked.items() if key.startswith("noise_")}
    with pytest.raises(ConfigError, match=f"^{first} has no effect beside noise"):
        model.denoise(asked["noise"], asked["conditioning"], 2, seeds=[1], **rest)
    model.generate(**asked, sampler="euler_ancestral")
    model.generate(**asked, part=(0.5, 1.0))  # of a run that was asked the same


def test_one_seed_beside_noise_is_warned_of_and_several_are_as_many_images(caplog: pytest.LogCaptureFixture) -> None:
    model = families.inference("flux")
    asked: dict[str, Any] = {
        "conditioning": eridiff.Prompt(families.conditioning(model)), "width": 32, "height": 32, "steps": 1,
        "noise": model.noise([3, 4], 32, 32),
    }  # fmt: skip
    assert len(model.generate(**asked, seed=[1, 2]).images) == 2 and "seed" not in caplog.text
    asked["noise"] = asked["noise"][:1]
    model.generate(**asked, seed=1, sampler="euler_ancestral")
    assert "seed" not in caplog.text
    model.generate(**asked, seed=1)
    assert "seed has no effect beside noise, as euler makes none on the way" in caplog.text


def test_noise_of_another_size_is_an_error_that_gives_both() -> None:
    model = families.inference("flux")
    with pytest.raises(
        ConfigError, match=r"the noise has the shape \[1, 16, 4, 4\], and an image of 64x32 needs \[1, 16, 4, 8\]"
    ):
        model.generate(conditioning=eridiff.Prompt(families.conditioning(model)), width=64, height=32, noise=torch.zeros(1, 16, 4, 4))  # fmt: skip


# records --------------------------------------------------------------------------------------------------------------


def test_each_image_of_a_batch_records_its_own_prompts_and_is_generated_again(tmp_path: Path) -> None:
    model = eridiff.load(tiny.write_sd3_model(tmp_path), device="cpu", progress=False)
    asked = {"negative": ["x", "y"], "seed": [1, 2], "steps": 2, "width": 32, "height": 32}
    found = model.generate(["a swan", "a fox"], **asked)
    for image, settings, texts in zip(found.images, found.settings, (("a swan", "x"), ("a fox", "y")), strict=True):
        assert (settings["prompt"], settings["negative"]) == texts
        again = model.generate(Request.from_json(settings)).images[0]
        difference = torch.tensor(list(again.tobytes())).float() - torch.tensor(list(image.tobytes())).float()
        assert float(difference.abs().max()) <= 2  # another batch


def test_files_are_recorded_and_images_are_not(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "in.png")
    model = families.inference("flux")
    asked = {"conditioning": eridiff.Prompt(families.conditioning(model)), "steps": 2, "seed": 1}
    by_path = model.generate(image=tmp_path / "in.png", **asked)
    by_hand = model.generate(image=read_image(tmp_path / "in.png"), **asked)
    assert by_path.images[0].tobytes() == by_hand.images[0].tobytes()
    assert by_path.settings[0]["image"] == str(tmp_path / "in.png") and by_hand.settings[0]["image"] is None
    assert (by_path.settings[0]["handed_in"], by_hand.settings[0]["handed_in"]) == (
        ["conditioning"], ["image", "conditioning"],
    )  # fmt: skip


def test_a_png_names_no_folder_and_can_be_moved_with_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A1111's text has names alone; the JSON has paths as seen from the PNG, and hashes of what was read."""
    home = tmp_path / "home"
    model = eridiff.load(tiny.write_model(home / "model"), device="cpu", progress=False)
    lora = save_lora(some_lora(model.network), home / "style.safetensors", model.network, format="kohya")
    PICTURE.save(home / "in.png")
    asked = [
        *["--prompt", "swan", "--steps", "2", "--size", "32x32", "--strength", "0.5", "--image"],
        str(home / "in.png"),
    ]
    line = [*asked, "--model", str(home / "model"), "--lora", str(lora), "--lora-scale", "0.5", "--device", "cpu"]
    assert main(["sample", *line, "--out", str(home / "out" / "a.png")]) == 0
    text = Image.open(home / "out" / "a.png").text  # type: ignore[attr-defined]
    assert text["parameters"].startswith("swan <lora:style:0.5>\n")
    assert f"Lora hashes: style: {tensors_hash(lora)}" in text["parameters"].replace('"', "")
    assert str(tmp_path) not in text["parameters"] + text["eridiff"]
    home.rename(tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / "out" / "a.png"
    assert main(["resample", str(moved)]) == 0
    assert "the same image, bit for bit" in capsys.readouterr().err
    Image.new("RGB", (32, 32), "red").save(tmp_path / "elsewhere" / "in.png")
    assert main(["resample", str(moved)]) == 0
    said = capsys.readouterr().err
    assert "another image (then image with other content)" in said


def test_a_mask_may_say_by_its_transparency_what_is_painted() -> None:
    model = families.inference("flux")
    prompt = eridiff.Prompt(families.conditioning(model))
    asked: dict[str, Any] = {"conditioning": prompt, "image": PICTURE, "width": 32, "height": 32, "steps": 1, "seed": 1}
    grey = Image.linear_gradient("L").resize((32, 32))
    clear = PICTURE.copy()
    clear.putalpha(ImageOps.invert(grey))
    found = [model.generate(mask=clear, mask_alpha=True, **asked), model.generate(mask=grey, **asked)]
    assert found[0].images[0].tobytes() == found[1].images[0].tobytes()
    assert found[0].settings[0]["mask_alpha"] is True
    for mask in (grey, torch.zeros(1, 1, 32, 32)):
        with pytest.raises(ConfigError, match="asks for a mask with an alpha channel, and this one has none"):
            model.generate(mask=mask, mask_alpha=True, **asked)
    with pytest.raises(ConfigError, match="set mask_alpha"):
        model.generate(mask=clear, **asked)


def test_older_pngs_are_read_too() -> None:
    old = {
        "prompt": "a swan", "negative_prompt": "x", "seed": 5, "steps": 3, "original_size": "96x64", "crop": [0, 8],
        "skip_layers": {"blocks": [7], "scale": 2.5, "start": 0.01, "end": 0.2}, "cfg_interval": [0.0, 0.5],
        "schedule": [1.0, 0.5, 0.0], "guidance_scale": None, "family": "mmdit",
    }  # fmt: skip
    assert Request.from_json(old) == Request(
        prompt="a swan", negative="x", seed=5, steps=3, original_size=(64, 96), crop=(0, 8),
        skip_layers=SkipLayers((7,), 2.5, 0.01, 0.2), cfg_interval=(0.0, 0.5), schedule=(1.0, 0.5, 0.0),
    )  # fmt: skip


# conditions that take effect ------------------------------------------------------------------------------------------


def test_a_loras_weight_is_that_of_each_request_unless_it_has_its_own(tmp_path: Path) -> None:
    model = eridiff.load(tiny.write_model(tmp_path), device="cpu", progress=False)
    lora = some_lora(model.network)
    asked = {"prompt": "a swan", "steps": 1, "seed": 1, "width": 32, "height": 32, "keep": ("latents",)}
    expected = {}
    for scale in (1.0, 0.5):
        with model.apply_lora(lora, scale):
            expected[scale] = model.generate(**asked).latents
            with pytest.raises(ConfigError, match="lora_scale has no effect"):
                model.generate(**asked, lora_scale=0.3)
    assert not torch.equal(expected[1.0], expected[0.5])
    with model.apply_lora(lora):
        results = list(model.generate_each([asked, {**asked, "lora_scale": 0.5}, asked]))
        assert [torch.equal(r.latents, expected[s]) for r, s in zip(results, (1.0, 0.5, 1.0), strict=True)] == [
            True
        ] * 3
        assert [r.settings[0]["loras"][0]["scale"] for r in results] == [1.0, 0.5, 1.0]
