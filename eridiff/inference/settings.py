"""How published variants are sampled by default, and what each text encoder reads of a prompt."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_args, get_type_hints

from eridiff.errors import ConfigError
from eridiff.request import FIELDS, NUMBERS, Text, check_side, scalar
from eridiff.schedulers.samplers import DISCRETE_ALONE, SAMPLERS


@dataclass(frozen=True)
class Defaults:
    """How a published variant is sampled by default; families add what they need."""

    words: ClassVar[Mapping[str, Collection[str]]] = {"sampler": [n for n in SAMPLERS if n not in DISCRETE_ALONE]}
    steps: int = 28
    cfg_scale: float = 1.0
    sampler: str = "euler"
    width: int = 1024
    height: int = 1024


SKIP = FIELDS["skip_layers"].metadata["kind"]  # the one setting that is not a number or text
NAMED = {"t5_length": "text_length"}  # fields of Request that have another name among the defaults
ASKED = {own: field for field, own in NAMED.items()} | {"text_shortest": "t5_length", "script_shift": "shift"}


def sampled_as(usual: Any, given: Mapping[str, Any], where: str) -> Any:
    """Defaults with what JSON says of some.

    Raises ConfigError, naming `where`, for names that they lack and for values that no request could ask for.
    """
    kinds, values = get_type_hints(type(usual)), {}
    for name, value in given.items():
        if name not in vars(usual):
            raise ConfigError(f"{where} is invalid: there is no {name} among {', '.join(vars(usual))}")
        try:
            values[name] = _read(name, value, kinds[name], usual.words)
        except ConfigError as error:
            raise ConfigError(f"{where} is invalid: {error}") from None
    return replace(usual, **values)


def _read(name: str, value: Any, kind: Any, words: Mapping[str, Collection[str]]) -> Any:
    """The value of a default of the type `kind`. Raises ConfigError."""
    if value is None and type(None) in get_args(kind):
        return None
    if name == "skip_layers":
        if value is False or value is True:
            raise ConfigError(f"skip_layers must be {{blocks, scale, start, end}}, not {value!r}")
        return SKIP.read(name, value)
    value = scalar(name, value, next(each for each in (kind, *get_args(kind)) if each in NUMBERS))
    asked = FIELDS.get(ASKED.get(name, name))
    if asked is None or isinstance(value, bool):
        return value
    low, high = asked.metadata["low"], asked.metadata["high"]
    known = words.get(name) or asked.metadata["kind"].flag.get("choices")
    if isinstance(value, str):
        if value not in known:
            raise ConfigError(f"{name} must be one of {', '.join(known)}, not {value!r}")
    elif not low <= value <= (high or value):
        raise ConfigError(f"{name} must be {f'between {low} and {high}' if high else f'at least {low}'}, not {value}")
    if name in ("width", "height"):
        check_side(name, value, low)
    return value


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
