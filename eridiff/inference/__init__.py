"""From a prompt to an image."""

import os

from typing_extensions import Unpack

from eridiff.errors import CheckpointError, ConfigError
from eridiff.inference.base import DiffusionInference
from eridiff.inference.flux import FluxInference
from eridiff.inference.options import LoadOptions, check_names
from eridiff.inference.result import Prompt, Result, Step
from eridiff.inference.sd35 import SD35Inference
from eridiff.inference.sdxl import SDXLInference, refiner_parts
from eridiff.weights.detect import DESCRIPTIONS
from eridiff.weights.locate import ModelPath, locate

__all__ = ["DiffusionInference", "FluxInference", "Prompt", "Result", "SD35Inference", "SDXLInference", "Step", "load"]
FAMILIES: tuple[type[DiffusionInference], ...] = (FluxInference, SD35Inference, SDXLInference)
BUILT_IN = os.path.join(os.path.dirname(os.path.dirname(__file__)), "assets", "tiny-flux")


def load(
    model: ModelPath | None = None, *, refiner: ModelPath | None = None, family: str | None = None,
    **options: Unpack[LoadOptions],
) -> DiffusionInference:  # fmt: skip
    """Load a published checkpoint with all that generating images needs.

    - model: a path, a hub id, a built-in model (tiny-flux, tiny-sd35, tiny-sdxl), or the parts by name (`{"transformer": PATH,
      "vae": PATH, ...}`, see `locate`); None is tiny-flux.
    - refiner: finishes the images of an SDXL base; it is loaded with the same options, and `vram` counts both.
    - family: flux, mmdit or unet, which the model must be; None takes what it is.
    - variant, device, dtype, offload, vae_rows, compile, progress, allow_unknown: as in `eridiff.inference.options.Options`.
    - the rest: the keywords of FluxInference, SD35Inference or SDXLInference, as the model is.

    Raises CheckpointError for files that are damaged, incomplete or of another kind, ConfigError for an option that the
    family does not have.
    """
    check_names("load", options, [*LoadOptions.__annotations__, "model", "refiner", "family"])
    families = [kind.family for kind in FAMILIES]
    if family is not None and family not in families:
        raise ConfigError(f"'{family}' is not a family; there are {', '.join(families)}")
    parts = locate(BUILT_IN if model is None else model, options.get("allow_unknown", False))
    kind = next((family for family in FAMILIES if family.family in parts.components), None)
    if kind is None:
        held = " and ".join(DESCRIPTIONS[name] for name in parts.components) or "nothing"
        wanted = " or ".join(DESCRIPTIONS[family.family] for family in FAMILIES)
        raise CheckpointError(f"the model holds {held} and no denoising network; pass {wanted} as transformer")
    if family is not None and family != kind.family:
        held = DESCRIPTIONS[kind.family]
        raise CheckpointError(f"the model holds {held}, and {DESCRIPTIONS[family]} is expected")
    beside = {} if refiner is None else {"refiner": refiner_parts(parts, refiner, options.get("allow_unknown", False))}
    return kind(**options).load_model(parts, **beside)  # type: ignore[misc]  # the constructor refuses other families' options
