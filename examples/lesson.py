"""What the training examples learn: pairs of thing and place that the built-in small Flux never saw."""

import numpy as np
import torch
from tiny_world import World, scenes
from torch import Tensor

import eridiff


def lesson(count: int = 8) -> tuple[eridiff.FluxInference, Tensor, Tensor, Tensor]:
    """The built-in model, its network ready to be trained, and data on the CPU: `count` latents, texts and pooled vectors."""
    flux = eridiff.load(dtype=torch.float32, progress=False)
    chosen = [scene for scene in scenes() if scene.held_out][:count]
    drawn = torch.from_numpy(np.stack([World().draw(scene) for scene in chosen]))
    latents = flux.encode_vae(drawn.permute(0, 3, 1, 2).float() / 127.5 - 1)
    told = flux.encode_prompt([scene.caption for scene in chosen]).positive
    flux.network.train().requires_grad_(True)
    return flux, latents.cpu(), told.text.cpu().clone(), told.pooled.cpu().clone()
