"""What other programs' own classes make of the same LoRA: lycoris, peft and diffusers, live."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionXLPipeline
from lycoris.modules import FullModule, IA3Module, LoConModule, LohaModule, LokrModule
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from eridiff import load_network
from eridiff.lora import Lora, attach_lora, inject_lora, load_lora, merge_lora, save_lora
from eridiff.lora.deltas import Item
from eridiff.lora.names import Target
from eridiff.models.flux import Flux, FluxConfig
from eridiff.trace.record import relative_l2
from eridiff.weights.detect import sizes_of
from eridiff.weights.keymap import key_map
from tests.lora_files import contents, write
from tests.test_diffusers import reference_flux, reference_sd3, reference_unet


def small_network() -> nn.Module:
    torch.manual_seed(0)
    layers = {
        "linear": nn.Linear(12, 20), "plain": nn.Linear(12, 20, bias=False), "convolution": nn.Conv2d(6, 8, 3, 2, 1),
        "one": nn.Conv2d(6, 8, 1), "dilated": nn.Conv2d(6, 4, (3, 1), dilation=2, padding=(2, 0)),
    }  # fmt: skip
    return nn.ModuleDict(layers).requires_grad_(False).double()


LYCORIS: dict[str, tuple[Any, dict[str, Any]]] = {
    "locon": (LoConModule, {}),
    "locon, Tucker": (LoConModule, {"use_tucker": True}),
    "locon, rank-stabilised": (LoConModule, {"rs_lora": True}),
    "locon, DoRA": (LoConModule, {"weight_decompose": True}),
    "locon, DoRA of the inputs": (LoConModule, {"weight_decompose": True, "wd_on_out": False}),
    "loha": (LohaModule, {}),
    "loha, Tucker": (LohaModule, {"use_tucker": True}),
    "loha, DoRA": (LohaModule, {"weight_decompose": True}),
    "lokr": (LokrModule, {"factor": 2}),
    "lokr, both factors of low rank": (LokrModule, {"factor": 2, "decompose_both": True, "lora_dim": 1}),
    "lokr, both factors whole": (LokrModule, {"full_matrix": True}),
    "lokr, Tucker": (LokrModule, {"factor": 2, "use_tucker": True}),
    "lokr, DoRA": (LokrModule, {"factor": 2, "weight_decompose": True}),
    "ia3": (IA3Module, {}),
    "ia3 of the inputs": (IA3Module, {"train_on_input": True}),
    "full": (FullModule, {}),
}


@pytest.mark.parametrize("name", LYCORIS)
def test_a_file_of_lycoris_does_what_its_own_modules_do(name: str, tmp_path: Path) -> None:
    """Compared with their `forward`: `get_merged_weight` of LoHa and LoKr multiplies by the scale twice."""
    kind, options = LYCORIS[name]
    network, g = small_network(), torch.Generator().manual_seed(1)
    x = {n: torch.randn((2, 5, 12) if isinstance(m, nn.Linear) else (2, 6, 7, 5), generator=g).double() for n, m in network.items()}  # fmt: skip
    for strength in (1.0,) if "DoRA" in name else (1.0, 0.5):
        theirs, tensors = copy.deepcopy(network), {}
        for layer, module in theirs.items():
            adapter = kind(layer, module, multiplier=strength, **{"lora_dim": 2, "alpha": 1.5, **options}).double()
            with torch.no_grad():
                for parameter in adapter.parameters():
                    if not any(parameter is own for own in module.parameters()):
                        parameter.add_(torch.randn(parameter.shape, generator=g.manual_seed(2)) / 4)
            adapter.apply_to()
            tensors |= {f"{layer}.{key}": t for key, t in saved(adapter).items()}
        lora = load_lora(write(tmp_path / "f.safetensors", tensors), network)
        assert {item.target.module for item in lora.items} == set(network)
        merged = copy.deepcopy(network)
        attached = attach_lora(network, lora, strength)
        merged.load_state_dict(merge_lora(network.state_dict(), lora, strength, dtype=torch.float64).state)
        for layer, given in x.items():
            expected = theirs[layer](given).detach()
            assert relative_l2(network[layer](given).detach(), expected) < 1e-5, layer
            assert relative_l2(merged[layer](given), expected) < 1e-5, layer
            assert relative_l2(small_network()[layer](given), expected) > 1e-3, layer
        attached.detach()


def saved(adapter: Any) -> dict[str, Tensor]:
    """What lycoris writes of a module."""
    own = getattr(adapter, "custom_state_dict", lambda: None)()
    found = adapter.state_dict() if own is None else own
    return {key: t.detach().clone() for key, t in found.items() if not key.startswith("org_module")}


REFERENCES: dict[str, Any] = {"flux": reference_flux, "mmdit": reference_sd3, "unet": reference_unet}


def pair(network: str, folder: Path) -> tuple[Any, Any]:
    """diffusers' small network, and eridiff's of the same weights."""
    theirs = REFERENCES[network]()
    theirs.save_pretrained(folder / "m")
    return theirs, load_network(folder / "m")


def made_lora(network: Any, targets: Any, alphas: tuple[float, ...]) -> Lora:
    """As after some training, with another alpha every so many modules."""
    g = torch.Generator().manual_seed(0)
    found = inject_lora(network, 2, targets=targets, generator=g).detach().lora()
    items = []
    for i, item in enumerate(found.items):
        tensors = {
            n: t.detach() if n == "down" else torch.randn(t.shape, generator=g) / 8 for n, t in item.tensors.items()
        }
        alpha = alphas[i % len(alphas)]
        items.append(dataclasses.replace(item, tensors=tensors, alpha=alpha, ratio=alpha / 2))
    return Lora(tuple(items))


def merged_as_theirs(network: str, ours: Any, lora: Lora) -> dict[str, Tensor]:
    """Our merged weights under diffusers' names."""
    state = merge_lora(ours.state_dict(), lora, dtype=torch.float64).state
    return key_map(network).layouts["diffusers"].to_foreign(state, sizes_of(ours.config))


def fused(theirs: Any) -> dict[str, Tensor]:
    theirs.fuse_lora()
    theirs.unload_lora()
    return theirs.state_dict()


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    moved = 0
    for name, tensor in expected.items():
        change = (tensor.reshape(found[name].shape) - plain[name]).abs().max()
        moved += int(change > 0)
        assert (found[name] - tensor.reshape(found[name].shape)).abs().max() <= 2e-6 * max(1.0, float(change)), name
    assert moved > 20


@pytest.mark.parametrize("network", REFERENCES)
def test_diffusers_fuses_our_diffusers_file_into_the_weights_of_our_merge(network: str, tmp_path: Path) -> None:
    """All linear layers and convolutions, alphas that differ from module to module, in the file's metadata."""
    theirs, ours = pair(network, tmp_path)
    plain = {name: t.clone() for name, t in theirs.state_dict().items()}
    lora = made_lora(ours, ["*"] + ["*conv*"] * (network == "unet"), (2.0, 1.0, 0.5))
    save_lora(lora, tmp_path / "pytorch_lora_weights.safetensors", ours, format="diffusers")
    prefix = "unet" if network == "unet" else "transformer"
    theirs.load_lora_adapter(str(tmp_path), weight_name="pytorch_lora_weights.safetensors", prefix=prefix)
    assert_same_weights(fused(theirs), merged_as_theirs(network, ours, lora), plain)


@pytest.mark.parametrize("network", REFERENCES)
def test_peft_reads_our_diffusers_file_with_the_configuration_in_it(network: str, tmp_path: Path) -> None:
    theirs, ours = pair(network, tmp_path)
    lora = made_lora(ours, ["*"], (2.0, 1.0, 0.5))
    path = save_lora(lora, tmp_path / "f.safetensors", ours, format="diffusers")
    tensors, metadata = contents(path)
    prefix = "unet." if network == "unet" else "transformer."
    said = {k.removeprefix(prefix): v for k, v in json.loads(metadata["lora_adapter_metadata"]).items()}
    inject_adapter_in_model(LoraConfig(**said), theirs)
    result = set_peft_model_state_dict(theirs, {n.removeprefix(prefix): t for n, t in tensors.items()})
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora_" in key]
    expected = merged_as_theirs(network, ours, lora)
    for name, module in theirs.named_modules():
        if hasattr(module, "get_delta_weight"):
            base = module.get_base_layer().weight
            found = base + module.get_delta_weight("default")
            assert relative_l2(found.detach(), expected[f"{name}.weight"].reshape(base.shape)) < 1e-6, name


def test_diffusers_reads_our_kohya_file_for_flux(tmp_path: Path) -> None:
    """The blocks alone: of embedders and the final layer its converter drops every key silently.

    linear1 apart, for which it has the published width wired in.
    """
    theirs, ours = pair("flux", tmp_path)
    plain = {name: t.clone() for name, t in theirs.state_dict().items()}
    lora = made_lora(ours, "blocks", (2.0, 1.0, 0.5))
    lora = Lora(tuple(item for item in lora.items if not item.key.endswith("linear1")))
    path = save_lora(lora, tmp_path / "f.safetensors", ours, format="kohya")
    converted, alphas = FluxPipeline.lora_state_dict(load_file(path), return_alphas=True)
    theirs.load_lora_adapter(converted, network_alphas=alphas, prefix="transformer")
    assert_same_weights(fused(theirs), merged_as_theirs("flux", ours, lora), plain)


def test_diffusers_splits_linear1_of_our_kohya_file_for_flux_as_we_do(tmp_path: Path) -> None:
    with torch.device("meta"):
        network = Flux(FluxConfig.preset("dev"))
    g = torch.Generator().manual_seed(0)
    tensors = {"down": torch.randn(4, 3072, generator=g), "up": torch.randn(21504, 4, generator=g)}
    lora = Lora((Item("", Target("flux", "single_blocks.7.linear1"), "lora", tensors, 0.25, 1.0, 4),))
    path = save_lora(lora, tmp_path / "f.safetensors", network, format="kohya")
    found = FluxPipeline.lora_state_dict(load_file(path))
    ours = load_lora(save_lora(lora, tmp_path / "g.safetensors", network, format="diffusers"), network)
    assert len(ours.items) == 4 and len(found) == 8
    for item in ours.items:
        expected = item.ratio * item.tensors["up"] @ item.tensors["down"][:, :9]
        theirs = found[f"{item.key}.lora_B.weight"] @ found[f"{item.key}.lora_A.weight"][:, :9]
        assert relative_l2(theirs, expected) < 1e-6, item.key


def test_diffusers_reads_our_kohya_file_for_sdxl(tmp_path: Path) -> None:
    """One alpha for all modules: its converter gives all attention layers the most frequent one."""
    theirs, ours = pair("unet", tmp_path)
    plain = {name: t.clone() for name, t in theirs.state_dict().items()}
    lora = made_lora(ours, ["down.*", "middle.*", "up.*"], (1.0,))
    path = save_lora(lora, tmp_path / "f.safetensors", ours, format="kohya")
    converted, alphas = StableDiffusionXLPipeline.lora_state_dict(load_file(path), unet_config=theirs.config)
    theirs.load_lora_adapter(converted, network_alphas=alphas, prefix="unet")
    assert_same_weights(fused(theirs), merged_as_theirs("unet", ours, lora), plain)
