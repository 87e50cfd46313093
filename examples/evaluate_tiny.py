"""How well a built-in small model generates what is asked: `python examples/evaluate_tiny.py tiny-sd35 [--curves] [--json FILE]`.

Every pair of noun and background at every size, one image each from a fixed seed, by the ordinary `generate`, judged
as in tiny_judge.py. The autoencoder is judged on images with fixed seeds, encoded and decoded. `--curves` adds, on a
sample of the scenes, the same over guidance scales, steps, samplers and schedules. `--lora tiny-style` judges the style of
that LoRA: nouns, backgrounds and sizes against outlined renderings, and how outlined the images are at five scales.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_codec import pictures, random_scenes
from tiny_judge import Judge, outline, sample
from tiny_world import SIZES, Scene, World, scenes

import eridiff
from eridiff.images import to_images
from eridiff.inference.sd35 import TABLES
from eridiff.inference.sdxl import SIGMAS, TIMESTEPS
from eridiff.schedulers.samplers import DISCRETE_ALONE, FLOW_ALONE, SAMPLERS

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of a LoRA
SCALES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0, 14.0)
STEPS = (2, 4, 8, 20)
SCHEDULES = {"flux": [], "mmdit": [*TABLES], "unet": [n for n in {**TIMESTEPS, **SIGMAS} if n != "turbo"]}


def drawn(model: Any, chosen: Sequence[Scene], **how: Any) -> list[Any]:
    """Image i from seed i."""
    found: list[Any] = []
    for start in range(0, len(chosen), 64):
        batch = chosen[start : start + 64]
        seeds = list(range(start, start + len(batch)))
        found += model.generate([scene.caption for scene in batch], seed=seeds, **how).images
    return found


def drawn_right(model: Any, judge: Judge, chosen: Sequence[Scene], **how: Any) -> np.ndarray:
    """`[n, 3]` bool of noun, background and size."""
    return judge.right(drawn(model, chosen, **how), chosen)


def accuracy(model: Any, judge: Judge, **how: Any) -> list[dict[str, Any]]:
    """One row a form: shares that are right on trained and on held-out pairs, in percent."""
    everything = scenes()
    right = drawn_right(model, judge, everything, **how)
    rows = []
    for size, held_out in product((*SIZES, None), (False, True)):
        of = [i for i, s in enumerate(everything) if s.held_out == held_out and size in (None, s.size)]
        shares = dict(zip(("noun", "background", "size"), (100 * right[of].mean(0)).round(2).tolist(), strict=True))
        form = "all" if size is None else size or "plain"
        rows.append({"form": form, "pairs": "never trained" if held_out else "trained", "images": len(of), **shares})
    return rows


def psnr(model: Any, world: World, count: int = 256) -> dict[str, float]:
    """Decibels of images encoded and decoded: of the set's mean error, and the mean over images."""
    rng = np.random.default_rng(11)
    given = pictures(world, random_scenes(count, rng, False, tuple(SIZES)), rng)
    found = to_images(model.decode_vae(model.encode_vae(given)))
    wanted = to_images(given)
    pairs = [(np.asarray(a, float) / 255, np.asarray(b, float) / 255) for a, b in zip(found, wanted, strict=True)]
    errors = np.array([((a - b) ** 2).mean() for a, b in pairs])
    return {"set": round(-10 * np.log10(errors.mean()), 2), "mean": round(float((-10 * np.log10(errors)).mean()), 2)}


def curves(model: Any, judge: Judge, count: int) -> dict[str, list[dict[str, Any]]]:
    """Over one setting, the others as the model's file says: percent of right nouns, and how far images are from the nearest
    rendering of what was asked, the mean over images of the root mean square in 0..255."""
    chosen, family = sample(count), model.family

    def figures(**how: Any) -> dict[str, float]:
        images = drawn(model, chosen, **how)
        pictures = [np.asarray(image, dtype=np.float32).reshape(-1) for image in images]
        near = [judge.distance(p, s.noun, s.background, s.size) ** 0.5 for p, s in zip(pictures, chosen, strict=True)]
        noun = 100 * float(judge.right(images, chosen)[:, 0].mean())
        return {"noun": round(noun, 1), "distance": round(float(np.mean(near)), 1)}

    samplers = [name for name in SAMPLERS if name not in (DISCRETE_ALONE if model.flow else FLOW_ALONE)]
    ways: dict[str, list[dict[str, Any]]] = {
        "steps": [{"steps": steps} for steps in STEPS],
        "samplers": [{"sampler": name, "steps": 4 if name == "lcm" else 20} for name in samplers],
        "schedules": [{"schedule": name, "steps": 20} for name in SCHEDULES[family]],
        "guidance": [{"guidance_scale" if family == "flux" else "cfg_scale": scale} for scale in SCALES],
    }
    if family == "flux" and not model.network.config.guidance:
        del ways["guidance"]
    found: dict[str, list[dict[str, Any]]] = {}
    for name, settings in ways.items():
        found[name] = [{**how, **figures(**how)} for how in settings]
        print(name, *(" ".join(map(str, row.values())) for row in found[name]), sep="\n  ", flush=True)
    return found


def style(model: Any, file: str, count: int) -> list[dict[str, float]]:
    """How outlined the images of a sample of scenes are at each scale of a LoRA, from the same noise."""
    chosen, found = sample(count), []
    with model.apply_lora(file, 0.0) as lora:
        for scale in STRENGTHS:
            lora.set_scale(scale)
            found.append({"scale": scale, "outline": round(outline(drawn(model, chosen), chosen), 3)})
    print("outline", *(f"{row['scale']:g}: {row['outline']}" for row in found), sep="\n  ", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="tiny-flux", help="tiny-flux, tiny-sd35 or tiny-sdxl, or a folder")
    parser.add_argument("--steps", type=int, help="of every image; by default what the model's file says")
    parser.add_argument("--cfg-scale", type=float)
    parser.add_argument("--curves", type=int, nargs="?", const=128, metavar="N", help="over N scenes, 128 by default")
    parser.add_argument("--lora", help="tiny-style, or a file of a LoRA that outlines")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    judge, model = (
        Judge(outlines=options.lora is not None),
        eridiff.load(options.model, device="cpu", progress=False, dtype=torch.float32),
    )
    how = {n: v for n, v in {"steps": options.steps, "cfg_scale": options.cfg_scale}.items() if v is not None}
    found: dict[str, Any] = {}
    if options.lora:
        found["style"] = style(model, options.lora, options.curves or 128)
        model.apply_lora(options.lora)
    rows, decibels = accuracy(model, judge, **how), psnr(model, World())
    print("| form | pairs | images | noun % | background % | size % |\n|---|---|---|---|---|---|")
    for row in rows:
        print("| {form} | {pairs} | {images} | {noun:.1f} | {background:.1f} | {size:.1f} |".format(**row))
    print(f"\nautoencoder: {decibels['set']} dB of the set's mean error, {decibels['mean']} dB mean over images")
    found |= {"steps": model.sampling.steps, "cfg_scale": model.sampling.cfg_scale, **how, "accuracy": rows}
    found["psnr"] = decibels
    if options.curves and not options.lora:
        found["curves"] = curves(model, judge, options.curves)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
