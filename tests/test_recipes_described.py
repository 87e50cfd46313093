"""Recipes give the latents that the programs' own loops give, as their sources describe them, in float32.

The loops are written anew from the lines that each names, around eridiff's networks; schedulers of diffusers are the real ones
where a program uses them. The programs themselves are not run here: shared bounds were measured when they were (3e-6).
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from eridiff import Conditioning, Prompt, load
from eridiff.inference import DiffusionInference
from eridiff.models.flux import patchify, unpatchify
from eridiff.models.unet import size_vector
from eridiff.recipe import recipe
from eridiff.run_files import ai_toolkit
from tests import k_diffusion_golden

SIDE, STEPS, SEED = 64, 6, 7
Told = tuple[Conditioning, Conditioning]


@cache
def trained(name: str) -> Any:
    """A built-in model: a trained network takes noise away, and so rounding does not grow from step to step."""
    return load(name, progress=False)


def told(model: DiffusionInference) -> Told:
    """What a prompt and its negative are encoded to."""
    both = model.encode_prompt("a robot on the sea", "a small pizza", cfg_scale=2.0)
    assert both.negative is not None
    return both.positive, both.negative


def generated(model: DiffusionInference, name: str, **asked: Any) -> Tensor:
    """The latents that a recipe gives."""
    result = model.generate(
        conditioning=Prompt(*told(model)), recipe=name, width=SIDE, height=SIDE, steps=STEPS, seed=SEED, keep=("latents",), **asked
    )  # fmt: skip
    assert result.latents is not None
    return result.latents


def in_float64(model: DiffusionInference) -> Any:
    """A model whose network computes in float64, for a loop."""
    return SimpleNamespace(network=deepcopy(model.network).double(), encode_prompt=model.encode_prompt)


def distance(found: Tensor, described: Tensor) -> float:
    return float((found - described).double().norm() / described.double().norm())


def both(rows: Told) -> tuple[Tensor, Tensor]:
    """Texts and pooled vectors, negative first, as most loops batch them."""
    return torch.cat([rows[1].text, rows[0].text]), torch.cat([rows[1].pooled, rows[0].pooled])


@torch.no_grad()
def kohya_flux(model: Any) -> Tensor:
    """library/flux_train_utils.py of kohya-ss/sd-scripts 48d368fa: noise 237, schedule 306 to 332, steps 353 to 387."""
    side = SIDE // 16
    x = torch.randn(1, side * side, 64, generator=torch.Generator().manual_seed(SEED))
    shift = math.exp((1.15 - 0.5) / (4096 - 256) * (side * side - 256) + 0.5)
    times = [shift / (shift + 1 / t - 1) if t else 0.0 for t in torch.linspace(1, 0, STEPS + 1).tolist()]
    row, _ = told(model)
    for now, then in zip(times[:-1], times[1:], strict=True):
        velocity = model.network(x, row.text, row.pooled, torch.tensor([now]), (side, side), torch.tensor([3.5]))
        x = x + (then - now) * velocity
    return unpatchify(x, (side, side))


@torch.no_grad()
def kohya_sd3(model: Any) -> Tensor:
    """library/sd3_train_utils.py of kohya-ss/sd-scripts 48d368fa: sigmas 282 to 291, noise 321, steps 339 to 368."""
    x = torch.randn(1, 16, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(SEED))

    def shifted(time: Tensor) -> Tensor:
        return 3 * time / (1 + 2 * time)

    ends = [1000 * float(shifted(torch.tensor(t))) for t in (1.0, 1 / 1000)]  # the table's own last and first
    sigmas = [*(float(shifted(t / 1000)) for t in torch.linspace(*ends, STEPS)), 0.0]
    text, pooled = both(told(model))
    for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
        velocity = model.network(torch.cat([x, x]), text, pooled, torch.tensor([now]))
        negative, positive = (x - now * v for v in velocity.chunk(2))
        clean = negative + 7.5 * (positive - negative)
        x = x + (x - clean) / now * (then - now)
    return x


def of_kohya(sampler: str) -> Any:
    """library/train_util.py of kohya-ss/sd-scripts 48d368fa, 6199 to 6247: the scheduler of a name."""
    import diffusers as d
    from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler

    classes: dict[str, Any] = {
        "ddim": d.DDIMScheduler, "pndm": d.PNDMScheduler, "lms": LMSDiscreteScheduler, "euler": d.EulerDiscreteScheduler,
        "euler_ancestral": d.EulerAncestralDiscreteScheduler, "heun": d.HeunDiscreteScheduler, "dpm2": d.KDPM2DiscreteScheduler,
        "dpm2_ancestral": d.KDPM2AncestralDiscreteScheduler, "dpmpp_2m": d.DPMSolverMultistepScheduler,
        "dpmpp_2s": d.DPMSolverSinglestepScheduler,
    }  # fmt: skip
    scheduler = classes[sampler](
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    if getattr(scheduler.config, "clip_sample", None) is False:
        scheduler.config.clip_sample = True
    return scheduler


@torch.no_grad()
def with_scheduler(model: Any, scheduler: Any, scale: float, size: int = SIDE) -> Tensor:
    """SDXL's loop around a scheduler: library/sdxl_lpw_stable_diffusion.py 691 to 698, 905 to 945 of kohya's; diffusers' too."""
    dtype = next(model.network.parameters()).dtype
    torch.manual_seed(SEED)  # the steps' noise goes on in the same generator
    scheduler.set_timesteps(STEPS)
    text, pooled = (rows.to(dtype) for rows in both(told(model)))
    x = torch.randn(1, 4, size // 8, size // 8).to(dtype) * scheduler.init_noise_sigma
    vector = size_vector(pooled, torch.tensor([[size, size, 0, 0, size, size]] * 2, dtype=torch.float32))
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(torch.cat([x, x]), t)
        negative, positive = model.network(scaled, text, vector, t.reshape(1).float()).chunk(2)
        x = scheduler.step(negative + scale * (positive - negative), t, x).prev_sample
    return x


@pytest.mark.parametrize(("name", "loop"), [("tiny-flux", kohya_flux), ("tiny-sd35", kohya_sd3)])
def test_kohyas_recipe_gives_the_latents_of_its_loop(name: str, loop: Callable[[Any], Tensor]) -> None:
    model = trained(name)
    assert distance(generated(model, "kohya"), loop(model)) < 3e-6


@pytest.mark.parametrize("sampler", [None, *recipe("kohya", "unet").samplers])
def test_kohyas_recipe_gives_the_latents_of_each_scheduler_of_its_names(
    sampler: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    integrate = SimpleNamespace(quad=k_diffusion_golden.quad)  # scipy's, which need not be there
    monkeypatch.setattr("diffusers.schedulers.scheduling_lms_discrete.integrate", integrate, raising=False)
    randn = torch.randn  # whose float64 noise would be another one
    monkeypatch.setattr(torch, "randn", lambda *shape, dtype=None, **how: randn(*shape, **how).to(dtype))
    model = trained("tiny-sdxl")
    exact, described = (with_scheduler(m, of_kohya(sampler or "ddim"), 7.5) for m in (in_float64(model), model))
    # some multiply rounding: diffusers' DDIM in float32 is 7e-6 from the same in float64, its PNDM 4e-6, its DPM2 3e-6
    rounding = distance(described, exact)
    assert rounding < 2e-5
    assert distance(generated(model, "kohya", sampler=sampler), described) < max(3e-6, 2 * rounding)


@torch.no_grad()
def onetrainer_flux(model: Any) -> Tensor:
    """modules/modelSampler/FluxSampler.py of Nerogar/OneTrainer: diffusers' scheduler with the size's mu, from its number of steps."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    side = SIDE // 16
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler.set_timesteps(STEPS, mu=(1.15 - 0.5) / (4096 - 256) * (side * side - 256) + 0.5)
    x = patchify(torch.randn(1, 16, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(SEED)))
    row, _ = told(model)
    for t in scheduler.timesteps:
        velocity = model.network(x, row.text, row.pooled, t.reshape(1) / 1000, (side, side), torch.tensor([3.5]))
        x = scheduler.step(velocity, t, x).prev_sample
    return unpatchify(x, (side, side))


def test_onetrainers_recipe_gives_the_latents_of_its_loop() -> None:
    model = trained("tiny-flux")
    before, model.model.sampling = (
        model.sampling,
        replace(model.sampling, shift=True),
    )  # as dev has it, the small model has not
    found = generated(model, "onetrainer")
    model.model.sampling = before
    assert distance(found, onetrainer_flux(model)) < 3e-6


def of_ai_toolkit(sampler: str, karras: bool = False) -> Any:
    """toolkit/sampler.py of ostris/ai-toolkit 27a03a91, 31 to 185: the scheduler of a name for SDXL."""
    import diffusers as d
    from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler

    classes: dict[str, Any] = {
        "ddpm": d.DDPMScheduler, "ddim": d.DDIMScheduler, "euler": d.EulerDiscreteScheduler,
        "euler_ancestral": d.EulerAncestralDiscreteScheduler, "lms": LMSDiscreteScheduler, "dpmpp_2m": d.DPMSolverMultistepScheduler,
    }  # fmt: skip
    config = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False,
        "steps_offset": 0, "timestep_spacing": "leading", "skip_prk_steps": True, "interpolation_type": "linear",
    }  # fmt: skip
    return classes[sampler].from_config({**config, "prediction_type": "epsilon", "use_karras_sigmas": karras})


@pytest.mark.parametrize("sampler", [None, "ddim", "euler", "euler_ancestral"])
def test_ai_toolkits_recipe_gives_the_latents_of_each_scheduler_of_its_names(sampler: str | None) -> None:
    model = trained("tiny-sdxl")
    described = with_scheduler(model, of_ai_toolkit(sampler or "ddpm"), 7.0)
    assert distance(generated(model, "ai-toolkit", sampler=sampler), described) < 3e-6


@torch.no_grad()
def ai_toolkit_sd3(model: Any) -> Tensor:
    """toolkit/samplers/custom_flowmatch_sampler.py of ostris/ai-toolkit 27a03a91, 24: the shift is 1; the loop is diffusers'."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    x = torch.randn(1, 16, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(SEED))
    text, pooled = both(told(model))
    for t in scheduler.timesteps:
        negative, positive = model.network(torch.cat([x, x]), text, pooled, t.reshape(1) / 1000).chunk(2)
        x = scheduler.step(negative + 7.0 * (positive - negative), t, x).prev_sample
    return x


def test_ai_toolkits_recipe_gives_the_latents_of_its_loop_for_sd3() -> None:
    model = trained("tiny-sd35")
    assert distance(generated(model, "ai-toolkit"), ai_toolkit_sd3(model)) < 3e-6


@pytest.mark.parametrize(("name", "sampler"), [("k_euler", "euler"), ("k_lms", "lms"), ("k_dpmsolver++", "dpmpp_2m")])
def test_ai_toolkits_samplers_with_k_take_karras_levels(
    name: str, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    integrate = SimpleNamespace(quad=k_diffusion_golden.quad)
    monkeypatch.setattr("diffusers.schedulers.scheduling_lms_discrete.integrate", integrate, raising=False)
    model = trained("tiny-sdxl")
    process = {"model": {"arch": "sdxl"}, "sample": {"prompts": ["a"], "sampler": name}}
    said = ai_toolkit.read({"config": {"process": [process]}}).sample.each()[0]
    assert said["sampler"] == sampler
    levels = {name: said[name] for name in ("schedule", "timestep_rounding") if name in said}
    found = generated(model, "ai-toolkit", sampler=sampler, **levels)
    described = with_scheduler(model, of_ai_toolkit(sampler, karras=True), 7.0)
    assert distance(found, described) < (1e-5 if sampler == "dpmpp_2m" else 3e-6)  # of dpmpp_2m 3.05e-6 was measured
    assert distance(generated(model, "ai-toolkit", sampler=sampler), described) > 1e-3
