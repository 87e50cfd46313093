"""Networks, trajectories and tables equal the originals'."""

import json
from pathlib import Path

import pytest
import torch

from eridiff.errors import ConfigError
from eridiff.schedulers.flow_match import flux_schedule
from tests.golden import run_case

FOLDER = Path(__file__).parent / "goldens"
CASES = [
    folder.name
    for folder in sorted(FOLDER.iterdir())
    if folder.name.startswith(("flux-", "ae-", "traj-flux", "text-clip-", "text-t5-"))
]


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_equals_the_original(name: str) -> None:
    rows = run_case(FOLDER / name)
    assert len(rows) >= 3
    assert [row for row in rows if not row.passed] == []


def test_schedules_equal_the_float64_tables() -> None:
    schedules = json.loads((FOLDER / "schedules-flux.json").read_text())["schedules"]
    for case in schedules:
        found = flux_schedule(case["steps"], case["tokens"], shift=case["variant"] != "schnell").sigmas
        assert torch.allclose(found, torch.tensor(case["sigmas"], dtype=torch.float64), rtol=0, atol=1e-12), case[
            "variant"
        ]


def test_a_run_without_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one step"):
        flux_schedule(0, 256)
