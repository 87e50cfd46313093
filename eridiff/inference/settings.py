"""How published variants are sampled by default, and what each text encoder reads of a prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eridiff.errors import ConfigError
from eridiff.request import FIELDS, Text


@dataclass(frozen=True)
class Defaults:
    """How a published variant is sampled by default; families add what they need."""

    steps: int = 28
    cfg_scale: float = 1.0
    sampler: str = "euler"
    width: int = 1024
    height: int = 1024


SKIP = FIELDS["skip_layers"].metadata["kind"]  # the one setting that is not a number or text


def sampled_as(usual: Any, given: Mapping[str, Any], where: str) -> Any:
    """Defaults with what JSON says of some. Raises ConfigError, naming `where`, for names and kinds of value that they lack."""
    values = dict(given)
    for name, value in given.items():
        if not hasattr(usual, name):
            raise ConfigError(f"{where} is invalid: there is no {name} among {', '.join(vars(usual))}")
        own = getattr(usual, name)
        numbers = isinstance(value, int | float) and not isinstance(value, bool) and isinstance(own, int | float | None)
        if name == "skip_layers":
            values[name] = None if value is None else SKIP.read(f"{where}: {name}", value)
        elif value is not None and type(value) is not type(own) and (not numbers or isinstance(own, bool | int)):
            raise ConfigError(f"{where} is invalid: {name} is {value!r}, and {own!r} in its place usually")
    return replace(usual, **values)


def differing(defaults: Defaults, published: Defaults) -> dict[str, Any]:
    """What differs from the published, for JSON: `sampled_as(published, differing(...))` is the defaults again."""
    found = {name: value for name, value in vars(defaults).items() if value != vars(published)[name]}
    return {name: SKIP.write(value) if name == "skip_layers" else value for name, value in found.items()}


def spoken(prompts: Sequence[Text], encoder: str, encoders: Sequence[str]) -> list[str]:
    """What one of a model's text encoders reads; raises ConfigError for a prompt that names another encoder."""
    for prompt in prompts:
        wrong = [] if isinstance(prompt, str) else [name for name in prompt if name not in encoders]
        if wrong or not isinstance(prompt, str) and not prompt:
            raise ConfigError(
                f"a prompt for each encoder names {', '.join(encoders)}, not {wrong[0] if wrong else 'none'}"
            )
    return [p if isinstance(p, str) else p.get(encoder, next(iter(p.values()))) for p in prompts]
