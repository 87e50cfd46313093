"""SDXL, Stable Diffusion 3 / 3.5 and Flux in plain PyTorch: a published checkpoint in, an image out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors see; a test compares it with the two tables below
    from eridiff import adopt as adopt
    from eridiff import block_cache as block_cache
    from eridiff import blocks as blocks
    from eridiff import errors as errors
    from eridiff import float8 as float8
    from eridiff import graphs as graphs
    from eridiff import images as images
    from eridiff import inference as inference
    from eridiff import lora as lora
    from eridiff import memory as memory
    from eridiff import models as models
    from eridiff import onednn as onednn
    from eridiff import report as report
    from eridiff import run_files as run_files
    from eridiff import schedulers as schedulers
    from eridiff import text as text
    from eridiff import trace as trace
    from eridiff import training as training
    from eridiff import weights as weights
    from eridiff.inference import FluxInference as FluxInference
    from eridiff.inference import Prompt as Prompt
    from eridiff.inference import SD35Inference as SD35Inference
    from eridiff.inference import SDXLInference as SDXLInference
    from eridiff.inference import load as load
    from eridiff.lora import attach_lora as attach_lora
    from eridiff.lora import inject_lora as inject_lora
    from eridiff.lora import load_lora as load_lora
    from eridiff.lora import merge_lora as merge_lora
    from eridiff.lora import save_lora as save_lora
    from eridiff.models.autoencoder import Autoencoder as Autoencoder
    from eridiff.models.autoencoder import AutoencoderConfig as AutoencoderConfig
    from eridiff.models.flux import Flux as Flux
    from eridiff.models.flux import FluxConfig as FluxConfig
    from eridiff.models.mmdit import MMDiT as MMDiT
    from eridiff.models.mmdit import MMDiTConfig as MMDiTConfig
    from eridiff.models.unet import UNet as UNet
    from eridiff.models.unet import UNetConfig as UNetConfig
    from eridiff.request import Request as Request
    from eridiff.text import Conditioning as Conditioning
    from eridiff.text.encoders import ClipEncoder as ClipEncoder
    from eridiff.text.encoders import T5Encoder as T5Encoder
    from eridiff.text.encoders import load_encoder as load_encoder
    from eridiff.weights.load import load_network as load_network
    from eridiff.weights.save import save_network as save_network

__version__ = "0.1.0.dev0"

# imported on first use, so that importing a network imports no text encoder
_MODULES = (
    "adopt", "block_cache", "blocks", "errors", "float8", "graphs", "images", "inference", "lora", "memory", "models",
    "onednn", "report", "run_files", "schedulers", "text", "trace", "training", "weights",
)  # fmt: skip
_PLACES = {
    "load": "eridiff.inference",
    "FluxInference": "eridiff.inference",
    "SD35Inference": "eridiff.inference",
    "SDXLInference": "eridiff.inference",
    "Prompt": "eridiff.inference",
    "Request": "eridiff.request",
    "load_lora": "eridiff.lora",
    "attach_lora": "eridiff.lora",
    "inject_lora": "eridiff.lora",
    "merge_lora": "eridiff.lora",
    "save_lora": "eridiff.lora",
    "load_encoder": "eridiff.text.encoders",
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
    "ClipEncoder": "eridiff.text.encoders",
    "T5Encoder": "eridiff.text.encoders",
}
__all__ = ["__version__", *_PLACES]


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_PLACES})


if not TYPE_CHECKING:  # a type checker that saw it would take every misspelt name for one that exists

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(f"eridiff.{name}")
        if name not in _PLACES:
            raise AttributeError(f"module 'eridiff' has no attribute {name!r}")
        return getattr(import_module(_PLACES[name]), name)
