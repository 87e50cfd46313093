"""An image is generated again from what its PNG says: with the same weights, machine and threads, bit for bit."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import eridiff
from eridiff.errors import ConfigError
from eridiff.float8 import use_float8
from eridiff.images import METADATA_KEY, read_image, with_paths
from eridiff.inference.base import DiffusionInference
from eridiff.inference.handed_in import MATRICES
from eridiff.inference.result import Result
from eridiff.inference.settings import sampled_as
from eridiff.onednn import use_onednn
from eridiff.request import FIELDS, Request
from eridiff.weights.locate import ModelPath

LOAD = ("vae_rows", "compile", "prediction", "zero_terminal_snr", "refiner")  # how and with what a model is loaded


def _is_lora(value: Any) -> bool:
    """Whether a setting is a LoRA's file and its scale: a number, one for each row, or those by pattern."""
    if not isinstance(value, dict) or not isinstance(value.get("file"), str | None):
        return False
    scales = value.get("scale")
    scales = scales.values() if isinstance(scales, dict) else [scales]
    rows = [row for scale in scales for row in (scale if isinstance(scale, list) else [scale])]
    return all(type(row) in (int, float) for row in rows)


DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in MATRICES)
FORMS: dict[str, Callable[[Any], bool]] = {  # settings that are not fields of `Request`, and what they look like
    **dict.fromkeys(("model", "family", "variant", "device", "version", "torch"), lambda v: isinstance(v, str)),
    **dict.fromkeys(("parts", "refiner", "sampling", "training", "hashes"), lambda v: isinstance(v, dict)),
    **dict.fromkeys(("threads", "batch"), lambda v: type(v) is int),
    "compile": lambda v: type(v) is bool,
    **dict.fromkeys(("float8", "onednn"), lambda v: v is True),
    "loras": lambda v: isinstance(v, list) and all(map(_is_lora, v)),
    "handed_in": lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v),
    "dtype": lambda v: v in DTYPES,
    "dtypes": lambda v: isinstance(v, dict) and all(dtype in DTYPES for dtype in v.values()),
}
CIRCUMSTANCES = ("version", "torch", "threads", "device", "dtype")  # beside the weights, what the last bits depend on


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a PNG that eridiff generated; raises ConfigError for a file that has none."""
    text = read_image(path).info.get(METADATA_KEY)
    try:
        settings = json.loads(text or "")
    except (TypeError, ValueError):
        settings = None
    if not isinstance(settings, dict) or "steps" not in settings:
        raise ConfigError(
            f"'{path}' does not say how it was generated; PNGs of the command line, of a Sampler and of save_png(image, path, settings) do"
        )
    for name, fits in FORMS.items():
        if settings.get(name) is not None and not fits(settings[name]):
            raise ConfigError(f"'{path}': its setting {name} cannot be {settings[name]!r}: it was edited")
    folder = Path(path).parent

    def found(file: str) -> str:  # older PNGs have paths as they were typed
        beside = os.path.normpath(folder / file)
        return beside if os.path.exists(beside) or not os.path.exists(file) else file

    return with_paths(settings, found)


def load_again(
    settings: Mapping[str, Any], model: ModelPath | None = None, *, loras: Sequence[tuple[str, float | None]] | None = None,
    **options: Any,
) -> DiffusionInference:  # fmt: skip
    """The model that an image's settings name, or `model` in its place; parts that a mapping gives replace its own.

    `loras`, files and scales (None: that of the image's, where it had one), replace the image's own. Options win over
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
            f"it was generated in training, at step {training.get('step')}: give the checkpoint of that step as model or transformer, or its LoRA as lora"
        )
    if isinstance(given, dict) and "path" not in given:
        given = {**(said or {}), **given}
    chosen = given or said
    if not chosen:
        raise ConfigError("its settings name no files that it was generated with: give the model")
    told = {name: settings[name] for name in LOAD if settings.get(name) is not None}
    loaded = eridiff.load(chosen, **{"device": settings.get("device"), "dtype": _dtypes(settings), **told, **options})
    if settings.get("float8"):
        use_float8(loaded.network)
    if settings.get("onednn"):
        use_onednn(loaded.network)
    for file, scale in _loras(settings) if loras is None else loras:
        recorded = [entry["scale"] for entry in settings.get("loras") or ()]
        own = recorded[0] if len(recorded) == 1 else 1.0
        loaded.apply_lora(file, _scale(own) if scale is None else scale)
    # of the network as its LoRAs have left it: a control LoRA changes its input
    loaded.set_variant(settings["variant"])
    sampling = settings.get("sampling") or {}  # a checkpoint of a training run may not say it again
    loaded.model.sample_as(loaded.variant, sampled_as(loaded.sampling, sampling, "its setting sampling"))
    return loaded


def _loras(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The files of the LoRAs that an image was generated with, and their scales."""
    entries = settings.get("loras") or ()
    if any(entry["file"] is None for entry in entries):
        raise ConfigError("it was generated with a LoRA that was read from no file: give its file as lora")
    return [(entry["file"], _scale(entry["scale"])) for entry in entries]


def _scale(told: Any) -> Any:
    return torch.tensor(told) if isinstance(told, list) else told


def _dtypes(settings: Mapping[str, Any]) -> Any:
    said = settings.get("dtypes")
    return {name: getattr(torch, dtype) for name, dtype in said.items()} if said else getattr(torch, settings["dtype"])


def generate_again(inference: DiffusionInference, settings: Mapping[str, Any], **options: Any) -> Result:
    """The image that the settings describe. Raises ConfigError where they do not say all that it was generated from."""
    lost = [name for name in settings.get("handed_in", ()) if not settings.get(name)]
    if lost:
        raise ConfigError(f"it was generated with {' and '.join(lost)} passed, which its settings do not hold")
    if settings.get("hand_over") is not None and not settings.get("refiner"):
        raise ConfigError("its settings name no files of the refiner that it was generated with")
    request = replace(Request.from_json(settings), lora_scale=None)  # which the LoRAs' own scales hold
    idle = request.without_effect(inference)  # older records hold what had none
    defaults: dict[str, Any] = {name: FIELDS[name].default for name in idle}
    request = replace(request, **defaults)
    autocast = (settings.get("training") or {}).get("autocast")
    kind = inference.device.type
    with torch.autocast(kind, getattr(torch, autocast), cache_enabled=False) if autocast else nullcontext():
        return inference.generate(request, **options)


def circumstances(settings: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In words, what is not as it was when the image was generated."""
    found = [f"{n} {settings[n]}, now {now[n]}" for n in CIRCUMSTANCES if n in settings and settings[n] != now[n]]
    hashes = settings.get("hashes") or {}
    found += [
        f"{name} with other content" for name, was in hashes.items() if (now.get("hashes") or {}).get(name) != was
    ]
    if (settings.get("training") or {}).get("conditioning"):
        found.append("embeddings that the trainer passed, now encoded")
    batch = settings.get("batch", 1)
    return found + ([f"in one batch with {batch - 1} others, now alone"] if batch != 1 else [])
