"""What a first-block cache changes, in the built-in models: `python -m benchmarks.block_cache [--steps 8 28]`.

Five prompts, one seed each, at each threshold beside the exact image. Prints a table and writes
`benchmarks/results/block_cache.json`, of which docs/speed.md has the means.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

import eridiff
from eridiff.cli.sample import BUILT_IN_PROMPTS

RESULTS = Path(__file__).parent / "results" / "block_cache.json"
THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)


def compared(model: Any, steps: int, thresholds: list[float]) -> list[dict[str, float]]:
    """Of each threshold the means over the prompts, and the largest distances."""
    found: dict[float, list[dict[str, float]]] = {threshold: [] for threshold in thresholds}
    for seed, prompt in enumerate(BUILT_IN_PROMPTS):
        asked = {"seed": seed, "steps": steps, "keep": ("latents", "run")}
        exact = model.generate(prompt, **asked)
        for threshold in thresholds:
            other = model.generate(prompt, block_cache=threshold, **asked)
            reuse = other.run.reuse
            pixels = [np.asarray(result.images[0], dtype=np.float64) for result in (exact, other)]
            moved = torch.linalg.vector_norm(other.latents - exact.latents) / torch.linalg.vector_norm(exact.latents)
            found[threshold].append({
                "reused": reuse.reused / reuse.evaluations, "latents": float(moved),
                "levels": float(np.sqrt(np.mean((pixels[0] - pixels[1]) ** 2))),
            } | ({"measured": statistics.median(reuse.errors)} if reuse.errors else {}))  # fmt: skip
    names = ("reused", "latents", "levels", "measured")
    return [
        {"steps": steps, "threshold": threshold, "latents_max": max(row["latents"] for row in rows)}
        | {name: statistics.mean(row[name] for row in rows if name in row) for name in names if any(name in row for row in rows)}
        for threshold, rows in found.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 28])
    parser.add_argument("--thresholds", type=float, nargs="+", default=list(THRESHOLDS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    results: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(
        "| model | steps | threshold | from the cache | latents | largest | levels of 255 | measured |\n"
        + "|---" * 8
        + "|"
    )
    for name in ("tiny-flux", "tiny-sd35"):
        model = eridiff.load(name, device="cpu", progress=False)
        results[name] = [row for steps in options.steps for row in compared(model, steps, options.thresholds)]
        for row in results[name]:
            print(
                f"| {name} | {row['steps']} | {row['threshold']:g} | {row['reused']:.0%} | {row['latents']:.1%} | "
                f"{row['latents_max']:.1%} | {row['levels']:.1f} | {row.get('measured', float('nan')):.1%} |"
            )
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
