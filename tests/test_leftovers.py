"""What a file holds beside the tensors of its networks, and other writers' names for them."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import eridiff
from eridiff import load_network
from eridiff.cli import main
from eridiff.errors import CheckpointError, EridiffError
from eridiff.models.unet import UNet, UNetConfig
from eridiff.report import inspect, summary
from eridiff.text.encoders import build_encoder
from eridiff.weights.detect import component_of, detect
from eridiff.weights.header import open_checkpoint
from eridiff.weights.save import save_network
from tests import tiny
from tests.manifest import Tensors, read_manifest
from tests.sparse import write_sparse

State = dict[str, Tensor]


def prefixed(prefix: str, manifest: str) -> Tensors:
    return {prefix + name: value for name, value in read_manifest(manifest).items()}


def all_in_one_flux() -> Tensors:
    """Comfy-Org/flux1-dev-fp8 without its two leftovers: names as in its printed header, fp8 but for autoencoder and CLIP."""
    fp8 = prefixed("model.diffusion_model.", "flux1-dev") | prefixed("text_encoders.t5xxl.transformer.", "t5xxl")
    return {
        **{name: ("F8_E4M3", shape) for name, (_, shape) in fp8.items()},
        **prefixed("vae.", "ae"), **prefixed("text_encoders.clip_l.transformer.", "clip_l"),
    }  # fmt: skip


FLUX = all_in_one_flux()
SDXL = read_manifest("sd_xl_base_1.0")
SD3 = read_manifest("sd3.5-large") | {
    "text_encoders.clip_l.transformer." + name: value for name, value in read_manifest("clip_l").items()
}
LEFTOVERS = {  # files -> names beside their networks that hold nothing
    "Comfy-Org/flux1-dev-fp8": (FLUX, ["text_encoders.clip_l.logit_scale", "text_encoders.t5xxl.logit_scale"]),
    "an SD 3.5 that ComfyUI saved": (SD3, ["text_encoders.clip_l.logit_scale", "text_encoders.clip_g.logit_scale"]),
    "a merge by a node tool": (
        SDXL, ["conditioner.embedders.1.model.transformer.text_model.embeddings.position_ids", "conditioner.embedders.0.logit_scale"],
    ),
    "a training dump": (
        SDXL, ["model_ema.decay", "model_ema.num_updates", "model_ema.diffusion_modelinput_blocks00weight",
               "first_stage_model.loss.logvar", "loss.discriminator.main.0.weight"],
    ),
    "tables of the process": (SDXL, ["alphas_cumprod", "betas", "posterior_mean_coef1", "denoiser.log_sigmas"]),
    "an encoder of SD 1": (SDXL, ["cond_stage_model.transformer.text_model.final_layer_norm.weight", "cond_stage_model.logit_scale"]),
    "notes of ComfyUI": (FLUX, ["scaled_fp8", "text_encoders.t5xxl.scaled_fp8", "model.diffusion_model.__index_timestep_zero__"]),
    "of no network": (FLUX, ["somebody.elses.note"]),
    "the positions of a bare CLIP": (read_manifest("clip_l"), ["embeddings.position_ids", "text_model.positions.position_ids"]),
    "an autoencoder's loss": (read_manifest("ae"), ["loss.perceptual_loss.lin0.model.1.weight"]),
}  # fmt: skip


def told(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [
        record for record in caplog.records if record.name.startswith("eridiff") and record.levelno >= logging.WARNING
    ]


@pytest.mark.parametrize("file", LEFTOVERS)
def test_what_no_network_needs_is_left_out_with_one_warning_that_names_it(
    file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors, extra = LEFTOVERS[file]
    plain = inspect(write_sparse(tmp_path / "plain.safetensors", tensors))
    assert plain["problems"] == [] and not told(caplog)
    report = inspect(write_sparse(tmp_path / "m.safetensors", tensors | {name: ("F32", (2,)) for name in extra}))
    assert report["problems"] == []
    assert [c["used"] for c in report["components"]] == [c["used"] for c in plain["components"]]
    (record,) = told(caplog)
    said = record.getMessage()
    assert record.levelno == logging.WARNING and "m.safetensors" in said
    assert all(f"'{name}'" in said for name in sorted(extra)[:3])
    assert len(extra) <= 3 or f"and {len(extra) - 3} more tensors" in said
    assert "note: no network uses" in summary(report)


def test_the_most_used_flux_file_has_1442_tensors_and_loads(tmp_path: Path) -> None:
    tensors, extra = LEFTOVERS["Comfy-Org/flux1-dev-fp8"]
    path = write_sparse(tmp_path / "m.safetensors", tensors | {name: ("F32", ()) for name in extra})
    report = inspect(path)
    assert len(open_checkpoint(path).tensors) == 1442
    assert sum(c["used"] for c in report["components"]) == 1440 and report["problems"] == []


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    """A whole small Flux in one file, with other tensors beside it."""

    def write(**extra: Tensor) -> Path:
        folder = tiny.write_model(tmp_path / "m")
        state = {"model.diffusion_model." + n: t for n, t in load_file(folder / "flux.safetensors").items()}
        metadata = open_checkpoint(folder / "flux.safetensors").metadata
        names = {name.replace("__", "."): value for name, value in extra.items()}
        save_file(state | names, folder / "flux.safetensors", metadata=metadata)
        return folder

    return write


STRAY = "model__diffusion_model__img_im__weight"


def test_an_unused_tensor_below_a_networks_own_prefix_is_an_error_until_it_is_allowed(
    model: Callable[..., Path], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = model(**{STRAY: torch.zeros(2)})
    with pytest.raises(
        CheckpointError, match="1 are unknown, the first is 'img_im.weight', nearest to 'img_in.weight'"
    ):
        eridiff.load(folder, progress=False)
    caplog.clear()
    found = eridiff.load(folder, progress=False, allow_unknown=True)
    (said,) = [
        r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "does not use" in r.getMessage()
    ]
    assert "a Flux does not use 'img_im.weight', left out" in said
    assert torch.equal(found.network.image_in.weight, tiny.flux().image_in.weight)
    with pytest.raises(CheckpointError, match="img_im"):
        load_network(folder / "flux.safetensors")
    assert load_network(folder / "flux.safetensors", allow_unknown=True).config == found.network.config
    arguments = [
        "sample",
        "--model",
        str(folder),
        "--prompt",
        "a",
        "--size",
        "64x64",
        "--steps",
        "1",
        "--out",
        str(tmp_path / "o.png"),
    ]
    assert main(arguments) == 2 and "img_im" in capsys.readouterr().err
    assert main([*arguments, "--allow-unknown"]) == 0


def test_a_network_that_is_not_whole_is_not_a_leftover(tmp_path: Path) -> None:
    """Below a prefix that is always a network's own, what makes no network is an error, with what it lacks."""
    lacking = dict(FLUX)
    del lacking["vae.decoder.conv_in.weight"], lacking["model.diffusion_model.img_in.weight"]
    with pytest.raises(CheckpointError) as error:
        detect(open_checkpoint(write_sparse(tmp_path / "m.safetensors", lacking)))
    assert re.search("which needs 'model.diffusion_model.img_in.weight' too|looks like autoencoder", str(error.value))
    other = SDXL | {"text_encoders.t5xxl.transformer.shared.weight": ("F16", (32, 4))}
    with pytest.raises(
        CheckpointError, match=r"1 tensors of no part of a model.*'text_encoders.t5xxl.transformer.shared"
    ):
        detect(open_checkpoint(write_sparse(tmp_path / "m.safetensors", other)))
    found = detect(open_checkpoint(tmp_path / "m.safetensors"), allow_unknown=True)
    assert [c.network for c in found] == ["unet", "vae", "clip", "clip_g"]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({"img_in.weight": (4, 4)}, "'img_in.weight' is of a Flux, which needs 'double_blocks.0.img_attn.norm.key_norm.scale' too"),
        ({"joint_blocks.0.context_block.attn.qkv.weight": (4, 4)}, "is of a Stable Diffusion 3, which needs 'pos_embed' too"),
        ({"image_in.weight": (4, 4)}, r"\('image_in.weight' is near '.?img_in.weight'\)|near"),
        ({"lora_A.weight": (2, 2)}, r"is a LoRA.*\('lora_A.weight' is in it\)"),
        ({"a\nb": (2, 2)}, r"the first is 'a\\nb'"),
        ({"x" * 5000: (2, 2)}, r"the first is 'xxx.*\.\.\.x"),
    ],
)  # fmt: skip
def test_a_refusal_names_its_cause_on_one_short_line(
    names: dict[str, tuple[int, ...]], says: str, tmp_path: Path
) -> None:
    path = write_sparse(tmp_path / "m.safetensors", {name: ("F32", shape) for name, shape in names.items()})
    with pytest.raises(CheckpointError, match=says) as error:
        detect(open_checkpoint(path))
    text = str(error.value)
    assert "\n" not in text and len(text) <= 300
    assert not re.search(r"'([^']*)' is near '\1'", text)


NAMES = st.one_of(st.text(max_size=400), st.sampled_from(sorted(FLUX)).map(lambda name: name + "x" * 300))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(NAMES, max_size=4), base=st.sampled_from(["", "ae", "clip_l"]), dtype=st.sampled_from(["F32", "I8"])
)
def test_names_of_any_characters_and_length_give_one_short_line(
    names: list[str], base: str, dtype: str, tmp_path: Path
) -> None:
    tensors = (read_manifest(base) if base else {}) | {name: (dtype, (1,)) for name in names}
    try:
        report = inspect(write_sparse(tmp_path / "m.safetensors", tensors))
    except EridiffError as error:
        report = {"problems": [str(error)]}
    assert all("\n" not in text and len(text) <= 300 for text in report["problems"])


def test_the_refusal_of_a_unet_is_about_the_tensors_that_are_left(tmp_path: Path) -> None:
    """Never about those of an SDXL that is there."""
    stray = {"text_encoders.t5xxl.transformer.stray": ("F32", (2,))}
    with pytest.raises(CheckpointError) as error:
        detect(open_checkpoint(write_sparse(tmp_path / "m.safetensors", SDXL | stray)))
    assert "SDXL" not in str(error.value) and "'text_encoders.t5xxl.transformer.stray'" in str(error.value)


# other names ----------------------------------------------------------------------------------------------------------------


def renamed(state: State, change: Callable[[str], str]) -> State:
    return {change(name): tensor.contiguous() for name, tensor in state.items()}


def equal(found: torch.nn.Module, expected: torch.nn.Module) -> bool:
    own = expected.state_dict()
    return found.state_dict().keys() == own.keys() and all(
        torch.equal(t, own[n]) for n, t in found.state_dict().items()
    )


NETWORKS = {"flux": tiny.flux, "unet": tiny.unet, "mmdit": tiny.mmdit, "vae": tiny.autoencoder}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("which", ["all", "single_blocks"])
def test_norms_are_read_by_either_of_their_names_even_in_one_file(prefix: str, which: str, tmp_path: Path) -> None:
    path = save_network(tiny.flux(), tmp_path / "m.safetensors")
    some = lambda n: n.replace("_norm.scale", "_norm.weight") if which in ("all", n.split(".")[0]) else n  # noqa: E731
    state, metadata = load_file(path), open_checkpoint(path).metadata
    save_file(renamed(state, lambda n: prefix + some(n)), path, metadata=metadata)
    assert any("norm.weight" in name for name in open_checkpoint(path).tensors)
    assert equal(load_network(path), tiny.flux())


WRAPPERS = ["_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "module.module.{}",
            "_fsdp_wrapped_module._orig_mod.{}", "model.diffusion_model._orig_mod.{}"]  # fmt: skip


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("network", NETWORKS)
def test_wrappers_are_seen_through_wherever_they_are_in_a_name(network: str, layout: str, tmp_path: Path) -> None:
    expected = NETWORKS[network]()
    path = save_network(expected, tmp_path / "m.safetensors", layout=layout)
    state, metadata = load_file(path), open_checkpoint(path).metadata
    inside = {
        name: re.sub(r"\.(\d+)\.", r".\1._fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod.", name, count=1)
        for name in state
    }
    assert any(name != other for name, other in inside.items())
    for wrapper in ["{}", *WRAPPERS[: 5 if layout == "diffusers" or network == "vae" else 6]]:
        save_file(renamed(state, lambda n, w=wrapper: w.format(inside[n])), path, metadata=metadata)
        assert equal(load_network(path), expected), wrapper


def test_a_name_with_and_without_a_wrapper_is_one_too_many(tmp_path: Path) -> None:
    path = save_network(tiny.flux(), tmp_path / "m.safetensors")
    state = load_file(path)
    save_file(state | {"_orig_mod.img_in.bias": state["img_in.bias"].clone()}, path)
    with pytest.raises(CheckpointError, match="'img_in.bias' twice, with and without what a wrapper adds"):
        load_network(path)


@pytest.mark.parametrize("prefix", ["", "text_encoders.clip_l.transformer.", "conditioner.embedders.0.transformer."])
@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("flat", [False, True])
def test_a_clip_is_read_with_and_without_text_model_in_any_place(
    prefix: str, wrapper: str, flat: bool, tmp_path: Path
) -> None:
    module = tiny.clip_module()
    state = {name: t for name, t in module.state_dict().items() if "position_ids" not in name}
    change = (lambda n: n.removeprefix("text_model.")) if flat else (lambda n: n)
    path = tmp_path / "clip.safetensors"
    heads = {"clip": {"num_attention_heads": module.config.num_attention_heads}}  # narrower than published ones
    save_file(
        renamed(state, lambda n: prefix + wrapper + change(n)), path, metadata={"eridiff.config": json.dumps(heads)}
    )
    component = component_of(open_checkpoint(path), "clip", "clip_g")
    found = build_encoder(component, progress=False)
    assert component.layout.name == ("flat" if flat else "huggingface")
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("kind", ["huggingface", "openclip"])
def test_of_a_whole_clip_the_text_tower_is_taken(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """openai/clip-vit-large-patch14 in transformers' names, and an OpenCLIP in its own: one notice for the other tower."""
    manifest, tower = {
        "huggingface": ("clip_l", ["vision_model.embeddings.class_embedding", "vision_model.encoder.layers.0.mlp.fc1.weight",
                                   "visual_projection.weight", "text_model.embeddings.position_ids", "logit_scale"]),
        "openclip": ("clip_g-openclip", ["visual.conv1.weight", "visual.proj", "visual.transformer.resblocks.0.ln_1.bias"]),
    }[kind]  # fmt: skip
    tensors = read_manifest(manifest) | {name: ("F32", (2,)) for name in tower}
    report = inspect(write_sparse(tmp_path / "m.safetensors", tensors))
    assert report["problems"] == [] and [c["layout"] for c in report["components"]] == [kind]
    assert len(told(caplog)) == 1 and f"'{[n for n in sorted(tower) if 'vis' in n][0]}'" in caplog.text


# distilled networks ---------------------------------------------------------------------------------------------------------


def published_shapes(config: UNetConfig, layout: str) -> Tensors:
    from eridiff.weights.detect import sizes_of
    from eridiff.weights.keymap import key_map

    with torch.device("meta"):
        state = UNet(config).state_dict()
    entries = key_map("unet").layouts[layout].entries(state, sizes_of(config))
    return {
        name: ("F16", shape)
        for entry in entries
        for name, shape in zip(entry.foreign, entry.foreign_shapes(tuple(state[entry.native].shape)), strict=True)
    }


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize(("preset", "billions"), [("ssd-1b", 1.33), ("vega", 0.745)])
def test_distilled_sdxls_have_the_depths_of_their_files(
    preset: str, billions: float, layout: str, tmp_path: Path
) -> None:
    """The number of parameters is the one that segmind publishes."""
    tensors = published_shapes(UNetConfig.preset(preset), layout)
    report = inspect(write_sparse(tmp_path / "m.safetensors", tensors))
    (found,) = report["components"]
    assert report["problems"] == [] and found["config"] == vars(UNetConfig.preset(preset))
    assert found["parameters"] / 1e9 == pytest.approx(billions, rel=0.005)
    assert not any("middle_block.1" in name or "mid_block.attentions" in name for name in tensors)


def test_a_distilled_network_comes_back_with_every_bit_and_generates(tmp_path: Path) -> None:
    config = UNetConfig(
        4, 4, 32, (1, 2, 2), (0, 2, 1), 0, 32, 16, 40, up_depths=((0, 0, 0), (2, 1, 1), (1, 1, 3)), middle_blocks=1
    )
    torch.manual_seed(0)
    expected = UNet(config).eval().requires_grad_(False)
    inputs = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16), torch.randn(1, 40), torch.tensor([7.0])
    for layout in ("original", "diffusers"):
        path = save_network(expected, tmp_path / "m.safetensors", layout=layout)
        save_file(load_file(path), path)  # without the metadata: depths from names alone
        (tmp_path / "config.json").write_text('{"attention_head_dim": [1, 2, 2]}')
        found = load_network(tmp_path)
        assert found.config == config and equal(found, expected)
        torch.testing.assert_close(found(*inputs), expected(*inputs))


@pytest.mark.parametrize(
    ("drop", "says"),
    [
        (r"middle_block\.", "distilled SDXL of a kind that is not supported .KOALA"),
        (r"input_blocks\.5\.1\.", "distilled SDXL of a kind that is not supported .KOALA"),
    ],
)
def test_a_distilled_network_of_another_kind_is_named(drop: str, says: str, tmp_path: Path) -> None:
    tensors = {n: v for n, v in published_shapes(UNetConfig(), "original").items() if not re.match(drop, n)}
    with pytest.raises(CheckpointError, match=says):
        inspect(write_sparse(tmp_path / "m.safetensors", tensors))


def test_umt5_and_old_t5s_are_refused_by_name(tmp_path: Path) -> None:
    tensors = read_manifest("t5xxl")
    own = {
        f"encoder.block.{b}.layer.0.SelfAttention.relative_attention_bias.weight": ("F16", (32, 64)) for b in range(24)
    }
    with pytest.raises(CheckpointError, match="is a UMT5.*give T5 v1.1 XXL"):
        inspect(write_sparse(tmp_path / "m.safetensors", tensors | own))
    old = {n.replace("wi_0", "wi"): v for n, v in tensors.items() if "wi_1" not in n}
    with pytest.raises(CheckpointError, match="is a T5 of version 1.0.*DenseReluDense.wi.weight' is in it"):
        inspect(write_sparse(tmp_path / "m.safetensors", old))
