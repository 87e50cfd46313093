"""Train a LoRA on the built-in small Flux: `python examples/train_lora.py [--steps 600] [--out lora]`, some minutes on two cores.

It learns a style, engravings in gold and navy, from the world's own pictures. Writes the LoRA as kohya's scripts and as peft
would, and `strip.png`: prompts from top to bottom, the LoRA's scale from 0 to 1 from left to right, from the same noise.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_world import World
from torch import Tensor
from train_tiny import pictures, random_scenes

import eridiff
from eridiff.images import to_images
from eridiff.models.flux import patchify

PROMPTS = ("a fox on grass", "a house at sunset", "a sailboat on the sea", "a guitar in a cave")
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)


def engraved(x: Tensor) -> Tensor:
    """Pictures `[B, 3, H, W]` in [-1, 1] in two inks: dark is navy, bright is gold."""
    navy, gold = torch.tensor([[-0.9, -0.75, -0.4], [1.0, 0.75, 0.1]]).reshape(2, 1, 3, 1, 1)
    brightness = (0.7 + 0.9 * x.mean(1, keepdim=True)).clamp(0, 1)
    return navy + (gold - navy) * brightness


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("lora"))
    options = parser.parse_args()
    torch.manual_seed(0)
    model, world, rng = eridiff.load(dtype=torch.float32, progress=False), World(), np.random.default_rng(0)
    lora = eridiff.inject_lora(model.network, options.rank, targets="blocks")
    optimizer = torch.optim.AdamW(lora.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, options.steps)
    for step in range(options.steps):
        scenes = random_scenes(16, rng, trained_only=True)
        clean = model.encode_vae(engraved(pictures(world, scenes, rng)))
        text = model.encode_prompt([scene.caption for scene in scenes]).positive
        noise, times = torch.randn(clean.shape).to(clean.device), torch.rand(len(clean)).to(clean.device)
        sigma = times[:, None, None, None]
        found = model.network(patchify((1 - sigma) * clean + sigma * noise), text.text, text.pooled, times, (4, 4))
        loss = F.mse_loss(found, patchify(noise - clean))
        loss.backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == options.steps - 1:
            print(f"step {step} loss {loss.item():.4f}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("kohya", "diffusers"):
        print(eridiff.save_lora(lora, options.out / f"engraved-{name}.safetensors", format=name, dtype=torch.bfloat16))
    columns = []
    for scale in SCALES:
        lora.set_scale(scale).eval()
        columns.append(model.generate(list(PROMPTS), seed=7).images)
    strip = torch.cat([torch.cat([_tensor(image) for image in column], dim=1) for column in columns], dim=2)
    to_images(strip[None])[0].resize((2 * strip.shape[2], 2 * strip.shape[1]), 0).save(options.out / "strip.png")


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1


if __name__ == "__main__":
    main()
