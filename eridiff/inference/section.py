"""A `sample:` section becomes the calls that draw its pictures, one at a time, so that none depends on its neighbours."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from eridiff.config import SampleSettings, settle_guidance
from eridiff.images import read_image
from eridiff.inference.base import DiffusionInference
from eridiff.schedulers.guidance import SkipLayers

log = logging.getLogger(__name__)


def fitted(
    model: DiffusionInference, settings: SampleSettings, multiple: int
) -> tuple[list[SampleSettings], list[str]]:
    """The settings of each picture in what the model has, sides in multiples of so many pixels, and notices of changes."""
    found = [_fitted(entry, model, multiple) for entry in settings.each()]
    return [entry for entry, _ in found], list(dict.fromkeys(notice for _, notices in found for notice in notices))


def _fitted(entry: SampleSettings, model: DiffusionInference, multiple: int) -> tuple[SampleSettings, list[str]]:
    embedding = bool(getattr(model.network.config, "guidance", False))
    entry, notices = settle_guidance(entry, embedding, by_cfg=model.family != "flux")
    if not entry.lenient:
        return entry, notices
    for name in ("width", "height"):
        side = getattr(entry, name)
        if side is not None and (fitting := max(64, side // multiple * multiple)) != side:
            notices.append(f"the {name} {side} becomes {fitting}, a multiple of {multiple}")
            entry = replace(entry, **{name: fitting})
    if entry.schedule == "karras" and model.family != "unet":
        notices.append(f"Karras' noise levels have no effect: {model.variant} has its own")
        entry = replace(entry, schedule=None)
    return entry, notices


def picture_requests(model: DiffusionInference, entries: Sequence[SampleSettings]) -> list[dict[str, Any]]:
    """What `generate` is told for each picture, of `fitted` settings."""
    requests: list[dict[str, Any]] = []
    for entry in entries:
        cfg = model.sampling.cfg_scale if entry.true_cfg_scale is None else entry.true_cfg_scale
        skip = entry.skip_layers
        requests.append({
            "prompt": entry.prompts[0], "seed": entry.seed, "negative": entry.negative_prompt if cfg != 1 else None,
            "width": entry.width, "height": entry.height, "steps": entry.sample_steps,
            "guidance_scale": entry.guidance_scale, "cfg_scale": cfg, "cfg_rescale": entry.cfg_rescale,
            "cfg_interval": entry.cfg_interval, "skip_layers": skip if isinstance(skip, bool) else SkipLayers(**skip),
            "sampler": entry.sampler, "schedule": entry.schedule, "shift": entry.shift, "strength": entry.strength,
            **{name: read_image(path) for name, path in picture_paths(entry).items()},
        })  # fmt: skip
    if any(
        entry.negative_prompt and request["cfg_scale"] == 1 for entry, request in zip(entries, requests, strict=True)
    ):
        log.warning("the negative prompt has no effect without true guidance (--cfg, true_cfg_scale)")
    return requests


def told_sizes(settings: SampleSettings) -> dict[str, Any]:
    """What an SDXL is told of the picture, as far as the section says it: options and attributes of SDXLInference."""
    names = ("original_size", "crop", "target_size", "aesthetic_score", "negative_aesthetic_score")
    return {name: value for name in names if (value := getattr(settings, name)) is not None}


def picture_paths(settings: SampleSettings) -> dict[str, str]:
    """Where the pictures that a run begins from are, for the record."""
    return {n: path for n in ("image", "mask", "control") if (path := getattr(settings, n))}
