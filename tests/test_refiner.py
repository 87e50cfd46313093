"""Base and refiner are one run: noise level, noise, memory of the sampler and the record go over with the latents."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import eridiff
import eridiff.images
from eridiff.cli import main
from eridiff.errors import ConfigError
from eridiff.inference import SDXLInference
from eridiff.inference.again import load_again, read_settings
from eridiff.inference.placing import Plan, plan_parts
from eridiff.inference.sdxl import refiner_parts
from eridiff.lora.save import save_lora
from eridiff.memory.stages import asked_once
from eridiff.schedulers.samplers import FLOW_ALONE, SAMPLERS
from eridiff.weights.locate import locate
from tests import tiny
from tests.loras import some_lora
from tests.pretend_gpu import OnGPU, pretend_gpu


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


def test_one_that_is_loaded_with_its_base_gives_the_same_images(
    folders: dict[str, Path], both: tuple[Any, Any]
) -> None:
    model: Any = eridiff.load(folders["base"], refiner=folders["refiner"], device="cpu", vae_rows=8, progress=False)
    assert torch.equal(run(model, steps=4)[0], run(both[0], steps=4)[0])
    assert model.refiner.autoencoder is model.autoencoder and model.refiner.vae_rows == 8
    assert model.circumstances()["refiner"] == both[0].circumstances()["refiner"]
    assert model.load_model(folders["base"]).refiner is None


@pytest.mark.parametrize(
    ("base", "refiner", "says"),
    [
        ("base", "base", "a base and a refiner work together, not base and base"),
        ("refiner", "refiner", "work together, not refiner and refiner"),
        ("tiny-flux", "refiner", "a refiner works with an SDXL base alone"),
        ("base", None, "one that is loaded goes to with_refiner"),
    ],
)  # fmt: skip
def test_all_but_a_base_and_a_refiner_are_refused(
    folders: dict[str, Path], both: tuple[Any, Any], base: str, refiner: str | None, says: str
) -> None:
    given: Any = both[1] if refiner is None else folders[refiner]
    with pytest.raises(ConfigError, match=says):
        eridiff.load(folders.get(base, base), refiner=given, device="cpu", progress=False)


# where it lies, on a pretended GPU -----------------------------------------------------------------------------------------


def on_gpu(model: Any) -> int:
    """Linear layers of the network and the text encoders that lie there."""
    layers = [layer for module in model.model.modules().values() for layer in linears(module)]
    return sum(isinstance(layer.weight, OnGPU) for layer in layers)


def linears(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


def most_on_gpu(model: Any) -> int:
    """Of the refiner, before each of its layers while an image is generated."""
    found: list[int] = []
    layers = [m for m in model.refiner.network.modules() if not [*m.children()]]
    hooks = [layer.register_forward_pre_hook(lambda *_: found.append(on_gpu(model.refiner))) for layer in layers]
    run(model, steps=2, hand_over=0.5)
    for hook in hooks:
        hook.remove()
    return max(found)


def plans(folders: dict[str, Path]) -> tuple[Plan, Plan]:
    """Of the base alone, and of both."""
    parts = locate(folders["base"])
    return plan_parts(SDXLInference, parts), plan_parts(SDXLInference, parts, refiner=refiner_parts(parts, folders["refiner"]))  # fmt: skip


@pytest.mark.parametrize("beside", ["loaded together", "loaded to the host"])
@pytest.mark.parametrize("offload", ["stages", "layers"])
def test_a_refiner_comes_to_the_device_as_its_base_does(folders: dict[str, Path], offload: str, beside: str) -> None:
    with pretend_gpu():
        if beside == "loaded together":
            model: Any = eridiff.load(folders["base"], refiner=folders["refiner"], offload=offload, progress=False)
        else:
            model = eridiff.load(folders["base"], offload=offload, progress=False)
            model = model.with_refiner(eridiff.load(folders["refiner"], device="cpu", progress=False))  # type: ignore[arg-type]
        staying = len(linears(model.refiner.network)) - len(asked_once(model.refiner.network))
        assert most_on_gpu(model) == (staying if offload == "stages" else 0) and staying > 20
        assert on_gpu(model) == on_gpu(model.refiner) == 0


def test_memory_that_holds_the_base_alone_has_both_come_in_stages(folders: dict[str, Path]) -> None:
    """By Python, the command line, a file and a PNG; with room for both they stay."""
    base, together = (plan.placements[0].needed for plan in plans(folders))
    with pretend_gpu():
        model: Any = eridiff.load(folders["base"], vram=(base + together) // 2, progress=False)
        assert model.offload is None
        model = eridiff.load(folders["base"], refiner=folders["refiner"], vram=(base + together) // 2, progress=False)
        assert (model.offload, model.refiner.offload, on_gpu(model.refiner)) == ("stages", "stages", 0)
        most_on_gpu(model)
        assert on_gpu(model) == on_gpu(model.refiner) == 0
        model = eridiff.load(folders["base"], refiner=folders["refiner"], vram=together + 2**20, progress=False)
        assert (model.offload, model.refiner.offload) == (None, None)
        assert on_gpu(model.refiner) == sum(len(linears(m)) for m in model.refiner.model.modules().values())


@pytest.mark.parametrize("door", ["flags", "file"])
def test_the_command_and_resample_plan_both(
    folders: dict[str, Path], door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, together = (plan.placements[0].needed for plan in plans(folders))
    vram, loaded = (base + together) // 2, list[Any]()
    monkeypatch.setattr("eridiff.cli.sample.load", lambda *a, **o: loaded.append(eridiff.load(*a, **o)) or loaded[-1])
    given = {"model": str(folders["base"]), "refiner": str(folders["refiner"]), "vram": str(vram)}
    (tmp_path / "run.yaml").write_text(json.dumps({**given, "sample": {"prompts": ["a fox"]}}))
    flags = [text for name, value in given.items() for text in (f"--{name}", value)] + ["--prompt", "a fox"]
    out = tmp_path / "a.png"
    with pretend_gpu():
        assert main(["sample", *(flags if door == "flags" else [str(tmp_path / "run.yaml")]), "--out", str(out)]) == 0
        loaded.append(load_again(read_settings(out), vram=vram, progress=False))
    for model in loaded:
        assert (model.offload, model.refiner.offload, on_gpu(model.refiner)) == ("stages", "stages", 0)


def test_a_refiner_that_vram_does_not_count_is_warned_of(
    folders: dict[str, Path], both: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = eridiff.load(folders["base"], vram="2GiB", device="cpu", progress=False)
    refined = model.with_refiner(both[1])
    assert caplog.messages == [
        "a refiner that was loaded by itself is not counted by vram; eridiff.load(..., refiner=...) counts both"
    ]
    refined._placed(model._room.placement)  # its base's placement is not its own
    model = eridiff.load(folders["base"], refiner=folders["refiner"], vram="2GiB", device="cpu", progress=False)
    model.with_refiner(model.refiner), both[0].with_refiner(both[1])
    assert len(caplog.messages) == 1
