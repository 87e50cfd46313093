"""What runs on a CPU runs on a GPU: every way from a prompt to an image, on a pretended GPU (`tests/pretend_gpu.py`)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import eridiff
import eridiff.inference.base
from eridiff import FluxInference, Prompt, SDXLInference
from eridiff.errors import ConfigError
from eridiff.inference import DiffusionInference
from tests import families, tiny
from tests.on_gpu import folder as folder
from tests.on_gpu import gpu as gpu
from tests.on_gpu import hole, modules, moved, photo, same
from tests.pretend_gpu import CUDA, PretendedGPU, pretend_gpu

SMALL_IMAGE: dict[str, Any] = {"width": 64, "height": 64, "steps": 4}


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
def test_modules_that_were_passed_may_lie_apart(family: str, gpu: PretendedGPU) -> None:
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


def test_images_and_masks_may_be_tensors_on_the_gpu(gpu: PretendedGPU) -> None:
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


def test_a_refiners_image_records_the_dtypes_of_both(tmp_path: Path) -> None:
    base = tiny.load(
        SDXLInference, tiny.write_sdxl_model(tmp_path / "base"), dtype={"unet": torch.float32, "clip": torch.bfloat16}
    )
    refiner = tiny.load(SDXLInference, tiny.write_sdxl_model(tmp_path / "refiner", tiny.SDXL_REFINER))
    settings = base.generate("a swan", refiner=refiner, seed=1, width=64, height=64, steps=4).settings[0]
    assert settings["dtypes"]["clip"] == "bfloat16"


def test_strips_make_no_float64_on_a_device(tmp_path: Path) -> None:
    with pretend_gpu():
        model = eridiff.load(tiny.write_model(tmp_path), progress=False, vae_rows=4)
        assert model.generate("a swan", seed=1, **SMALL_IMAGE).images


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


def test_a_condition_follows_the_network(gpu: PretendedGPU) -> None:
    """Of an autoencoder on the CPU, for Fill and Canny on the GPU."""
    for channels, given in ((384, {"image": photo(), "mask": hole()}), (128, {"control": photo()})):
        model = FluxInference(tiny.flux(replace(tiny.FLUX, in_channels=channels)), tiny.autoencoder(), progress=False)
        prompt = Prompt(families.conditioning(model))
        expected = model.generate(conditioning=prompt, steps=2, seed=1, **given).images[0]
        model.network.to("cuda")
        assert same(model.generate(conditioning=prompt, steps=2, seed=1, **given).images[0], expected)
