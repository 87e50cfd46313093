"""The examples run as they are said to, and what they train gets better."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.test_distributed import ROOT, python, torchrun

EXAMPLES = ROOT / "examples"


def losses(result: subprocess.CompletedProcess[str]) -> tuple[float, float]:
    assert result.returncode == 0, result.stderr[-4000:]
    found = re.search(r"loss (\S+) -> (\S+)", result.stdout)
    assert found
    return float(found[1]), float(found[2])


@pytest.mark.parametrize(
    ("name", "steps"),
    [("train_bare_loop", 12), pytest.param("train_accelerate", 6, marks=pytest.mark.slow), ("train_hf_trainer", 12)],
)
def test_a_loop_of_one_process_lowers_the_loss(name: str, steps: int, tmp_path: Path) -> None:
    before, after = losses(python(EXAMPLES / f"{name}.py", steps, cwd=tmp_path))
    assert after < 0.95 * before
    drawn = {path.name[:13] for path in (tmp_path / "samples").glob("*.png")}
    assert (
        drawn | {"step-00000000"} == {"step-00000000", f"step-{steps:08d}"}
        and (tmp_path / "samples" / "index.html").is_file()
    )


@pytest.mark.slow
def test_two_processes_lower_the_loss_and_share_the_sampling(tmp_path: Path) -> None:
    before, after = losses(torchrun(EXAMPLES / "train_ddp.py", 6, cwd=tmp_path))
    assert after < 0.95 * before
    assert len(list((tmp_path / "samples").glob("step-00000006-*.png"))) == 3


@pytest.mark.parametrize("name", ["train_bare_loop", "train_accelerate", "train_ddp", "train_hf_trainer"])
def test_an_example_is_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 60
