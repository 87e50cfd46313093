"""Train the built-in small Flux: `python examples/train_tiny.py codec`, `flux` (at the same time), then `export`.

`describe` writes the metadata of the exported network anew: how it is sampled, and which words it knows.

The latents are a whitened linear code of 8 x 8 patches (their 16 principal components), so decoder, encoder and Flux
are trained apart: the Flux never waits. A second run goes on from the weights of the first. Muon (Jordan 2024) on the matrices, AdamW on the rest; the moving average is kept.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tiny_world import BACKGROUNDS, NOUNS, SIZES, Scene, World, scenes, words
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from eridiff.models.autoencoder import Autoencoder, AutoencoderConfig
from eridiff.models.flux import Flux, FluxConfig, patchify

CODEC = AutoencoderConfig(channels=32, channel_multipliers=(1, 1, 2, 4), residual_blocks=1)
FLUX = FluxConfig(
    pooled_width=64, text_width=64, hidden=192, heads=3, double_depth=1, single_depth=4, rope_axes=(16, 24, 24),
    guidance=False,
)  # fmt: skip
T5_LENGTH, CLIP_LENGTH = 12, 16
WORDS = {  # as eridiff/inference/words.py reads them
    "nouns": list(NOUNS), "backgrounds": list(BACKGROUNDS), "sizes": [size for size in SIZES if size],
    "function_words": sorted({*words()} - {*NOUNS, *SIZES, *(background.split()[-1] for background in BACKGROUNDS)}),
}  # fmt: skip
FLUX_METADATA = {
    "modelspec.title": "tiny-flux",
    "eridiff.sampling": json.dumps({"steps": 8, "text_length": T5_LENGTH, "width": 64, "height": 64}),
    "eridiff.words": json.dumps(WORDS),
}
ASSETS = Path(__file__).parents[1] / "eridiff" / "assets" / "tiny-flux"


def pictures(world: World, chosen: list[Scene], rng: np.random.Generator) -> Tensor:
    """Jittered drawings of scenes, `[B, 3, 64, 64]` in [-1, 1]."""
    drawn = [world.draw(s, int(rng.integers(2)), *map(int, rng.integers(-1, 2, 2))) for s in chosen]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1


def random_scenes(count: int, rng: np.random.Generator, trained_only: bool) -> list[Scene]:
    sizes = rng.choice(["small", "", "", "", "big"], count)
    nouns, backgrounds = rng.integers(len(NOUNS), size=count), rng.integers(len(BACKGROUNDS), size=count)
    found = [Scene(int(n), int(b), str(s)) for n, b, s in zip(nouns, backgrounds, sizes, strict=True)]
    return [s for s in found if not (trained_only and s.held_out)]


class LinearCode:
    """Principal components of patches: pictures `[B, 3, 64, 64]` -> whitened latents `[B, 16, 8, 8]`."""

    def __init__(self, world: World) -> None:
        rng = np.random.default_rng(1)
        patches = self.patches(pictures(world, random_scenes(1500, rng, False), rng)).reshape(-1, 192).double()
        self.mean = patches.mean(0)
        values, vectors = torch.linalg.eigh((patches - self.mean).T @ (patches - self.mean) / len(patches))
        self.matrix = (vectors[:, -16:] / values[-16:].sqrt()).float()
        self.mean = self.mean.float()

    @staticmethod
    def patches(x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, 8).permute(0, 2, 3, 1)

    def __call__(self, x: Tensor) -> Tensor:
        return ((self.patches(x) - self.mean) @ self.matrix).permute(0, 3, 1, 2)


def orthogonalised(gradient: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, by five Newton-Schulz steps (Jordan 2024)."""
    x = gradient
    x = x.T if gradient.shape[0] > gradient.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if gradient.shape[0] > gradient.shape[1] else x


class Trainer:
    """Muon and AdamW with warm-up and linear decay over a wall-clock budget; keeps a moving average."""

    def __init__(
        self, module: nn.Module, is_matrix: Callable[[str, Tensor], bool], rate: float, minutes: float
    ) -> None:
        self.module, self.rate, self.minutes = module, rate, minutes
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.matrices = [p for n, p in named if is_matrix(n, p)]
        self.momenta = [torch.zeros_like(p) for p in self.matrices]
        others = [p for n, p in named if not is_matrix(n, p)]
        self.adam = torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01)
        self.average = {n: p.detach().clone() for n, p in named}
        self.start, self.steps = time.monotonic(), 0

    def step(self, loss: Tensor) -> float:
        """One update; returns the fraction of the budget that is spent."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        spent = (time.monotonic() - self.start) / 60 / self.minutes
        factor = min(1.0, (self.steps + 1) / 100) * min(1.0, max(0.02, (1 - spent) / 0.7))
        self.adam.param_groups[0]["lr"] = 2e-3 * factor
        self.adam.step()
        with torch.no_grad():
            for p, momentum in zip(self.matrices, self.momenta, strict=True):
                momentum.mul_(0.95).add_(p.grad)
                update = orthogonalised((p.grad + 0.95 * momentum).flatten(1))
                rate = self.rate * factor
                scale = math.sqrt(max(1.0, update.shape[0] / update.shape[1]))
                p.mul_(1 - 0.01 * rate).sub_(update.view_as(p), alpha=rate * scale)
            decay = min(0.998, (1 + self.steps) / (10 + self.steps))
            for n, p in self.module.named_parameters():
                if p.requires_grad:
                    self.average[n].lerp_(p, 1 - decay)
        self.module.zero_grad(set_to_none=True)
        self.steps += 1
        return spent


def is_convolution(name: str, p: Tensor) -> bool:
    return p.ndim == 4 and "conv_out" not in name


def train_codec(work: Path, minutes: float) -> None:
    """The encoder towards the linear code, then the decoder from the linear code and from the encoder's, half each."""
    world, rng = World(), np.random.default_rng(2)
    code, model = LinearCode(world), Autoencoder(CODEC)
    if (work / "codec.pt").exists():
        model.load_state_dict(torch.load(work / "codec.pt"))
    for part, budget in [(model.encoder, minutes * 0.15), (model.decoder, minutes * 0.85)]:
        trainer = Trainer(part, is_convolution, 0.03, budget)
        spent, tick = 0.0, 0.0
        while spent < 1:
            x = pictures(world, random_scenes(8, rng, False), rng)
            z = code(x)
            if part is model.decoder:
                with torch.no_grad():
                    z[::2] = (model.encoder(x[::2])[:, :16] - CODEC.shift) * CODEC.scale
                noisy = (z + 0.03 * torch.randn_like(z)) / CODEC.scale + CODEC.shift
                error = part(noisy) - x
                loss = error.abs().mean() + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
            else:
                mean = part(x)[:, :16]
                loss = F.mse_loss((mean - CODEC.shift) * CODEC.scale, z)
            spent = trainer.step(loss)
            if time.monotonic() > tick:
                tick = time.monotonic() + 60
                print(f"codec {spent:.3f} step {trainer.steps} loss {loss.item():.4f}", flush=True)
                torch.save(trainer.average, work / "codec_last.pt")
        part.load_state_dict(trainer.average)
        torch.save(model.state_dict(), work / "codec.pt")


def text_encoders() -> tuple[T5EncoderModel, CLIPTextModelWithProjection]:
    """Frozen and random: joint training was measured to gain nothing."""
    torch.manual_seed(0)
    vocabulary, merges = clip_vocabulary()
    clip = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, projection_dim=64, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=CLIP_LENGTH, hidden_act="quick_gelu",
            bos_token_id=len(vocabulary) - 2, eos_token_id=len(vocabulary) - 1,
        )
    )  # fmt: skip
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_pieces()), d_model=64, d_kv=32, d_ff=128, num_layers=1, num_heads=2,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        )
    )  # fmt: skip
    for name, p in [*clip.named_parameters(), *t5.named_parameters()]:
        if p.ndim == 2:
            std = 1.0 if name == "shared.weight" else 0.5 if "embedding" in name else 1 / math.sqrt(p.shape[1])
            nn.init.normal_(p, std=std)
    nn.init.eye_(clip.text_projection.weight)
    t5.encoder.embed_tokens.weight = t5.shared.weight
    return t5.eval().requires_grad_(False).bfloat16().float(), clip.eval().requires_grad_(False).bfloat16().float()


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """One token a word: merges fold each word from its end, so that none can disturb another word."""
    characters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    merges = sorted(
        {(w[i], w[i + 1 :] + "</w>") for w in words() for i in range(len(w) - 1)}, key=lambda m: (len(m[1]), m)
    )
    tokens = characters + [c + "</w>" for c in characters] + [a + b for a, b in merges]
    return {t: i for i, t in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}, merges


def t5_pieces() -> list[tuple[str, float]]:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    characters = [(chr(c), -10.0) for c in range(33, 127) if not chr(c).isupper()]
    return special + [("▁" + w, -2.0) for w in words()] + characters


def write_tokenizers(folder: Path) -> None:
    """Files that transformers' ordinary classes read."""
    clip, t5 = folder / "clip_tokenizer", folder / "t5_tokenizer"
    clip.mkdir(parents=True, exist_ok=True)
    t5.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = clip_vocabulary()
    (clip / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (clip / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    ends = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (clip / "special_tokens_map.json").write_text(json.dumps(ends))
    (clip / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_LENGTH, "do_lower_case": True, **ends})
    )
    special = [
        {
            "id": i,
            "content": c,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, c in enumerate(["<pad>", "</s>", "<unk>"])
    ]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    end = {"id": "</s>", "ids": [1], "tokens": ["</s>"]}
    pattern = {"Sequence": {"id": "A", "type_id": 0}}
    template = [pattern, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    document = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
        "post_processor": {"type": "TemplateProcessing", "single": template,
                           "pair": template + template, "special_tokens": {"</s>": end}},
        "decoder": metaspace, "model": {"type": "Unigram", "unk_id": 2, "vocab": t5_pieces(), "byte_fallback": False},
    }  # fmt: skip
    (t5 / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (t5 / "special_tokens_map.json").write_text(json.dumps(names))
    (t5 / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": T5_LENGTH, **names})
    )


def encode_captions(folder: Path, captions: list[str]) -> tuple[Tensor, Tensor]:
    """T5 features `[n, 12, 64]` and CLIP's pooled state `[n, 64]`; padding is attended to, as in Flux."""
    from transformers import CLIPTokenizerFast, PreTrainedTokenizerFast

    t5, clip = text_encoders()
    write_tokenizers(folder)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    t5_tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "t5_tokenizer" / "tokenizer.json"), **names)
    clip_tokenizer = CLIPTokenizerFast.from_pretrained(folder / "clip_tokenizer")
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    t5_ids = t5_tokenizer(captions, max_length=T5_LENGTH, **options).input_ids
    clip_ids = clip_tokenizer(captions, max_length=CLIP_LENGTH, **options).input_ids
    assert not (t5_ids == 2).any() and (clip_ids == clip_ids.max()).sum(1).min() > CLIP_LENGTH - 10
    text = t5(input_ids=t5_ids).last_hidden_state
    first_end = (clip_ids == clip_ids.max()).int().argmax(1)
    pooled = clip(input_ids=clip_ids).last_hidden_state[torch.arange(len(captions)), first_end]
    return text, pooled


def train_flux(work: Path, minutes: float) -> None:
    """Rectified flow on the linear code; velocity = noise - clean, logit-normal times."""
    world, rng = World(), np.random.default_rng(3)
    code = LinearCode(world)
    everything = scenes()
    text, pooled = encode_captions(work, [s.caption for s in everything])
    index = {s: i for i, s in enumerate(everything)}
    chosen = random_scenes(24000, rng, True)
    clean = torch.cat([patchify(code(pictures(world, chosen[i : i + 500], rng))) for i in range(0, len(chosen), 500)])
    rows = torch.tensor([index[s] for s in chosen])
    torch.manual_seed(4)
    model = Flux(FLUX)
    for name, p in model.named_parameters():
        if "modulation" in name or name.startswith("final"):
            nn.init.zeros_(p)
    if (work / "flux.pt").exists():
        model.load_state_dict(torch.load(work / "flux.pt"))
    trainer = Trainer(model, lambda n, p: p.ndim == 2 and "_blocks" in n and "modulation" not in n, 0.02, minutes)
    spent, tick, loss_average = 0.0, 0.0, 0.0
    while spent < 1:
        pick = torch.randint(len(clean), (64,))
        x, noise, t = clean[pick], torch.randn(64, 16, 64), torch.sigmoid(torch.randn(64))
        noised = x + t[:, None, None] * (noise - x)
        velocity = model(noised, text[rows[pick]], pooled[rows[pick]], t, (4, 4))
        loss = F.mse_loss(velocity, noise - x)
        spent = trainer.step(loss)
        loss_average = 0.98 * loss_average + 0.02 * loss.item() if trainer.steps > 1 else loss.item()
        if time.monotonic() > tick:
            tick = time.monotonic() + 30
            print(f"flux {spent:.3f} step {trainer.steps} loss {loss_average:.4f}", flush=True)
            torch.save(trainer.average, work / "flux_last.pt")
    torch.save(trainer.average, work / "flux.pt")


def export(work: Path) -> None:
    """Write every part in its published layout, in bfloat16."""
    from eridiff.weights.save import save_network, write_tensors

    ASSETS.mkdir(parents=True, exist_ok=True)
    flux, codec = Flux(FLUX), Autoencoder(CODEC)
    flux.load_state_dict(torch.load(work / "flux.pt"))
    codec.load_state_dict(torch.load(work / "codec.pt"))
    with torch.no_grad():  # a fixed small deviation: 16 means, then 16 log-variances
        codec.encoder.conv_out.weight[16:] = 0
        codec.encoder.conv_out.bias[16:] = -6
    save_network(flux, ASSETS / "flux.safetensors", dtype=torch.bfloat16, metadata=FLUX_METADATA)
    save_network(codec, ASSETS / "ae.safetensors", dtype=torch.bfloat16)
    write_tokenizers(ASSETS)
    t5, clip = text_encoders()
    t5_state = {n: p.bfloat16() for n, p in t5.state_dict().items() if n != "encoder.embed_tokens.weight"}
    clip_state = {n: p.bfloat16() for n, p in clip.state_dict().items() if n != "text_projection.weight"}
    clip_config = {"num_attention_heads": 2, "hidden_act": "quick_gelu", "projection_dim": 64}
    write_tensors(t5_state, ASSETS / "t5.safetensors", {"eridiff.config": json.dumps({"t5": {}})})
    write_tensors(clip_state, ASSETS / "clip.safetensors", {"eridiff.config": json.dumps({"clip": clip_config})})


def describe() -> None:
    """Give the network's file the metadata of today; its tensors stay as they are, bit for bit."""
    from eridiff.weights.header import open_checkpoint
    from eridiff.weights.save import write_tensors

    file = open_checkpoint(ASSETS / "flux.safetensors")
    write_tensors({name: file.read(name).clone() for name in file.tensors}, file.path, file.metadata | FLUX_METADATA)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["codec", "flux", "export", "describe"])
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--minutes", type=float, default=40)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    stages = {
        "codec": lambda: train_codec(options.work, options.minutes),
        "flux": lambda: train_flux(options.work, options.minutes),
        "export": lambda: export(options.work),
        "describe": describe,
    }
    stages[options.stage]()
