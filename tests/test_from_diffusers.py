"""Small pipelines of diffusers' classes, passed whole or in parts: what they train is what is generated."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from torch import nn

import eridiff
from eridiff import FluxInference, Prompt, SD35Inference, SDXLInference
from eridiff.adopt.layers import Elsewhere
from eridiff.errors import ConfigError
from eridiff.models.autoencoder import AutoencoderConfig
from eridiff.text import Conditioning
from eridiff.trace.record import relative_l2
from eridiff.training import Sampler, averaged_weights
from tests import tiny
from tests.test_diffusers import reference_flux, reference_sd3
from tests.test_handing_in import CLIP_TOKENIZER, T5_TOKENIZER, under_the_originals_names, without_projection

SECTION = {"prompts": ["a photo of a cat"], "sample_steps": 2, "width": 32, "height": 32, "seed": 1}


def vae(latent_channels: int = 16, **statistics: float) -> Any:
    """Four levels, so that 8 pixels are one latent."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(32, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=latent_channels,
        up_block_types=("UpDecoderBlock2D",) * 4, use_quant_conv=False, use_post_quant_conv=False, **statistics,
    ).eval().requires_grad_(False)  # fmt: skip


def unet() -> Any:
    return tiny.scaled(
        UNet2DConditionModel(
            block_out_channels=(32, 64, 64), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 1, 1),
            attention_head_dim=(1, 1, 1), cross_attention_dim=16, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=8 + 6 * 256, use_linear_projection=True, sample_size=8,
        )
    )  # fmt: skip


def flux_pipeline() -> Any:
    """T5's length is that of the published dev; 512 tokens of tiny width are cheap."""
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), vae(scaling_factor=0.5, shift_factor=0.25), without_projection(), CLIP_TOKENIZER,
        tiny.t5_module(), T5_TOKENIZER, reference_flux(),
    )  # fmt: skip


def sd3_pipeline(shift: float = 3.0) -> Any:
    """The pooled vectors are 4 + 4 wide, as the network takes 8."""
    small = small_clip()
    return StableDiffusion3Pipeline(
        reference_sd3(), FlowMatchEulerDiscreteScheduler(shift=shift), vae(scaling_factor=1.5305, shift_factor=0.0609),
        small, CLIP_TOKENIZER, small, CLIP_TOKENIZER, tiny.t5_module(), T5_TOKENIZER,
    )  # fmt: skip


def small_clip() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return tiny.randomised(
        CLIPTextModelWithProjection(
            CLIPTextConfig(vocab_size=844, hidden_size=4, intermediate_size=8, projection_dim=4, num_hidden_layers=2, num_attention_heads=2, bos_token_id=841, eos_token_id=842)
        )
    )  # fmt: skip


def sdxl_pipeline(zeros: bool = True, **scheduler: Any) -> Any:
    return StableDiffusionXLPipeline(
        vae(4, scaling_factor=0.13025), without_projection(), tiny.clip_module(), CLIP_TOKENIZER, CLIP_TOKENIZER, unet(),
        EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **scheduler),
        force_zeros_for_empty_prompt=zeros,
    )  # fmt: skip


PIPELINES = {
    "flux": (FluxInference, flux_pipeline),
    "sd3": (SD35Inference, sd3_pipeline),
    "sdxl": (SDXLInference, sdxl_pipeline),
}


@pytest.fixture(params=PIPELINES)
def family(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    kind, make = PIPELINES[request.param]
    return kind, make()


def network_of(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def own_memory(inference: Any) -> set[int]:
    """Where the inference has tensors that are not the trainer's."""
    theirs = {t.data_ptr() for one in inference.adopted for t in one.foreign.state_dict().values()}
    return {
        p.data_ptr()
        for one in inference.adopted
        for p in one.network.parameters()
        if not isinstance(p.data, Elsewhere) and p.data_ptr() not in theirs
    }


def test_a_sampler_needs_nothing_but_the_inference_and_its_section(family: tuple[Any, Any], tmp_path: Path) -> None:
    """It follows a LoRA of peft, copies nothing, and leaves the trainer's modules as they were."""
    kind, pipe = family
    network = network_of(pipe).requires_grad_(False).train()
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], lora_dropout=0.5, init_lora_weights=False))
    inference = kind.from_diffusers(pipe, progress=False)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    sampler = Sampler(inference, {**SECTION, "out": str(tmp_path)}, optimizer=optimizer, verify=True, raise_errors=True)
    images = []
    for step in range(2):
        images.append(sampler.sample(step).images[0].tobytes())
        assert not own_memory(inference)
        for p in trained:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert images[0] != images[1] and network.training
    assert inference.autoencoder.decoder.conv_in.weight is pipe.vae.decoder.conv_in.weight


def test_ema_weights_are_used_and_not_the_live_weights_again(tmp_path: Path) -> None:
    """The inference follows the live module by itself, but not where the Sampler has put EMA weights in its place."""
    inference = SDXLInference.from_diffusers(sdxl_pipeline(), progress=False)
    foreign = inference.adopted[0].foreign
    averages = {name: 0.9 * p.detach() for name, p in foreign.named_parameters()}  # under the trainer's names
    section = {**SECTION, "true_cfg_scale": 1.0, "out": str(tmp_path)}
    live, ema = Sampler(inference, section, ema=averages, verify=True, raise_errors=True).sample(0).images
    with averaged_weights(foreign, averages):
        inference.adopted[0].refresh()
        fresh = tiny.unet(inference.network.config)
        fresh.load_state_dict(inference.network.state_dict())
    inference.adopted[0].refresh()
    expected = SDXLInference(fresh, inference.autoencoder, inference.clip, inference.clip_g, progress=False)
    image = expected.generate("a photo of a cat", seed=1, steps=2, width=32, height=32, cfg_scale=1.0).images[0]
    assert ema.tobytes() == image.tobytes() != live.tobytes()


def test_outside_of_a_sampler_images_follow_too_and_nothing_is_copied_for_one(family: tuple[Any, Any]) -> None:
    kind, pipe = family
    inference = kind.from_diffusers(pipe, progress=False)
    held: list[set[int]] = []  # after each step
    asked: dict[str, Any] = {"seed": 1, "steps": 2, "width": 32, "height": 32, "keep": ("latents",)}
    asked["callback"] = lambda _: held.append(own_memory(inference))

    def draw() -> Any:
        return inference.generate("a photo of a cat", **asked).latents

    before = draw()
    with torch.no_grad():
        for name, p in network_of(pipe).named_parameters():
            if "to_v" in name:
                p.mul_(2)
    after = draw()
    assert relative_l2(after, before) > 1e-4
    assert torch.equal(after, kind.from_diffusers(pipe, progress=False).generate("a photo of a cat", **asked).latents)
    assert len(held) == 6 and not any(held)


def test_embeddings_are_those_of_the_pipeline(family: tuple[Any, Any]) -> None:
    kind, pipe = family
    inference = kind.from_diffusers(pipe, progress=False)
    prompt = "a photo of a cat"
    with torch.no_grad():
        if kind is FluxInference:
            text, pooled, _ = pipe.encode_prompt(prompt, prompt)
        elif kind is SD35Inference:
            text, _, pooled, _ = pipe.encode_prompt(prompt, prompt, prompt, do_classifier_free_guidance=False)
        else:
            text, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
    asked = {"t5_padding": "diffusers"} if kind is SD35Inference else {}
    found = inference.encode_prompt(prompt, **asked).positive
    assert relative_l2(found.text, text) < 1e-6 and relative_l2(found.pooled, pooled) < 1e-6


@pytest.mark.parametrize("length", [1, 64, 300, 512])
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_t5_has_as_many_rows_as_a_pipeline_is_asked_for(name: str, length: int) -> None:
    """diffusers' max_sequence_length, cut and padded, with T5 and, in SD 3, with the zeros in its place."""
    kind, make = PIPELINES[name]
    pipe, prompt = make(), "a photo of a cat on a mat, " * 20
    asked = {"t5_length": length, **({"t5_padding": "diffusers"} if name == "sd3" else {})}
    texts = (prompt,) * (2 if name == "flux" else 3)
    for t5 in (True, False) if name == "sd3" else (True,):
        if not t5:
            pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
        with torch.no_grad():
            text, *_ = pipe.encode_prompt(*texts, max_sequence_length=length)
        found = kind.from_diffusers(pipe, progress=False).encode_prompt(prompt, **asked).positive.text
        rows = slice(77 if name == "sd3" else 0, None)  # CLIP's rows of SD 3 are cut at a whole word here
        assert found.shape == text.shape and relative_l2(found[:, rows] + 1, text[:, rows] + 1) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_a_masked_t5_is_that_of_transformers_with_its_attention_mask(name: str) -> None:
    """As kohya's apply_t5_attn_mask: the mask of the tokenizer goes into T5 (library/strategy_flux.py, line 75) and the network."""
    kind, make = PIPELINES[name]
    pipe, prompt = make(), "a photo of a cat"
    tokenizer, t5 = (
        (pipe.tokenizer_2, pipe.text_encoder_2) if name == "flux" else (pipe.tokenizer_3, pipe.text_encoder_3)
    )
    told = tokenizer(prompt, max_length=40, padding="max_length", truncation=True, return_tensors="pt")
    expected = t5(told.input_ids, attention_mask=told.attention_mask).last_hidden_state
    asked = {"t5_padding": "diffusers"} if name == "sd3" else {}
    model = kind.from_diffusers(pipe, progress=False)
    found = model.encode_prompt(prompt, t5_length=40, t5_mask=True, **asked).positive
    assert relative_l2(found.text[:, -40:], expected) < 1e-6
    assert found.mask is not None and torch.equal(found.mask[:, -40:], told.attention_mask.bool())
    assert found.mask[:, :-40].all()
    assert relative_l2(model.encode_prompt(prompt, t5_length=40, **asked).positive.text[:, -40:], expected) > 1e-3


def test_single_objects_give_what_the_pipeline_gives(family: tuple[Any, Any]) -> None:
    kind, pipe = family
    names = [
        n
        for n in ("transformer", "unet", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
        if hasattr(pipe, n)
    ]
    tokenizers = [n for n in ("tokenizer", "tokenizer_2", "tokenizer_3") if hasattr(pipe, n)]
    parts = {name: getattr(pipe, name) for name in (*names, *tokenizers)}
    parts["vae"] = nn.DataParallel(parts["vae"])
    asked = {"seed": 1, "steps": 2, "width": 32, "height": 32}
    whole, single = kind.from_diffusers(pipe, progress=False), kind.from_diffusers(**parts, progress=False)
    images = [inference.generate("a cat", **asked).images[0].tobytes() for inference in (whole, single)]
    assert images[0] == images[1]


def test_what_the_configurations_say_is_followed() -> None:
    flux, sd3 = FluxInference.from_diffusers(flux_pipeline()), SD35Inference.from_diffusers(sd3_pipeline(shift=2.0))
    assert (flux.autoencoder.config.scale, flux.autoencoder.config.shift) == (0.5, 0.25)
    assert sd3.sampling.shift == 2.0 and sd3.variant == "sd3.5-medium"
    plain = SDXLInference.from_diffusers(sdxl_pipeline())
    assert (plain.prediction, plain.zero_terminal_snr, plain.sampling.empty_negative) == ("epsilon", False, "zeros")
    pipe = sdxl_pipeline(zeros=False, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    told = SDXLInference.from_diffusers(pipe)
    assert (told.prediction, told.zero_terminal_snr, told.sampling.empty_negative) == ("v", True, "encoded")
    told.set_variant("lightning")  # the pipeline's word is over the defaults of any variant
    assert (told.sampling.steps, told.sampling.empty_negative) == (4, "encoded")
    given = SDXLInference.from_diffusers(pipe, prediction="epsilon", zero_terminal_snr=False)
    assert (given.prediction, given.zero_terminal_snr) == ("epsilon", False)
    pipe.register_to_config(_name_or_path="stabilityai/sdxl-turbo")
    assert SDXLInference.from_diffusers(pipe).variant == "turbo"
    assert SDXLInference.from_diffusers(pipe, variant="base").variant == "base"
    schnell = FluxInference.from_diffusers(transformer=reference_flux(guidance=False), vae=vae())
    assert schnell.variant == "schnell"


def test_an_autoencoder_of_the_originals_names_has_the_statistics_of_its_family() -> None:
    theirs = under_the_originals_names(tiny.autoencoder(), "vae")
    sd3 = SD35Inference.from_diffusers(transformer=reference_sd3(), vae=theirs)
    flux = FluxInference.from_diffusers(transformer=reference_flux(), vae=theirs)
    assert (sd3.autoencoder.config.scale, sd3.autoencoder.config.shift) == (1.5305, 0.0609)
    assert (flux.autoencoder.config.scale, flux.autoencoder.config.shift) == (0.3611, 0.1159)
    theirs.scale_factor, theirs.shift_factor = 0.75, 0.5  # of the original's class
    said = SD35Inference.from_diffusers(transformer=reference_sd3(), vae=theirs)
    assert (said.autoencoder.config.scale, said.autoencoder.config.shift) == (0.75, 0.5)
    own = tiny.autoencoder(AutoencoderConfig(32, (1, 1, 2, 2), 1, scale=0.5))
    assert (
        SD35Inference.from_diffusers(transformer=reference_sd3(), vae=own).autoencoder is own
        and own.config.scale == 0.5
    )


def test_without_encoders_conditioning_is_passed(tmp_path: Path) -> None:
    inference = FluxInference.from_diffusers(transformer=reference_flux(), vae=vae(), progress=False)
    section = {**SECTION, "out": str(tmp_path)}
    with pytest.raises(ConfigError, match="no text encoders are loaded: pass conditioning"):
        Sampler(inference, section)
    cached = {"a photo of a cat": Prompt(Conditioning(torch.ones(1, 5, 12), torch.ones(1, 8)))}
    assert Sampler(inference, section, conditioning=cached, raise_errors=True).sample(0).failure is None


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("encoders", ["deleted before", "deleted after"])
def test_accelerate_may_prepare_and_encoders_may_go_before_or_after(order: str, encoders: str, tmp_path: Path) -> None:
    """Four orders, one run: losses bit for bit, and the same images."""

    def run(sampling: bool) -> tuple[list[float], list[bytes]]:
        AcceleratorState._reset_state(True)
        accelerator, pipe, images = Accelerator(cpu=True), flux_pipeline(), []
        network = pipe.transformer.requires_grad_(False).train()
        torch.manual_seed(0)
        network.add_adapter(LoraConfig(r=2, target_modules=["to_q"], lora_dropout=0.5))
        trained = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.1)
        with torch.no_grad():
            text, pooled, ids = pipe.encode_prompt("a photo of a cat", None, max_sequence_length=512)
        parts: dict[str, Any] = {"text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
        parts |= {"tokenizer": pipe.tokenizer, "tokenizer_2": pipe.tokenizer_2}
        cached: Any = None
        if encoders == "deleted before":
            parts, cached = {}, {"a photo of a cat": (text, pooled, ids)}

        def made(network: Any, optimizer: Any) -> Sampler:
            inference = FluxInference.from_diffusers(transformer=network, vae=pipe.vae, progress=False, **parts)
            section = {**SECTION, "out": str(tmp_path / order / encoders)}
            return Sampler(inference, section, optimizer=optimizer, conditioning=cached, verify=True, raise_errors=True)

        sampler = made(network, optimizer) if sampling and order == "before" else None
        model, stepper = accelerator.prepare(network, optimizer)
        sampler = made(model, stepper) if sampling and order == "after" else sampler
        if sampler is not None:
            sampler.inference.clip = sampler.inference.t5 = None
        losses, image_ids = [], torch.zeros(4, 3)
        for step in range(3):
            if sampler is not None:
                images.append(sampler.sample(step).images[0].tobytes())
            out = model(
                hidden_states=torch.randn(1, 4, 64), encoder_hidden_states=text, pooled_projections=pooled, timestep=torch.rand(1),
                guidance=torch.ones(1), img_ids=image_ids, txt_ids=ids,
            ).sample  # fmt: skip
            loss = out.square().mean()
            accelerator.backward(loss)
            stepper.step()
            stepper.zero_grad()
            losses.append(float(loss))
        return losses, images

    (with_images, images), (without, _) = run(True), run(False)
    assert with_images == without and len({*images}) == 3
    IMAGES.setdefault("any", images)
    assert images == IMAGES["any"]


IMAGES: dict[str, list[bytes]] = {}


def test_the_transformer_may_be_a_float16_module_with_a_compiled_wrapper() -> None:
    network = torch.compile(reference_flux().bfloat16())
    inference = FluxInference.from_diffusers(transformer=network, vae=vae().bfloat16(), progress=False)
    prompt = Prompt(Conditioning(torch.ones(1, 5, 12), torch.ones(1, 8)))
    result = inference.generate(conditioning=prompt, seed=1, width=32, height=32, steps=2)
    assert result.settings[0]["dtype"] == "bfloat16"


@pytest.mark.parametrize(("name", "value"), [("vram", "12GiB"), ("compile", True)])
def test_an_option_of_files_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} has no effect on modules that are passed"):
        FluxInference.from_diffusers(transformer=reference_flux(), **{name: value})


def test_from_diffusers_imports_nothing_of_diffusers() -> None:
    sources = [p.read_text() for p in Path(eridiff.__file__).parent.rglob("*.py")]
    assert not any("import diffusers" in text or "from diffusers" in text for text in sources)
    assert FluxTransformer2DModel.__module__.startswith("diffusers")
