"""SDXL's trajectories: every sampler of sgm, k-diffusion and diffusers on its own table, with a network or a formula.

Each run of case.json says what is run; tests/goldens/README.md has the words.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eridiff.inference.sdxl import SPREADS, TIMESTEPS
from eridiff.schedulers import discrete as d
from eridiff.schedulers.guidance import classifier_free, rescaled
from eridiff.schedulers.samplers import SAMPLERS
from eridiff.schedulers.step import Past, mixed
from eridiff.trace.hashfill import parameter, uniform
from tests.golden.case import Row, inputs_of, row
from tests.golden.sdxl import load_unet

Network = Callable[..., Sequence[Tensor]]  # latents, timestep, "cond" and "uncond" or one of them -> an output for each


def run_sdxl_trajectories(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    given = {name: tensor.to(dtype) for name, tensor in inputs_of(case).items()}
    network = formula(case, dtype) if "formula" in case else unet(case, given, dtype)
    return [
        found for name, run in case["trajectories"].items() for found in trajectory(case, name, run, network, given, expected, dtype)
    ]  # fmt: skip


def levels_of(run: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The training's table `[1000]` as shares of the image, the run's timesteps and its noise levels, `[steps]` each."""
    alphas = d.alphas_cumprod(run["zero_snr"]).clamp(min=run.get("least_alpha", 0.0))
    table, steps = run["table"], run["steps"]
    if "spacing" in table:
        rho = {"rho": table["rho"]} if "rho" in table else {}
        sigmas = SPREADS[table["spacing"]](steps, table["high"], table["low"], **rho)
        if table["told"] == "nearest":
            return alphas, (sigmas[:, None] - d.sigma_table(alphas)).abs().argmin(dim=1).double(), sigmas
        timesteps = d.timesteps_at(sigmas, alphas)
        return alphas, timesteps.round() if table["told"] == "rounded" else timesteps, sigmas
    timesteps = TIMESTEPS[table["places"]](steps + table.get("left_out", 0))[:steps]
    if table.get("between") == "log sigma":  # k-diffusion's get_sigmas; diffusers is linear in sigma
        logs, low = d.sigma_table(alphas).log(), timesteps.floor().long().clamp(max=d.LEVELS - 2)
        return alphas, timesteps, (logs[low] + (timesteps - low) * (logs[low + 1] - logs[low])).exp()
    return alphas, timesteps, d.sigmas_at(timesteps, alphas)


def trajectory(
    case: Mapping[str, Any], name: str, run: Mapping[str, Any], network: Network, given: Mapping[str, Tensor],
    expected: Mapping[str, Tensor], dtype: torch.dtype,
) -> list[Row]:  # fmt: skip
    """One run from the stored start; the schedule is eridiff's and compared with the stored one first."""
    alphas, timesteps, sigmas = levels_of(run)
    schedule = d.discrete_schedule(timesteps, sigmas, run["prediction"])
    schedule = d.exploding(schedule) if run["exploding"] else schedule
    first, scale, sampler, wide = run.get("first", 0), run["guidance"], SAMPLERS[run["sampler"]], dtype == torch.float64
    asked_at = torch.ones(schedule.steps)  # the noise level that the network's denoiser takes, over the sampler's
    if run["table"].get("told") == "nearest":
        table = d.sigma_table(alphas)[timesteps.long()]
        asked_at, schedule = table / sigmas, replace(schedule, input_scale=(1 + table**2).rsqrt())
    draws = (given[f"noise.{n}"] for n in range(schedule.steps))

    def predict(x: Tensor, i: int) -> Tensor:
        t = float(timesteps[i])
        positive, *negative = network(x, t, "cond", *(["uncond"] if scale != 1 else []))
        output = classifier_free(positive, *negative, scale) if negative else positive
        if negative and "rescale" in run:
            output = rescaled(output, positive, run["rescale"])
        return output * float(asked_at[i])

    def step(x: Tensor, i: int, past: list[Past]) -> tuple[Tensor, Past]:
        if "stride" not in run:
            return sampler(predict, x, schedule, i, past[-3:], lambda: next(draws))
        end = d.sigma_table(alphas)[max(int(timesteps[i]) - run["stride"], 0)]  # wherever the next step then begins
        alone = d.discrete_schedule(timesteps[i : i + 1], sigmas[i : i + 1], run["prediction"], float(end))
        return sampler(lambda x, _: predict(x, i), x, alone, 0, past[-3:], lambda: next(draws))

    told = torch.tensor(list(dict.fromkeys(run["timesteps"])), dtype=torch.float64)
    rows = [row(case, dtype, f"{name}/timesteps", timesteps[first:], told, 1e-12)]
    start, *after = expected[f"{name}/x"]
    if first:
        begun = mixed(given["image_latents"], given["noise"], schedule, first)
        rows.append(row(case, dtype, f"{name}/start", begun, start, 1e-9 if wide else 5e-4))
    clean = expected.get(f"{name}/denoised", ())
    x, past = start.to(dtype), list[Past]()
    for i in range(first, schedule.steps):
        with torch.no_grad():
            x, seen = step(x, i, past)
        past.append(seen)
        if "painted_rows" in run:
            mask = (torch.arange(x.shape[2]) < run["painted_rows"]).to(dtype)[:, None]
            x = (1 - mask) * mixed(given["image_latents"], given["noise"], schedule, i + 1) + mask * x
        twice, place = 2 * (schedule.steps - first) - 1, i - first  # with two evaluations a step, on the last one
        stored = after[min(2 * place + 1, twice - 1) if len(after) == twice else place]
        rows.append(row(case, dtype, f"{name}/x.{i}", x, stored, 1e-9 if wide else 5e-4))
        if len(clean) and run["sampler"] != "lcm":  # LCM gives its clean image behind the boundary condition
            stored = clean[2 * place if len(clean) == twice else place]
            rows.append(row(case, dtype, f"{name}/denoised.{i}", seen[0], stored, 1e-6 if wide else 5e-4))
    return rows


def formula(case: Mapping[str, Any], dtype: torch.dtype) -> Network:
    """kept * x + added * tanh(W x + u cos(t / period) + v * prompt), by channels."""
    said, salt, channels = case["formula"], case["salt"], case["inputs"][0]["shape"][1]
    matrix = torch.from_numpy(parameter("W", (channels, channels), salt)).to(dtype)
    u, v = (torch.from_numpy(uniform(name, (channels,), salt)).to(dtype)[:, None, None] for name in ("u", "v"))

    def ask(x: Tensor, t: float, *prompts: str) -> list[Tensor]:
        inner = torch.einsum("km,bmhw->bkhw", matrix, x) + u * math.cos(t / said["period"])
        return [said["kept"] * x + said["added"] * torch.tanh(inner + v * said[prompt]) for prompt in prompts]

    return ask


def unet(case: Mapping[str, Any], given: Mapping[str, Tensor], dtype: torch.dtype) -> Network:
    model = load_unet(case, dtype)

    def ask(x: Tensor, t: float, *prompts: str) -> Sequence[Tensor]:
        context, y = (torch.cat([given[f"{prompt}.{name}"] for prompt in prompts]) for name in ("context", "y"))
        times = torch.full((1, len(context)), t, dtype=torch.float64)
        return model(x.repeat(len(prompts), 1, 1, 1), context, y, times).split(len(x))

    return ask
