"""SDXL, Stable Diffusion 3 / 3.5 and Flux in plain PyTorch: a published checkpoint in, a picture out."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0.dev0"

# looked up when first used, so that importing a network imports no text encoder
_PLACES = {
    "load": "eridiff.inference",
    "FluxInference": "eridiff.inference",
    "SD35Inference": "eridiff.inference",
    "SDXLInference": "eridiff.inference",
    "Prompt": "eridiff.inference",
    "load_lora": "eridiff.lora",
    "attach_lora": "eridiff.lora",
    "inject_lora": "eridiff.lora",
    "merge_lora": "eridiff.lora",
    "save_lora": "eridiff.lora",
    "load_network": "eridiff.weights.load",
    "save_network": "eridiff.weights.save",
    "Flux": "eridiff.models.flux",
    "FluxConfig": "eridiff.models.flux",
    "MMDiT": "eridiff.models.mmdit",
    "MMDiTConfig": "eridiff.models.mmdit",
    "UNet": "eridiff.models.unet",
    "UNetConfig": "eridiff.models.unet",
    "Autoencoder": "eridiff.models.autoencoder",
    "AutoencoderConfig": "eridiff.models.autoencoder",
    "Conditioning": "eridiff.text",
}
__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'eridiff' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
