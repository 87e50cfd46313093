"""Published sizes through the real loader, on two cores and little memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eridiff import load_network
from eridiff.models.autoencoder import Autoencoder, AutoencoderConfig
from eridiff.text.encoders import ClipEncoder, build_encoder
from eridiff.text.tokenizers import clip_tokenizer
from eridiff.weights.detect import component_of
from eridiff.weights.header import open_checkpoint
from eridiff.weights.save import save_network
from tests.manifest import read_manifest
from tests.sparse import sparse_manifest

ANONYMOUS = """
import sys
from eridiff import load_network
from pathlib import Path

def anonymous():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("RssAnon"))
    return int(line.split()[1]) // 1024

before = anonymous()
model = load_network(sys.argv[1])
count = sum(p.numel() for p in model.parameters())
print(count, anonymous() - before, anonymous())
"""


def test_full_size_flux_dev_loads_in_under_300_mb(tmp_path: Path) -> None:
    """A sparse flux1-dev with the published header: 11.9 billion parameters, all mapped, none copied."""
    path = sparse_manifest(tmp_path / "flux1-dev.safetensors", "flux1-dev")
    assert path.stat().st_size > 23_800_000_000 and path.stat().st_blocks * 512 < 1_000_000
    out = subprocess.run(
        [sys.executable, "-c", ANONYMOUS, str(path)], check=True, capture_output=True, text=True
    ).stdout
    count, added, total = map(int, out.split())
    print(f"{count:,} parameters, {added} MiB of anonymous memory added, {total} MiB in all")
    assert count == 11_901_408_320 and total < 300


@pytest.mark.slow
def test_a_full_size_autoencoder_runs(tmp_path: Path) -> None:
    """Random weights at the published size, through a file in each layout."""
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig.preset("flux")).eval()
    picture = torch.rand(1, 3, 256, 256) * 2 - 1
    with torch.no_grad():
        latents = model.encode(picture)
        decoded = model.decode(latents)
        assert latents.shape == (1, 16, 32, 32) and decoded.shape == picture.shape
        for layout in ("original", "diffusers"):
            loaded = load_network(save_network(model, tmp_path / f"{layout}.safetensors", layout=layout))
            assert torch.equal(loaded.encode(picture), latents) and torch.equal(loaded.decode(latents), decoded)


@pytest.mark.slow
def test_a_full_size_clip_runs(tmp_path: Path) -> None:
    """Random weights under clip_l's published names, with the shipped tokenizer."""
    g = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=g).half() * 0.02 for name, (_, shape) in read_manifest("clip_l").items()
    }
    path = tmp_path / "clip_l.safetensors"
    save_file(state, path)
    encoder = ClipEncoder(
        build_encoder(component_of(open_checkpoint(path), "clip"), dtype=torch.float32), clip_tokenizer()
    )
    tokens = encoder.tokenize(["a photo of a cat", "a photo of a cat on a mat"])
    found = encoder(tokens)
    assert found.pooled.shape == (2, 768) and bool(torch.isfinite(found.pooled).all())
    assert torch.equal(found.pooled[0], found.last[0, 6]) and torch.equal(found.projected, found.pooled)
    assert json.loads(json.dumps(tokens[0, :7].tolist())) == [49406, 320, 1125, 539, 320, 2368, 49407]
