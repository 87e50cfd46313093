"""The plan's verification tests for Stable Diffusion 3, by its names. (Those of LoRA: test_plan_lora.py.)"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from eridiff.inference import SD35Inference
from eridiff.memory.plan import stages
from eridiff.trace.record import relative_l2
from eridiff.weights.locate import locate
from tests import tiny
from tests.sparse import sparse_manifest

GIB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_sd3_model(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def model(folder: Path) -> SD35Inference:
    return tiny.load(SD35Inference, folder)


def test_model_loading(model: SD35Inference, folder: Path) -> None:
    """Every tensor of the network's file is in a module, in the module's place, the table of positions too."""
    parts = locate(folder)
    assert set(parts.components) == {"mmdit", "vae", "clip", "clip_g", "t5"}
    assert tiny.every_tensor_is_in_its_place(parts, {"mmdit": model.network, "vae": model.autoencoder})
    assert model.clip and model.clip_g and model.t5
    encoders: list[Any] = [model.clip.module, model.clip_g.module, model.t5.module]
    assert not any(t.is_meta for m in encoders for t in [*m.parameters(), *m.buffers()])


def test_text_encoding(model: SD35Inference) -> None:
    """Features have the network's widths, words change them, and encoding twice gives the same bits."""
    first, second = model.encode_prompt("a swan").positive, model.encode_prompt("a swan").positive
    config = model.network.config
    assert first.text.shape == (1, 154, config.text_width) and first.pooled.shape == (1, config.pooled_width)
    assert torch.equal(first.text, second.text) and torch.equal(first.pooled, second.pooled)
    other = model.encode_prompt("a fox").positive
    assert relative_l2(other.text, first.text) > 0.01 and relative_l2(other.pooled, first.pooled) > 0.01


def test_single_denoising_step(model: SD35Inference) -> None:
    """One step is noise - velocity, with the guided velocity of two plain forward calls."""
    prompt = model.encode_prompt("a swan", "a fox")
    noise = model.noise([0], 32, 48)
    found = model.denoise(noise, prompt, 1)
    assert prompt.negative
    with torch.no_grad():
        positive, negative = (
            model.network(noise, c.text, c.pooled, torch.tensor([[1.0]])) for c in (prompt.positive, prompt.negative)
        )
    assert relative_l2(found, noise - (negative + 5.0 * (positive - negative))) < 1e-5


def test_full_generation_with_a_prompt(model: SD35Inference) -> None:
    """The same prompt and seed give the same bits; another prompt, seed or scale another image."""
    options = {"width": 48, "height": 32, "steps": 3, "seed": 3}
    picture = model.generate("a swan", **options).images[0]
    assert picture.size == (48, 32) and model.generate("a swan", **options).images[0].tobytes() == picture.tobytes()
    for prompt, change in (("a fox", {}), ("a swan", {"seed": 4}), ("a swan", {"cfg_scale": 2.0})):
        assert model.generate(prompt, **options | change).images[0].tobytes() != picture.tobytes()


@pytest.mark.parametrize(
    ("variant", "billions"), [("sd3-medium", 2.028), ("sd3.5-medium", 2.243), ("sd3.5-large", 8.057)]
)
def test_memory_use(variant: str, billions: float, tmp_path: Path) -> None:
    """1024 x 1024 in bfloat16 with both prompts in one batch: each stage alone fits 24 GiB; the table is not among it."""
    manifests = {"transformer": variant, "vae": variant, "clip": "clip_l", "clip_g": "clip_g-hf", "t5": "t5xxl"}
    paths = {m: sparse_manifest(tmp_path / f"{m}.safetensors", m) for m in manifests.values()}
    parts = locate({part: paths[manifest] for part, manifest in manifests.items()})
    found = stages(parts.components, 1024, 1024, guided=True, text_length=256)
    needed = {stage.name: stage.total for stage in found}
    assert list(needed) == ["CLIP", "CLIP-G", "T5", "denoising", "decoding"]
    weights = billions * 2e9
    (network,) = [stage for stage in found if stage.name == "denoising"]
    assert weights * 0.999 < network.weights < weights * 1.2 and 0.25 * weights < network.visiting < 0.4 * weights
    assert needed["denoising"] < network.weights - network.visiting + 1.5 * GIB and max(needed.values()) < 24 * GIB
    assert math.isclose(needed["T5"], 4_762_310_656 * 2, rel_tol=0.1)
