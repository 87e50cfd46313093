"""The errors that are planted into the ports: one for each way in which ports go wrong."""

from collections.abc import Sequence

import numpy as np

from tests.bugs.flux import FLUX
from tests.bugs.inputs import INPUTS
from tests.bugs.mmdit import SD35
from tests.bugs.text import CLIP, T5
from tests.bugs.unet import UNET
from tests.bugs.vae import VAE
from tests.ports import Bug

NETWORKS = {"flux": FLUX, "mmdit": SD35, "vae": VAE, "unet": UNET, "clip": CLIP, "t5": T5}
BUGS = {family: bugs | INPUTS[family] for family, bugs in NETWORKS.items()}
# a case on which an error shows, where it is not the family's usual one
USUAL = {
    "flux": "flux-dev-tiny",
    "mmdit": "sd35-large-tiny",
    "vae": "ae-eps",
    "unet": "sdxl-eps",
    "clip": "text-clip-l-tiny",
    "t5": "text-t5-tiny",
}
OTHERS = {" of G": "text-clip-g-tiny", " of medium": "sd35-medium-tiny", " of base": "sdxl-base-tiny"}
EPSILONS = {"flux": "flux-eps", "mmdit": "sd3-eps"}
# functions of a port whose errors are in one stretch between two values of its trace, where one hides the other
STRETCHES = (
    ("rms_norm", "heads_of", "attention", "joined_streams", "attention_inputs", "head_inputs", "single_block", "rotated", "one_sequence"),
    ("modulated", "layer_norm", "chunks_of", "updated", "final_modulated", "double_block", "image_of", "one_sequence", "single_block"),
    ("masked", "clip_scores", "heads_of", "shared_out", "t5_scores", "t5_attention", "seen", "padded", "clip_attention"), ("embedded", "padded", "looked_up"),
    ("group_norm", "norm", "of_block", "of_transformer", "silu", "residual"), ("conv", "residual", "from_latents", "larger"), ("gelu", "gated"),
    ("transformer", "attended", "attention", "layer_norm", "attention_scale", "norm", "of_transformer"), ("sinusoid", "inputs", "vector_mlp", "embedded"),
)  # fmt: skip


def case_of(family: str, names: Sequence[str]) -> str:
    """The golden case on which these errors show."""
    for end, other in OTHERS.items():
        if any(name.endswith(end) for name in names):
            return other
    return EPSILONS.get(family, USUAL[family]) if any("eps" in name for name in names) else USUAL[family]


def alone(family: str, dtype: type = np.float64) -> list[str]:
    """Every error of a family that one can make in this dtype: a float32 port computes its tables in float32 in any case."""
    return [name for name in BUGS[family] if dtype is np.float64 or not name.endswith("in float32")]


def triples(family: str, dtype: type = np.float64) -> list[tuple[str, ...]]:
    """Every error once at least, in threes of which none hides another."""
    left = {
        n: BUGS[family][n]
        for n in alone(family, dtype)
        if case_of(family, [n]) in (USUAL[family], EPSILONS.get(family))
    }
    found = []
    waiting = list(left)
    while waiting:
        chosen = [waiting.pop(0)]
        for name in [*waiting, *left]:
            if (
                len(chosen) < 3
                and not any(_hide(left[name], left[other]) for other in chosen)
                and _show(family, [*chosen, name])
            ):
                chosen.append(name)
        waiting = [name for name in waiting if name not in chosen]
        found.append(tuple(chosen))
    return found


def _show(family: str, names: Sequence[str]) -> bool:
    """Not another input beside a wrong epsilon: the case that shows epsilons has one row, at a time of 0.5."""
    return not any("eps" in name for name in names) or all(NETWORKS[family].get(name) for name in names)


def _hide(one: Bug, other: Bug) -> bool:
    same = any(one.function in functions and other.function in functions for functions in STRETCHES)
    return same or one.function == other.function or one.first == other.first
