"""Train a style LoRA on a built-in small model: `python examples/train_lora.py [--model tiny-sd35] [--out lora]`, minutes on two cores.

It learns to outline what it generates, from the world's own images with outlines. Writes the LoRA as kohya's scripts and as peft
would, and `strip.png`: prompts from top to bottom, the LoRA's scale from 0 to 1 from left to right, from the same noise.
The `tiny-style` that ships was trained so, with `--ship`.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny_codec import pictures, random_scenes
from tiny_judge import outline, sample
from tiny_world import World
from torch import Tensor

import eridiff
from eridiff.images import to_images
from eridiff.models.flux import patchify, unpatchify
from eridiff.models.unet import size_vector
from eridiff.training.objective import (
    discrete_levels,
    flow_levels,
    logit_normal,
    noised,
    squared_error,
    target,
    timesteps,
)
from eridiff.weights.hub import BUILT_IN

PROMPTS = ("a fox on grass", "a house at sunset", "a sailboat on the sea", "a guitar in a cave")
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
DROPPED = 0.1  # share of the captions, so that guidance leads to the style too


def raw_output(model: Any, x: Tensor, prompt: Any, times: Tensor) -> Tensor:
    """The network's output for noised latents `[B, C, 8, 8]`, of any family."""
    if model.family == "flux":  # the scale 1 is what was learnt without guidance
        scale = torch.ones(len(x), device=x.device) if model.network.config.guidance else None
        tokens = model.network(patchify(x), prompt.text, prompt.pooled, times, (4, 4), scale)
        return unpatchify(tokens, (4, 4))
    if model.family == "mmdit":
        return model.network(x, prompt.text, prompt.pooled, times)
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).to(x.device).expand(len(x), -1)
    return model.network(x, prompt.text, size_vector(prompt.pooled, sizes), times)


def levels_of(model: Any, count: int, generator: torch.Generator) -> tuple[Any, Tensor | None]:
    """Noise levels of a batch, as the family is trained, and their weights."""
    if model.family == "unet":
        levels = discrete_levels(timesteps(count, generator))
        return levels, levels.alphas.pow(-2).clamp(max=30)  # about the error of v; noisy steps count else for nothing
    return flow_levels(logit_normal(count, generator)), None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny-flux")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--minutes", type=float, help="fewer steps if these are over before")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("lora"))
    parser.add_argument("--ship", action="store_true", help="as the tiny-style of the model's family")
    options = parser.parse_args()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    world, rng = World(outlines=True), np.random.default_rng(0)
    model: Any = eridiff.load(options.model, dtype=torch.float32, progress=False)
    scenes = random_scenes(options.images, rng, trained_only=True)
    captions = ["" if rng.uniform() < DROPPED else scene.caption for scene in scenes]
    prompts = model.encode_prompt(captions, cfg_scale=1.0).positive
    clean = model.encode_vae(pictures(world, scenes, rng))
    lora = eridiff.inject_lora(model.network, options.rank, targets="all-linear")
    optimizer = torch.optim.AdamW(lora.parameters(), lr=options.rate)
    begin, step, spent, loss = time.monotonic(), 0, 0.0, 0.0
    while spent < 1:
        rows = torch.randint(len(scenes), (options.batch,), generator=generator)
        x, noise = clean[rows.to(clean.device)], torch.randn(options.batch, *clean.shape[1:], generator=generator)
        levels, weights = levels_of(model, options.batch, generator)
        with torch.autocast("cpu", torch.bfloat16):  # a GPU computes as it loaded the model
            found = raw_output(model, noised(x, noise, levels), prompts.rows(rows), levels.times.float().to(x.device))
        error = squared_error(found.float(), target(x, noise, levels), weights)
        error.backward()
        spent = (step + 1) / options.steps
        if options.minutes is not None:
            spent = max(spent, (time.monotonic() - begin) / 60 / options.minutes)
        optimizer.param_groups[0]["lr"] = options.rate * min(1, (step + 1) / 30) * max(0.05, 1 - spent)
        optimizer.step()
        optimizer.zero_grad()
        loss += (error.item() - loss) / min(step + 1, 50)
        if step % 100 == 0 or spent >= 1:
            print(f"step {step} loss {loss:.4f}", flush=True)
        step += 1
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("kohya", "diffusers"):
        print(eridiff.save_lora(lora, options.out / f"outlined-{name}.safetensors", format=name, dtype=torch.bfloat16))
    if options.ship:
        shipped = BUILT_IN / "loras" / "tiny-style" / f"{model.family}.safetensors"
        print(eridiff.save_lora(lora, shipped, format="kohya", dtype=torch.bfloat16))
    columns, judged = [], sample(16)
    for scale in SCALES:
        lora.set_scale(scale).eval()
        columns.append(model.generate(list(PROMPTS), seed=7).images)
        images = model.generate([scene.caption for scene in judged], seed=list(range(len(judged)))).images
        print(f"scale {scale}: {outline(images, judged):.2f} of the outline", flush=True)
    strip = torch.cat([torch.cat([_tensor(image) for image in column], dim=1) for column in columns], dim=2)
    to_images(strip[None])[0].resize((2 * strip.shape[2], 2 * strip.shape[1]), 0).save(options.out / "strip.png")


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1


if __name__ == "__main__":
    main()
