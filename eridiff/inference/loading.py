"""What is checked of a model's files before any weight is read."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from eridiff.errors import CheckpointError, ConfigError
from eridiff.weights.detect import DESCRIPTIONS, Component
from eridiff.weights.locate import DENOISERS, PART_NAMES, TEXT_ENCODERS

if TYPE_CHECKING:
    from eridiff.inference.base import DiffusionInference


def check_parts(drawer: "type[DiffusionInference]", components: Mapping[str, Component]) -> None:
    """Raises CheckpointError unless the components are the drawer's family's, complete, and fit together."""
    held = " and ".join(DESCRIPTIONS[name] for name in components) or "nothing"
    other = next((n for n in DENOISERS if n in components and n != drawer.family), None)
    if other and drawer.family not in components:
        raise CheckpointError(
            f"{components[other].checkpoint.path} holds {DESCRIPTIONS[other]}, {drawer.__name__} draws with "
            f"{DESCRIPTIONS[drawer.family]}; eridiff.load chooses by the file"
        )
    encoders = drawer.needed(components[drawer.family].config) if drawer.family in components else ()
    missing = [name for name in (drawer.family, "vae", *encoders) if name not in components]
    if missing:
        options = [name for name, networks in PART_NAMES.items() if set(networks) & set(missing)]
        raise CheckpointError(
            f"{' and '.join(DESCRIPTIONS[name] for name in missing)} {'is' if len(missing) == 1 else 'are'} missing: "
            f"the model holds {held}; give the rest as {', '.join(options)}"
        )
    own = components[drawer.family].config
    given = drawer.text_widths({name: components[name].config for name in TEXT_ENCODERS if name in components})
    if given != drawer.told_widths(own):
        raise CheckpointError(
            f"the text encoders give {given[0]} features a token and {given[1]} pooled, {DESCRIPTIONS[drawer.family]} takes "
            f"{' and '.join(map(str, drawer.told_widths(own)))}; they belong to another model"
        )


def own_sampling(component: Component, variant: str, variants: Mapping[str, Any]) -> Any:
    """The variant's defaults with what a small file says in its metadata `eridiff.sampling`."""
    try:
        given = json.loads(component.checkpoint.metadata.get("eridiff.sampling", "{}"))
        return replace(variants[variant], **given)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{component.checkpoint.path}: the metadata eridiff.sampling cannot be used: {error}"
        ) from None
