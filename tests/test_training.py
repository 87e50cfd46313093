"""Sampling inside a training loop: when, from which weights, with which result; and the run does not notice."""

import gc
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import eridiff
from eridiff import load_encoder, load_network, save_network
from eridiff.cli import main
from eridiff.cli.convert import convert
from eridiff.config import RunConfig, parse_config
from eridiff.errors import ConfigError, EridiffError, LoraError, TrainingError
from eridiff.inference import FluxInference, SD35Inference, SDXLInference
from eridiff.inference.again import generate_again, load_again, read_settings
from eridiff.training import Sampler, Samples, undisturbed
from tests import tiny

FAMILIES: dict[str, tuple[type, Callable[[Path], Path]]] = {
    "flux": (FluxInference, tiny.write_model),
    "mmdit": (SD35Inference, tiny.write_sd3_model),
    "unet": (SDXLInference, tiny.write_sdxl_model),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write(tmp_path_factory.mktemp(name)) for name, (_, write) in FAMILIES.items()}


@pytest.fixture
def model(folders: dict[str, Path]) -> Any:
    return tiny.load(FluxInference, folders["flux"])


def section(out: Path, **given_settings: Any) -> dict[str, Any]:
    return {"prompts": ["a swan on mars"], "sample_steps": 1, "seed": 5, "out": str(out)} | given_settings


# the run does not notice ----------------------------------------------------------------------------------------------


def whole_network(network: nn.Module) -> list[nn.Parameter]:
    return list(network.requires_grad_(True).parameters())


def a_lora(network: nn.Module) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return list(eridiff.inject_lora(network, 4, dropout=0.2, generator=generator).parameters())


TRAINED: dict[str, Callable[[nn.Module], list[nn.Parameter]]] = {"network": whole_network, "lora": a_lora}


def losses(model: Any, parameters: list[nn.Parameter], steps: int, maybe_sample: Callable[..., object]) -> list[float]:
    """A training whose losses follow from every number of torch's generator and from dropout."""
    torch.manual_seed(0)
    network, dropout = model.network.train(), nn.Dropout(0.2)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    found = []
    for step in range(steps):
        clean, noise, time = torch.randn(1, 4, 64), torch.randn(1, 4, 64), torch.rand(1, 1)
        x = time * noise + (1 - time) * clean
        text, pooled = dropout(torch.ones(1, 5, 12)), torch.randn(1, 8)
        loss = ((network(x, text, pooled, time, (2, 2), torch.tensor([3.5])) - (noise - clean)) ** 2).mean()
        loss.backward()
        optimizer.step()
        maybe_sample(step, optimizer)
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(
    ("trained", "count"), [("lora", 40), ("network", 20), pytest.param("lora", 200, marks=pytest.mark.slow)]
)
def test_sampling_events_leave_the_loss_curve_as_it_is(
    folders: dict[str, Path], tmp_path: Path, trained: str, count: int
) -> None:
    curves, events, pictures = [], [], set()
    for sampling in (False, True):
        model = tiny.load(FluxInference, folders["flux"])
        parameters = TRAINED[trained](model.network)
        sampler = Sampler(model, section(tmp_path, sample_every=1), verify=True, raise_errors=True)
        sampler.callbacks.append(lambda _: torch.rand(3))  # a logger that generates
        model.clip = model.t5 = None  # no longer needed

        def maybe_sample(step: int, optimizer: Any, sampler: Sampler = sampler, sampling: bool = sampling) -> None:
            sampler.optimizer = optimizer
            if sampling and (samples := sampler.maybe_sample(step)):
                events.append(step)
                pictures.add(samples.images[0].tobytes())

        curves.append(losses(model, parameters, count, maybe_sample))
    assert curves[0] == curves[1] and curves[0][-1] != curves[0][0]
    assert len(events) == count and len(pictures) > count // 2


def test_under_autocast_too(model: Any, tmp_path: Path) -> None:
    pictures = []
    for in_training in (False, True):
        options: dict[str, Any] = {"autocast": torch.bfloat16, "text_in_training": in_training, "raise_errors": True}
        samples = Sampler(model, section(tmp_path, sample_steps=2), **options).sample(1)
        again = generate_again(model, read_settings(samples.paths[0]))
        assert again.images[0].tobytes() == samples.images[0].tobytes()
        pictures.append(samples.images[0].tobytes())
    plain = Sampler(model, section(tmp_path, sample_steps=2)).sample(1).images[0].tobytes()
    assert pictures[0] == pictures[1] != plain


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_generated_in_training_is_that_of_inference_from_the_checkpoint_saved_then(
    folders: dict[str, Path], family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.load(FAMILIES[family][0], folders[family])
    told = {"original_size": "96x80", "crop": [4, 8]} if family == "unet" else {}
    settings = section(tmp_path, sample_steps=2, width=64, height=32, **told)
    sampler = Sampler(model, settings, verify=True, raise_errors=True)
    optimizer = torch.optim.AdamW(model.network.requires_grad_(True).train().parameters(), lr=1e-2)
    first = sampler.sample(0)
    for p in model.network.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    second = sampler.sample(1)
    assert first.images[0].tobytes() != second.images[0].tobytes()
    checkpoint = eridiff.save_network(model.network, tmp_path / "step-1.safetensors")

    loaded = load_again(read_settings(second.paths[0]), {"transformer": checkpoint}, progress=False)
    asked = {name: value for name, value in vars(sampler.requests[0]).items() if name in ("original_size", "crop")}
    plain = loaded.generate("a swan on mars", seed=5, steps=2, width=64, height=32, **asked)
    assert plain.images[0].tobytes() == second.images[0].tobytes()
    assert generate_again(loaded, read_settings(second.paths[0])).images[0].tobytes() == plain.images[0].tobytes()

    command = ["resample", str(second.paths[0]), "--transformer", str(checkpoint), "--out", str(tmp_path / "again.png")]
    assert main(command) == 0 and "the same image, bit for bit" in capsys.readouterr().err
    assert main(["resample", str(second.paths[0])]) == 2
    assert "generated in training, at step 1: give the checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_generated_in_training_is_that_of_inference_with_the_lora_saved_then(
    folders: dict[str, Path], family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.load(FAMILIES[family][0], folders[family])
    lora = eridiff.inject_lora(model.network, 2, 4, dropout=0.5)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=1e-2)
    sampler = Sampler(model, section(tmp_path, sample_steps=2, width=64, height=32), verify=True, raise_errors=True)
    first = sampler.sample(0)
    for _ in range(2):
        for p in lora.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    second = sampler.sample(1)
    assert first.images[0].tobytes() != second.images[0].tobytes() and all(b.training for b in lora.all_branches())
    files = [eridiff.save_lora(lora, tmp_path / f"{f}.safetensors", format=f) for f in ("kohya", "native")]

    for file in files:
        fresh = tiny.load(FAMILIES[family][0], folders[family])
        fresh.apply_lora(file)
        plain = fresh.generate("a swan on mars", seed=5, steps=2, width=64, height=32)
        assert plain.images[0].tobytes() == second.images[0].tobytes()
        assert main(["resample", str(second.paths[0]), "--lora", str(file), "--out", str(tmp_path / "again.png")]) == 0
        assert "the same image, bit for bit" in capsys.readouterr().err
    assert main(["resample", str(tmp_path / "again.png")]) == 0  # it says its LoRA itself
    assert "the same image, bit for bit" in capsys.readouterr().err
    assert main(["resample", str(second.paths[0])]) == 2 and "or its LoRA as lora" in capsys.readouterr().err


# when -----------------------------------------------------------------------------------------------------------------


def drawn(sampler: Sampler, steps: range) -> list[int]:
    return [step for step in steps if sampler.maybe_sample(step)]


def test_images_are_generated_at_the_steps_that_the_section_says(model: Any, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], list[int]]] = [
        ({"sample_every": 3}, [0, 3, 6, 9]),
        ({"sample_every": 3, "sample_start_step": 4}, [6, 9]),
        ({"sample_every": 3, "skip_first_sample": True}, [3, 6, 9]),
        ({"sample_every": 0}, []),
    ]
    for given_settings, expected in cases:
        sampler = Sampler(model, section(tmp_path, **given_settings))
        assert drawn(sampler, range(10)) == expected
    assert (samples := sampler.finish(9)) and samples.step == 9 and sampler.finish(9) is None
    assert Sampler(model, section(tmp_path, sample_at_end=False)).finish(9) is None


@given(st.integers(0, 20), st.integers(0, 50), st.booleans(), st.integers(0, 100))
def test_a_resumed_run_generates_at_the_same_steps(every: int, start: int, skip: bool, resumed: int) -> None:
    sampler = Sampler.__new__(Sampler)
    sampler.every, sampler.first = every, Sampler.first_step(every, start, skip)
    plan = [step for step in range(120) if sampler.due(step)]
    assert all(step % every == 0 and step >= start for step in plan)
    rest = [step for step in range(resumed, 120) if sampler.due(step)]
    assert rest == [step for step in plan if step >= resumed]
    assert bool(plan) == (every > 0)


def test_a_step_is_sampled_once(model: Any, tmp_path: Path) -> None:
    sampler = Sampler(model, section(tmp_path))
    assert [bool(sampler.maybe_sample(step)) for step in (0, 0, 100, 100, 0)] == [True, False, True, False, True]


def test_touching_a_file_generates_once(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(model, section(tmp_path, sample_every=0))
    assert sampler.maybe_sample(7) is None
    (tmp_path / "now").touch()
    assert sampler.maybe_sample(8) is None  # looked for a moment ago
    clock = eridiff.training.sampler.time.monotonic()
    monkeypatch.setattr(eridiff.training.sampler.time, "monotonic", lambda: clock + 2)
    assert sampler.maybe_sample(9) is not None and sampler.maybe_sample(10) is None
    assert not (tmp_path / "now").exists()


# what goes wrong ------------------------------------------------------------------------------------------------------


def test_an_error_is_logged_and_training_goes_on(model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: Samples) -> None:
        raise RuntimeError("the disk of the logger is full")

    sampler = Sampler(model, section(tmp_path), callbacks=[fail])
    samples = sampler.sample(3)
    assert samples.failure == "RuntimeError: the disk of the logger is full" and len(samples.paths) == 1
    assert "sampling at step 3 failed, training goes on" in caplog.text
    with pytest.raises(RuntimeError, match="full"):
        Sampler(model, section(tmp_path), callbacks=[fail], raise_errors=True).sample(3)


def test_weights_that_give_no_finite_values_do_not_end_training(model: Any, tmp_path: Path) -> None:
    sampler = Sampler(model, section(tmp_path))
    model.network.image_in.weight.fill_(float("nan"))
    samples = sampler.sample(3)
    assert samples.failure and "not finite" in samples.failure and not samples.paths
    assert [path.name for path in tmp_path.iterdir()] == []


def test_sampling_that_takes_too_long_stops_between_two_steps(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = section(tmp_path, prompts=["a swan", "a fox"], sample_steps=4, sample_max_seconds=6.5)
    sampler = Sampler(model, settings)
    ticks = iter(range(100))
    monkeypatch.setattr(eridiff.training.sampler.time, "monotonic", lambda: float(next(ticks)))
    samples = sampler.sample(0)
    assert samples.failure == "sample_max_seconds 6.5 had passed" and len(samples.paths) == 1
    assert "stopped: sample_max_seconds" in caplog.text
    sampler.raise_errors = True
    with pytest.raises(TrainingError, match="at step 1 stopped: sample_max_seconds 6.5"):
        sampler.sample(1)


def test_impossible_settings_are_refused_before_training(model: Any, tmp_path: Path) -> None:
    for wrong, says in (
        ({"prompts": []}, "empty"), ({"sample_every": -1}, "negative"), ({"sample_evry": 1}, "did you mean 'sample_every'"),
        ({"sample_max_seconds": "soon"}, "a number"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            Sampler(model, section(tmp_path, **wrong))
    for wrong, says in (
        ({"sampler": "eulr"}, "'eulr' is not a sampler"), ({"width": 100}, "multiple of 16"), ({"seed": -1}, "the seed"),
        ({"sample_steps": 0}, "at least one step"), ({"cfg_interval": [0.8, 0.2]}, "two rising shares"),
        ({"schedule": "leading"}, "'leading' is not a schedule of Flux: it has original"), ({"image": "none.png"}, "cannot be read"),
        ({"lora": "a.safetensors"}, "lora has no meaning"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            Sampler(model, section(tmp_path, **wrong))
    with pytest.raises(ConfigError, match="^autocast must be torch.bfloat16 or torch.float16, not 'bf16'"):
        Sampler(model, {"prompts": ["a cat"]}, autocast="bf16")  # type: ignore[arg-type]
    for dtype in ("bf16", torch.int8, {"vae": "float32"}):
        with pytest.raises(ConfigError, match="^dtype must be torch.bfloat16, torch.float16 or torch.float32, not "):
            eridiff.load("tiny-flux", dtype=dtype)  # type: ignore[arg-type]
    network: Any = tiny.flux()
    path, wrong = save_network(network, tmp_path / "a.safetensors"), {"dtype": "bf16"}
    calls: tuple[Callable[[], Any], ...] = (
        lambda: load_network(path, **wrong), lambda: load_encoder("tiny-flux", "clip", **wrong),
        lambda: save_network(network, tmp_path / "b.safetensors", **wrong), lambda: convert(path, tmp_path / "c", "original", **wrong),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(
            ConfigError, match="^dtype must be torch.bfloat16, torch.float16 or torch.float32, not 'bf16'"
        ):
            call()
    with pytest.raises(ConfigError, match="^autocast must be"), undisturbed({"": network}, autocast="bf16"):  # type: ignore[arg-type]
        pass
    with pytest.raises(LoraError, match="a scale is a finite number, or one for each row of the batch, not '1'"):
        eridiff.load("tiny-flux", device="cpu", progress=False).apply_lora("tiny-style", "1")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no prompts are given"):
        Sampler(model, RunConfig())


def test_what_has_no_effect_is_reported_once_at_construction(
    model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    idle = {
        "crop": [0, 8], "hand_over": 0.5, "network_multiplier": 0.5, "skip_layers": True, "strength": 0.5, "neg": "blurry",
        "format": "jpg", "sampler": "pndm", "use_lora": False,
    }  # fmt: skip
    with caplog.at_level(logging.WARNING):
        Sampler(model, section(tmp_path, **idle))
    told = "\n".join(record.getMessage() for record in caplog.records)
    for name in (
        "crop",
        "hand_over",
        "lora_scale",
        "skip_layers",
        "strength",
        "negative",
        "format",
        "pndm",
        "use_lora",
    ):
        assert told.count(name) == 1, (name, told)
    assert "sample_every" not in told  # which has its effect here


def test_the_first_images_may_have_a_section_of_their_own(model: Any, tmp_path: Path) -> None:
    first = {"prompts": ["a fox on snow"], "sample_steps": 1, "width": 32, "height": 32, "seed": 3}
    config = parse_config({"sample": section(tmp_path, sample_steps=1), "first_sample": first})
    sampler = Sampler(model, config, raise_errors=True)
    assert not any("first_sample" in notice for notice in config.notices_in_training)
    before, after = sampler.sample(0), sampler.sample(1)
    assert [s["prompt"] for s in before.settings] == ["a fox on snow"] and before.settings[0]["seed"] == 3
    assert [s["prompt"] for s in after.settings] == ["a swan on mars"]


# what is generated ------------------------------------------------------------------------------------------------------


def test_callbacks_get_paths_and_images_and_each_image_says_its_step(model: Any, tmp_path: Path) -> None:
    seen: list[Samples] = []
    settings = section(tmp_path, prompts=["a swan", "a fox"], walk_seed=True)
    samples = Sampler(model, settings, callbacks=[seen.append]).sample(12)
    assert seen == [samples] and [p.name for p in samples.paths] == ["step-00000012-00-a-swan.png", "step-00000012-01-a-fox.png"]  # fmt: skip
    for path, image, seed in zip(samples.paths, samples.images, (5, 6), strict=True):
        with Image.open(path) as written:
            assert written.tobytes() == image.tobytes()
            said = json.loads(written.info["eridiff"])
        assert said["training"]["step"] == 12 and said["training"]["weights"] == "live" and said["seed"] == seed


def test_further_weights_generate_beside_the_live_ones(model: Any, tmp_path: Path) -> None:
    from eridiff.training import averaged_weights

    zeros = {"image_in.bias": torch.zeros(32)}
    sampler = Sampler(model, section(tmp_path), weights={"base": lambda: averaged_weights(model.network, zeros)})
    samples = sampler.sample(0)
    assert [s["training"]["weights"] for s in samples.settings] == ["live", "base"]
    assert samples.images[0].tobytes() != samples.images[1].tobytes()
    assert samples.settings[1]["training"]["drift"]["live"]["rms"] > 0


def test_text_encoders_can_go_after_the_start_unless_they_are_in_training(model: Any, tmp_path: Path) -> None:
    sampler = Sampler(model, section(tmp_path))
    following = Sampler(model, section(tmp_path), text_in_training=True)
    plain = sampler.sample(0).images[0].tobytes()
    assert following.sample(0).images[0].tobytes() == plain
    model.t5.module.shared.weight.data.mul_(-2)
    assert following.sample(1).images[0].tobytes() != plain
    model.t5 = model.clip = None
    assert sampler.sample(1).images[0].tobytes() == plain
    assert "no text encoders" in str(following.sample(2).failure)


def test_modules_in_their_wrappers_generate_the_same(model: Any, tmp_path: Path) -> None:
    plain = Sampler(model, section(tmp_path)).sample(0).images[0].tobytes()
    wrapped = FluxInference(nn.DataParallel(model.network), model.autoencoder, model.clip, model.t5, progress=False)  # type: ignore[arg-type]
    wrapped.sampling = model.sampling
    for network in (wrapped.network, torch.compile(model.network), nn.DataParallel(model.network)):
        wrapped.network = network
        assert Sampler(wrapped, section(tmp_path)).sample(0).images[0].tobytes() == plain


def test_nothing_made_for_an_image_is_alive_after_it(model: Any, tmp_path: Path) -> None:
    def alive() -> tuple[int, int]:
        gc.collect()
        found = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter)]
        return len(found), sum(t.nbytes for t in found)

    averages = tiny.flux(seed=1).state_dict()
    sampler = Sampler(model, section(tmp_path), ema=averages, autocast=torch.bfloat16, verify=True)
    failing = Sampler(model, section(tmp_path), ema=averages, callbacks=[lambda _: 1 / 0])
    counts = []
    for step in range(3):
        sampler.sample(step), failing.sample(step)
        counts.append(alive())
    assert counts[0] == counts[1] == counts[2]


# again ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("flux", ["--cfg", "3", "--negative", "a fox"]),
        ("mmdit", ["--schedule", "candle", "--sampler", "dpmpp_2m_sde"]),
        ("unet", ["--sampler", "euler_ancestral", "--original-size", "96x80", "--crop", "4", "8", "--empty-negative", "encoded"]),
    ],
)  # fmt: skip
def test_an_image_of_the_command_line_is_generated_again_by_its_own_png(
    folders: dict[str, Path], family: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.png"
    command = ["sample", "--model", str(folders[family]), "--prompt", "a swan", "--steps", "3", "--out", str(path)]
    assert main([*command, *options]) == 0
    assert main(["resample", str(path)]) == 0
    assert "the same image, bit for bit" in capsys.readouterr().err
    again = read_settings(tmp_path / "a.again.png")
    assert again == read_settings(path)


def test_an_image_from_an_image_is_generated_again_as_long_as_that_is_there(tmp_path: Path, capsys: Any) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    command = ["sample", "--prompt", "a fox on snow", "--image", str(tmp_path / "red.png"), "--steps", "2"]
    assert main([*command, "--out", str(tmp_path / "a.png"), "--quiet"]) == 0
    assert main(["resample", str(tmp_path / "a.png")]) == 0 and "bit for bit" in capsys.readouterr().err
    (tmp_path / "red.png").unlink()
    assert main(["resample", str(tmp_path / "a.png")]) == 2 and "red.png' cannot be read" in capsys.readouterr().err


def test_what_cannot_be_generated_again_is_reported(model: Any, tmp_path: Path) -> None:
    result = model.generate("a swan", noise=torch.zeros(1, 16, 4, 4), steps=1)
    with pytest.raises(ConfigError, match="with noise passed, which its settings do not hold"):
        generate_again(model, result.settings[0])
    (tmp_path / "x.png").write_bytes(b"x")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    for name, says in (("x.png", "is not an image"), ("none.png", "cannot be read"), ("plain.png", "does not say how")):
        with pytest.raises(EridiffError, match=says):
            read_settings(tmp_path / name)
    with pytest.raises(ConfigError, match="name no files"):
        load_again({"dtype": "float32", "steps": 1})


def test_another_image_is_reported_with_what_was_different(model: Any, tmp_path: Path, capsys: Any) -> None:
    assert (
        main(["sample", "--prompt", "a fox on snow", "--steps", "1", "--out", str(tmp_path / "a.png"), "--quiet"]) == 0
    )
    settings = read_settings(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        eridiff.images.save_png(image.rotate(90), tmp_path / "b.png", settings | {"torch": "1.0", "batch": 3})
    assert main(["resample", str(tmp_path / "b.png")]) == 0
    assert "another image (then torch 1.0, now " in (said := capsys.readouterr().err) and "in one batch with 2" in said
