"""The choices in which programs differ: with them said, latents are those of diffusers' pipelines, live, and of kohya's loops.

kohya's loops are written here from their source (kohya-ss/sd-scripts 48d368fa), whose lines are named; its program is not run.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    LCMScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from torch import Tensor

from eridiff import FluxInference, Prompt, SD35Inference, SDXLInference
from eridiff.errors import ConfigError
from eridiff.images import to_images
from eridiff.inference.base import USUAL
from eridiff.inference.latents import as_told, noises, rounded
from eridiff.models.flux import unpatchify
from eridiff.request import Request
from eridiff.schedulers import first_step
from eridiff.schedulers.discrete import alphas_cumprod, discrete_schedule, leading_timesteps, sigmas_at
from eridiff.schedulers.flow_match import flow_schedule
from eridiff.schedulers.guidance import Guidance, guided
from eridiff.schedulers.samplers import SAMPLERS
from eridiff.text import Conditioning
from eridiff.trace.record import relative_l2
from tests import families
from tests.devices import device as device
from tests.test_from_diffusers import flux_pipeline, sd3_pipeline, sdxl_pipeline
from tests.tiny import scaled

HEIGHT, WIDTH = 32, 64
GRID = (HEIGHT // 16, WIDTH // 16)
TABLE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
OWN: dict[str, dict[str, Any]] = {  # what diffusers' pipeline does by default
    "flux": {"guidance_scale": 3.5},
    "sd3": {"cfg_scale": 5.0, "sampler": "euler", "schedule": "diffusers"},
    "sdxl": {"cfg_scale": 5.0},
}
NARROW = {"noise_dtype": "bfloat16", "latents_dtype": "bfloat16"}
GUIDED = {"cfg_dtype": "bfloat16", "cfg_batch": "negative_first"}
ROUNDINGS: dict[str, dict[str, Any]] = {  # of a pipeline in bfloat16
    "flux": NARROW | {"time_dtype": "bfloat16_timestep", "guidance_dtype": "bfloat16"},
    "sd3": NARROW | GUIDED,
    "sdxl": NARROW | GUIDED,
}


def pipeline(family: str, dtype: torch.dtype = torch.float32, scheduler: Any = None) -> Any:
    """A small pipeline with the scheduler that is published with the family."""
    if family == "sdxl":
        pipe = sdxl_pipeline(timestep_spacing="leading", steps_offset=1)
    else:
        pipe = flux_pipeline() if family == "flux" else sd3_pipeline()
        scaled(pipe.transformer)
    if family == "flux":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15
        )
    pipe.scheduler = scheduler or pipe.scheduler
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype)


def embedded(family: str, pipe: Any) -> tuple[dict[str, Tensor], Prompt]:
    """A prompt and the empty one, as both programs take them; Flux has none."""
    text = "a photo of a cat"
    with torch.no_grad():
        if family == "flux":
            rows, pooled, _ = pipe.encode_prompt(text, text)
            return {"prompt_embeds": rows, "pooled_prompt_embeds": pooled}, Prompt(Conditioning(rows, pooled))
        texts = (text, text, text) if family == "sd3" else (text,)
        rows, other, pooled, other_pooled = pipe.encode_prompt(*texts, negative_prompt="")
    given = {
        "prompt_embeds": rows, "negative_prompt_embeds": other,
        "pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": other_pooled,
    }  # fmt: skip
    return given, Prompt(Conditioning(rows, pooled), Conditioning(other, other_pooled))


def expected(
    family: str, pipe: Any, given: dict[str, Tensor], generator: Any, steps: int, count: int = 1
) -> list[Tensor]:
    """Latents after every step of a pipeline, in eridiff's layout and space."""
    found: list[Tensor] = []

    def keep(pipe: Any, i: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found.append(tensors["latents"].float())
        return {}

    pipe(
        height=HEIGHT, width=WIDTH, num_inference_steps=steps, generator=generator,
        guidance_scale=3.5 if family == "flux" else 5.0, output_type="latent", callback_on_step_end=keep, **{name: rows.repeat(count, *[1] * (rows.ndim - 1)) for name, rows in given.items()},
    )  # fmt: skip
    if family == "flux":
        return [unpatchify(x, GRID) for x in found]
    if family == "sdxl" and isinstance(pipe.scheduler, EulerDiscreteScheduler | EulerAncestralDiscreteScheduler):
        sigmas = pipe.scheduler.sigmas[1:]
        return [x / (sigma**2 + 1) ** 0.5 for x, sigma in zip(found, sigmas, strict=True)]
    return found


def inference_of(family: str, pipe: Any) -> Any:
    kind = {"flux": FluxInference, "sd3": SD35Inference, "sdxl": SDXLInference}[family]
    return kind.from_diffusers(pipe, progress=False)


def found(inference: Any, prompt: Prompt, steps: int, count: int = 1, **asked: Any) -> list[Tensor]:
    latents: list[Tensor] = []
    rows = Prompt(prompt.positive.repeat(count), prompt.negative and prompt.negative.repeat(count))
    inference.generate(
        conditioning=rows, steps=steps, width=WIDTH, height=HEIGHT, callback=lambda step: latents.append(step.latents),
        **{"seed": 1, **asked},
    )  # fmt: skip
    return latents


def distances(family: str, dtype: torch.dtype, steps: int = 4, count: int = 1, **asked: Any) -> list[float]:
    """How far latents are from the pipeline's after each step, relative."""
    pipe = pipeline(family, dtype)
    given, prompt = embedded(family, pipe)
    wanted = expected(family, pipe, given, torch.Generator().manual_seed(1), steps, count)
    ours = found(inference_of(family, pipe), prompt, steps, count, **OWN[family], **asked)
    return [relative_l2(one, other) for one, other in zip(ours, wanted, strict=True)]


@pytest.mark.parametrize("family", ["flux", "sd3", "sdxl"])
def test_a_batch_of_one_generator_is_diffusers_after_every_step(family: str) -> None:
    assert max(distances(family, torch.float32, count=3, noise_generator="one")) < 3e-6


@pytest.mark.parametrize(
    ("family", "before", "after"), [("flux", 0.05, 7e-3), ("sdxl", 2e-2, 1.3e-2), ("sd3", 0, 2.5e-2)]
)
def test_in_bfloat16_images_are_nearer_with_all_roundings_said(family: str, before: float, after: float) -> None:
    """What is left is the rounding within the networks, whose operations are other ones in diffusers; SD 3's hides all else."""
    assert distances(family, torch.bfloat16)[-1] > before
    assert distances(family, torch.bfloat16, **ROUNDINGS[family])[-1] < after


def test_each_rounding_of_flux_moves_the_image_by_itself() -> None:
    """Of three steps the second is at 759.72: 760 in diffusers, 756 where the time is rounded before it is multiplied."""
    said = ROUNDINGS["flux"]
    assert distances("flux", torch.bfloat16, 3, **said)[-1] < 7e-3
    for other in ({"time_dtype": "float32"}, {"time_dtype": "bfloat16"}, {"guidance_dtype": "float32"}):
        assert distances("flux", torch.bfloat16, 3, **said | other)[-1] > 1.5e-2


SDXL: list[tuple[str, Any, dict[str, Any]]] = [
    ("euler_ancestral", EulerAncestralDiscreteScheduler(**TABLE, timestep_spacing="leading"), {}),
    ("euler", EulerDiscreteScheduler(**TABLE, timestep_spacing="trailing"), {"schedule": "trailing", "noise_scale": "sigma"}),
    ("euler", EulerDiscreteScheduler(**TABLE, timestep_spacing="linspace"), {"schedule": "linspace", "noise_scale": "sigma"}),
    ("ddim", DDIMScheduler(**TABLE, clip_sample=False, set_alpha_to_one=False), {}),
    ("lcm", LCMScheduler(**TABLE), {}),
    (
        "dpmpp_2m_sde", DPMSolverMultistepScheduler(**TABLE, timestep_spacing="trailing", algorithm_type="sde-dpmsolver++"),
        {"schedule": "trailing"},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "scheduler", "asked"), SDXL)
def test_sdxls_samplers_take_their_noise_as_diffusers_do(name: str, scheduler: Any, asked: dict[str, Any]) -> None:
    """Three images of one generator, then three of their own, with the noise of stochastic steps."""
    pipe = pipeline("sdxl", scheduler=scheduler)
    given, prompt = embedded("sdxl", pipe)
    inference = inference_of("sdxl", pipe)
    asked = {**OWN["sdxl"], "sampler": name, **asked}
    one = expected("sdxl", pipe, given, torch.Generator().manual_seed(1), 4, 3)
    each = expected("sdxl", pipe, given, [torch.Generator().manual_seed(seed) for seed in (4, 5, 6)], 4, 3)
    wide = pipeline("sdxl", torch.float64, scheduler)
    exact, exact_prompt = inference_of("sdxl", wide), embedded("sdxl", wide)[1]
    for wanted, noise in ((one, {"noise_generator": "one"}), (each, {"seed": [4, 5, 6]})):
        ours = found(inference, prompt, 4, 3, **asked, **noise)
        truth = found(exact, exact_prompt, 4, 3, **asked, **noise, noise_dtype="float32", latents_dtype="weights")
        rounding = max(map(relative_l2, wanted, truth))  # of diffusers' own float32
        assert rounding < 3e-6
        assert max(map(relative_l2, ours, wanted)) < max(3e-6, 2 * rounding)
    if "noise_scale" in asked:
        assert max(map(relative_l2, found(inference, prompt, 4, **{**asked, "noise_scale": "one"}), one)) > 1e-3


@pytest.mark.parametrize(("name", "before"), [("euler", 1), ("euler_ancestral", 1 + 4)])
def test_the_second_image_of_a_generator_that_goes_on(name: str, before: int) -> None:
    """As in log_validation of diffusers' scripts; its ancestral sampler takes noise in each of the four steps, the last too."""
    kind = EulerDiscreteScheduler if name == "euler" else EulerAncestralDiscreteScheduler
    pipe = pipeline("sdxl", scheduler=kind(**TABLE, timestep_spacing="leading"))
    given, prompt = embedded("sdxl", pipe)
    generator = torch.Generator().manual_seed(1)
    _, wanted = (expected("sdxl", pipe, given, generator, 4) for _ in range(2))
    asked = {**OWN["sdxl"], "sampler": name, "noise_generator": "one"}
    inference = inference_of("sdxl", pipe)
    assert max(map(relative_l2, found(inference, prompt, 4, noise_skip=before, **asked), wanted)) < 3e-6
    assert relative_l2(found(inference, prompt, 4, **asked)[-1], wanted[-1]) > 0.5


# rounding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("euler", EulerDiscreteScheduler), ("euler_ancestral", EulerAncestralDiscreteScheduler)])  # fmt: skip
def test_sdxls_latents_are_rounded_in_the_space_in_which_diffusers_has_them(name: str, kind: Any) -> None:
    """On a network that is a fixed function. diffusers' Euler steps compute in float32 of a bfloat16 output, and cast back."""
    reference = kind(**TABLE, timestep_spacing="leading")
    reference.set_timesteps(8)
    places = leading_timesteps(8)
    schedule = discrete_schedule(places, sigmas_at(places, alphas_cumprod()))
    g = torch.Generator().manual_seed(3)
    noise, weights = torch.randn(2, 4, 16, 16, generator=g).bfloat16(), torch.randn(4, 4, generator=g) / 2

    def network(x: Tensor, t: float) -> Tensor:
        return (torch.tanh(torch.einsum("kc,bchw->bkhw", weights, x.bfloat16().float())) + x * t / 2000).bfloat16()

    theirs, generator = noise * reference.init_noise_sigma, torch.Generator().manual_seed(9)
    for t in reference.timesteps:
        output = network(reference.scale_model_input(theirs, t), float(t))
        theirs = reference.step(output, t, theirs, generator=generator).prev_sample
    assert theirs.dtype == torch.bfloat16

    def same(dtype: str, space: str) -> float:
        """The share of latents that are diffusers', bit for bit."""
        x, clean, g = rounded(noise.float(), dtype, schedule, 0, space), None, torch.Generator().manual_seed(9)
        for i in range(schedule.steps):
            x, clean = SAMPLERS[name](
                lambda x, i: network(x, float(schedule.times[i])).float(), x, schedule, i, clean,
                lambda: torch.randn(noise.shape, generator=g).bfloat16().float(),
            )  # fmt: skip
            x = rounded(x, dtype, schedule, i + 1, space)
        return float((x == theirs.float()).float().mean())

    assert same("float32", name) < 0.01 and same("bfloat16", "ddim") < 0.35 < 0.4 < same("bfloat16", name)


@pytest.mark.parametrize(("name", "kind"), [("euler", FlowMatchEulerDiscreteScheduler), ("heun", FlowMatchHeunDiscreteScheduler)])  # fmt: skip
def test_latents_of_rectified_flow_are_rounded_as_diffusers_do(name: str, kind: Any) -> None:
    reference = kind(shift=3.0)
    reference.set_timesteps(8)
    schedule = flow_schedule(torch.unique_consecutive(reference.sigmas).double())
    g = torch.Generator().manual_seed(3)
    noise, weights = torch.randn(2, 16, 16, generator=g).bfloat16(), torch.randn(16, 16, generator=g) / 4

    def velocity(x: Tensor, sigma: float) -> Tensor:
        return (torch.tanh(x.bfloat16().float() @ weights) * (1 + sigma)).bfloat16()

    theirs = noise
    for t in reference.timesteps:
        theirs = reference.step(velocity(theirs, float(t) / 1000), t, theirs).prev_sample
    shares = []
    for dtype in ("float32", "bfloat16"):
        x, clean = rounded(noise.float(), dtype, schedule, 0, name), None
        for i in range(schedule.steps):
            move = SAMPLERS[name]
            x, clean = move(lambda x, i: velocity(x, float(schedule.times[i])).float(), x, schedule, i, clean, None)
            x = rounded(x, dtype, schedule, i + 1, name)
        shares.append(float((x == theirs.float()).float().mean()))
    assert shares[0] < 0.02 and shares[1] > 0.45


def test_a_pipeline_begins_with_latents_that_are_rounded() -> None:
    model = families.inference("flux")
    seen: list[Tensor] = []
    step = model.step
    model.step = lambda latents, *rest: (seen.append(latents), step(latents, *rest))[1]
    prompt = Prompt(families.conditioning(model))
    model.generate(conditioning=prompt, seed=1, steps=2, width=32, height=32, latents_dtype="bfloat16")
    assert len(seen) == 2 and all(torch.equal(x, x.bfloat16().float()) for x in seen)


def test_times_and_guidance_are_what_other_programs_compute() -> None:
    """kohya: library/flux_train_utils.py 350, 354 and flux_models.py 533; so is the original Flux, whose lines these are.

    diffusers: pipeline_flux.py (`timestep.to(latents.dtype)`, then `/ 1000`) and transformer_flux.py 725, 727.
    """
    times = torch.linspace(1, 0.003, 50, dtype=torch.float64)
    for name in ("bfloat16", "float16"):
        dtype = getattr(torch, name)
        rounded_time = 1000.0 * torch.stack([torch.full((), float(t), dtype=dtype) for t in times])
        assert torch.allclose(1000 * as_told(times, name), rounded_time.double(), rtol=1e-15)
        rounded_step = (1000 * times).float().to(dtype) / 1000
        assert torch.allclose(1000 * as_told(times, f"{name}_timestep"), (rounded_step * 1000).double(), rtol=1e-15)
    assert not torch.equal(as_told(times, "bfloat16"), as_told(times, "bfloat16_timestep"))
    assert as_told(torch.tensor([3.5], dtype=torch.float64), "bfloat16").tolist() == [3.504]
    assert as_told(times, "float32") is times


def test_the_network_is_given_the_guidance_and_times_that_are_asked_for() -> None:
    model = families.inference("flux")
    given: list[tuple[Tensor, Tensor]] = []
    prepare = model.network.prepare
    model.network.prepare = lambda text, pooled, times, grid, guidance, **rest: (
        given.append((times, guidance)), prepare(text, pooled, times, grid, guidance, **rest)
    )[1]  # fmt: skip
    asked = {"conditioning": Prompt(families.conditioning(model)), "steps": 3, "width": 32, "height": 32, "seed": 1}
    model.generate(**asked)
    model.generate(**asked, guidance_dtype="bfloat16", time_dtype="bfloat16")
    (times, guidance), (narrow, rounded_guidance) = given
    assert guidance.tolist() == [3.5] and rounded_guidance.tolist() == pytest.approx([3.504], rel=1e-7)
    assert torch.allclose(1000 * narrow, (1000 * times.bfloat16()).float(), rtol=1e-6) and not torch.equal(
        times, narrow
    )


@pytest.mark.parametrize(("family", "kind", "rounding"), [
    ("flux", FluxImg2ImgPipeline, "float_up"), ("sd3", StableDiffusion3Img2ImgPipeline, "float_up"),
    ("sdxl", StableDiffusionXLImg2ImgPipeline, "down"),
])  # fmt: skip
def test_a_strength_is_as_many_steps_as_in_diffusers(family: str, kind: Any, rounding: str) -> None:
    for steps in range(1, 51):
        pipe = SimpleNamespace(scheduler=SimpleNamespace(timesteps=torch.arange(steps), order=1))
        for percent in range(1, 101):
            strength = percent / 100
            left = len(kind.get_timesteps(pipe, steps, strength, "cpu")[0])
            if left:
                assert steps - first_step(steps, strength, rounding) == left, (steps, strength)
            else:
                with pytest.raises(ConfigError, match="rounded down, leaves none"):
                    first_step(steps, strength, rounding)
    assert [25 - first_step(25, 0.56, how) for how in ("up", "float_up", "down")] == [14, 15, 14]
    assert [28 - first_step(28, 0.3, how) for how in ("up", "float_up", "down")] == [9, 9, 8]


def test_levels_are_truncated_as_in_the_original_flux() -> None:
    """black-forest-labs/flux: `(127.5 * (x + 1.0)).byte()`; kohya: library/flux_train_utils.py 282 to 284."""
    values = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2.2 - 1.1
    wanted = (127.5 * (values.clamp(-1, 1) + 1.0)).byte()[0].permute(1, 2, 0)
    found = torch.tensor(list(to_images(values, truncate=True)[0].tobytes()), dtype=torch.uint8).view(16, 16, 3)
    assert torch.equal(found, wanted)
    model = families.inference("flux")
    asked = {"conditioning": Prompt(families.conditioning(model)), "steps": 1, "width": 32, "height": 32, "seed": 1}
    images = [model.generate(**asked, pixels=how).images[0].tobytes() for how in ("round", "truncate")]
    differences = {a - b for a, b in zip(*images, strict=True)}
    assert differences == {0, 1}


# noise ----------------------------------------------------------------------------------------------------------------


def test_noise_of_other_dtypes() -> None:
    """Half precision is float32's noise, cast; float64 is another stream."""
    model = families.inference("flux")

    def noise(**asked: Any) -> Tensor:
        given = {"conditioning": Prompt(families.conditioning(model)), "steps": 1, "width": 64, "height": 32, "seed": 1}
        return model.generate(**given, keep=["noise"], **asked).noise

    plain = noise()
    for name in ("bfloat16", "float16"):
        assert torch.equal(noise(noise_dtype=name), plain.to(getattr(torch, name)).float())
    wide = torch.randn(1, 16, 4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    assert torch.equal(noise(noise_dtype="float64"), wide) and relative_l2(wide, plain) > 0.5
    assert torch.equal(noise(noise_device="model"), plain)


def test_noise_of_the_models_device_is_made_there(device: torch.device) -> None:
    """That of a batch by one call, as in diffusers, whose pipelines make noise where the generator is."""

    def made(rows: int, seed: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn((rows, 16, 4, 4), generator=generator, device=device)

    each, one = (replace(USUAL, noise_device="model", noise_generator=how) for how in ("each", "one"))
    assert torch.equal(noises([7, 8], (16, 4, 4), each, device)(), torch.cat([made(1, 7), made(1, 8)]))
    assert torch.equal(noises([7, 7], (16, 4, 4), one, device)(), made(2, 7))


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_each_image_of_one_generator_is_generated_again_by_itself(sampler: str) -> None:
    model = families.inference("unet")
    prompt = Prompt(families.conditioning(model))
    size = {"width": 32, "height": 32}
    asked = {"seed": 3, "steps": 3, "sampler": sampler, "cfg_scale": 1.0, "noise_generator": "one", **size}
    rows = Prompt(prompt.positive.repeat(3))
    batch = model.generate(conditioning=rows, keep=["latents", "noise"], **asked)
    assert not torch.equal(batch.noise[0], batch.noise[1])
    for row, settings in enumerate(batch.settings):
        request = Request.from_json(settings)
        assert (request.seed, request.noise_row) == (3, (row, 3))
        again = model.generate(request, conditioning=prompt, keep=["latents", "noise"])
        assert torch.equal(again.noise[0], batch.noise[row])
        assert relative_l2(again.latents[0], batch.latents[row]) < 1e-5
    with pytest.raises(ConfigError, match="noise_row is of one image, and 3 are asked for"):
        model.generate(conditioning=rows, noise_row=(0, 3), **asked)


@pytest.mark.parametrize("family", ["flux", "mmdit", "unet"])
def test_a_part_goes_on_with_the_noise_that_is_asked_for(family: str) -> None:
    model = families.inference(family)
    prompt = Prompt(families.conditioning(model, 2))
    asked: dict[str, Any] = {
        "seed": 3, "steps": 4, "width": 32, "height": 32, "sampler": "euler_ancestral", "cfg_scale": 1.0,
        "noise_generator": "one", "noise_skip": 2, "latents_dtype": "bfloat16", "keep": ["latents", "run"],
        **({"noise_layout": "packed"} if family == "flux" else {}),
    }  # fmt: skip
    whole = model.generate(conditioning=prompt, **asked)
    first = model.generate(conditioning=prompt, part=(0.0, 0.5), **asked)
    assert torch.equal(
        model.generate(conditioning=prompt, part=(0.5, 1.0), noise=first.run, **asked).latents, whole.latents
    )


# guidance -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["flux", "mmdit", "unet"])
def test_the_order_of_a_guided_batch_is_what_is_asked_for(family: str) -> None:
    model = families.inference(family)
    prompt = Prompt(families.conditioning(model, 2), families.conditioning(model, 2, seed=5))
    calls: list[int] = []
    step, latents = model.step, {}
    model.step = lambda x, *rest: (calls.append(len(x)), step(x, *rest))[1]
    for order in ("positive_first", "negative_first", "apart"):
        latents[order] = model.generate(
            conditioning=prompt,
            seed=[1, 2],
            steps=2,
            width=32,
            height=32,
            cfg_scale=3.0,
            cfg_batch=order,
            keep=["latents"],
        ).latents
    assert calls == [4, 4, 4, 4, 2, 2, 2, 2]
    for order in ("negative_first", "apart"):
        assert relative_l2(latents[order], latents["positive_first"]) < 1e-5


def test_guidance_in_bfloat16_is_diffusers_line() -> None:
    """Of its pipelines: `negative + scale * (positive - negative)`, every result in the network's dtype."""
    positive, negative = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    predict = guided(
        lambda x, run, i, skipped: torch.cat([positive, negative]).float(), SimpleNamespace(rows=lambda rows: None),
        Guidance(5.0, dtype=torch.bfloat16), 1, 4,
    )  # fmt: skip
    assert torch.equal(predict(torch.zeros(1, 4, 8, 8), 0), negative + 5.0 * (positive - negative))


# kohya ----------------------------------------------------------------------------------------------------------------


def kohyas_noise(seed: int, height: int, width: int) -> Tensor:
    """library/flux_train_utils.py 235 to 244: packed tokens; flux_utils.py 425: a token holds c, ph, pw in this order."""
    h, w = height // 16, width // 16
    tokens = torch.randn(1, h * w, 16 * 2 * 2, generator=torch.Generator().manual_seed(seed))
    latents = torch.empty(1, 16, 2 * h, 2 * w)
    for row in range(h):
        for column in range(w):
            token = tokens[0, row * w + column].view(16, 2, 2)
            latents[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = token
    return latents


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-6), (torch.bfloat16, 1e-2)])
def test_kohyas_flux(dtype: torch.dtype, bound: float) -> None:
    """Its loop (library/flux_train_utils.py 350 to 387): times, guidance, noise and every step in the dtype of the run."""
    pipe = pipeline("flux", dtype)
    model = inference_of("flux", pipe)
    _, prompt = embedded("flux", pipe)
    name = str(dtype).removeprefix("torch.")
    roundings = {field: name for field in ("noise_dtype", "latents_dtype", "time_dtype", "guidance_dtype")}
    ours = found(model, prompt, 4, **OWN["flux"], noise_layout="packed", **roundings)
    model.adopted[0].refresh()
    x, sigmas = kohyas_noise(1, HEIGHT, WIDTH).to(dtype), model.schedule(4, WIDTH, HEIGHT).sigmas.tolist()
    told = (1000.0 * torch.full((1,), 3.5, dtype=dtype)).float() / 1000
    wanted = []
    for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
        time = (1000.0 * torch.full((1,), now, dtype=dtype)).float() / 1000
        run = model.network.prepare(prompt.positive.text, prompt.positive.pooled, time, GRID, told)
        with torch.no_grad():
            x = x + (then - now) * model.step(x, run, 0).to(dtype)
        wanted.append(x.float())
    assert max(map(relative_l2, ours, wanted)) < bound
    latents = found(model, prompt, 4, **OWN["flux"], **{**roundings, "noise_layout": "latents"})
    assert relative_l2(latents[-1], wanted[-1]) > 0.5
    if dtype == torch.bfloat16:
        plain = found(model, prompt, 4, **OWN["flux"], noise_layout="packed")
        assert relative_l2(plain[-1], wanted[-1]) > 5 * bound


def test_kohyas_sd3() -> None:
    """Its loop (library/sd3_train_utils.py 312 to 371): noise of the CPU in float32, the positive prompt first, guidance on clean
    images in float32, latents in the autoencoder's dtype after each step."""
    pipe = pipeline("sd3")
    model = inference_of("sd3", pipe)
    _, prompt = embedded("sd3", pipe)
    asked = {"cfg_scale": 5.0, "sampler": "euler", "schedule": "diffusers"}
    for dtype, bound in (("float32", 3e-6), ("bfloat16", 1e-3)):
        ours = found(model, prompt, 4, **asked, latents_dtype=dtype)
        model.adopted[0].refresh()
        sigmas = model.schedule(4, WIDTH, HEIGHT, "diffusers").sigmas.float()
        x = torch.randn(1, 16, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(1)).to(
            getattr(torch, dtype)
        )
        both = Conditioning.joined([prompt.positive, prompt.negative])
        wanted = []
        for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
            run = model.network.prepare(both.text, both.pooled, now[None], GRID)
            with torch.no_grad():
                clean = x - model.step(torch.cat([x, x]), run, 0) * now
            positive, negative = clean.chunk(2)
            guided = negative + (positive - negative) * 5.0
            x = (x + (x - guided) / now * (then - now)).to(getattr(torch, dtype))
            wanted.append(x.float())
        assert max(map(relative_l2, ours, wanted)) < bound
    assert relative_l2(found(model, prompt, 4, **asked)[-1], wanted[-1]) > 2 * bound
