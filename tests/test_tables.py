"""SDXL's tables equal those of sgm, k-diffusion and diffusers, in float64."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eridiff.errors import ConfigError
from eridiff.schedulers import discrete as d

TABLES = json.loads((Path(__file__).parent / "goldens" / "sdxl-samplers.json").read_text())
ALPHAS = d.alphas_cumprod()
SIGMAS = d.sigma_table(ALPHAS)


def close(found: Tensor, expected: list[float], bound: float = 1e-12) -> bool:
    wanted = torch.tensor(expected, dtype=torch.float64)
    return found.shape == wanted.shape and bool(((found - wanted).abs() <= bound * wanted.abs().clamp_min(1e-3)).all())


def of(kind: str, place: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Steps and tables of one of diffusers' schedulers."""
    start = f"{kind}/{place}/"
    for name, table in TABLES["diffusers"].items():
        if name.startswith(start) and name.removeprefix(start).isdigit():
            yield int(name.removeprefix(start)), table


def test_the_trainings_table() -> None:
    assert close(ALPHAS, TABLES["train"]["alphas_cumprod"])
    assert close(SIGMAS[[0, -1]], [TABLES["train"]["sigma_min"], TABLES["train"]["sigma_max"]])
    zero = d.alphas_cumprod(zero_terminal_snr=True)
    for level, expected in TABLES["zero_terminal_snr"]["alphas_cumprod_at"].items():
        assert abs(float(zero[int(level)]) - expected) <= 1e-12, level


def test_sgms_legacy_table() -> None:
    for steps, table in TABLES["sgm_legacy"].items():
        found = d.legacy_timesteps(int(steps))
        if "timesteps" in table:
            assert found.tolist() == table["timesteps"]
            assert close(SIGMAS[found.long()], table["sigmas"][:-1])
        else:
            assert found.tolist() == list(range(999, -1, -1))


def test_sgms_turbo_and_edm_tables() -> None:
    for steps, table in TABLES["sgm_turbo"].items():
        assert d.turbo_timesteps(int(steps)).tolist() == table["timesteps"]
    for case in TABLES["sgm_edm"]:
        assert close(
            d.karras_sigmas(case["steps"], case["sigma_max"], case["sigma_min"], case["rho"]), case["sigmas"][:-1]
        )
    with pytest.raises(ConfigError, match="1 to 4 steps, not 5"):
        d.turbo_timesteps(5)


def test_lcms_timesteps() -> None:
    for steps, table in TABLES["lcm"].items():
        if steps.isdigit():
            assert d.lcm_timesteps(int(steps)).tolist() == table["timesteps"]
    with pytest.raises(ConfigError, match="1 to 50 steps, not 51"):
        d.lcm_timesteps(51)


@pytest.mark.parametrize(
    ("place", "function"),
    [
        ("leading/offset0", lambda n: d.leading_timesteps(n, 0)),
        ("leading/offset1", d.leading_timesteps),
        ("trailing/offset1", d.trailing_timesteps),
        ("linspace/offset1", d.linspace_timesteps),
    ],
)
def test_diffusers_spacings(place: str, function: Callable[[int], Tensor]) -> None:
    """A single step of diffusers' linspace is at timestep 0 and generates nothing; eridiff's begins where all is noise."""
    found = [
        (steps, function(steps), table)
        for steps, table in of("EulerDiscrete", place)
        if place[:3] != "lin" or steps > 1
    ]
    assert len(found) >= 9
    for steps, timesteps, table in found:
        assert close(timesteps, table["timesteps"]), steps
        assert close(d.sigmas_at(timesteps, ALPHAS), table["sigmas"][:-1]), steps


def test_diffusers_ddim_is_at_the_same_timesteps() -> None:
    for place, function in (("leading/offset1", d.leading_timesteps), ("trailing/offset1", d.trailing_timesteps)):
        for steps, table in of("DDIM", place):
            assert function(steps).tolist() == table["timesteps"] and table["final_alpha_cumprod"] == float(ALPHAS[0])


@pytest.mark.parametrize(("name", "function"), [("karras", d.karras_sigmas), ("exponential", d.exponential_sigmas)])
def test_karras_and_exponential_tables(name: str, function: Callable[[int, float, float], Tensor]) -> None:
    """Between the ends of the whole table (k-diffusion, DPM++) and of a schedule (diffusers' Euler)."""
    for steps, expected in TABLES["k_diffusion"][name].items():
        assert close(function(int(steps), float(SIGMAS[-1]), float(SIGMAS[0])), expected[:-1])
    for spacing in (d.leading_timesteps, d.trailing_timesteps):
        place = f"{spacing.__name__.split('_')[0]}/offset1/{name}"
        for steps, table in of("EulerDiscrete", place):
            own = d.sigmas_at(spacing(steps), ALPHAS)
            sigmas = function(steps, float(own[0]), float(own[-1]))
            assert close(sigmas, table["sigmas"][:-1])
            assert close(d.timesteps_at(sigmas, ALPHAS), table["timesteps"], 1e-9)


def test_noise_levels_between_the_tables_entries() -> None:
    for case in TABLES["sigma_to_timestep"]:
        found = d.timesteps_at(torch.tensor([case["sigma"]], dtype=torch.float64), ALPHAS)
        assert close(found, [case["kdiffusion_interpolated_in_log_sigma"]], 1e-9), case["sigma"]


@pytest.mark.parametrize("steps", [1, 7, 48, 61, 99, 121])
def test_every_number_of_steps_gives_as_many_points(steps: int) -> None:
    """diffusers' trailing spacing gives 62 for 61."""
    for function in (d.legacy_timesteps, d.leading_timesteps, d.trailing_timesteps, d.linspace_timesteps):
        found = function(steps)
        assert len(found) == steps and bool((found.diff() < 0).all()) and found.min() >= 0 and found.max() <= 999
