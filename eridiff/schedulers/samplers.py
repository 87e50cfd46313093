"""How to move from one point of a schedule to the next: pure functions, written once for every prediction and space.

Every point is `x = alpha * clean + sigma * noise`. A network's output says which clean image and which noise the latents
are made of (`step.clean_noise`), and a sampler goes to the next point with them. All samplers have the same arguments:
`predict(x, i)`, the network's raw output at point `i`; latents `x`, float32 or float64; the schedule and the point;
`past`, the (clean, noise) of the steps before, the newest last, of which none looks at more than three; `draw()`, new noise
of the latents' shape, which only some ask for. They give the next latents and this step's (clean, noise).

Here are those that ask the network at the points of the schedule and remember at most one step; `multistep` remember more,
`midpoint` ask inside a step too, at points that `with_inside` adds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from eridiff.schedulers import EXACT, Schedule, midpoint, multistep
from eridiff.schedulers.step import Draw, Past, Predict, Sampler, ask, mixed, raw


def euler(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, past: Sequence[Past] = (), draw: Draw | None = None
) -> tuple[Tensor, Past]:
    """The Euler step (Karras et al. 2022, algorithm 1 without its correction; DDIM, Song et al. 2021, is the same line)."""
    clean, noise = ask(predict, x, schedule, i)
    return mixed(clean, noise, schedule, i + 1), (clean, noise)


def heun(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, past: Sequence[Past] = (), draw: Draw | None = None
) -> tuple[Tensor, Past]:
    """Heun's step (Karras et al. 2022, algorithm 1): the mean of the directions here and where Euler's step ends.

    Asks the network twice, on the last step once; from an infinite sigma it goes by Euler's step.
    """
    clean, noise = ask(predict, x, schedule, i)
    end = mixed(clean, noise, schedule, i + 1)
    if i + 1 == schedule.steps:
        return end, (clean, noise)
    clean2, noise2 = ask(predict, end, schedule, i + 1)
    if schedule.prediction == "velocity":  # the direction is noise - clean, over sigma
        return end + float(schedule.sigmas[i + 1] - schedule.sigmas[i]) * (noise2 - clean2 - noise + clean) / 2, (
            clean,
            noise,
        )
    ratios = schedule.sigmas[i : i + 2] / schedule.alphas[i : i + 2]  # else the noise, over sigma / alpha
    change = float(schedule.alphas[i + 1] * ratios.diff())
    return (end + change * (noise2 - noise) / 2 if math.isfinite(change) else end), (clean, noise)


def euler_ancestral(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, past: Sequence[Past] = (), draw: Draw | None = None,
    eta: float = 1.0,
) -> tuple[Tensor, Past]:  # fmt: skip
    """Euler's step to less noise than the next point has, and new noise for the rest (k-diffusion's ancestral sampler).

    With `eta` 1 it is DDPM's posterior (Ho et al. 2020, equation 7).
    """
    clean, noise = ask(predict, x, schedule, i)
    return renewed(clean, noise, schedule, i, draw, eta), (clean, noise)


def ddim(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, past: Sequence[Past] = (), draw: Draw | None = None,
    eta: float = 0.0,
) -> tuple[Tensor, Past]:  # fmt: skip
    """Denoising diffusion implicit models (Song et al. 2021, equation 12): Euler's step, with new noise for an `eta`.

    Of a clean image that is clipped, it keeps the noise that was seen before, as diffusers does.
    """
    clean, noise = raw(predict, x, schedule, i)
    if schedule.clip is not None:
        clean = clean.clamp(-schedule.clip, schedule.clip)
    end = renewed(clean, noise, schedule, i, draw, eta) if eta else mixed(clean, noise, schedule, i + 1)
    return end, (clean, noise)


def renewed(clean: Tensor, noise: Tensor, schedule: Schedule, i: int, draw: Draw | None, eta: float) -> Tensor:
    """The latents at the next point, of whose noise the share `eta` of DDPM's is new."""
    alpha, sigma = float(schedule.alphas[i + 1]), float(schedule.sigmas[i + 1])
    kept = (sigma / alpha) * float(schedule.alphas[i]) / float(schedule.sigmas[i])  # of the two noise levels' ratio
    new = eta * sigma * math.sqrt(max(0.0, 1 - kept**2))
    moved = alpha * clean + math.sqrt(max(0.0, sigma**2 - new**2)) * noise
    return moved + new * draw() if new and draw else moved


def dpmpp_2m(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, past: Sequence[Past] = (), draw: Draw | None = None
) -> tuple[Tensor, Past]:
    """DPM-Solver++ (2M) of Lu et al. 2022: the clean image is extrapolated from this step's and the step's before.

    First order on the first step and on a last one to sigma 0.
    """
    clean, noise = ask(predict, x, schedule, i)
    mean = clean
    if past and schedule.sigmas[i + 1] > 0:
        mean = clean + (clean - past[-1][0]) * _length(schedule, i) / (2 * _length(schedule, i - 1))
    keep = float(schedule.sigmas[i + 1] / schedule.sigmas[i])
    return keep * x + (float(schedule.alphas[i + 1]) - float(schedule.alphas[i]) * keep) * mean, (clean, noise)


def dpmpp_2m_sde(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, past: Sequence[Past] = (), draw: Draw | None = None,
    eta: float = 1.0,
) -> tuple[Tensor, Past]:  # fmt: skip
    """The stochastic form of DPM-Solver++ (2M), by the midpoint rule, as in k-diffusion with noise of unit variance."""
    clean, noise = ask(predict, x, schedule, i)
    alpha, sigma = float(schedule.alphas[i + 1]), float(schedule.sigmas[i + 1])
    if sigma == 0:
        return alpha * clean, (clean, noise)
    length = _length(schedule, i)
    mean = clean
    if past:
        mean = clean + (clean - past[-1][0]) * length / (2 * _length(schedule, i - 1))
    keep = float(schedule.sigmas[i + 1] / schedule.sigmas[i]) * math.exp(-eta * length)
    moved = keep * x + (alpha - float(schedule.alphas[i]) * keep) * mean
    return (moved + sigma * math.sqrt(-math.expm1(-2 * eta * length)) * draw() if draw and eta else moved), (
        clean,
        noise,
    )


def lcm(
    predict: Predict, x: Tensor, schedule: Schedule, i: int, past: Sequence[Past] = (), draw: Draw | None = None
) -> tuple[Tensor, Past]:
    """Latent consistency (Luo et al. 2023): straight to the clean image, and new noise for the next point.

    The boundary condition keeps a share of `x`, which matters only below timestep 1; in variance-preserving space.
    """
    clean, noise = ask(predict, x, schedule, i)
    unit = 1000 if schedule.prediction == "velocity" else 1  # a timestep, in what the network is given
    place = (10 * unit * float(schedule.times[i])) ** 2
    clean = clean * math.sqrt(place / (place + 0.25)) + x * 0.25 / (place + 0.25)
    return (mixed(clean, draw(), schedule, i + 1) if draw and i + 1 < schedule.steps else clean), (clean, noise)


def _length(schedule: Schedule, i: int) -> float:
    return float(schedule.half_log_snr[i + 1] - schedule.half_log_snr[i])


SAMPLERS: dict[str, Sampler] = {
    "euler": euler, "euler_ancestral": euler_ancestral, "euler_ancestral_rf": midpoint.euler_ancestral_rf, "heun": heun,
    "ddim": ddim, "ddpm": partial(euler_ancestral, eta=1.0), "dpmpp_2m": dpmpp_2m, "dpmpp_2m_rf": multistep.dpmpp_2m_rf,
    "dpmpp_2m_sde": dpmpp_2m_sde, "dpmpp_3m_sde": multistep.dpmpp_3m_sde, "dpmpp_2s": multistep.dpmpp_2s,
    "dpmpp_2s_ancestral": midpoint.dpmpp_2s_ancestral, "dpmpp_sde": midpoint.dpmpp_sde, "dpm2": midpoint.dpm2,
    "dpm2_ancestral": midpoint.dpm2_ancestral, "unipc": multistep.unipc, "deis": multistep.deis, "lms": multistep.lms,
    "plms": multistep.plms, "pndm": multistep.pndm, "lcm": lcm,
}  # fmt: skip
ETA = {  # the share of new noise by default, of samplers that take one
    "ddim": 0.0,
    **dict.fromkeys(
        (
            "euler_ancestral", "euler_ancestral_rf", "dpm2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde",
            "dpmpp_3m_sde",
        ),
        1.0,
    ),
}  # fmt: skip
EXPLODING = ("euler", "euler_ancestral", "heun", "lms", "dpm2", "dpm2_ancestral")  # diffusers has their latents in
# variance-exploding space
CHURNED = {"euler": midpoint.euler_churned, "heun": midpoint.heun_churned}
DISCRETE_ALONE = ("ddpm", "deis", "plms", "pndm")  # not for rectified flow
FLOW_ALONE = ("euler_ancestral_rf", "dpmpp_2m_rf")


def sampler(name: str, eta: float | None = None, churn: float = 0.0) -> Sampler:
    """A sampler by name; with an eta or a churn if it takes one."""
    if churn:
        return partial(CHURNED[name], churn=churn)
    return SAMPLERS[name] if eta is None else partial(SAMPLERS[name], eta=eta)  # type: ignore[call-arg]


def noises_of_a_step(name: str, eta: float | None = None, churn: float = 0.0) -> int:
    """How often a step of a sampler asks for new noise."""
    share = ETA.get(name, 0.0) if eta is None else eta
    if name == "dpmpp_sde" and share:
        return 2
    return int(bool(share or churn) or name in ("lcm", "ddpm"))


def with_inside(
    name: str, schedule: Schedule, make: Callable[[Tensor | None, Tensor | None], Schedule], eta: float | None = None,
    churn: float = 0.0,
) -> Schedule:  # fmt: skip
    """The schedule with the points inside its steps that a sampler asks at, if there are any.

    - make: the schedule through ratios sigma / alpha `[steps]`, or else through timesteps, in the same space.
    """
    if name == "pndm":
        return replace(schedule, inside=replace(make(None, multistep.between(schedule)), clip=schedule.clip))
    if name not in midpoint.RATIOS or (name in CHURNED and not churn):
        return schedule
    share = ETA.get(name, 0.0) if eta is None else eta
    ratios = [midpoint.RATIOS[name](schedule, i, share, churn) for i in range(schedule.steps)]
    return replace(schedule, inside=replace(make(torch.tensor(ratios, **EXACT), None), clip=schedule.clip))
