"""What it costs that a network is a trainer's: `python -m benchmarks.adopted_overhead [--hidden 512] [--rounds 15]`.

One process, one Flux of diffusers' class of moderate width with random weights in float32, the same inputs; the ways take
turns, and a round's times are relative to eridiff's own network with the same weights in that round. Called: what is one
matrix here and several there is called in its parts, as `from_diffusers` and `adopt` do; copied: it is joined into copies. The
ways with a LoRA (rank 16 on every linear layer of the blocks, by replaced forwards) are relative to eridiff's with a LoRA of
eridiff's beside it. Prints medians and quartiles, what `refresh` takes, what both ways copy of a FLUX.1-dev in bfloat16 (on the meta
device), and writes `benchmarks/results/adopted_overhead.json`.
"""

import statistics
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from benchmarks.forwards import arguments, axes, in_turns, print_ratios, seconds, write
from eridiff.adopt import adopt
from eridiff.lora import inject_lora
from eridiff.models.flux import Flux


def trainers_network(hidden: int) -> Any:
    """As flux1-dev, but narrow and of 4 double and 8 single blocks."""
    torch.manual_seed(0)
    foreign: Any = FluxTransformer2DModel(
        patch_size=1, in_channels=64, out_channels=64, num_layers=4, num_single_layers=8, attention_head_dim=hidden // 8,
        num_attention_heads=8, joint_attention_dim=128, pooled_projection_dim=64, guidance_embeds=True,
        axes_dims_rope=axes(hidden),
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


def gib_of_dev() -> dict[str, float]:
    """Of a FLUX.1-dev in bfloat16: its parameters, and what is copied for an image."""
    with torch.device("meta"):
        dev: Any = FluxTransformer2DModel(guidance_embeds=True).bfloat16()
    sizes = {
        "parameters": sum(p.nbytes for p in dev.parameters()),
        "copied": adopt(dev, allow_copies=True).copied_bytes,
        "called": adopt(dev).copied_bytes,
    }
    return {name: size / 2**30 for name, size in sizes.items()}


@torch.no_grad()
def main() -> None:
    options = arguments(rounds=15)
    with_lora = ours(options.hidden)
    inject_lora(with_lora, options.rank)
    called = adopt(trainers_network(options.hidden))
    networks: dict[str, tuple[Any, str]] = {  # each with what it is relative to
        "ours": (ours(options.hidden), "ours"),
        "adopted, copied": (adopt(trainers_network(options.hidden), allow_copies=True).network, "ours"),
        "adopted, called": (called.network, "ours"),
        "ours with a LoRA": (with_lora, "ours with a LoRA"),
        "adopted with a LoRA": (
            adopt(with_adapters(trainers_network(options.hidden), options.rank)).network, "ours with a LoRA",
        ),
    }  # fmt: skip
    rounds = in_turns({name: network for name, (network, _) in networks.items()}, options.side, options.rounds)
    print_ratios(rounds, {name: base for name, (_, base) in networks.items()})
    refreshed = statistics.median(seconds(called.refresh) for _ in range(options.rounds))
    print(f"\nrefresh without copies: {refreshed:.4f} seconds")
    dev = gib_of_dev()
    print(f"FLUX.1-dev in bfloat16: {', '.join(f'{name} {size:.1f} GiB' for name, size in dev.items())}")
    write("adopted_overhead", options, refresh=refreshed, gib_of_dev=dev, rounds=rounds)


if __name__ == "__main__":
    main()
