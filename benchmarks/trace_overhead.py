"""What recording costs: `python -m benchmarks.trace_overhead` prints the table of docs/traces.md.

Times are ratios to the same evaluation without a recording, in the process's own seconds, medians of turns; sizes are of one
evaluation of the published FLUX.1-dev at 1024 x 1024 in bfloat16, which runs on the meta device.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch

from eridiff.models.flux import Flux, FluxConfig
from eridiff.trace import record

WAYS: dict[str, dict[str, Any]] = {
    "everything, to a file": {},
    "what attention and MLP of each block give": {"patterns": ("*.proj", "*.mlp", "*.linear2")},
    "one block": {"patterns": "double_blocks.0.*"},
    "everything, as probes": {"probes": True},
}
CPU = FluxConfig(hidden=768, heads=6, double_depth=2, single_depth=4)


def given(config: FluxConfig, side: int, tokens: int, **options: Any) -> tuple[Any, ...]:
    one = torch.ones(1, device=options.get("device", "cpu"))
    return (
        torch.randn(1, side * side, config.in_channels, **options), torch.randn(1, tokens, config.text_width, **options),
        torch.randn(1, config.pooled_width, **options), one, (side, side), one,
    )  # fmt: skip


def seconds(network: Flux, arguments: tuple[Any, ...], recording: Callable[[], AbstractContextManager[Any]]) -> float:
    begun = time.process_time()
    with torch.no_grad(), recording():
        network(*arguments)
    return time.process_time() - begun


def overhead(turns: int, side: int, folder: Path) -> dict[str, float]:
    """Way -> seconds with it, divided by those without."""
    network, target = Flux(CPU).eval(), folder / "t.safetensors"
    arguments = given(CPU, side, 256)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(turns):
        plain = seconds(network, arguments, nullcontext)
        for way, options in WAYS.items():
            found[way].append(seconds(network, arguments, lambda o=options: record(network, to=target, **o)) / plain)
    return {way: median(ratios) for way, ratios in found.items()}


def sizes() -> dict[str, float]:
    """Way -> GiB of FLUX.1-dev's file; a tensor under two names counts once, as it is stored once."""
    config, found = FluxConfig.preset("dev"), {}
    with torch.device("meta"):
        network = Flux(config).bfloat16()
    arguments = given(config, 64, 512, device="meta", dtype=torch.bfloat16)
    for way, options in WAYS.items():
        if options.get("probes"):
            continue
        with torch.no_grad(), record(network, device=None, **options) as recording:
            network(*arguments)
        found[way] = sum(t.nbytes for t in {id(t): t for t in recording.values()}.values()) / 2**30
        if way == next(iter(WAYS)):
            probes = len({id(t) for t in recording.values()}) * 70 * 8 / 2**30
    return {**found, "everything, as probes": probes}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--side", type=int, default=24)
    options = parser.parse_args()
    sized = sizes()
    with tempfile.TemporaryDirectory() as folder:
        times = overhead(options.turns, options.side, Path(folder))
    print("| recorded | time | GiB a step of FLUX.1-dev |\n| --- | --- | --- |")
    for way in WAYS:
        print(f"| {way} | x {times[way]:.2f} | {sized[way]:.3f} |")


if __name__ == "__main__":
    main()
