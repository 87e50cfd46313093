"""Published files at full size, converted there and back: `make test-full`. SDXL takes 21 GB of disk meanwhile."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eridiff.weights.header import open_checkpoint
from tests.manifest import read_manifest
from tests.sparse import write_random
from tests.test_convert import anonymous_megabytes

pytestmark = pytest.mark.full


def hashes(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype, str]]:
    """What each tensor of a file is, its content by a hash."""
    file = open_checkpoint(path)
    found = {}
    for name, entry in file.tensors.items():
        raw = file.read(name).contiguous().flatten().view(torch.uint8).numpy()
        found[name] = (tuple(entry.shape), entry.dtype, hashlib.blake2b(memoryview(raw), digest_size=16).hexdigest())
    return found


@pytest.mark.parametrize("manifest", ["sd_xl_base_1.0", "sd3.5-medium"])
def test_a_published_file_comes_back_from_diffusers_layout_bit_for_bit(manifest: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(7)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    path = write_random(tmp_path / "whole.safetensors", read_manifest(manifest), draw)
    before = hashes(path)
    there = ["convert", str(path), str(tmp_path / "folder"), "--to", "diffusers"]
    back = ["convert", str(tmp_path / "folder"), str(tmp_path / "back.safetensors"), "--to", "original"]
    megabytes = anonymous_megabytes(there, back)
    path.unlink()
    after = hashes(tmp_path / "back.safetensors")
    print(
        f"\n{manifest}: {len(before)} tensors, {len(after)} came back, {megabytes:.0f} MB of memory beside the files'"
    )
    assert {name: after[name] for name in before.keys() & after.keys()} == {
        name: before[name] for name in before.keys() & after.keys()
    }
    assert not after.keys() - before.keys()
    assert all(name.endswith("position_ids") or "logit_scale" in name for name in before.keys() - after.keys())
    assert megabytes < 500
