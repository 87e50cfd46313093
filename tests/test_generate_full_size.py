"""Published files at full size generate on 24 GB of host memory; printed beside it is what `eridiff plan --device cpu` predicts.

`make test-full` runs it; alone: `python -m pytest -m full -s tests/test_generate_full_size.py --basetemp FOLDER`, where the folder
has room for 24 GB (FLUX.1-dev; sd3.5-large takes 16 GB) until the case ends. The weights stay in the mapped file, and each step
reads them block by block: little of the memory is the program's own. Printed is the highest anonymous memory (RssAnon),
and less what the process held before loading beside the prediction: as malloc is, and with each block returned at once.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eridiff import FluxInference, SD35Inference
from eridiff.inference.loading import used
from eridiff.inference.placing import MALLOC, RUNTIME
from eridiff.memory.plan import stages
from eridiff.weights.locate import locate
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
    return sum(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

def watch():
    while True:
        most[0] = max(most[0], anonymous())
        time.sleep(0.002)

kind, network, vae, tokens, width, pooled, guidance = sys.argv[1:]
family = getattr(eridiff, kind)
told = [
    Conditioning(text=rows(1, int(tokens), int(width), seed=i, dtype=torch.float32),
                 pooled=rows(1, int(pooled), seed=2 + i, dtype=torch.float32))
    for i in (0, 1)
]
most = [before := anonymous()]
threading.Thread(target=watch, daemon=True).start()
begun = time.monotonic()
model = family(load_network(network), load_network(vae, part="vae"), device="cpu", progress=False)
assert all(p.itemsize == 2 for p in model.network.parameters())
loaded = time.monotonic() - begun
scale = {"cfg_scale": float(guidance)} if kind == "SD35Inference" else {"guidance_scale": float(guidance)}
given = Prompt(told[0], told[1] if kind == "SD35Inference" else None)
result = model.generate(conditioning=given, width=256, height=256, steps=2, seed=1, keep=("latents",), **scale)
assert result.latents.isfinite().all() and result.images[0].size == (256, 256)
print(most[0], before, loaded, time.monotonic() - begun - loaded)
"""


@pytest.mark.parametrize(
    ("kind", "manifest", "vae", "tokens", "pooled", "guidance"),
    [("FluxInference", "flux1-dev", "ae", 512, 768, 3.5), ("SD35Inference", "sd3.5-large", None, 333, 2048, 4.5)],
)
def test_two_steps_at_256_pixels_take_less_than_6_gb_of_own_memory(
    kind: str, manifest: str, vae: str | None, tokens: int, pooled: int, guidance: float, tmp_path: Path
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
    guided = kind == "SD35Inference"
    needed, tensors_alone = predicted(paths, guided=guided, text_length=tokens - 77 * guided)
    command = [sys.executable, "-c", PROGRAM, kind, str(paths[0]), str(paths[-1])]
    command += [str(n) for n in (tokens, 4096, pooled, guidance)]
    try:
        for way, environment, bytes_predicted in (
            ("", {}, needed),
            (f", {'='.join(MALLOC)}", dict([MALLOC]), tensors_alone),
        ):
            ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
            assert ran.returncode == 0, ran.stderr[-3000:]
            most, before, loaded, generated = map(float, ran.stdout.split())
            own = most - before
            print(
                f"\n{manifest}{way}: anonymous {most / 1e9:.2f} GB, {own / 1e6:.0f} MB of them since the imports where "
                f"{bytes_predicted / 1e6:.0f} MB are predicted; loaded in {loaded:.1f} s, generated in {generated:.0f} s"
            )
            assert most < 6e9
    finally:
        for path in paths:
            path.unlink()


def predicted(paths: list[Path], **asked: Any) -> tuple[int, int]:
    """What `eridiff plan --device cpu` says of these files, from headers alone, and what the tensors alone take."""
    names = dict(zip(("transformer", "vae"), paths, strict=True)) if len(paths) > 1 else paths[0]
    components = used(FluxInference if len(paths) > 1 else SD35Inference, locate(names).components)
    dtypes = {name: next(iter(component.entries)).dtype for name, component in components.items()}
    found = stages(components, 256, 256, steps=2, dtype=dtypes, cpu=True, **asked)
    weights = sum(s.held + s.code for s in found) + RUNTIME["cpu"]
    return weights + max(s.heap for s in found) + max(s.large for s in found), weights + max(s.work for s in found)
