"""Float8 layers compute what is computed by hand, keep LoRAs exact, and are refused where they cannot work."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eridiff
from eridiff import float8
from eridiff.errors import ConfigError, LoraError
from eridiff.float8 import Float8Linear, use_float8
from eridiff.images import save_png
from eridiff.inference.again import generate_again, load_again, read_settings
from eridiff.lora import attach_lora, merge_into
from eridiff.lora.inplace import changes_of
from tests import families, tiny
from tests.loras import some_lora

NETWORKS = {"flux": tiny.flux, "mmdit": tiny.mmdit, "unet": tiny.unet}


@pytest.fixture(autouse=True)
def anywhere(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The CPU multiplies float8 too, slowly: its numbers are what is tested here."""
    if "device" not in request.node.name:
        monkeypatch.setattr(float8, "check_device", lambda device: None)


def nearest(x: Tensor) -> Tensor:
    """float8_e4m3fn by hand: three binary digits behind the first, exponents from -6, in float64."""
    x = x.double()
    step = 2.0 ** (torch.log2(x.abs().clamp_min(2.0**-6)).floor() - 3)
    return (x / step).round() * step


def by_hand(layer: nn.Linear, x: Tensor) -> Tensor:
    """Rows of weight and input are scaled to the range of float8 and rounded; the product is float64."""
    parts = []
    for matrix in (x, layer.weight):
        scale = (matrix.abs().amax(dim=1, keepdim=True) / 448.0).double()  # the division rounds to bfloat16
        parts.append(nearest((matrix / scale.to(matrix.dtype)).double()) * scale)
    return parts[0] @ parts[1].T + layer.bias.double()


@torch.no_grad()
def test_a_layer_is_the_product_that_is_computed_by_hand() -> None:
    network = tiny.flux().to(torch.bfloat16)
    layer: Any = network.double_blocks[0].image.qkv
    x = families.rows(20, layer.in_features, dtype=torch.bfloat16) * torch.logspace(-6, 3, 20)[:, None].bfloat16()
    expected, plain, weight = by_hand(layer, x), layer(x), layer.weight.clone()
    use_float8(network)
    assert type(layer) is Float8Linear and layer.weight8.dtype == torch.float8_e4m3fn
    assert bool(((layer.weight - weight).abs() <= weight.abs() / 16 + weight.abs().amax() * 2.0**-16).all())
    found = layer(x)
    assert found.dtype == torch.bfloat16 and layer(x.reshape(4, 5, -1)).shape == (4, 5, layer.out_features)
    assert bool(((found.double() - expected).abs() <= expected.abs() * 2.0**-8 + 1e-6).all())
    assert 1e-3 < float((found - plain).double().norm() / plain.double().norm()) < 0.06
    assert torch.equal(layer(torch.zeros_like(x)), layer.bias.expand(20, -1))


@pytest.mark.parametrize("family", NETWORKS)
def test_the_logged_error_is_that_of_the_networks_output(family: str, caplog: pytest.LogCaptureFixture) -> None:
    network, twin = (NETWORKS[family]().to(torch.bfloat16) for _ in range(2))
    with caplog.at_level(logging.WARNING, "eridiff"):
        error = use_float8(network)
    found, expected = (float8._output(n) for n in (network, twin))
    assert error == pytest.approx(float((found - expected).norm() / expected.norm()), rel=1e-6)
    assert 1e-3 < error < 0.5
    count = sum(type(m) is Float8Linear for m in network.modules())
    changed = {n for n, m in network.named_modules() if type(m) is Float8Linear}
    assert count > 5 and not any(name.endswith("modulation") for name in changed)
    assert {name.split(".")[0] for name in changed} <= {
        "double_blocks",
        "single_blocks",
        "joint_blocks",
        "down",
        "middle",
        "up",
    }
    assert caplog.messages == [
        f"float8, lossy: {count} linear layers; for random inputs the output is off by {100 * error:.1f} %"
    ]


@torch.no_grad()
def test_a_lora_beside_a_layer_is_exact_and_cannot_be_merged() -> None:
    network = tiny.flux().to(torch.bfloat16)
    use_float8(network)
    layer: Any = network.double_blocks[0].image.qkv
    x = families.rows(1, 8, layer.in_features, dtype=torch.bfloat16)
    before, weights = layer(x), layer.weight
    lora = attach_lora(network, some_lora(network))
    (branch,) = layer.lora_branches
    change = branch(layer, x, torch.zeros_like(before), torch.zeros_like(before))
    assert float(change.abs().max()) > 0 and torch.equal(layer(x), before + change)
    lora.detach()
    assert torch.equal(layer(x), before)
    with pytest.raises(LoraError, match="is not a parameter"):
        merge_into(network, some_lora(network))
    assert torch.equal(layer.weight, weights) and not list(changes_of(network))


def test_an_image_says_float8_and_is_generated_again(tmp_path: Path) -> None:
    model = eridiff.load(tiny.write_model(tmp_path), device="cpu", dtype=torch.bfloat16, progress=False)
    asked = {"steps": 2, "seed": 1, "width": 32, "height": 32}
    plain = model.generate("a swan", **asked)
    assert plain.settings[0]["float8"] is None
    use_float8(model.network)
    result = model.generate("a swan", **asked)
    path = save_png(result.images[0], tmp_path / "a.png", result.settings[0])
    settings = read_settings(path)
    again = generate_again(load_again(settings, progress=False), settings)
    assert again.images[0].tobytes() == result.images[0].tobytes() != plain.images[0].tobytes()


def test_what_float8_cannot_do_is_refused_in_a_sentence(tmp_path: Path) -> None:
    network = tiny.flux()
    with pytest.raises(ConfigError, match="linear layers of bfloat16, not of float32"):
        use_float8(network)
    network.to(torch.bfloat16).requires_grad_(True)
    with pytest.raises(ConfigError, match="float8 has no gradients"):
        use_float8(network)
    with pytest.raises(ConfigError, match="not for a Autoencoder"):
        use_float8(tiny.autoencoder())
    use_float8(network.requires_grad_(False))
    with pytest.raises(ConfigError, match="in float8 already"):
        use_float8(network)
    with pytest.raises(ConfigError, match="is not saved"):
        eridiff.save_network(network, tmp_path / "flux.safetensors")
    layer: Any = network.double_blocks[0].image.qkv
    with pytest.raises(ConfigError, match="have no gradients"):
        layer(torch.ones(1, layer.in_features, dtype=torch.bfloat16, requires_grad=True))


def test_a_device_without_float8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"capability 8.9 or later, and the network is on cpu"):
        use_float8(tiny.flux().to(torch.bfloat16))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ConfigError, match=r"capability 8.9 or later, and cuda:0 has 8.6"):
        float8.check_device(torch.device("cuda:0"))
