"""The key maps account for every published tensor, both ways, and lose no bit."""

import pytest
import torch

from eridiff.models.autoencoder import Autoencoder, AutoencoderConfig
from eridiff.models.flux import Flux, FluxConfig
from eridiff.weights.detect import Component
from eridiff.weights.header import Checkpoint
from eridiff.weights.keymap import KeyMap
from tests.manifest import read_manifest

CASES = [
    *(("flux", preset, "original", f"flux1-{preset}{'' if preset == 'schnell' else '-dev'}")
      for preset in ("schnell", "fill", "canny", "depth")),
    ("flux", "dev", "original", "flux1-dev"),
    *(("flux", preset, "diffusers", f"flux1-{preset}{'' if preset == 'schnell' else '-dev'}-diffusers-transformer")
      for preset in ("schnell", "fill", "canny", "depth")),
    ("flux", "dev", "diffusers", "flux1-dev-diffusers-transformer"),
    ("vae", "flux", "original", "ae"),
    ("vae", "flux", "diffusers", "flux1-diffusers-vae"),
]  # fmt: skip


def native_of(network: str, preset: str) -> tuple[dict[str, tuple[int, ...]], dict[str, object]]:
    config = FluxConfig.preset(preset) if network == "flux" else AutoencoderConfig.preset(preset)
    with torch.device("meta"):
        module = Flux(config) if isinstance(config, FluxConfig) else Autoencoder(config)
    layout = KeyMap(network).layouts["original"]
    sizes = Component(network, layout, "", Checkpoint("", {}, {}, {}), config).sizes  # type: ignore[arg-type]
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}, sizes


@pytest.mark.parametrize(("network", "preset", "layout", "manifest"), CASES)
def test_names_and_shapes_are_the_published_ones(network: str, preset: str, layout: str, manifest: str) -> None:
    native, sizes = native_of(network, preset)
    found = {
        name: shape
        for entry in KeyMap(network).layouts[layout].entries(native, sizes)
        for name, shape in zip(entry.foreign, entry.foreign_shapes(native[entry.native]), strict=True)
    }
    assert found == {name: shape for name, (_, shape) in read_manifest(manifest).items()}


@pytest.mark.parametrize("network", ["flux", "vae"])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_round_trip_keeps_every_bit(network: str, layout: str) -> None:
    if network == "flux":
        model = Flux(FluxConfig(64, 64, 8, 12, 32, 2, 4.0, 2, 2, (4, 6, 6)))
        sizes = {"hidden": 32, "mlp": 128}
    else:
        model = Autoencoder(AutoencoderConfig(32, (1, 2), 1, 4, quant_convolutions=True))
        sizes = {"levels": 2}
    state = model.state_dict()
    chosen = KeyMap(network).layouts[layout]
    foreign = chosen.to_foreign(state, sizes)
    for entry in chosen.entries(state, sizes):
        back = entry.read([foreign[name] for name in entry.foreign], tuple(state[entry.native].shape))
        assert torch.equal(back, state[entry.native]), entry.native
