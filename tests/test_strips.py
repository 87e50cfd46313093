"""The autoencoder in strips equals the plain one, and needs less memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eridiff.memory.plan import peak_bytes
from eridiff.memory.strips import decode_in_strips, encode_in_strips
from eridiff.models.autoencoder import Autoencoder, AutoencoderConfig
from eridiff.trace.record import relative_l2
from tests import tiny


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5), st.integers(1, 2), st.booleans())
def test_strips_of_any_height_give_the_plain_result(rows: int, h: int, w: int, batch: int, quant: bool) -> None:
    """In float64 to rounding: halos, paddings and statistics are exact whatever the strips."""
    model = tiny.autoencoder(AutoencoderConfig(32, (1, 2, 2), 1, 4, 0.5, 0.1, quant)).double()
    g = torch.Generator().manual_seed(rows)
    latents, pictures = (torch.randn(s, generator=g).double() for s in ((batch, 4, h, w), (batch, 3, 4 * h, 4 * w)))
    kept = latents.clone(), pictures.clone()
    assert relative_l2(decode_in_strips(model, latents, rows), model.decode(latents)) < 1e-12
    assert relative_l2(encode_in_strips(model, pictures, rows), model.encode(pictures)) < 1e-12
    assert torch.equal(latents, kept[0]) and torch.equal(pictures, kept[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strips_follow_the_dtype(dtype: torch.dtype) -> None:
    model = tiny.autoencoder().to(dtype)
    latents = torch.randn(1, 16, 6, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = decode_in_strips(model, latents, 8)
    assert found.dtype == dtype and relative_l2(found, model.decode(latents)) < (
        1e-5 if dtype == torch.float32 else 0.02
    )


def test_memory_of_strips_at_published_size() -> None:
    """Predicted on the meta device, float32, weights not counted: two maps of a layer instead of six."""
    with torch.device("meta"):
        model = Autoencoder(AutoencoderConfig.preset("sdxl")).eval()
        plain, strips = {}, {}
        for size in (512, 1024, 2048, 4096):
            latents = torch.empty(1, 4, size // 8, size // 8)
            strips[size] = peak_bytes(lambda latents=latents: decode_in_strips(model, latents, 16))  # type: ignore[misc]
            if size <= 1024:
                plain[size] = peak_bytes(lambda latents=latents: model.decode(latents))  # type: ignore[misc]
    print({"plain": plain, "strips": strips})
    assert strips[1024] < 0.7 * plain[1024]
    # the largest layer turns 256 channels at full size into 128: (256 + 128 + 128) * 4 bytes a pixel, and strips of one layer
    for size in (1024, 2048, 4096):
        assert 512 * 4 * size**2 <= strips[size] <= 512 * 4 * size**2 + 16 * size * 256 * 4 * 12


@pytest.mark.slow
@pytest.mark.parametrize("size", [256, 512])
def test_the_published_size_decodes_the_same_in_strips(size: int) -> None:
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig.preset("sdxl")).eval()
    latents = torch.randn(1, 4, size // 8, size // 8)
    with torch.no_grad():
        assert relative_l2(decode_in_strips(model, latents), model.decode(latents)) < 1e-5


@pytest.mark.full
def test_a_megapixel_decodes_the_same_in_strips() -> None:
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig.preset("sdxl")).eval()
    latents = torch.randn(1, 4, 128, 128)
    with torch.no_grad():
        distance = relative_l2(decode_in_strips(model, latents), model.decode(latents))
    print(f"\n1024 pixels: relative L2 {distance:.1e}")
    assert distance < 1e-5
