"""Two processes: sharded networks draw and train like plain ones, and many prompts are drawn by turns."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from eridiff.cli import main, sample
from eridiff.errors import ConfigError
from eridiff.ranks import agreed, spread
from eridiff.training.distributed import shard
from tests.families import FAMILIES

ROOT = Path(__file__).parents[1]


def torchrun(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments, cwd=cwd)


def python(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the two ranks found."""
    out = tmp_path_factory.mktemp("ranks") / "found.pt"
    result = torchrun("-m", "tests.two_processes", out)
    assert result.returncode == 0, result.stderr[-4000:]
    return torch.load(out, weights_only=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sharded_network_draws_and_trains_like_the_plain_one(family: str, ranks: Any) -> None:
    for rank in ranks:
        found = rank[family]
        assert 0.45 < found["share"] < 0.55 and found["same picture"] and found["same names"]
        assert found["gradients"] < 1e-9
        # an optimizer's step is in the next picture; its latents are float32
        assert found["picture after"] < 1e-5 < 1e-3 < found["change"]


def test_a_sampler_shares_the_prompts_out_unless_the_network_is_sharded(ranks: Any) -> None:
    names = [f"step-00000007-{i:02d}-a-{what}.png" for i, what in enumerate(("swan", "fox", "dog"))]
    first, second = (rank["sampled"] for rank in ranks)
    pictures = dict(zip(*first["fsdp"], strict=True))
    assert list(pictures) == names and second["fsdp"] == ([], [])
    assert first["ddp"][0] == [names[0], names[2], names[1]] and second["ddp"][0] == [names[1]]
    assert dict(zip(*first["ddp"], strict=True)) == pictures and len(set(pictures.values())) == 3


def test_what_one_rank_meets_all_are_told_and_the_run_goes_on(ranks: Any) -> None:
    first, second = (rank["failures"] for rank in ranks)
    assert "cannot be" in first["disk"] and second["disk"].startswith("TrainingError: rank 0: ")
    assert first["late"] == second["late"] == "sample_max_seconds 1 had passed"
    assert "not finite" in second["alone"][0] and first["alone"][0].startswith("TrainingError: rank 1: EridiffError")
    assert (first["alone"][1], second["alone"][1]) == (2, 0)  # what was drawn is kept


def test_networks_that_others_have_sharded_are_refused_by_name(ranks: Any) -> None:
    for rank in ranks:
        assert "sharded by fully_shard alone" in rank["failures"]["fully_shard"]
        assert "sharded by FSDP1 (FullyShardedDataParallel)" in rank["failures"]["FSDP1"]


def test_averages_of_a_schedule_free_optimizer_are_drawn_sharded_too(ranks: Any) -> None:
    assert ranks[0]["schedule-free"] == (True, True) and ranks[1]["schedule-free"][1]


def test_items_are_drawn_by_turns_and_gathered_in_order(ranks: Any) -> None:
    assert ranks[0]["spread"] == [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0)] and ranks[1]["spread"] == []
    assert [rank["agreed"] for rank in ranks] == ["of rank 0"] * 2
    assert spread(3, lambda i: i) == [0, 1, 2] and agreed("alone") == "alone"


def test_a_failure_on_one_rank_reaches_the_first_and_nobody_waits(ranks: Any) -> None:
    assert ranks[1]["failure"] == "the sea is rough"
    assert ranks[0]["failure"] == "images could not be generated on rank 1: the sea is rough"


def test_processes_draw_the_pictures_that_one_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    prompts = ["a swan on mars", "a fox at night", "a robot on the sea"]
    asked = [part for prompt in prompts for part in ("--prompt", prompt)] + ["--steps", "2"]
    result = torchrun("-m", "eridiff", "sample", *asked, "--out", tmp_path / "two", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-4000:]
    torch.set_num_threads(1)
    try:
        assert main(["sample", *asked, "--out", str(tmp_path / "one")]) == 0
    finally:
        torch.set_num_threads(threads)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert len(one) == 4 and one == two
    assert result.stdout == capsys.readouterr().out.replace("one", "two")


def test_a_rank_draws_its_share_alone_under_the_numbers_of_the_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "spread", lambda count, draw: [draw(count - 1)])
    asked = ["--prompt", "a swan on mars", "--prompt", "a fox at night", "--steps", "1", "--quiet"]
    assert main(["sample", *asked, "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["0001-a-fox-at-night.png"]


def test_only_modules_with_repeated_blocks_are_sharded() -> None:
    with pytest.raises(ConfigError, match="Linear has no repeated blocks"):
        shard(nn.Linear(2, 2))
