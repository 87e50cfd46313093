"""One float32 forward of MMDiT beside diffusers' on the CPU: `python benchmarks/beside_diffusers.py [--rounds 7]`.

Of sd3.5-medium's width, with few blocks, the same random weights, 1024 latent tokens and 333 of text. Both live in one
process and take turns, so that what else the machine does falls on both; the order changes every round. Prints the seconds
of each round and the ratio of the medians, and writes `benchmarks/results/beside_diffusers.json`.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel

from eridiff import load_network
from eridiff.trace.record import relative_l2

RESULTS = Path(__file__).parent / "results" / "beside_diffusers.json"


def timed(ask: Callable[[], object]) -> float:
    start = time.perf_counter()
    ask()
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--blocks", type=int, default=4)
    options = parser.parse_args()
    torch.manual_seed(0)
    theirs = SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, num_layers=options.blocks, attention_head_dim=64,
        num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
        out_channels=16, pos_embed_max_size=384, qk_norm="rms_norm",
        dual_attention_layers=tuple(range((options.blocks + 1) // 2)),
    ).eval()  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_network(folder, dtype=torch.float32, progress=False)
        x, text, pooled = torch.randn(1, 16, 64, 64), torch.randn(1, 333, 4096), torch.randn(1, 2048)
        run = ours.prepare(text, pooled, torch.tensor([0.75]), (32, 32))
        asked: dict[str, Callable[[], torch.Tensor]] = {
            "ours, forward": lambda: ours(x, text, pooled, torch.tensor([[0.75]])),
            "ours, step": lambda: ours.step(x, run, 0),
            "diffusers": lambda: theirs(x, text, pooled, torch.tensor([750.0])).sample,
        }
        distance = relative_l2(asked["ours, forward"](), asked["diffusers"]())
        seconds: dict[str, list[float]] = {name: [timed(ask)] for name, ask in asked.items()}
        for round in range(options.rounds):
            for name in sorted(asked, reverse=bool(round % 2)):
                seconds[name].append(timed(asked[name]))
    seconds = {name: values[1:] for name, values in seconds.items()}  # without the first, which warms up
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        ratio = medians[name] / medians["diffusers"]
        print(
            f"{name:14} median {medians[name]:.3f} s, {ratio:.2f} of diffusers'; {' '.join(f'{v:.3f}' for v in values)}"
        )
    print(f"relative L2 {distance:.1e}")
    RESULTS.parent.mkdir(exist_ok=True)
    found = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "blocks": options.blocks,
        "seconds": seconds,
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
