"""What it costs that a network is a trainer's: `python -m benchmarks.adopted_overhead [--hidden 512] [--rounds 15]`.

One process, one Flux of diffusers' class of moderate width with random weights in float32, the same inputs; the ways take
turns, and a round's times are told relative to our own network with the same weights in that round. Called: what is one
matrix here and several there is called in its parts; copied: it is joined into copies. The ways with a LoRA (rank 16 on every
linear layer of the blocks, by replaced forwards) are told relative to ours with a LoRA of ours beside it. Prints medians and
quartiles, what `refresh` takes, and writes `benchmarks/results/adopted_overhead.json`.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from eridiff.lora import inject_lora
from eridiff.models.flux import Flux
from eridiff.training.adopt import adopt

RESULTS = Path(__file__).parent / "results" / "adopted_overhead.json"


def trainers_network(hidden: int) -> Any:
    """As flux1-dev, but narrow and of 4 double and 8 single blocks."""
    head = hidden // 8
    torch.manual_seed(0)
    foreign: Any = FluxTransformer2DModel(
        patch_size=1, in_channels=64, out_channels=64, num_layers=4, num_single_layers=8, attention_head_dim=head,
        num_attention_heads=8, joint_attention_dim=128, pooled_projection_dim=64, guidance_embeds=True,
        axes_dims_rope=(head // 4, head // 8 * 3, head // 8 * 3),
    )  # fmt: skip
    return foreign.eval().requires_grad_(False)


def with_adapters(foreign: Any, rank: int) -> Any:
    """A LoRA on every linear layer of the blocks, put on as most trainers do."""
    for name, layer in foreign.named_modules():
        if isinstance(layer, torch.nn.Linear) and "transformer_blocks" in name:
            down = torch.nn.Linear(layer.in_features, rank, bias=False)
            up = torch.nn.Linear(rank, layer.out_features, bias=False)
            before = layer.forward
            layer.forward = lambda x, before=before, down=down, up=up: before(x) + up(down(x))
    return foreign


def ours(hidden: int) -> Flux:
    copied = adopt(trainers_network(hidden), allow_copies=True).network
    own: Any = Flux(copied.config)  # type: ignore[arg-type]
    own.load_state_dict(copied.state_dict())
    return own.eval().requires_grad_(False)


def seconds(work: Callable[..., Any], *inputs: Any) -> float:
    start = time.perf_counter()
    work(*inputs)
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--side", type=int, default=16, help="of the image, in tokens")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    with_lora = ours(options.hidden)
    inject_lora(with_lora, options.rank)
    called = adopt(trainers_network(options.hidden))
    networks: dict[str, tuple[Any, str]] = {  # each with what it is told relative to
        "ours": (ours(options.hidden), "ours"),
        "adopted, copied": (adopt(trainers_network(options.hidden), allow_copies=True).network, "ours"),
        "adopted, called": (called.network, "ours"),
        "ours with a LoRA": (with_lora, "ours with a LoRA"),
        "adopted with a LoRA": (
            adopt(with_adapters(trainers_network(options.hidden), options.rank)).network, "ours with a LoRA",
        ),
    }  # fmt: skip
    side = options.side
    inputs = (
        torch.randn(1, side * side, 64), torch.randn(1, 64, 128), torch.randn(1, 64), torch.tensor([[0.5]]), (side, side),
        torch.tensor([3.5]),
    )  # fmt: skip
    for network, _ in networks.values():
        network(*inputs)
    rounds = []
    for _ in range(options.rounds):
        rounds.append({name: seconds(network, *inputs) for name, (network, _) in networks.items()})
    print("| forward | seconds | relative to | ratio | quartiles |\n|---|---|---|---|---|")
    for name, (_, base) in networks.items():
        ratios = sorted(r[name] / r[base] for r in rounds)
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        print(
            f"| {name} | {statistics.median(r[name] for r in rounds):.3f} | {base} | {middle:.3f} | {low:.3f} to {high:.3f} |"
        )
    refreshed = statistics.median(seconds(called.refresh) for _ in range(options.rounds))
    print(f"\nrefresh without copies: {refreshed:.4f} seconds")
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": platform.machine()}
    RESULTS.parent.mkdir(exist_ok=True)
    found = {"machine": machine, "options": vars(options), "refresh": refreshed, "rounds": rounds}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
