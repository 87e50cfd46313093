"""What benchmarks of one Flux's forward share: its width and inputs, ways that take turns, medians and quartiles, the file."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Round = dict[str, float]  # seconds of each way, in one turn of all


def arguments(rounds: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--side", type=int, default=16, help="of the image, in tokens")
    parser.add_argument("--rounds", type=int, default=rounds)
    return parser.parse_args()


def axes(hidden: int) -> tuple[int, int, int]:
    """Of the rotary embedding, for 8 heads."""
    head = hidden // 8
    return head // 4, head // 8 * 3, head // 8 * 3


def inputs(side: int) -> tuple[Any, ...]:
    """What `forward` of a Flux of this width takes."""
    return (
        torch.randn(1, side * side, 64), torch.randn(1, 64, 128), torch.randn(1, 64), torch.tensor([0.5]), (side, side),
        torch.tensor([3.5]),
    )  # fmt: skip


def seconds(work: Callable[..., Any], *given: Any) -> float:
    start = time.perf_counter()
    work(*given)
    return time.perf_counter() - start


def in_turns(ways: Mapping[str, Callable[..., Any]], side: int, rounds: int) -> list[Round]:
    """Every way once to warm up, then all of them in turn, so that a drift of the machine falls on all alike."""
    given = inputs(side)
    for ask in ways.values():
        ask(*given)
    return [{name: seconds(ask, *given) for name, ask in ways.items()} for _ in range(rounds)]


def print_ratios(rounds: list[Round], base: Mapping[str, str]) -> None:
    """A table: each way's median, and its ratio to the way that `base` names for it, round by round."""
    print("| forward | seconds | relative to | ratio | quartiles |\n|---|---|---|---|---|")
    for name, other in base.items():
        ratios = sorted(r[name] / r[other] for r in rounds)
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        median = statistics.median(r[name] for r in rounds)
        print(f"| {name} | {median:.3f} | {other} | {middle:.3f} | {low:.3f} to {high:.3f} |")


def write(name: str, options: argparse.Namespace, **found: Any) -> None:
    """`benchmarks/results/NAME.json`, with the machine."""
    path = Path(__file__).parent / "results" / f"{name}.json"
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": platform.machine()}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "options": vars(options), **found}, indent=1) + "\n")
