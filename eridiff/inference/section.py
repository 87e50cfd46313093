"""A `sample:` section becomes the calls that draw its pictures, one at a time, so that none depends on its neighbours."""

import logging
from typing import Any

from eridiff.config import SampleSettings
from eridiff.images import read_image
from eridiff.inference.base import DiffusionInference
from eridiff.schedulers.guidance import SkipLayers

log = logging.getLogger(__name__)


def picture_requests(model: DiffusionInference, settings: SampleSettings) -> list[dict[str, Any]]:
    """What `generate` is told for each prompt; guidance is settled before (config.settle_guidance)."""
    pictures = {n: read_image(path) for n in ("image", "mask", "control") if (path := getattr(settings, n))}
    cfg = model.sampling.cfg_scale if settings.true_cfg_scale is None else settings.true_cfg_scale
    if settings.negative_prompt and cfg == 1:
        log.warning("the negative prompt has no effect without true guidance (--cfg, true_cfg_scale)")
    skip = settings.skip_layers
    common = {
        "negative": settings.negative_prompt if cfg != 1 else None, "width": settings.width, "height": settings.height,
        "steps": settings.sample_steps, "guidance_scale": settings.guidance_scale, "cfg_scale": cfg,
        "cfg_rescale": settings.cfg_rescale, "cfg_interval": settings.cfg_interval,
        "skip_layers": skip if isinstance(skip, bool) else SkipLayers(**skip), "sampler": settings.sampler,
        "schedule": settings.schedule, "shift": settings.shift, "strength": settings.strength, **pictures,
    }  # fmt: skip
    return [
        {"prompt": prompt, "seed": settings.seed + i * settings.walk_seed, **common}
        for i, prompt in enumerate(settings.prompts)
    ]


def told_sizes(settings: SampleSettings) -> dict[str, Any]:
    """What an SDXL is told of the picture, as far as the section says it: options and attributes of SDXLInference."""
    names = ("original_size", "crop", "target_size", "aesthetic_score", "negative_aesthetic_score")
    return {name: value for name in names if (value := getattr(settings, name)) is not None}


def picture_paths(settings: SampleSettings) -> dict[str, str]:
    """Where the pictures that a run begins from are, for the record."""
    return {n: path for n in ("image", "mask", "control") if (path := getattr(settings, n))}
