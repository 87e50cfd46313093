"""Base and refiner are one run: noise level, noise, memory of the sampler and the record go over with the latents."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import eridiff
import eridiff.images
from eridiff.cli import main
from eridiff.errors import ConfigError
from eridiff.lora.save import save_lora
from eridiff.schedulers.samplers import FLOW_ALONE, SAMPLERS
from tests import tiny
from tests.loras import some_lora


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    base = tiny.write_sdxl_model(home / "base")
    return {"base": base, "refiner": tiny.write_sdxl_model(home / "refiner", tiny.SDXL_REFINER, "refiner")}


@pytest.fixture(scope="module")
def both(folders: dict[str, Path]) -> tuple[Any, Any]:
    base, refiner = (eridiff.load(folders[n], device="cpu", progress=False) for n in ("base", "refiner"))
    return base.with_refiner(refiner), refiner  # type: ignore[attr-defined]


def run(model: Any, **asked: Any) -> tuple[torch.Tensor, list[int]]:
    """Latents, and the steps that ran."""
    steps: list[int] = []
    stop = asked.pop("stop", None)
    given = {"seed": 1, "width": 64, "height": 64, "steps": 10, "keep": ("latents",)} | asked
    result = model.generate("a fox", callback=lambda step: steps.append(step.index) or step.index == stop, **given)
    return result.latents, steps


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in FLOW_ALONE])
def test_a_network_that_takes_over_from_itself_gives_the_run_in_one(both: tuple[Any, Any], sampler: str) -> None:
    """Stochastic samplers go on with their noise, multi-step ones with what they remember."""
    alone = copy.copy(both[0])
    alone.refiner = None
    relay = copy.copy(alone)
    relay.refiner = alone
    whole, _ = run(alone, sampler=sampler, steps=6)
    parts, steps = run(relay, sampler=sampler, steps=6, hand_over=0.5)
    assert steps == list(range(6)) and torch.equal(parts, whole)


def test_the_refiner_takes_over_at_any_strength(both: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Where the base has nothing to do, the refiner begins where the image does, not where the base would end."""
    model, refiner = both
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    asked: list[int] = []
    hook = model.network.register_forward_pre_hook(lambda *_: asked.append(1))
    found, steps = run(model, image=picture, strength=0.1, hand_over=0.5)
    hook.remove()
    assert steps == [9] and not asked
    assert caplog.messages == ["a hand_over of 0.5 leaves the base none of the steps"]
    run(model, hand_over=0.999)
    assert caplog.messages[1:] == ["a hand_over of 0.999 leaves the refiner none of the steps"]
    expected, _ = run(refiner, image=picture, strength=0.1)
    assert torch.allclose(found, expected, atol=1e-4)  # its autoencoder has the same weights
    assert run(model, image=picture, strength=0.6, hand_over=0.5)[1] == [4, 5, 6, 7, 8, 9]


def test_a_callback_ends_the_whole_run(both: tuple[Any, Any]) -> None:
    assert run(both[0], stop=1)[1] == [0, 1] and run(both[0], stop=8)[1] == list(range(9))


def test_nothing_is_decoded_in_between(both: tuple[Any, Any]) -> None:
    model, refiner = both
    decoded: list[Any] = []
    hooks = [m.autoencoder.decoder.register_forward_hook(lambda m, *_: decoded.append(m)) for m in (model, refiner)]
    run(model)
    for hook in hooks:
        hook.remove()
    assert len(decoded) == 1


def test_conditioning_beside_a_refiner_is_refused(both: tuple[Any, Any]) -> None:
    model, _ = both
    with pytest.raises(ConfigError, match="the refiner reads prompts by its own encoder"):
        model.generate(conditioning=model.encode_prompt("a fox"), width=64, height=64, steps=1)


def test_the_record_is_the_runs_own_and_generates_it_again(
    folders: dict[str, Path], both: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = save_lora(some_lora(both[0].network), tmp_path / "style.safetensors", both[0].network)
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "in.png")
    line = f"--model {folders['base']} --refiner {folders['refiner']} --lora {lora}:0.9 --image {tmp_path / 'in.png'}"
    rest = f"--strength 0.6 --steps 10 --hand-over 0.7 --sampler euler_ancestral --prompt x --device cpu --out {tmp_path / 'a.png'}"
    assert main(["sample", *line.split(), *rest.split()]) == 0
    said = json.loads(Image.open(tmp_path / "a.png").info["eridiff"])
    assert (said["strength"], said["hand_over"], said["loras"][0]["scale"], said["part"]) == (0.6, 0.7, 0.9, [0.0, 1.0])
    assert set(said["dtypes"]) == {"unet", "vae", "clip", "clip_g"} and said["variant"] == "base"
    assert main(["resample", str(tmp_path / "a.png")]) == 0
    assert "the same image, bit for bit" in capsys.readouterr().err


@pytest.mark.parametrize("scale", [{"*": 0.5}, torch.tensor([0.5])])
def test_a_lora_weighed_by_patterns_or_rows_is_put_on_again(
    folders: dict[str, Path], tmp_path: Path, scale: Any
) -> None:
    from eridiff.inference.again import generate_again, load_again, read_settings

    model = eridiff.load(folders["base"], device="cpu", progress=False)
    lora = save_lora(some_lora(model.network), tmp_path / "style.safetensors", model.network)
    model.apply_lora(lora, scale)
    result = model.generate("a fox", width=64, height=64, steps=1, seed=1, cfg_scale=1.0)
    path = eridiff.images.save_png(result.images[0], tmp_path / "a.png", result.settings[0])
    settings = read_settings(path)
    again = generate_again(load_again(settings, progress=False), settings)
    assert again.images[0].tobytes() == result.images[0].tobytes()
