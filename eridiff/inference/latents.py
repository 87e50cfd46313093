"""What goes into the loop and what comes out: noise from seeds, masks, where a run begins, values that must be finite."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eridiff.errors import CheckpointError, EridiffError
from eridiff.schedulers.step import Draw

LATENT_SCALE = 8  # pixels a latent's side, in every autoencoder of the three families


def first_step(steps: int, strength: float) -> int:
    """Where image to image begins: the share `strength` of the steps is run, at least one unless it is 0.

    A share that is a whole number of steps is that number: 25 * 0.28 is 7, though the product of floats is above it. diffusers
    rounds down where this rounds up (28 * 0.3: 8 steps there, 9 here).
    """
    return steps - max(math.ceil(round(steps * strength, 4)), int(strength > 0))


def seeded(seed: int) -> torch.Generator:
    """A generator of the CPU, whatever torch's default device is."""
    return torch.Generator("cpu").manual_seed(seed)


def drawn(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Noise of an image: float32 on the CPU whatever torch's default device and dtype are, so that a seed is an image."""
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def noise_of_steps(seeds: Sequence[int], start: Tensor, done: int = 0) -> Draw:
    """New noise like `start` at every call, each image from its own seed, going on where its start ended.

    `done` is for how many steps another part of the run has used noise.
    """
    generators = [seeded(seed) for seed in seeds]

    def draw() -> Tensor:
        return torch.stack([drawn(start.shape[1:], generator) for generator in generators]).to(start.device)

    draw()
    for generator in generators * done:
        torch.empty(start.shape[1:], dtype=torch.float32, device="cpu").normal_(generator=generator)
    return draw


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
