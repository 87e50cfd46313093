"""How well the built-in small Flux draws what is asked: `python examples/evaluate_tiny.py [--json FILE]`.

Every pair of noun and background at every size, one picture each from a fixed seed, by the ordinary `generate`. A noun is
right when, of all nouns drawn at that size on the pair's mean background, shifted by up to one pixel, the asked one is
the nearest in mean squared error; a background, when its mean picture is, the glyph's square left out. The autoencoder is
judged on pictures with fixed seeds, encoded and decoded.
"""

import argparse
import json
from itertools import product
from pathlib import Path

import numpy as np
import torch
from tiny_world import BACKGROUNDS, NOUNS, SIDE, SIZES, Scene, World, scenes

import eridiff
from eridiff.images import to_images


def nearest_noun(picture: np.ndarray, scene: Scene, world: World) -> int:
    jitters = list(product((-1, 0, 1), repeat=2))
    drawn = [world.draw(Scene(n, scene.background, scene.size), None, *j) for n in range(len(NOUNS)) for j in jitters]
    errors = ((np.stack(drawn).astype(np.float32) - picture) ** 2).mean((1, 2, 3))
    return int(errors.argmin()) // len(jitters)


def nearest_background(picture: np.ndarray, scene: Scene, world: World) -> int:
    means = np.stack([(first + second) / 2 for first, second in world.backgrounds])
    outside = np.ones((SIDE, SIDE, 1))
    edge = (SIDE - SIZES[scene.size]) // 2 - 1
    outside[edge : SIDE - edge, edge : SIDE - edge] = 0
    return int((((means - picture) ** 2) * outside).sum((1, 2, 3)).argmin())


def accuracy(model: eridiff.FluxInference, world: World, steps: int) -> list[dict[str, object]]:
    """One row a form: shares that are right on trained and on held-out pairs."""
    everything = scenes()
    right: dict[Scene, tuple[bool, bool]] = {}
    for start in range(0, len(everything), 64):
        batch = everything[start : start + 64]
        seeds = list(range(start, start + len(batch)))
        result = model.generate([scene.caption for scene in batch], seed=seeds, steps=steps)
        for scene, image in zip(batch, result.images, strict=True):
            picture = np.asarray(image, dtype=np.float32)
            noun, background = nearest_noun(picture, scene, world), nearest_background(picture, scene, world)
            right[scene] = (noun == scene.noun, background == scene.background)
    rows = []
    for size, held_out in product((*SIZES, None), (False, True)):
        chosen = [r for s, r in right.items() if s.held_out == held_out and size in (None, s.size)]
        noun, background = (100 * sum(column) / len(chosen) for column in zip(*chosen, strict=True))
        form = "all" if size is None else size or "plain"
        pairs = "never trained" if held_out else "trained"
        rows.append({"form": form, "pairs": pairs, "pictures": len(chosen), "noun": noun, "background": background})
    return rows


def psnr(model: eridiff.FluxInference, world: World, count: int = 256) -> dict[str, float]:
    """Decibels of pictures encoded and decoded: of the set's mean error, and the mean over pictures."""
    rng = np.random.default_rng(11)
    drawn = []
    for _ in range(count):
        scene = Scene(int(rng.integers(len(NOUNS))), int(rng.integers(len(BACKGROUNDS))), list(SIZES)[rng.integers(3)])
        drawn.append(world.draw(scene, int(rng.integers(2)), *map(int, rng.integers(-1, 2, 2))))
    pictures = torch.from_numpy(np.stack(drawn))
    decoded = model.decode_vae(model.encode_vae(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1))
    found = torch.from_numpy(np.stack([np.asarray(image) for image in to_images(decoded)]))
    errors = ((found.double() - pictures.double()) / 255).square().mean((1, 2, 3))
    return {"set": float(-10 * errors.mean().log10()), "mean": float((-10 * errors.log10()).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    model, world = eridiff.load(device="cpu", progress=False), World()
    assert isinstance(model, eridiff.FluxInference)
    rows, decibels = accuracy(model, world, options.steps), psnr(model, world)
    print("| form | pairs | pictures | noun % | background % |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['form']} | {row['pairs']} | {row['pictures']} | {row['noun']:.1f} | {row['background']:.1f} |")
    print(
        f"\nautoencoder: {decibels['set']:.2f} dB of the set's mean error, {decibels['mean']:.2f} dB mean over pictures"
    )
    if options.json:
        options.json.write_text(
            json.dumps({"steps": options.steps, "accuracy": rows, "psnr": decibels}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
