"""In what a model computes by default: on a CPU in float32 as far as half of the memory holds all that is converted."""

import math
from pathlib import Path

import pytest
import torch

from eridiff.weights import load
from eridiff.weights.detect import Component, detect
from eridiff.weights.header import open_checkpoint
from eridiff.weights.load import default_dtypes
from tests.manifest import read_manifest
from tests.sparse import write_sparse

CPU, GIB = torch.device("cpu"), 2**30
MODELS = {
    "sd3.5-medium": ("sd3.5-medium", "clip_l", "clip_g-hf", "t5xxl"),
    "flux1-dev": ("flux1-dev", "ae", "clip_l", "t5xxl"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Component]]:
    """Published models as sparse files of full size."""
    folder = tmp_path_factory.mktemp("models")
    found: dict[str, dict[str, Component]] = {}
    for model, parts in MODELS.items():
        found[model] = {}
        for part in parts:
            file = open_checkpoint(write_sparse(folder / f"{part}.safetensors", read_manifest(part)))
            found[model] |= {component.network: component for component in detect(file)}
    return found


def converted(components: dict[str, Component], dtypes: dict[str, torch.dtype]) -> int:
    """Bytes of the tensors that a file has in another dtype."""
    found = 0
    for name, component in components.items():
        for entry in (component.checkpoint.tensors[component.prefix + key] for key in component.keys):
            found += math.prod(entry.shape) * dtypes[name].itemsize if entry.dtype != dtypes[name] else 0
    return found


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("memory", [16, 24, 32, 48, 96, 128, 256])
def test_all_parts_share_half_of_the_memory(
    model: str, memory: int, models: dict[str, dict[str, Component]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "machine_memory", lambda: memory * GIB)
    components = models[model]
    dtypes = default_dtypes(components, CPU)
    narrow = default_dtypes(components, torch.device("cuda"))  # T5's float16 file becomes bfloat16 whatever the room
    assert narrow["t5"] == torch.bfloat16 and torch.float32 not in (narrow["t5"], narrow["clip"])
    assert converted(components, dtypes) <= max(memory * GIB / 2, converted(components, narrow))
    small = [name for name in components if dtypes[name] == torch.float32]
    assert (set(small) == set(components)) == (memory >= (64 if model == "sd3.5-medium" else 128))
    assert memory < 24 or {"vae", "clip"} <= set(small)


def test_one_part_alone_asks_for_itself(
    models: dict[str, dict[str, Component]], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = models["sd3.5-medium"]["mmdit"]
    for memory, dtype in ((16, torch.float16), (24, torch.float32)):
        monkeypatch.setattr(load, "machine_memory", lambda memory=memory: memory * GIB)
        assert default_dtypes({"mmdit": network}, CPU) == {"mmdit": dtype}


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load.machine_memory()
    for text, expected in (("max\n", whole), ("1048576\n", 1048576), ("9223372036854771712\n", whole)):
        (tmp_path / "memory.max").write_text(text)
        monkeypatch.setattr(load, "CONTAINER_LIMITS", (str(tmp_path / "memory.max"), str(tmp_path / "none")))
        assert load.machine_memory() == expected
    monkeypatch.delattr(load.os, "sysconf")
    assert load.machine_memory() == load.USUAL_MEMORY
