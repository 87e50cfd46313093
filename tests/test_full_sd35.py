"""sd3.5-medium at its published size with random weights, beside diffusers: `make test-full`."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eridiff.trace.record import relative_l2
from tests.manifest import read_manifest
from tests.sparse import write_random

pytestmark = pytest.mark.full

CHILD = """
import json, sys, time
import torch

def memory(field="VmHWM"):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024

report, begin = {"imports": memory()}, time.monotonic()
def note(name):
    global begin
    report[name + "_seconds"], report[name + "_peak"] = round(time.monotonic() - begin, 1), memory()
    begin = time.monotonic()

g = torch.Generator().manual_seed(3)
x, text, pooled = (torch.randn(shape, generator=g) for shape in ((1, 16, 32, 32), (1, 154, 4096), (1, 2048)))
"""
DRAW = """
import eridiff
model = eridiff.load(json.loads(sys.argv[1]), dtype=torch.bfloat16, device="cpu", progress=False)
note("load")
report["variant"] = model.variant
picture = model.generate("a white swan on mars", width=256, height=256, steps=2, seed=1).images[0]
note("draw")
picture.save(sys.argv[2])
print(json.dumps(report))
"""
OURS = """
from eridiff import load_network
model = load_network(sys.argv[1], dtype=torch.float32, progress=False)
note("load")
with torch.no_grad():
    output = model(x, text, pooled, torch.tensor([[0.75]]))
    note("first_forward")
    model(x, text, pooled, torch.tensor([[0.75]]))
    note("second_forward")
torch.save(output, sys.argv[2])
print(json.dumps(report))
"""
THEIRS = """
from diffusers import SD3Transformer2DModel
model = SD3Transformer2DModel.from_single_file(sys.argv[1], config=sys.argv[3], torch_dtype=torch.float32).eval()
note("load")
with torch.no_grad():
    output = model(x, text, pooled, torch.tensor([750.0])).sample
    note("first_forward")
    model(x, text, pooled, torch.tensor([750.0]))
    note("second_forward")
torch.save(output, sys.argv[2])
print(json.dumps(report))
"""


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    """Scaled by fan-in; gains about 1, modulation (gates among it) away from zero, so that every block counts."""
    generator = torch.Generator().manual_seed(sum(name.encode()) * 7919 + math.prod(shape))
    values = torch.empty(shape).uniform_(-1, 1, generator=generator)
    if name.endswith("adaLN_modulation.1.bias"):
        return 0.5 + values / 4
    if len(shape) == 1:
        norm = "norm" in name or ".ln_" in name
        return 1 + values / 4 if norm and name.endswith("weight") else values / 8
    if name.endswith("pos_embed") or "embedding" in name:
        return values
    return values * math.sqrt(3 / math.prod(shape[1:]))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    folder = tmp_path_factory.mktemp("sd35")
    single = {name: ("BF16", shape) for name, (_, shape) in read_manifest("sd3.5-medium").items()}
    found = {
        "transformer": write_random(folder / "sd3.5_medium.safetensors", single, draw),
        "clip": write_random(folder / "clip_l.safetensors", read_manifest("clip_l"), draw),
        "clip_g": write_random(folder / "clip_g.safetensors", read_manifest("clip_g-hf"), draw),
    }
    yield found | {"vae": found["transformer"]}
    for path in found.values():
        path.unlink()


def child(code: str, *arguments: Any) -> dict[str, Any]:
    command = [sys.executable, "-c", CHILD + code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    report: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return report


def test_it_loads_in_little_more_than_its_size_and_draws(files: dict[str, Path], tmp_path: Path) -> None:
    model = {name: str(path) for name, path in files.items()}
    report = child(DRAW, json.dumps(model), tmp_path / "swan.png")
    size = sum(path.stat().st_size for path in set(files.values()))
    print(f"\nfiles {size / 1e9:.2f} GB; " + json.dumps(report))
    assert report["variant"] == "sd3.5-medium" and report["load_peak"] <= 1.1 * size
    from PIL import Image

    picture = Image.open(tmp_path / "swan.png")
    assert picture.size == (256, 256) and len(set(picture.convert("L").getdata())) > 8


def test_one_forward_equals_diffusers(files: dict[str, Path], tmp_path: Path) -> None:
    config = {
        "_class_name": "SD3Transformer2DModel", "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 24,
        "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
        "dual_attention_layers": list(range(13)),
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    outputs = []
    for name, code in (("ours", OURS), ("theirs", THEIRS)):
        report = child(code, files["transformer"], tmp_path / f"{name}.pt", tmp_path)
        print(f"\n{name}: " + json.dumps(report))
        outputs.append(torch.load(tmp_path / f"{name}.pt"))
    distance = relative_l2(*outputs)
    print(f"\nrelative L2 {distance:.1e}, variance {float(outputs[0].var()):.3f}")
    assert distance < 5e-5 and 0.1 < float(outputs[0].var()) < 100
