"""A bare training loop: `python examples/train_bare_loop.py [STEPS]` teaches the built-in small Flux eight images."""

import sys

import torch
from lesson import lesson
from torch import Tensor

from eridiff.models.flux import patchify
from eridiff.training import Sampler
from eridiff.training.objective import flow_levels, logit_normal, noised, squared_error, target

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
flux, latents, text, pooled = lesson()
network = flux.network
optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4)
sampler = Sampler(flux, {"prompts": ["a swan on mars", "a big fox at night"], "sample_every": 50, "out": "samples"})


def loss(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Of some of the images, at times from the generator; this Flux's schedule has no shift."""
    clean, told, whole = (item[rows].to(flux.device) for item in (latents, text, pooled))
    noise = torch.randn(clean.shape, generator=generator)
    levels = flow_levels(logit_normal(len(rows), generator))
    times, guidance = levels.times.float(), torch.ones(len(rows))
    output = network(patchify(noised(clean, noise, levels)), told, whole, times, (4, 4), guidance)
    return squared_error(output, patchify(target(clean, noise, levels)))


@torch.no_grad()
def measured() -> float:
    """On all images, always with the same noise at the same times."""
    return float(loss(torch.arange(len(latents)).repeat(8), torch.Generator().manual_seed(1)))


before = measured()
generator = torch.Generator().manual_seed(0)
for step in range(STEPS):
    sampler.maybe_sample(step)
    optimizer.zero_grad()
    loss(torch.randint(len(latents), (4,), generator=generator), generator).backward()
    optimizer.step()
sampler.finish(STEPS)
print(f"loss {before:.4f} -> {measured():.4f}")
