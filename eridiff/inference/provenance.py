"""What a picture depends on beside its own settings: which model, loaded how, computing where."""

from typing import TYPE_CHECKING, Any

import torch

import eridiff
from eridiff.inference.latents import dtype_of
from eridiff.weights.locate import TEXT_ENCODERS

if TYPE_CHECKING:
    from eridiff.inference.base import DiffusionInference


def provenance(drawer: "DiffusionInference") -> dict[str, Any]:
    """For the record: as `load` takes it, to draw with the same model again."""
    parts = {drawer.family: drawer.network, "vae": drawer.autoencoder}
    encoders = {name: getattr(drawer, name, None) for name in TEXT_ENCODERS}
    parts |= {name: encoder.module for name, encoder in encoders.items() if encoder is not None}
    dtypes = {name: str(dtype_of(part)).removeprefix("torch.") for name, part in parts.items()}
    refiner = getattr(drawer, "refiner", None)
    refined = {} if refiner is None else {"refiner": refiner.source.get("parts")}
    published = vars(drawer.variants[drawer.variant])
    return {
        **drawer.source, **refined, "family": drawer.family, **{name: getattr(drawer, name) for name in drawer.recorded},
        "sampling": {name: value for name, value in vars(drawer.sampling).items() if value != published[name]},
        "dtype": dtypes[drawer.family], "dtypes": dtypes, "device": drawer.device.type, "threads": torch.get_num_threads(),
        "version": eridiff.__version__, "torch": torch.__version__,
    }  # fmt: skip
