"""A user's training loop around the built-in model: type-checked as such by mypy --strict, and run, by test_surface.py."""

from pathlib import Path

import torch
from torch import Tensor

import eridiff
from eridiff.models.flux import patchify
from eridiff.training.objective import Levels, flow_levels, logit_normal, noised, squared_error, target

STEPS = 2

model: eridiff.inference.DiffusionInference = eridiff.load(device="cpu", dtype=torch.float32, progress=False)
assert isinstance(model, eridiff.FluxInference)
network: eridiff.Flux = model.network.requires_grad_(True)
prompt: eridiff.Prompt = model.encode_prompt("a swan on mars")
latents: Tensor = model.encode_vae(torch.rand(4, 3, 64, 64) * 2 - 1)
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
sampler = eridiff.training.Sampler(
    model, {"prompts": ["a swan on mars"], "steps": 2, "seed": 1, "sample_every": STEPS, "out": "samples"}
)
generator = torch.Generator().manual_seed(0)


def loss(clean: Tensor, text: eridiff.Conditioning) -> Tensor:
    noise = torch.randn(clean.shape, generator=generator)
    levels: Levels = flow_levels(logit_normal(len(clean), generator))
    told = text.repeat(len(clean))
    times, guidance = levels.times.float(), torch.ones(len(clean))
    output = network(patchify(noised(clean, noise, levels)), told.text, told.pooled, times, (4, 4), guidance)
    return squared_error(output, patchify(target(clean, noise, levels)))


for step in range(1, STEPS + 1):
    optimizer.zero_grad()
    torch.autograd.backward(loss(latents, prompt.positive))  # torch gives no types for Tensor.backward
    optimizer.step()
    sampler.maybe_sample(step)

result = model.generate("a swan on mars", seed=1, steps=2, width=64, height=64)
result.images[0].save("swan.png")
saved: Path = eridiff.save_network(network, "flux.safetensors", layout="diffusers")
with eridiff.trace.record(network) as recording, torch.no_grad():
    loss(latents, prompt.positive)
print(f"{len(recording)} tensors, {saved.name}, {len(list(Path('samples').glob('*.png')))} samples")
