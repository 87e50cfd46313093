"""A trainer's own modules, of diffusers' classes, become a `Model`.

Nothing of diffusers is imported: a pipeline is whatever has its attributes.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from eridiff.adopt import Adopted, adopt
from eridiff.blocks import unwrapped
from eridiff.errors import CheckpointError, ConfigError
from eridiff.inference.family import Encoder, Family
from eridiff.inference.handed_in import check_family
from eridiff.inference.model import Model
from eridiff.models.autoencoder import Autoencoder
from eridiff.text.tokenizers import clip_tokenizer, t5_tokenizer
from eridiff.weights.configs import DRAWN, check_fixed

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")  # by diffusers' names
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
PARTS = ("transformer", "unet", "vae", *ENCODERS, *TOKENIZERS, "scheduler")


def model_of(
    kind: type[Family], pipeline: Any, given: Mapping[str, Any], variant: str | None
) -> tuple[Model, dict[str, Any]]:
    """The modules of a pipeline, and what its configuration and its scheduler's say.

    - given: parts by diffusers' names, which win over the pipeline's.
    - variant: the one that is asked for.

    Raises as `DiffusionInference.from_diffusers`.
    """
    call = f"{kind.__name__}.from_diffusers"
    if isinstance(pipeline, nn.Module):
        raise ConfigError(f"{call} takes a pipeline, or its parts by name: {call}(transformer=..., vae=...)")
    held: dict[str, Any] = {
        name: getattr(pipeline, name, None) if given.get(name) is None else given[name] for name in PARTS
    }
    network = held["unet"] if held["transformer"] is None else held["transformer"]
    lacking = [name for name, part in (("transformer or unet", network), ("vae", held["vae"])) if part is None]
    if lacking:
        source = "was given" if pipeline is None else f"is in the {type(pipeline).__name__}"
        raise ConfigError(f"no {' and no '.join(lacking)} {source}: {call}(pipe) or {call}(transformer=..., vae=...)")
    check_family(kind, network, foreign=True)

    adopted = tuple(m if isinstance(m, Adopted) else adopt(m) for m in (network, held["vae"]))
    if [isinstance(one.network, Autoencoder) for one in adopted] != [False, True]:
        both = " and ".join(type(one.network).__name__ for one in adopted)
        raise ConfigError(f"{call} takes a network and an autoencoder as vae, and was given {both}")
    foreign = _config(adopted[0].foreign)
    check_fixed(kind.family, type(adopted[0].foreign).__name__, foreign, DRAWN)
    said = {**_config(pipeline), **_config(held["scheduler"])}
    own, codec = (one.network for one in adopted)
    model = Model.of(kind, own, codec, {}, name=_name(pipeline, said, foreign), variant=variant, adopted=adopted)
    model.encoders = _encoders(kind, held, model)
    for one in adopted:
        one.release()  # copies that the caller wants are made for an image, and released after it
    return model, said


def _name(pipeline: Any, *configs: Mapping[str, Any]) -> str:
    """What a variant is recognised by: where the modules came from, by its last component, and the pipeline's class."""
    source = next((str(path) for config in configs if (path := config.get("_name_or_path"))), "")
    words = re.findall("[A-Z]+[a-z0-9]*", "" if pipeline is None else type(pipeline).__name__)
    return "-".join([Path(source).name, *words])


def _config(module: Any) -> Mapping[str, Any]:
    config = getattr(module, "config", None)
    return config if isinstance(config, Mapping) else {}


def _encoders(kind: type[Family], held: Mapping[str, Any], model: Model) -> dict[str, Encoder]:
    """All text encoders that the network needs, or none; a tokenizer that is not passed is the published one."""
    places = dict(zip(kind.encoders, ENCODERS, strict=False))
    modules = {name: unwrapped(held[place]) for name, place in places.items() if held[place] is not None}
    if not modules:
        return {}
    config = model.network.config
    missing = [places[name] for name in kind.needed(config) if name not in modules]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} is missing: pass every text encoder, or none and conditioning")
    wrong = next((name for name, m in modules.items() if (name == "t5") != hasattr(m.config, "d_model")), None)
    if wrong is not None:
        what = "T5 encoder" if wrong == "t5" else "CLIP text model"
        raise ConfigError(f"{places[wrong]} must be a {what} and is of class {type(modules[wrong]).__name__}")
    given = {name: held[place] for name, place in zip(kind.encoders, TOKENIZERS, strict=False)}
    published = {"clip": clip_tokenizer, "clip_g": clip_tokenizer, "t5": t5_tokenizer}
    try:
        tokenizers = {n: published[n]() if given.get(n) is None else given[n] for n in modules}
    except CheckpointError:  # whose sentence is about files
        place = TOKENIZERS[kind.encoders.index("t5")]
        raise ConfigError(f"no tokenizer of T5 was passed and the hub's cache has none: give {place}") from None
    kind.check_widths(config, {name: m.config.to_dict() for name, m in modules.items()})
    found = kind.text_encoders(modules, tokenizers, model.sampling)
    for name, encoder in found.items():
        if name != "t5" and given.get(name) is not None and given[name].pad_token_id is not None:
            encoder.pad = given[name].pad_token_id  # type: ignore[union-attr]
    return found
