"""The built-in small Stable Diffusion 3.5: MMDiT-X, three text encoders that can each be left out."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tiny_codec import LinearCode, pictures, random_scenes
from tiny_text import clip_encoder, clip_states, t5_encoder, t5_states, write_clip_tokenizer, write_t5_tokenizer
from tiny_training import Trainer
from tiny_world import World, scenes
from torch import Tensor, nn

from eridiff.models.mmdit import MMDiT, MMDiTConfig

CLIP_LENGTH, T5_LENGTH = 12, 10
CONFIG = MMDiTConfig(
    pooled_width=96, text_width=128, hidden=192, heads=3, depth=3, table_side=16, dual_blocks=(0, 1),
)  # fmt: skip
SAMPLING = {
    "steps": 8, "cfg_scale": 1.75, "shift": 1.0, "text_shortest": T5_LENGTH, "text_length": T5_LENGTH,
    "skip_layers": {"blocks": [1], "scale": 0.5, "start": 0.01, "end": 0.5},
}  # fmt: skip
# how often in training: no caption at all; of the rest, one encoder without it
NOTHING, WITHOUT_CLIP, WITHOUT_T5 = 0.1, 0.15, 0.2


def encoders() -> dict[str, nn.Module]:
    """CLIP-L and CLIP-G side by side are 96 wide, the rest up to T5's 128 is zeros, as in the published model."""
    return {
        "clip": clip_encoder(11, width=32, length=CLIP_LENGTH, layers=2, act="quick_gelu", projected=False),
        "clip_g": clip_encoder(12, width=64, length=CLIP_LENGTH, layers=2, act="gelu", projected=True),
        "t5": t5_encoder(13, width=128),
    }


def encoded(captions: list[str], folder: Path) -> dict[str, Tensor]:
    """What each encoder gives for captions: rows of both CLIPs, of T5, and both pooled vectors."""
    found = encoders()
    clip_files = write_clip_tokenizer(folder / "clip_tokenizer", CLIP_LENGTH)
    t5_files = write_t5_tokenizer(folder / "t5_tokenizer", T5_LENGTH)
    clip, pooled = clip_states(found["clip"], clip_files, captions)
    clip_g, pooled_g = clip_states(found["clip_g"], clip_files, captions, pad=0)
    t5 = t5_states(found["t5"], t5_files, captions, T5_LENGTH)
    return {"clip": clip, "pooled": pooled, "clip_g": clip_g, "pooled_g": pooled_g, "t5": t5}


def conditioning(table: dict[str, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Text and pooled vectors of captions by their rows, encoders left out at random; the empty caption is row -1."""
    empty = table["clip"].shape[0] - 1
    nothing = torch.rand(len(rows)) < NOTHING

    def some(rate: float) -> Tensor:
        return torch.where(nothing | (torch.rand(len(rows)) < rate), empty, rows)

    clip, clip_g, t5 = some(WITHOUT_CLIP), some(WITHOUT_CLIP), torch.where(nothing, empty, rows)
    zeros = torch.rand(len(rows)) < torch.where(nothing, 0.4, WITHOUT_T5)  # what the pipeline gives without T5
    pair = torch.cat([table["clip"][clip], table["clip_g"][clip_g]], -1)
    told = torch.where(zeros[:, None, None], 0.0, table["t5"][t5])
    text = torch.cat([F.pad(pair, (0, CONFIG.text_width - pair.shape[-1])), told], 1)
    return text, torch.cat([table["pooled"][clip], table["pooled_g"][clip_g]], -1)


def position_table(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column, `[1, side * side, width]`."""
    places = torch.arange(side, dtype=torch.float64)[:, None] * 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    one = torch.cat([places.sin(), places.cos()], 1)  # side, width / 2
    both = torch.cat([one[None].expand(side, -1, -1), one[:, None].expand(-1, side, -1)], -1)
    return both.reshape(1, side * side, width).float()


def network() -> MMDiT:
    torch.manual_seed(14)
    model = MMDiT(CONFIG)
    for name, p in model.named_parameters():
        if "modulation" in name or name.startswith("final"):
            nn.init.zeros_(p)
    model.positions.table = position_table(CONFIG.table_side, CONFIG.hidden)
    return model


def train(work: Path, minutes: float, device: str) -> None:
    """Rectified flow on the linear code; velocity = noise - clean, logit-normal times."""
    world, rng = World(), np.random.default_rng(15)
    code, everything = LinearCode(world), scenes()
    table = {n: t.to(device) for n, t in encoded([*(s.caption for s in everything), ""], work).items()}
    index = {s: i for i, s in enumerate(everything)}
    chosen = random_scenes(24000, rng, True, ("small", "small", "small", "", "", "", "", "big", "big", "big"))
    clean = torch.cat([code(pictures(world, chosen[i : i + 500], rng)) for i in range(0, len(chosen), 500)]).to(device)
    of = torch.tensor([index[s] for s in chosen])
    model = network().to(device)
    trainer = Trainer(
        model, lambda n, p: p.ndim == 2 and "_blocks" in n and "modulation" not in n, 0.02, minutes, work / "sd35.pt"
    )
    torch.manual_seed(trainer.steps)
    while trainer.spent < 1:
        pick = torch.randint(len(clean), (64,))
        text, pooled = conditioning(table, of[pick])
        x, t = clean[pick], torch.sigmoid(torch.randn(64, device=device))
        noise = torch.randn_like(x)
        with torch.autocast(device, torch.bfloat16):
            velocity = model(x + t[:, None, None, None] * (noise - x), text, pooled, t)
        trainer.step(F.mse_loss(velocity.float(), noise - x))
