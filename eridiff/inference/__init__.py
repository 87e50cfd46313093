"""A prompt becomes a picture."""

import inspect
import os
from typing import Any

from eridiff.errors import CheckpointError, ConfigError
from eridiff.inference.base import DiffusionInference
from eridiff.inference.flux import FluxInference
from eridiff.inference.result import Prompt, Result, Step
from eridiff.inference.sd35 import SD35Inference
from eridiff.inference.sdxl import SDXLInference
from eridiff.weights.detect import DESCRIPTIONS
from eridiff.weights.locate import Model, locate

__all__ = ["DiffusionInference", "FluxInference", "Prompt", "Result", "SD35Inference", "SDXLInference", "Step", "load"]
FAMILIES: tuple[type[DiffusionInference], ...] = (FluxInference, SD35Inference, SDXLInference)
BUILT_IN = os.path.join(os.path.dirname(os.path.dirname(__file__)), "assets", "tiny-flux")


def load(model: Model | None = None, *, family: str | None = None, **options: Any) -> DiffusionInference:
    """Everything that draws with a published checkpoint: a path, a hub id, or the parts by name (`locate`).

    None is the built-in small Flux. A `family` (flux, mmdit, unet) must be the model's. Options are the family's: variant, device, dtype, offload, progress, and those
    of SD35Inference and SDXLInference. Raises CheckpointError for files that are damaged, incomplete or of another kind, ConfigError for an option
    that the family does not have.
    """
    parts = locate(BUILT_IN if model is None else model)
    kind = next((family for family in FAMILIES if family.family in parts.components), None)
    if kind is None:
        held = " and ".join(DESCRIPTIONS[name] for name in parts.components) or "nothing"
        wanted = " or ".join(DESCRIPTIONS[family.family] for family in FAMILIES)
        raise CheckpointError(f"the model holds {held} and no network that draws; give {wanted} as transformer")
    if family not in (None, kind.family):
        held = DESCRIPTIONS[kind.family]
        raise CheckpointError(f"the model holds {held}, and {DESCRIPTIONS[str(family)]} is expected")
    known = {*inspect.signature(kind.__init__).parameters, *inspect.signature(DiffusionInference.__init__).parameters}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ConfigError(f"{kind.__name__} has no option '{unknown[0]}'")
    return kind(**options).load_model(parts)
