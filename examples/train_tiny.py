"""Train a built-in small model: `python examples/train_tiny.py codec --family sd35`, `network`, then `export`.

Each stage takes a budget of time (`--minutes`) and a device, writes a checkpoint a minute into `--work` and goes on from
it when it is started again. `codec` and `network` can run at the same time, but for SDXL, whose network needs its codec; `decoder` trains a decoder alone, which changes no latents.
`describe` writes the metadata of an exported network anew: how it is sampled, and which words it knows.
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import tiny_codec
import tiny_flux
import tiny_sd35
import tiny_sdxl
import torch
from tiny_text import write_clip_tokenizer, write_t5_tokenizer
from tiny_training import averaged, plain_attention
from tiny_world import BACKGROUNDS, NOUNS, SIZES, words
from torch import nn

from eridiff.models.layers import Attention
from eridiff.weights.header import open_checkpoint
from eridiff.weights.save import save_network, write_tensors

FAMILIES = {"flux": tiny_flux, "sd35": tiny_sd35, "sdxl": tiny_sdxl}
ASSETS = Path(__file__).parents[1] / "eridiff" / "assets"
WORDS = {  # as eridiff/inference/words.py reads them
    "nouns": list(NOUNS), "backgrounds": list(BACKGROUNDS), "sizes": [size for size in SIZES if size],
    "function_words": sorted({*words()} - {*NOUNS, *SIZES, *(background.split()[-1] for background in BACKGROUNDS)}),
}  # fmt: skip


def metadata(family: str) -> dict[str, str]:
    return {
        "modelspec.title": f"tiny-{family}",
        "eridiff.sampling": json.dumps({**FAMILIES[family].SAMPLING, "width": 64, "height": 64}),
        "eridiff.words": json.dumps(WORDS),
    }


def write_encoders(encoders: Mapping[str, nn.Module], folder: Path) -> None:
    """Text encoders under transformers' names, in bfloat16; the file says what their shapes do not."""
    for name, module in encoders.items():
        left_out = {"encoder.embed_tokens.weight"} | ({"text_projection.weight"} if name == "clip" else set())
        state = {n: p.bfloat16() for n, p in module.state_dict().items() if n not in left_out}
        told = ("num_attention_heads", "hidden_act", "projection_dim") if name != "t5" else ()
        config = {name: {key: getattr(module.config, key) for key in told}}
        write_tensors(state, folder / f"{name}.safetensors", {"eridiff.config": json.dumps(config)})


def export(family: str, work: Path) -> None:
    """Write every part of a trained model in its published layout."""
    own, folder = FAMILIES[family], ASSETS / f"tiny-{family}"
    folder.mkdir(parents=True, exist_ok=True)
    network = averaged(own.network(), work / f"{family}.pt")
    save_network(network, folder / f"{family}.safetensors", dtype=torch.bfloat16, metadata=metadata(family))
    save_network(tiny_codec.finished(family, work), folder / "ae.safetensors", dtype=torch.bfloat16)
    write_encoders(own.encoders(), folder)
    write_clip_tokenizer(folder / "clip_tokenizer", own.CLIP_LENGTH)
    if "t5" in own.encoders():
        write_t5_tokenizer(folder / "t5_tokenizer", own.T5_LENGTH)


def export_refiner(work: Path) -> None:
    """Beside the base: a network of its own, CLIP-G, and the base's autoencoder and tokenizer."""
    base, folder = ASSETS / "tiny-sdxl", ASSETS / "tiny-sdxl-refiner"
    folder.mkdir(exist_ok=True)
    network = averaged(tiny_sdxl.refiner(), work / "sdxl-refiner.pt")
    told = metadata("sdxl") | {"modelspec.title": "tiny-sdxl-refiner"}
    save_network(network, folder / "refiner.safetensors", dtype=torch.bfloat16, metadata=told)
    for name in ("ae.safetensors", "clip_g.safetensors"):
        shutil.copy(base / name, folder)
    write_clip_tokenizer(folder / "clip_tokenizer", tiny_sdxl.CLIP_LENGTH)


def continue_decoder(family: str, work: Path, minutes: float, device: str) -> None:
    """Train the decoder of a shipped autoencoder on, which changes no latents, and ship it."""
    model = tiny_codec.shipped(family)
    tiny_codec.train_decoder(family, model, work, minutes, device)
    averaged(model.cpu().decoder, work / f"{family}-decoder.pt")
    save_network(model, ASSETS / f"tiny-{family}" / "ae.safetensors", dtype=torch.bfloat16)


def describe(family: str) -> None:
    """Give the network's file the metadata of today; its tensors stay as they are, bit for bit."""
    file = open_checkpoint(ASSETS / f"tiny-{family}" / f"{family}.safetensors")
    write_tensors({name: file.read(name).clone() for name in file.tensors}, file.path, file.metadata | metadata(family))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["codec", "decoder", "network", "refiner", "export", "describe"])
    parser.add_argument("--family", choices=FAMILIES, default="flux")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--minutes", type=float, default=40, help="in all, earlier runs of the stage included")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.device == "cpu":
        torch.set_num_threads(1)
        Attention.forward = plain_attention  # type: ignore[method-assign]
    if options.stage == "codec":
        tiny_codec.train(options.family, options.work, options.minutes, options.device)
    elif options.stage == "decoder":
        continue_decoder(options.family, options.work, options.minutes, options.device)
    elif options.stage == "network":
        FAMILIES[options.family].train(options.work, options.minutes, options.device)
    elif options.stage == "refiner":
        tiny_sdxl.train_refiner(options.work, options.minutes, options.device)
        export_refiner(options.work)
    elif options.stage == "export":
        export(options.family, options.work)
    else:
        describe(options.family)


if __name__ == "__main__":
    main()
