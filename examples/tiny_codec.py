"""Images of the small world as tensors, and the autoencoders of the built-in small models.

Flux and SD 3.5 share a whitened linear code of 8 x 8 patches (their 16 principal components), so that decoder, encoder
and network are trained apart and no network waits for an autoencoder. SDXL's 4 channels hold too little of a linear
code: its encoder learns another one, beginning from the weights of Flux's autoencoder.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tiny_training import Trainer, averaged, is_convolution
from tiny_world import BACKGROUNDS, NOUNS, Scene, World
from torch import Tensor, nn

from eridiff.models.autoencoder import PRESETS, Autoencoder
from eridiff.weights.load import load_network

SIZES = {"channels": 32, "channel_multipliers": (1, 1, 2, 4), "residual_blocks": 1}
CODECS = {name: replace(config, **SIZES) for name, config in PRESETS.items()}
ASSETS = Path(__file__).parents[1] / "eridiff" / "assets"
MIXED = ("small", "", "", "", "big")


def pictures(world: World, chosen: list[Scene], rng: np.random.Generator) -> Tensor:
    """Jittered drawings of scenes, `[B, 3, 64, 64]` in [-1, 1]."""
    drawn = [world.draw(s, int(rng.integers(2)), *map(int, rng.integers(-1, 2, 2))) for s in chosen]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1


def random_scenes(
    count: int, rng: np.random.Generator, trained_only: bool, sizes: tuple[str, ...] = MIXED
) -> list[Scene]:
    """Scenes at random, each of `sizes` equally often; `trained_only` leaves out the pairs that no network sees."""
    drawn = rng.choice(sizes, count)
    nouns, backgrounds = rng.integers(len(NOUNS), size=count), rng.integers(len(BACKGROUNDS), size=count)
    found = [Scene(int(n), int(b), str(s)) for n, b, s in zip(nouns, backgrounds, drawn, strict=True)]
    return [s for s in found if not (trained_only and s.held_out)]


class LinearCode:
    """Principal components of patches: images `[B, 3, 64, 64]` -> whitened latents `[B, 16, 8, 8]`."""

    def __init__(self, world: World) -> None:
        rng = np.random.default_rng(1)
        drawn = pictures(world, random_scenes(1500, rng, False), rng)
        patches = self.patches(drawn).reshape(-1, 192).double()
        self.mean = patches.mean(0)
        values, vectors = torch.linalg.eigh((patches - self.mean).T @ (patches - self.mean) / len(patches))
        self.matrix = (vectors[:, -16:] / values[-16:].sqrt()).float()
        self.mean = self.mean.float()

    @staticmethod
    def patches(x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, 8).permute(0, 2, 3, 1)

    def __call__(self, x: Tensor) -> Tensor:
        return ((self.patches(x) - self.mean) @ self.matrix).permute(0, 3, 1, 2)


def picture_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute error of pixels and of their differences to the right and downwards."""
    error = found - wanted
    return error.abs().mean() + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()


def shipped(family: str) -> Autoencoder:
    """The autoencoder of a built-in model."""
    return load_network(ASSETS / f"tiny-{family}" / "ae.safetensors", dtype=torch.float32, progress=False)


def narrowed(teacher: Autoencoder) -> Autoencoder:
    """SDXL's autoencoder that begins as Flux's with the four strongest of its sixteen channels."""
    config, wide = CODECS["sdxl"], teacher.config
    model, state = Autoencoder(config), {n: t.clone() for n, t in teacher.state_dict().items()}
    ratio, weight, bias = wide.scale / config.scale, "encoder.conv_out.weight", "encoder.conv_out.bias"
    strongest = slice(12, 16)
    state[weight] = F.pad(state[weight][strongest] * ratio, (0, 0, 0, 0, 0, 0, 0, 4))
    state[bias] = F.pad((state[bias][strongest] - wide.shift) * ratio, (0, 4))
    state["decoder.conv_in.weight"] = state["decoder.conv_in.weight"][:, strongest] / ratio
    model.load_state_dict(state, strict=False)
    for conv in (model.quant_conv, model.post_quant_conv):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
        conv.requires_grad_(False)
    return model


def noisy_code(model: Autoencoder, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Latents of the network's size with a little noise, as the decoder takes them, and what keeps them near unit size."""
    z = moments[:, : model.config.latent_channels] * model.config.scale
    size = (z.mean((0, 2, 3)) ** 2 + (z.var((0, 2, 3)) - 1) ** 2).mean()
    return (z + 0.1 * torch.randn_like(z)) / model.config.scale, 0.1 * size


def refolded(teacher: Autoencoder) -> Autoencoder:
    """Flux's autoencoder with SD 3's scale and shift: the same latents of the network, other ones in between.

    Exact but for the decoder's border, whose zeros stand for another value.
    """
    config, flux = CODECS["sd3"], teacher.config
    state, ratio = {n: t.clone() for n, t in teacher.state_dict().items()}, flux.scale / config.scale
    weight, bias = state["encoder.conv_out.weight"], state["encoder.conv_out.bias"]
    weight[:16] *= ratio
    bias[:16] = (bias[:16] - flux.shift) * ratio + config.shift
    first, added = state["decoder.conv_in.weight"], state["decoder.conv_in.bias"]
    added += first.sum((2, 3)) @ torch.full((16,), flux.shift - config.shift / ratio)
    first /= ratio
    model = Autoencoder(config)
    model.load_state_dict(state)
    return model


def train_encoder(work: Path, minutes: float, device: str) -> None:
    """Flux's encoder, towards the linear code."""
    world, rng = World(), np.random.default_rng(2)
    code, model = LinearCode(world), start("flux").to(device)
    trainer = Trainer(model.encoder, is_convolution, 0.03, minutes, work / "flux-encoder.pt")
    while trainer.spent < 1:
        x = pictures(world, random_scenes(8, rng, False), rng)
        mean = model.encoder(x.to(device))[:, :16]
        trainer.step(F.mse_loss((mean - model.config.shift) * model.config.scale, code(x).to(device)))


def train_decoder(family: str, model: Autoencoder, work: Path, minutes: float, device: str) -> None:
    """The decoder alone, from the latents of the finished encoder with a little noise.

    The squared error beside the absolute one: what is left is in a few sharp edges.
    """
    world, rng, model = World(), np.random.default_rng(5), model.to(device)
    drawn = pictures(world, random_scenes(2500, rng, False), rng)
    with torch.no_grad():
        latents = torch.cat([model.encode(drawn[i : i + 100].to(device)) for i in range(0, len(drawn), 100)])
    trainer = Trainer(
        model.decoder.train().requires_grad_(), is_convolution, 0.02, minutes, work / f"{family}-decoder.pt"
    )
    torch.manual_seed(trainer.steps)
    while trainer.spent < 1:
        pick = torch.randint(len(drawn), (8,))
        z = latents[pick] + 0.05 * torch.randn(8, *latents.shape[1:], device=device)
        found, wanted = model.decode(z), drawn[pick].to(device)
        trainer.step(picture_loss(found, wanted) + 10 * F.mse_loss(found, wanted))


def start(family: str) -> Autoencoder:
    """The autoencoder of flux, sd35 or sdxl before any training of its own."""
    if family == "flux":
        return Autoencoder(CODECS["flux"])
    return refolded(shipped("flux")) if family == "sd35" else narrowed(shipped("flux"))


def train(family: str, work: Path, minutes: float, device: str) -> None:
    """The autoencoder of a family: what its encoder has to learn, then its decoder."""
    learn = {"flux": train_encoder, "sdxl": train_narrow}
    if family in learn:
        learn[family](work, 0.3 * minutes, device)
        minutes = 0.7 * minutes
    train_decoder(family, finished(family, work), work, minutes, device)


def finished(family: str, work: Path) -> Autoencoder:
    """What has been trained of an autoencoder, its latents with a fixed small deviation.

    Raises FileNotFoundError for SDXL's before `train_narrow` has written a checkpoint.
    """
    model = whitened(work) if family == "sdxl" else start(family)
    for name in ("encoder", "decoder"):
        if (checkpoint := work / f"{family}-{name}.pt").exists():
            averaged(getattr(model, name), checkpoint)
    if family != "sdxl":
        with torch.no_grad():  # 16 means, then 16 log-variances
            model.encoder.conv_out.weight[16:] = 0
            model.encoder.conv_out.bias[16:] = -6
    return model.eval()


def train_narrow(work: Path, minutes: float, device: str) -> None:
    """A third of the time the lowest resolution alone, towards what the teacher's decoder has there; then all of it."""
    world, rng, teacher = World(), np.random.default_rng(21), shipped("flux").to(device).eval()
    model = narrowed(teacher).to(device)
    encoder, decoder = model.encoder, model.decoder
    low = nn.ModuleList(
        [encoder.down[3], encoder.middle, encoder.norm_out, encoder.conv_out, decoder.conv_in, decoder.middle, decoder.up[3].block]
    )  # fmt: skip
    trainer = Trainer(low, lambda n, p: p.ndim == 4, 0.02, minutes / 3, work / "sdxl-code-low.pt")
    if trainer.spent < 1:
        features, targets = [], []
        with torch.no_grad():
            for _ in range(50):
                x = pictures(world, random_scenes(100, rng, False), rng).to(device)
                h = encoder.conv_in(x)
                for level in encoder.down[:3]:
                    h = level(h)
                features.append(h)
                taught = teacher.decoder
                z = teacher.encoder(x)[:, :16]
                targets.append(taught.up[3].block(taught.middle(taught.conv_in(z))))
        held, wanted = torch.cat(features), torch.cat(targets)
        size = wanted.std()
        trainer.skip()
    while trainer.spent < 1:
        pick = torch.randint(len(held), (32,))
        # with a gradient of its own: torch 2.13's group norm crashes for an input without one in some layouts
        h = encoder.middle(encoder.down[3](held[pick].requires_grad_()))
        z, size_loss = noisy_code(model, encoder.conv_out(F.silu(encoder.norm_out(h))))
        found = decoder.up[3].block(decoder.middle(decoder.conv_in(z)))
        trainer.step((found - wanted[pick]).div(size).square().mean() + size_loss)
    averaged(low, work / "sdxl-code-low.pt")
    trainer = Trainer(model.train(), is_convolution, 0.02, minutes * 2 / 3, work / "sdxl-code.pt")
    while trainer.spent < 1:
        x = pictures(world, random_scenes(8, rng, False), rng).to(device)
        z, size_loss = noisy_code(model, encoder(x))
        trainer.step(picture_loss(decoder(z), x) + size_loss)


def whitened(work: Path) -> Autoencoder:
    """The trained autoencoder of SDXL, its 1 x 1 convolutions making the latents white."""
    model = averaged(narrowed(shipped("flux")), work / "sdxl-code.pt")
    world, rng = World(), np.random.default_rng(22)
    with torch.no_grad():
        z = torch.cat([model.encode(pictures(world, random_scenes(100, rng, False), rng)) for _ in range(8)])
        z = z.transpose(0, 1).flatten(1).double()  # channels, all the rest
        mean, values, vectors = z.mean(1), *torch.linalg.eigh(z.cov())
        whiten, colour = vectors * values.rsqrt() @ vectors.T, vectors * values.sqrt() @ vectors.T
        scale = model.config.scale
        model.quant_conv.weight[:4, :4, 0, 0] = whiten.float()
        model.quant_conv.bias[:4] = (-whiten @ mean / scale).float()
        model.quant_conv.weight[4:] = 0  # a fixed small deviation
        model.quant_conv.bias[4:] = -6
        model.post_quant_conv.weight[:, :, 0, 0] = colour.float()
        model.post_quant_conv.bias[:] = (mean / scale).float()
    return model
