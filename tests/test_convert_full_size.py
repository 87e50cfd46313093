"""Published files at full size, converted there and back: `make test-full`. SDXL takes 21 GB of disk meanwhile.

Flux with its encoders, 33 GB, is numbers in 24 places of each tensor and holes between, written by a writer that keeps holes.
"""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eridiff.weights.header import open_checkpoint
from tests.manifest import read_manifest
from tests.sparse import write_random, write_scattered
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


def test_flux_comes_back_from_diffusers_layout_with_its_encoders(tmp_path: Path) -> None:
    """Files of the published sizes, 33 GB, of which 0.3 GB are on the disk."""
    names = {
        "flux1-dev": "flux",
        "ae": "ae",
        "clip_l": "clip_l",
        "t5xxl": "t5xxl",
    }  # manifest -> the file that is written
    (tmp_path / "whole").mkdir()
    for name in names:
        write_scattered(tmp_path / "whole" / f"{name}.safetensors", read_manifest(name))
    there = ["convert", str(tmp_path / "whole"), str(tmp_path / "folder"), "--to", "diffusers", "--shard", "10"]
    back = ["convert", str(tmp_path / "folder"), str(tmp_path / "back"), "--to", "original"]
    holes = "import eridiff.weights.save as save; from tests.sparse import SparseWriter; save.open = SparseWriter"
    megabytes = anonymous_megabytes(there, back, first=holes)
    assert len(list((tmp_path / "folder" / "transformer").glob("*.safetensors"))) == 3
    total, size = 0, 0
    for name, written in names.items():
        before = open_checkpoint(tmp_path / "whole" / f"{name}.safetensors")
        after = open_checkpoint(tmp_path / "back" / f"{written}.safetensors")
        lost = before.tensors.keys() - after.tensors.keys()
        assert all(name.endswith("position_ids") or name == "logit_scale" for name in lost)
        assert not after.tensors.keys() - before.tensors.keys()
        for tensor in before.tensors.keys() & after.tensors.keys():
            one, other = before.read(tensor), after.read(tensor)
            assert one.dtype == other.dtype and bool(one.any())
            assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)), tensor
            total, size = total + 1, size + one.nbytes
    print(f"\nFlux: {total} tensors of {size / 1e9:.1f} GB came back, {megabytes:.0f} MB of memory beside the files'")
    assert megabytes < 500
