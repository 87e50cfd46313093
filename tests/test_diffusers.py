"""diffusers' classes, live: the same weights through files of both layouts give the same numbers.

In float64 diffusers still takes its sinusoid and its rotary embedding in float32: the sinusoid is fed to both, the rotary
embedding bounds the comparison at 1e-7, and with a wide one the 1e-9 holds.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxTransformer2DModel,
    HeunDiscreteScheduler,
    LatentConsistencyModelPipeline,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.transformers import transformer_flux
from safetensors.torch import load_file
from torch import Tensor

from eridiff import load_network, save_network
from eridiff.models.flux import position_ids
from eridiff.models.unet import guidance_sinusoid
from eridiff.schedulers.discrete import alphas_cumprod, discrete_schedule, leading_timesteps, sigma_table, sigmas_at
from eridiff.schedulers.flow_match import flow_schedule
from eridiff.schedulers.samplers import SAMPLERS
from eridiff.schedulers.step import Past
from eridiff.trace.record import relative_l2
from eridiff.weights.keymap import key_map
from tests.golden.case import Float32Sinusoid, float32_sinusoid
from tests.tiny import randomised, scaled

GRID = (3, 4)


def both(reference: Any, layout: str, dtype: torch.dtype, folder: Path) -> tuple[Any, Any]:
    """eridiff's, filled from diffusers' file or from what we write of it in the original layout; and diffusers'."""
    reference.save_pretrained(folder / "m")
    path = folder / "m"
    if layout == "original":
        path = save_network(load_network(path), folder / "original.safetensors")
    return load_network(path, dtype=dtype), reference.to(dtype)


def reference_flux(guidance: bool = True, in_channels: int = 64) -> Any:
    return randomised(
        FluxTransformer2DModel(
            patch_size=1, in_channels=in_channels, out_channels=64, num_layers=2, num_single_layers=3, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=8, guidance_embeds=guidance, axes_dims_rope=(4, 6, 6),
        )
    )  # fmt: skip


class WideRotary(torch.nn.Module):
    """diffusers' rotary table without its cast to float32: cosines and sines, each angle twice in a row."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        widths = (4, 6, 6)
        angles = [
            ids[:, axis, None].double() / 10000 ** (torch.arange(0, width, 2).double() / width)
            for axis, width in enumerate(widths)
        ]
        twice = torch.cat(angles, dim=1).repeat_interleave(2, dim=1)
        return twice.cos(), twice.sin()


def wide_rotation(x: Tensor, freqs_cis: tuple[Tensor, Tensor], sequence_dim: int = 2) -> Tensor:
    """diffusers' rotation of `[B, S, H, D]` without its cast to float32."""
    assert sequence_dim == 1
    cos, sin = (table[None, :, None] for table in freqs_cis)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin


def flux_inputs(dtype: torch.dtype, in_channels: int = 64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(7)
    shapes = {"latents": (2, 12, in_channels), "text": (2, 5, 12), "pooled": (2, 8)}
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("guidance", "in_channels"), [(True, 64), (False, 64), (True, 128), (True, 384)])
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_flux_equals_diffusers(
    dtype: torch.dtype, guidance: bool, in_channels: int, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reference = both(reference_flux(guidance, in_channels), layout, dtype, tmp_path)
    x = flux_inputs(dtype, in_channels)
    times, scale = torch.tensor([0.3, 0.9], dtype=dtype), torch.tensor([3.5, 2.0], dtype=dtype) if guidance else None

    def ask() -> Tensor:
        return reference(
            hidden_states=x["latents"], encoder_hidden_states=x["text"], pooled_projections=x["pooled"], timestep=times,
            guidance=scale, img_ids=position_ids(GRID), txt_ids=torch.zeros(5, 3),
        ).sample  # fmt: skip

    with torch.no_grad():
        expected = ask()
        with Float32Sinusoid() if dtype == torch.float64 else nullcontext():
            found = model(x["latents"], x["text"], x["pooled"], times[None], GRID, scale)
        assert relative_l2(found, expected) < (1e-7 if dtype == torch.float64 else 5e-6)
        if dtype == torch.float64:
            reference.pos_embed = WideRotary()
            monkeypatch.setattr(transformer_flux, "apply_rotary_emb", wide_rotation)
            assert relative_l2(found, ask()) < 1e-9


def reference_sd3(qk_norm: str | None = "rms_norm", dual: tuple[int, ...] = (0,)) -> Any:
    reference: Any = SD3Transformer2DModel(
        sample_size=12, patch_size=2, in_channels=16, num_layers=3, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=128, pooled_projection_dim=8, out_channels=16, pos_embed_max_size=6,
        dual_attention_layers=dual, qk_norm=qk_norm,
    )  # fmt: skip
    return randomised(reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("qk_norm", "dual"), [(None, ()), ("rms_norm", (0, 1)), ("rms_norm", ())])
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_mmdit_equals_diffusers(
    dtype: torch.dtype, qk_norm: str | None, dual: tuple[int, ...], layout: str, tmp_path: Path
) -> None:
    """diffusers takes the mean square of its q/k norm in float32 whatever the input, which bounds those at 1e-7."""
    model, reference = both(reference_sd3(qk_norm, dual), layout, dtype, tmp_path)
    g = torch.Generator().manual_seed(7)
    shapes = {"latents": (2, 16, 6, 8), "text": (2, 5, 12), "pooled": (2, 8)}
    x = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
    times = torch.tensor([0.3, 0.9], dtype=torch.float64)

    def ask(**options: Any) -> Tensor:
        return reference(
            hidden_states=x["latents"], encoder_hidden_states=x["text"], pooled_projections=x["pooled"],
            timestep=(1000 * times).to(dtype), **options,
        ).sample  # fmt: skip

    with torch.no_grad(), Float32Sinusoid():
        bound = 5e-6 if dtype == torch.float32 else 1e-7 if qk_norm else 1e-12
        found = model(x["latents"], x["text"], x["pooled"], times[None])
        assert relative_l2(found, ask()) < bound
        skipped = model(x["latents"], x["text"], x["pooled"], times[None], skip_blocks=(1,))
        assert relative_l2(skipped, ask(skip_layers=[1])) < bound < relative_l2(skipped, found)


def reference_unet(refiner: bool = False, in_channels: int = 4, lcm: bool = False) -> Any:
    """Base- and refiner-like: the refiner has a fourth stage without transformers, but one in the middle."""
    plain, attending = "DownBlock2D", "CrossAttnDownBlock2D"
    down = (plain, attending, attending, *([plain] if refiner else []))
    return scaled(
        UNet2DConditionModel(
            in_channels=in_channels, block_out_channels=(64, 64, 128, 128)[: len(down)], down_block_types=down,
            up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(down)), layers_per_block=2,
            transformer_layers_per_block=2 if refiner else (1, 2, 3), attention_head_dim=(1, 1, 2, 2)[: len(down)],
            cross_attention_dim=24, addition_embed_type="text_time", addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=8 + 6 * 16, use_linear_projection=True,
            time_cond_proj_dim=256 if lcm else None,
        )
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("refiner", "in_channels", "lcm"), [(False, 4, False), (True, 4, False), (False, 9, False), (False, 4, True)]
)
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_the_unet_equals_diffusers(
    dtype: torch.dtype, refiner: bool, in_channels: int, lcm: bool, layout: str, tmp_path: Path
) -> None:
    model, reference = both(reference_unet(refiner, in_channels, lcm), layout, dtype, tmp_path)
    g = torch.Generator().manual_seed(7)
    x, text, pooled = (torch.randn(s, generator=g).to(dtype) for s in ((2, in_channels, 16, 8), (2, 5, 24), (2, 8)))
    times, numbers = torch.tensor([999.0, 61.375]), torch.tensor([[1024, 768, 0, 64, 832, 1216]] * 2)
    scale = torch.tensor([8.0, 3.0]) if lcm else None
    vector = torch.cat([pooled, float32_sinusoid(numbers, 16).flatten(1).to(dtype)], dim=1)
    with torch.no_grad(), Float32Sinusoid():
        added = {"text_embeds": pooled, "time_ids": numbers}
        condition = None if scale is None else guidance_sinusoid(scale).to(dtype)
        expected = reference(x, times, text, added_cond_kwargs=added, timestep_cond=condition).sample
        found = model(x, text, vector, times[None], scale)
    assert relative_l2(found, expected) < (5e-6 if dtype == torch.float32 else 1e-12)


def test_lcms_guidance_is_embedded_as_diffusers_does() -> None:
    scales = torch.tensor([3.0, 8.0, 13.0])
    expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, scales - 1, embedding_dim=256, dtype=torch.float64
    )
    assert relative_l2(guidance_sinusoid(scales), expected) < 5e-5  # diffusers' takes the logarithm of 10000 in float32


@pytest.mark.parametrize("rule", ["joint_blocks.{b}.text.last_modulation.*", "final.modulation.*"])
def test_halves_that_diffusers_swaps_are_swapped_back(rule: str, tmp_path: Path) -> None:
    """Names and shapes cannot tell whether scale or shift stands first: without the operation the image is another."""
    reference_sd3().save_pretrained(tmp_path / "m")
    (found,) = (r for r in key_map("mmdit").layouts["diffusers"].rules if r.native == rule)
    g = torch.Generator().manual_seed(7)
    x, text, pooled = (torch.randn(shape, generator=g) for shape in ((1, 16, 6, 8), (1, 5, 12), (1, 8)))
    outputs = []
    for operation in ("swap_halves", "same"):
        assert operation == "same" or found.operation == operation
        found.operation = operation
        try:
            outputs.append(load_network(tmp_path / "m")(x, text, pooled, torch.tensor([[0.5]])))
        finally:
            found.operation = "swap_halves"
    assert relative_l2(outputs[1], outputs[0]) > 0.02


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_samplers_equal_diffusers_schedulers(name: str) -> None:
    """On a network that is a fixed function, with diffusers' own table; its steps compute in float32."""
    kind = FlowMatchEulerDiscreteScheduler if name == "euler" else FlowMatchHeunDiscreteScheduler
    reference: Any = kind(shift=3.0)
    reference.set_timesteps(6)
    sigmas = torch.unique_consecutive(reference.sigmas).double()  # Heun's table holds each inner point twice
    schedule = flow_schedule(sigmas)
    weights = torch.randn(16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64) / 4

    def velocity(x: Tensor, sigma: float) -> Tensor:
        return torch.tanh(x @ weights) * (1 + sigma)

    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = x.clone()
    for t in reference.timesteps:
        theirs = reference.step(velocity(theirs, float(t) / 1000), t, theirs).prev_sample
    for i in range(schedule.steps):
        x, _ = SAMPLERS[name](lambda x, i: velocity(x, float(schedule.times[i])), x, schedule, i, [], None)
    assert relative_l2(x, theirs) < 5e-6


@pytest.mark.parametrize(("name", "kind"), [
    ("euler", EulerDiscreteScheduler), ("heun", HeunDiscreteScheduler), ("ddim", DDIMScheduler), ("dpmpp_2m", DPMSolverMultistepScheduler),
])  # fmt: skip
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_sdxls_samplers_equal_diffusers_schedulers(name: str, kind: Any, prediction: str) -> None:
    """On a network that is a fixed function, at the published spacing; diffusers' tables are float32, off by 1e-5."""
    steps, sizes = 10, (3, 4, 2, 2)
    reference = kind(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading",
        prediction_type="epsilon" if prediction == "epsilon" else "v_prediction",
        **({"clip_sample": False, "set_alpha_to_one": False} if name == "ddim" else {}),
    )  # fmt: skip
    reference.set_timesteps(steps)
    times = leading_timesteps(steps + 1)[:-1] if name == "dpmpp_2m" else leading_timesteps(steps)
    alphas = alphas_cumprod()
    final = float(sigma_table(alphas)[0]) if name == "ddim" else 0.0
    schedule = discrete_schedule(times, sigmas_at(times, alphas), prediction, final)
    weights = torch.randn(4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64) / 2

    def network(x: Tensor, t: float) -> Tensor:
        return torch.tanh(torch.einsum("kc,bchw->bkhw", weights, x)) + x * t / 2000

    noise = torch.randn(sizes, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = noise * float(reference.init_noise_sigma)
    for t in reference.timesteps:
        theirs = reference.step(network(reference.scale_model_input(theirs, t), float(t)), t, theirs).prev_sample
    x, past = noise, list[Past]()
    for i in range(steps):
        x, seen = SAMPLERS[name](lambda x, i: network(x, float(schedule.times[i])), x, schedule, i, past, None)
        past.append(seen)
    assert relative_l2(x, theirs) < 5e-5


def reference_autoencoder(quant: bool) -> Any:
    reference: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(32, 64, 64),
        layers_per_block=1, latent_channels=4, use_quant_conv=quant, use_post_quant_conv=quant, scaling_factor=0.5, shift_factor=0.1,
    )  # fmt: skip
    return randomised(reference)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("quant", [True, False])
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_the_autoencoder_equals_diffusers(
    dtype: torch.dtype, bound: float, quant: bool, layout: str, tmp_path: Path
) -> None:
    model, reference = both(reference_autoencoder(quant), layout, dtype, tmp_path)
    g = torch.Generator().manual_seed(7)
    picture, latents = torch.randn(1, 3, 16, 24, generator=g).to(dtype), torch.randn(1, 4, 4, 6, generator=g).to(dtype)
    with torch.no_grad():
        posterior = reference.encode(picture).latent_dist
        assert relative_l2(model.moments(picture)[0], posterior.mean) < bound
        assert relative_l2(model.encode(picture), (posterior.mean - 0.1) * 0.5) < bound
        assert relative_l2(model.decode(latents), reference.decode(latents / 0.5 + 0.1).sample) < bound


def test_what_we_save_diffusers_loads(tmp_path: Path) -> None:
    for reference in (reference_flux(), reference_sd3(), reference_unet()):
        reference.save_pretrained(tmp_path / "m")
        path = save_network(load_network(tmp_path / "m"), tmp_path / "again.safetensors", layout="diffusers")
        found, expected = load_file(path), reference.state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
