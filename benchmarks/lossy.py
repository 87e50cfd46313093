"""What the lossy accelerations change, in the built-in models: `python -m benchmarks.lossy [--steps 8 28]`.

Five prompts, one seed each, beside the image without them: a first-block cache at each threshold, and layers in float8, whose numbers
a CPU computes too, slowly. Prints tables and writes `benchmarks/results/lossy.json`, of which docs/speed.md has the means.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import eridiff
from eridiff.cli.sample import BUILT_IN_PROMPTS
from eridiff.float8 import use_float8

RESULTS = Path(__file__).parent / "results" / "lossy.json"
THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
Row = dict[str, float]


def generated(model: Any, **asked: Any) -> list[Any]:
    """Five results, with their latents and runs."""
    each = enumerate(BUILT_IN_PROMPTS)
    return [model.generate(prompt, seed=seed, keep=("latents", "run"), **asked) for seed, prompt in each]


def moved(exact: list[Any], other: list[Any]) -> Row:
    """The mean relative L2 distance of latents, the largest, and the mean of pixels: root mean square in levels of 255."""
    latents, levels = [], []
    for a, b in zip(exact, other, strict=True):
        latents.append(float(torch.linalg.vector_norm(b.latents - a.latents) / torch.linalg.vector_norm(a.latents)))
        pixels = [np.asarray(result.images[0], dtype=np.float64) for result in (a, b)]
        levels.append(float(np.sqrt(np.mean((pixels[0] - pixels[1]) ** 2))))
    return {"latents": statistics.mean(latents), "latents_max": max(latents), "levels": statistics.mean(levels)}


def cached(model: Any, steps: int, thresholds: list[float]) -> list[Row]:
    """Of each threshold the distances, the share of evaluations from the cache, and the mean of the median errors that it logs."""
    exact, rows = generated(model, steps=steps), []
    for threshold in thresholds:
        other = generated(model, steps=steps, block_cache=threshold)
        reuses = [result.run.reuse for result in other]
        errors = [statistics.median(reuse.errors) for reuse in reuses if reuse.errors]
        rows.append({
            "steps": steps, "threshold": threshold,
            "reused": statistics.mean(reuse.reused / reuse.evaluations for reuse in reuses),
            "measured": statistics.mean(errors) if errors else float("nan"), **moved(exact, other),
        })  # fmt: skip
    return rows


def float8(name: str, steps: int) -> Row:
    """The distances of images with float8 layers from those in bfloat16, and the error that is logged."""
    model = eridiff.load(name, device="cpu", dtype=torch.bfloat16, progress=False)
    exact = generated(model, steps=steps)
    with patch("eridiff.float8.check_device"):
        error = use_float8(model.network)
    return {"steps": steps, "measured": error, **moved(exact, generated(model, steps=steps))}


def shown(head: str, rows: dict[str, list[Row]], line: Callable[[Row], str]) -> None:
    print(f"\n| model | {head} |\n|{'---|' * (head.count('|') + 2)}")
    for name, found in rows.items():
        for row in found:
            rest = f"{row['latents']:.1%} | {row['latents_max']:.1%} | {row['levels']:.1f} | {row['measured']:.1%}"
            print(f"| {name} | {row['steps']} | {line(row)}{rest} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 28])
    parser.add_argument("--thresholds", type=float, nargs="+", default=list(THRESHOLDS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    caches: dict[str, list[Row]] = {}
    for name in ("tiny-flux", "tiny-sd35"):
        model = eridiff.load(name, device="cpu", progress=False)
        caches[name] = [row for steps in options.steps for row in cached(model, steps, options.thresholds)]
    distances = "latents | largest | levels of 255 | measured"
    shown(
        f"steps | threshold | from the cache | {distances}",
        caches,
        lambda row: f"{row['threshold']:g} | {row['reused']:.0%} | ",
    )
    names = ("tiny-flux", "tiny-sd35", "tiny-sdxl")
    floats = {name: [float8(name, steps) for steps in options.steps] for name in names}
    shown(f"steps | {distances}", floats, lambda row: "")
    results = {"torch": torch.__version__, "threads": torch.get_num_threads(), "block_cache": caches, "float8": floats}
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
