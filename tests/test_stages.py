"""Several images together: each component on the device once, the same bits, and nothing lost when one fails."""

from pathlib import Path
from typing import Any

import pytest
import torch

import eridiff
import eridiff.inference.base
from eridiff.errors import ConfigError
from eridiff.inference import DiffusionInference
from eridiff.memory.stages import asked_once, on_device
from tests import tiny
from tests.loras import FAMILIES, arguments, some_lora
from tests.on_gpu import folder as folder
from tests.on_gpu import gpu as gpu
from tests.on_gpu import modules, photo
from tests.pretend_gpu import PretendedGPU


@pytest.mark.parametrize("offload", ["stages", "layers"])  # "stream": test_stream.py
def test_with_offload_an_image_is_the_same_and_everything_is_back_after_it(
    offload: str, folder: Path, gpu: PretendedGPU
) -> None:
    plain = eridiff.load(folder, progress=False, dtype=torch.float32)
    model = eridiff.load(folder, progress=False, offload=offload, dtype=torch.float32)
    lora = some_lora(plain.network)
    own = [id(p) for module in modules(model).values() for p in module.parameters()]
    asked: dict[str, Any] = {"seed": 1, "width": 64, "height": 64, "steps": 2, "image": photo(), "strength": 0.7}
    for attached in (False, True):
        if attached:
            plain.apply_lora(lora), model.apply_lora(lora)
        expected, found = (m.generate("a swan", **asked).images[0] for m in (plain, model))
        assert found.tobytes() == expected.tobytes()
    assert [id(p) for module in modules(model).values() for p in module.parameters()] == own
    assert all(p.device.type == "cpu" for module in modules(model).values() for p in module.parameters())


def test_offload_moves_each_component_once_for_all_prompts(
    folder: Path, gpu: PretendedGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each image is, bit for bit, the one that is generated alone."""
    model = eridiff.load(folder, progress=False, offload="stages", dtype=torch.float32)
    requests: list[dict[str, Any]] = [
        {"prompt": "a swan", "seed": 1},
        {"prompt": "a fox", "seed": 2, "image": photo(), "strength": 0.5},
        {"prompt": "a swan", "seed": 3, "sampler": "heun"},
    ]
    requests = [{"width": 64, "height": 64, "steps": 2, **request} for request in requests]
    alone = [model.generate(**request).images[0] for request in requests]
    stages: list[str] = []

    def spy(module: Any, device: Any, *how: Any) -> Any:
        name = next(name for name, component in modules(model).items() if component is module)
        crossing = next(module.parameters()).device.type != device.type
        stages.extend([name] * crossing)
        return on_device(module, device, *how)

    monkeypatch.setattr(eridiff.inference.base, "on_device", spy)
    together = [result.images[0] for result in model.generate_each(requests)]
    assert [a.tobytes() == b.tobytes() for a, b in zip(alone, together, strict=True)] == [True] * 3
    encoders = [name for name in modules(model) if name not in ("network", "autoencoder")]
    assert stages == [*encoders, "autoencoder", "network", "autoencoder"]
    assert all(p.device.type == "cpu" for module in modules(model).values() for p in module.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_a_run_asks_once_come_to_the_device_for_their_call_alone(family: str) -> None:
    """Modulation is computed before the steps; beside them its weights would only take memory."""
    network, meta = FAMILIES[family](), torch.device("meta")
    latents, given = arguments(network)
    own = [id(p) for p in network.parameters()]
    there: list[bool] = []

    def moved(value: Any) -> Any:
        return value.to(meta) if isinstance(value, torch.Tensor) else value

    with torch.no_grad(), on_device(network, meta):
        layers = asked_once(network)
        for layer in layers:
            layer.register_forward_pre_hook(lambda layer, _: there.append(layer.weight.is_meta))
        run = network.prepare(*map(moved, given))
        assert there == [True] * len(layers) and not any(layer.weight.is_meta for layer in layers)
        assert network.step(moved(latents), run, 0).is_meta and len(there) == len(layers)
        with pytest.raises(RuntimeError):
            layers[0](torch.zeros(1, 3, device=meta))
        assert not layers[0].weight.is_meta
    assert [id(p) for p in network.parameters()] == own


def test_with_offload_what_came_before_a_failure_is_finished(folder: Path) -> None:
    model = tiny.load(DiffusionInference, folder, offload="stages")

    def fail(step: Any) -> None:
        raise RuntimeError("in the second")

    given = {"width": 64, "height": 64, "steps": 2, "seed": 1}
    results = model.generate_each(
        [given | {"prompt": p, "callback": c} for p, c in (("a", None), ("b", fail), ("c", None))]
    )
    assert next(results).settings[0]["prompt"] == "a"
    with pytest.raises(RuntimeError, match="in the second"):
        next(results)
    with pytest.raises(
        ConfigError, match="at least one step"
    ):  # and settings that cannot be, before anything is computed
        next(model.generate_each([given | {"callback": fail}, given | {"steps": 0}]))


SMALL_IMAGE: dict[str, Any] = {"width": 64, "height": 64, "steps": 4}


@pytest.mark.parametrize("offload", [None, "stages"])
def test_an_interrupt_leaves_the_images_before_it(offload: str | None, tmp_path: Path) -> None:
    model = tiny.load(DiffusionInference, tiny.write_model(tmp_path), offload=offload)

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    finished = []
    asked = [{**SMALL_IMAGE, "prompt": p, "seed": 1, "callback": c} for p, c in (("a", None), ("b", None), ("c", stop))]
    with pytest.raises(KeyboardInterrupt):
        for result in model.generate_each(asked):
            finished.append(result.settings[0]["prompt"])
    assert finished == ["a", "b"]
