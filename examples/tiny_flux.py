"""The built-in small Flux, as schnell: no guidance embedding, T5's features and CLIP's pooled vector."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tiny_codec import LinearCode, pictures, random_scenes
from tiny_text import clip_encoder, clip_states, t5_encoder, t5_states, write_clip_tokenizer, write_t5_tokenizer
from tiny_training import Trainer
from tiny_world import World, scenes
from torch import Tensor, nn

from eridiff.models.flux import Flux, FluxConfig, patchify

CLIP_LENGTH, T5_LENGTH = 16, 12
CONFIG = FluxConfig(
    pooled_width=64, text_width=64, hidden=192, heads=3, double_depth=1, single_depth=4, rope_axes=(16, 24, 24),
    guidance=False,
)  # fmt: skip
SAMPLING = {"steps": 8, "text_length": T5_LENGTH}


def encoders() -> dict[str, nn.Module]:
    return {
        "clip": clip_encoder(1, width=64, length=CLIP_LENGTH, layers=1, act="quick_gelu", projected=False),
        "t5": t5_encoder(2, width=64),
    }


def encoded(captions: list[str], folder: Path) -> tuple[Tensor, Tensor]:
    """T5 features `[n, 12, 64]` and CLIP's pooled state `[n, 64]`."""
    found = encoders()
    _, pooled = clip_states(found["clip"], write_clip_tokenizer(folder / "clip_tokenizer", CLIP_LENGTH), captions)
    return t5_states(found["t5"], write_t5_tokenizer(folder / "t5_tokenizer", T5_LENGTH), captions, T5_LENGTH), pooled


def network() -> Flux:
    torch.manual_seed(4)
    model = Flux(CONFIG)
    for name, p in model.named_parameters():
        if "modulation" in name or name.startswith("final"):
            nn.init.zeros_(p)
    return model


def train(work: Path, minutes: float, device: str) -> None:
    """Rectified flow on the linear code; velocity = noise - clean, logit-normal times."""
    world, rng, everything = World(), np.random.default_rng(3), scenes()
    code, index = LinearCode(world), {s: i for i, s in enumerate(everything)}
    text, pooled = (t.to(device) for t in encoded([s.caption for s in everything], work))
    chosen = random_scenes(24000, rng, True)
    clean = torch.cat([patchify(code(pictures(world, chosen[i : i + 500], rng))) for i in range(0, len(chosen), 500)])
    clean, rows, model = clean.to(device), torch.tensor([index[s] for s in chosen]), network().to(device)
    trainer = Trainer(
        model, lambda n, p: p.ndim == 2 and "_blocks" in n and "modulation" not in n, 0.02, minutes, work / "flux.pt"
    )
    torch.manual_seed(trainer.steps)
    while trainer.spent < 1:
        pick = torch.randint(len(clean), (64,))
        x, t = clean[pick], torch.sigmoid(torch.randn(64, device=device))
        noise = torch.randn_like(x)
        with torch.autocast(device, torch.bfloat16):
            velocity = model(x + t[:, None, None] * (noise - x), text[rows[pick]], pooled[rows[pick]], t, (4, 4))
        trainer.step(F.mse_loss(velocity.float(), noise - x))
