"""What tests on the pretended GPU share: whole small models as files, images, and what is equal."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny
from tests.pretend_gpu import PretendedGPU, pretend_gpu

WRITERS: dict[str, Callable[..., Path]] = {
    "flux": tiny.write_model, "sd3": tiny.write_sd3_model, "sdxl": tiny.write_sdxl_model,
}  # fmt: skip


@pytest.fixture(scope="module", params=list(WRITERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole small model of each family, as published files."""
    return WRITERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture
def gpu() -> Iterator[PretendedGPU]:
    with pretend_gpu() as gpu:
        yield gpu


def modules(model: Any) -> dict[str, torch.nn.Module]:
    encoders = {name: getattr(model, name, None) for name in ("clip", "clip_g", "t5")}
    found = {name: encoder.module for name, encoder in encoders.items() if encoder is not None}
    return {"network": model.network, "autoencoder": model.autoencoder, **found}


def moved(model: Any, device: Any) -> Any:
    for module in modules(model).values():
        module.to(device)
    return model


def same(image: Any, other: Any) -> bool:
    """Equal but for a level here and there: on the pretended GPU attention is computed by plain products."""
    distance = np.abs(np.asarray(image, np.int16) - np.asarray(other, np.int16))
    return int(distance.max()) <= 1


def photo() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(values)


def hole() -> Image.Image:
    values = np.zeros((64, 64), dtype=np.uint8)
    values[16:48, 16:48] = 255
    return Image.fromarray(values)
