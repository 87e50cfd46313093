"""On a GPU as on the CPU; how far results may differ is in devices.py."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import eridiff
from eridiff import Prompt
from eridiff.errors import ConfigError
from eridiff.float8 import Float8Linear, rounded, use_float8
from eridiff.images import to_tensor
from eridiff.memory.plan import stages
from eridiff.memory.stages import on_device
from eridiff.models.flux import Flux, FluxConfig
from eridiff.trace.record import first_difference, record, relative_l2
from eridiff.training import Sampler
from eridiff.weights.detect import Component
from eridiff.weights.header import Checkpoint
from eridiff.weights.keymap import key_map
from tests import tiny
from tests.devices import device as device
from tests.devices import far
from tests.devices import float32_convolutions as float32_convolutions
from tests.families import FAMILIES, conditioning, inference
from tests.loras import arguments


def on(device: torch.device | str, made: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The inference with its modules on a device; nothing else tells it which."""
    return type(made)(made.network.to(device, dtype), made.autoencoder.to(device, dtype), progress=False)


def draw(model: Any, **options: Any) -> Any:
    told = Prompt(conditioning(model), conditioning(model, seed=5))
    given = {"conditioning": told, "width": 32, "height": 32, "steps": 3, "seed": 1, "cfg_scale": 3.0}
    return model.generate(**given | options, keep=("latents",))


def pixels(result: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in result.images]).astype(int)


# images -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_equals_the_cpus_within_float32_rounding(family: str, device: torch.device) -> None:
    model = on(device, inference(family))
    assert model.device.type == device.type
    found, plain = draw(model), draw(on("cpu", inference(family)))
    wide = draw(on("cpu", inference(family), torch.float64)).latents
    assert relative_l2(found.latents.cpu(), wide) <= far(plain.latents, wide) < 1e-3
    assert np.abs(pixels(found) - pixels(plain)).max() <= 1


def fill() -> Any:
    return eridiff.FluxInference(tiny.flux(replace(tiny.FLUX, in_channels=384)), tiny.autoencoder(), progress=False)


def control() -> Any:
    return eridiff.FluxInference(tiny.flux(replace(tiny.FLUX, in_channels=128)), tiny.autoencoder(), progress=False)


def inpaint() -> Any:
    network, autoencoder = tiny.unet(replace(tiny.UNET, in_channels=9)), tiny.autoencoder(tiny.SDXL_AUTOENCODER)
    return eridiff.SDXLInference(network, autoencoder, progress=False)


BEGUN: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {  # what is generated with, and which images it is given
    **{f"{family} from an image": (lambda family=family: inference(family), ("image",)) for family in FAMILIES},  # type: ignore[misc]
    **{f"{family} within a mask": (lambda family=family: inference(family), ("image", "mask")) for family in FAMILIES},  # type: ignore[misc]
    "Flux Fill": (fill, ("image", "mask")),
    "Flux Canny": (control, ("control",)),
    "SDXL inpainting": (inpaint, ("image", "mask")),
}


@pytest.mark.parametrize("kind", BEGUN)
def test_an_image_begins_alike_from_a_file_and_from_tensors_anywhere(kind: str, device: torch.device) -> None:
    make, names = BEGUN[kind]
    model = on(device, make())
    values = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    files = {"image": Image.fromarray(values), "control": Image.fromarray(values[::-1].copy())}
    files["mask"] = Image.fromarray(np.repeat([[0, 255]], 32, axis=0).repeat(16, axis=1).astype(np.uint8))
    found = []
    for give in (
        lambda name: files[name],
        lambda name: to_tensor(files[name], 32, 32, mask=name == "mask"),
        lambda name: to_tensor(files[name], 32, 32, mask=name == "mask").to(device),
    ):
        found.append(draw(model, **{name: give(name) for name in names}))
    for other in found[1:]:
        assert torch.equal(other.latents, found[0].latents) and np.array_equal(pixels(other), pixels(found[0]))
    if "mask" in names:
        assert np.array_equal(pixels(found[0])[0, :, :16], values[:, :16])  # black is kept
        assert not np.array_equal(pixels(found[0])[0, :, 16:], values[:, 16:])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Whole small models as files."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "Flux": tiny.write_model(folder / "flux"),
        "SD 3": tiny.write_sd3_model(folder / "sd3"),
        "SD 3 without T5": tiny.write_sd3_model(folder / "clips", replace(tiny.MMDIT, text_width=4096), t5=False),
        "SDXL": tiny.write_sdxl_model(folder / "sdxl"),
    }


NAMES = ("Flux", "SD 3", "SD 3 without T5", "SDXL")


def loaded(path: Path, device: torch.device, **options: Any) -> Any:
    return eridiff.load(path, device=device, progress=False, **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("offload", ["stages", "stream"])
def test_offloaded_modules_generate_bit_for_bit_what_resident_ones_generate(
    offload: str, name: str, models: dict[str, Path], device: torch.device
) -> None:
    found = []
    for how, place in ((None, device.type), (offload, "cpu")):
        model = loaded(models[name], device, offload=how)
        modules = (model.network, model.autoencoder, model.clip.module)
        before = [p for module in modules for p in module.parameters()]
        found.append(model.generate(["a swan on mars", "a fox"], seed=[1, 2], steps=2, keep=("latents",)))
        after = [p for module in modules for p in module.parameters()]
        assert all(a is b for a, b in zip(before, after, strict=True)) and {p.device.type for p in after} == {place}
    assert torch.equal(found[0].latents, found[1].latents) and np.array_equal(*map(pixels, found))


@pytest.mark.gpu
@pytest.mark.parametrize("share", [None, 0.6])
def test_a_stream_takes_the_memory_that_is_planned(share: float | None) -> None:
    """Blocks of 57 and 113 MB, passing or as many as a share of the weights has room for, and the bits of a resident network."""
    device, config = (
        torch.device("cuda"),
        replace(FluxConfig.preset("dev"), hidden=1536, heads=12, double_depth=4, single_depth=8),
    )
    torch.manual_seed(0)
    network = Flux(config).bfloat16().requires_grad_(False)
    component = Component("flux", key_map("flux").layouts["original"], "", Checkpoint(Path(), {}, {}, {}), config)
    (stage,) = stages({"flux": component}, 1024, 1024, steps=3)
    room = None if share is None else int(share * stage.weights)
    latents = torch.randn(1, 4096, 64).to(device, torch.bfloat16)
    text, pooled = torch.randn(1, 512, 4096).to(latents), torch.randn(1, 768).to(latents)
    times, guidance = torch.tensor([1.0, 0.7, 0.4]), torch.ones(1, device=device)

    def outputs(place: Any) -> list[Tensor]:
        with torch.no_grad(), place:
            run = network.prepare(text, pooled, times, (64, 64), guidance)
            return [network.step(latents, run, i).cpu() for i in range(3)]

    def peak() -> int:
        return torch.cuda.max_memory_allocated() - before

    outputs(on_device(network, device, "stages"))  # cuBLAS has its memory now
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    expected = outputs(on_device(network, device, "stages"))
    resident = peak()
    torch.cuda.reset_peak_memory_stats()
    found = outputs(on_device(network, device, "stream", room))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    most = stage.peak("stream") if room is None else room + stage.work
    assert peak() < 1.1 * most and peak() < resident and (room is not None or peak() > 0.9 * most)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("name", NAMES)
def test_the_default_device_does_not_reach_an_image(name: str, models: dict[str, Path], device: torch.device) -> None:
    model = loaded(models[name], device)
    plain = model.generate("a swan", seed=1, steps=2)
    try:
        torch.set_default_device(device)
        found = model.generate("a swan", seed=1, steps=2)
    finally:
        torch.set_default_device(None)
    assert np.array_equal(pixels(found), pixels(plain))


# training -------------------------------------------------------------------------------------------------------------


class Training:
    """A run on a device: a network in training mode, its optimizer, and a module that drops out."""

    def __init__(self, path: Path, device: torch.device, out: Path, dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype, self.out = device, dtype, out
        self.model = loaded(path, device)
        self.network = self.model.network.to(dtype).requires_grad_(True).train()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3)
        self.dropout = nn.Dropout().to(device)
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        shapes = ((1, 4, 64), (1, 5, 12), (1, 8))
        tokens, text, pooled = (torch.randn(s, generator=generator).to(self.device, self.dtype) for s in shapes)
        time, guidance = torch.tensor([[0.5]], device=self.device), torch.tensor([3.5], device=self.device)
        output = self.network(tokens, text, pooled, time, (2, 2), guidance)
        return self.dropout(output).float().square().mean()

    def sampler(self, **options: Any) -> Sampler:
        section = {"prompts": ["a swan"], "sample_steps": 1, "out": str(self.out)}
        given = {
            "modules": {"dropout": self.dropout},
            "optimizer": self.optimizer,
            "verify": True,
            "raise_errors": True,
        }
        return Sampler(self.model, section, **given | options)


def random_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def test_sampling_puts_the_random_states_of_the_device_back(
    models: dict[str, Path], device: torch.device, tmp_path: Path
) -> None:
    run = Training(models["Flux"], device, tmp_path)
    asked: list[Tensor] = []
    sampler = run.sampler(callbacks=[lambda _: asked.extend([torch.rand(3), torch.rand(3, device=device)])])
    losses = []
    for interrupt in (False, True):
        torch.manual_seed(0)
        before = random_states(device)
        if interrupt:
            assert sampler.sample(1).images
        assert all(map(torch.equal, random_states(device), before))
        losses.append(float(run.loss().detach()))  # through dropout
    torch.manual_seed(1)
    assert losses[0] == losses[1] != float(run.loss().detach()) and len(asked) == 2


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_sampling_inside_a_bfloat16_training_step_changes_nothing(
    precision: str, models: dict[str, Path], device: torch.device, tmp_path: Path
) -> None:
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    run = Training(models["Flux"], device, tmp_path, dtype)
    sampler = run.sampler()
    gradients = []
    with sdpa_kernel(SDPBackend.MATH):  # whose gradients are the same each time
        outside = sampler.sample(0).images[0].tobytes()
        for interrupt in (False, True):
            torch.manual_seed(0)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "autocast"):
                loss = run.loss()
                if interrupt:
                    assert sampler.sample(1).images[0].tobytes() == outside
            loss.backward()
            gradients.append([p.grad.clone() for p in run.network.parameters() if p.grad is not None])
            run.optimizer.zero_grad()
    assert len(gradients[0]) > 20 and any(bool(g.any()) for g in gradients[0])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("kind", ["mapping", "module"])
def test_ema_weights_on_the_cpu_generate_beside_a_network_on_the_device(
    kind: str, models: dict[str, Path], device: torch.device, tmp_path: Path
) -> None:
    run, averages = Training(models["Flux"], device, tmp_path), tiny.flux(seed=1)
    samples = run.sampler(ema=averages.state_dict() if kind == "mapping" else averages).sample(1)
    live, averaged = (image.tobytes() for image in samples.images)
    run.network.load_state_dict(averages.state_dict())
    alone = run.sampler().sample(2).images[0].tobytes()
    assert averaged == alone != live
    assert all(p.device.type == "cpu" for p in averages.parameters())


# traces ---------------------------------------------------------------------------------------------------------------


def traced(network: Any, device: torch.device | str = "cpu") -> Any:
    with torch.no_grad(), record(network) as recording:
        latents, given = arguments(network)
        moved = [t.to(device) if isinstance(t, Tensor) else t for t in given]
        network.step(latents.to(device), network.prepare(*moved), 0)
    return recording


def test_recordings_of_two_devices_are_compared(device: torch.device) -> None:
    network = tiny.flux().to(device)
    found, plain, wide = traced(network, device), traced(tiny.flux()), traced(tiny.flux().double())
    assert {t.device.type for t in found.values()} == {"cpu"} and list(found) == list(wide)
    bound = max(far(plain[name], wide[name]) for name in wide)
    assert bound < 1e-4 and first_difference(found, wide, bound) is None
    with torch.no_grad():
        network.double_blocks[1].text.proj.bias += 0.1
    difference = first_difference(traced(network, device), wide, bound)
    assert difference is not None and difference.name.startswith("double_blocks.1.text.proj")


# float8 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_float8_layer_equals_the_cpus() -> None:
    """Where the GPU has such products; elsewhere `use_float8` says so."""
    if torch.cuda.get_device_capability() < (8, 9):
        with pytest.raises(ConfigError, match="capability 8.9"):
            use_float8(tiny.flux().to("cuda", torch.bfloat16))
        return
    network = tiny.flux().to("cuda", torch.bfloat16)
    assert 1e-3 < use_float8(network) < 0.5
    layer: Any = network.double_blocks[0].image.qkv
    x = torch.randn(128, layer.in_features).bfloat16()
    with torch.no_grad():
        (rows, scale), own = rounded(x), layer.weight8.cpu().double() * layer.weight_scale.cpu().double()[:, None]
        expected = (rows.double() * scale.double()[:, None]) @ own.T + layer.bias.cpu().double()
        assert type(layer) is Float8Linear and relative_l2(layer(x.cuda()).cpu(), expected) < 2**-7
