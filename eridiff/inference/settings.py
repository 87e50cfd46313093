"""What may be asked of a picture: prompts, sizes, numbers; everything impossible is refused before work begins."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from eridiff.errors import ConfigError
from eridiff.schedulers.samplers import SAMPLERS

Text = str | Mapping[str, str]  # a prompt, or one for each text encoder by name: clip, clip_g, t5
Table = str | Sequence[float] | Tensor  # a schedule by name, or its sigmas


@dataclass(frozen=True)
class Defaults:
    """How a published variant is sampled when nothing is said; families add what they need."""

    steps: int = 28
    cfg_scale: float = 1.0
    sampler: str = "euler"
    width: int = 1024
    height: int = 1024


def check_settings(
    *, steps: int | None = None, cfg_scale: float | None = None, guidance_scale: float | None = None,
    strength: float | None = None, cfg_rescale: float | None = None, cfg_interval: Sequence[float] = (0.0, 1.0),
    sampler: str | None = None, shift: float | None = None,
) -> None:  # fmt: skip
    """Raises ConfigError for numbers and names that no run can have; None is not checked."""
    if steps is not None and steps < 1:
        raise ConfigError(f"a run needs at least one step, not {steps}")
    for name, value, low, high in [
        ("cfg_scale", cfg_scale, 0, 1000), ("guidance_scale", guidance_scale, 0, 1000), ("strength", strength, 0, 1),
        ("cfg_rescale", cfg_rescale, 0, 1), ("shift", shift, 0.01, 100),
    ]:  # fmt: skip
        if value is not None and not low <= value <= high:
            raise ConfigError(f"{name} must be between {low} and {high}, not {value}")
    if len(cfg_interval) != 2 or not 0 <= cfg_interval[0] < cfg_interval[1] <= 1:
        raise ConfigError(f"cfg_interval must be two rising shares of the steps such as 0 and 0.8, not {cfg_interval}")
    if sampler is not None and sampler not in SAMPLERS:
        raise ConfigError(f"'{sampler}' is no sampler; there are {', '.join(SAMPLERS)}")


def check_size(width: int, height: int, multiple: int = 16) -> None:
    """Raises ConfigError unless both sides are positive multiples."""
    for name, side in (("width", width), ("height", height)):
        if side < multiple or side % multiple:
            near = max(multiple, round(side / multiple) * multiple)
            raise ConfigError(f"the {name} must be a multiple of {multiple}, not {side}; the nearest is {near}")


def settle_size(
    width: int | None, height: int | None, given: Any, defaults: Mapping[str, Any], multiple: int = 16
) -> tuple[int, int]:
    """Said, else the given picture's rounded down to the multiple, else the default."""
    if given is not None:
        found = (given.shape[-1], given.shape[-2]) if isinstance(given, Tensor) else given.size
        defaults = {
            "width": max(multiple, found[0] // multiple * multiple),
            "height": max(multiple, found[1] // multiple * multiple),
        }
    width = defaults["width"] if width is None else width
    height = defaults["height"] if height is None else height
    check_size(width, height, multiple)
    return width, height


def plain(value: Any) -> Any:
    """Numbers of NumPy as Python's, also in lists; everything else as it is."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def listed(prompt: Text | Sequence[Text]) -> list[Text]:
    return [prompt] if isinstance(prompt, str | Mapping) else list(prompt)


def spoken(prompts: Sequence[Text], encoder: str, encoders: Sequence[str]) -> list[str]:
    """What one of a model's text encoders reads; raises ConfigError for a prompt that names another encoder."""
    for prompt in prompts:
        wrong = [] if isinstance(prompt, str) else [name for name in prompt if name not in encoders]
        if wrong or not isinstance(prompt, str) and not prompt:
            raise ConfigError(
                f"a prompt for each encoder names {', '.join(encoders)}, not {wrong[0] if wrong else 'none'}"
            )
    return [p if isinstance(p, str) else p.get(encoder, next(iter(p.values()))) for p in prompts]


def matched(
    prompt: Text | Sequence[Text], seed: int | Sequence[int] | None, rows: int = 1
) -> tuple[list[Text], list[int]]:
    """Prompts and seeds of equal number, as many as there are `rows` of conditioning; one of either is repeated."""
    prompts, seed = listed(prompt), plain(seed)
    if seed is None:
        seed = secrets.randbits(32)
    seeds = [seed] if isinstance(seed, int) else list(seed)
    wrong = next((s for s in seeds if isinstance(s, bool) or not isinstance(s, int) or not 0 <= s < 2**63), None)
    if not prompts or not seeds or wrong is not None:
        what = (
            "no prompt was given"
            if not prompts
            else "no seed was given"
            if not seeds
            else f"the seed {wrong!r} is no whole number from 0 to 2^63 - 1"
        )
        raise ConfigError(what)
    count = max(len(prompts), len(seeds), rows)
    if any(n not in (1, count) for n in (len(prompts), len(seeds), rows)):
        raise ConfigError(f"{len(prompts)} prompts and {len(seeds)} seeds do not match; give as many, or one of either")
    return prompts * (count // len(prompts)), seeds * (count // len(seeds))
