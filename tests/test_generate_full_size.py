"""Published files at full size generate on 24 GB of host memory: `make test-full`. FLUX.1-dev takes 24 GB of disk meanwhile.

The weights stay in the mapped file, and each step reads them block by block: little of the memory is the program's own.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.manifest import read_manifest
from tests.sparse import write_random

pytestmark = pytest.mark.full

PROGRAM = """
import sys, threading, time
import torch
import eridiff
from eridiff import Conditioning, Prompt, load_network
from tests.families import rows

def anonymous():
    return sum(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1e6

def watch():
    while True:
        most[0] = max(most[0], anonymous())
        time.sleep(0.01)

most = [0.0]
threading.Thread(target=watch, daemon=True).start()
kind, network, vae, tokens, guidance = sys.argv[1:]
begun = time.monotonic()
model = getattr(eridiff, kind)(load_network(network), load_network(vae, part="vae"), device="cpu", progress=False)
assert all(p.itemsize == 2 for p in model.network.parameters())
loaded = time.monotonic() - begun
width, pooled = model.told_widths(model.network.config)
told = [Conditioning(text=rows(1, int(tokens), width, seed=i), pooled=rows(1, pooled, seed=2 + i)) for i in (0, 1)]
scale = {"cfg_scale": float(guidance)} if kind == "SD35Inference" else {"guidance_scale": float(guidance)}
given = Prompt(told[0], told[1] if kind == "SD35Inference" else None)
result = model.generate(conditioning=given, width=256, height=256, steps=2, seed=1, keep=("latents",), **scale)
assert result.latents.isfinite().all() and result.images[0].size == (256, 256)
print(f"anonymous {most[0]:.2f} GB, loaded in {loaded:.1f} s, generated in {time.monotonic() - begun - loaded:.0f} s")
"""


@pytest.mark.parametrize(
    ("kind", "manifest", "vae", "tokens", "guidance"),
    [("FluxInference", "flux1-dev", "ae", 512, 3.5), ("SD35Inference", "sd3.5-large", None, 333, 4.5)],
)
def test_two_steps_at_256_pixels_take_less_than_6_gb_of_own_memory(
    kind: str, manifest: str, vae: str | None, tokens: int, guidance: float, tmp_path: Path
) -> None:
    numbers = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).bfloat16()

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        """The same few million random numbers again and again, of a scale that keeps activations finite."""
        count = torch.Size(shape).numel()
        if len(shape) < 2:
            return torch.full(shape, float(name.endswith(("weight", "scale"))))
        scaled = numbers * (count / shape[0]) ** -0.5
        return scaled.repeat(-(-count // len(scaled)))[:count].reshape(shape)

    paths = []
    for name in (manifest, vae):
        if name:  # of float16 files a CPU computes convolutions a hundred times slower than of bfloat16
            tensors = {
                n: ("BF16" if dtype == "F16" else dtype, shape) for n, (dtype, shape) in read_manifest(name).items()
            }
            paths.append(write_random(tmp_path / f"{name}.safetensors", tensors, draw))
    command = [sys.executable, "-c", PROGRAM, kind, str(paths[0]), str(paths[-1]), str(tokens), str(guidance)]
    ran = subprocess.run(command, capture_output=True, text=True)
    for path in paths:
        path.unlink()
    assert ran.returncode == 0, ran.stderr[-3000:]
    print(f"\n{manifest}: {ran.stdout.strip()}")
    found = re.search(r"anonymous ([\d.]+) GB", ran.stdout)
    assert found and float(found[1]) < 6
