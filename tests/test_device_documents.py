"""The code of README, documents and examples runs unchanged on a machine with a GPU."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.on_gpu import folder as folder
from tests.on_gpu import gpu as gpu
from tests.pretend_gpu import OnGPU, PretendedGPU

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["README.md", "docs/embed.md", "docs/training.md", "docs/lora.md"])
def test_the_code_of_a_document_runs_on_a_gpu(
    page: str, gpu: PretendedGPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(OnGPU, "float64", page in ("README.md", "docs/embed.md"))  # diffusers' Flux makes it there
    namespace: dict[str, Any] = {}
    pattern = r"^(?:```python|<!--- invisible-code-block: python)\n(.*?)^(?:```|--->)"
    blocks = re.findall(pattern, (ROOT / page).read_text(), flags=re.M | re.S)
    assert len(blocks) > 1
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
    assert gpu.to_device > 0 or page in ("docs/embed.md", "docs/training.md")


@pytest.mark.parametrize(
    ("example", "options"),
    [
        ("train_bare_loop", ["2"]),
        ("train_lora", ["--steps", "1", "--rank", "2", "--images", "64"]),
        ("sample_in_training", ["--steps", "1", "--images", "4"]),
    ],
)
def test_an_example_runs_on_a_gpu(
    example: str, options: list[str], gpu: PretendedGPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loops of accelerate, the Hugging Face Trainer and DDP set devices by themselves, which only a real GPU allows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr("sys.argv", [example, *options])
    runpy.run_path(str(ROOT / "examples" / f"{example}.py"), run_name="__main__")
    assert gpu.to_device > 0 or example == "sample_in_training"
