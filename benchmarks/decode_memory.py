"""Memory of SDXL's decoder, plain and in strips: `python benchmarks/decode_memory.py [--sizes 512 1024 2048]`.

Each measurement is a process of its own: the published size with random weights, float32, one image. Measured is the
process's highest resident memory less what it held before the decode, weights and all; beside it stands what the planner
predicts, the tensors that are alive at once. Prints a table and writes `benchmarks/results/decode_memory.json`.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from eridiff.memory.plan import peak_bytes
from eridiff.memory.strips import decode_in_strips
from eridiff.models.autoencoder import Autoencoder, AutoencoderConfig

RESULTS = Path(__file__).parent / "results" / "decode_memory.json"
PLAIN_UP_TO = 1024  # pixels; more does not fit a small machine


def decode(autoencoder: Autoencoder, size: int, rows: int) -> torch.Tensor:
    """An image of `size` pixels; rows 0 is the plain decode."""
    latents = torch.zeros(1, 4, size // 8, size // 8)
    return decode_in_strips(autoencoder, latents, rows) if rows else autoencoder.decode(latents)


def resident() -> int:
    """Bytes of this process in memory, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@torch.no_grad()
def measure(size: int, rows: int) -> dict[str, float]:
    """What one decode adds to this process at its highest, in bytes, and its seconds."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig.preset("sdxl")).eval()
    del autoencoder.encoder
    decode(autoencoder, 64, rows)  # libraries load on first use
    before, start = resident(), time.perf_counter()
    decode(autoencoder, size, rows)
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"measured": highest - before, "seconds": round(time.perf_counter() - start, 1)}


def predict(size: int, rows: int) -> int:
    """The same on the meta device."""
    with torch.device("meta"):
        autoencoder = Autoencoder(AutoencoderConfig.preset("sdxl")).eval()
        return peak_bytes(lambda: decode(autoencoder, size, rows), cpu=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--one", type=int, nargs=2, metavar=("SIZE", "ROWS"), help="one measurement, in this process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    cases = [(size, 0) for size in options.sizes if size <= PLAIN_UP_TO]
    cases += [(size, options.rows) for size in options.sizes]
    rows = []
    print("| decode | pixels | measured GB | predicted GB | bytes a pixel | seconds |\n|---|---|---|---|---|---|")
    for size, height in cases:
        command = [sys.executable, __file__, "--one", str(size), str(height)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        row = {"size": size, "rows": height, "predicted": predict(size, height), **found}
        rows.append(row)
        name = f"strips of {height}" if height else "plain"
        print(f"| {name} | {size} | {row['measured'] / 1e9:.2f} | {row['predicted'] / 1e9:.2f} | "
              f"{row['measured'] / size**2:.0f} | {row['seconds']:.0f} |", flush=True)  # fmt: skip
    print(f"| strips of {options.rows} | 4096 | | {predict(4096, options.rows) / 1e9:.2f} | | |")
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": platform.machine()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
