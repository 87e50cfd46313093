"""A picture is drawn again from what its PNG says: with the same weights, machine and threads, to the last bit."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

import eridiff
from eridiff.config import size_of
from eridiff.errors import ConfigError
from eridiff.images import METADATA_KEY, read_image
from eridiff.inference.base import DiffusionInference
from eridiff.inference.flux import FluxInference
from eridiff.inference.result import Result
from eridiff.schedulers.guidance import SkipLayers
from eridiff.weights.locate import Model

SAME = (
    "sampler",
    "guidance_scale",
    "cfg_scale",
    "cfg_rescale",
    "shift",
    "strength",
    "width",
    "height",
    "steps",
    "seed",
)
LOAD = (  # what a model is loaded with, of all families
    "variant", "vae_rows", "t5_padding", "without_t5", "t5_mask", "clip_windows", "prediction", "zero_terminal_snr", "empty_negative",
)  # fmt: skip
CIRCUMSTANCES = ("version", "torch", "threads", "device", "dtype")  # beside the weights, what the last bits depend on


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a PNG that eridiff drew; raises ConfigError for a file that has none."""
    text = read_image(path).info.get(METADATA_KEY)
    try:
        settings = json.loads(text or "")
    except (TypeError, ValueError):
        settings = None
    if not isinstance(settings, dict) or "steps" not in settings:
        raise ConfigError(f"'{path}' does not say how it was drawn; eridiff's own PNGs do, unless they were edited")
    return settings


def load_again(
    settings: Mapping[str, Any], model: Model | None = None, *, loras: Sequence[tuple[str, float | None]] | None = None,
    **options: Any,
) -> DiffusionInference:  # fmt: skip
    """The model that a picture's settings name, or `model` in its place; parts that a mapping gives replace its own.

    `loras`, files and scales (None: that of the picture's, where it had one), replace the picture's own. Options win over
    what the settings say. Raises ConfigError when the settings name no files, or weights that were in training and neither a
    checkpoint nor a LoRA of them is given.
    """
    said = settings.get("parts")
    given = dict(model) if isinstance(model, Mapping) else model
    training = settings.get("training")
    if (
        training
        and not loras
        and not (isinstance(given, dict) and "transformer" in given or given and not isinstance(given, dict))
    ):
        raise ConfigError(
            f"it was drawn in training, at step {training.get('step')}: give the checkpoint of that step as model or transformer, or its LoRA as lora"
        )
    if isinstance(given, dict) and "path" not in given:
        given = {**(said or {}), **given}
    chosen = given or said
    if not chosen:
        raise ConfigError("its settings name no files that it was drawn with: give the model")
    told = {name: settings[name] for name in LOAD if settings.get(name) is not None} | _sizes(settings)
    loaded = eridiff.load(chosen, **{"device": settings.get("device"), "dtype": _dtypes(settings), **told, **options})
    sampling = settings.get("sampling") or {}  # a checkpoint of a training run may not say it again
    loaded.sampling = replace(loaded.sampling, **sampling)
    if isinstance(loaded, FluxInference) and loaded.t5 is not None:
        loaded.t5.length = loaded.sampling.text_length
    for file, scale in _loras(settings) if loras is None else loras:
        recorded = {entry["scale"] for entry in settings.get("loras") or ()}
        loaded.apply_lora(
            file, 1.0 if scale is None and len(recorded) != 1 else recorded.pop() if scale is None else scale
        )
    return loaded


def _loras(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The files of the LoRAs that a picture was drawn with, and their scales."""
    entries = settings.get("loras") or ()
    if any(entry["file"] is None for entry in entries):
        raise ConfigError("it was drawn with a LoRA that was read from no file: give its file as lora")
    return [(entry["file"], _scale(entry["scale"])) for entry in entries]


def _scale(told: Any) -> Any:
    return torch.tensor(told) if isinstance(told, list) else told


def _sizes(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What SDXL was told of the picture."""
    sizes = {n: size_of(n, settings[n]) for n in ("original_size", "target_size") if settings.get(n)}
    scores = {n: settings[n] for n in ("aesthetic_score", "negative_aesthetic_score") if n in settings}
    return sizes | scores | ({"crop": tuple(settings["crop"])} if settings.get("crop") else {})


def _dtypes(settings: Mapping[str, Any]) -> Any:
    said = settings.get("dtypes")
    return {name: getattr(torch, dtype) for name, dtype in said.items()} if said else getattr(torch, settings["dtype"])


def draw_again(inference: DiffusionInference, settings: Mapping[str, Any], **options: Any) -> Result:
    """The picture that the settings describe. Raises ConfigError where they do not say all that it was drawn from."""
    lost = [name for name in settings.get("handed_in", ()) if not settings.get(name)]
    if lost:
        raise ConfigError(f"it was drawn with {' and '.join(lost)} handed in, which its settings do not hold")
    skip, schedule = settings.get("skip_layers"), settings.get("schedule")
    asked = {name: settings.get(name) for name in SAME} | {
        "negative": settings.get("negative_prompt"),
        "schedule": tuple(schedule) if isinstance(schedule, list) else schedule,
        "skip_layers": SkipLayers(**{**skip, "blocks": tuple(skip["blocks"])}) if skip else False,
        "cfg_interval": tuple(settings.get("cfg_interval", (0.0, 1.0))),
        "part": tuple(settings.get("part", (0.0, 1.0))),
        **{n: read_image(settings[n]) for n in ("image", "mask", "control") if settings.get(n)},
    }
    if settings.get("hand_over") is not None:
        if not settings.get("refiner"):
            raise ConfigError("its settings name no files of the refiner that it was drawn with")
        dtype = getattr(torch, settings["dtype"])
        refiner = eridiff.load(
            settings["refiner"], device=inference.device, dtype=dtype, progress=inference.progress, **_sizes(settings)
        )
        asked |= {"hand_over": settings["hand_over"], "refiner": refiner}
    autocast = (settings.get("training") or {}).get("autocast")
    kind = inference.device.type
    with torch.autocast(kind, getattr(torch, autocast), cache_enabled=False) if autocast else nullcontext():
        return inference.generate(settings["prompt"], **asked, **options)


def circumstances(settings: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In words, what is not as it was when the picture was drawn."""
    found = [f"{n} {settings[n]}, now {now[n]}" for n in CIRCUMSTANCES if n in settings and settings[n] != now[n]]
    if (settings.get("training") or {}).get("conditioning"):
        found.append("embeddings that the trainer handed in, now encoded")
    batch = settings.get("batch", 1)
    return found + ([f"in one batch with {batch - 1} others, now alone"] if batch != 1 else [])
