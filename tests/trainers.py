"""Small networks of diffusers' classes as trainers hold them, each with the inputs of both sides, and how they train and generate."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from eridiff import FluxInference, Prompt, SD35Inference, SDXLInference, load_lora
from eridiff.adopt import Adopted, adopt
from eridiff.lora import attach_lora
from eridiff.models.flux import position_ids
from eridiff.models.unet import size_vector
from eridiff.text import Conditioning
from eridiff.trace.record import relative_l2
from eridiff.training import Sampler
from tests import tiny
from tests.test_diffusers import GRID, flux_inputs, reference_flux, reference_sd3, scaled

BOUND = 1e-6


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_unet(**options: Any) -> Any:
    """With the embedding of sizes that SDXL has, so that it can generate."""
    return scaled(
        UNet2DConditionModel(
            block_out_channels=(32, 64, 128), down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
            up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"), layers_per_block=2, transformer_layers_per_block=(1, 1, 1),
            attention_head_dim=(1, 1, 2), cross_attention_dim=24, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=8 + 6 * 256, use_linear_projection=True, **options,
        )
    )  # fmt: skip


def small_vae(**options: Any) -> Any:
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**levels, block_out_channels=(32, 64), latent_channels=4, **options)


@dataclass(frozen=True)
class Family:
    make: Callable[[], Any]
    inputs: tuple[Any, ...]  # of eridiff's
    theirs: Callable[..., Any]  # diffusers' forward of the same
    targets: list[str]  # layers of all kinds: split here and joined there, with swapped halves, alone
    prefix: str  # of its LoRA files in kohya's format with diffusers' names
    inference: Any
    autoencoder: Any
    prompt: Any

    def ask(self, foreign: Any) -> Tensor:
        return self.theirs(foreign, *self.inputs).sample

    def distance(self, adopted: Adopted) -> float:
        """Between eridiff's and the trainer's own forward; dropout is off, and back afterwards."""
        with torch.no_grad():
            return relative_l2(adopted.network(*self.inputs), self.ask(adopted.foreign))


def flux_forward(model: Any, x: Tensor, text: Tensor, pooled: Tensor, times: Tensor, grid: Any, scale: Tensor) -> Any:
    return model(
        hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=times[0], guidance=scale,
        img_ids=position_ids(grid), txt_ids=torch.zeros(text.shape[1], 3),
    )  # fmt: skip


def sd3_forward(model: Any, x: Tensor, text: Tensor, pooled: Tensor, times: Tensor) -> Any:
    return model(hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=1000 * times[0])


NUMBERS = torch.tensor([[64, 64, 0, 0, 64, 64]] * 2)


def unet_forward(model: Any, x: Tensor, text: Tensor, vector: Tensor, times: Tensor) -> Any:
    added = {"text_embeds": vector[:, :8], "time_ids": NUMBERS}
    return model(x, times[0], text, added_cond_kwargs=added)


def prompt(width: int) -> Prompt:
    return Prompt(Conditioning(torch.ones(1, 5, width), torch.ones(1, 8)))


FLUX = flux_inputs(torch.float32)
FAMILIES = {
    "flux": Family(
        reference_flux,
        (FLUX["latents"], FLUX["text"], FLUX["pooled"], torch.tensor([[0.25, 0.5]]), GRID, torch.tensor([2.0, 1.0])),
        flux_forward,
        ["to_q", "to_v", "add_k_proj", "proj_mlp", "proj_out", "norm.linear", "norm1.linear", "norm_out.linear", "x_embedder", "linear_1"],
        "lora_transformer_",
        FluxInference,
        tiny.autoencoder,
        prompt(12),
    ),
    "sd3": Family(
        reference_sd3,
        (rows(2, 16, 6, 8), rows(2, 5, 12), rows(2, 8), torch.tensor([[0.3, 0.9]])),
        sd3_forward,
        ["to_k", "to_out.0", "add_q_proj", "ff.net.0.proj", "norm1_context.linear", "norm_out.linear", "context_embedder"],
        "lora_transformer_",
        SD35Inference,
        tiny.autoencoder,
        prompt(12),
    ),
    "sdxl": Family(
        small_unet,
        (rows(2, 4, 8, 8), rows(2, 5, 24), size_vector(rows(2, 8), NUMBERS.float()), torch.tensor([[500.0, 20.0]])),
        unet_forward,
        ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "time_emb_proj", "ff.net.2", "conv1", "conv_shortcut", "samplers.0.conv"],
        "lora_unet_",
        SDXLInference,
        lambda: tiny.autoencoder(tiny.SDXL_AUTOENCODER),
        prompt(24),
    ),
}  # fmt: skip


@contextmanager
def dropout_off(*modules: nn.Module) -> Iterator[None]:
    before = [(m, m.training) for module in modules for m in module.modules()]
    for m, _ in before:
        m.training = False
    yield
    for m, training in before:
        m.training = training


def train(family: Family, foreign: nn.Module, parameters: Any, steps: int = 1) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        family.ask(foreign).square().mean().backward()
        optimizer.step()


def differs_from_file(family: Family, adopted: Adopted, path: Path) -> float:
    """Between the adopted network and eridiff's own with the LoRA's file beside the base's weights; in float64, without rounding."""
    network = adopt(family.make().double(), allow_copies=True).network
    attach_lora(network, load_lora(path, network), dtype=torch.float64)
    inputs = [x.double() if isinstance(x, Tensor) else x for x in family.inputs]
    adopted.foreign.double()
    adopted.refresh()
    with torch.no_grad():
        return relative_l2(adopted.network(*inputs), network(*inputs))


def drawing(family: Family, adopted: Adopted, out: Path, **options: Any) -> Sampler:
    model = family.inference(adopted.network, family.autoencoder(), device="cpu", progress=False)
    model.encode_prompt = lambda *_: family.prompt
    section = {
        "prompts": ["a swan"],
        "sample_every": 5,
        "sample_steps": 2,
        "width": 64,
        "height": 64,
        "cfg_scale": 1,
        "seed": 1,
        "out": str(out),
    }
    return Sampler(model, section, adopted=adopted, raise_errors=True, verify=True, **options)


def pictures(sampler: Sampler, step: int) -> list[bytes]:
    return [image.tobytes() for image in sampler.sample(step).images]
