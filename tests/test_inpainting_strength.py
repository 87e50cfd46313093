"""Networks that are given the mask and the image around it, begun from the image: latents of every step are diffusers'."""

from typing import Any

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    StableDiffusionXLInpaintPipeline,
)
from PIL import Image
from torch import Tensor

from eridiff import FluxInference, SDXLInference
from eridiff.models.flux import patchify
from tests.test_diffusers import reference_flux
from tests.test_from_diffusers import flux_pipeline, sdxl_pipeline, unet, vae

SIDE, STEPS = 64, 4
PICTURE = Image.radial_gradient("L").resize((SIDE, SIDE)).convert("RGB")
MASK = Image.new("L", (SIDE, SIDE), 0)
MASK.paste(255, (16, 16, 48, 64))


def certain(autoencoder: Any) -> Any:
    """An encoder whose posterior is its mean, so that diffusers' sample from it leaves nothing to chance."""
    out = autoencoder.encoder.conv_out
    half = out.weight.shape[0] // 2
    out.weight.data[half:] = 0
    out.bias.data[half:] = -60
    return autoencoder


def flux_fill() -> tuple[Any, Any, Any]:
    """eridiff's, diffusers', and the latents after a step of eridiff's in diffusers' form."""
    pipe = flux_pipeline()
    pipe.transformer, pipe.vae = reference_flux(in_channels=384), certain(pipe.vae)
    theirs = FluxFillPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), pipe.vae, pipe.text_encoder, pipe.tokenizer,
        pipe.text_encoder_2, pipe.tokenizer_2, pipe.transformer,
    )  # fmt: skip
    return FluxInference.from_diffusers(theirs, progress=False), theirs, lambda step: patchify(step.latents)


def sdxl_inpainting() -> tuple[Any, Any, Any]:
    pipe = sdxl_pipeline()
    network = unet()
    wide = torch.nn.Conv2d(9, network.conv_in.out_channels, 3, padding=1)
    torch.nn.init.normal_(wide.weight, std=0.1, generator=torch.Generator().manual_seed(3))
    network.conv_in = wide.requires_grad_(False)
    network.register_to_config(in_channels=9)
    theirs = StableDiffusionXLInpaintPipeline(
        certain(vae(4, scaling_factor=0.13025)), pipe.text_encoder, pipe.text_encoder_2, pipe.tokenizer, pipe.tokenizer_2,
        network,
        EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
        ),
    )  # fmt: skip
    return (
        SDXLInference.from_diffusers(theirs, progress=False),
        theirs,
        lambda step: step.latents / (1 - step.sigma**2) ** 0.5,
    )  # variance-exploding


@pytest.mark.parametrize("make", [flux_fill, sdxl_inpainting])
@pytest.mark.parametrize("strength", [0.5, 0.75])
def test_strength_is_diffusers(make: Any, strength: float) -> None:
    model, theirs, packed = make()
    theirs.set_progress_bar_config(disable=True)
    noise, seen, ours = model.noise([1], SIDE, SIDE), [], []

    def keep(_: Any, i: int, t: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(values["latents"].clone())
        return values

    def draw(shape: Any, *_: Any, **__: Any) -> Tensor:
        return noise.clone()

    scale = {"guidance_scale": 30.0, "max_sequence_length": model.t5.length} if hasattr(model, "t5") else {"guidance_scale": 1.0}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{type(theirs).__module__}.randn_tensor", draw)
        theirs(
            prompt="a swan", image=PICTURE, mask_image=MASK, width=SIDE, height=SIDE, strength=strength,
            num_inference_steps=STEPS, callback_on_step_end=keep, output_type="latent", **scale,
        )  # fmt: skip
    asked = {} if hasattr(model, "t5") else {"cfg_scale": 1.0}
    model.generate(
        "a swan", image=PICTURE, mask=MASK, width=SIDE, height=SIDE, steps=STEPS, noise=noise, strength=strength,
        callback=lambda step: ours.append(packed(step).clone()) or False, **asked,
    )  # fmt: skip
    assert len(seen) == len(ours) == STEPS * strength
    for a, b in zip(seen, ours, strict=True):
        assert float((a - b).norm() / a.norm()) < 2e-5
