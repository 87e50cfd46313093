"""Why two images differ: what two requests choose differently, and how far each choice alone moves the image."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eridiff.errors import ConfigError
from eridiff.inference.base import DiffusionInference
from eridiff.inference.result import Result
from eridiff.request import FIELDS, Checked, Request, narrowed

NUMBERS = {  # field -> what it is called among a variant's defaults
    "steps": "steps", "cfg_scale": "cfg_scale", "guidance_scale": "guidance_scale", "sampler": "sampler", "t5_length": "text_length",
}  # fmt: skip
NOT_OF_AN_IMAGE = ("prompt", "seed", "recipe", "part", "lora_scale")  # equal on both sides, or names of what follows


@dataclass(frozen=True)
class Difference:
    """A field in which two requests differ."""

    name: str
    first: Any
    second: Any


@dataclass(frozen=True)
class Move:
    """How far a choice alone, or all together, moves the image that the first request gives."""

    latents: float  # the difference's L2 norm over the latents'
    levels: float  # the root of the mean square, in levels of 255


def as_published(request: Request, model: DiffusionInference) -> Request:
    """A request with the numbers of the published variant where it says none: a small model may have others of its own."""
    usual = vars(model.variants[model.variant])
    found = {
        name: usual[own]
        for name, own in NUMBERS.items()
        if usual.get(own) is not None and getattr(request, name) is None
    }
    if model.family == "flux" and request.schedule is None:  # by the size for dev, which a small model need not have
        found["schedule"] = "dev" if usual["shift"] else "schnell"
    idle = replace(request, **found).without_effect(model)
    return replace(request, **{name: value for name, value in found.items() if name not in idle})


def settled(request: Request, model: DiffusionInference) -> dict[str, Any]:
    """Every field as the model is asked, but for what two requests to be compared share. Raises what `checked` raises."""
    asked: Checked = request.checked(model)
    values = {name: getattr(asked, name) for name in FIELDS if name not in NOT_OF_AN_IMAGE}
    values["schedule"] = values["schedule"] or getattr(model.sampling, "schedule", "original")
    negative = values["negative"]
    if negative is not None and set(negative) <= {""}:
        values["negative"] = None  # which is another word for an empty one that is encoded
        if "empty_negative" in model.takes:
            values["empty_negative"] = "encoded"
    return values


def differences(first: Request, second: Request, model: DiffusionInference) -> list[Difference]:
    """The fields in which the model is asked for different things, in the order of `Request`."""
    one, other = settled(first, model), settled(second, model)
    return [Difference(name, one[name], other[name]) for name in one if one[name] != other[name]]


def moves(
    first: Request, second: Request, model: DiffusionInference, found: list[Difference]
) -> Iterator[tuple[Difference | None, Move | str]]:
    """For each difference alone, and for all (None), how far it moves the image of `first`, or why that is unknown.

    All but the size, which both sides take from `first`: images of different sizes have nothing in common.
    """
    own = _with(first.filled(model), {difference.name: difference.first for difference in found}, model)
    base = _generated(own, model)
    for difference in found:
        yield difference, _moved(base, _with(own, {difference.name: difference.second}, model), model)
    size = {"width": own.width, "height": own.height}
    yield None, _moved(base, _with(second.filled(model), size, model), model)


def _with(request: Request, values: dict[str, Any], model: DiffusionInference) -> Request:
    """A request with other values, without what has no effect beside them, and no recipe, which would fill it in again."""
    if "schedule" in values and not isinstance(values["schedule"], str | None):
        values = {**values, "steps": None}
    asked = replace(request, **{**values, "recipe": None})
    idle: dict[str, Any] = {name: FIELDS[name].default for name in asked.without_effect(model) if name not in values}
    return replace(asked, **idle)


def of_weights(request: Request, dtype: str) -> Request:
    """A request whose roundings to the dtype of the weights are those to `dtype`, whatever the model's is."""
    said = {name: getattr(request, name) for name in FIELDS}
    found = {name: narrowed(value, dtype) for name, value in said.items() if narrowed(value, dtype) != value}
    return replace(request, **found)


def _generated(request: Request, model: DiffusionInference) -> Result:
    return model.generate(request, keep=("latents",))


def _moved(base: Result, request: Request, model: DiffusionInference) -> Move | str:
    try:
        other = _generated(request, model)
    except ConfigError as error:
        return str(error)
    before, after = base.latents, other.latents
    assert before is not None and after is not None
    if before.shape != after.shape:
        return "another size is another image"
    return Move(_relative(before, after), _levels(base, other))


def _relative(before: Tensor, after: Tensor) -> float:
    return float(torch.linalg.vector_norm((after - before).double()) / torch.linalg.vector_norm(before.double()))


def _levels(base: Result, other: Result) -> float:
    one, two = (np.asarray(result.images[0], dtype=np.float64) for result in (base, other))
    return float(np.sqrt(np.mean((one - two) ** 2)))
