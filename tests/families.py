"""The three families at tiny size, for tests that treat them alike: how they generate, what their `forward` takes."""

from typing import Any

import torch
from torch import Tensor

from eridiff import FluxInference, SD35Inference, SDXLInference
from eridiff.models.flux import patchify
from eridiff.text import Conditioning
from eridiff.training.objective import Levels
from tests import tiny

FAMILIES = ("flux", "mmdit", "unet")


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inference(family: str) -> Any:
    """Generates with a tiny network of the family; conditionings are passed."""
    options = {"device": "cpu", "progress": False}
    if family == "flux":
        return FluxInference(tiny.flux(), tiny.autoencoder(), **options)
    if family == "mmdit":
        return SD35Inference(tiny.mmdit(), tiny.autoencoder(), **options)
    return SDXLInference(tiny.unet(), tiny.autoencoder(tiny.SDXL_AUTOENCODER), **options)


def conditioning(model: Any, count: int = 1, seed: int = 0) -> Conditioning:
    """Of `count` different prompts, float32."""
    text, pooled = model.told_widths(model.network.config)
    shapes = {"text": (count, 5, text), "pooled": (count, pooled)}
    return Conditioning(**{n: rows(*s, seed=seed + i, dtype=torch.float32) for i, (n, s) in enumerate(shapes.items())})


def packed(family: str, latents: Tensor) -> Tensor:
    """Latents as the network takes them and gives its output."""
    return patchify(latents) if family == "flux" else latents


def inputs(model: Any, levels: Levels, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """What `forward` takes behind the latents, 4 x 4 of them, for a batch at these levels."""
    count = len(levels.times)
    told = conditioning(model, count).to("cpu", dtype)
    text, pooled, times = told.text, told.pooled, levels.times[None].to(dtype)
    if model.family == "flux":
        return text, pooled, times, (2, 2), torch.full((count,), 3.5, dtype=dtype)
    if model.family == "mmdit":
        return text, pooled, times
    numbers = rows(count, model.network.config.vector_width - pooled.shape[1], seed=9, dtype=dtype)
    return text, torch.cat([pooled, numbers], dim=1), times
