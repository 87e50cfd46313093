"""What a caller passes as a model's modules: taken out of its wrappers, and a mistake is named at once."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from eridiff.blocks import unwrapped, without_peft
from eridiff.errors import ConfigError
from eridiff.inference.family import Encoder, Family
from eridiff.models.autoencoder import Autoencoder
from eridiff.text.encoders import ClipEncoder, T5Encoder
from eridiff.weights.load import NETWORKS

MATRICES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CODEC_FAMILIES = {"mmdit": "sd3", "unet": "sdxl"}  # as AutoencoderConfig.of_family calls them, where it differs


def check_family(kind: type[Family], module: Any, foreign: bool = False) -> None:
    """ConfigError unless a module is the network that a family generates with; `foreign` ones pass, another family's do not."""
    wanted, inner = NETWORKS[kind.family], bare(module)
    if isinstance(inner, wanted):
        return
    other = next((family for family in Family.kinds.values() if isinstance(inner, NETWORKS[family.family])), None)
    if other is not None:
        raise ConfigError(
            f"{kind.__name__} generates with {wanted.__name__}, and the network is of class {type(inner).__name__}: use {other.__name__}"
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


def own_autoencoder(kind: type[Family], module: Any) -> Autoencoder:
    """A module that must be eridiff's Autoencoder, out of its wrappers; ConfigError for another.

    Where nothing states the scale and shift of its latents, its configuration gets the family's: SD 3's autoencoder has the
    names and shapes of Flux's.
    """
    if not isinstance(bare(module), Autoencoder):
        raise ConfigError(_refusal(kind, "autoencoder", Autoencoder, module))
    own: Any = unwrapped(module)
    own.config = own.config.of_family(CODEC_FAMILIES.get(kind.family, kind.family))
    return own


def own_encoders(kind: type[Family], encoders: Mapping[str, Any]) -> dict[str, Encoder]:
    """Those that are passed; ConfigError for text encoders without what goes with them."""
    given = {name: encoder for name, encoder in encoders.items() if encoder is not None}
    for name, encoder in given.items():
        wanted: type = T5Encoder if name == "t5" else ClipEncoder
        if (
            isinstance(encoder, nn.Module)
            or isinstance(encoder, ClipEncoder | T5Encoder)
            and not isinstance(encoder, wanted)
        ):
            how = {"clip": "(module, tokenizer)", "clip_g": "(module, tokenizer, pad=0, name='CLIP-G')"}
            raise ConfigError(
                f"{name} is of class {type(encoder).__name__}: pass eridiff.{wanted.__name__}{how.get(name, '(module, tokenizer, length)')}, "
                f"or everything at once by {kind.__name__}.from_diffusers(pipe)"
            )
    return given


def check_dtypes(**modules: nn.Module) -> None:
    """ConfigError for matrices of two dtypes, which can only be multiplied under autocast."""
    for name, module in modules.items():
        first: dict[torch.dtype, str] = {}
        for key, tensor in module.named_parameters():
            if tensor.ndim > 1 and tensor.dtype in MATRICES:
                first.setdefault(tensor.dtype, key)
        if len(first) > 1:
            both = " and ".join(
                f"{key} is {str(dtype).removeprefix('torch.')}" for dtype, key in list(first.items())[:2]
            )
            raise ConfigError(
                f"the {name} has matrices of two dtypes ({both}): generate under autocast, or convert one"
            )


def bare(module: Any) -> Any:
    """A module without the wrappers of peft and of others."""
    return without_peft(module) if isinstance(module, nn.Module) else module


def _refusal(kind: type[Family], name: str, wanted: type, module: Any) -> str:
    part = "unet" if kind.family == "unet" else "transformer"
    return (
        f"the {name} must be eridiff's {wanted.__name__} and is of class {type(bare(module)).__name__}: pass a trainer's modules by "
        f"{kind.__name__}.from_diffusers(pipe) or {kind.__name__}.from_diffusers({part}=..., vae=...), which adopts them"
    )
