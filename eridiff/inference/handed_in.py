"""Modules that a trainer holds become those of an inference, and what was handed in by mistake is named at once.

Nothing of diffusers is imported: a pipeline is whatever has its attributes.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from eridiff.blocks import unwrapped, without_peft
from eridiff.errors import CheckpointError, ConfigError
from eridiff.inference.loading import check_widths
from eridiff.inference.options import Options, check_names
from eridiff.models.autoencoder import Autoencoder
from eridiff.text.encoders import ClipEncoder, T5Encoder
from eridiff.text.tokenizers import clip_tokenizer, t5_tokenizer
from eridiff.weights.configs import DRAWN, check_fixed
from eridiff.weights.load import NETWORKS

if TYPE_CHECKING:
    from eridiff.inference.base import DiffusionInference

log = logging.getLogger(__name__)
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")  # by diffusers' names
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
PARTS = ("transformer", "unet", "vae", *ENCODERS, *TOKENIZERS, "scheduler")
MATRICES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Drawer = TypeVar("Drawer", bound="DiffusionInference")


def from_diffusers(kind: type[Drawer], pipeline: Any, given: Mapping[str, Any], options: dict[str, Any]) -> Drawer:
    """An inference with a trainer's own modules; `given` are parts by diffusers' names, which win over the pipeline's."""
    # not at the top: training is made of inferences, so this import goes the other way round
    from eridiff.training.adopt import Adopted, adopt

    call = f"{kind.__name__}.from_diffusers"
    if isinstance(pipeline, nn.Module):
        raise ConfigError(f"{call} takes a pipeline, or its parts by name: {call}(transformer=..., vae=...)")
    check_names(call, options, [*PARTS, *Options.__annotations__, *kind.own_options()])
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
    check_fixed(kind.family, type(adopted[0].foreign).__name__, _config(adopted[0].foreign), DRAWN)
    said = {**_config(pipeline), **_config(held["scheduler"])}
    drawer = kind(None, None, **options)
    drawer.autoencoder = own_autoencoder(kind, adopted[1].network)
    drawer.set_network(adopted[0].network, _name(pipeline, said, _config(adopted[0].foreign)))
    drawer.follow(said, options)
    _set_encoders(drawer, held)
    drawer.adopted = adopted
    for one in adopted:
        one.release()  # copies that the caller wants are made for an image, and given back after it
    return drawer


def _name(pipeline: Any, *configs: Mapping[str, Any]) -> str:
    """What a variant is told by: where the modules came from, by its last component, and the pipeline's class."""
    source = next((str(path) for config in configs if (path := config.get("_name_or_path"))), "")
    words = re.findall("[A-Z]+[a-z0-9]*", "" if pipeline is None else type(pipeline).__name__)
    return "-".join([Path(source).name, *words])


def _config(module: Any) -> Mapping[str, Any]:
    config = getattr(module, "config", None)
    return config if isinstance(config, Mapping) else {}


def _set_encoders(drawer: "DiffusionInference", held: Mapping[str, Any]) -> None:
    """All text encoders that the network needs, or none; a tokenizer that is not handed in is the published one."""
    places = dict(zip(drawer.encoders, ENCODERS, strict=False))
    modules = {name: unwrapped(held[place]) for name, place in places.items() if held[place] is not None}
    if not modules:
        return
    missing = [places[name] for name in drawer.needed(drawer.network.config) if name not in modules]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} is missing: hand in every text encoder, or none and conditioning")
    wrong = next((name for name, m in modules.items() if (name == "t5") != hasattr(m.config, "d_model")), None)
    if wrong is not None:
        kind = "T5 encoder" if wrong == "t5" else "CLIP text model"
        raise ConfigError(f"{places[wrong]} must be a {kind} and is of class {type(modules[wrong]).__name__}")
    given = {name: held[place] for name, place in zip(drawer.encoders, TOKENIZERS, strict=False)}
    published = {"clip": clip_tokenizer, "clip_g": clip_tokenizer, "t5": t5_tokenizer}
    try:
        tokenizers = {n: published[n]() if given.get(n) is None else given[n] for n in modules}
    except CheckpointError:  # whose sentence is about files
        place = TOKENIZERS[drawer.encoders.index("t5")]
        raise ConfigError(f"no tokenizer of T5 was handed in and the hub's cache has none: give {place}") from None
    check_widths(type(drawer), drawer.network.config, {name: m.config.to_dict() for name, m in modules.items()})
    drawer.set_encoders(modules, tokenizers)
    for name in ("clip", "clip_g"):
        if given.get(name) is not None and given[name].pad_token_id is not None:
            getattr(drawer, name).pad = given[name].pad_token_id


# what was handed in by mistake ----------------------------------------------------------------------------------------


def check_family(kind: "type[DiffusionInference]", module: Any, foreign: bool = False) -> None:
    """ConfigError unless a module is the network that a family draws with; `foreign` ones pass, another family's do not."""
    from eridiff.inference import FAMILIES

    wanted, inner = NETWORKS[kind.family], _inner(module)
    if isinstance(inner, wanted):
        return
    other = next((family for family in FAMILIES if isinstance(inner, NETWORKS[family.family])), None)
    if other is not None:
        raise ConfigError(
            f"{kind.__name__} draws with {wanted.__name__}, and the network is of class {type(inner).__name__}: use {other.__name__}"
        )
    if not foreign:
        raise ConfigError(_refusal(kind, "network", wanted, module))


def check_sharding(network: nn.Module) -> None:
    """Raises ConfigError for a network that others have sharded in a way in which it cannot be asked step by step."""
    own = isinstance(network, tuple(NETWORKS.values()))
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in network.modules()):
        how = "FSDP1 (FullyShardedDataParallel)"
    elif own and "prepare" not in vars(network) and any(hasattr(p, "device_mesh") for p in network.parameters()):
        how = "fully_shard alone, which gathers for `forward` and not for `prepare` and `step`"
    else:
        return
    raise ConfigError(f"the network is sharded by {how}: shard it by eridiff.training.distributed.shard(network)")


def check_inference(given: Any) -> None:
    """ConfigError unless what a `Sampler` is given is an inference."""
    from eridiff.inference.base import DiffusionInference

    if not isinstance(given, DiffusionInference):
        raise ConfigError(
            f"Sampler draws with an inference, and this is of class {type(_inner(given)).__name__}: Sampler(FluxInference.from_diffusers(pipe), section), "
            "or SD35Inference, or SDXLInference"
        )


def own_autoencoder(kind: "type[DiffusionInference]", module: Any) -> Autoencoder:
    """A module that must be eridiff's Autoencoder, out of its wrappers; ConfigError for another.

    Where nothing states the scale and shift of its latents, its configuration gets the family's: SD 3's autoencoder has the
    names and shapes of Flux's.
    """
    if not isinstance(_inner(module), Autoencoder):
        raise ConfigError(_refusal(kind, "autoencoder", Autoencoder, module))
    own: Any = unwrapped(module)
    own.config = own.config.of_family({"mmdit": "sd3", "unet": "sdxl"}.get(kind.family, kind.family))
    return own


def check_encoders(kind: "type[DiffusionInference]", **encoders: Any) -> None:
    """ConfigError for text encoders without what goes with them."""
    for name, encoder in encoders.items():
        wanted: type = T5Encoder if name == "t5" else ClipEncoder
        if (
            isinstance(encoder, nn.Module)
            or isinstance(encoder, ClipEncoder | T5Encoder)
            and not isinstance(encoder, wanted)
        ):
            how = {"clip": "(module, tokenizer)", "clip_g": "(module, tokenizer, pad=0, name='CLIP-G')"}
            raise ConfigError(
                f"{name} is of class {type(encoder).__name__}: hand in eridiff.{wanted.__name__}{how.get(name, '(module, tokenizer, length)')}, "
                f"or everything at once by {kind.__name__}.from_diffusers(pipe)"
            )


def check_dtypes(drawer: "DiffusionInference") -> None:
    """ConfigError for matrices of two dtypes, which can only be multiplied under autocast."""
    for name in ("network", "autoencoder"):
        first: dict[torch.dtype, str] = {}
        for key, tensor in getattr(drawer, name).named_parameters():
            if tensor.ndim > 1 and tensor.dtype in MATRICES:
                first.setdefault(tensor.dtype, key)
        if len(first) > 1:
            both = " and ".join(
                f"{key} is {str(dtype).removeprefix('torch.')}" for dtype, key in list(first.items())[:2]
            )
            raise ConfigError(f"the {name} has matrices of two dtypes ({both}): draw under autocast, or convert one")


def _inner(module: Any) -> Any:
    return without_peft(module) if isinstance(module, nn.Module) else module


def _refusal(kind: "type[DiffusionInference]", name: str, wanted: type, module: Any) -> str:
    part = "unet" if kind.family == "unet" else "transformer"
    return (
        f"the {name} must be eridiff's {wanted.__name__} and is of class {type(_inner(module)).__name__}: hand in a trainer's modules by "
        f"{kind.__name__}.from_diffusers(pipe) or {kind.__name__}.from_diffusers({part}=..., vae=...), which adopts them"
    )
