"""A model's files become the modules of an inference; what can be wrong is said before any weight is read."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from eridiff.errors import CheckpointError, ConfigError, EridiffError
from eridiff.inference.words import read_words
from eridiff.lora.branches import install_slots
from eridiff.text.encoders import build_encoder
from eridiff.text.tokenizers import clip_tokenizer, t5_tokenizer
from eridiff.weights.configs import DRAWN, check_fixed
from eridiff.weights.detect import DESCRIPTIONS, Component
from eridiff.weights.load import VARIANT, build, default_dtype
from eridiff.weights.locate import DENOISERS, PART_NAMES, TEXT_ENCODERS, Parts

if TYPE_CHECKING:
    from eridiff.inference.base import DiffusionInference

log = logging.getLogger(__name__)


def fill(drawer: "DiffusionInference", parts: Parts) -> None:
    """Read the network, the autoencoder, the text encoders and their tokenizers into an inference.

    Raises CheckpointError when a part is missing or damaged or does not fit.
    """
    components = parts.components
    check_parts(type(drawer), components)
    text = [name for name in TEXT_ENCODERS if name in components]
    readers = {"clip": clip_tokenizer, "clip_g": clip_tokenizer, "t5": t5_tokenizer}
    tokenizers = {n: readers[n](parts.tokenizers.get("t5" if n == "t5" else "clip")) for n in text}
    own = components[drawer.family]
    path = own.checkpoint.path
    name = model_name(own, parts)
    sampling = own_sampling(own, drawer.choose_variant(own.config, name), drawer.variants)
    words = read_words(own)

    def options(name: str) -> dict[str, Any]:
        asked = drawer.dtype.get(name) if isinstance(drawer.dtype, Mapping) else drawer.dtype
        dtype = asked or default_dtype(components[name], drawer.device)
        by_name = isinstance(drawer.dtype, Mapping)
        if name == "vae" and not by_name and dtype == torch.float16 and components[name].config.latent_channels == 4:
            log.info("SDXL's autoencoder overflows in float16, so it decodes in float32")
            dtype = torch.float32
        return {"dtype": dtype, "device": "cpu" if drawer.offload else drawer.device, "progress": drawer.progress}

    network = build(own, **options(drawer.family))
    drawer.autoencoder = build(components["vae"], **options("vae"))  # type: ignore[assignment]
    install_slots(network)  # so that a LoRA may come after compiling
    drawer.set_network(network, name)
    vars(network)["said_by_file"][VARIANT] = drawer.variant  # for `save_network`
    drawer.sample_as(drawer.variant, sampling)
    drawer.words = words
    drawer.set_encoders({n: build_encoder(components[n], **options(n)) for n in text}, tokenizers)
    drawer.source = {"model": str(path), "parts": _places(parts)}


def model_name(own: Component, parts: Parts) -> str:
    """What a network's variant is told by: what its file says, else the file's stem and the model folder's own name."""
    path = own.checkpoint.path
    return own.checkpoint.metadata.get(VARIANT) or f"{'' if path.is_dir() else path.stem} {parts.name}".strip()


def _places(parts: Parts) -> dict[str, Any]:
    """Where everything was read from, as `load` takes it."""
    option = {network: name for name, networks in PART_NAMES.items() for network in networks}
    found = {option[n]: os.path.abspath(component.checkpoint.path) for n, component in parts.components.items()}
    tokenizers = {name: os.path.abspath(path) for name, path in parts.tokenizers.items()}
    return {**found, **({"tokenizers": tokenizers} if tokenizers else {})}


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
    own = components[drawer.family].checkpoint
    check_fixed(drawer.family, own.path, own.config, DRAWN)
    check_widths(
        drawer,
        components[drawer.family].config,
        {name: components[name].config for name in TEXT_ENCODERS if name in components},
    )
    check_latents(drawer, components[drawer.family].config, components["vae"].config, CheckpointError)


def check_widths(drawer: "type[DiffusionInference]", own: Any, encoders: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises CheckpointError unless encoders of these configurations give what a network of that configuration takes."""
    given = drawer.text_widths(encoders)
    if given != drawer.told_widths(own):
        raise CheckpointError(
            f"the text encoders give {given[0]} features a token and {given[1]} pooled, {DESCRIPTIONS[drawer.family]} takes "
            f"{' and '.join(map(str, drawer.told_widths(own)))}; they belong to another model"
        )


def check_latents(
    drawer: "type[DiffusionInference]", network: Any, autoencoder: Any, error: type[EridiffError] = ConfigError
) -> None:
    """Raises an error unless the latents of an autoencoder are those of a network, by their configurations."""
    wanted, given = drawer.channels_drawn(network), autoencoder.latent_channels
    if wanted != given:
        raise error(
            f"the autoencoder has {given} latent channels, {DESCRIPTIONS[drawer.family]} draws {wanted}: it belongs to another "
            f"family; give {DESCRIPTIONS[drawer.family].split(' ', 1)[1]}'s own as vae"
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
