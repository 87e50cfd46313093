"""What goes into the loop and what comes out: noise from seeds, masks, where a run begins, values that must be finite."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eridiff.errors import CheckpointError, ConfigError, EridiffError
from eridiff.models.flux import unpatchify
from eridiff.schedulers import Schedule
from eridiff.schedulers.samplers import EXPLODING
from eridiff.schedulers.step import Draw

LATENT_SCALE = 8  # pixels a latent's side, in every autoencoder of the three families


def noises(seeds: Sequence[int], shape: Sequence[int], asked: Any, device: torch.device) -> Draw:
    """Noise of images `[C, H / 8, W / 8]`, each time anew: that of the start, then that of samplers' steps; float32.

    With the defaults it depends neither on an image's neighbours nor on the device nor on torch's defaults. `asked`, a
    `Request`, has the other ways: one generator makes the noise of a batch by one call, which a GPU's gives other values than
    calls for one image each. Raises ConfigError for a row of a batch where several images are asked for.
    """
    one, row, packed = asked.noise_generator != "each", asked.noise_row, asked.noise_layout == "packed"
    if row is not None and len(seeds) != 1:
        raise ConfigError(f"noise_row is of one image, and {len(seeds)} are asked for")
    place = device if asked.noise_device == "model" else torch.device("cpu")
    generators = [torch.Generator(place).manual_seed(seed) for seed in (seeds[:1] if one else seeds)]
    rows = (len(seeds) if row is None else row[1]) if one else 1
    channels, height, width = shape
    form = (height * width // 4, channels * 4) if packed else tuple(shape)

    def made(rows: int, generator: torch.Generator) -> Tensor:
        dtype = getattr(torch, asked.noise_dtype)
        return torch.randn((rows, *form), generator=generator, device=place, dtype=dtype).float()

    def draw() -> Tensor:
        noise = torch.cat([made(rows, generator) for generator in generators])
        noise = noise if row is None else noise[row[0] : row[0] + 1]
        return unpatchify(noise, (height // 2, width // 2)) if packed else noise

    for generator in generators * asked.noise_skip:
        made(1, generator)
    return draw


def rounded(x: Tensor, dtype: str, schedule: Schedule, i: int, sampler: str) -> Tensor:
    """Latents at point `i`, rounded to a dtype in the space in which diffusers' sampler of that name has them; else as they are."""
    if dtype == "float32":
        return x
    exploding = sampler in EXPLODING and schedule.prediction != "velocity"
    scale = (float(schedule.alphas[i]) if exploding else 1.0) or 1.0  # of zero terminal SNR's first point, 4096 there
    return (x / scale).to(getattr(torch, dtype)).to(x.dtype) * scale


def as_told(values: Tensor, dtype: str, unit: int = 1000) -> Tensor:
    """Times or guidance as a program gives them to its network that computes `unit` times them in a dtype (`time_dtype`).

    `bfloat16` rounds the values and then the product, as the original Flux; `bfloat16_timestep` the product, then a quotient,
    then the product again, as diffusers'.
    """
    name, _, timestep = dtype.partition("_")
    if name == "float32":
        return values
    narrow = (values * unit).to(getattr(torch, name)) / unit if timestep else values.to(getattr(torch, name))
    return (narrow * unit).to(values.dtype) / unit


def latent_mask(mask: Tensor) -> Tensor:
    """`[B, 1, H, W]` -> `[B, 1, H / 8, W / 8]`: the share of each latent's pixels that is painted."""
    return F.interpolate(mask, scale_factor=1 / LATENT_SCALE, mode="area")


def dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes; of one that FSDP2 shards the mesh's device, even if its parameters wait on the CPU."""
    parameter = next(module.parameters())
    mesh = getattr(parameter, "device_mesh", None)
    return parameter.device if mesh is None else torch.device(mesh.device_type)


def same_device(own: torch.device, asked: torch.device) -> bool:
    """Whether `own` is the device asked for; "cuda" is any of them."""
    return own.type == asked.type and asked.index in (None, own.index)


def beside(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Features of several encoders, joined on the first one's device: encoders may lie apart."""
    return torch.cat([part.to(parts[0].device) for part in parts], dim=dim)


def finite(x: Tensor, stage: str) -> Tensor:
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise EridiffError(
            f"{stage} gave {bad} of {x.numel()} values that are not finite; float16 weights may overflow, try bfloat16 or float32"
        )
    return x


def finite_features(x: Tensor, name: str) -> Tensor:
    """`x`, or a CheckpointError that names the encoder that gave it."""
    if not bool(torch.isfinite(x).all()):
        raise CheckpointError(
            f"{name} gave values that are not finite; its weights may be damaged or float16, try bfloat16"
        )
    return x
