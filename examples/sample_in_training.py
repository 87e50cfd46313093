"""A bare training loop with samples: a LoRA teaches the built-in Flux grey images, `python -m examples.sample_in_training`.

Writes images, `index.html` and a strip into the folder `--out`; the LoRA beside them.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import eridiff
from eridiff.models.flux import patchify
from eridiff.training import LatentCache, Sampler, averaged_weights, write_strip
from examples.tiny_world import World, scenes

PROMPTS = ["a swan on mars", "a big robot at night", "a parrot on grass"]


def grey(world: World, count: int) -> tuple[torch.Tensor, list[str]]:
    """Random scenes without their colours: images `[count, 3, 64, 64]` in [-1, 1], and captions."""
    chosen = np.random.default_rng(0).choice(np.array(scenes(), dtype=object), count)
    pictures = np.stack([world.draw(scene).mean(axis=2, keepdims=True).repeat(3, axis=2) for scene in chosen])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1, [scene.caption for scene in chosen]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("samples"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--images", type=int, default=256, help="in the training set")
    options = parser.parse_args()
    flux = eridiff.load(device="cpu", progress=False)
    network, lora = flux.network, eridiff.inject_lora(flux.network, rank=8)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=3e-3)
    ema = AveragedModel(lora, multi_avg_fn=get_ema_multi_avg_fn(0.97))
    section = {"prompts": PROMPTS, "sample_every": max(options.steps // 5, 1), "seed": 3, "out": str(options.out)}
    others = {"base": lora.detached, "ema": lambda: averaged_weights(lora, ema)}
    sampler = Sampler(flux, section, optimizer=optimizer, weights=others, verify=True)

    pictures, captions = grey(World(), options.images)
    cache = LatentCache(flux, options.out / "latents")
    latents = torch.cat([cache.encode(picture[None]) for picture in pictures])
    texts = flux.encode_prompt(captions).positive
    for step in range(options.steps):
        sampler.maybe_sample(step)
        rows = torch.randint(len(latents), (16,))
        noise, t = torch.randn(16, 16, 8, 8), torch.sigmoid(torch.randn(16))
        noised = torch.lerp(latents[rows], noise, t[:, None, None, None])
        velocity = network(patchify(noised), texts.text[rows], texts.pooled[rows], t, (4, 4), torch.ones(16))
        loss = ((velocity - patchify(noise - latents[rows])) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(lora)
    sampler.finish(options.steps)
    eridiff.save_lora(lora, options.out / f"step-{options.steps}.safetensors")
    print(f"loss {loss.item():.3f}; {options.out / 'index.html'}, {write_strip(options.out)}")


if __name__ == "__main__":
    main()
