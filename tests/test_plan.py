"""The plan's verification tests for Flux, by its names. (Those of LoRA: test_plan_lora.py.)"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from eridiff.inference import BUILT_IN, FluxInference
from eridiff.memory.plan import peak_bytes, stages
from eridiff.models.flux import patchify, unpatchify
from eridiff.trace.record import relative_l2
from eridiff.weights.locate import locate
from tests import tiny
from tests.sparse import sparse_manifest

GIB = 2**30
CAPTION = "a swan on mars"
MEASURED = Path(__file__).parents[1] / "benchmarks" / "results" / "gpu-nvidia-h200.json"


@pytest.fixture(scope="module")
def built_in() -> FluxInference:
    return tiny.load(FluxInference, None)


def test_model_loading(built_in: FluxInference) -> None:
    """Every tensor of every file is in a module, in the module's place, and none is left on the meta device."""
    parts = locate(BUILT_IN)
    assert set(parts.components) == {"flux", "vae", "clip", "t5"}
    assert tiny.every_tensor_is_in_its_place(parts, {"flux": built_in.network, "vae": built_in.autoencoder})
    assert built_in.clip and built_in.t5
    encoders: list[Any] = [built_in.clip.module, built_in.t5.module]
    assert not any(t.is_meta for m in encoders for t in [*m.parameters(), *m.buffers()])
    size = sum(path.stat().st_size for path in Path(BUILT_IN).rglob("*") if path.is_file())
    assert size <= 16_000_000


def test_text_encoding(built_in: FluxInference) -> None:
    """Features have the network's widths, words change them, and encoding twice gives the same bits."""
    first, second = built_in.encode_prompt(CAPTION).positive, built_in.encode_prompt(CAPTION).positive
    config = built_in.network.config
    assert first.text.shape == (1, 12, config.text_width) and first.pooled.shape == (1, config.pooled_width)
    assert torch.equal(first.text, second.text) and torch.equal(first.pooled, second.pooled)
    other = built_in.encode_prompt("a fox on mars").positive
    assert relative_l2(other.text, first.text) > 0.1 and relative_l2(other.pooled, first.pooled) > 0.1


def test_single_denoising_step(built_in: FluxInference) -> None:
    """One step is x + (t' - t) * velocity, with the velocity of a plain forward call."""
    prompt = built_in.encode_prompt(CAPTION)
    noise = built_in.noise([0], 64, 64)
    found = built_in.denoise(noise, prompt, 1)
    text, pooled = prompt.positive.text, prompt.positive.pooled
    scale = torch.tensor([built_in.sampling.guidance_scale])
    with torch.no_grad():
        velocity = built_in.network(patchify(noise), text, pooled, torch.tensor([[1.0]]), (4, 4), scale)
    assert relative_l2(found, noise - unpatchify(velocity, (4, 4))) < 1e-5


def test_full_generation_with_a_prompt(built_in: FluxInference) -> None:
    """The image shows what was asked for: on red ground for mars, on dark blue for night, the swan white."""
    mars, night = (built_in.generate(p, seed=3, keep=("latents",)) for p in (CAPTION, "a swan at night"))
    corners = [torch.tensor([image.getpixel((x, y)) for x in (2, 61) for y in (20, 40)]).float().mean(0)
               for image in (mars.images[0], night.images[0])]  # fmt: skip
    assert corners[0][0] > corners[0][2] + 60 and corners[1].max() < 110 and corners[1][2] > corners[1][0]
    body = torch.tensor([mars.images[0].getpixel((x, 43)) for x in range(24, 40)]).float()
    assert body.mean() > 190
    again = built_in.generate(CAPTION, seed=3)
    assert again.images[0].tobytes() == mars.images[0].tobytes()
    assert built_in.generate(CAPTION, seed=4).images[0].tobytes() != mars.images[0].tobytes()


def full_size(folder: Path) -> Any:
    names = {"transformer": "flux1-dev", "vae": "ae", "clip": "clip_l", "t5": "t5xxl"}
    return {part: sparse_manifest(folder / f"{manifest}.safetensors", manifest) for part, manifest in names.items()}


def test_memory_use(tmp_path: Path) -> None:
    """A 1024 x 1024 image of flux1-dev in bfloat16: each stage alone fits 24 GiB, all components together do not."""
    parts = locate(full_size(tmp_path))
    needed = {stage.name: stage.total for stage in stages(parts.components, 1024, 1024)}
    assert list(needed) == ["CLIP", "T5", "denoising", "decoding"]
    assert max(needed.values()) == needed["denoising"] < 24 * GIB
    weights = 11_901_408_320 * 2
    modulation = 6.5e9  # comes for a call alone
    assert weights - modulation < needed["denoising"] < 18.5e9
    assert 4_762_310_656 * 2 < needed["T5"] < 4_762_310_656 * 2 + 0.5 * GIB
    assert weights + 4_762_310_656 * 2 > 24 * GIB  # why offload="stages" is there
    assert needed["decoding"] < 3 * GIB


@pytest.mark.parametrize("offload", ["stages", "layers"])  # "stream" has not run on one yet
def test_memory_use_is_predicted_as_it_was_measured_on_a_gpu(offload: str, tmp_path: Path) -> None:
    """`benchmarks/gpu.py` has generated 1024 x 1024 pixels with a network of flux1-dev's size under a cap of 24 GiB."""
    parts = locate(full_size(tmp_path))
    predicted = max(stage.peak(offload) for stage in stages(parts.components, 1024, 1024, steps=4))
    (section,) = (s for s in json.loads(MEASURED.read_text())["sections"] if s["name"] == "offload")
    (measured,) = (row["peak_gb"] for row in section["rows"] if row["name"] == f"offload={offload!r}")
    assert math.isclose(predicted / 1e9, measured, rel_tol=0.1), (predicted / 1e9, measured)


def test_memory_use_is_predicted_as_it_is_measured(built_in: FluxInference) -> None:
    """The prediction runs on the meta device; on the CPU the same tensors live at once."""
    told: dict[str, Any] = {"steps": 8, "text_length": 12, "dtype": torch.float32}
    predicted = {
        stage.name: stage.weights + stage.work for stage in stages(locate(BUILT_IN).components, 64, 64, **told)
    }
    network, c = built_in.network, built_in.network.config
    weights = sum(p.nbytes for p in network.parameters())

    def denoise() -> object:
        told = torch.zeros(1, 12, c.text_width), torch.zeros(1, c.pooled_width), torch.zeros(8), (4, 4), torch.ones(1)
        run = network.prepare(*told)
        return network.step(torch.zeros(1, 16, c.in_channels), run, 0)

    measured = {"denoising": weights + peak_bytes(denoise)}
    autoencoder = built_in.autoencoder
    measured["decoding"] = sum(p.nbytes for p in autoencoder.parameters()) + peak_bytes(
        lambda: autoencoder.decode(torch.zeros(1, 16, 8, 8))
    )
    for stage, value in measured.items():
        assert math.isclose(predicted[stage], value, rel_tol=0.02), stage
