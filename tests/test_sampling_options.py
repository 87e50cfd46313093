"""Options of samplers and schedules, asked of a model: what they change, what they leave, and that they are recorded."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler

import eridiff
from eridiff.inference.result import Result
from eridiff.request import Request
from eridiff.schedulers.samplers import DISCRETE_ALONE, SAMPLERS
from eridiff.trace.record import relative_l2
from tests import families

SIDE = {"width": 32, "height": 32}


def generated(model: Any, **asked: Any) -> Result:
    usual = {"seed": 7, "steps": 4, "cfg_scale": 1.0, "keep": ("latents", "run", "noise")} | SIDE
    return model.generate(conditioning=eridiff.Prompt(families.conditioning(model)), **usual | asked)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {family: families.inference(family) for family in ("unet", "mmdit", "flux")}


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in DISCRETE_ALONE])
def test_parts_of_a_run_of_rectified_flow_are_the_run_in_one(models: dict[str, Any], sampler: str) -> None:
    """SDXL's samplers are tried with a refiner, which goes on in the same way."""
    asked: dict[str, Any] = {"sampler": sampler, "steps": 6}
    whole = generated(models["mmdit"], **asked)
    run: Any = None
    for part in ((0.0, 0.5), (0.5, 0.8), (0.8, 1.0)):
        found = generated(models["mmdit"], part=part, noise=run, **asked)
        run = found.run
    assert found.latents is not None and whole.latents is not None
    assert torch.equal(found.latents, whole.latents)


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "euler", "churn": 3.0}, {"sampler": "heun", "churn": 3.0}, {"sampler": "ddim", "eta": 0.5},
        {"sampler": "euler_ancestral", "eta": 0.5}, {"sampler": "ddim", "timestep_offset": 0},
        {"sampler": "ddim", "final_noise": "zero"}, {"sampler": "heun", "clip_clean": 0.5}, {"noise_scale": "sigma"},
        {"schedule": "karras", "timestep_rounding": "nearest"}, {"sampler": "dpmpp_sde", "schedule": "beta"},
    ],
)  # fmt: skip
def test_an_option_changes_the_image_and_is_generated_again(models: dict[str, Any], options: dict[str, Any]) -> None:
    found = generated(models["unet"], **options)
    left = {name: value for name, value in options.items() if name in ("sampler", "schedule") and len(options) > 1}
    plain = generated(models["unet"], **({} if "dpmpp_sde" in options.values() else left))
    assert found.latents is not None and plain.latents is not None
    assert relative_l2(found.latents, plain.latents) > 1e-4
    again = Request.from_json(found.settings[0])
    assert {name: getattr(again, name) for name in options} == options
    latents = models["unet"].generate(again, conditioning=eridiff.Prompt(families.conditioning(models["unet"])), keep=("latents",)).latents  # fmt: skip
    assert torch.equal(latents, found.latents)


def test_noise_may_be_scaled_by_the_first_points_share_of_it(models: dict[str, Any]) -> None:
    """As diffusers' and A1111's latents begin, which are noise times sigma and are divided by (1 + sigma^2)^0.5."""
    model = models["unet"]
    found = generated(model, noise_scale="sigma", schedule="linspace")
    share = float(model.schedule(4, 32, 32, "linspace").sigmas[0])
    by_hand = generated(model, noise=found.noise * share, schedule="linspace")
    assert 0.99 < share < 1 and found.latents is not None and by_hand.latents is not None
    assert torch.allclose(found.latents, by_hand.latents)


@pytest.mark.parametrize("family", ["unet", "mmdit", "flux"])
def test_no_step_sees_a_clean_image_beyond_the_clipping(models: dict[str, Any], family: str) -> None:
    seen: list[float] = []
    generated(
        models[family], clip_clean=0.25, sampler="heun", callback=lambda s: seen.append(float(s.clean.abs().max()))
    )
    assert len(seen) == 4 and max(seen) == 0.25


@pytest.mark.parametrize("sampler", ["ddim", "pndm"])
def test_kohyas_samples_of_sdxl_are_its_schedulers(models: dict[str, Any], sampler: str) -> None:
    """Its defaults (get_my_scheduler in library/train_util.py): no offset; DDIM ends without noise and clips to 1."""
    model, steps = models["unet"], 5
    asked: dict[str, Any] = {"sampler": sampler, "timestep_offset": 0, "steps": steps}
    asked |= {"schedule": "leading", "final_noise": "lowest"} if sampler == "pndm" else {"final_noise": "zero", "clip_clean": 1.0}  # fmt: skip
    found = generated(model, **asked)
    settled = Request(prompt="", **asked, **SIDE, cfg_scale=1.0, seed=7).checked(model)
    table = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    reference: Any = (DDIMScheduler if sampler == "ddim" else PNDMScheduler)(**table)
    reference.set_timesteps(steps)
    points = model.sampled(model.points(settled), settled)
    predict = model.predictor(eridiff.Prompt(families.conditioning(model)), points, settled)
    asked_at = points.asked.tolist()
    latents = found.noise
    with torch.no_grad():
        for t in reference.timesteps:
            latents = reference.step(predict(latents, asked_at.index(float(t))), t, latents).prev_sample
    assert found.latents is not None and relative_l2(found.latents, latents) < 2e-4
