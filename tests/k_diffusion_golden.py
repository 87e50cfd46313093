"""Make tests/goldens/k-diffusion.json: `python -m tests.k_diffusion_golden sampling.py`, with k-diffusion's own file.

Runs of its samplers in float64 on a fixed formula, with given noise. What the file imports and these samplers do not need is
replaced by empty modules, scipy's `quad` by Gauss' rule. Noise of `dpmpp_sde` is of one Brownian motion over sigma, as that of
its own noise sampler is.
"""

import importlib.util
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

FILE = Path(__file__).parent / "goldens" / "k-diffusion.json"
STEPS, WIDTH = 7, 4
RUNS: dict[str, tuple[str, dict[str, float]]] = {  # name -> eridiff's sampler, options as eridiff's
    "euler": ("euler", {}), "euler churn": ("euler", {"churn": 2.0}), "euler churn 9": ("euler", {"churn": 9.0}),
    "heun": ("heun", {}), "heun churn": ("heun", {"churn": 2.0}), "euler_ancestral": ("euler_ancestral", {}),
    "euler_ancestral eta": ("euler_ancestral", {"eta": 0.5}), "dpm_2": ("dpm2", {}),
    "dpm_2_ancestral": ("dpm2_ancestral", {}), "dpm_2_ancestral eta": ("dpm2_ancestral", {"eta": 0.5}), "lms": ("lms", {}),
    "dpmpp_2s_ancestral": ("dpmpp_2s_ancestral", {}), "dpmpp_2s_ancestral eta": ("dpmpp_2s_ancestral", {"eta": 0.5}),
    "dpmpp_sde": ("dpmpp_sde", {}), "dpmpp_sde eta": ("dpmpp_sde", {"eta": 0.5}), "dpmpp_2m": ("dpmpp_2m", {}),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {}), "dpmpp_2m_sde eta": ("dpmpp_2m_sde", {"eta": 0.5}),
    "dpmpp_3m_sde": ("dpmpp_3m_sde", {}), "dpmpp_3m_sde eta": ("dpmpp_3m_sde", {"eta": 0.5}),
}  # fmt: skip


def clean(x: Tensor, sigma: float) -> Tensor:
    """The clean image that the formula sees in latents of unit size `[1, 4]` at a noise level."""
    numbers = torch.arange(WIDTH, dtype=torch.float64)
    weights = torch.cos(1 + 3 * numbers[:, None] + 7 * numbers) / 2
    return 0.8 * torch.tanh(x @ weights) + 0.3 * sigma / (1 + sigma) * x


def quad(f: Any, low: float, high: float, **_: Any) -> tuple[float]:
    """scipy's, by Gauss' rule: exact for polynomials of a degree below 16."""
    half, middle = (float(high) - float(low)) / 2, (float(high) + float(low)) / 2
    rule = zip(*np.polynomial.legendre.leggauss(8), strict=True)
    return (half * sum(w * float(f(middle + half * n)) for n, w in rule),)


def loaded(path: Path) -> Any:
    """k-diffusion's module, with what it imports and is not needed left empty."""
    empty = ("torchdiffeq", "torchsde", "scipy", "k_diffusion", "k_diffusion.utils", "tqdm.auto")
    modules = {name: ModuleType(name) for name in empty}
    modules["torchdiffeq"].odeint = None  # type: ignore[attr-defined]
    modules["scipy"].integrate = type("integrate", (), {"quad": staticmethod(quad)})  # type: ignore[attr-defined]
    modules["k_diffusion"].utils = modules["k_diffusion.utils"]  # type: ignore[attr-defined]
    modules["k_diffusion.utils"].append_dims = lambda t, n: t[(...,) + (None,) * (n - t.ndim)]  # type: ignore[attr-defined]
    modules["tqdm.auto"].trange = lambda n, **_: range(n)  # type: ignore[attr-defined]
    modules["tqdm.auto"].tqdm = None  # type: ignore[attr-defined]
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        spec = importlib.util.spec_from_file_location("k_diffusion.sampling", path)
        assert spec and spec.loader
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    finally:
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})
    return found


def brownian(noises: Iterator[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A noise sampler: the second noise from a level goes on where the first from it ended."""
    seen: dict[float, tuple[float, Tensor]] = {}

    def noise(start: Tensor, end: Tensor) -> Tensor:
        high, low = float(start), float(end)
        if high not in seen:
            seen[high] = (low, next(noises))
            return seen[high][1]
        middle, first = seen[high]
        return math.sqrt((high - middle) / (high - low)) * first + math.sqrt((middle - low) / (high - low)) * next(
            noises
        )

    return noise


def made(module: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(31)
    start, *noises = torch.randn(1 + 2 * STEPS, 1, WIDTH, generator=g, dtype=torch.float64)
    sigmas = torch.cat(
        [torch.linspace(14.6 ** (1 / 7), 0.03 ** (1 / 7), STEPS, dtype=torch.float64) ** 7, torch.zeros(1)]
    )
    runs = {}
    for name, (_, options) in RUNS.items():
        sample, given, points = getattr(module, f"sample_{name.split()[0]}"), iter(noises), list[Tensor]()
        known = inspect.signature(sample).parameters
        said: dict[str, Any] = {{"churn": "s_churn"}.get(key, key): value for key, value in options.items()}
        if "noise_sampler" in known:
            said["noise_sampler"] = brownian(given) if "dpmpp_sde" in name else lambda a, b, given=given: next(given)
        usual = torch.randn_like
        torch.randn_like = lambda x, given=given: next(given)  # type: ignore[assignment]
        try:
            end = sample(
                lambda x, sigma: clean(x / (1 + sigma**2).sqrt(), float(sigma)), start * (1 + sigmas[0] ** 2).sqrt(), sigmas,
                callback=lambda told, points=points: points.append(told["x"]), **said,
            )  # fmt: skip
        finally:
            torch.randn_like = usual
        runs[name] = [x.flatten().tolist() for x in [*points, end]]
    return {
        "source": "k_diffusion/sampling.py of crowsonkb/k-diffusion, commit 4601bf0",
        "x": "latents clean + sigma * noise at the beginning of each step, with churn behind its noise, and the end",
        "sigmas": sigmas.tolist(), "start": start.flatten().tolist(), "noises": [n.flatten().tolist() for n in noises],
        "runs": runs,
    }  # fmt: skip


if __name__ == "__main__":
    FILE.write_text(json.dumps(made(loaded(Path(sys.argv[1]))), indent=1) + "\n")
