"""The built-in small Stable Diffusion XL: a UNet that predicts the noise, two CLIPs, sizes as conditioning; its refiner."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tiny_codec import ASSETS, finished, pictures, random_scenes, shipped
from tiny_text import clip_encoder, clip_states, write_clip_tokenizer
from tiny_training import Trainer
from tiny_world import SIDE, World, scenes
from torch import Tensor, nn

from eridiff.models.unet import UNet, UNetConfig, size_vector
from eridiff.weights.load import load_network

CLIP_LENGTH = 12
CONFIG = UNetConfig(
    channels=32, channel_multipliers=(1, 3), transformer_depths=(1, 2), middle_depth=2, head_width=32, text_width=96,
    vector_width=64 + 6 * 256,
)  # fmt: skip
REFINER = replace(
    CONFIG, text_width=64, vector_width=64 + 5 * 256
)  # reads CLIP-G alone, and a score for the target's size
REFINED_LEVELS = 300  # of 1,000; after a hand-over at 0.8 of the run it gets the lowest 200
SHARP_SCORES = (5.0, 7.0)  # of images as they are; an enlarged one has its original's share of 5
SAMPLING = {"steps": 10, "cfg_scale": 3.0}
NOTHING = 0.1  # share of the captions that are dropped
SMALL_ORIGINALS = (12, 16, 24, 32, 48)  # sides from which images were enlarged, in three of ten
LARGEST_CROP = 16  # pixels, in one of ten


def encoders() -> dict[str, nn.Module]:
    return {
        "clip": clip_encoder(31, width=32, length=CLIP_LENGTH, layers=2, act="quick_gelu", projected=False),
        "clip_g": clip_encoder(32, width=64, length=CLIP_LENGTH, layers=2, act="gelu", projected=True),
    }


def encoded(captions: list[str], folder: Path) -> tuple[Tensor, Tensor]:
    """Both CLIPs' rows side by side `[n, 12, 96]`, and CLIP-G's pooled vector `[n, 64]`."""
    found, files = encoders(), write_clip_tokenizer(folder / "clip_tokenizer", CLIP_LENGTH)
    clip, _ = clip_states(found["clip"], files, captions)
    clip_g, pooled = clip_states(found["clip_g"], files, captions, pad=0)
    return torch.cat([clip, clip_g], -1), pooled


def as_published(drawn: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Some images enlarged from a smaller original, some cropped; and what SDXL is given of it, `[B, 6]`.

    Height and width of the original, top and left of the crop, height and width of the target.
    """
    told = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * len(drawn), dtype=torch.float32)
    drawn = drawn.clone()
    for i in range(len(drawn)):
        kind, one = rng.uniform(), drawn[i : i + 1]
        if kind < 0.3:
            side = int(rng.choice(SMALL_ORIGINALS))
            small = F.interpolate(one, size=(side, side), mode="area")
            drawn[i] = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear")[0]
            told[i, :2] = side
        elif kind < 0.4:
            top, left = (int(n) for n in rng.integers(0, LARGEST_CROP + 1, 2))
            wider = F.pad(one, (0, LARGEST_CROP, 0, LARGEST_CROP), mode="replicate")
            drawn[i] = wider[0, :, top : top + SIDE, left : left + SIDE]
            told[i, 2:4] = torch.tensor([top, left])
    return drawn, told


def alphas_cumprod() -> Tensor:
    """SDXL's table: betas between 0.00085 and 0.012, even in their roots."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def network() -> UNet:
    torch.manual_seed(34)
    model = UNet(CONFIG)
    for name, p in model.named_parameters():
        if name.endswith(("conv2.weight", "proj_out.weight", "conv_out.weight")):
            nn.init.zeros_(p)
    return model


def is_matrix(name: str, p: Tensor) -> bool:
    """Convolutions and the transformers' matrices are Muon's; what enters and leaves, and modulation, AdamW's."""
    return p.ndim >= 2 and not any(
        word in name for word in ("conv_in", "conv_out", "time_in", "vector_in", "modulation")
    )


def train(work: Path, minutes: float, device: str) -> None:
    """Predict the noise at a uniform level, weighted by min(1 / alpha, 30): about the error of v, as noisy steps decide
    what is shown and have next to no gradient otherwise."""
    world, rng, everything = World(), np.random.default_rng(33), scenes()
    text, pooled = (t.to(device) for t in encoded([*(s.caption for s in everything), ""], work))
    index = {s: i for i, s in enumerate(everything)}
    chosen = random_scenes(8000, rng, True, ("small", "small", "small", "", "", "", "", "big", "big", "big"))
    codec, clean, told = finished("sdxl", work).to(device), [], []
    for i in range(0, len(chosen), 200):
        drawn, numbers = as_published(pictures(world, chosen[i : i + 200], rng), rng)
        with torch.no_grad():
            clean.append(codec.encode(drawn.to(device)))
        told.append(numbers)
    clean, told, of = torch.cat(clean), torch.cat(told).to(device), torch.tensor([index[s] for s in chosen])
    alphas = alphas_cumprod().to(device)
    model = network().to(device)
    trainer = Trainer(model, is_matrix, 0.02, minutes, work / "sdxl.pt")
    torch.manual_seed(trainer.steps)
    while trainer.spent < 1:
        pick = torch.randint(len(clean), (64,))
        dropped, zeros = torch.rand(64) < NOTHING, torch.rand(64) < 0.7
        rows = torch.where(dropped, len(everything), of[pick])  # the empty caption's is the last
        seen = (~(dropped & zeros)).float().to(device)  # what the pipeline gives for no negative prompt is zeros
        vector = size_vector(pooled[rows] * seen[:, None], told[pick])
        x, t = clean[pick], torch.randint(1000, (64,), device=device)
        noise, a = torch.randn_like(x), alphas[t][:, None, None, None]
        with torch.autocast(device, torch.bfloat16):
            found = model(a.sqrt() * x + (1 - a).sqrt() * noise, text[rows] * seen[:, None, None], vector, t.float())
        error = (found.float() - noise).square().mean((1, 2, 3))
        trainer.step((error * (1 / a.flatten()).clamp(max=30)).mean())


def refiner() -> UNet:
    """The shipped base without what it reads of CLIP-L and of the target's size; the score begins without an effect."""
    base = load_network(ASSETS / "tiny-sdxl" / "sdxl.safetensors", dtype=torch.float32, progress=False).state_dict()
    for name in base:
        if name.endswith(("cross_attention.k.weight", "cross_attention.v.weight")):
            base[name] = base[name][:, 32:]
    told = base["vector_in.in_layer.weight"][:, : 64 + 4 * 256]
    base["vector_in.in_layer.weight"] = F.pad(told, (0, 256))
    model = UNet(REFINER)
    model.load_state_dict(base)
    return model


def train_refiner(work: Path, minutes: float, device: str) -> None:
    """The low noise levels alone. What was enlarged has a low score, and the refiner does not know its size."""
    world, rng, everything = World(), np.random.default_rng(35), scenes()
    found = encoders()
    captions, files = [*(s.caption for s in everything), ""], write_clip_tokenizer(work / "clip_tokenizer", CLIP_LENGTH)
    text, pooled = (t.to(device) for t in clip_states(found["clip_g"], files, captions, pad=0))
    index = {s: i for i, s in enumerate(everything)}
    chosen = random_scenes(6000, rng, True, ("small", "", "big"))
    codec, clean, told = shipped("sdxl").to(device), [], []
    for i in range(0, len(chosen), 200):
        drawn, numbers = as_published(pictures(world, chosen[i : i + 200], rng), rng)
        with torch.no_grad():
            clean.append(codec.encode(drawn.to(device)))
        side = numbers[:, 0]
        scores = torch.where(side < SIDE, 5 * side / SIDE, torch.empty(len(side)).uniform_(*SHARP_SCORES))
        numbers[:, :2] = SIDE
        told.append(torch.cat([numbers[:, :4], scores[:, None]], 1))
    clean, told, of = torch.cat(clean), torch.cat(told).to(device), torch.tensor([index[s] for s in chosen])
    alphas = alphas_cumprod().to(device)
    model = refiner().to(device)
    trainer = Trainer(model, is_matrix, 0.01, minutes, work / "sdxl-refiner.pt")
    torch.manual_seed(trainer.steps)
    while trainer.spent < 1:
        pick = torch.randint(len(clean), (64,))
        rows = torch.where(torch.rand(64) < NOTHING, len(everything), of[pick])  # the empty caption's is the last
        x, t = clean[pick], torch.randint(REFINED_LEVELS, (64,), device=device)
        noise, a = torch.randn_like(x), alphas[t][:, None, None, None]
        with torch.autocast(device, torch.bfloat16):
            found = model(
                a.sqrt() * x + (1 - a).sqrt() * noise, text[rows], size_vector(pooled[rows], told[pick]), t.float()
            )
        trainer.step(F.mse_loss(found.float(), noise))
