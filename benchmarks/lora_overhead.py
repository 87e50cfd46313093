"""What LoRAs cost in a forward pass: `python -m benchmarks.lora_overhead [--hidden 512] [--rounds 9]`.

One process, one Flux of moderate width with random weights in float32, the same inputs; the ways take turns, and a round's
times are relative to the plain network in that round. Prints medians and quartiles, and writes
`benchmarks/results/lora_overhead.json`.
"""

import copy
from typing import Any

import torch

from benchmarks.forwards import arguments, axes, in_turns, print_ratios, write
from eridiff.lora import inject_lora, install_slots, merge_into
from eridiff.models.flux import Flux, FluxConfig


def network_of_width(hidden: int) -> Flux:
    """As flux1-dev, but narrow and of 4 double and 8 single blocks."""
    torch.manual_seed(0)
    return Flux(FluxConfig(64, 64, 64, 128, hidden, 8, 4.0, 4, 8, axes(hidden))).eval().requires_grad_(False)


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


@torch.no_grad()
def main() -> None:
    options = arguments(rounds=9)
    networks = ways(options.hidden, options.rank)
    rounds = in_turns(networks, options.side, options.rounds)
    print_ratios(rounds, dict.fromkeys(networks, "plain"))
    write("lora_overhead", options, rounds=rounds)


if __name__ == "__main__":
    main()
