"""What says how a LoRA file is scaled or meant counts at every door, and what is not known is an error."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eridiff.errors import LoraError
from eridiff.lora import Lora, attach_lora, inject_lora, load_lora, merge_lora
from tests import tiny
from tests.loras import arguments, ask, bits, filled, item, same, some_lora, unchanged

NAME = "transformer_blocks.0.attn.to_out.0"
SAVED: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("LoraConfig", {"lora_alpha": 8}),
    "rslora": ("LoraConfig", {"lora_alpha": 8, "use_rslora": True}),
    "dora": ("LoraConfig", {"lora_alpha": 8, "use_dora": True}),
    "lora_bias": ("LoraConfig", {"lora_alpha": 8, "lora_bias": True}),
    "bias lora_only": ("LoraConfig", {"lora_alpha": 8, "bias": "lora_only"}),
    "bias all": ("LoraConfig", {"lora_alpha": 8, "bias": "all"}),
    "both biases": ("LoraConfig", {"lora_alpha": 8, "bias": "lora_only", "lora_bias": True}),
    "orthogonal": ("LoraConfig", {"lora_alpha": 8, "init_lora_weights": "orthogonal"}),
    "modules_to_save": ("LoraConfig", {"lora_alpha": 8, "modules_to_save": ["text_in", "q_norm"]}),
    "patterns": ("LoraConfig", {"lora_alpha": 8, "rank_pattern": {"linear1": 2}, "alpha_pattern": {"linear1": 16}}),
    "loha": ("LoHaConfig", {"alpha": 12}),
    "lokr": ("LoKrConfig", {"alpha": 12}),
    "lokr of two whole factors": ("LoKrConfig", {"alpha": 12, "r": 32}),
    "lokr patterns": ("LoKrConfig", {"alpha": 12, "alpha_pattern": {"linear1": 3}}),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", SAVED)
def test_a_peft_folder_and_its_file_compute_what_peft_does(kind: str, tmp_path: Path) -> None:
    import peft

    network = tiny.flux()
    config, options = SAVED[kind]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(peft, config)(**{"r": 4, "target_modules": ["image.qkv", "linear1"], **options})
        theirs = peft.get_peft_model(copy.deepcopy(network), made)
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
        theirs.save_pretrained(tmp_path)
    wanted, before = ask(theirs.base_model.model), bits(network)
    assert not same(wanted, ask(network), 1e-3)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        lora = load_lora(path, network)
        attached = attach_lora(network, lora)
        assert same(ask(network), wanted, 1e-6)
        attached.detach()
        assert unchanged(network, before)
        merged = copy.deepcopy(network)
        merged.load_state_dict(merge_lora(network.state_dict(), lora).state)
        assert same(ask(merged), wanted, 1e-5)


def peft_file(folder: Path, config: dict[str, Any] | None, prefix: str = "base_model.model.") -> Path:
    folder.mkdir(exist_ok=True)
    tensors = {f"{prefix}{NAME}.lora_A.weight": torch.ones(2, 32), f"{prefix}{NAME}.lora_B.weight": torch.ones(32, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8, **config}))
    return folder / "adapter_model.safetensors"


REFUSED = {
    "pissa": {"init_lora_weights": "pissa"}, "pissa_niter_16": {"init_lora_weights": "pissa_niter_16"},
    "OLoRA": {"init_lora_weights": "OLoRA"}, "corda": {"init_lora_weights": "corda"},
    "loftq": {"init_lora_weights": "loftq"}, "lora_ga": {"init_lora_weights": "lora_ga"},
    "'tomorrow'": {"init_lora_weights": "tomorrow"}, "fan_in_fan_out": {"fan_in_fan_out": True},
    "layer_replication": {"layer_replication": [[0, 2]]}, "a_key_to_come": {"a_key_to_come": 3},
    "use_qalora": {"use_qalora": True}, "trainable_token_indices": {"trainable_token_indices": [1]},
    "use_dora True": {"use_dora": True}, "modules_to_save 'text_in'": {"modules_to_save": ["text_in"]},
    "declares rank 3": {"r": 3}, "declares rank 5": {"rank_pattern": {"0": 5}}, "bias 'some'": {"bias": "some"},
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
@pytest.mark.parametrize("door", ["folder", "file", "no prefix", "metadata"])
def test_what_changes_the_meaning_is_refused_by_name_at_every_door(words: str, door: str, tmp_path: Path) -> None:
    path = peft_file(tmp_path, REFUSED[words], "" if door == "no prefix" else "base_model.model.")
    if door == "metadata":
        told = {f"transformer.{key}": value for key, value in ({"r": 2, "lora_alpha": 8} | REFUSED[words]).items()}
        names = {name.replace("base_model.model.", "transformer."): t for name, t in load_file(path).items()}
        save_file(names, tmp_path / "f.safetensors", {"lora_adapter_metadata": json.dumps(told)})
        path = tmp_path / "f.safetensors"
    with pytest.raises(LoraError, match=words):
        load_lora(path.parent if door == "folder" else path, tiny.flux())


@pytest.mark.parametrize("config", [
    {"init_lora_weights": value} for value in (True, False, "gaussian", "eva")
] + [{"use_dora": False, "lora_dropout": 0.1, "target_modules": ["to_out.0"], "a_key_to_come": None, "revision": "x"}])  # fmt: skip
def test_what_changes_no_meaning_loads(config: dict[str, Any], tmp_path: Path) -> None:
    (row,) = load_lora(peft_file(tmp_path, config), tiny.flux()).ledger
    assert (row.alpha, row.scale) == (8, 4)


def test_pefts_names_without_a_configuration_need_a_choice(tmp_path: Path) -> None:
    path = peft_file(tmp_path, None)
    with pytest.raises(LoraError, match=r"no alpha: peft has it in .*that file beside this one"):
        load_lora(path, tiny.flux())
    (row,) = load_lora(path, tiny.flux(), alpha_is_rank=True).ledger
    assert (row.alpha, row.scale, row.note) == (None, 1.0, "no alpha: scale 1")


WRAPPED = [
    "transformer._orig_mod.{}", "_orig_mod.transformer.{}", "transformer.module.{}", "module._orig_mod.{}",
    "transformer._fsdp_wrapped_module._checkpoint_wrapped_module.{}", "diffusion_model._orig_mod.{}",
    "base_model.model.transformer.{}", "base_model.model._orig_mod.{}",
]  # fmt: skip


@pytest.mark.parametrize("form", WRAPPED)
def test_what_wrappers_put_into_names_is_not_a_part_of_them(form: str, tmp_path: Path) -> None:
    inside = NAME.replace(".0.attn", ".0._orig_mod.attn")
    for name in (form.format(NAME), form.format(inside)):
        tensors = {
            f"{name}.lora_A.default_0.weight": torch.ones(2, 32),
            f"{name}.lora_B.default_0.weight": torch.ones(32, 2),
        }
        save_file(tensors, tmp_path / "f.safetensors")
        (row,) = load_lora(tmp_path / "f.safetensors", tiny.flux(), alpha_is_rank=True).ledger
        assert (row.status, row.module) == ("applied", "double_blocks.0.image.proj")


def test_wrappers_in_kohyas_names_too(tmp_path: Path) -> None:
    for name in (
        "lora_unet__orig_mod_double_blocks_0_img_attn_proj",
        "lora_unet_double_blocks_0__orig_mod_img_attn_proj",
    ):
        tensors = {f"{name}.lora_down.weight": torch.ones(2, 32), f"{name}.lora_up.weight": torch.ones(32, 2)}
        save_file(tensors, tmp_path / "f.safetensors")
        assert load_lora(tmp_path / "f.safetensors", tiny.flux()).ledger[0].module == "double_blocks.0.image.proj"


def test_a_loaded_lora_is_not_a_map_of_its_file(tmp_path: Path) -> None:
    path = peft_file(tmp_path, {})
    lora = load_lora(path, tiny.flux())
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
        file.truncate(16)
    assert all(bool((tensor == 1).all()) for tensor in lora.items[0].tensors.values())


@pytest.mark.parametrize("name", ["reshape", "incomplete", "project"])
def test_no_word_in_a_modules_name_turns_one_error_into_another(name: str, tmp_path: Path) -> None:
    network = nn.ModuleDict({name: nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    tensors = {
        f"{m}.lora_{x}.weight": torch.ones(2, 4) if x == "A" else torch.ones(4, 2) for m in network for x in "AB"
    }
    tensors[f"{name}.lora_A.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "f.safetensors")
    with pytest.raises(LoraError, match="not finite"):
        load_lora(tmp_path / "f.safetensors", network, allow_partial=True)


def test_bundled_embeddings_are_named_and_left_out(tmp_path: Path) -> None:
    tensors = load_file(peft_file(tmp_path, {})) | {"bundle_emb.fox.clip_l": torch.ones(2, 8)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    rows = load_lora(tmp_path, tiny.flux()).ledger
    assert [row.status for row in rows] == ["applied", "embedding"] and "'fox'" in rows[1].note


def test_the_sentence_says_what_a_lora_was_made_for(tmp_path: Path) -> None:
    names = (
        "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",
        "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight",
    )
    save_file(dict(zip(names, (torch.ones(2, 3072), torch.ones(3072, 2)), strict=True)), tmp_path / "f.safetensors")
    with pytest.raises(LoraError, match=r"made for Flux of width 3072 \(flux1-dev or -schnell\), and this one has 32"):
        load_lora(tmp_path / "f.safetensors", tiny.flux())
    wrong = {
        n.replace("_img_attn_proj", "_img_atn_proj"): torch.ones(2, 32) if "down" in n else torch.ones(32, 2)
        for n in names
    }
    save_file(wrong, tmp_path / "g.safetensors")
    with pytest.raises(
        LoraError, match="names look like Flux; .* the nearest is 'lora_unet_double_blocks_0_img_attn_proj'"
    ) as raised:
        load_lora(tmp_path / "g.safetensors", tiny.flux())
    assert "give the network it was made for" not in str(raised.value)


# beside the network


def first_layer(columns: int, seed: int = 5) -> Lora:
    from dataclasses import replace

    base = tiny.flux()
    found = item(base, "image_in", {"down": (3, columns), "up": (32, 3)}, seed=seed)
    return Lora((replace(found, tensors={n: t.float() for n, t in found.tensors.items()}),))


@torch.no_grad()
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_control_loras_and_others_come_and_go_in_any_order(order: tuple[int, ...]) -> None:
    network = tiny.flux()
    before, narrow = bits(network), network.config
    loras = [first_layer(64, 1), first_layer(128, 2), first_layer(128, 3)]
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1))
    weight, bias = network.image_in.weight.clone(), network.image_in.bias.clone()
    wanted = nn.functional.linear(x[..., :64], weight, bias)
    for lora in loras:
        (one,) = lora.items
        wanted = wanted + x[..., : one.tensors["down"].shape[1]] @ (one.tensors["up"] @ one.tensors["down"]).T
    sets = {n: attach_lora(network, loras[n]) for n in order}
    assert network.config.in_channels == 128 and same(network.image_in(x), wanted, 1e-6)
    for n in order:
        sets[n].detach()
        if any(sets[m].attached for m in (1, 2)):
            network.image_in(x)
    assert unchanged(network, before) and network.config == narrow


@torch.no_grad()
@pytest.mark.parametrize("family", ["flux", "unet"])
def test_a_lora_of_the_latents_alone_fits_a_wider_first_layer(family: str, tmp_path: Path) -> None:
    from dataclasses import replace

    from eridiff.models.flux import Flux
    from eridiff.models.unet import UNet

    if family == "flux":
        network: Any = Flux(replace(tiny.FLUX, in_channels=384))
        name, down, up = "img_in", torch.randn(2, 64), torch.randn(32, 2)
    else:
        network = UNet(replace(tiny.UNET, in_channels=9))
        name, down, up = "input_blocks_0_0", torch.randn(2, 4, 3, 3), torch.randn(64, 2, 1, 1)
    key = f"lora_unet_{name}"
    save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}, tmp_path / "f.safetensors")
    lora = load_lora(tmp_path / "f.safetensors", network)
    assert "for the latents alone" in lora.ledger[0].note
    layer = network.image_in if family == "flux" else network.conv_in
    change = (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
    padded = torch.zeros_like(layer.weight)
    padded[:, : change.shape[1]] = change
    merged = merge_lora(network.state_dict(), lora).state
    assert torch.allclose(merged[lora.items[0].target.name], layer.weight + padded)
    x = torch.randn(2, 3, 384) if family == "flux" else torch.randn(2, 9, 6, 6)
    plain = layer(x)
    wide = nn.functional.linear(x, padded) if family == "flux" else nn.functional.conv2d(x, padded, padding=1)
    attach_lora(network, lora)
    assert same(layer(x), plain + wide, 1e-5)


@torch.no_grad()
def test_two_loras_with_norms_add_up_and_come_off_in_any_order() -> None:
    network = tiny.flux()
    before, weight = bits(network), network.double_blocks[0].image.q_norm.weight
    original = weight.clone()
    loras = [Lora((item(network, "double_blocks.0.image.q_norm", {"w_norm": (16,)}, "norm", seed=s),)) for s in (1, 2)]
    changes = [lora.items[0].tensors["w_norm"].float() for lora in loras]
    first, second = (attach_lora(network, lora, scale) for lora, scale in zip(loras, (1.0, 0.5), strict=True))
    assert torch.allclose(weight, original + changes[0] + 0.5 * changes[1])
    first.set_scale(2.0)
    assert torch.allclose(weight, original + 2 * changes[0] + 0.5 * changes[1])
    first.detach()
    assert torch.allclose(weight, original + 0.5 * changes[1])
    second.detach()
    assert unchanged(network, before)


def test_training_goes_on_in_float32_unless_said() -> None:
    network = tiny.flux().to(torch.bfloat16)
    lora = some_lora(network)
    for options, dtype in (
        ({"trainable": True}, torch.float32), ({"trainable": True, "dtype": torch.bfloat16}, torch.bfloat16), ({}, torch.bfloat16),
    ):  # fmt: skip
        attached = attach_lora(network, lora, **options)
        assert {p.dtype for p in attached.parameters()} == {dtype}
        attached.detach()


@torch.no_grad()
def test_row_scales_serve_a_batch_of_positive_and_negative_prompts() -> None:
    layer = nn.Sequential(nn.Linear(8, 8)).double()
    attached = attach_lora(layer, some_lora(layer))
    x = torch.randn(4, 3, 8, dtype=torch.float64)
    whole = layer(x)
    attached.set_scale(torch.tensor([0.0, 1.0]))
    rows = layer(x)
    attached.set_scale(0.0)
    plain = layer(x)
    assert torch.equal(rows[::2], plain[::2]) and same(rows[1::2], whole[1::2])
    attached.set_scale(torch.tensor([0.0, 1.0, 1.0]))
    with pytest.raises(LoraError, match="a scale for each of 3 rows, and the batch has 4"):
        layer(x)


@torch.no_grad()
def test_a_scale_of_rows_is_as_exact_in_bfloat16_as_a_number() -> None:
    layer = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
    attached = attach_lora(layer, some_lora(layer))
    x = torch.randn(2, 5, 64).to(torch.bfloat16)
    attached.set_scale(0.7)
    number = layer(x)
    attached.set_scale(torch.tensor([0.7, 0.7], dtype=torch.float64))
    assert torch.equal(layer(x), number)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_merge_refuses_a_scale_that_is_not_a_number(scale: float) -> None:
    network = tiny.flux()
    lora = some_lora(network)
    for given in ((lora, scale), ([(lora, scale)], 1.0)):
        with pytest.raises(LoraError, match="a scale is a finite number"):
            merge_lora(network.state_dict(), *given)


def test_a_part_of_a_file_is_chosen_by_name(tmp_path: Path) -> None:
    clip = tiny.clip_module()
    te = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    tensors: dict[str, Tensor] = {
        f"{te}.lora_down.weight": torch.ones(2, 8), f"{te}.lora_up.weight": torch.ones(8, 2),
        "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(2, 32),
        "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": torch.ones(32, 2),
    }  # fmt: skip
    save_file(tensors, tmp_path / "f.safetensors")
    given = {"flux": tiny.flux(), "clip": clip}
    for part, network in (("network", "flux"), ("text_encoders", "clip")):
        lora = load_lora(tmp_path / "f.safetensors", given, part=part)
        assert lora.networks == (network,) and sorted(row.status for row in lora.ledger) == ["applied", "left out"]
    with pytest.raises(LoraError, match="part must be network or text_encoders, not 'unet'"):
        load_lora(tmp_path / "f.safetensors", given, part="unet")


@pytest.mark.parametrize("family", ["flux", "mmdit", "unet"])
@pytest.mark.parametrize("sides", [1, 2])
def test_rows_are_weighed_in_layers_that_are_asked_once_for_all_rows_too(family: str, sides: int) -> None:
    """The times are shared by all rows, positive and negative ones; each image is what it is with its own scale alone."""
    network: Any = {"flux": tiny.flux, "mmdit": tiny.mmdit, "unet": tiny.unet}[family]().double()
    lora = filled(inject_lora(network, 2, targets=["time_in.*", "*.modulation"], dtype=torch.float64))
    latents, (text, pooled, times, *rest) = arguments(network, 2, torch.float64)
    both = [torch.cat([t] * sides) for t in (latents, text, pooled)]
    rest = [torch.cat([t] * sides) if isinstance(t, Tensor) else t for t in rest]

    def drawn(scale: Any) -> Tensor:
        lora.set_scale(scale)
        run = network.prepare(both[1], both[2], times, *rest)
        return torch.stack([network.step(both[0], run, i) for i in range(2)], 1)

    one, other = drawn(0.3), drawn(-1.2)
    found = drawn(torch.tensor([0.3, -1.2], dtype=torch.float64))
    for row in range(2 * sides):
        assert torch.allclose(found[row], (one, other)[row % 2][row], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(one[1], other[1], rtol=1e-3)
