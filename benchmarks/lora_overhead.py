"""What LoRAs cost in a forward pass: `python benchmarks/lora_overhead.py [--hidden 512] [--rounds 9]`.

One process, one Flux of moderate width with random weights in float32, the same inputs; the ways take turns, and a round's
times are told relative to the plain network in that round. Prints medians and quartiles, and writes
`benchmarks/results/lora_overhead.json`.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from eridiff.lora import inject_lora, install_slots, merge_into
from eridiff.models.flux import Flux, FluxConfig

RESULTS = Path(__file__).parent / "results" / "lora_overhead.json"


def network_of_width(hidden: int) -> Flux:
    """As flux1-dev, but narrow and of 4 double and 8 single blocks."""
    head = hidden // 8
    axes = (head // 4, head // 8 * 3, head // 8 * 3)
    torch.manual_seed(0)
    return Flux(FluxConfig(64, 64, 64, 128, hidden, 8, 4.0, 4, 8, axes)).eval().requires_grad_(False)


def ways(hidden: int, rank: int) -> dict[str, Any]:
    """Networks with the same weights: plain, with empty slots, with a LoRA or four beside it, with one in the weights."""
    plain = network_of_width(hidden)
    result = {name: copy.deepcopy(plain) for name in ("slots", "lora", "four", "merged")}
    install_slots(result["slots"])
    for name in ("lora", *["four"] * 4):
        with torch.no_grad():
            for parameter in inject_lora(result[name], rank).parameters():
                parameter.normal_(std=0.02)
    lora = inject_lora(plain, rank)
    lora.detach()
    merge_into(result["merged"], lora.lora())
    return {"plain": network_of_width(hidden), **result}


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--side", type=int, default=16, help="of the picture, in tokens")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    networks = ways(options.hidden, options.rank)
    side = options.side
    inputs = (
        torch.randn(1, side * side, 64), torch.randn(1, 64, 128), torch.randn(1, 64), torch.tensor([[0.5]]), (side, side),
        torch.tensor([3.5]),
    )  # fmt: skip
    for network in networks.values():
        network(*inputs)
    rounds = [{n: seconds(lambda: network(*inputs)) for n, network in networks.items()} for _ in range(options.rounds)]  # noqa: B023
    print("| forward | seconds | relative to plain | quartiles |\n|---|---|---|---|")
    for name in networks:
        ratios = sorted(r[name] / r["plain"] for r in rounds)
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        print(f"| {name} | {statistics.median(r[name] for r in rounds):.3f} | {middle:.3f} | {low:.3f} to {high:.3f} |")
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": platform.machine()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "options": vars(options), "rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
