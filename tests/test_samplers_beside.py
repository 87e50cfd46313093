"""Every sampler beside diffusers' scheduler of its method, live, latents after every step; and beside k-diffusion's goldens.

The network is a fixed function of latents and timestep. diffusers' tables are float32, off by 1e-5, and some steps compute in
float32: that bounds the comparison.
"""

import inspect
import json
import sys
from dataclasses import replace
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from torch import Tensor

from eridiff.schedulers import Schedule
from eridiff.schedulers import discrete as d
from eridiff.schedulers.flow_match import flow_schedule
from eridiff.schedulers.samplers import sampler, with_inside
from eridiff.schedulers.step import Past, ratio
from eridiff.schedulers.tables import FLOW_TABLES, rounded_times
from eridiff.trace.record import relative_l2
from tests import k_diffusion_golden

ALPHAS = d.alphas_cumprod()
SIZE = (3, 4, 2, 2)
BOUND = 1e-5  # 5.4e-6 measured at most
NAMES = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}
WEIGHTS = torch.randn(4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64) / 2


def network(x: Tensor, t: float) -> Tensor:
    return torch.tanh(torch.einsum("kc,bchw->bkhw", WEIGHTS, x)) + x * t / 2000


def noises(count: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randn(SIZE, generator=g, dtype=torch.float64) for _ in range(count)]


def diffusers_scheduler(module: str, kind: str, patch: pytest.MonkeyPatch, **options: Any) -> Any:
    """A scheduler of SDXL's table, whose noise is that of `noises`."""
    found = import_module(f"diffusers.schedulers.scheduling_{module}")
    given = iter(noises(100))
    if module == "lms_discrete":
        patch.setattr(found, "integrate", SimpleNamespace(quad=k_diffusion_golden.quad), raising=False)
    if hasattr(found, "randn_tensor"):
        patch.setattr(found, "randn_tensor", lambda *_, **__: next(given))
    table = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    known = inspect.signature(vars(found)[kind]).parameters
    spacing = {"steps_offset": 1, "timestep_spacing": "leading"} if "timestep_spacing" in known else {}
    return vars(found)[kind](**table, **spacing | options)


EXPLODING = ("euler", "euler_ancestral", "heun", "lms", "dpm2", "dpm2_ancestral")  # diffusers' latents grow with sigma
LEADING, DPM = d.leading_timesteps, d.dpm_leading_timesteps
SCHEDULERS: dict[str, tuple[str, str, Any, dict[str, Any]]] = {  # sampler -> module, class, spacing, options
    "euler": ("euler_discrete", "EulerDiscreteScheduler", LEADING, {}),
    "euler_ancestral": ("euler_ancestral_discrete", "EulerAncestralDiscreteScheduler", LEADING, {}),
    "heun": ("heun_discrete", "HeunDiscreteScheduler", LEADING, {}),
    "ddim": ("ddim", "DDIMScheduler", LEADING, {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": ("ddpm", "DDPMScheduler", LEADING, {"clip_sample": False}),
    "dpm2": ("k_dpm_2_discrete", "KDPM2DiscreteScheduler", LEADING, {}),
    "dpm2_ancestral": ("k_dpm_2_ancestral_discrete", "KDPM2AncestralDiscreteScheduler", LEADING, {}),
    "dpmpp_2m": ("dpmsolver_multistep", "DPMSolverMultistepScheduler", DPM, {}),
    "dpmpp_2m_sde": ("dpmsolver_multistep", "DPMSolverMultistepScheduler", DPM, {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_2s": ("dpmsolver_singlestep", "DPMSolverSinglestepScheduler", d.dpm_linspace_timesteps, {}),
    "unipc": ("unipc_multistep", "UniPCMultistepScheduler", DPM, {}),
    "deis": ("deis_multistep", "DEISMultistepScheduler", DPM, {}),
    "lms": ("lms_discrete", "LMSDiscreteScheduler", LEADING, {}),
    "plms": ("pndm", "PNDMScheduler", LEADING, {"skip_prk_steps": True}),
    "pndm": ("pndm", "PNDMScheduler", LEADING, {}),
    "lcm": ("lcm", "LCMScheduler", d.lcm_timesteps, {"timestep_spacing": "trailing"}),
}  # fmt: skip
LOWEST = ("ddim", "deis", "plms", "pndm")  # in diffusers these end at the lowest noise of the table
UNDEFINED = {  # what diffusers has no such prediction of
    "sample": ("euler_ancestral", "dpm2", "dpm2_ancestral", "plms", "pndm"),
    "v": ("plms", "pndm"),  # it extrapolates raw v as if all of it had been seen at one point
}
CASES = [(name, kind, 10) for kind in NAMES for name in SCHEDULERS if name not in UNDEFINED.get(kind, ())]
CASES += [("deis", "epsilon", 16), ("dpmpp_2s", "epsilon", 7), ("plms", "epsilon", 2), ("unipc", "epsilon", 2)]


def schedule_of(name: str, times: Tensor, prediction: str, final: float) -> Schedule:
    points = d.discrete_schedule(times, d.sigmas_at(times, ALPHAS), prediction, final)
    return with_inside(name, points, lambda r, t: d.discrete_points(r, t, ALPHAS, prediction))


def beside(name: str, schedule: Schedule, reference: Any, explodes: bool, eta: float | None = None) -> float:
    """The largest distance behind any step; diffusers counts every call of the network as a step of its own."""
    start = torch.randn(SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    draws, calls = iter(noises(100)), [0]

    def predict(x: Tensor, i: int) -> Tensor:
        calls[0] += 1
        return network(x, float(schedule.asked[i]) * (1000 if schedule.prediction == "velocity" else 1))

    theirs, times = start * float(getattr(reference, "init_noise_sigma", 1.0)), iter(reference.timesteps)
    x, past, worst = (theirs * float(schedule.alphas[0]) if explodes else theirs), list[Past](), 0.0
    for i in range(schedule.steps):
        calls[0] = 0
        x, seen = sampler(name, eta)(predict, x, schedule, i, past, lambda: next(draws))
        past.append(seen)
        for _ in range(calls[0]):
            t = next(times)
            told = reference.scale_model_input(theirs, t) if hasattr(reference, "scale_model_input") else theirs
            theirs = reference.step(
                network(told, float(t)), t, theirs, **({} if eta is None else {"eta": eta})
            ).prev_sample
        worst = max(worst, relative_l2(x, theirs * float(schedule.alphas[i + 1]) if explodes else theirs))
    assert next(times, None) is None
    return worst


@pytest.mark.parametrize(("name", "prediction", "steps"), CASES)
def test_latents_after_every_step_are_diffusers(
    name: str, prediction: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, kind, spacing, options = SCHEDULERS[name]
    reference = diffusers_scheduler(module, kind, monkeypatch, prediction_type=NAMES[prediction], **options)
    reference.set_timesteps(steps)
    final = float(d.sigma_table(ALPHAS)[0]) if name in LOWEST else 0.0
    schedule = schedule_of(name, spacing(steps), prediction, final)
    assert beside(name, schedule, reference, name in EXPLODING) < BOUND


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_dpmpp_sde_is_diffusers(prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a Brownian motion of given noise; torchsde's, which need not be there, gives other values of the same motion."""
    monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
    reference = diffusers_scheduler(
        "dpmsolver_sde", "DPMSolverSDEScheduler", monkeypatch, prediction_type=NAMES[prediction]
    )
    reference.set_timesteps(10)
    reference.noise_sampler = k_diffusion_golden.brownian(iter(noises(100)))
    assert beside("dpmpp_sde", schedule_of("dpmpp_sde", LEADING(10), prediction, 0.0), reference, explodes=True) < BOUND


def test_every_scheduler_that_diffusers_names_for_sdxl_is_here() -> None:
    """But for EDM's own, of networks that were trained at its noise levels."""
    compared = {kind for _, kind, *_ in SCHEDULERS.values()} | {"DPMSolverSDEScheduler"}
    assert {scheduler.name for scheduler in KarrasDiffusionSchedulers} - compared == {"EDMEulerScheduler"}


@pytest.mark.parametrize("name", ["ddim", "ddpm", "heun"])
def test_clipped_clean_images_are_diffusers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """clip_sample: DDIM keeps the noise that was seen, the others take the noise that the clipped image leaves."""
    module, kind, spacing, options = SCHEDULERS[name]
    reference = diffusers_scheduler(
        module, kind, monkeypatch, **options | {"clip_sample": True, "clip_sample_range": 0.7}
    )
    reference.set_timesteps(10)
    final = float(d.sigma_table(ALPHAS)[0]) if name in LOWEST else 0.0
    schedule = schedule_of(name, spacing(10), "epsilon", final)
    clipping = replace(schedule, clip=0.7)
    assert beside(name, clipping, reference, name in EXPLODING) < BOUND
    reference.set_timesteps(10)
    assert beside(name, schedule, reference, name in EXPLODING) > 0.01


def test_an_eta_is_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    module, kind, spacing, options = SCHEDULERS["ddim"]
    reference = diffusers_scheduler(module, kind, monkeypatch, **options)
    reference.set_timesteps(10)
    schedule = schedule_of("ddim", spacing(10), "epsilon", float(d.sigma_table(ALPHAS)[0]))
    assert beside("ddim", schedule, reference, explodes=False, eta=0.6) < BOUND


@pytest.mark.parametrize(
    ("name", "module", "kind", "table"),
    [
        ("dpmpp_2m_rf", "dpmsolver_multistep", "DPMSolverMultistepScheduler", "diffusers_dpm"),
        ("dpmpp_2s", "dpmsolver_singlestep", "DPMSolverSinglestepScheduler", "diffusers_dpm"),
        ("unipc", "unipc_multistep", "UniPCMultistepScheduler", "diffusers_unipc"),
    ],
)
def test_with_flow_sigmas_latents_after_every_step_are_diffusers(
    name: str, module: str, kind: str, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their timesteps are rounded down to whole ones."""
    flow = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    reference = diffusers_scheduler(module, kind, monkeypatch, **flow)
    reference.set_timesteps(9)
    schedule = rounded_times(flow_schedule(FLOW_TABLES[table](9, 3.0, 1000)), "down")
    assert torch.equal(schedule.times * 1000, reference.timesteps.double())
    assert beside(name, schedule, reference, explodes=False) < BOUND


def test_lcm_of_rectified_flow_is_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    found = import_module("diffusers.schedulers.scheduling_flow_match_lcm")
    given = iter(noises(9))
    monkeypatch.setattr(found, "randn_tensor", lambda *_, **__: next(given))
    reference = found.FlowMatchLCMScheduler(shift=3.0)
    reference.set_timesteps(4)
    schedule = flow_schedule(reference.sigmas.double())
    assert beside("lcm", schedule, reference, explodes=False) < 2e-5  # eridiff's boundary condition, which it has not


GOLDEN = json.loads(k_diffusion_golden.FILE.read_text())


@pytest.mark.parametrize("name", k_diffusion_golden.RUNS)
def test_latents_after_every_step_are_k_diffusions(name: str) -> None:
    """Its runs, stored, on the same formula with the same noise; in float64."""
    told, options = k_diffusion_golden.RUNS[name]
    sigmas = torch.tensor(GOLDEN["sigmas"], dtype=torch.float64)
    schedule = d.discrete_schedule(d.timesteps_at(sigmas[:-1], ALPHAS), sigmas[:-1], "sample")
    schedule = with_inside(told, schedule, lambda r, t: d.discrete_points(r, t, ALPHAS, "sample"), **options)
    levels = [ratio(points, i) for points in (schedule, schedule.inside) if points for i in range(schedule.steps)]
    draws = iter(torch.tensor(GOLDEN["noises"], dtype=torch.float64)[:, None])
    x, past, found = torch.tensor([GOLDEN["start"]], dtype=torch.float64), list[Past](), list[Tensor]()
    for i in range(schedule.steps):
        x, seen = sampler(told, **options)(
            lambda x, i: k_diffusion_golden.clean(x, levels[i]), x, schedule, i, past, lambda: next(draws)
        )
        past.append(seen)
        found.append(x / float(schedule.alphas[i + 1]))
    expected = torch.tensor(GOLDEN["runs"][name], dtype=torch.float64)[1:, None]
    stages = zip(found, expected, strict=True) if "churn" not in name else [(found[-1], expected[-1])]
    for latents, stored in stages:
        assert relative_l2(latents, stored) < 1e-12
