"""SDXL from a prompt to an image, with small random models in the published files' form."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import eridiff
from eridiff.cli import main
from eridiff.errors import CheckpointError, ConfigError
from eridiff.inference import Prompt, SDXLInference
from eridiff.memory.plan import stages
from eridiff.models.unet import PRESETS, size_vector
from eridiff.schedulers.discrete import discrete_schedule
from eridiff.text import Conditioning
from eridiff.weights.header import open_checkpoint
from eridiff.weights.locate import locate
from eridiff.weights.save import save_network, write_tensors
from tests import tiny
from tests.sparse import sparse_manifest

INPAINT = replace(tiny.UNET, in_channels=9)
LCM = replace(tiny.UNET, guidance=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_sdxl_model(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> SDXLInference:
    return load(folder)


def load(path: Any, **options: Any) -> SDXLInference:
    return tiny.load(SDXLInference, path, **options)


def draw(model: SDXLInference, prompt: Any = "a swan", **options: Any) -> Any:
    return tiny.draw(model, prompt, **{"width": 96, "height": 64} | options)


# the loop -------------------------------------------------------------------------------------------------------------


def told(pooled: Tensor, numbers: list[float]) -> Tensor:
    return size_vector(pooled, torch.tensor([numbers]))


def test_the_loop_is_the_published_euler(whole: SDXLInference) -> None:
    """diffusers' EulerDiscrete by its own formula: variance-exploding latents, leading timesteps, cfg 5, zeros as negative."""
    found = draw(whole)
    p = found.conditioning
    timesteps = [751, 501, 251, 1]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    a = torch.cumprod(1 - betas, 0)[timesteps]
    sigmas = [*((1 - a) / a).sqrt().tolist(), 0.0]
    x = found.noise * (1 + sigmas[0] ** 2) ** 0.5
    sizes = [64, 96, 0, 0, 64, 96]
    for t, (now, then) in zip(timesteps, itertools.pairwise(sigmas), strict=True):
        scaled = x / (1 + now**2) ** 0.5
        positive, negative = (
            whole.network(scaled, c.text, told(c.pooled, sizes), torch.tensor([[float(t)]]))
            for c in (p.positive, p.negative)
        )
        x = x + (then - now) * (negative + 5.0 * (positive - negative))
    assert torch.allclose(found.latents, x, atol=2e-3 * float(x.abs().max()))


def test_an_empty_negative_is_zeros_or_encoded_as_asked(whole: SDXLInference) -> None:
    zeros = whole.encode_prompt("a swan").negative
    assert zeros and not bool(zeros.text.any()) and not bool(zeros.pooled.any())
    encoded = whole.encode_prompt("a swan", empty_negative="encoded").negative
    said = whole.encode_prompt("a swan", "").negative
    assert encoded and said and torch.allclose(encoded.text, said.text, atol=1e-5) and bool(said.text.any())


def test_every_sampler_and_schedule_generates_its_own_image(whole: SDXLInference) -> None:
    samplers = ("euler", "euler_ancestral", "heun", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "lcm")
    drawn = [draw(whole, sampler=name, steps=3).latents for name in samplers]
    drawn += [
        draw(whole, schedule=name, steps=3).latents
        for name in ("trailing", "linspace", "legacy", "karras", "exponential", "turbo")
    ]
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in itertools.combinations(drawn, 2))
    assert all(bool(torch.isfinite(latents).all()) for latents in drawn)
    assert draw(whole, sampler="lcm").settings[0]["schedule"] == "lcm"
    assert torch.equal(
        draw(whole, sampler="euler_ancestral", steps=3).latents, drawn[1]
    )  # the noise of the way is the seed's
    assert not torch.equal(draw(whole, sampler="euler_ancestral", steps=3, seed=2).latents, drawn[1])


def test_noise_on_the_way_does_not_depend_on_the_neighbours(whole: SDXLInference) -> None:
    both = draw(whole, sampler="euler_ancestral", seed=[3, 7], cfg_scale=1.0).latents
    for i, seed in enumerate((3, 7)):
        alone = draw(whole, sampler="euler_ancestral", seed=seed, cfg_scale=1.0).latents[0]
        assert torch.allclose(both[i], alone, atol=1e-3)
    prompt = whole.encode_prompt("a swan")
    with pytest.raises(ConfigError, match="euler_ancestral draws noise on the way: give seeds"):
        whole.denoise(whole.noise([1], 64, 64), prompt, 2, sampler="euler_ancestral")


def vectors(model: SDXLInference, **options: Any) -> Tensor:
    """What the network is given beside the text while it generates: `[B, vector_width]`."""
    seen: list[Tensor] = []
    hook = model.network.vector_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    draw(model, **options)
    hook.remove()
    return seen[0]


SIZES = {"original_size": (512, 768), "crop": (16, 32), "target_size": (1024, 640)}


def test_the_network_is_given_sizes_height_before_width(whole: SDXLInference) -> None:
    pooled = whole.encode_prompt("a swan").positive.pooled
    assert torch.equal(vectors(whole)[:1], told(pooled, [64, 96, 0, 0, 64, 96]))
    assert torch.equal(vectors(whole, **SIZES)[:1], told(pooled, [512, 768, 16, 32, 1024, 640]))
    assert torch.equal(
        vectors(whole, **SIZES)[1:, 8:], vectors(whole, **SIZES)[:1, 8:]
    )  # the negative prompt's row too


def test_what_the_network_is_given_of_sizes_changes_the_image(whole: SDXLInference) -> None:
    plain = draw(whole)
    assert plain.settings[0] | {"original_size": "96x64", "crop": [0, 0], "target_size": "96x64"} == plain.settings[0]
    for name, value in SIZES.items():
        assert not torch.allclose(draw(whole, **{name: value}).latents, plain.latents, atol=1e-4)
    same = draw(whole, original_size=(64, 96), target_size=(64, 96))
    assert torch.equal(same.latents, plain.latents)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"original_size": (0, 96)}, "original_size must be two whole numbers of pixels, at least 1, not \\(0, 96\\)"),
        ({"crop": (-8, 0)}, "crop must be two whole numbers of pixels, at least 0"),
        ({"target_size": (64.5, 96)}, "target_size must be two whole numbers"),
        ({"aesthetic_score": 11}, "aesthetic_score must be between 0 and 10, not 11"),
        ({"negative_aesthetic_score": float("nan")}, "negative_aesthetic_score must be between 0 and 10, not nan"),
    ],
)
def test_impossible_sizes_and_scores_end_in_a_sentence(
    options: dict[str, Any], says: str, whole: SDXLInference
) -> None:
    with pytest.raises(ConfigError, match=says):
        draw(whole, **options)


def test_a_run_handed_over_is_the_run_in_one(whole: SDXLInference) -> None:
    """The first part's run, given as noise to the second part, which could be the refiner's; for most its latents do.

    (Every sampler goes from a base to a refiner in tests/test_refiner.py.)
    """
    image, mask = (Image.radial_gradient("L").resize((96, 64)).convert(mode) for mode in ("RGB", "L"))
    for sampler in ("euler", "heun", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde", "unipc"):
        for asked in ({}, {"image": image, "mask": mask, "strength": 0.8}):
            asked = {"steps": 5, "sampler": sampler, "schedule": "leading", "seed": 3, **asked}
            one = draw(whole, **asked).latents
            first = draw(whole, part=(0.0, 0.8), keep=("run", "latents"), **asked)
            second = draw(whole, part=(0.8, 1.0), noise=first.run, **asked)
            assert not torch.allclose(first.latents, one, atol=1e-3)
            assert torch.equal(second.latents, one), sampler
            assert second.settings[0]["handed_in"][-1] == "noise"
            if sampler in ("euler", "heun") and "image" not in asked:
                for scale in ("one", "sigma"):  # of the noise, not of latents that a part has given
                    asked = {**asked, "noise_scale": scale}
                    one = draw(whole, **asked).latents
                    first = draw(whole, part=(0.0, 0.8), keep=("run", "latents"), **asked)
                    second = draw(whole, part=(0.8, 1.0), noise=first.latents, **asked)
                    assert torch.equal(second.latents, one)
    with pytest.raises(ConfigError, match=r"the noise has the shape \[1, 4, 8, 12\], and an image of 64x64"):
        draw(whole, width=64, noise=first.run)


@pytest.mark.parametrize(("steps", "base"), [(20, 16), (25, 20), (30, 23), (40, 32), (50, 40)])
def test_the_switch_to_the_refiner_is_diffusers(steps: int, base: int, whole: SDXLInference) -> None:
    facts = json.loads((Path(__file__).parent / "goldens" / "sdxl-samplers.json").read_text())[
        "hand_over_diffusers_leading"
    ]
    assert facts[str(steps)]["base"] == base
    assert whole.place(whole.schedule(steps, 64, 64), 0.8) == base


def test_the_level_of_the_switch_to_the_refiner_is_the_bases(whole: SDXLInference) -> None:
    times = torch.tensor([300.0, 200.0, 100.0])
    assert whole.place(discrete_schedule(times, torch.tensor([3.0, 2.0, 1.0])), 0.8) == 2


def test_the_refiner_reads_clip_g_and_scores(tmp_path: Path, whole: SDXLInference) -> None:
    refiner = load(tiny.write_sdxl_model(tmp_path / "r", tiny.SDXL_REFINER, "refiner"))
    assert (refiner.variant, refiner.multiple, refiner.clip) == ("refiner", 64, None)
    prompt = refiner.encode_prompt("a swan")
    assert prompt.positive.text.shape == (1, 77, 8) and prompt.negative and bool(prompt.negative.text.any())
    first = draw(whole, width=64, part=(0.0, 0.8), steps=10)
    options = {"width": 64, "steps": 10, "part": (0.8, 1.0), "noise": first.latents}
    found = draw(refiner, **options)
    assert found.images[0].size == (64, 64) and not torch.equal(found.latents, first.latents)
    with pytest.raises(ConfigError, match="the width must be a multiple of 64, not 96"):
        draw(refiner, **options | {"width": 96})
    together = draw(whole, width=64, steps=10, refiner=refiner)
    assert torch.equal(together.latents, found.latents) and together.settings[0]["hand_over"] == 0.8
    p = prompt.positive.pooled, prompt.negative.pooled
    expected = torch.cat([told(pooled, [64, 64, 0, 0, score]) for pooled, score in zip(p, (6.0, 2.5), strict=True)])
    assert torch.equal(vectors(refiner, **options), expected)
    for name in ("aesthetic_score", "negative_aesthetic_score"):
        other = draw(refiner, **options, **{name: 4.0})
        assert not torch.allclose(other.latents, found.latents, atol=1e-6) and other.settings[0][name] == 4.0
    with pytest.raises(ConfigError, match="the refiner finishes images: give it to a base as refiner"):
        draw(refiner, width=64)
    with pytest.raises(ConfigError, match="a base and a refiner work together, not base and base"):
        draw(whole, refiner=whole)
    with pytest.raises(ConfigError, match="hand_over must be above 0 and below 1"):
        draw(whole, refiner=refiner, width=64, hand_over=1.0)


def test_images_begin_from_images_and_masks_keep_what_is_black(whole: SDXLInference) -> None:
    image = Image.radial_gradient("L").resize((96, 64)).convert("RGB")
    start = whole.encode_vae(eridiff.images.to_tensor(image, 96, 64))
    near, far = (draw(whole, image=image, strength=s, cfg_scale=1.0).latents for s in (0.25, 1.0))
    assert (near - start).norm() < (far - start).norm()
    assert draw(whole, image=image, mask=Image.new("L", (96, 64), 0)).images[0].tobytes() == image.tobytes()


def test_inpainting_sees_the_mask_and_the_image_without_what_is_painted(tmp_path: Path) -> None:
    model = load(tiny.write_sdxl_model(tmp_path / "m", INPAINT))
    assert model.variant == "inpaint" and model.sampling.cfg_scale == 7.5
    image = Image.radial_gradient("L").resize((96, 64)).convert("RGB")
    mask = Image.new("L", (96, 64), 0)
    mask.paste(255, (0, 0, 48, 64))
    condition = model.condition(
        eridiff.images.to_tensor(image, 96, 64), eridiff.images.to_tensor(mask, 96, 64, mask=True), None
    )
    assert condition is not None and condition.shape == (1, 5, 8, 12)
    assert condition[0, 0, :, :6].eq(1).all() and condition[0, 0, :, 6:].eq(0).all()
    hole = eridiff.images.to_tensor(image, 96, 64)
    hole[..., :48] = 0
    assert torch.allclose(condition[:, 1:], model.encode_vae(hole))
    found = draw(model, image=image, mask=mask)
    assert found.images[0].crop((48, 0, 96, 64)).tobytes() == image.crop((48, 0, 96, 64)).tobytes()
    with pytest.raises(ConfigError, match="needs an image and a mask"):
        draw(model)
    with pytest.raises(ConfigError, match="needs an image and a mask"):
        draw(model, image=image)


def test_inpainting_takes_latents_then_mask_then_image_each_row_its_own(tmp_path: Path) -> None:
    model = load(tiny.write_sdxl_model(tmp_path / "m", INPAINT))
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.full((1, 1, 64, 96), 0.6)
    mask[..., 48:] = 0.4
    seen: list[Tensor] = []
    hook = model.network.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found = draw(model, image=images, mask=mask, seed=[1, 2], steps=1)
    hook.remove()
    rows = seen[0]  # both images with the prompt, both with the negative one
    assert torch.allclose(rows[:, :4], found.noise.repeat(2, 1, 1, 1), atol=1e-5)
    assert rows[:, 4, :, :6].eq(1).all() and rows[:, 4, :, 6:].eq(0).all()  # gray is painted or not, nothing between
    pictures = model.encode_vae(images * (mask < 0.5))
    assert torch.allclose(rows[:, 5:], pictures.repeat(2, 1, 1, 1), atol=1e-4)
    assert not torch.allclose(pictures[0], pictures[1], atol=0.1)


def test_lcm_is_given_its_guidance(tmp_path: Path) -> None:
    model = load(tiny.write_sdxl_model(tmp_path / "m", LCM))
    assert (model.variant, model.sampling.sampler, model.guidance(None)) == ("lcm", "lcm", 8.0)
    eight, three = (draw(model, guidance_scale=scale).latents for scale in (8.0, 3.0))
    assert torch.equal(draw(model).latents, eight) and not torch.allclose(eight, three, atol=1e-4)
    assert draw(model).settings[0]["cfg_scale"] == 1.0


def test_strips_generate_the_same_image(folder: Path, whole: SDXLInference) -> None:
    image = Image.radial_gradient("L").resize((96, 64)).convert("RGB")
    expected = draw(whole, image=image, strength=0.5).images[0]
    found = draw(load(folder, vae_rows=24), image=image, strength=0.5).images[0]
    pairs = zip(expected.tobytes(), found.tobytes(), strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 1
    with pytest.raises(ConfigError, match="vae_rows must be a whole number, at least 1, not 0"):
        load(folder, vae_rows=0)


# variants and predictions ---------------------------------------------------------------------------------------------


def rewritten(
    folder: Path, target: Path, change: Callable[[dict[str, Tensor]], object], metadata: dict[str, str] | None = None
) -> Path:
    """The model's file after a function changed its tensors."""
    target.mkdir(exist_ok=True)
    state = load_file(folder / "sdxl.safetensors")
    change(state)
    write_tensors(
        state, target / "sdxl.safetensors", open_checkpoint(folder / "sdxl.safetensors").metadata | (metadata or {})
    )
    if not (target / "tokenizer").exists():
        (target / "tokenizer").symlink_to(folder / "tokenizer")
    return target


def test_published_variants_are_recognised_by_sizes_then_by_name(folder: Path, tmp_path: Path) -> None:
    for name, config in PRESETS.items():
        distilled = name in ("ssd-1b", "vega")  # sampled as base
        assert SDXLInference.possible_variants(config)[0] == ("base" if distilled else name)
    turbo = rewritten(folder, tmp_path / "sdxl-turbo", lambda s: None)
    assert (load(turbo).variant, load(turbo).sampling.sampler) == ("turbo", "euler_ancestral")
    assert load(folder, variant="lightning").sampling.schedule == "trailing"
    with pytest.raises(ConfigError, match="takes the inputs of base or turbo or lightning or lcm, not of refiner"):
        load(folder, variant="refiner")


@pytest.mark.parametrize(
    ("variant", "steps", "cfg_scale", "sampler", "schedule", "side"),
    [
        ("base", 50, 5.0, "euler", "leading", 1024), ("refiner", 50, 5.0, "euler", "leading", 1024),
        ("inpaint", 20, 7.5, "euler", "leading", 1024), ("turbo", 4, 1.0, "euler_ancestral", "turbo", 512),
        ("lightning", 4, 1.0, "euler", "trailing", 1024), ("lcm", 4, 1.0, "lcm", "lcm", 1024),
    ],
)  # fmt: skip
def test_variants_are_sampled_as_published(
    variant: str, steps: int, cfg_scale: float, sampler: str, schedule: str, side: int
) -> None:
    d = SDXLInference.variants[variant]
    assert (d.steps, d.cfg_scale, d.sampler, d.schedule) == (steps, cfg_scale, sampler, schedule)
    assert (d.width, d.height) == (side, side)


def test_karras_and_exponential_run_from_one_end_of_the_table_to_the_other(whole: SDXLInference) -> None:
    for name in ("karras", "exponential"):
        schedule = whole.schedule(10, 64, 64, name)
        sigmas = schedule.sigmas / schedule.alphas
        assert abs(float(sigmas[0]) - 14.614641) < 1e-5 and abs(float(sigmas[-2]) - 0.029167) < 1e-6 and sigmas[-1] == 0
        assert float(schedule.times[0]) == 999 and abs(float(schedule.times[-1])) < 1e-6


def test_both_prompts_ends_are_padded_as_published(whole: SDXLInference) -> None:
    """CLIP-L with its end token, CLIP-G with 0."""
    assert whole.clip and whole.clip_g
    assert [int(encoder.tokenize(["a swan"]).flatten()[-1]) for encoder in (whole.clip, whole.clip_g)] == [842, 0]


def test_v_prediction_is_read_off_the_file_and_never_taken_for_noise(folder: Path, tmp_path: Path) -> None:
    marked = rewritten(folder, tmp_path / "v", lambda s: s.update({"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}))
    model = load(marked)
    assert model.prediction == "v" and model.zero_terminal_snr
    schedule = model.schedule(4, 64, 64, "trailing")
    assert schedule.prediction == "v" and schedule.alphas[0] == 0 and schedule.sigmas[0] == 1
    assert bool(torch.isfinite(draw(model, schedule="trailing").latents).all())
    with pytest.raises(ConfigError, match="says that it predicts v, not epsilon"):
        load(marked, prediction="epsilon")
    said = rewritten(folder, tmp_path / "said", lambda s: None, {"modelspec.prediction_type": "v"})
    assert load(said).prediction == "v" and not load(said).zero_terminal_snr
    assert load(folder, prediction="v").prediction == "v"
    assert model.schedule(2, 64, 64, [14.0, 1.0, 0.0]).prediction == "v"
    edm = rewritten(folder, tmp_path / "edm", lambda s: s.update({"edm_mean": torch.zeros(4)}))
    with pytest.raises(CheckpointError, match="EDM's preconditioning"):
        load(edm)


def write_pipeline(folder: Path, target: Path, scheduler: dict[str, Any]) -> Path:
    """As the published diffusers folders: every network in its own, in diffusers' names."""
    model = load(folder)
    assert model.clip and model.clip_g
    for name, module in {"unet": model.network, "vae": model.autoencoder}.items():
        (target / name).mkdir(parents=True)
        save_network(module, target / name / "diffusion_pytorch_model.safetensors", layout="diffusers")
    for name, encoder, activation in (
        ("text_encoder", model.clip, "quick_gelu"),
        ("text_encoder_2", model.clip_g, "gelu"),
    ):
        (target / name).mkdir()
        metadata = {"eridiff.config": '{"clip_g": {}}'} if encoder is model.clip_g else {}
        write_tensors(encoder.module.state_dict(), target / name / "model.safetensors", metadata)
        (target / name / "config.json").write_text(json.dumps({"num_attention_heads": 2, "hidden_act": activation}))
    for name in ("tokenizer", "tokenizer_2"):
        (target / name).symlink_to(folder / "tokenizer")
    (target / "scheduler").mkdir()
    (target / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (target / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    return target


def test_a_diffusers_folder_generates_the_same_image_and_says_what_it_predicts(
    folder: Path, whole: SDXLInference, tmp_path: Path
) -> None:
    plain = load(write_pipeline(folder, tmp_path / "plain", {"prediction_type": "epsilon"}))
    assert torch.allclose(draw(plain).latents, draw(whole).latents, rtol=1e-4, atol=1e-3)
    model = load(
        write_pipeline(folder, tmp_path / "v", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
    )
    assert (model.prediction, model.zero_terminal_snr) == ("v", True)


def test_a_float16_autoencoder_decodes_in_float32(folder: Path) -> None:
    model = load(folder, dtype=torch.float16)
    assert next(model.network.parameters()).dtype == torch.float16
    assert next(model.autoencoder.parameters()).dtype == torch.float32


# refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"width": 80}, "the width must be a multiple of 32, not 80; the nearest is 64"),
        ({"schedule": "candle"}, "'candle' is not a schedule of SDXL; there are leading"),
        ({"schedule": [0.0, 14.0], "steps": None}, "sigmas must be at least two numbers that fall to 0"),
        ({"shift": 3.0}, "shift has no effect on the schedules of SDXL base"),
        ({"schedule": "turbo", "steps": 5}, "Turbo's own schedule has 1 to 4 steps, not 5"),
        ({"part": (0.8, 0.2)}, "part must be two rising shares"),
        ({"skip_layers": True}, "skip_layers has no effect on SDXL base"),
    ],
)
def test_impossible_settings_end_in_a_sentence(options: dict[str, Any], says: str, whole: SDXLInference) -> None:
    with pytest.raises(ConfigError, match=says):
        draw(whole, **options)


def test_what_does_not_fit_together_is_named(tmp_path: Path, folder: Path) -> None:
    refiner = tiny.write_sdxl_model(tmp_path / "r", tiny.SDXL_REFINER, "refiner")
    with pytest.raises(ConfigError, match="takes the inputs of refiner, not of base"):
        load(refiner, variant="base")
    lone = rewritten(
        folder, tmp_path / "lone", lambda s: [s.pop(n) for n in list(s) if n.startswith("conditioner.embedders.1")]
    )
    with pytest.raises(CheckpointError, match="a CLIP-G text encoder is missing: .* give the rest as clip_g"):
        load(lone)
    with pytest.raises(CheckpointError, match="holds an SDXL, FluxInference generates with a Flux"):
        eridiff.FluxInference(device="cpu").load_model(folder)
    unknown = rewritten(
        folder, tmp_path / "unknown", lambda s: s.update({"model.diffusion_model.extra.weight": torch.zeros(2)})
    )
    with pytest.raises(CheckpointError, match="unknown, the first is 'extra.weight'"):
        load(unknown)


def test_the_command_line_generates_with_sdxl(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "swan.png"
    options = [
        "--model",
        str(folder),
        "--empty-negative",
        "encoded",
        "--prompt",
        "a swan",
        "--size",
        "96x64",
        "--device",
        "cpu",
        "--steps",
        "2",
    ]
    assert (
        main(["sample", *options, "--sampler", "dpmpp_2m", "--schedule", "karras", "--cfg", "7", "--out", str(out)])
        == 0
    )
    text = Image.open(out).text  # type: ignore[attr-defined]
    assert "Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.0" in text["parameters"]
    refiner = tiny.write_sdxl_model(tmp_path / "r", tiny.SDXL_REFINER, "refiner")
    both = ["--refiner", str(refiner), "--hand-over", "0.5", "--size", "64x64", "--out", str(out)]
    assert main(["sample", *options, *both]) == 0
    assert json.loads(Image.open(out).text["eridiff"])["hand_over"] == 0.5  # type: ignore[attr-defined]
    written = "original_size: 512x768\n  crop: [16, 32]\n  aesthetic_score: 5"
    (tmp_path / "run.yaml").write_text(f"sample:\n  {written}\n")
    yaml = [str(tmp_path / "run.yaml"), *options, *both]
    line = ["--original-size", "512x768", "--crop", "16", "32", "--aesthetic-score", "5"]
    for arguments in (yaml, [*options, *both, *line]):
        assert main(["sample", *arguments]) == 0
        found = json.loads(Image.open(out).text["eridiff"])  # type: ignore[attr-defined]
        sizes = {"original_size": "512x768", "crop": [16, 32], "target_size": "64x64"}
        assert found | sizes | {"aesthetic_score": 5.0, "negative_aesthetic_score": 2.5} == found
    capsys.readouterr()
    refused = [
        (["--size", "80x64"], "a multiple of 32"), (["--variant", "refiner"], "not of refiner"),
        (["--aesthetic-score", "5"], "aesthetic_score has no effect on SDXL base"),
        (["--original-size", "512"], "--original-size must be WIDTHxHEIGHT such as 1024x768, not '512'"),
        (["--crop", "-8", "0"], "crop must be two whole numbers"),
    ]  # fmt: skip
    for extra, says in refused:
        assert main(["sample", *options, *extra]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eridiff:")]
        assert says in line


# the plan's tests -----------------------------------------------------------------------------------------------------


def test_model_loading(whole: SDXLInference, folder: Path) -> None:
    parts = locate(folder)
    assert set(parts.components) == {"unet", "vae", "clip", "clip_g"}
    assert tiny.every_tensor_is_in_its_place(parts, {"unet": whole.network, "vae": whole.autoencoder})


def test_text_encoding(whole: SDXLInference) -> None:
    first, second, other = (whole.encode_prompt(text).positive for text in ("a swan", "a swan", "a fox"))
    assert first.text.shape == (1, 77, 16) and first.pooled.shape == (1, 8)
    assert torch.equal(first.text, second.text) and not torch.allclose(first.text, other.text, atol=1e-3)
    assert whole.clip and whole.clip_g
    pair = whole.clip(whole.clip.tokenize(["a swan"])), whole.clip_g(whole.clip_g.tokenize(["a swan"]))
    assert torch.allclose(first.text, torch.cat([f.hidden[-2] for f in pair], dim=-1), atol=1e-5)
    assert torch.allclose(first.pooled, pair[1].projected, atol=1e-5)


def test_single_denoising_step(whole: SDXLInference) -> None:
    """One leading step from timestep 1 to no noise: (x - sigma * noise) / alpha, with the noise of a plain forward call."""
    prompt = Prompt(Conditioning(torch.randn(1, 77, 16), torch.randn(1, 8)))
    noise = whole.noise([0], 64, 64)
    found = whole.denoise(noise, prompt, 1, cfg_scale=1.0)
    a = (1 - 0.00085) * (1 - (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) / 999) ** 2)
    with torch.no_grad():
        p = prompt.positive
        output = whole.network(noise, p.text, told(p.pooled, [64, 64, 0, 0, 64, 64]), torch.tensor([[1.0]]))
    assert torch.allclose(found, (noise - (1 - a) ** 0.5 * output) / a**0.5, atol=1e-4)


def test_full_generation_with_a_prompt(whole: SDXLInference) -> None:
    options = {"width": 64, "height": 64, "steps": 3, "seed": 3}
    picture = whole.generate("a swan", **options).images[0]
    assert whole.generate("a swan", **options).images[0].tobytes() == picture.tobytes()
    for prompt, change in (("a fox", {}), ("a swan", {"seed": 4}), ("a swan", {"cfg_scale": 2.0})):
        assert whole.generate(prompt, **options | change).images[0].tobytes() != picture.tobytes()


@pytest.mark.parametrize(
    ("manifest", "parameters"), [("sd_xl_base_1.0", 2_567_463_684), ("sd_xl_refiner_1.0", 2_259_526_660)]
)
def test_memory_use(manifest: str, parameters: int, tmp_path: Path) -> None:
    """1024 x 1024 in bfloat16 with both prompts in one batch: everything together fits 24 GiB."""
    parts = locate(sparse_manifest(tmp_path / "m.safetensors", manifest))
    needed = {stage.name: stage.total for stage in stages(parts.components, 1024, 1024, guided=True, steps=50)}
    assert parameters * 2 < needed["denoising"] < parameters * 2 + 2**30
    assert sum(needed.values()) < 24 * 2**30


def test_base_and_refiner_fit_one_device_together(tmp_path: Path) -> None:
    """Both with all their encoders in bfloat16 at 1024 x 1024, even if every stage peaked at once."""
    total = 0
    for manifest in ("sd_xl_base_1.0", "sd_xl_refiner_1.0"):
        components = locate(sparse_manifest(tmp_path / f"{manifest}.safetensors", manifest)).components
        found = stages(components, 1024, 1024, guided=True, steps=50, vae_rows=64)
        total += sum(stage.total for stage in found)
    assert 10 * 2**30 < total < 24 * 2**30


def test_a_switch_without_a_refiner_is_reported(whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An error in Python and as a flag; one notice where a configuration says it, which may be for another model."""
    for ask in (whole.generate, lambda prompt, **given: next(whole.generate_each([{"prompt": prompt, **given}]))):
        with pytest.raises(ConfigError, match="hand_over has no effect without a refiner"):
            ask("a swan", hand_over=0.5, steps=1)
    model = ["--model", str(tiny.write_sdxl_model(tmp_path / "model")), "--steps", "1", "--device", "cpu"]
    (tmp_path / "run.yaml").write_text("sample: {prompts: [a swan], hand_over: 0.5, width: 64, height: 64}\n")
    assert main(["sample", *model, str(tmp_path / "run.yaml"), "--out", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr().err.count("hand_over has no effect without a refiner") == 1
    assert main(["sample", *model, "--prompt", "a swan", "--hand-over", "0.5", "--out", str(tmp_path / "b.png")]) == 2
    assert "hand_over has no effect without a refiner" in capsys.readouterr().err


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize("prediction", ["v", "epsilon"])
def test_zero_terminal_snr_goes_with_levels_that_need_a_finite_end(schedule: str, prediction: str) -> None:
    """The first level is diffusers' 4096, told as the last timestep."""
    from diffusers import EulerDiscreteScheduler

    from tests import families

    theirs = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True,
        timestep_spacing="trailing", use_karras_sigmas=schedule == "karras", use_exponential_sigmas=schedule == "exponential",
    )  # fmt: skip
    theirs.set_timesteps(5)
    given = families.inference("unet")
    model = SDXLInference(
        given.network, given.autoencoder, prediction=prediction, zero_terminal_snr=True, progress=False
    )
    points = model.schedule(5, 64, 64, schedule)
    sigmas = points.sigmas[:-1] / points.alphas[:-1]
    assert float(sigmas[0]) == pytest.approx(float(theirs.sigmas[0]), rel=1e-6) == pytest.approx(4096, rel=1e-6)
    assert float(points.times[0]) == pytest.approx(999) and bool((points.times.diff() < 0).all())
    ends = 4095.9998779296875, float(sigmas[-1])  # between these ends the levels are diffusers'
    spaced = theirs._convert_to_karras if schedule == "karras" else theirs._convert_to_exponential
    assert np.allclose(spaced(np.array(ends), 5), sigmas.numpy(), rtol=1e-6)
    prompt = Prompt(families.conditioning(model), families.conditioning(model, seed=5))
    latents = model.generate(conditioning=prompt, schedule=schedule, steps=5, width=64, height=64, seed=1, keep=("latents",)).latents  # fmt: skip
    assert latents is not None and bool(torch.isfinite(latents).all())
