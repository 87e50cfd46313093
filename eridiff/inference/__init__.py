"""A prompt becomes a picture."""

import os
from typing import Any

from eridiff.inference.base import DiffusionInference, Prompt, Result, Step
from eridiff.inference.flux import FluxInference
from eridiff.weights.locate import Model

__all__ = ["DiffusionInference", "FluxInference", "Prompt", "Result", "Step", "load"]


def load(model: Model | None = None, **options: Any) -> DiffusionInference:
    """Everything that draws with a published checkpoint: a path, a hub id, or the parts by name (`locate`).

    None is the built-in small Flux. Options are FluxInference's: device, dtype, offload, progress. Raises
    CheckpointError for files that are damaged, incomplete or of another kind.
    """
    return FluxInference(**options).load_model(BUILT_IN if model is None else model)


BUILT_IN = os.path.join(os.path.dirname(os.path.dirname(__file__)), "assets", "tiny-flux")
