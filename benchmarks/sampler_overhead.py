"""What sampling costs a training step that does not sample, and whether memory grows: `python -m benchmarks.sampler_overhead`.

The time is that of `maybe_sample` at a step that is not due, in microseconds: the median and the 99.9th percentile of single
calls, and the mean over many. Memory is the process's own, resident: the median of the last 20 of 120 steps of training the
built-in model less that of the first 20, with an image at each step and, beside it, without. Writes `benchmarks/results/sampler_overhead.json`; `--memory` prints that part alone.
"""

import argparse
import gc
import json
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import eridiff
from eridiff.training import Sampler

RESULTS = Path(__file__).parent / "results" / "sampler_overhead.json"


def resident() -> int:
    """Bytes of this process in memory, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def idle(sampler: Sampler, calls: int = 200_000) -> dict[str, float]:
    """Microseconds of a call that does not generate."""
    start = time.perf_counter()
    for _ in range(calls):
        sampler.maybe_sample(1)
    mean = (time.perf_counter() - start) / calls
    single = []
    for _ in range(calls):
        begun = time.perf_counter()
        sampler.maybe_sample(1)
        single.append(time.perf_counter() - begun)
    single.sort()
    looked = []  # the call, once a second, that looks for the file on_demand
    for _ in range(1000):
        sampler._look = 0.0
        begun = time.perf_counter()
        sampler.maybe_sample(1)
        looked.append(time.perf_counter() - begun)
    return {
        "mean_us": round(mean * 1e6, 3), "median_us": round(statistics.median(single) * 1e6, 3),
        "p999_us": round(single[int(calls * 0.999)] * 1e6, 3), "looking_for_the_file_us": round(statistics.median(looked) * 1e6, 3),
    }  # fmt: skip


def memory(sampler: Sampler, sampling: bool, steps: int = 120, part: int = 20) -> dict[str, Any]:
    """Resident bytes over steps of training, with or without a sampling event after each."""
    optimizer = torch.optim.AdamW(sampler.inference.network.parameters(), lr=1e-4)
    readings = []
    for step in range(steps + part):  # the first part warms up
        for p in sampler.inference.network.parameters():
            p.grad = torch.full_like(p, 1e-3)
        optimizer.step()
        if sampling:
            sampler.sample(step % 10)
        gc.collect()
        readings.append(resident())
    before, after = (int(statistics.median(r)) for r in (readings[part : 2 * part], readings[-part:]))
    return {"events": steps - part, "before_bytes": before, "after_bytes": after, "growth_bytes": after - before}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--memory", action="store_true", help="measure and print memory alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = eridiff.load(device="cpu", progress=False)
        model.network.requires_grad_(True)
        section = {"prompts": ["a swan on mars", "a fox at night"], "sample_steps": 2, "out": folder}
        sampler = Sampler(model, section, raise_errors=True)
        if options.memory:
            print(json.dumps(memory(sampler, sampling=True)))
            return
        found = {
            "idle": idle(sampler),
            "memory_without_sampling": memory(sampler, sampling=False),
            "memory": memory(sampler, sampling=True),
        }
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": platform.machine()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, **found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
