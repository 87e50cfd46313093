"""DDP on two processes: `torchrun --nproc_per_node 2 examples/train_ddp.py [STEPS]`; processes generate images by turns."""

import sys

import torch
import torch.distributed as dist
from lesson import lesson
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from eridiff.models.flux import patchify
from eridiff.ranks import launched
from eridiff.training import Sampler
from eridiff.training.objective import flow_levels, logit_normal, noised, squared_error, target

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
PROMPTS = ("a swan on mars", "a big fox at night", "a robot on the sea")


def main(rank: int) -> None:
    flux, latents, text, pooled = lesson()
    sampler = Sampler(flux, {"prompts": list(PROMPTS), "sample_every": 50, "walk_seed": True, "out": "samples"})
    network = DistributedDataParallel(flux.network)  # flux keeps what is inside
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4)

    def loss(rows: Tensor, generator: torch.Generator) -> Tensor:
        clean, told, whole = (item[rows].to(flux.device) for item in (latents, text, pooled))
        noise = torch.randn(clean.shape, generator=generator)
        levels = flow_levels(logit_normal(len(rows), generator))
        times, guidance = levels.times.float(), torch.ones(len(rows))
        output = network(patchify(noised(clean, noise, levels)), told, whole, times, (4, 4), guidance)
        return squared_error(output, patchify(target(clean, noise, levels)))

    def measured() -> float:
        with torch.no_grad():
            return float(loss(torch.arange(len(latents)).repeat(8), torch.Generator().manual_seed(100)))

    before = measured()
    generator = torch.Generator().manual_seed(rank)  # every process sees other images and other noise
    for step in range(STEPS):
        sampler.maybe_sample(step)
        optimizer.zero_grad()
        loss(torch.randint(len(latents), (4,), generator=generator), generator).backward()
        optimizer.step()
    after = measured()
    samples = sampler.finish(STEPS)  # of the first process: everybody's
    dist.barrier()
    if rank == 0 and samples:
        print(*samples.paths, f"loss {before:.4f} -> {after:.4f}", sep="\n")


if __name__ == "__main__":
    with launched() as rank:
        main(rank)
