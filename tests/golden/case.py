"""What every case has: weights through a file and the ordinary loader, inputs, rows of a table."""

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eridiff.models import flux, mmdit, unet
from eridiff.text.encoders import build_encoder
from eridiff.trace.record import relative_l2
from eridiff.weights.detect import component_of
from eridiff.weights.header import open_checkpoint
from eridiff.weights.load import NETWORKS, build
from eridiff.weights.save import write_tensors
from tests.hashfill import parameter, value


@dataclass(frozen=True)
class Row:
    """One comparison: relative L2 distance and the bound it must keep."""

    case: str
    dtype: str
    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


def load_case(
    case: Mapping[str, Any],
    configs: Mapping[str, Mapping[str, Any]],
    dtype: torch.dtype,
    stored: torch.dtype = torch.float64,
) -> Any:
    """The case's weights through a file in the original layout and the loader: a module for each network of `configs`."""
    tensors = {
        name: torch.as_tensor(parameter(name, tuple(shape), case["salt"], case["overrides"])).to(stored)
        for name, shape in case["parameters"]
    }
    modules = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.safetensors"
        write_tensors(tensors, path, {"eridiff.config": json.dumps(configs)})
        for network in configs:
            component = component_of(open_checkpoint(path), network)
            modules.append((build if network in NETWORKS else build_encoder)(component, dtype=dtype))
    return modules


def inputs_of(case: Mapping[str, Any]) -> dict[str, Tensor]:
    result = {}
    for item in case["inputs"]:
        given = item.get("values")
        array = given if given is not None else value(item["name"], tuple(item["shape"]), case["salt"], item["scale"])
        result[item["name"]] = torch.as_tensor(
            array, dtype=None if given and isinstance(given[0], list) else torch.float64
        )
    return result


def float32_sinusoid(values: Tensor, width: int = 256) -> Tensor:
    """As the originals compute it: from float32 on; float64 out."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2, dtype=torch.float32) / (width // 2))
    angles = values.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).double()


class Float32Sinusoid:
    """Within the block, the networks' sinusoid is computed in float32 whatever their dtype, as the originals do."""

    def __enter__(self) -> None:
        self.wide, self.plain = flux.timestep_sinusoid, unet.sinusoid
        unet.sinusoid = float32_sinusoid
        flux.timestep_sinusoid = mmdit.timestep_sinusoid = lambda times: float32_sinusoid(1000.0 * times)

    def __exit__(self, *_: object) -> None:
        flux.timestep_sinusoid = mmdit.timestep_sinusoid = self.wide
        unet.sinusoid = self.plain


def row(case: Mapping[str, Any], dtype: torch.dtype, name: str, found: Tensor, expected: Tensor, bound: float) -> Row:
    return Row(case["case"], str(dtype).removeprefix("torch."), name, relative_l2(found, expected), bound)
