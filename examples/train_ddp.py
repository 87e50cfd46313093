"""DDP on two processes: `torchrun --nproc_per_node 2 examples/train_ddp.py [STEPS]`; pictures are drawn by turns."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lesson import lesson
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from eridiff.images import save_png
from eridiff.models.flux import patchify
from eridiff.training.distributed import launched, spread
from eridiff.training.objective import flow_levels, logit_normal, noised, squared_error, target

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
PROMPTS = ("a swan on mars", "a big fox at night", "a robot on the sea")


def main(rank: int) -> None:
    flux, latents, text, pooled = lesson()
    network = DistributedDataParallel(flux.network)  # flux keeps what is inside
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4)

    def loss(rows: Tensor, generator: torch.Generator) -> Tensor:
        clean = latents[rows]
        noise = torch.randn(clean.shape, generator=generator)
        levels = flow_levels(logit_normal(len(rows), generator))
        output = network(
            patchify(noised(clean, noise, levels)), text[rows], pooled[rows], levels.times.float()[None], (4, 4)
        )
        return squared_error(output, patchify(target(clean, noise, levels)))

    def measured() -> float:
        with torch.no_grad():
            return float(loss(torch.arange(len(latents)).repeat(8), torch.Generator().manual_seed(100)))

    before = measured()
    generator = torch.Generator().manual_seed(rank)  # every process sees other pictures and other noise
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(torch.randint(len(latents), (4,), generator=generator), generator).backward()
        optimizer.step()
        # or here: sampler.maybe_sample(step)
    after = measured()
    images = spread(len(PROMPTS), lambda i: flux.generate(PROMPTS[i], seed=i).images[0])
    dist.barrier()
    if rank == 0:
        for i, image in enumerate(images):
            print(save_png(image, Path("samples") / f"{i:04d}.png"))
        print(f"loss {before:.4f} -> {after:.4f}")


if __name__ == "__main__":
    with launched() as rank:
        main(rank)
