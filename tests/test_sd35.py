"""Stable Diffusion 3 from a prompt to an image, with small random models in the published files' form."""

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import eridiff
from eridiff.cli import main
from eridiff.errors import CheckpointError, ConfigError
from eridiff.inference import FluxInference, Prompt, SD35Inference, Step
from eridiff.inference.again import generate_again
from eridiff.models.mmdit import PRESETS, MMDiTConfig
from eridiff.request import ENCODING
from eridiff.schedulers.guidance import SkipLayers
from eridiff.text import Conditioning
from eridiff.text.tokenizers import all_windows, clip_tokenizer, published_clip_tokenizer, token_ids
from eridiff.weights.save import save_network, write_tensors
from tests import tiny
from tests.test_text import TINY

LONG = " ".join(f"swan{i}" for i in range(60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_sd3_model(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> SD35Inference:
    return load(folder)


def load(path: Any, **options: Any) -> SD35Inference:
    return tiny.load(SD35Inference, path, **options)


def draw(model: SD35Inference, prompt: Any = "a swan", **options: Any) -> Any:
    return tiny.draw(model, prompt, **{"width": 48, "height": 32} | options)


# the loop -------------------------------------------------------------------------------------------------------------


def test_the_loop_is_the_originals(whole: SD35Inference) -> None:
    """Its default: DPM++ 2M on its table, both prompts asked by plain forward calls, cfg 5."""
    found = draw(whole)
    p, sigmas = found.conditioning, whole.schedule(4, 48, 32).sigmas.tolist()
    assert found.settings[0]["cfg_scale"] == 5.0 and found.settings[0]["sampler"] == "dpmpp_2m"
    x, before = found.noise, None
    for i, (now, then) in enumerate(itertools.pairwise(sigmas)):
        time = torch.tensor([[now]])
        positive, negative = (whole.network(x, c.text, c.pooled, time) for c in (p.positive, p.negative))
        clean = x - now * (negative + 5.0 * (positive - negative))
        mean = clean
        if before is not None and then > 0:
            h, h_before = (torch.tensor(a / b).log() for a, b in ((now, then), (sigmas[i - 1], now)))
            mean = clean + (clean - before) / (2 * h_before / h)
        x, before = then / now * x + (1 - then / now) * mean, clean
    assert torch.allclose(found.latents, x, atol=1e-3 * float(x.abs().max()))


def test_every_sampler_and_schedule_generates_its_own_image(whole: SD35Inference) -> None:
    drawn = [
        draw(whole, sampler=name).latents for name in ("euler", "heun", "dpmpp_2m", "euler_ancestral", "dpmpp_2m_sde")
    ]
    drawn += [draw(whole, schedule="candle").latents, draw(whole, shift=1.0).latents]
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in itertools.combinations(drawn, 2))
    assert torch.allclose(draw(whole, schedule="diffusers").latents, drawn[2], rtol=1e-3, atol=1e-2)
    sigmas = whole.schedule(4, 48, 32, "candle").sigmas
    assert torch.equal(draw(whole, schedule=sigmas.tolist(), steps=None).latents, drawn[5])
    assert draw(whole, schedule=[1.0, 0.5, 0.0], steps=None).settings[0]["steps"] == 2


def test_the_scripts_schedule_has_shift_1_for_sd3_medium_alone() -> None:
    for name, shift in (("sd3-medium", 1.0), ("sd3.5-medium", 3.0), ("sd3.5-large", 3.0)):
        model = SD35Inference(tiny.mmdit(), tiny.autoencoder(), device="cpu")
        model.sampling = SD35Inference.variants[name]
        expected = model.schedule(10, 64, 64, "original", shift).sigmas
        assert torch.equal(model.schedule(10, 64, 64, "script").sigmas, expected)
        assert torch.equal(model.schedule(10, 64, 64).sigmas, model.schedule(10, 64, 64, shift=3.0).sigmas)


def test_a_scale_of_one_leaves_the_negative_prompt_out(whole: SD35Inference) -> None:
    plain = draw(whole, cfg_scale=1.0)
    assert plain.conditioning.negative is None
    both = draw(whole, cfg_scale=1.0, conditioning=whole.encode_prompt("a swan"))
    assert torch.allclose(both.latents, plain.latents, rtol=1e-4, atol=1e-2)  # encoded in another batch
    assert not torch.allclose(draw(whole, negative="a fox").latents, draw(whole).latents, atol=1e-3)


def test_skip_layers_take_the_published_setting_or_ones_own(whole: SD35Inference) -> None:
    plain = draw(whole, steps=30)
    assert plain.settings[0]["skip_layers"] is None
    found = draw(whole, steps=30, skip_layers=SkipLayers((1,), 2.5, 0.01, 0.2))
    assert not torch.allclose(found.latents, plain.latents, atol=1e-3)
    assert found.settings[0]["skip_layers"] == {"blocks": (1,), "scale": 2.5, "start": 0.01, "end": 0.2}
    with pytest.raises(
        ConfigError, match="^skip_layers has no effect on blocks 7, 8, 9: this network has 3, from 0 on$"
    ):
        draw(whole, steps=30, skip_layers=True)
    large = SD35Inference(tiny.mmdit(MMDiTConfig(16, 16, 16, 20, 128, 2, 2.0, 2, 6)), tiny.autoencoder(), device="cpu")
    with pytest.raises(ConfigError, match="no published skip-layer guidance for sd3.5-large"):
        draw(large, conditioning=Prompt(conditioning()), skip_layers=True)


def conditioning(rows: int = 77) -> Conditioning:
    g = torch.Generator().manual_seed(0)
    return Conditioning(torch.randn(1, rows, 20, generator=g), torch.randn(1, 16, generator=g))


def test_images_begin_from_images_and_masks_keep_what_is_black(whole: SD35Inference) -> None:
    image = Image.radial_gradient("L").resize((48, 32)).convert("RGB")
    start = whole.encode_vae(eridiff.images.to_tensor(image, 48, 32))
    near, far = (draw(whole, image=image, strength=s, sampler="euler", cfg_scale=1.0).latents for s in (0.25, 1.0))
    assert (near - start).norm() < (far - start).norm()
    mask = Image.new("L", (48, 32), 0)
    assert draw(whole, image=image, mask=mask).images[0].tobytes() == image.tobytes()


def test_a_callback_sees_the_clean_image_of_every_step(whole: SD35Inference) -> None:
    steps: list[Step] = []
    found = draw(whole, callback=steps.append)
    assert [s.index for s in steps] == [0, 1, 2, 3]
    assert torch.equal(steps[-1].clean, found.latents)  # the last step goes all the way


def test_bfloat16_networks_and_offloaded_stages_generate_the_same_way(folder: Path, whole: SD35Inference) -> None:
    expected = draw(whole, cfg_scale=1.0).latents
    half = load(folder, dtype=torch.bfloat16)
    assert draw(half, cfg_scale=1.0).latents.dtype == torch.float32
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}
    assert half.network.positions.table.dtype == torch.float32  # the file's
    assert torch.equal(draw(load(folder, offload="stages"), cfg_scale=1.0).latents, expected)


def write_all_in_one(folder: Path, target: Path) -> Path:
    """As sd3_medium_incl_clips_t5xxlfp16: every part in one file."""
    tensors = load_file(folder / "sd3.safetensors")
    for name, place in (("clip_l", "clip_l"), ("clip_g", "clip_g"), ("t5", "t5xxl")):
        part = load_file(folder / f"{name}.safetensors")
        tensors |= {f"text_encoders.{place}.transformer.{key}": tensor for key, tensor in part.items()}
    heads = {
        "clip": {"num_attention_heads": 2, "hidden_act": "quick_gelu"},
        "clip_g": {"num_attention_heads": 2, "hidden_act": "gelu"},
    }
    target.mkdir()
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        (target / name).symlink_to(folder / name)
    metadata = {"eridiff.sampling": '{"steps": 2, "width": 32, "height": 32}', "eridiff.config": json.dumps(heads)}
    write_tensors(tensors, target / "all.safetensors", metadata)
    return target


def write_pipeline(folder: Path, target: Path) -> Path:
    """As the published diffusers folders: every network in its own, in diffusers' names."""
    model = load(folder)
    parts = {"transformer": model.network, "vae": model.autoencoder}
    for name, module in parts.items():
        (target / name).mkdir(parents=True)
        save_network(module, target / name / "diffusion_pytorch_model.safetensors", layout="diffusers")
    for name, encoder, activation in (
        ("text_encoder", "clip_l", "quick_gelu"),
        ("text_encoder_2", "clip_g", "gelu"),
        ("text_encoder_3", "t5", ""),
    ):
        (target / name).mkdir()
        metadata = {"eridiff.config": '{"clip_g": {}}'} if encoder == "clip_g" else {}
        write_tensors(load_file(folder / f"{encoder}.safetensors"), target / name / "model.safetensors", metadata)
        heads = {"num_attention_heads": 2, "hidden_act": activation} if activation else {}
        (target / name / "config.json").write_text(json.dumps(heads))
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        (target / name).symlink_to(folder / name)
    (target / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    return target


@pytest.mark.parametrize("write", [write_all_in_one, write_pipeline])
def test_every_form_of_the_files_generates_the_same_image(
    write: Any, folder: Path, whole: SD35Inference, tmp_path: Path
) -> None:
    model = load(write(folder, tmp_path / "other"))
    assert (model.variant, model.autoencoder.config) == (whole.variant, whole.autoencoder.config)
    found = draw(model, prompt := "a swan, a fox")
    assert torch.equal(found.latents, draw(whole, prompt).latents)


# variants -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "steps", "cfg_scale", "sampler"),
    [
        ("sd3-medium", 50, 5.0, "dpmpp_2m"),
        ("sd3.5-medium", 50, 5.0, "dpmpp_2m"),
        ("sd3.5-large", 40, 4.5, "dpmpp_2m"),
        ("sd3.5-large-turbo", 4, 1.0, "euler"),
    ],
)
def test_each_variant_has_the_published_defaults(name: str, steps: int, cfg_scale: float, sampler: str) -> None:
    assert name in SD35Inference.possible_variants(PRESETS[name])
    found = SD35Inference.variants[name]
    assert (found.steps, found.cfg_scale, found.sampler, found.shift) == (steps, cfg_scale, sampler, 3.0)


def test_turbo_is_recognised_by_its_name_or_by_option(tmp_path: Path) -> None:
    large = MMDiTConfig(16, 16, 16, 20, 128, 2, 2.0, 2, 6)
    folder = tiny.write_sd3_model(tmp_path / "m", large)
    assert load(folder).variant == "sd3.5-large" and load(folder).sampling.cfg_scale == 4.5
    assert load(folder, variant="sd3.5-large-turbo").sampling.cfg_scale == 1.0
    (folder / "sd3.safetensors").rename(folder / "sd3.5_large_turbo.safetensors")
    assert load(folder).variant == "sd3.5-large-turbo"


# text -----------------------------------------------------------------------------------------------------------------


def test_both_clips_stand_side_by_side_before_t5(whole: SD35Inference) -> None:
    found = whole.encode_prompt("a swan").positive
    assert whole.clip and whole.clip_g and whole.t5
    assert found.text.shape == (1, 77 + 77, 20) and found.pooled.shape == (1, 16)
    first = whole.clip(whole.clip.tokenize(["a swan"]))
    second = whole.clip_g(whole.clip_g.tokenize(["a swan"]))
    assert torch.allclose(found.text[:, :77, :8], first.hidden[-2], atol=1e-5)
    assert torch.allclose(found.text[:, :77, 8:16], second.hidden[-2], atol=1e-5)
    assert bool((found.text[:, :77, 16:] == 0).all())
    assert torch.allclose(found.pooled, torch.cat([first.pooled, second.projected], dim=1), atol=1e-5)
    assert whole.clip_g.tokenize(["a swan"])[0, -1] == 0 and whole.clip.tokenize(["a swan"])[0, -1] == 842


def test_t5_takes_what_the_prompt_needs_from_77_to_256_tokens(whole: SD35Inference) -> None:
    lengths = [whole.encode_prompt(" ".join(["fox"] * n)).positive.text.shape[1] - 77 for n in (1, 60, 500)]
    assert lengths[0] == 77 and 77 < lengths[1] < 256 and lengths[2] == 256
    prompt = whole.encode_prompt("a swan", " ".join(["fox"] * 60))
    assert prompt.negative and prompt.positive.text.shape == prompt.negative.text.shape
    fixed = whole.encode_prompt("a swan", t5_padding="diffusers").positive
    assert fixed.text.shape == (1, 77 + 256, 20)


def test_a_padding_token_that_is_typed_is_a_token_of_the_prompt(whole: SD35Inference) -> None:
    assert whole.t5 is not None
    text = "<pad> " * 40 + "a fox at night " * 20
    ids = whole.t5.tokenize([text], 77)
    assert ids[0].tolist() == whole.t5.tokenizer(text).input_ids and bool(whole.t5.real(ids).all())
    both = whole.t5.tokenize(["a <pad> swan", text], 77)
    assert whole.t5.real(both).sum(1).tolist() == [len(whole.t5.tokenizer(t).input_ids) for t in ("a <pad> swan", text)]


def test_without_t5_its_rows_are_zeros_or_left_out(tmp_path: Path) -> None:
    folder = tiny.write_sd3_model(tmp_path / "m", MMDiTConfig(16, 16, 16, 4096, 128, 2, 2.0, 2, 6), t5=False)
    for options, rows in (({}, 77), ({"t5_padding": "diffusers"}, 256), ({"without_t5": "none"}, 0)):
        model = load(folder)
        text = model.encode_prompt("a swan", **options).positive.text
        assert (
            text.shape == (1, 77 + rows, 4096)
            and bool((text[:, 77:] == 0).all())
            and bool((text[:, :77, :16] != 0).any())
        )
        assert draw(model, **options).images[0].size == (48, 32)


def test_each_encoder_may_have_its_own_prompt(whole: SD35Inference) -> None:
    same, apart = (whole.encode_prompt(p).positive for p in ("a swan", {"clip": "a swan", "t5": "a fox on the sea"}))
    assert torch.equal(same.text[:, :77], apart.text[:, :77]) and torch.equal(same.pooled, apart.pooled)
    assert not torch.allclose(same.text[:, 77:], apart.text[:, 77:])
    found = draw(whole, {"clip": "a swan", "t5": "a fox"})
    assert found.settings[0]["prompt"] == {"clip": "a swan", "t5": "a fox"}
    with pytest.raises(ConfigError, match="names clip, clip_g, t5, not t6"):
        whole.encode_prompt({"t6": "a swan"})


def test_a_long_prompt_keeps_its_first_window_of_whole_words(caplog: pytest.LogCaptureFixture) -> None:
    """As the original: a word that does not fit is left out whole, unless it has 8 tokens or more."""
    tokenizer = published_clip_tokenizer()
    with caplog.at_level(logging.WARNING):
        found = token_ids(tokenizer, LONG, 77, 0, "CLIP-G", whole_words=True)
    words = tokenizer.decode(found[1 : found.index(49407)]).split()
    assert LONG.startswith(" ".join(words)) or LONG.replace(" ", "").startswith("".join(words))
    cut = caplog.records[0].getMessage().split("'")[1]
    kept = LONG.removesuffix(cut).strip()
    assert tokenizer(kept).input_ids == found[: found.index(49407) + 1] and found[-1] == 0
    giant = "a " * 70 + "x7" * 30  # one word of many tokens is cut where the window ends
    assert token_ids(tokenizer, giant, 77, 0, "CLIP-G", whole_words=True).index(49407) == 76


def test_all_windows_of_a_long_prompt_are_read_by_option(folder: Path) -> None:
    case, tokenizer = TINY["windows_of_75"], clip_tokenizer(tiny.TOKENIZERS / "clip")

    def windows(tokenizer: Any, prompt: str, *told: int, **options: int) -> list[int]:
        return [token for token, _ in all_windows(tokenizer, [(prompt, 1.0)], *told, **options)]

    for key, pad in (("pad_eos", 842), ("pad_zero", 0)):
        expected = [token for window in case[key] for token in window]
        assert windows(tokenizer, case["prompt"], 77, pad) == expected
    assert windows(tokenizer, "", 77, 842) == case["empty"][0]
    assert windows(tokenizer, "", 77, 842, windows=2) == case["empty"][0] * 2

    model, prompt = load(folder), case["prompt"]
    assert model.clip and model.clip_g
    count = model.clip.windows_needed([prompt])
    ids = model.clip.tokenize([prompt], windows=count)
    together, alone = model.clip(ids), model.clip(ids[:, 77:154])
    assert torch.allclose(together.hidden[-2][:, 77:154], alone.hidden[-2], atol=1e-6)
    assert torch.allclose(together.pooled, model.clip(ids[:, :77]).pooled, atol=1e-6)
    pair = model.encode_prompt(prompt, "a fox", clip_windows="all")
    assert pair.negative and pair.positive.text.shape == pair.negative.text.shape
    t5_rows = load(folder).encode_prompt(prompt).positive.text.shape[1] - 77
    assert count > 1 and pair.positive.text.shape[1] == 77 * count + t5_rows


def test_a_record_of_before_encodes_its_prompt_as_then(whole: SD35Inference) -> None:
    """When the choices of the text were options of loading, all of them were written down, whether they had an effect or not."""
    prompt = TINY["windows_of_75"]["prompt"]
    result = draw(whole, prompt, t5_padding="diffusers", clip_windows="all")
    old = {name: value for name, value in result.settings[0].items() if name not in ENCODING}
    told = {"t5_padding": "diffusers", "without_t5": "zeros", "clip_windows": "all", "t5_mask": False}
    assert generate_again(whole, old | told).images[0].tobytes() == result.images[0].tobytes()
    assert generate_again(whole, old).images[0].tobytes() != result.images[0].tobytes()


# refused --------------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_together_is_named(tmp_path: Path, folder: Path) -> None:
    flux = tiny.write_model(tmp_path / "flux")
    with pytest.raises(CheckpointError, match="holds a Flux, SD35Inference generates with a Stable Diffusion 3"):
        SD35Inference(device="cpu").load_model(flux)
    with pytest.raises(CheckpointError, match="holds a Stable Diffusion 3, FluxInference generates with a Flux"):
        FluxInference(device="cpu").load_model(folder)
    assert (
        load(folder, variant="sd3.5-large").sampling.cfg_scale == 4.5
    )  # weights may be trained for another way of sampling
    parts = {
        "transformer": folder / "sd3.safetensors",
        "vae": folder / "sd3.safetensors",
        "clip": folder / "clip_l.safetensors",
    }
    with pytest.raises(CheckpointError, match="a CLIP-G text encoder is missing: .* give the rest as clip_g"):
        load(parts)
    with pytest.raises(CheckpointError, match="holds a CLIP text encoder, not a CLIP-G text encoder"):
        load({**parts, "clip_g": folder / "clip_l.safetensors"})
    other = tiny.write_sd3_model(tmp_path / "wide", MMDiTConfig(16, 16, 16, 24, 128, 2, 2.0, 2, 6))
    with pytest.raises(CheckpointError, match="give 20 features a token and 16 pooled, .* takes 24 and 16"):
        load({"path": other, "t5": folder / "t5.safetensors"})
    with pytest.raises(ConfigError, match="FluxInference has no option 'prediction'"):
        eridiff.load(flux, prediction="v")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"width": 112}, "larger than this network's table of positions: at most 96 a side"),
        ({"width": 40}, "the width must be a multiple of 16"),
        ({"sampler": "plm"}, "'plm' is not a sampler; there are euler, euler_ancestral"),
        ({"sampler": "plms"}, "sampler has no effect on sd3.5-medium: plms is for discrete noise levels"),
        ({"schedule": "leading"}, "'leading' is not a schedule of SD 3; there are original, script, diffusers, candle"),
        ({"schedule": [0.0, 1.0], "steps": None}, "sigmas must be"),
        ({"shift": -1.0}, "shift must be between"),
        ({"cfg_interval": (0.5, 0.2)}, "cfg_interval must be two rising shares"),
        ({"cfg_rescale": 2.0}, "cfg_rescale must be between 0 and 1"),
        ({"control": Image.new("RGB", (48, 32))}, "control has no effect on sd3.5-medium"),
    ],
)
def test_impossible_settings_end_in_a_sentence(options: dict[str, Any], says: str, whole: SD35Inference) -> None:
    with pytest.raises(ConfigError, match=says):
        draw(whole, **options)


def test_prompts_of_different_length_are_refused_with_what_to_do(whole: SD35Inference) -> None:
    pair = Prompt(conditioning(), conditioning(154))
    with pytest.raises(ConfigError, match="77 rows of text and the negative one 154: encode them in one call"):
        draw(whole, conditioning=pair)


def test_the_command_line_generates_with_sd3(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {folder}\nsample:\n  prompts: [a swan, {{clip: a fox, t5: a fox on the sea}}]\n"
        "  t5_padding: diffusers\n  sample_steps: 2\n  guidance_scale: 3\n  sampler: flowmatch\n  skip_layers: {blocks: [1]}\n"
        f"  cfg_interval: [0, 0.5]\n  width: 32\n  height: 48\n  out: {tmp_path / 'out'}\n"
    )
    assert main(["sample", str(config), "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "guidance_scale 3 is taken as cfg_scale 3: this model has no guidance embedding" in said.err
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["0000-a-swan.png", "0000-contact-sheet.png", "0001-a-fox.png"]
    text = Image.open(tmp_path / "out" / names[0]).text  # type: ignore[attr-defined]
    assert "Sampler: Euler, CFG scale: 3.0" in text["parameters"]
    options = [
        "--model",
        str(folder),
        "--prompt",
        "x",
        "--size",
        "32x32",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "one.png"),
    ]
    assert (
        main(
            [
                "sample",
                *options,
                "--steps",
                "1",
                "--sampler",
                "heun",
                "--schedule",
                "candle",
                "--quiet",
            ]
        )
        == 0
    )
    for extra, says in (
        (["--variant", "dev"], "'dev' is not a variant of Stable Diffusion 3; there are sd3-medium"),
        (["--skip-layers"], "skip_layers has no effect on blocks 7, 8, 9"),
        (["--schedule", "x"], "'x' is not a schedule of SD 3"),
        (["--size", "960x32"], "larger than this network's table"),
    ):
        assert main(["sample", *options, *extra]) == 2
        assert says in capsys.readouterr().err.splitlines()[-1]
