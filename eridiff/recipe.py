"""Recipes: how other programs generate, as values of the fields of `Request`, each with its source.

A recipe is a file of `eridiff/recipes`. It says for each family what the program chooses where nothing is asked:

    program: who writes it
    version: what was read of it
    flux:                  # or sd3, sdxl
      seen: run            # run: equal images were measured; reading: its source was read
      choices:             # field of `Request`: [value, where the program says so]
        steps: [20, "train.py:155"]
      samplers:            # what goes with another sampler than the usual one
        euler: {schedule: [linspace, "schedulers.py:30"]}
      apart: ["what no field says, and its source"]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from eridiff.errors import ConfigError
from eridiff.yaml_reader import read_yaml

FOLDER = Path(__file__).parent / "recipes"
OWN = "eridiff"  # the recipe that chooses nothing: the published variants' own numbers
FAMILIES = {"flux": "flux", "sd3": "mmdit", "sdxl": "unet"}  # as files and people say it -> as the code does
TITLES = {"flux": "Flux", "mmdit": "Stable Diffusion 3", "unet": "SDXL"}


@dataclass(frozen=True)
class Choice:
    """What a program chooses, and where it says so."""

    value: Any
    source: str


@dataclass(frozen=True)
class Recipe:
    """How a program generates with one family."""

    name: str
    program: str
    version: str
    seen: str  # "run": equal images were measured; "reading": its source was read
    choices: Mapping[str, Choice]  # by field of `Request`
    samplers: Mapping[str, Mapping[str, Choice]]  # what goes with a sampler, by its name
    apart: tuple[str, ...]  # what differs and no field says

    def of(self, sampler: str | None = None) -> dict[str, Choice]:
        """All choices with this sampler; None is the recipe's own."""
        usual = self.choices.get("sampler")
        wanted = usual.value if sampler is None and usual is not None else sampler
        return {**self.choices, **self.samplers.get(wanted or "", {})}


def recipes() -> list[str]:
    """The names of all recipes; "eridiff" is the one that chooses nothing."""
    return [OWN, *sorted(path.stem for path in FOLDER.glob("*.yaml"))]


@cache
def _read(name: str) -> Any:
    return read_yaml((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def families(name: str) -> list[str]:
    """The families that a recipe is for."""
    return list(TITLES) if name == OWN else [FAMILIES[key] for key in FAMILIES if key in _read(name)]


def recipe(name: str, family: str) -> Recipe:
    """How a program generates with a family: flux, mmdit or unet. Raises ConfigError for a program that does not."""
    if name not in recipes():
        near = get_close_matches(name.lower(), recipes(), 1, 0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(recipes())}"
        raise ConfigError(f"'{name}' is not a recipe; {hint}")
    if name == OWN:
        return Recipe(OWN, "eridiff, as the published variants are sampled", "", "run", {}, {}, ())
    if family not in families(name):
        known = " and ".join(TITLES[each] for each in families(name))
        raise ConfigError(f"the recipe '{name}' is for {known}, not for {TITLES[family]}")
    document = _read(name)
    section = document[next(key for key, known in FAMILIES.items() if known == family)]

    def choices(values: Mapping[str, Any]) -> dict[str, Choice]:
        return {field: Choice(*value) for field, value in values.items()}

    samplers = {sampler: choices(values) for sampler, values in (section.get("samplers") or {}).items()}
    return Recipe(
        name, document["program"], str(document["version"]), section["seen"], choices(section.get("choices") or {}), samplers,
        tuple(section.get("apart") or ()),
    )  # fmt: skip
