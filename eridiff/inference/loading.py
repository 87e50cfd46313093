"""A model's files become a `Model`; mistakes are found before any weight is read."""

import json
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch

from eridiff.errors import CheckpointError, ConfigError
from eridiff.inference.family import Family
from eridiff.inference.model import Model
from eridiff.inference.settings import sampled_as
from eridiff.inference.words import read_words
from eridiff.lora.branches import install_slots
from eridiff.text.encoders import build_encoder
from eridiff.text.tokenizers import clip_tokenizer, t5_tokenizer
from eridiff.weights.configs import DRAWN, check_fixed
from eridiff.weights.detect import DESCRIPTIONS, Component
from eridiff.weights.load import VARIANT, build, default_dtypes
from eridiff.weights.locate import DENOISERS, PART_NAMES, TEXT_ENCODERS, Parts

log = logging.getLogger(__name__)

FILES = {  # part -> the name under which most people have its file
    "transformer": "FILE", "vae": "ae.safetensors", "clip": "clip_l.safetensors", "clip_g": "clip_g.safetensors",
    "t5": "t5xxl_fp16.safetensors",
}  # fmt: skip


def read(
    kind: type[Family], parts: Parts, *, device: torch.device, dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
    variant: str | None = None, offload: bool = False, progress: bool = True,
) -> Model:  # fmt: skip
    """The network, the autoencoder, the text encoders and their tokenizers.

    - device: where images will be computed; with `offload` the modules are read to the CPU nevertheless.
    - dtype: of all components or by component; None is the file's, or what the device computes best in.
    - variant: the one that is asked for.

    Raises CheckpointError when a part is missing or damaged or does not fit.
    """
    components = parts.components
    check_parts(kind, components)
    text = [name for name in TEXT_ENCODERS if name in components]
    readers = {"clip": clip_tokenizer, "clip_g": clip_tokenizer, "t5": t5_tokenizer}
    tokenizers = {n: readers[n](parts.tokenizers.get("t5" if n == "t5" else "clip")) for n in text}
    own = components[kind.family]
    path = own.checkpoint.path
    name = model_name(own, parts)
    sampling = own_sampling(own, kind.choose_variant(own.config, name, variant)[0], kind.variants)
    words = read_words(own)

    dtypes = dtypes_of(kind, components, device, dtype)

    def options(name: str) -> dict[str, Any]:
        return {"dtype": dtypes[name], "device": "cpu" if offload else device, "progress": progress}

    network = build(own, **options(kind.family))
    autoencoder = build(components["vae"], **options("vae"))
    install_slots(network)  # so that a LoRA may come after compiling
    modules = {n: build_encoder(components[n], **options(n)) for n in text}
    encoders = kind.text_encoders(modules, tokenizers, sampling)
    model = Model.of(kind, network, autoencoder, encoders, name=name, variant=variant)
    model.sampling, model.words = sampling, words
    model.source = {"model": str(path), "parts": _places(parts)}
    vars(network)["said_by_file"][VARIANT] = model.variant  # for `save_network`
    return model


def used(kind: type[Family], components: Mapping[str, Component]) -> dict[str, Component]:
    """Of a file's components those that images are generated with."""
    return {name: c for name, c in components.items() if name in (kind.family, "vae", *TEXT_ENCODERS)}


def dtypes_of(
    kind: type[Family], components: Mapping[str, Component], device: torch.device,
    asked: torch.dtype | Mapping[str, torch.dtype] | None,
) -> dict[str, torch.dtype]:  # fmt: skip
    """In what each component computes: as asked, for all or by component, else as `default_dtypes` says."""
    found = default_dtypes(used(kind, components), device)
    by_name = isinstance(asked, Mapping)
    for name in found:
        own = asked.get(name) if isinstance(asked, Mapping) else asked
        found[name] = own or found[name]
    if found.get("vae") == torch.float16 and not by_name and components["vae"].config.latent_channels == 4:
        log.info("SDXL's autoencoder overflows in float16, so it decodes in float32")
        found["vae"] = torch.float32
    return found


def model_name(own: Component, parts: Parts) -> str:
    """What a network's variant is recognised by: what its file says, else the file's stem and the model folder's own name."""
    path = own.checkpoint.path
    return own.checkpoint.metadata.get(VARIANT) or f"{'' if path.is_dir() else path.stem} {parts.name}".strip()


def _places(parts: Parts) -> dict[str, Any]:
    """Where everything was read from, as `load` takes it."""
    option = {network: name for name, networks in PART_NAMES.items() for network in networks}
    found = {option[n]: os.path.abspath(component.checkpoint.path) for n, component in parts.components.items()}
    tokenizers = {name: os.path.abspath(path) for name, path in parts.tokenizers.items()}
    return {**found, **({"tokenizers": tokenizers} if tokenizers else {})}


def check_parts(kind: type[Family], components: Mapping[str, Component]) -> None:
    """Raises CheckpointError unless the components are the family's, complete, and fit together."""
    held = " and ".join(DESCRIPTIONS[name] for name in components) or "nothing"
    other = next((n for n in DENOISERS if n in components and n != kind.family), None)
    if other and kind.family not in components:
        raise CheckpointError(
            f"{components[other].checkpoint.path} holds {DESCRIPTIONS[other]}, {kind.__name__} generates with "
            f"{DESCRIPTIONS[kind.family]}; eridiff.load chooses by the file"
        )
    encoders = kind.needed(components[kind.family].config) if kind.family in components else ()
    missing = [name for name in (kind.family, "vae", *encoders) if name not in components]
    if missing:
        options = [name for name, networks in PART_NAMES.items() if set(networks) & set(missing)]
        files = FILES | ({"vae": "sdxl_vae.safetensors"} if kind.family == "unet" else {})
        rest = [f"{name} (--{name.replace('_', '-')} {files[name]})" for name in options]
        *first, last = [DESCRIPTIONS[name] for name in missing]
        lacking = f"{', '.join(first)} and {last} are" if first else f"{last} is"
        raise CheckpointError(f"{lacking} missing: the model holds {held}; give the rest as {', '.join(rest)}")
    config, own = components[kind.family].config, components[kind.family].checkpoint
    check_fixed(kind.family, own.path, own.config, DRAWN)
    kind.check_widths(config, {name: components[name].config for name in TEXT_ENCODERS if name in components})
    kind.check_latents(config, components["vae"].config, CheckpointError)


def own_sampling(component: Component, variant: str, variants: Mapping[str, Any]) -> Any:
    """The variant's defaults with what a small file says in its metadata `eridiff.sampling`."""
    where = f"{component.checkpoint.path}: the metadata eridiff.sampling"
    try:
        given = json.loads(component.checkpoint.metadata.get("eridiff.sampling", "{}"))
    except ValueError as error:
        raise ConfigError(f"{where} is invalid: {error}") from None
    if not isinstance(given, dict):
        raise ConfigError(f"{where} is invalid: it must be a JSON object")
    return sampled_as(variants[variant], given, where)
