"""SDXL's tables equal those of sgm, k-diffusion and diffusers, in float64."""

import json
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mpmath
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eridiff.errors import ConfigError
from eridiff.schedulers import discrete as d
from eridiff.schedulers import tables
from eridiff.schedulers.flow_match import flow_schedule
from tests import families

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


# spacings of other programs ---------------------------------------------------------------------------------------------

SPACES = [f"{spacing}_{spread}" for spacing in ("leading", "trailing", "linspace") for spread in ("karras", "exponential", "beta")]  # fmt: skip


def beta_by_mpmath(share: float, a: float, b: float) -> float:
    """scipy's stats.beta.ppf, by another library."""
    if share in (0, 1):
        return float(share)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if mpmath.betainc(a, b, 0, middle, regularized=True) < share else (low, middle)
    return low


def of_diffusers(kind: Any, patch: pytest.MonkeyPatch, spread: str, **options: Any) -> Any:
    """A scheduler with karras, exponential or beta sigmas, of 9 steps."""
    module = import_module(kind.__module__)
    stats = SimpleNamespace(beta=SimpleNamespace(ppf=beta_by_mpmath))
    patch.setattr(module, "scipy", SimpleNamespace(stats=stats), raising=False)
    patch.setattr(module, "is_scipy_available", lambda: True)
    reference = kind(**{f"use_{spread}_sigmas": True}, **options)
    reference.set_timesteps(9)
    return reference


@pytest.mark.parametrize("name", SPACES)
def test_karras_exponential_and_beta_between_a_spacings_ends_are_diffusers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spacing, spread = name.split("_")
    table = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    reference = of_diffusers(EulerDiscreteScheduler, monkeypatch, spread, timestep_spacing=spacing, **table)
    found = families.inference("unet").schedule(9, 64, 64, name)
    assert close(found.sigmas / found.alphas, reference.sigmas.tolist(), 1e-4)  # its lowest levels are float32's 1 - a
    assert float((found.times - reference.timesteps.double()).abs().max()) < 0.01


@pytest.mark.parametrize("spread", ["karras", "exponential", "beta"])
def test_spreads_of_rectified_flow_are_diffusers(spread: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = of_diffusers(FlowMatchEulerDiscreteScheduler, monkeypatch, spread, shift=3.0)
    found = families.inference("mmdit").schedule(9, 64, 64, f"diffusers_{spread}", 3.0)
    assert close(found.sigmas, reference.sigmas.tolist(), 1e-6)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [7, 10, 33])
def test_spacings_of_diffusers_dpm_solvers(spacing: str, steps: int) -> None:
    reference = DPMSolverMultistepScheduler(timestep_spacing=spacing, steps_offset=1)
    reference.set_timesteps(steps)
    name = spacing if spacing == "trailing" else f"dpm_{spacing}"
    assert families.inference("unet").schedule(steps, 64, 64, name).times.tolist() == reference.timesteps.tolist()


def test_comfyuis_spacings_of_the_trainings_levels() -> None:
    """As its code says, by hand: four steps of 1000 levels, which are their own numbers."""
    levels = torch.arange(1000, dtype=torch.float64)
    assert tables.simple(levels, 4).tolist() == [999, 749, 499, 249, 0]
    assert tables.simple(levels, 3).tolist() == [999, 666, 333, 0]  # 1000 * 2 / 3 is cut
    assert tables.ddim_uniform(levels, 4).tolist() == [751, 501, 251, 1, 0]
    assert len(tables.ddim_uniform(levels, 30)) == 32  # every 33rd of 1000, from the second on
    places = [round(999 * beta_by_mpmath(1 - i / 4, 0.6, 0.6)) for i in range(4)]
    assert tables.beta(levels, 4).tolist() == [*places, 0]
    found = tables.kl_optimal(SIGMAS, 5)[:-1].atan()
    assert torch.allclose(found.diff(), found.diff().mean().expand(4)) and close(
        found[[0, -1]].tan(), [*SIGMAS[[-1, 0]]]
    )


def test_comfyuis_normal_is_even_in_timesteps_and_sgms_uniform_leaves_the_last_out() -> None:
    model = families.inference("unet")
    normal, uniform = (model.schedule(n, 64, 64, name) for n, name in ((5, "normal"), (4, "sgm_uniform")))
    assert close(normal.times, [999, 749.25, 499.5, 249.75, 0], 1e-9)
    assert close(uniform.times, normal.times[:-1].tolist(), 1e-9)
    assert close((normal.sigmas / normal.alphas)[:1], [float(SIGMAS[-1])]) and normal.sigmas[-1] == 0
    flow = families.inference("mmdit")
    assert torch.equal(flow.schedule(6, 64, 64, "normal").sigmas, flow.schedule(6, 64, 64, "original").sigmas)
    assert close(flow.schedule(5, 64, 64, "sgm_uniform").sigmas[:-1], flow.schedule(6, 64, 64, "original").sigmas[:-2].tolist())  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.floats(0.001, 0.999))
def test_the_beta_distributions_quantile_is_where_its_share_lies(share: float) -> None:
    place = tables.beta_quantile(share)
    assert abs(float(mpmath.betainc(0.6, 0.6, 0, place, regularized=True)) - share) < 1e-12


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(tables.FLOW_TABLES)), st.integers(2, 40), st.floats(0.5, 8))
def test_tables_of_rectified_flow_fall_to_0(name: str, steps: int, shift: float) -> None:
    for count in (1000, 10000):
        sigmas = flow_schedule(tables.FLOW_TABLES[name](steps, shift, count)).sigmas  # which must fall strictly
        assert float(sigmas[0]) <= 1 and float(sigmas[-1]) == 0
        assert float(sigmas[0]) > 0.98 or name == "ddim_uniform"
        assert len(sigmas) == steps + 1 or name in ("ddim_uniform", "beta")


# what a request says of a table ------------------------------------------------------------------------------------------


def test_an_offset_moves_leading_timesteps() -> None:
    model = families.inference("unet")
    for name in ("leading", "ddim", "dpm_leading"):
        usual, moved = model.schedule(5, 64, 64, name), model.schedule(5, 64, 64, name, timestep_offset=0)
        assert torch.equal(usual.times, moved.times + 1), name


@pytest.mark.parametrize("name", ["ddim", "leading", "karras", "linspace"])
def test_the_last_step_ends_at_no_noise_or_at_the_lowest_of_the_training(name: str) -> None:
    model = families.inference("unet")
    zero, lowest = (model.schedule(5, 64, 64, name, final_noise=end) for end in ("zero", "lowest"))
    assert zero.sigmas[-1] == 0 and torch.equal(zero.sigmas[:-1], lowest.sigmas[:-1])
    assert close((lowest.sigmas / lowest.alphas)[-1:], [float(SIGMAS[0])])


@pytest.mark.parametrize(("rounding", "rounded"), [("down", torch.floor), ("nearest", torch.round)])
@pytest.mark.parametrize("family", ["unet", "mmdit"])
def test_rounding_changes_timesteps_and_no_noise_level(family: str, rounding: str, rounded: Any) -> None:
    model, unit = families.inference(family), 1 if family == "unet" else 1000
    usual, whole = (model.schedule(7, 64, 64, "karras", timestep_rounding=r) for r in ("none", rounding))
    assert torch.equal(whole.times * unit, rounded(usual.times * unit)) and torch.equal(usual.sigmas, whole.sigmas)
