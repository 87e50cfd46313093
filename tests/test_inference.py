"""The way from a prompt to an image, with small random models: noise, guidance, images as input, what is refused."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import eridiff
import eridiff.images
from eridiff.errors import ConfigError, EridiffError
from eridiff.inference import FluxInference, Prompt, Step
from eridiff.memory.stages import on_device
from eridiff.models.flux import FluxConfig, patchify, unpatchify
from eridiff.schedulers import first_step
from eridiff.schedulers.flow_match import flux_mu
from eridiff.text import Conditioning
from tests import tiny

DEV = FluxConfig(64, 64, 8, 12, 32, 2, 4.0, 2, 2, (4, 6, 6))
SCHNELL = FluxConfig(64, 64, 8, 12, 32, 2, 4.0, 1, 1, (4, 6, 6), guidance=False)


def prompt(batch: int = 1, seed: int = 0) -> Conditioning:
    g = torch.Generator().manual_seed(seed)
    return Conditioning(torch.randn(batch, 5, 12, generator=g), torch.randn(batch, 8, generator=g))


@pytest.fixture(scope="module")
def dev() -> FluxInference:
    return FluxInference(tiny.flux(DEV), tiny.autoencoder(), device="cpu", progress=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return eridiff.load(tiny.write_model(tmp_path_factory.mktemp("model")), device="cpu", progress=False)


def draw(model: FluxInference, **options: Any) -> Any:
    given_options = {
        "conditioning": Prompt(prompt()),
        "width": 32,
        "height": 48,
        "steps": 2,
        "seed": 1,
        "keep": ("latents", "noise"),
    }
    return model.generate(**given_options | options)


def test_an_image_does_not_depend_on_its_neighbours(dev: FluxInference) -> None:
    both = draw(dev, seed=[3, 7])
    for i, seed in enumerate((3, 7)):
        alone = draw(dev, seed=seed)
        assert torch.equal(both.noise[i], alone.noise[0])
        assert torch.allclose(both.latents[i], alone.latents[0], atol=1e-4)
    assert [s["seed"] for s in both.settings] == [3, 7]


def test_the_same_call_gives_the_same_bits_and_leaves_the_random_state_alone(dev: FluxInference) -> None:
    state = torch.get_rng_state()
    first, second = draw(dev), draw(dev)
    assert torch.equal(first.latents, second.latents) and first.images[0].tobytes() == second.images[0].tobytes()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_loop_is_the_originals_euler_on_the_shifted_schedule(dev: FluxInference) -> None:
    """x += (t_next - t) * velocity, each velocity by a plain forward call."""
    found = draw(dev, steps=3, guidance_scale=2.0)
    x, p = found.noise, prompt()
    shift = math.exp(flux_mu(2 * 3))
    times = [shift / (shift + 1 / t - 1) if t else 0.0 for t in (1, 2 / 3, 1 / 3, 0)]
    for now, then in zip(times, times[1:], strict=False):
        velocity = dev.network(patchify(x), p.text, p.pooled, torch.tensor([[now]]), (3, 2), torch.tensor([2.0]))
        x = x + (then - now) * unpatchify(velocity, (3, 2))
    assert torch.allclose(found.latents, x, atol=1e-5)


def test_guidance_changes_the_image_and_true_guidance_of_one_does_not(dev: FluxInference) -> None:
    plain = draw(dev).latents
    assert not torch.allclose(draw(dev, guidance_scale=9.0).latents, plain, atol=1e-3)
    both = Prompt(prompt(), prompt(seed=5))
    assert torch.equal(draw(dev, conditioning=both, cfg_scale=1.0).latents, plain)
    assert torch.allclose(draw(dev, conditioning=both, cfg_scale=1.0 + 1e-9).latents, plain, atol=1e-4)
    guided = draw(dev, conditioning=both, cfg_scale=4.0, steps=1).latents
    positive = draw(dev, steps=1)
    negative = draw(dev, conditioning=Prompt(both.negative), steps=1).latents  # type: ignore[arg-type]
    assert torch.allclose(guided, negative + 4 * (positive.latents - negative), atol=1e-3)


def test_one_prompt_and_its_negative_serve_several_seeds(dev: FluxInference) -> None:
    both = Prompt(prompt(), prompt(seed=5))
    together = draw(dev, conditioning=both, cfg_scale=3.0, seed=[3, 7]).latents
    for i, seed in enumerate((3, 7)):
        assert torch.allclose(together[i], draw(dev, conditioning=both, cfg_scale=3.0, seed=seed).latents[0], atol=1e-3)


def test_true_guidance_without_a_negative_prompt_is_refused(dev: FluxInference) -> None:
    with pytest.raises(ConfigError, match="needs a negative prompt; an empty one is ''"):
        draw(dev, cfg_scale=2.0)


def test_a_guidance_that_the_network_lacks_is_refused() -> None:
    model = FluxInference(tiny.flux(SCHNELL), tiny.autoencoder(), device="cpu", progress=False)
    assert (model.variant, model.defaults()["steps"], model.defaults()["text_length"]) == ("schnell", 4, 256)
    with pytest.raises(ConfigError, match="guidance_scale has no effect as this network has no guidance embedding"):
        draw(model, guidance_scale=3.0)
    assert torch.equal(model.schedule(4, 32, 32).sigmas, torch.linspace(1, 0, 5, dtype=torch.float64))


def test_a_callback_reads_every_step_and_stops_the_run(dev: FluxInference) -> None:
    steps: list[Step] = []
    draw(dev, steps=4, callback=lambda step: steps.append(step))
    assert [s.index for s in steps] == [0, 1, 2, 3] and steps[-1].sigma == 0 and steps[0].latents.dtype == torch.float32
    seen: list[int] = []
    draw(dev, steps=4, callback=lambda step: seen.append(step.index) or step.index == 1)
    assert seen == [0, 1]


def test_latents_are_float32_between_steps_whatever_the_network_computes_in() -> None:
    model = FluxInference(tiny.flux(DEV).bfloat16(), tiny.autoencoder().bfloat16(), device="cpu", progress=False)
    assert draw(model).latents.dtype == torch.float32


# images as input ----------------------------------------------------------------------------------------------------


def checker(width: int = 32, height: int = 48) -> Image.Image:
    return Image.frombytes(
        "RGB",
        (width, height),
        bytes((x * 7 + y * 5 + c * 60) % 256 for y in range(height) for x in range(width) for c in range(3)),
    )


def test_strength_goes_from_the_image_to_the_noise(dev: FluxInference) -> None:
    image = checker()
    start = dev.encode_vae(eridiff.images.to_tensor(image, 32, 48))
    distances = [
        float((draw(dev, image=image, strength=s, steps=8).latents - start).norm()) for s in (0.0, 0.25, 0.5, 1.0)
    ]
    assert distances[0] == 0 and distances == sorted(distances)
    assert torch.allclose(draw(dev, image=image, strength=1.0).latents, draw(dev).latents, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.floats(0, 1))
def test_image_to_image_runs_its_share_of_the_steps(steps: int, strength: float) -> None:
    run = steps - first_step(steps, strength)
    assert 0 <= run <= steps and abs(run - steps * strength) <= 1 and (run > 0) == (strength > 0)


def test_inpainting_keeps_what_the_mask_does_not_paint(dev: FluxInference) -> None:
    image, mask = checker(), Image.new("L", (32, 48), 0)
    mask.paste(255, (0, 0, 16, 48))
    found = draw(dev, image=image, mask=mask, steps=4)
    start = dev.encode_vae(eridiff.images.to_tensor(image, 32, 48))
    assert torch.allclose(found.latents[..., 2:], start[..., 2:], atol=1e-5)
    assert not torch.allclose(found.latents[..., :2], start[..., :2], atol=1e-2)
    right = (16, 0, 32, 48)
    assert found.images[0].crop(right).tobytes() == image.crop(right).tobytes()


def test_an_empty_mask_gives_the_image_back(dev: FluxInference) -> None:
    image = checker()
    assert draw(dev, image=image, mask=Image.new("L", (32, 48), 0)).images[0].tobytes() == image.tobytes()


@pytest.mark.parametrize(("variant", "channels"), [("fill", 384), ("canny", 128), ("depth", 128)])
def test_extra_channels_reach_the_network(variant: str, channels: int) -> None:
    config = FluxConfig(channels, 64, 8, 12, 32, 2, 4.0, 1, 1, (4, 6, 6))
    model = FluxInference(tiny.flux(config), tiny.autoencoder(), variant=variant, device="cpu", progress=False)
    assert model.defaults()["guidance_scale"] == {"fill": 30, "canny": 30, "depth": 10}[variant]
    if variant == "fill":
        half = Image.new("L", (32, 48), 255)
        half.paste(0, (0, 0, 16, 48))
        first = draw(model, image=checker(), mask=Image.new("L", (32, 48), 255)).latents
        assert not torch.allclose(draw(model, image=checker(), mask=half).latents, first, atol=1e-4)
        other = checker()
        other.paste((9, 200, 9), (20, 4, 30, 40))  # under the mask: not seen
        assert torch.equal(draw(model, image=other, mask=half).latents, draw(model, image=checker(), mask=half).latents)
        with pytest.raises(ConfigError, match="needs an image and a mask"):
            draw(model, image=checker())
    else:
        first = draw(model, control=checker()).latents
        assert not torch.allclose(draw(model, control=Image.new("RGB", (32, 48))).latents, first, atol=1e-4)
        with pytest.raises(ConfigError, match="needs a control image"):
            draw(model)


def test_the_files_name_tells_depth_from_canny(tmp_path: Path) -> None:
    config = FluxConfig(128, 64, 8, 12, 32, 2, 4.0, 1, 1, (4, 6, 6))
    for name, variant in (("flux1-depth-dev", "depth"), ("flux1-canny-dev", "canny")):
        model = eridiff.load(tiny.write_model(tmp_path / name, config), device="cpu")
        assert model.variant == variant  # type: ignore[attr-defined]


def test_an_image_gives_its_size_rounded_down(dev: FluxInference) -> None:
    assert draw(dev, image=checker(50, 40), width=None, height=None).images[0].size == (48, 32)


# what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"width": 40}, "width must be a multiple of 16, not 40; the nearest is 32"),
        ({"height": 0}, "height must be between 16 and 16384, not 0"),
        ({"steps": 0}, "at least one step"),
        ({"steps": -3}, "at least one step, not -3"),
        ({"seed": -1}, "the seed must be a whole number from 0 to 2\\^63 - 1, not -1"),
        ({"seed": [1, 2, 3], "conditioning": Prompt(prompt(2))}, "do not match"),
        ({"seed": []}, "no seed"),
        ({"strength": 0.5}, "strength has no effect without the image that it is for"),
        ({"mask": Image.new("L", (32, 48))}, "mask has no effect without the image that it is for"),
        ({"image": checker(), "strength": 1.5}, "strength must be between 0 and 1"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be between"),
        ({"keep": ("images",)}, "'images' cannot be kept"),
        ({"control": checker()}, "control has no effect on Flux dev: Flux Canny and Depth follow a control image"),
        ({"image": torch.zeros(1, 3, 8, 8), "width": 16, "height": 16}, r"\[1, 3, 8, 8\], \[B, 3, 16, 16\] is needed"),
        ({"conditioning": None}, "no text encoders are loaded"),
    ],
)
def test_an_impossible_setting_is_one_sentence(dev: FluxInference, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        draw(dev, **options)


def test_no_prompt_is_refused(dev: FluxInference) -> None:
    with pytest.raises(ConfigError, match="no prompt was given"):
        dev.generate([])


def test_values_that_are_not_finite_name_their_stage(tmp_path: Path) -> None:
    network, autoencoder = tiny.flux(DEV), tiny.autoencoder()
    network.final.linear.bias.data[0] = float("nan")
    with pytest.raises(EridiffError, match="denoising gave .* not finite"):
        draw(FluxInference(network, autoencoder, device="cpu", progress=False))
    autoencoder.decoder.conv_out.bias.data[0] = float("inf")
    with pytest.raises(EridiffError, match="decoding gave .* not finite"):
        draw(FluxInference(tiny.flux(DEV), autoencoder, device="cpu", progress=False))


# every intermediate in and out ----------------------------------------------------------------------------------------


def test_what_is_kept_can_be_passed_again(whole: Any) -> None:
    first = whole.generate("a white swan", seed=5, keep=("conditioning", "noise", "latents"))
    again = whole.generate(conditioning=first.conditioning, noise=first.noise, keep=("latents",))
    assert torch.equal(first.latents, again.latents)
    assert torch.equal(whole.decode_vae(first.latents), whole.decode_vae(again.latents))
    assert whole.generate("a white swan", seed=5).latents is None


def test_the_settings_generate_the_same_image_again(whole: Any) -> None:
    result = whole.generate("a white swan", seed=11, steps=3)
    s = result.settings[0]
    again = whole.generate(
        s["prompt"],
        seed=s["seed"],
        steps=s["steps"],
        width=s["width"],
        height=s["height"],
        guidance_scale=s["guidance_scale"],
    )
    assert result.images[0].tobytes() == again.images[0].tobytes()


def test_a_negative_prompt_and_the_empty_one_are_encoded(whole: Any) -> None:
    plain = whole.encode_prompt("a swan")
    assert plain.negative is None
    both = whole.encode_prompt(["a swan", "a cat"], "")
    assert both.negative.text.shape == both.positive.text.shape == (2, 16, 12)
    assert torch.equal(both.negative.text[:1], whole.encode_prompt("").positive.text)


def test_offloading_by_stages_gives_the_same_image(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "m")
    plain, staged = (eridiff.load(folder, device="cpu", offload=o, progress=False) for o in (None, "stages"))
    assert plain.generate("a swan", seed=1).images[0].tobytes() == staged.generate("a swan", seed=1).images[0].tobytes()


def test_stages_are_on_the_device_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    from eridiff.inference import base

    model: Any = eridiff.load(tiny.write_model(tmp_path / "m"), device="cpu", offload="stages", progress=False)
    names = {
        id(model.clip.module): "clip",
        id(model.t5.module): "t5",
        id(model.network): "flux",
        id(model.autoencoder): "vae",
    }
    events: list[str] = []

    @contextmanager
    def watched(module: Any, device: torch.device, *_: object) -> Any:
        events.append(f"+{names[id(module)]}")
        yield
        events.append(f"-{names[id(module)]}")

    monkeypatch.setattr(base, "on_device", watched)
    model.generate("a swan", seed=1)
    assert events == ["+clip", "-clip", "+t5", "-t5", "+flux", "-flux", "+vae", "-vae"]


def test_tensors_move_to_the_device_and_the_modules_own_come_back() -> None:
    module = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)])
    module[1].weight = module[0].weight
    before = dict(module.state_dict(keep_vars=True))
    with pytest.raises(RuntimeError, match="inside"), on_device(module, torch.device("meta")):
        assert all(t.is_meta for t in module.state_dict().values())
        assert module[1].weight is module[0].weight
        raise RuntimeError("inside")
    after = module.state_dict(keep_vars=True)
    assert all(after[name] is before[name] for name in before)


def test_weights_in_training_are_what_is_generated_with(dev: FluxInference) -> None:
    network = tiny.flux(DEV)
    model = FluxInference(network, tiny.autoencoder(), device="cpu", progress=False)
    before = draw(model).latents
    network.final.linear.weight.data.mul_(1.5)
    assert not torch.allclose(draw(model).latents, before, atol=1e-3)


def test_a_model_without_a_tokenizer_says_what_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.write_model(tmp_path / "m")
    (folder / "tokenizer_2").unlink()
    monkeypatch.setattr("eridiff.text.tokenizers.T5_CACHED", [])
    with pytest.raises(EridiffError, match="no T5 tokenizer was found"):
        eridiff.load(folder)
    model = eridiff.load(
        {"path": folder, "tokenizers": {"t5": str(tiny.TOKENIZERS / "t5")}}, device="cpu", progress=False
    )
    assert len(model.generate("a swan", seed=1).images) == 1


def test_what_is_not_a_path_and_no_hub_id_is_one_sentence() -> None:
    for name in ("nowhere at all", "a/b/c", "/none/here.safetensors"):
        with pytest.raises(EridiffError, match="does not exist and is not a hub id"):
            eridiff.load(name)


def test_an_image_is_generated_without_dropout_and_modes_come_back() -> None:
    """Of a LoRA in training, whose set is not a part of the network, and of the network itself."""
    from eridiff import inject_lora

    network = tiny.flux(DEV)
    model = FluxInference(network, tiny.autoencoder(), progress=False)
    lora = inject_lora(network, 4, dropout=0.5)
    for parameter in lora.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    network.train(), model.autoencoder.train()
    modes = [m.training for m in [*network.modules(), *model.autoencoder.modules(), *lora.modules()]]
    state = torch.get_rng_state()
    training = draw(model).latents
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in [*network.modules(), *model.autoencoder.modules(), *lora.modules()]] == modes
    lora.eval()
    assert torch.equal(training, draw(model).latents)


def test_a_share_that_is_a_whole_number_of_steps_is_that_number() -> None:
    """Of all shares of two digits and up to 100 steps, also as NumPy's float32."""
    for steps in range(1, 101):
        for percent in range(101):
            wanted = steps - -(-steps * percent // 100)
            for share in (percent / 100, float(np.float32(percent / 100))):
                assert first_step(steps, share) == wanted, (steps, share)
