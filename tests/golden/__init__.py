"""`python -m tests.golden FOLDER...`: run golden cases through the ordinary loader and print a table of errors.

Each case's weights are rebuilt by `hashfill`, written in the original layout, loaded by `eridiff.weights`, and run in
float64 and float32. What is run is in its `case.json` alone (tests/goldens/README.md). Exit code 1 when a tolerance is
exceeded, 2 when a folder is not a case.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.golden.autoencoder import run_autoencoder
from tests.golden.case import Float32Sinusoid, GoldenFrequencies, Row
from tests.golden.flux import run_flux, run_trajectory
from tests.golden.lora import run_lora
from tests.golden.sd3 import run_mmdit, run_sd3_text, run_sd3_trajectory, run_skip_layers
from tests.golden.sdxl import run_sdxl_text, run_unet, run_vector
from tests.golden.sdxl_runs import run_sdxl_trajectories
from tests.golden.text import run_clip, run_t5

__all__ = ["Float32Sinusoid", "Row", "run_case"]
RUNNERS = {  # by the kind that case.json says
    "vae": run_autoencoder, "flux": run_flux, "mmdit": run_mmdit, "unet": run_unet,
    "flux-trajectory": run_trajectory, "mmdit-trajectories": run_sd3_trajectory, "mmdit-skip-layers": run_skip_layers,
    "unet-trajectories": run_sdxl_trajectories, "formula-trajectories": run_sdxl_trajectories, "size-vector": run_vector,
    "clip": run_clip, "clip_g": run_clip, "t5": run_t5, "sd3-text": run_sd3_text, "sdxl-text": run_sdxl_text,
    "flux-lora": run_lora, "mmdit-lora": run_lora, "unet-lora": run_lora,
}  # fmt: skip
TEXT = ("clip", "clip_g", "t5", "sd3-text", "sdxl-text")


def run_case(folder: Path, dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32)) -> list[Row]:
    """Every comparison of a case folder; raises ValueError for a folder that is not a case this runner knows."""
    for name in ("case.json", "expected.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}")
    case = json.loads((folder / "case.json").read_text()) | {"folder": str(folder)}
    kind = case.get("kind")
    if kind not in RUNNERS:
        raise ValueError(f"{folder} is a case of a kind that this runner does not know: {kind}")
    expected = load_file(folder / "expected.safetensors")
    rows = []
    for dtype in dtypes:
        with GoldenFrequencies(), default_dtype(dtype) if kind in TEXT else nullcontext():
            rows += RUNNERS[kind](case, expected, dtype)
    return rows


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """transformers 4 makes CLIP's causal mask in the default dtype, which must hold float64's lowest number."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
