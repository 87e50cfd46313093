"""What a network is trained on: the samplers' own sentence, `x = alpha * clean + sigma * noise`, at random levels.

Sources: Esser et al. 2024 (SD 3: section 3.1, the distributions of times; 5.3.2, the shift); Ho et al. 2020 and Salimans and
Ho 2022 (epsilon, v); Hang et al. 2023 (min-SNR); Yu et al. 2024 (debiased estimation).

Letters: B images of a batch, whose latents are `[B, ...]`. Levels and weights are float64 on the CPU, as the schedules are.
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from eridiff.errors import ConfigError
from eridiff.schedulers import EXACT
from eridiff.schedulers.discrete import LEVELS, alphas_cumprod, discrete_schedule, sigmas_at

PREDICTIONS = ("velocity", "epsilon", "v", "sample")


@dataclass(frozen=True)
class Levels:
    """The noise levels of a batch; float64 on the CPU. a network's `forward` takes `times`."""

    alphas: Tensor  # [B]
    sigmas: Tensor  # [B]
    times: Tensor  # [B], what the network is given
    prediction: str  # "velocity", "epsilon", "v" or "sample"

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ConfigError(f"a prediction is one of {', '.join(PREDICTIONS)}, not '{self.prediction}'")


def flow_levels(sigmas: Tensor) -> Levels:
    """Rectified flow (Flux, SD 3) at sigmas `[B]` in [0, 1]: alpha is 1 - sigma, the network is given sigma."""
    sigmas = sigmas.to(**EXACT)
    return Levels(1 - sigmas, sigmas, sigmas, "velocity")


def discrete_levels(timesteps: Tensor, prediction: str = "epsilon", zero_terminal_snr: bool = False) -> Levels:
    """SDXL at timesteps `[B]` in [0, 999] of the table that its samplers read; fractions stand between entries."""
    timesteps = timesteps.to(**EXACT)
    schedule = discrete_schedule(timesteps, sigmas_at(timesteps, alphas_cumprod(zero_terminal_snr)), prediction)
    return Levels(schedule.alphas[:-1], schedule.sigmas[:-1], timesteps, prediction)


# where to train: each gives random float64 `[count]` from a generator of the CPU -------------------------------------------------


def uniform(count: int, generator: Generator) -> Tensor:
    """Sigmas, all of [0, 1) alike."""
    return torch.rand(count, generator=generator, **EXACT)


def logit_normal(count: int, generator: Generator, mean: float = 0.0, deviation: float = 1.0) -> Tensor:
    """Sigmas whose logit is normal (Esser et al. 2024, equation 19); a mean above 0 leans towards the noise.

    diffusers' training scripts take the random number for a place in a falling table, so there a mean above 0 leans to the image.
    """
    return torch.sigmoid(mean + deviation * torch.randn(count, generator=generator, **EXACT))


def mode(count: int, generator: Generator, scale: float = 1.29) -> Tensor:
    """Sigmas by Esser et al. 2024, equation 20: above 0 `scale` prefers the middle, below 0 the ends.

    Raises ConfigError outside [-1, 2 / (pi - 2)], where the map is not monotonic.
    """
    if not -1 <= scale <= 2 / (math.pi - 2):
        raise ConfigError(f"the scale of mode sampling must be from -1 to 2 / (pi - 2) = 1.752, not {scale:g}")
    u = torch.rand(count, generator=generator, **EXACT)
    return 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)


def timesteps(count: int, generator: Generator) -> Tensor:
    """Timesteps of SDXL's training: whole numbers from 0 to 999, all alike."""
    return torch.randint(LEVELS, (count,), generator=generator, device="cpu").double()


# what goes in, what must come out -----------------------------------------------------------------------------------------


def noised(clean: Tensor, noise: Tensor, levels: Levels) -> Tensor:
    """Latents at each image's level, `[B, ...]`: float32 at least, as between a sampler's steps, whatever came in."""
    alpha, sigma = _rows(levels.alphas, clean), _rows(levels.sigmas, clean)
    return alpha * clean + sigma * noise.to(clean.device)


def target(clean: Tensor, noise: Tensor, levels: Levels) -> Tensor:
    """What the network's raw output should be, `[B, ...]`: the inverse of `schedulers.samplers.clean_noise`."""
    noise = noise.to(clean.device)
    if levels.prediction == "velocity":
        return noise - clean
    if levels.prediction == "epsilon":
        return noise
    if levels.prediction == "sample":
        return clean
    size = torch.hypot(levels.alphas, levels.sigmas)  # 1 in variance-preserving space
    return _rows(levels.alphas / size, clean) * noise - _rows(levels.sigmas / size, clean) * clean


def squared_error(output: Tensor, wanted: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean over the batch of each image's mean square error times its weight `[B]`; a scalar, float32 at least."""
    dtype = torch.promote_types(output.dtype, torch.float32)
    errors = (output.to(dtype) - wanted.to(output.device, dtype)).square().flatten(1).mean(1)
    return errors.mean() if weights is None else (errors * weights.to(errors.device, dtype)).mean()


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """`[B]` in float32, or float64 with such latents, to be multiplied with `[B, ...]`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return values.to(like.device, dtype).reshape(-1, *[1] * (like.ndim - 1))


# how much each level counts: weights `[B]` of the squared error of the network's raw output ---------------------------------


def snr(levels: Levels) -> Tensor:
    """The signal-to-noise ratio `(alpha / sigma) ** 2`; infinite without noise."""
    return (levels.alphas / levels.sigmas) ** 2


def min_snr(levels: Levels, gamma: float = 5.0) -> Tensor:
    """`min(SNR, gamma)` on the clean image's squared error (Hang et al. 2023), whatever the network predicts.

    So `min(SNR, gamma) / SNR` for epsilon and `min(SNR, gamma) / (SNR + 1)` for v; finite at zero terminal SNR.
    """
    clean, noise = _errors(levels)
    return torch.minimum(noise**2, gamma * clean**2)


def debiased(levels: Levels) -> Tensor:
    """`1 / sqrt(SNR)` on epsilon's squared error (Yu et al. 2024); for other predictions the same loss, rewritten.

    kohya's scripts take `1 / (SNR + 1)` for v, which is another loss, and bound the SNR by 1000. Infinite for epsilon where
    nothing but noise is left.
    """
    clean, noise = _errors(levels)
    return clean * noise


def cosmap(levels: Levels) -> Tensor:
    """The density of times of Esser et al. 2024, equation 21, as a weight: `2 / (pi * (1 - 2 sigma + 2 sigma ** 2))`.

    For rectified flow at uniform times; at times chosen another way it would count twice.
    """
    sigmas = levels.sigmas
    return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))


def _errors(levels: Levels) -> tuple[Tensor, Tensor]:
    """How far an error of 1 in the raw output moves the clean image, and the noise, that are read off it."""
    alphas, sigmas = levels.alphas, levels.sigmas
    if levels.prediction == "epsilon":
        return sigmas / alphas, torch.ones_like(sigmas)
    if levels.prediction == "sample":
        return torch.ones_like(sigmas), alphas / sigmas
    if levels.prediction == "velocity":
        return sigmas, alphas
    size = torch.hypot(alphas, sigmas)
    return sigmas / size, alphas / size
