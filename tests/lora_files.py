"""Networks and LoRA files of the goldens, for tests."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from eridiff.lora import Lora, load, load_lora, save
from eridiff.lora.names import Names, names_of
from tests.golden.lora import Base

GOLDENS = Path(__file__).parent / "goldens"
BAD = GOLDENS / "lora-bad"
CASES = [path.parent.name for path in sorted(GOLDENS.glob("lora-*/lora.safetensors"))]
GOOD = [f"lora-bad/{path.name}" for path in sorted(BAD.glob("good-*.safetensors"))]
FILES = [*GOOD, *(f"{name}/lora.safetensors" for name in CASES)]


@cache
def base_of(folder: str) -> Base:
    """The networks of a case, in float32."""
    path = GOLDENS / folder
    return Base(json.loads((path / "case.json").read_text()) | {"folder": str(path)}, torch.float32)


@cache
def networks_of(folder: str) -> dict[str, Any]:
    return base_of(folder).given()


def loaded(file: str, **options: Any) -> Lora:
    """A file of the goldens, for the networks of its case."""
    return load_lora(GOLDENS / file, networks_of(Path(file).parent.name), alpha_is_rank=True, **options)


def contents(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, which may be changed, and its metadata."""
    with safe_open(GOLDENS / path, "pt") as file:
        metadata = file.metadata() or {}
    return load_file(GOLDENS / path), metadata


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, dict(metadata or {}))
    return path


TABLES: dict[tuple[str, int], tuple[Any, Names]] = {}  # by the network's identity; it is kept, so that it stays its own


def look_names_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """To list the names of a network takes longer than to read a small file."""

    def remembered(network: str, module: Any) -> Names:
        key = (network, id(module))
        if key not in TABLES:
            TABLES[key] = (module, names_of(network, module))
        return TABLES[key][1]

    monkeypatch.setattr(load, "names_of", remembered)
    monkeypatch.setattr(save, "names_of", remembered)
