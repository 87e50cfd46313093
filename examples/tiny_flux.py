"""The built-in small Flux, as dev: its guidance embedding is distilled from true guidance by a teacher without one."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_codec import ASSETS, LinearCode, pictures, random_scenes
from tiny_text import clip_encoder, clip_states, t5_encoder, t5_states, write_clip_tokenizer, write_t5_tokenizer
from tiny_training import Trainer, averaged
from tiny_world import World, scenes
from torch import Tensor, nn

from eridiff.models.flux import Flux, FluxConfig, patchify

CLIP_LENGTH, T5_LENGTH = 16, 12
CONFIG = FluxConfig(
    pooled_width=64, text_width=64, hidden=192, heads=3, double_depth=1, single_depth=4, rope_axes=(16, 24, 24),
)  # fmt: skip
SAMPLING = {"steps": 8, "guidance_scale": 1.5, "text_length": T5_LENGTH, "shift": False}
NOTHING = 0.1  # share of the captions that the teacher is not told
LARGEST_SCALE = 8.0  # of guidance, in distillation


def encoders() -> dict[str, nn.Module]:
    """With the weights that are shipped: another torch may make other random ones from the same seeds."""
    found = {
        "clip": clip_encoder(1, width=64, length=CLIP_LENGTH, layers=1, act="quick_gelu", projected=False),
        "t5": t5_encoder(2, width=64),
    }
    for name, module in found.items():
        module.load_state_dict(load_file(ASSETS / "tiny-flux" / f"{name}.safetensors"), strict=False)
    return found


def encoded(captions: list[str], folder: Path) -> tuple[Tensor, Tensor]:
    """T5 features `[n, 12, 64]` and CLIP's pooled state `[n, 64]`."""
    found = encoders()
    _, pooled = clip_states(found["clip"], write_clip_tokenizer(folder / "clip_tokenizer", CLIP_LENGTH), captions)
    return t5_states(found["t5"], write_t5_tokenizer(folder / "t5_tokenizer", T5_LENGTH), captions, T5_LENGTH), pooled


def network() -> Flux:
    return Flux(CONFIG)


def teacher() -> Flux:
    """The same without a guidance embedding, as schnell."""
    torch.manual_seed(4)
    model = Flux(replace(CONFIG, guidance=False))
    for name, p in model.named_parameters():
        if "modulation" in name or name.startswith("final"):
            nn.init.zeros_(p)
    return model


def is_matrix(name: str, p: Tensor) -> bool:
    """What Muon moves."""
    return p.ndim == 2 and "_blocks" in name and "modulation" not in name


def train(work: Path, minutes: float, device: str) -> None:
    """Rectified flow on the linear code: a teacher that some captions are kept from, then a student with guidance.

    The student learns, for a scale g, what classifier-free guidance of the teacher by g gives; its embedding of g begins
    without any effect.
    """
    world, rng, everything = World(), np.random.default_rng(3), scenes()
    code, index = LinearCode(world), {s: i for i, s in enumerate(everything)}
    text, pooled = (t.to(device) for t in encoded([*(s.caption for s in everything), ""], work))
    chosen = random_scenes(24000, rng, True)
    clean = torch.cat([patchify(code(pictures(world, chosen[i : i + 500], rng))) for i in range(0, len(chosen), 500)])
    clean, rows, first = clean.to(device), torch.tensor([index[s] for s in chosen]), teacher().to(device)

    def noised() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A batch: what is noised, its times, the velocity, and the rows of its captions."""
        pick = torch.randint(len(clean), (64,))
        x, t = clean[pick], torch.sigmoid(torch.randn(64, device=device))
        noise = torch.randn_like(x)
        return x + t[:, None, None] * (noise - x), t, noise - x, rows[pick]

    trainer = Trainer(first, is_matrix, 0.02, 0.7 * minutes, work / "flux-teacher.pt")
    torch.manual_seed(trainer.steps)
    while trainer.spent < 1:
        x, t, velocity, told = noised()
        told = torch.where(torch.rand(64) < NOTHING, len(everything), told)
        with torch.autocast(device, torch.bfloat16):
            found = first(x, text[told], pooled[told], t, (4, 4))
        trainer.step(F.mse_loss(found.float(), velocity))
    averaged(first, work / "flux-teacher.pt").requires_grad_(False)
    student = network().to(device)
    student.load_state_dict(first.state_dict(), strict=False)
    for p in list(student.guidance_in.parameters())[-2:]:
        nn.init.zeros_(p)
    trainer = Trainer(student, is_matrix, 0.01, 0.3 * minutes, work / "flux.pt")
    torch.manual_seed(trainer.steps)
    while trainer.spent < 1:
        x, t, _, told = noised()
        scale = LARGEST_SCALE * torch.rand(64, device=device)
        with torch.autocast(device, torch.bfloat16):
            both = torch.cat([torch.full_like(told, len(everything)), told])
            pair = first(torch.cat([x, x]), text[both], pooled[both], torch.cat([t, t]), (4, 4))
            nothing, something = pair.float().chunk(2)
            found = student(x, text[told], pooled[told], t, (4, 4), scale)
        error = (found.float() - torch.lerp(nothing, something, scale[:, None, None])).square().mean((1, 2))
        trainer.step((error / (1 + scale)).mean())
