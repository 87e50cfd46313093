"""README's Python and the examples run as they stand on a machine with a GPU; without one, `make test` runs them too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
READ = """
import pathlib, re, sys
names = {}
for block in re.findall(r"^(?:```python|<!--- invisible-code-block: python)\\n(.*?)^(?:```|--->)", pathlib.Path(sys.argv[1]).read_text(), re.S | re.M):
    exec(block, names)
"""
DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]


def python(device: str, *arguments: object, folder: Path) -> str:
    """What a process prints that sees the GPUs, or none."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path} | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("device", DEVICES)
def test_readmes_python_runs(device: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    python(device, "-c", READ, ROOT / "README.md", folder=tmp_path)
    assert (tmp_path / "swan.png").is_file()  # of the first block


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["train_bare_loop", "train_accelerate", "train_hf_trainer", "train_ddp"])
def test_an_example_runs(name: str, device: str, tmp_path: Path) -> None:
    if name in ("train_accelerate", "train_hf_trainer"):
        pytest.importorskip("accelerate")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if name == "train_ddp" else []
    assert "loss" in python(device, *torchrun, ROOT / "examples" / f"{name}.py", 2, folder=tmp_path)
    assert list((tmp_path / "samples").glob("step-00000002-*.png"))
