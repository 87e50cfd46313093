"""SDXL's trajectories: every sampler of sgm, k-diffusion and diffusers on its own table, with a network or a formula."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eridiff.schedulers import Schedule
from eridiff.schedulers import discrete as d
from eridiff.schedulers.guidance import classifier_free, rescaled
from eridiff.schedulers.samplers import SAMPLERS, Sampler, euler_ancestral, mixed
from eridiff.trace.hashfill import parameter, uniform, value
from tests.golden.case import Row, row
from tests.golden.sdxl import load_unet

ALPHAS = d.alphas_cumprod()
TABLE = d.sigma_table(ALPHAS)
ENDS = float(TABLE[-1]), float(TABLE[0])
PLACES = {"legacy": d.legacy_timesteps, "leading": d.leading_timesteps, "trailing": d.trailing_timesteps}


def on_table(name: str, steps: int, prediction: str = "epsilon", zero_snr: bool = False) -> Schedule:
    alphas = d.alphas_cumprod(zero_snr)
    if zero_snr:
        alphas[-1] = 2.0**-24  # diffusers' Euler puts this in the place of 0
    timesteps = PLACES[name](steps)
    return d.discrete_schedule(timesteps, d.sigmas_at(timesteps, alphas), prediction)


def through(sigmas: Tensor, rounded: bool = False) -> Schedule:
    timesteps = d.timesteps_at(sigmas, ALPHAS)
    return d.discrete_schedule(timesteps.round() if rounded else timesteps, sigmas)


def karras_within(steps: int) -> Schedule:
    """diffusers' Euler takes the ends of its own schedule."""
    own = d.sigmas_at(d.leading_timesteps(steps), ALPHAS)
    return through(d.karras_sigmas(steps, float(own[0]), float(own[-1])))


def dpm_leading(steps: int) -> Schedule:
    """diffusers' DPM++ divides into one part more and drops the lowest."""
    timesteps = d.leading_timesteps(steps + 1)[:-1]
    return d.discrete_schedule(timesteps, d.sigmas_at(timesteps, ALPHAS))


def uniform_in_time(steps: int) -> Schedule:
    """k-diffusion's get_sigmas: evenly in time, between entries linear in log sigma."""
    timesteps = d.linspace_timesteps(steps)
    low = timesteps.floor().long().clamp(max=998)
    logs = TABLE.log()
    return d.discrete_schedule(timesteps, (logs[low] + (timesteps - low) * (logs[low + 1] - logs[low])).exp())


def quantised_exponential(steps: int) -> Schedule:
    sigmas = d.exponential_sigmas(steps, *ENDS)
    nearest = (sigmas.log()[:, None] - TABLE.log()).abs().argmin(dim=1)
    return d.discrete_schedule(nearest.double(), sigmas)


def edm(steps: int) -> Schedule:
    """sgm's EDM table; the network is told the nearest entry of the training's."""
    sigmas = d.karras_sigmas(steps, 14.6146, 0.0292, rho=3.0)
    return d.discrete_schedule((sigmas[:, None] - TABLE).abs().argmin(dim=1).double(), sigmas)


LCM = d.lcm_timesteps
# name -> (sampler, schedule for a number of steps, whether in variance-exploding space, guidance scale)
RUNS: dict[str, tuple[Sampler, Callable[[int], Schedule], bool, float]] = {
    "sgm.euler": (SAMPLERS["euler"], partial(on_table, "legacy"), True, 5),
    "sgm.euler_ancestral": (SAMPLERS["euler_ancestral"], partial(on_table, "legacy"), True, 5),
    "sgm.heun": (SAMPLERS["heun"], partial(on_table, "legacy"), True, 5),
    "sgm.dpmpp_2m": (SAMPLERS["dpmpp_2m"], partial(on_table, "legacy"), True, 5),
    "sgm.euler.edm_table": (SAMPLERS["euler"], edm, True, 3),
    "sgm.euler.v": (SAMPLERS["euler"], partial(on_table, "legacy", prediction="v"), True, 3),
    "diffusers.euler.leading": (SAMPLERS["euler"], partial(on_table, "leading"), True, 5),
    "diffusers.euler.trailing.no_cfg": (SAMPLERS["euler"], partial(on_table, "trailing"), True, 1),
    "diffusers.euler_ancestral.trailing.no_cfg": (SAMPLERS["euler_ancestral"], partial(on_table, "trailing"), True, 1),
    "diffusers.ddim.eta0": (SAMPLERS["ddim"], partial(on_table, "leading"), False, 5),
    "diffusers.ddim.eta1": (euler_ancestral, partial(on_table, "leading"), False, 5),
    "diffusers.ddim.trailing.v.zero_snr": (SAMPLERS["ddim"], partial(on_table, "trailing", prediction="v"), False, 5),
    "diffusers.heun.leading": (SAMPLERS["heun"], partial(on_table, "leading"), True, 5),
    "diffusers.dpmpp_2m.leading": (SAMPLERS["dpmpp_2m"], dpm_leading, False, 5),
    "diffusers.dpmpp_2m.karras": (SAMPLERS["dpmpp_2m"], lambda n: through(d.karras_sigmas(n, *ENDS), True), False, 5),
    "diffusers.euler.karras": (SAMPLERS["euler"], karras_within, True, 5),
    "diffusers.lcm": (SAMPLERS["lcm"], lambda n: d.discrete_schedule(LCM(n), d.sigmas_at(LCM(n), ALPHAS)), False, 1),
    "diffusers.euler.v.zero_snr": (SAMPLERS["euler"], partial(on_table, "trailing", prediction="v", zero_snr=True), True, 5),
    "k.euler.karras": (SAMPLERS["euler"], lambda n: through(d.karras_sigmas(n, *ENDS)), True, 5),
    "k.euler_ancestral": (SAMPLERS["euler_ancestral"], uniform_in_time, True, 5),
    "k.heun.karras": (SAMPLERS["heun"], lambda n: through(d.karras_sigmas(n, *ENDS)), True, 5),
    "k.dpmpp_2m.karras": (SAMPLERS["dpmpp_2m"], lambda n: through(d.karras_sigmas(n, *ENDS)), True, 5),
    "k.dpmpp_2m_sde.karras": (SAMPLERS["dpmpp_2m_sde"], lambda n: through(d.karras_sigmas(n, *ENDS)), True, 5),
    "k.dpmpp_2m.exponential.quantised": (SAMPLERS["dpmpp_2m"], quantised_exponential, True, 5),
    "img2img.diffusers.euler": (SAMPLERS["euler"], partial(on_table, "leading"), True, 5),
    "img2img.diffusers.ddim": (SAMPLERS["ddim"], partial(on_table, "leading"), False, 5),
    "inpaint.latent_mask.euler": (SAMPLERS["euler"], partial(on_table, "leading"), True, 5),
    "img2img.sgm.euler": (SAMPLERS["euler"], partial(on_table, "legacy"), True, 5),
}  # fmt: skip


def run_sdxl_trajectories(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    assert set(case["trajectories"]) <= set(RUNS)
    network = toy_network(case, dtype) if case["case"].endswith("toy") else tiny_network(case, dtype)
    return [
        found for name, facts in case["trajectories"].items() for found in trajectory(case, name, facts, network, expected, dtype)
    ]  # fmt: skip


def trajectory(
    case: Mapping[str, Any], name: str, facts: Mapping[str, Any], network: Callable[[Tensor, float, str], Tensor],
    expected: Mapping[str, Tensor], dtype: torch.dtype,
) -> list[Row]:  # fmt: skip
    """One run from the stored start; the schedule is ours and compared with the stored one first."""
    sampler, make, explodes, scale = RUNS[name]
    x_expected = expected[f"{name}/x"]
    steps = 10 if name.startswith("img2img") else x_expected.shape[0] - 1
    steps = (steps + 1) // 2 if name == "diffusers.heun.leading" else steps
    schedule = make(steps)
    if "ddim" in name:
        schedule = with_last(schedule, name)
    schedule = d.exploding(schedule) if explodes else schedule
    first = schedule.steps - (x_expected.shape[0] - 1) if name.startswith("img2img") else 0
    wide = dtype == torch.float64
    told = torch.tensor(list(dict.fromkeys(facts["timesteps"])), dtype=torch.float64)
    rows = [row(case, dtype, f"{name}/timesteps", schedule.times[first:], told, 1e-12)]
    shape = tuple(case["latents_shape"])

    def given(key: str) -> Tensor:
        scale = next(item["scale"] for item in case["inputs"] if key.split(".")[0] in item["name"])
        return torch.from_numpy(value(key, shape, "sdxl-trajectories-toy" if toy else case["salt"], scale))

    toy = case["case"].endswith("toy")
    draws = iter(range(99))

    def draw() -> Tensor:
        return given(f"noise.{next(draws)}").to(dtype)

    def predict(x: Tensor, i: int) -> Tensor:
        t = float(schedule.times[i])
        output = network(x, t, "cond")
        if scale != 1:
            positive, output = output, classifier_free(output, network(x, t, "uncond"), scale)
            output = rescaled(output, positive, 0.7) if name == "diffusers.ddim.trailing.v.zero_snr" else output
        if name == "sgm.euler.edm_table":  # its denoiser takes the table's sigma, the sampler its own
            output = output * float(TABLE[int(t)] / schedule.sigmas[i])
        return output

    if name == "sgm.euler.edm_table":
        schedule = replace(schedule, input_scale=(1 + TABLE[schedule.times.long()] ** 2).rsqrt())
    x, previous = x_expected[0].to(dtype), None
    image = given("image_latents").to(dtype)
    start = given("noise").to(dtype)
    if name.startswith("img2img") and not name.endswith("sgm.euler"):
        rows.append(
            row(
                case,
                dtype,
                f"{name}/start",
                mixed(image, start, schedule, first),
                x_expected[0],
                1e-9 if wide else 5e-4,
            )
        )
    for i in range(first, schedule.steps):
        with torch.no_grad():
            x, previous = step(sampler, predict, x, schedule, i, previous, draw, name)
        if name.startswith("inpaint"):
            mask = (torch.arange(shape[2]) < shape[2] // 2).to(dtype)[:, None]
            x = (1 - mask) * mixed(image, start, schedule, i + 1) + mask * x
        place = min(2 * (i + 1), len(x_expected) - 1) if name == "diffusers.heun.leading" else i - first + 1
        rows.append(row(case, dtype, f"{name}/x.{i}", x, x_expected[place], 1e-9 if wide else 5e-4))
        stored = expected.get(f"{name}/denoised", x_expected)
        evaluation = 2 * i if len(stored) == 2 * schedule.steps - 1 and "heun" in name else i - first
        if f"{name}/denoised" in expected and "lcm" not in name:
            rows.append(
                row(
                    case,
                    dtype,
                    f"{name}/denoised.{i}",
                    previous,
                    expected[f"{name}/denoised"][evaluation],
                    1e-6 if wide else 5e-4,
                )
            )
    return rows


def with_last(schedule: Schedule, name: str) -> Schedule:
    """DDIM ends at the table's lowest level; with zero terminal SNR on another table."""
    alphas = d.alphas_cumprod("zero_snr" in name)
    sigmas = d.sigma_table(alphas)
    return d.discrete_schedule(schedule.times, sigmas[schedule.times.long()], schedule.prediction, float(sigmas[0]))


def step(
    sampler: Sampler, predict: Any, x: Tensor, schedule: Schedule, i: int, previous: Tensor | None, draw: Any, name: str
) -> tuple[Tensor, Tensor]:
    """One step; diffusers' DDIM goes to timestep - 1000 // steps, wherever the next step then begins."""
    if "ddim" not in name:
        return sampler(predict, x, schedule, i, previous, draw)
    alphas = d.alphas_cumprod("zero_snr" in name)
    steps = 10 if name.startswith("img2img") else schedule.steps
    before = max(int(schedule.times[i]) - 1000 // steps, 0)
    target = (
        torch.stack([schedule.alphas[i], alphas[before].sqrt()]),
        torch.stack([schedule.sigmas[i], (1 - alphas[before]).sqrt()]),
    )
    pair = replace(schedule, alphas=target[0], sigmas=target[1], input_scale=schedule.input_scale[i : i + 1])
    return sampler(lambda x, _: predict(x, i), x, pair, 0, previous, draw)


def toy_network(case: Mapping[str, Any], dtype: torch.dtype) -> Callable[[Tensor, float, str], Tensor]:
    """0.875 x + 0.5 tanh(W x + u cos(t / 250) + v cond), by channels."""
    salt = case["salt"]
    matrix = torch.from_numpy(parameter("W", (4, 4), salt)).to(dtype)
    u, v = (torch.from_numpy(uniform(name, (4,), salt)).to(dtype)[:, None, None] for name in ("u", "v"))

    def ask(x: Tensor, t: float, prompt: str) -> Tensor:
        inner = (
            torch.einsum("km,bmhw->bkhw", matrix, x) + u * math.cos(t / 250) + v * (1.0 if prompt == "cond" else -0.5)
        )
        return 0.875 * x + 0.5 * torch.tanh(inner)

    return ask


def tiny_network(case: Mapping[str, Any], dtype: torch.dtype) -> Callable[[Tensor, float, str], Tensor]:
    """The network of sdxl-base-tiny, which lies beside this case."""
    network_case = json.loads((Path(__file__).parents[1] / "goldens" / "sdxl-base-tiny" / "case.json").read_text())
    model = load_unet(network_case, dtype)
    inputs = {
        f"{prompt}.{kind}": torch.from_numpy(value(f"{prompt}.{kind}", shape, case["salt"], scale)).to(dtype)
        for prompt in ("cond", "uncond") for kind, shape, scale in (("context", (1, 7, 48), 2.0), ("y", (1, 80), 1.0))
    }  # fmt: skip

    def ask(x: Tensor, t: float, prompt: str) -> Tensor:
        return model(x, inputs[f"{prompt}.context"], inputs[f"{prompt}.y"], torch.tensor([[t]], dtype=torch.float64))

    return ask
