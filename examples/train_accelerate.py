"""With accelerate: `accelerate launch examples/train_accelerate.py [STEPS]`, on one process or many, in mixed precision."""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from lesson import lesson
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from eridiff.models.flux import patchify
from eridiff.training import Sampler
from eridiff.training.objective import flow_levels, logit_normal, noised, squared_error, target

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
accelerator = Accelerator(gradient_accumulation_steps=2)
set_seed(0)
flux, *pictures = lesson()
optimizer = torch.optim.AdamW(flux.network.parameters(), lr=3e-4)
loader = DataLoader(TensorDataset(*pictures), batch_size=4, shuffle=True)
# `flux` keeps the network itself, so pictures are drawn of what is trained whatever accelerate wraps around it
network, optimizer, loader = accelerator.prepare(flux.network, optimizer, loader)
sampler = Sampler(flux, {"prompts": ["a swan on mars", "a big fox at night"], "sample_every": 50, "out": "samples"})


def loss(clean: Tensor, text: Tensor, pooled: Tensor, generator: torch.Generator) -> Tensor:
    """Of some pictures, at times that the generator draws; this Flux's schedule has no shift."""
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    levels = flow_levels(logit_normal(len(clean), generator))
    times = levels.times.float().to(clean.device)
    output = network(patchify(noised(clean, noise, levels)), text, pooled, times, (4, 4))
    return squared_error(output, patchify(target(clean, noise, levels)))


def measured() -> float:
    """On all pictures, always with the same noise at the same times."""
    every = (item.repeat(8, *[1] * (item.ndim - 1)).to(accelerator.device) for item in pictures)
    with torch.no_grad():
        return float(loss(*every, torch.Generator().manual_seed(100)))


before = measured()
generator = torch.Generator().manual_seed(accelerator.process_index)  # every process sees other noise
step = 0
while step < STEPS:
    for batch in loader:
        with accelerator.accumulate(network):
            accelerator.backward(loss(*batch, generator))
            optimizer.step()
            optimizer.zero_grad()
        step += accelerator.sync_gradients
        sampler.maybe_sample(step)
sampler.finish(step)
accelerator.print(f"loss {before:.4f} -> {measured():.4f}")
