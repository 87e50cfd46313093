"""LoRAs beside peft's own layers on the same networks, live; and on the text encoders, by their files' names."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from eridiff.lora import Lora, attach_lora, load_lora, merge_into, merge_lora
from eridiff.lora.deltas import Item
from eridiff.lora.names import Target, names_of, network_of
from tests import tiny
from tests.loras import ask, bits, same, unchanged

UNET = replace(tiny.UNET, channels=32, transformer_depths=(0, 1, 0), middle_depth=1)
NETWORKS: dict[str, Callable[[], Any]] = {
    "flux": tiny.flux, "mmdit": tiny.mmdit, "unet": lambda: tiny.unet(UNET),
}  # fmt: skip
TARGETS = {
    "flux": ["image_in", "qkv", "linear1", "linear2", "modulation", "time_in.out_layer"],
    "mmdit": ["image_in", "qkv", "qkv2", "proj", "mlp.0"],
    "unet": ["conv_in", "conv2", "shortcut", "downsample.conv", "k", "proj_in", "mlp_in"],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 3}, "rslora": {"lora_alpha": 3, "use_rslora": True}, "dora": {"lora_alpha": 5, "use_dora": True},
    "bias": {"lora_alpha": 4, "lora_bias": True},
}  # fmt: skip


def with_peft(network: Any, family: str, options: dict[str, Any]) -> tuple[Any, Lora]:
    """peft's layers in a copy of the network, and the same matrices as our LoRA."""
    from peft import LoraConfig, inject_adapter_in_model

    other = copy.deepcopy(network)
    torch.manual_seed(4)
    targets = [n for n, m in other.named_modules() if n.endswith(tuple(TARGETS[family])) and hasattr(m, "weight")]
    if options.get("lora_bias"):  # which peft cannot merge into a layer without one
        targets = [n for n in targets if other.get_submodule(n).bias is not None]
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(config, other)
    other.double().eval()
    items = []
    for name, layer in peft_layers(other):
        if "use_dora" in options:
            length = layer.lora_magnitude_vector["default"].weight
            length.data *= 1 + torch.randn_like(length) / 5
        tensors = {"down": layer.lora_A["default"].weight.detach(), "up": layer.lora_B["default"].weight.detach()}
        if options.get("lora_bias"):
            tensors["up_bias"] = layer.lora_B["default"].bias.detach()
        if "use_dora" in options:
            tensors["magnitude"] = length.detach().flatten()
        ratio = options["lora_alpha"] / (2 if options.get("use_rslora") else 4)
        items.append(Item(name, Target(network_of(network), name), "lora", tensors, ratio))
    return other, Lora(tuple(items))


def peft_layers(network: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in network.named_modules() if hasattr(module, "lora_A")]


@torch.no_grad()
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("family", NETWORKS)
def test_outputs_and_merged_weights_equal_pefts(family: str, kind: str) -> None:
    network = NETWORKS[family]().double()
    other, lora = with_peft(network, family, OPTIONS[kind])
    assert len(lora.items) > 4
    plain = ask(network)
    attached = attach_lora(network, lora)
    for scale in (1.0, 0.35):
        for _, layer in peft_layers(other):
            layer.set_scale("default", scale)
        attached.set_scale(scale)
        found = ask(network)
        assert same(found, ask(other)) and not same(found, plain, 1e-3), scale
    attached.detach()
    state = merge_lora(network.state_dict(), lora, scale, dtype=torch.float64).state
    for name, layer in peft_layers(other):
        layer.merge()
        base = layer.get_base_layer()
        assert same(state[f"{name}.weight"], base.weight), name
        if kind == "bias" and base.bias is not None:
            assert same(state[f"{name}.bias"], base.bias), name
    assert len(peft_layers(other)) == len(lora.items)


# text encoders

ENCODERS: dict[str, Callable[[], Any]] = {"clip": tiny.clip_module, "clip_g": tiny.clip_module, "t5": tiny.t5_module}


def encode(module: Any) -> Tensor:
    output = module(input_ids=torch.tensor([[3, 5, 8, 1], [2, 9, 4, 1]]))
    return torch.cat(
        [output.last_hidden_state.flatten(1), *([output.text_embeds] if "text_embeds" in output else [])], 1
    )


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}


def write_lora(path: Path, prefix: str, module: nn.Module, form: str) -> int:
    """A file for every linear layer, in the module's own names as kohya's scripts or peft write them."""
    g = torch.Generator().manual_seed(6)
    tensors = {}
    for name, layer in linears(module).items():
        down, up = torch.randn(2, layer.in_features, generator=g), torch.randn(layer.out_features, 2, generator=g) / 5
        if form == "kohya":
            key = prefix + name.replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
        else:
            tensors |= {f"{prefix}{name}.lora_A.weight": down, f"{prefix}{name}.lora_B.weight": up}
    save_file(tensors, path)
    return len(linears(module))


@torch.no_grad()
@pytest.mark.parametrize(
    "network, form, prefix",
    [
        ("clip", "kohya", "lora_te1_"), ("clip", "kohya", "lora_te_"), ("clip_g", "kohya", "lora_te2_"),
        ("t5", "kohya", "lora_te3_"), ("clip", "peft", "text_encoder."), ("clip_g", "peft", "text_encoder_2."),
        ("t5", "peft", "text_encoder_2."), ("t5", "peft", "text_encoder_3."),
        ("clip", "peft", "text_encoders.clip_l.transformer."), ("t5", "peft", "text_encoders.t5xxl.transformer."),
    ],
)  # fmt: skip
def test_loras_of_text_encoders_are_found_attached_merged_and_taken_away(
    network: str, form: str, prefix: str, tmp_path: Path
) -> None:
    module = ENCODERS[network]().double()
    count = write_lora(tmp_path / "lora.safetensors", prefix, module, form)
    before, plain = bits(module), encode(module)
    lora = load_lora(tmp_path / "lora.safetensors", {network: module})
    assert lora.networks == (network,) and {i.target.module for i in lora.items} == linears(module).keys()
    attached = attach_lora(module, lora, 0.5)
    assert len(attached.all_branches()) == count and list(module.state_dict()) == list(before)
    found = encode(module)
    attached.detach()
    assert torch.equal(encode(module), plain) and not same(found, plain, 1e-3)
    with merge_into(module, lora, 0.5, dtype=torch.float64):
        assert same(encode(module), found)
    assert unchanged(module, before) and torch.equal(encode(module), plain)


@pytest.mark.parametrize("network", ENCODERS)
def test_names_of_a_text_encoder_hold_whatever_its_state_holds(network: str) -> None:
    module = ENCODERS[network]()
    names = names_of(network, module)
    for name in linears(module):
        target = names.find(name)
        assert target == Target(network, name) == names.find(name.replace(".", "_"))
    if network != "t5":  # older transformers kept these in the state dict
        module.register_buffer("text_model.embeddings.position_ids".rpartition(".")[2], torch.arange(77)[None])
        assert names_of(network, module).find(next(iter(linears(module)))) is not None
