"""Networks, trajectories and tables equal the originals'."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eridiff.errors import ConfigError
from eridiff.schedulers.flow_match import (
    candle_sigmas,
    diffusers_sigmas,
    flow_schedule,
    flux_schedule,
    sd3_sigmas,
)
from tests.golden import run_case

FOLDER = Path(__file__).parent / "goldens"
CASES = [path.parent.name for path in sorted(FOLDER.glob("*/expected.safetensors"))]


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


@pytest.mark.parametrize(
    ("function", "table", "bound"),
    [
        (sd3_sigmas, "reference_float64_formula", 1e-12),
        (sd3_sigmas, "reference_float32", 1.3e-7),  # the original's own float32 rounding
        (diffusers_sigmas, "diffusers_float32", 0),
        (candle_sigmas, "candle_float64", 1e-12),
    ],
)
def test_sd3_tables_equal_the_originals(function: Callable[[int, float], Tensor], table: str, bound: float) -> None:
    for case in json.loads((FOLDER / "sd3-samplers.json").read_text())["tables"]:
        found = function(case["steps"], case["shift"])
        expected = torch.tensor(case[table], dtype=torch.float64)
        assert found.shape == expected.shape and float((found - expected).abs().max()) <= bound, case["steps"]


@pytest.mark.parametrize("function", [sd3_sigmas, diffusers_sigmas, candle_sigmas, flux_schedule])
def test_a_run_without_steps_is_refused(function: Callable[[int, float], object]) -> None:
    with pytest.raises(ConfigError, match="at least one step"):
        function(0, 256)


@pytest.mark.parametrize(
    "sigmas", [[1.0], [0.5, 0.7, 0.0], [1.0, 1.0, 0.0], [1.2, 0.0], [1.0, -0.1], [float("nan"), 0.0]]
)
def test_sigmas_that_do_not_fall_are_refused(sigmas: list[float]) -> None:
    with pytest.raises(ConfigError, match="sigmas must be"):
        flow_schedule(torch.tensor(sigmas))
