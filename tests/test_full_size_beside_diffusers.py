"""sd3.5-medium and SDXL base at published size with random weights, beside diffusers: `make test-full`."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
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
def inputs(*shapes):
    return [torch.randn(shape, generator=g) for shape in shapes]
"""
LOAD = """
import eridiff
model = eridiff.load(json.loads(sys.argv[1]), dtype=getattr(torch, sys.argv[2]), device="cpu", progress=False)
note("load")
report["variant"] = model.variant
"""
REPORT = """
print(json.dumps(report))
"""
DRAW = (
    LOAD
    + """
image = model.generate("a white swan on mars", width=int(sys.argv[4]), height=int(sys.argv[4]), steps=2, seed=1).images[0]
note("generate")
image.save(sys.argv[3])
"""
    + REPORT
)
TWICE = """
note("load")
with torch.no_grad():
    output = ask()
    note("first_forward")
    ask()
    note("second_forward")
torch.save(output, sys.argv[2])
print(json.dumps(report))
"""
OURS = """
from eridiff import load_network
model = load_network(sys.argv[1], dtype=torch.float32, progress=False)
"""
SD35 = """
x, text, pooled = inputs((1, 16, 32, 32), (1, 154, 4096), (1, 2048))
"""
OUR_SD35 = (
    OURS
    + SD35
    + """
ask = lambda: model(x, text, pooled, torch.tensor([[0.75]]))
"""
    + TWICE
)
THEIR_SD35 = (
    """
from diffusers import SD3Transformer2DModel
model = SD3Transformer2DModel.from_single_file(sys.argv[1], config=sys.argv[3], torch_dtype=torch.float32).eval()
"""
    + SD35
    + """
ask = lambda: model(x, text, pooled, torch.tensor([750.0])).sample
"""
    + TWICE
)
SDXL = """
x, text, pooled = inputs((1, 4, 64, 64), (1, 77, 2048), (1, 1280))
sizes = torch.tensor([[512, 512, 0, 0, 512, 512]])
"""
OUR_SDXL = (
    OURS
    + SDXL
    + """
from eridiff.models.unet import size_vector
ask = lambda: model(x, text, size_vector(pooled, sizes), torch.tensor([[751.0]]))
"""
    + TWICE
)
THEIR_SDXL = (
    """
from diffusers import UNet2DConditionModel
model = UNet2DConditionModel.from_single_file(sys.argv[1], config=sys.argv[3], torch_dtype=torch.float32).eval()
"""
    + SDXL
    + """
ask = lambda: model(x, torch.tensor(751.0), text, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
"""
    + TWICE
)


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    """Scaled by fan-in; gains about 1, modulation (gates among it) away from zero, so that every block counts."""
    generator = torch.Generator().manual_seed(sum(name.encode()) * 7919 + math.prod(shape))
    values = torch.empty(shape).uniform_(-1, 1, generator=generator)
    if "position_ids" in name:
        return torch.arange(77)[None]
    if name.endswith("adaLN_modulation.1.bias"):
        return 0.5 + values / 4
    if len(shape) < 2:
        norm = re.search(r"norm|\.ln_|in_layers\.0|out_layers\.0|out\.0", name)
        return 1 + values / 4 if norm and name.endswith("weight") else values / 8
    if name.endswith("pos_embed") or "embedding" in name:
        return values
    return values * math.sqrt(3 / math.prod(shape[1:]))


@pytest.fixture
def sd35(tmp_path: Path) -> Iterator[dict[str, Path]]:
    single = {name: ("BF16", shape) for name, (_, shape) in read_manifest("sd3.5-medium").items()}
    found = {
        "transformer": write_random(tmp_path / "sd3.5_medium.safetensors", single, draw),
        "clip": write_random(tmp_path / "clip_l.safetensors", read_manifest("clip_l"), draw),
        "clip_g": write_random(tmp_path / "clip_g.safetensors", read_manifest("clip_g-hf"), draw),
    }
    yield found | {"vae": found["transformer"]}
    for path in found.values():
        path.unlink()


@pytest.fixture
def sdxl(tmp_path: Path) -> Iterator[dict[str, Path]]:
    path = write_random(tmp_path / "sd_xl_base_1.0.safetensors", read_manifest("sd_xl_base_1.0"), draw)
    yield {"path": path}
    path.unlink()


def child(code: str, *arguments: Any) -> dict[str, Any]:
    command = [sys.executable, "-c", CHILD + code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    report: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return report


def loads_and_draws(files: dict[str, Path], dtype: str, variant: str, size: int, folder: Path) -> None:
    """In the file's dtype in little more memory than its size; in bfloat16 an image of `size` pixels comes out."""
    model = json.dumps({name: str(path) for name, path in files.items()})
    held = sum(path.stat().st_size for path in set(files.values()))
    report = child(LOAD + REPORT, model, dtype)
    print(f"\nfiles {held / 1e9:.2f} GB; loaded in {dtype}: " + json.dumps(report))
    assert report["variant"] == variant and report["load_peak"] <= 1.1 * held
    print("\ngenerated in bfloat16: " + json.dumps(child(DRAW, model, "bfloat16", folder / "swan.png", size)))
    image = Image.open(folder / "swan.png")
    assert image.size == (size, size) and len(set(image.convert("L").tobytes())) > 8


def equals_diffusers(path: Path, ours: str, theirs: str, config: dict[str, Any], folder: Path) -> None:
    """One float32 forward each, in a process of its own; diffusers reads the file by its own conversion."""
    (folder / "config.json").write_text(json.dumps(config))
    outputs = []
    for name, code in (("ours", ours), ("theirs", theirs)):
        print(f"\n{name}: " + json.dumps(child(code, path, folder / f"{name}.pt", folder)))
        outputs.append(torch.load(folder / f"{name}.pt"))
    distance = relative_l2(*outputs)
    print(f"\nrelative L2 {distance:.1e}, variance {float(outputs[0].var()):.3f}")
    assert distance < 5e-5 and 0.1 < float(outputs[0].var()) < 100


def test_sd35_medium(sd35: dict[str, Path], tmp_path: Path) -> None:
    loads_and_draws(sd35, "bfloat16", "sd3.5-medium", 256, tmp_path)
    config = {
        "_class_name": "SD3Transformer2DModel", "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 24,
        "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
        "dual_attention_layers": list(range(13)),
    }  # fmt: skip
    equals_diffusers(sd35["transformer"], OUR_SD35, THEIR_SD35, config, tmp_path)


def test_sdxl_base(sdxl: dict[str, Path], tmp_path: Path) -> None:
    loads_and_draws(sdxl, "float16", "base", 512, tmp_path)
    config = {
        "_class_name": "UNet2DConditionModel", "block_out_channels": [320, 640, 1280], "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "sample_size": 128,
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "cross_attention_dim": 2048,
        "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    }  # fmt: skip
    equals_diffusers(sdxl["path"], OUR_SDXL, THEIR_SDXL, config, tmp_path)
