"""What runs on a CPU runs on a GPU: every way from a prompt to an image, on a pretended GPU (`tests/pretend_gpu.py`)."""

import os
import re
import runpy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import eridiff
import eridiff.inference.base
from eridiff import FluxInference, Prompt, SDXLInference
from eridiff.errors import ConfigError
from eridiff.files import replacing
from eridiff.inference import DiffusionInference
from eridiff.lora import Lora, attach_lora, decompose, deltas, merge_lora
from eridiff.memory.stages import on_device
from eridiff.models.flux import position_ids
from eridiff.precision import matmul_precision
from eridiff.schedulers.flow_match import flow_schedule
from eridiff.trace.record import first_difference, record, relative_l2
from eridiff.training import Sampler, averaged_weights
from eridiff.training.objective import discrete_levels, flow_levels, noised, squared_error, target, timesteps, uniform
from eridiff.weights.save import write_tensors
from tests import families, loras, tiny
from tests.pretend_gpu import CPU, CUDA, OnGPU, PretendedGPU, pretend_gpu

WRITERS: dict[str, Callable[..., Path]] = {
    "flux": tiny.write_model, "sd3": tiny.write_sd3_model, "sdxl": tiny.write_sdxl_model,
}  # fmt: skip


@pytest.fixture(scope="module", params=list(WRITERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole small model of each family, as published files."""
    return WRITERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture
def gpu() -> Iterator[PretendedGPU]:
    with pretend_gpu() as gpu:
        yield gpu


def modules(model: Any) -> dict[str, torch.nn.Module]:
    encoders = {name: getattr(model, name, None) for name in ("clip", "clip_g", "t5")}
    found = {name: encoder.module for name, encoder in encoders.items() if encoder is not None}
    return {"network": model.network, "autoencoder": model.autoencoder, **found}


def moved(model: Any, device: Any) -> Any:
    for module in modules(model).values():
        module.to(device)
    return model


def same(image: Any, other: Any) -> bool:
    """Equal but for a level here and there: on the pretended GPU attention is computed by plain products."""
    distance = np.abs(np.asarray(image, np.int16) - np.asarray(other, np.int16))
    return int(distance.max()) <= 1


def photo() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(values)


def hole() -> Image.Image:
    values = np.zeros((64, 64), dtype=np.uint8)
    values[16:48, 16:48] = 255
    return Image.fromarray(values)


ASKED: dict[str, dict[str, Any]] = {
    "text": {},
    "guided": {"cfg_scale": 3.0, "negative": "blurred", "cfg_rescale": 0.5},
    "noise on the way": {"sampler": "euler_ancestral"},
    "image": {"image": photo(), "strength": 0.5},
    "inpainting": {"image": photo(), "mask": hole()},
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=list(ASKED))
def test_an_image_on_a_gpu_is_the_image_on_the_cpu(folder: Path, gpu: PretendedGPU, asked: dict[str, Any]) -> None:
    given = {"width": 64, "height": 64, "steps": 3, "seed": 4, **asked}
    expected = tiny.load(DiffusionInference, folder).generate("a swan", **given).images[0]
    model = eridiff.load(folder, progress=False)
    assert model.device == CUDA and all(p.device == CUDA for p in model.network.parameters())
    assert same(model.generate("a swan", **given).images[0], expected)


def test_the_device_is_the_networks(gpu: PretendedGPU) -> None:
    model = families.inference("flux")
    handed = FluxInference(model.network, model.autoencoder, progress=False)
    assert handed.device == torch.device("cpu")  # though there is a GPU
    model.network.to("cuda")
    assert handed.device == CUDA
    with pytest.raises(ConfigError, match="the network is on cuda:0, not on cpu: move it there, or give no device"):
        FluxInference(model.network, model.autoencoder, device="cpu")
    assert FluxInference(model.network, model.autoencoder, device="cuda").device == CUDA


@pytest.mark.parametrize("family", families.FAMILIES)
def test_modules_that_were_handed_in_may_lie_apart(family: str, gpu: PretendedGPU) -> None:
    """The network on the GPU; the autoencoder and the conditioning on the CPU."""
    model = families.inference(family)
    prompt = Prompt(families.conditioning(model), families.conditioning(model, seed=5))
    given: dict[str, Any] = {"conditioning": prompt, "width": 64, "height": 64, "steps": 2, "seed": 1}
    expected = model.generate(**given).images[0]
    moved_network = type(model)(model.network.to("cuda"), model.autoencoder, progress=False)
    assert same(moved_network.generate(**given).images[0], expected)


@pytest.mark.parametrize("family", ["mmdit", "unet"])
def test_text_encoders_may_lie_apart(family: str, tmp_path: Path, gpu: PretendedGPU) -> None:
    """CLIP-L on the CPU, CLIP-G on the GPU, T5 left out: what they give, and the zeros for T5, are joined."""
    folder = tiny.write_sd3_model(tmp_path) if family == "mmdit" else tiny.write_sdxl_model(tmp_path)
    model = tiny.load(DiffusionInference, folder)
    model.t5 = None
    expected = model.generate("a swan", seed=1, width=64, height=64).images[0]
    model.network.to("cuda"), model.autoencoder.to("cuda"), model.clip_g.module.to("cuda")
    assert same(model.generate("a swan", seed=1, width=64, height=64).images[0], expected)


def test_pictures_and_masks_may_be_tensors_on_the_gpu(gpu: PretendedGPU) -> None:
    model = families.inference("flux")
    picture, mask = torch.rand(1, 3, 64, 64) * 2 - 1, (torch.rand(1, 1, 64, 64) > 0.5).float()
    given: dict[str, Any] = {"conditioning": Prompt(families.conditioning(model)), "steps": 2, "seed": 1}
    expected = model.generate(**given, image=picture, mask=mask).images[0]
    moved(model, "cuda")
    drawn = model.generate(
        **given, image=picture.to("cuda"), mask=mask.to("cuda"), noise=model.noise([1], 64, 64).to("cuda")
    )
    assert same(drawn.images[0], expected)


def test_inpainting_networks_take_tensors_on_the_gpu(gpu: PretendedGPU) -> None:
    """Flux Fill and SDXL inpainting, whose condition is made of an image and a mask."""
    fill = FluxInference(tiny.flux(replace(tiny.FLUX, in_channels=64 + 64 + 256)), tiny.autoencoder(), progress=False)
    inpaint = SDXLInference(
        tiny.unet(replace(tiny.UNET, in_channels=9)), tiny.autoencoder(tiny.SDXL_AUTOENCODER), progress=False
    )
    picture, mask = torch.rand(1, 3, 64, 64) * 2 - 1, (torch.rand(1, 1, 64, 64) > 0.5).float()
    for model in (fill, inpaint):
        prompt = Prompt(families.conditioning(model), families.conditioning(model, seed=5))
        expected = model.generate(conditioning=prompt, steps=2, seed=1, image=picture, mask=mask).images[0]
        moved(model, "cuda")
        drawn = model.generate(conditioning=prompt, steps=2, seed=1, image=picture.to("cuda"), mask=mask.to("cuda"))
        assert same(drawn.images[0], expected)


def test_a_seed_is_an_image_whatever_the_default_device_and_dtype_are(folder: Path, gpu: PretendedGPU) -> None:
    given: dict[str, Any] = {"width": 64, "height": 64, "steps": 3, "seed": 4, "sampler": "euler_ancestral"}
    model = eridiff.load(folder, progress=False)
    expected = model.generate("a swan", **given).images[0]
    try:
        torch.set_default_device("cuda:0")
        torch.set_default_dtype(torch.bfloat16)
        assert model.noise([4], 64, 64).device.type == "cpu"
        drawn = model.generate("a swan", **given).images[0]
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert drawn.tobytes() == expected.tobytes()


def test_only_the_network_computes_under_autocast(folder: Path) -> None:
    """Autoencoders and T5 overflow in float16, in which trainers autocast."""
    model = tiny.load(DiffusionInference, folder)
    seen: dict[str, set[bool]] = {name: set() for name in modules(model)}
    for name, module in modules(model).items():
        for child in module.modules():
            if isinstance(child, torch.nn.Linear | torch.nn.Conv2d):
                child.register_forward_hook(lambda *_, name=name: seen[name].add(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        model.generate("a swan", width=64, height=64, steps=1, image=photo(), strength=1.0)
        assert torch.is_autocast_enabled("cpu")
    assert seen.pop("network") == {True}
    assert all(enabled == {False} for enabled in seen.values())


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_training_step_runs_on_the_gpu(family: str, gpu: PretendedGPU) -> None:
    """Times, levels and noise come from the CPU and follow the latents."""
    model = families.inference(family)
    model.network.train().requires_grad_(True)
    channels = model.network.config.in_channels if family != "flux" else 16
    clean, noise = families.rows(2, 2, channels, 4, 4, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    levels = flow_levels(uniform(2, generator)) if family != "unet" else discrete_levels(timesteps(2, generator))
    given = families.inputs(model, levels)

    def loss(device: str) -> Tensor:
        told = tuple(t.to(device) if isinstance(t, Tensor) and i < 2 else t for i, t in enumerate(given))
        latents = clean.to(device)
        output = model.network(families.packed(family, noised(latents, noise, levels)), *told)
        return squared_error(output, families.packed(family, target(latents, noise, levels)))

    expected = float(loss("cpu").detach())
    model.network.to("cuda")
    found = loss("cuda")
    found.backward()
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)
    assert all(p.grad.device == CUDA for p in model.network.parameters() if p.grad is not None)


def test_the_table_of_positions_crosses_once_per_size(gpu: PretendedGPU) -> None:
    network = tiny.mmdit().to("cuda")
    text, pooled = torch.zeros(1, 5, 20, device="cuda"), torch.zeros(1, 16, device="cuda")
    times = torch.zeros(1, device="cuda")

    def crossed(grid: tuple[int, int]) -> int:
        before = gpu.to_device
        network.prepare(text, pooled, times, grid)
        return gpu.to_device - before

    first = crossed((2, 2))
    assert [crossed((2, 2)), crossed((2, 2)), crossed((2, 3)), crossed((2, 2))] == [first - 1, first - 1, first, first]
    network.positions.table += 1  # a table that changed is read anew
    assert crossed((2, 2)) == first
    assert torch.equal(
        network.positions((2, 2), CUDA, torch.float32).cpu(), tiny.mmdit().positions((2, 2), CPU, torch.float32) + 1
    )


def test_averages_on_the_cpu_are_drawn_in_the_parameters_own_memory(gpu: PretendedGPU) -> None:
    network, averages = tiny.flux(), {n: t.clone() for n, t in tiny.flux(seed=1).state_dict().items()}
    network.to("cuda")
    trained = {n: (t, t.data_ptr(), t.cpu().clone()) for n, t in network.named_parameters()}
    with averaged_weights(network, averages):
        for name, parameter in network.named_parameters():
            assert parameter is trained[name][0] and parameter.data_ptr() == trained[name][1]
            assert torch.equal(parameter.cpu(), averages[name])
    assert all(torch.equal(p.cpu(), values) and p.data_ptr() == place for p, place, values in trained.values())


def test_averages_of_another_dtype_leave_a_graph_valid() -> None:
    network = tiny.flux().requires_grad_(True)
    latents, given = loras.arguments(network)
    output = network.step(latents, network.prepare(*given), 0).square().mean()
    expected = torch.autograd.grad(output, network.final.linear.weight, retain_graph=True)[0]
    with averaged_weights(network, {n: t.double() for n, t in tiny.flux(seed=1).state_dict().items()}):
        assert not torch.equal(network.final.linear.weight, tiny.flux().final.linear.weight)
    assert torch.equal(torch.autograd.grad(output, network.final.linear.weight)[0], expected)


def test_the_sampler_checks_averages_without_moving_them(tmp_path: Path, gpu: PretendedGPU) -> None:
    model = moved(families.inference("flux"), "cuda")
    model.encode_prompt = lambda *_: Prompt(families.conditioning(model))
    before = gpu.to_device
    Sampler(model, {"prompts": ["a swan"], "out": str(tmp_path)}, ema=tiny.flux(seed=1).state_dict())
    assert gpu.to_device == before


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

    def spy(module: Any, device: Any) -> Any:
        name = next(name for name, component in modules(model).items() if component is module)
        crossing = next(module.parameters()).device.type != device.type
        stages.extend([name] * crossing)
        return on_device(module, device)

    monkeypatch.setattr(eridiff.inference.base, "on_device", spy)
    together = [result.images[0] for result in model.generate_each(requests)]
    assert [a.tobytes() == b.tobytes() for a, b in zip(alone, together, strict=True)] == [True] * 3
    encoders = [name for name in modules(model) if name not in ("network", "autoencoder")]
    assert stages == [*encoders, "autoencoder", "network", "autoencoder"]
    assert all(p.device.type == "cpu" for module in modules(model).values() for p in module.parameters())


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


def test_recordings_are_compared_across_devices(gpu: PretendedGPU) -> None:
    network = tiny.flux()
    latents, given = loras.arguments(network)
    with record(network) as expected:
        network.step(latents, network.prepare(*given), 0)
    network.to("cuda")
    on_gpu = [t.to("cuda") if isinstance(t, Tensor) and t.dtype != torch.float64 else t for t in given]
    with record(network) as found, record(network, device=None) as kept:
        network.step(latents.to("cuda"), network.prepare(*on_gpu), 0)
    assert {t.device.type for t in found.values()} == {"cpu"} and {t.device for t in kept.values()} == {CUDA}
    assert first_difference(found, expected, 1e-5) is None and first_difference(kept, expected, 1e-5) is None
    assert relative_l2(kept["final"], found["final"]) == 0.0


LORAS: dict[str, Callable[[Any], Lora]] = {"flux": loras.every_kind_on_flux, "unet": loras.every_kind_on_unet}


@pytest.mark.parametrize("family", list(LORAS))
def test_branches_of_every_kind_go_where_the_network_goes(family: str, gpu: PretendedGPU) -> None:
    network = loras.FAMILIES[family]()
    attached = attach_lora(network, LORAS[family](network), 0.7)
    latents, given = loras.arguments(network)
    expected = network.step(latents, network.prepare(*given), 0)
    network.to("cuda")
    on_gpu = [t.to("cuda") if isinstance(t, Tensor) and t.dtype != torch.float64 else t for t in given]

    def ask() -> Tensor:
        return network.step(latents.to("cuda"), network.prepare(*on_gpu), 0).cpu()

    assert relative_l2(ask(), expected) < 1e-5
    assert {branch.device for branch in attached.all_branches()} == {CUDA}
    attached.detach()
    plain = ask()
    network.to("cpu")
    assert relative_l2(plain, network.step(latents, network.prepare(*given), 0)) < 1e-5


def test_a_scale_per_row_works_on_the_gpu(gpu: PretendedGPU) -> None:
    network = tiny.flux()
    lora = loras.every_kind_on_flux(network)
    attached = attach_lora(network.to("cuda"), lora, dora="interpolate")
    for item, _ in list(attached.patches):
        attached.set_scale({item.target.module: 1.0})
    attached.set_scale({branch.target.module: torch.tensor([0.0, 1.0]) for branch in attached.all_branches()})
    assert {branch.scale.device.type for branch in attached.all_branches()} == {"cpu"}
    latents, given = loras.arguments(network)
    on_gpu = [t.to("cuda") if isinstance(t, Tensor) and t.dtype != torch.float64 else t for t in given]
    rows = network.step(latents.to("cuda"), network.prepare(*on_gpu), 0).cpu()
    network.to("cpu")
    assert relative_l2(rows, network.step(latents, network.prepare(*given), 0)) < 1e-5


def test_merging_on_the_gpu_equals_merging_on_the_cpu(gpu: PretendedGPU) -> None:
    network = tiny.flux()
    lora = loras.every_kind_on_flux(network)
    expected = merge_lora(network.state_dict(), lora, 0.7).state
    found = merge_lora(network.to("cuda").state_dict(), lora, 0.7).state
    assert all(torch.equal(found[name].cpu(), tensor) for name, tensor in expected.items())


def test_merges_are_computed_in_float32_whatever_the_trainer_does(monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny.flux()
    lora = loras.every_kind_on_flux(network)
    expected = merge_lora(network.state_dict(), lora, 0.7).state
    seen = []
    low_rank = deltas.low_rank
    monkeypatch.setattr(deltas, "low_rank", lambda *given: seen.append(matmul_precision()) or low_rank(*given))
    before = matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            found = merge_lora(network.state_dict(), lora, 0.7).state
            attached = attach_lora(network, lora, 0.7)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert matmul_precision() == before or before in ("highest", ("none", "none"))
    assert seen and set(seen) <= {"highest", ("ieee", "ieee")}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    patched = {name: expected[name] for name in attached.originals}
    assert patched and all(torch.equal(network.get_parameter(n), tensor) for n, tensor in patched.items())


def test_shrinking_a_large_change_touches_no_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompose, "EXACT_UP_TO", 8)
    g = torch.Generator().manual_seed(0)
    change = torch.randn(40, 6, generator=g) @ torch.randn(6, 30, generator=g)
    seeded: list[int] = []
    monkeypatch.setattr(torch.random, "manual_seed", seeded.append)
    monkeypatch.setattr(torch, "manual_seed", seeded.append)
    state = torch.get_rng_state()
    down, up, energy = decompose.nearest(change, 6)
    assert torch.equal(torch.get_rng_state(), state) and seeded == []
    assert relative_l2(up @ down, change) < 1e-5 and energy == pytest.approx(1.0)
    _, _, share = decompose.nearest(change, 3)
    s = torch.linalg.svdvals(change)
    assert share == pytest.approx(float(s[:3].square().sum() / s.square().sum()), rel=1e-5)


@pytest.mark.parametrize("family", list(LORAS))
def test_a_lora_with_changes_in_place_is_weighed_while_offloaded(family: str, gpu: PretendedGPU) -> None:
    """In a callback, when the network works with copies on the GPU: both they and their originals change."""
    model = families.inference(family)
    prompt = Prompt(families.conditioning(model), families.conditioning(model, seed=5))
    given: dict[str, Any] = {"conditioning": prompt, "width": 64, "height": 64, "steps": 4, "seed": 1}
    attached = attach_lora(model.network, LORAS[family](model.network))
    assert attached.patches

    def weigh(step: Any) -> None:
        attached.set_scale(0.25 if step.index == 0 else 1.0)

    resident = model.generate(**given, callback=weigh).images[0]
    kept = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    offloaded = type(model)(model.network, model.autoencoder, device="cuda", offload="stages", progress=False)
    assert same(offloaded.generate(**given, callback=weigh).images[0], resident)
    assert all(torch.equal(p, kept[name]) for name, p in model.network.named_parameters())
    attached.detach()
    assert all(
        torch.equal(p, tensor)
        for p, tensor in zip(model.network.parameters(), loras.FAMILIES[family]().parameters(), strict=True)
    )


def test_files_are_written_beside_others_of_the_same_process_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two containers that share a disk have the same process numbers; and no umask is set meanwhile, which threads share."""
    target = tmp_path / "a.safetensors"
    masks: list[int] = []
    monkeypatch.setattr(os, "umask", masks.append)
    write_tensors({"a": torch.zeros(1)}, target, {})
    with replacing(target) as mine, replacing(target) as theirs:
        assert mine != theirs and mine.parent == theirs.parent == tmp_path
        mine.write_text("mine"), theirs.write_text("theirs")
    assert target.read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"] and masks == []


def test_a_refiners_image_records_the_dtypes_of_both(tmp_path: Path) -> None:
    base = tiny.load(
        SDXLInference, tiny.write_sdxl_model(tmp_path / "base"), dtype={"unet": torch.float32, "clip": torch.bfloat16}
    )
    refiner = tiny.load(SDXLInference, tiny.write_sdxl_model(tmp_path / "refiner", tiny.SDXL_REFINER))
    settings = base.generate("a swan", refiner=refiner, seed=1, width=64, height=64, steps=4).settings[0]
    assert settings["dtypes"]["clip"] == "bfloat16"


ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["README.md", "docs/training.md", "docs/lora.md"])
def test_the_code_of_a_document_runs_on_a_gpu(
    page: str, gpu: PretendedGPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(OnGPU, "float64", page == "docs/training.md")  # diffusers' Flux makes it there
    namespace: dict[str, Any] = {}
    pattern = r"^(?:```python|<!--- invisible-code-block: python)\n(.*?)^(?:```|--->)"
    blocks = re.findall(pattern, (ROOT / page).read_text(), flags=re.M | re.S)
    assert len(blocks) > 2
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
    assert gpu.to_device > 0 or page == "docs/training.md"


@pytest.mark.parametrize(
    ("example", "options"),
    [
        ("train_bare_loop", ["2"]),
        ("train_lora", ["--steps", "1", "--rank", "2"]),
        ("sample_in_training", ["--steps", "1", "--pictures", "4"]),
    ],
)
def test_an_example_runs_on_a_gpu(
    example: str, options: list[str], gpu: PretendedGPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loops of accelerate, the Hugging Face Trainer and DDP set devices by themselves, which only a real GPU allows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr("sys.argv", [example, *options])
    runpy.run_path(str(ROOT / "examples" / f"{example}.py"), run_name="__main__")
    assert gpu.to_device > 0 or example == "sample_in_training"


SMALL_IMAGE: dict[str, Any] = {"width": 64, "height": 64, "steps": 4}


def test_strips_make_no_float64_on_a_device(tmp_path: Path) -> None:
    with pretend_gpu():
        model = eridiff.load(tiny.write_model(tmp_path), progress=False, vae_rows=4)
        assert model.generate("a swan", seed=1, **SMALL_IMAGE).images


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


@pytest.mark.parametrize("family", list(loras.FAMILIES))
def test_a_training_forward_on_the_gpu_waits_for_no_table(family: str) -> None:
    with pretend_gpu() as gpu:
        network = loras.FAMILIES[family]().to("cuda")
        latents, (text, pooled, times, *rest) = loras.arguments(network)
        told = text.to("cuda"), pooled.to("cuda"), times[:1].float().to("cuda")
        rest = [t.to("cuda") if isinstance(t, Tensor) else t for t in rest]
        crossed = []
        for _ in range(2):
            before = gpu.to_device
            network.prepare(*told, *rest)
            crossed.append(gpu.to_device - before)
    assert crossed[1] == 0


def test_averages_of_the_table_of_positions_are_drawn() -> None:
    with pretend_gpu():
        network = tiny.mmdit().to("cuda")
        given = torch.zeros(1, 5, 20, device="cuda"), torch.zeros(1, 16, device="cuda"), torch.zeros(1, device="cuda")
        averages = {n: t.to("cuda") for n, t in tiny.mmdit(seed=9).state_dict().items()}
        live = network.prepare(*given, (2, 2)).positions.cpu()
        with averaged_weights(network, averages):
            averaged = network.prepare(*given, (2, 2)).positions.cpu()
    assert not torch.equal(averaged, live)


@pytest.mark.parametrize("name", ["read", "write", "stack", "add"])
def test_the_pretended_gpu_refuses_what_cuda_refuses(name: str) -> None:
    with pretend_gpu():
        here, index, number = torch.zeros(4, 4), torch.tensor([1, 2]), torch.tensor(2.0)
        there = here.to("cuda")
        ways: dict[str, Any] = {
            "read": lambda: here[index.to("cuda")],
            "write": lambda: there.index_put_((index,), torch.ones(2, 4)),
            "stack": lambda: torch.stack([number, number.to("cuda")]),
            "add": lambda: torch.tensor(1.0).add_(number.to("cuda")),
        }
        with pytest.raises(RuntimeError):
            ways[name]()


@pytest.mark.parametrize("default", ["cuda:0", "cpu"])
def test_a_model_is_loaded_where_it_is_wanted_whatever_the_default_device_is(
    default: str, folder: Path, gpu: PretendedGPU
) -> None:
    torch.set_default_device(default)
    try:
        model = eridiff.load(folder, progress=False, device="cpu")
    finally:
        torch.set_default_device(None)
    assert {p.device.type for module in modules(model).values() for p in module.parameters()} == {"cpu"}


def test_a_float32_average_is_drawn_by_a_bfloat16_network_on_the_same_device() -> None:
    """The commonest case of a trainer; the parameters stay the same objects of the same dtype."""
    network = tiny.flux().bfloat16()
    trained = {n: (p, p.clone()) for n, p in network.named_parameters()}
    averages = {n: t.float() for n, t in tiny.flux(seed=1).state_dict().items()}
    with averaged_weights(network, averages):
        for name, parameter in network.named_parameters():
            assert parameter is trained[name][0] and torch.equal(parameter, averages[name].bfloat16())
    assert all(torch.equal(p, values) for p, values in trained.values())


def test_a_table_of_positions_that_is_loaded_anew_is_cropped_anew() -> None:
    network, other = tiny.mmdit(), tiny.mmdit(seed=4)
    before = network.positions((2, 2), CPU, torch.float32)
    network.load_state_dict(other.state_dict())
    after = network.positions((2, 2), CPU, torch.float32)
    assert not torch.equal(before, after) and torch.equal(after, other.positions((2, 2), CPU, torch.float32))


@pytest.mark.parametrize("family", ["flux", "mmdit"])
def test_masks_positions_and_sigmas_follow_what_they_meet(family: str, gpu: PretendedGPU) -> None:
    network = loras.FAMILIES[family]()
    latents, (text, pooled, times, grid, *rest) = loras.arguments(network)
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    options: dict[str, Any] = {"mask": mask}
    if family == "flux":
        options |= {"ids": position_ids((2, 3)).float(), "guidance": rest[0]}
    given = (text, pooled, times) if family == "flux" else (text, pooled, times, grid)
    expected = network.step(latents, network.prepare(*given, **options), 0)
    network.to("cuda")
    on_gpu = (text.to("cuda"), pooled.to("cuda"), *given[2:])
    for place in ("cpu", "cuda"):
        there = options | ({"ids": options["ids"].to(place)} if "ids" in options else {})
        found = network.step(latents.to("cuda"), network.prepare(*on_gpu, **there), 0)
        assert relative_l2(found, expected) < 1e-5
    sigmas = torch.tensor([1.0, 0.5, 0.0]).to("cuda")
    assert flow_schedule(sigmas).sigmas.tolist() == [1.0, 0.5, 0.0]


def test_a_rotary_table_that_was_made_for_inference_serves_training() -> None:
    network = tiny.flux().requires_grad_(True)
    latents, given = loras.arguments(network)
    with torch.inference_mode():
        network.step(latents, network.prepare(*given), 0)
    network.step(latents, network.prepare(*given), 0).square().mean().backward()
    assert network.image_in.weight.grad is not None


def test_a_condition_follows_the_network(gpu: PretendedGPU) -> None:
    """Of an autoencoder on the CPU, for Fill and Canny on the GPU."""
    for channels, given in ((384, {"image": photo(), "mask": hole()}), (128, {"control": photo()})):
        model = FluxInference(tiny.flux(replace(tiny.FLUX, in_channels=channels)), tiny.autoencoder(), progress=False)
        prompt = Prompt(families.conditioning(model))
        expected = model.generate(conditioning=prompt, steps=2, seed=1, **given).images[0]
        model.network.to("cuda")
        assert same(model.generate(conditioning=prompt, steps=2, seed=1, **given).images[0], expected)
