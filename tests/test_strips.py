"""The autoencoder in strips equals the plain one, and needs less memory."""

from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eridiff.memory import strips
from eridiff.memory.plan import peak_bytes, stages
from eridiff.memory.strips import decode_in_strips, encode_in_strips
from eridiff.models.autoencoder import Autoencoder, AutoencoderConfig, ResidualBlock
from eridiff.trace.record import relative_l2
from eridiff.weights.locate import locate
from tests import tiny


@settings(max_examples=25, deadline=None)
@example(16, 1, 1, 1, True)  # groups of a single number
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5), st.integers(1, 2), st.booleans())
def test_strips_of_any_height_give_the_plain_result(rows: int, h: int, w: int, batch: int, quant: bool) -> None:
    """In float64 to rounding: halos, paddings and statistics are exact whatever the strips."""
    model = tiny.autoencoder(AutoencoderConfig(32, (1, 2, 2), 1, 4, 0.5, 0.1, quant)).double()
    g = torch.Generator().manual_seed(rows)
    latents, pictures = (torch.randn(s, generator=g).double() for s in ((batch, 4, h, w), (batch, 3, 4 * h, 4 * w)))
    kept = latents.clone(), pictures.clone()
    assert relative_l2(decode_in_strips(model, latents, rows), model.decode(latents)) < 1e-11
    assert relative_l2(encode_in_strips(model, pictures, rows), model.encode(pictures)) < 1e-11
    assert torch.equal(latents, kept[0]) and torch.equal(pictures, kept[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strips_follow_the_dtype(dtype: torch.dtype) -> None:
    model = tiny.autoencoder().to(dtype)
    latents = torch.randn(1, 16, 6, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = decode_in_strips(model, latents, 8)
    assert found.dtype == dtype and relative_l2(found, model.decode(latents)) < (
        1e-5 if dtype == torch.float32 else 0.02
    )


def test_a_map_that_hardly_varies_keeps_its_variance() -> None:
    """float32, deviation 0.01 around 100: the difference of two sums of squares would be off by more than the variance."""
    norm = torch.nn.GroupNorm(32, 32, eps=1e-6).requires_grad_(False)
    x = 100 + 0.01 * torch.randn(1, 32, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.silu(norm.double()(x.double()))
    assert relative_l2(strips._normed(x, norm.float(), 8)(x), expected) < 5e-3


def test_queries_in_chunks_see_all_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "QUERIES", 7)
    model = tiny.autoencoder().double()
    latents = torch.randn(2, 16, 4, 5, generator=torch.Generator().manual_seed(1)).double()
    assert relative_l2(decode_in_strips(model, latents, 8), model.decode(latents)) < 1e-12


def test_a_narrower_result_is_written_over_its_input() -> None:
    """The norm's statistics and the shortcut read the input before its rows are written."""
    block = tiny.scaled(ResidualBlock(64, 32)).double()
    x = torch.randn(2, 64, 9, 5, generator=torch.Generator().manual_seed(1)).double()
    expected, storage = block(x), x.untyped_storage().data_ptr()
    found = strips._residual(block, x, 2)
    assert relative_l2(found, expected) < 1e-12 and found.untyped_storage().data_ptr() == storage


def test_memory_at_published_size() -> None:
    """On a CPU, float32, bytes of a pixel; weights not counted.

    Plain, a block turns 256 channels into 128, with the normed 256, a copy of them for the convolution, and the level's input of a
    quarter of the pixels; in strips the block's input and its result.
    """
    with torch.device("meta"):
        model = Autoencoder(AutoencoderConfig.preset("sdxl")).eval()
        for size in (512, 1024, 2048):
            latents = torch.empty(1, 4, size // 8, size // 8)
            needed = peak_bytes(lambda latents=latents: decode_in_strips(model, latents, 16), cpu=True)  # type: ignore[misc]
            strips = 16 * size * 256 * 4 * 12
            assert 384 * 4 * size**2 <= needed <= 384 * 4 * size**2 + strips, size
            if size <= 1024:
                plain = peak_bytes(lambda latents=latents: model.decode(latents), cpu=True)  # type: ignore[misc]
                assert 960 * 4 * size**2 <= plain <= 1.01 * 960 * 4 * size**2, size


def test_the_plan_knows_of_strips(tmp_path: Path) -> None:
    components = locate(tiny.write_sdxl_model(tmp_path)).components
    plain, needed = (stages({"vae": components["vae"]}, 512, 512, vae_rows=rows)[0].total for rows in (None, 32))
    assert needed < 0.6 * plain


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
