"""What a file is, and that every key of it is used, carried or named in an error."""

import json
import os
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
from eridiff.errors import CheckpointError, ConfigError, EridiffError
from eridiff.files import replacing
from eridiff.inference.family import Family
from eridiff.inference.settings import sampled_as
from eridiff.models.mmdit import MMDiTConfig
from eridiff.models.unet import UNetConfig
from eridiff.report import inspect
from eridiff.weights.detect import component_of, detect
from eridiff.weights.header import open_checkpoint
from eridiff.weights.save import save_network, write_tensors
from tests import tiny
from tests.manifest import Tensors, read_manifest
from tests.sparse import sparse_manifest, write_sparse

State = dict[str, Tensor]


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Callable[[State], object]], Path]:
    """Writes the tiny Flux in the original layout after a function changed its tensors."""

    def write(change: Callable[[State], object]) -> Path:
        path = save_network(tiny.flux(), tmp_path / "flux.safetensors")
        state, metadata = load_file(path), open_checkpoint(path).metadata
        change(state)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata=metadata)
        return path

    return write


def swap(state: State, old: str, new: str) -> None:
    state[new] = state.pop(old)


def prefixed(state: State, prefix: str) -> None:
    for name in list(state):
        swap(state, name, prefix + name)


def no_metadata_prefix(state: State) -> None:
    for name in list(state):
        state["model.diffusion_model." + name] = state[name].clone()


MISSING = "double_blocks.1.img_attn.qkv.weight"
CASES: dict[str, tuple[Callable[[State], object], str]] = {
    "31 a weight is missing": (lambda s: s.pop(MISSING), f"1 tensors are missing, the first is '{MISSING}'"),
    "32 an unknown key": (lambda s: s.update({"img_im.weight": torch.zeros(2)}), "'img_im.weight', nearest to 'img_in.weight'"),
    "33 a misspelt key": (
        lambda s: swap(s, MISSING, "double_blocks.1.img_attn.qky.weight"), "missing, .*qkv.weight.* unknown, .*qky.weight",
    ),
    "34 a transposed matrix": (
        lambda s: s.update({"img_in.weight": s["img_in.weight"].T.contiguous()}), r"img_in.weight' has the shape \[64, 32\].*\[32, 64\]",
    ),
    "36 a block is missing": (
        lambda s: [swap(s, n, n.replace(".1.", ".3.", 1)) for n in list(s) if n.startswith("single_blocks.1.")],
        "single_blocks.1.*missing|missing.*single_blocks.1",
    ),
    "37 twice under two prefixes": (no_metadata_prefix, "a Flux twice"),
    "45 a LoRA": (lambda s: [prefixed(s, "x."), s.update({"x.lora_A.weight": torch.zeros(2)})], "is a LoRA"),
    "46 a ControlNet": (lambda s: [s.clear(), s.update({"control_model.a": torch.zeros(2)})], "is a ControlNet"),
    "Redux": (lambda s: [s.clear(), s.update({"redux_up.weight": torch.zeros(2)})], "Redux"),
    "47 Stable Diffusion 1": (
        lambda s: [s.clear(), s.update({"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight":
                                        torch.zeros(320, 768)})], "is Stable Diffusion 1.x",
    ),
    "48 Stable Diffusion 2": (
        lambda s: [s.clear(), s.update({"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight":
                                        torch.zeros(320, 1024)})], "is Stable Diffusion 2.x",
    ),
    "SDXL": (
        lambda s: [s.clear(), s.update({"model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight":
                                        torch.zeros(640, 2048)})], "is a part of an SDXL",
    ),
    "53 NF4": (lambda s: s.update({"img_in.weight.absmax": torch.zeros(2)}), "NF4"),
    "FLUX.2": (lambda s: [s.clear(), s.update({"single_stream_modulation.lin.weight": torch.zeros(2)})], "FLUX.2"),
    "nothing known": (lambda s: [s.clear(), s.update({"a.b": torch.zeros(2)})], "not a model that eridiff knows"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_file_is_named(case: str, saved: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    change, says = CASES[case]
    path = saved(change)
    with pytest.raises(CheckpointError, match=says) as error:
        load_network(path)
    assert "flux.safetensors" in str(error.value)
    assert main(["sample", "--model", str(path), "--prompt", "x"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "module.", "transformer."])
def test_a_prefix_on_every_key_loads(prefix: str, saved: Callable[..., Path]) -> None:
    path = saved(lambda state: prefixed(state, prefix))
    found, expected = load_network(path).state_dict(), tiny.flux().state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_saved_network_loads_with_every_bit(layout: str, tmp_path: Path) -> None:
    for model in (tiny.flux(), tiny.autoencoder()):
        path = save_network(model, tmp_path / "m.safetensors", layout=layout)
        found = load_network(path)
        assert found.config == model.config
        assert all(torch.equal(found.state_dict()[n], t) for n, t in model.state_dict().items())


def test_a_network_whose_blocks_were_compiled_one_by_one_is_saved_under_plain_names(tmp_path: Path) -> None:
    model = tiny.flux()
    plain = save_network(model, tmp_path / "plain.safetensors").read_bytes()
    model.double_blocks[0] = torch.compile(model.double_blocks[0])
    assert save_network(model, tmp_path / "m.safetensors").read_bytes() == plain


def test_loading_keeps_the_file_and_its_dtype(tmp_path: Path) -> None:
    path = save_network(tiny.flux(), tmp_path / "m.safetensors", dtype=torch.bfloat16)
    model = load_network(path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_network(path, dtype=torch.float64).parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


# fp8 ------------------------------------------------------------------------------------------------------------------


def quantised(state: State, scale: str | None, marker: bool = False) -> None:
    for name in [n for n in state if n.endswith(".weight") and state[n].ndim == 2]:
        amount = state[name].abs().max() / 448
        state[name] = (state[name] / (amount if scale else 1)).to(torch.float8_e4m3fn)
        if scale:
            state[name.removesuffix(".weight") + scale] = amount
    if marker:
        state["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("scale", [None, ".scale_weight", ".weight_scale"])
def test_fp8_is_multiplied_in_float32_then_cast_once(scale: str | None, saved: Callable[..., Path]) -> None:
    path = saved(lambda state: quantised(state, scale, marker=scale is not None))
    stored = load_file(path)
    expected = stored["img_in.weight"].float() * (stored["img_in" + scale] if scale else 1)
    found = load_network(path).image_in.weight
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("img_in.scale_weight"), "'img_in.weight' has no scale"),
        (lambda s: s.update({"img_in.scale_weight": torch.tensor(float("nan"))}), "not a positive scale"),
        (lambda s: s.update({"img_in.scale_weight": torch.tensor(0.0)}), "not a positive scale"),
        (lambda s: s.update({"img_in.scale_weight": torch.ones(2)}), "not a positive scale"),
        (lambda s: s.update({"nowhere.scale_weight": torch.ones(1)}), "nowhere.scale_weight"),
    ],
)
def test_a_wrong_fp8_scale_is_named(change: Callable[[State], object], says: str, saved: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=says):
        load_network(saved(lambda state: [quantised(state, ".scale_weight"), change(state)]))


# published headers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("manifest", "network", "layout"),
    [
        *((f"flux1-{v}", "flux", "original") for v in ("dev", "schnell", "fill-dev", "canny-dev", "depth-dev")),
        *((f"flux1-{v}-diffusers-transformer", "flux", "diffusers") for v in ("dev", "schnell", "fill-dev", "canny-dev", "depth-dev")),
        ("ae", "vae", "original"), ("flux1-diffusers-vae", "vae", "diffusers"), ("sdxl-first-stage", "vae", "original"),
        ("clip_l", "clip", "huggingface"), ("clip_g-hf", "clip_g", "huggingface"), ("clip_g-openclip", "clip_g", "openclip"),
        ("t5xxl", "t5", "huggingface"),
    ],
)  # fmt: skip
def test_a_published_header_is_used_whole(manifest: str, network: str, layout: str, tmp_path: Path) -> None:
    path = sparse_manifest(tmp_path / "m.safetensors", manifest)
    report = inspect(path)
    (found,) = report["components"]
    assert (found["network"], found["layout"], report["problems"]) == (network, layout, [])
    assert found["tensors"] == len(read_manifest(manifest))
    carried = {"logit_scale"} if manifest == "clip_g-openclip" else set()
    assert set(found["unused"]) == carried


@pytest.mark.parametrize(("manifest", "preset"), [("sd_xl_base_1.0", "base"), ("sd_xl_refiner_1.0", "refiner")])
def test_a_published_sdxl_file_is_used_whole(manifest: str, preset: str, tmp_path: Path) -> None:
    """UNet, autoencoder and the text encoders, CLIP-G in OpenCLIP's names; what is carried is named."""
    report = inspect(sparse_manifest(tmp_path / "m.safetensors", manifest))
    found = {c["network"]: c for c in report["components"]}
    assert (
        list(found) == ["unet", "vae", *(["clip"] if preset == "base" else []), "clip_g"] and report["problems"] == []
    )
    assert found["unet"]["config"] == vars(UNetConfig.preset(preset)) and found["clip_g"]["layout"] == "openclip"
    assert (found["vae"]["config"]["scale"], found["vae"]["config"]["quant_convolutions"]) == (0.13025, True)
    unused = {name for c in found.values() for name in c["unused"]}
    assert unused == {"logit_scale", *(["text_model.embeddings.position_ids"] if preset == "base" else [])}
    assert sum(c["tensors"] for c in found.values()) == len(read_manifest(manifest))


@pytest.mark.parametrize(
    "manifest",
    [
        "sdxl-base-unet-diffusers",
        "sdxl-refiner-unet-diffusers",
        "sdxl-inpaint-unet-diffusers",
        "sdxl-inpaint-unet-original",
    ],
)
def test_a_published_unet_alone_is_used_whole(manifest: str, tmp_path: Path) -> None:
    (found,) = inspect(sparse_manifest(tmp_path / "m.safetensors", manifest))["components"]
    assert found["network"] == "unet" and found["unused"] == []
    assert found["config"] == vars(UNetConfig.preset(manifest.split("-")[1]))


@pytest.mark.parametrize("variant", ["sd3-medium", "sd3.5-medium", "sd3.5-large"])
def test_a_published_sd3_file_is_used_whole_in_both_layouts(variant: str, tmp_path: Path) -> None:
    """The single file holds the autoencoder too, with SD 3's statistics; the folder's config.json agrees or is refused."""
    preset = MMDiTConfig.preset(variant)
    report = inspect(sparse_manifest(tmp_path / "m.safetensors", variant))
    found = {c["network"]: c for c in report["components"]}
    assert list(found) == ["mmdit", "vae"] and report["problems"] == []
    assert [c["unused"] for c in found.values()] == [[], []]
    assert sum(c["tensors"] for c in found.values()) == len(read_manifest(variant))
    assert found["mmdit"]["config"] == vars(preset)
    assert (found["vae"]["config"]["scale"], found["vae"]["config"]["shift"]) == (1.5305, 0.0609)

    folder = tmp_path / "transformer"
    folder.mkdir()
    manifest = f"{variant}-transformer-diffusers"
    path = sparse_manifest(folder / "diffusion_pytorch_model.safetensors", manifest)
    stated = {
        "num_layers": preset.depth,
        "pos_embed_max_size": preset.table_side,
        "dual_attention_layers": list(preset.dual_blocks),
    }
    (folder / "config.json").write_text(json.dumps(stated))
    (component,) = inspect(folder)["components"]
    assert component["config"] == vars(preset) and component["unused"] == [] and inspect(path)["problems"] == []
    (folder / "config.json").write_text(json.dumps(stated | {"num_layers": 99}))
    with pytest.raises(ConfigError, match="num_layers 99, the tensors say"):
        inspect(folder)


def test_the_all_in_one_sd3_files_hold_every_part(tmp_path: Path) -> None:
    """sd3_medium_incl_clips (no T5) and its sister with T5; a file that lacks the table is not a model."""
    tensors = read_manifest("sd3-medium")
    for place, manifest in (("clip_l", "clip_l"), ("clip_g", "clip_g-hf"), ("t5xxl", "t5xxl")):
        if place == "t5xxl":
            report = inspect(write_sparse(tmp_path / "clips.safetensors", tensors))
            assert [c["network"] for c in report["components"]] == ["mmdit", "vae", "clip", "clip_g"]
        prefix = f"text_encoders.{place}.transformer."
        tensors |= {prefix + name: value for name, value in read_manifest(manifest).items()}
    report = inspect(write_sparse(tmp_path / "all.safetensors", tensors))
    assert [c["network"] for c in report["components"]] == ["mmdit", "vae", "clip", "clip_g", "t5"]
    assert report["problems"] == [] and sum(c["tensors"] for c in report["components"]) == 1668
    del tensors["model.diffusion_model.pos_embed"]
    with pytest.raises(
        CheckpointError,
        match="490 tensors of no part of a model: .*Diffusion 3, which needs .*pos_embed' too",
    ):
        inspect(write_sparse(tmp_path / "less.safetensors", tensors))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_in_a_header_is_read_or_refused_in_a_sentence(data: st.DataObject, tmp_path: Path) -> None:
    """One tensor of a published header gets another shape; no other exception leaves the loader."""
    manifest = data.draw(
        st.sampled_from(
            ["flux1-schnell", "sd3.5-medium", "sd_xl_refiner_1.0", "ae", "clip_l", "clip_g-openclip", "t5xxl"]
        )
    )
    tensors = read_manifest(manifest)
    name = data.draw(st.sampled_from(sorted(tensors)[:40] + sorted(tensors)[-40:]))
    shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=5)))
    try:
        inspect(write_sparse(tmp_path / "m.safetensors", tensors | {name: (tensors[name][0], shape)}))
    except EridiffError as error:
        assert "m.safetensors" in str(error) and "\n" not in str(error)


def test_an_incomplete_extra_block_is_named(tmp_path: Path) -> None:
    extra = {
        name.replace(".0.", ".19.", 1): value
        for name, value in read_manifest("flux1-dev").items()
        if name.startswith("double_blocks.0.") and "norm" not in name
    }
    path = sparse_manifest(tmp_path / "m.safetensors", "flux1-dev", add=extra)
    (problem,) = inspect(path)["problems"]
    assert "4 tensors are missing" in problem and "double_blocks.19.img_attn.norm" in problem


def test_an_all_in_one_file_holds_four_parts(tmp_path: Path) -> None:
    tensors = {}
    for prefix, manifest in (("model.diffusion_model.", "flux1-schnell"), ("vae.", "ae"),
                             ("text_encoders.clip_l.transformer.", "clip_l"), ("text_encoders.t5xxl.transformer.", "t5xxl")):  # fmt: skip
        tensors |= {prefix + name: value for name, value in read_manifest(manifest).items()}
    assert len(tensors) == 776 + 244 + 196 + 220
    report = inspect(write_sparse(tmp_path / "all.safetensors", tensors))
    assert [c["network"] for c in report["components"]] == ["flux", "vae", "clip", "t5"] and report["problems"] == []


def test_a_key_of_no_part_below_a_networks_prefix_is_named(tmp_path: Path) -> None:
    stray: Tensors = {"text_encoders.t5xxl.transformer.stray.weight": ("F16", (2, 2))}
    path = sparse_manifest(tmp_path / "m.safetensors", "ae", prefix="vae.", add=stray)
    with pytest.raises(CheckpointError, match="no part of a model: the first is '.*stray.weight'"):
        detect(open_checkpoint(path))


def test_sharded_t5_has_one_name_for_its_embedding(tmp_path: Path) -> None:
    path = sparse_manifest(tmp_path / "m.safetensors", "t5xxl", drop=("encoder.embed_tokens.weight",))
    assert inspect(path)["problems"] == []


def test_a_part_given_as_another_is_named(tmp_path: Path) -> None:
    ae, clip = (
        sparse_manifest(tmp_path / "ae.safetensors", "ae"),
        sparse_manifest(tmp_path / "clip.safetensors", "clip_l"),
    )
    with pytest.raises(CheckpointError, match="holds an autoencoder, not a Flux"):
        component_of(open_checkpoint(ae), "flux")
    with pytest.raises(CheckpointError, match="holds a text encoder, which load_encoder loads"):
        load_network(clip)
    with pytest.raises(
        CheckpointError, match="holds a CLIP text encoder and an autoencoder and no denoising network; pass a Flux or"
    ):
        eridiff.load({"vae": ae, "clip": clip})


def test_a_config_that_contradicts_the_shapes_is_refused(tmp_path: Path) -> None:
    path = save_network(tiny.flux(), tmp_path / "m.safetensors")
    state = load_file(path)
    for text, error in [('{"flux": {"rope_axes": [4, 4, 4]}}', ConfigError), ('{"flux": {"hidden": 64}}', EridiffError),
                        ("not json", ConfigError), ('{"flux": {"nonsense": 1}}', ConfigError)]:  # fmt: skip
        save_file(state, path, metadata={"eridiff.config": text})
        with pytest.raises(error):
            load_network(path)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_layers": 3}, "config.json says num_layers 3, the tensors say 2"),
        ({"guidance_embeds": False}, "says guidance_embeds False, the tensors say True"),
        (
            {"axes_dims_rope": ["4", 6, 6]},
            r"says axes_dims_rope \['4', 6, 6\], three even sizes are needed that add up to the",
        ),
        (
            {"axes_dims_rope": [4, 4, 4]},
            r"\[4, 4, 4\], three even sizes are needed that add up to the 16 features of a head",
        ),
    ],
)
def test_a_config_json_that_contradicts_the_tensors_is_refused(
    config: dict[str, object], says: str, tmp_path: Path
) -> None:
    state = load_file(save_network(tiny.flux(), tmp_path / "model.safetensors"))
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"axes_dims_rope": [4, 6, 6]} | config))
    with pytest.raises(ConfigError, match=says):
        load_network(tmp_path)


SIZED = {  # network -> how it is made, and published names of tensors whose sizes others are computed from
    "flux": (tiny.flux, ("img_in.weight", "double_blocks.0.img_attn.norm.key_norm.scale", "double_blocks.0.img_mlp.0.weight")),
    "mmdit": (tiny.mmdit, ("x_embedder.proj.weight", "pos_embed", "joint_blocks.0.context_block.attn.ln_k.weight")),
    "unet": (tiny.unet, ("input_blocks.0.0.weight", "input_blocks.1.0.in_layers.2.weight", "label_emb.0.0.weight")),
    "vae": (tiny.autoencoder, ("encoder.conv_in.weight", "decoder.conv_in.weight")),
}  # fmt: skip


@pytest.mark.parametrize(("network", "name"), [(kind, name) for kind, (_, names) in SIZED.items() for name in names])
def test_a_tensor_of_size_0_is_an_error_that_names_it(network: str, name: str, tmp_path: Path) -> None:
    state = load_file(save_network(SIZED[network][0](), tmp_path / "m.safetensors"))
    for axis in range(state[name].ndim):
        path = write_tensors(
            {**state, name: state[name].narrow(axis, 0, 0).clone()}, tmp_path / "empty.safetensors", {}
        )
        with pytest.raises(CheckpointError, match=rf"empty.safetensors': '{name}' of the shape \[.*\] is empty"):
            load_network(path)


@pytest.mark.parametrize(
    ("network", "name", "says"),
    [
        ("flux", "img_in.weight", "a width of 33 is not a multiple of the 16 features of a head"),
        ("flux", "double_blocks.0.img_attn.norm.key_norm.scale", "a width of 32 is not a multiple of the 17 features"),
        ("mmdit", "x_embedder.proj.weight", "a width of 129 is not a multiple of the 64 features of a head"),
        ("unet", "input_blocks.0.0.weight", r"no unet has this configuration: num_channels \(65\) must be divisible"),
        ("vae", "encoder.conv_in.weight", r"no vae has this configuration: num_channels \(33\) must be divisible"),
    ],
)
def test_a_width_that_cannot_be_divided_is_an_error(network: str, name: str, says: str, tmp_path: Path) -> None:
    state = load_file(save_network(SIZED[network][0](), tmp_path / "m.safetensors"))
    path = write_tensors({**state, name: torch.cat([state[name], state[name][:1]])}, tmp_path / "wide.safetensors", {})
    with pytest.raises((CheckpointError, ConfigError), match=f"wide.safetensors.*: {says}"):
        load_network(path)


def test_the_heads_of_a_narrow_clip_have_to_be_stated(tmp_path: Path) -> None:
    path = write_tensors(tiny.clip_module().state_dict(), tmp_path / "model.safetensors", {})
    with pytest.raises(
        ConfigError, match="a width of 8 is not a multiple of the 64 features.*give num_attention_heads"
    ):
        eridiff.load_encoder(path)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2, "hidden_act": "gelu"}')
    assert eridiff.load_encoder(path).config.num_attention_heads == 2


WRONG_SAMPLING: list[tuple[str, str, str]] = [  # variant, JSON, the message
    ("dev", '{"stepz": 4}', "there is no stepz among steps, cfg_scale, sampler"),
    ("dev", '{"__class__": 4}', "there is no __class__ among steps"),
    ("dev", '{"clip_windows": "all"}', "there is no clip_windows among steps"),
    ("dev", '{"steps": 0}', "steps must be at least 1, not 0"),
    ("dev", '{"steps": 2.0}', "steps must be a whole number, not 2.0"),
    ("dev", '{"steps": null}', "steps must be a whole number, not None"),
    ("dev", '{"cfg_scale": NaN}', "cfg_scale must be between 0 and 1000, not nan"),
    ("dev", '{"guidance_scale": -1}', "guidance_scale must be between 0 and 1000, not -1.0"),
    ("dev", '{"text_length": 513}', "text_length must be between 1 and 512, not 513"),
    ("dev", '{"shift": 3.0}', "shift must be true or false, not 3.0"),
    ("dev", '{"width": 1001}', "the width must be a multiple of 16, not 1001"),
    ("dev", '{"sampler": "eulr"}', "sampler must be one of euler, "),
    ("dev", '{"sampler": "plms"}', "sampler must be one of euler, "),
    ("sd3.5-medium", '{"script_shift": 0}', "script_shift must be between 0.01 and 100, not 0.0"),
    ("sd3.5-medium", '{"t5_padding": "both"}', "t5_padding must be one of original, diffusers, not 'both'"),
    ("sd3.5-medium", '{"without_t5": ""}', "without_t5 must be one of zeros, none, not ''"),
    ("sd3.5-medium", '{"skip_layers": true}', "skip_layers must be {blocks, scale, start, end}, not True"),
    ("sd3.5-medium", '{"skip_layers": {"block": [1]}}', "'block' is not a key of skip_layers; did you mean 'blocks'?"),
    ("base", '{"sampler": "dpmpp_2m_rf"}', "sampler must be one of euler, "),
    ("base", '{"schedule": "kaaras"}', "schedule must be one of leading, "),
    ("base", '{"clip_windows": "some"}', "clip_windows must be one of first, all, not 'some'"),
    ("base", '{"empty_negative": "none"}', "empty_negative must be one of zeros, encoded, not 'none'"),
]  # fmt: skip


@pytest.mark.parametrize(("variant", "told", "says"), WRONG_SAMPLING, ids=[f"{v} {t}" for v, t, _ in WRONG_SAMPLING])
def test_a_file_that_is_sampled_in_an_impossible_way_is_named(variant: str, told: str, says: str) -> None:
    (kind,) = (kind for kind in Family.kinds.values() if variant in kind.variants)
    with pytest.raises(ConfigError, match=f"^one.safetensors is invalid: {re.escape(says)}"):
        sampled_as(kind.variants[variant], json.loads(told), "one.safetensors")


def test_the_defaults_of_all_variants_are_possible() -> None:
    for kind in Family.kinds.values():
        for usual in kind.variants.values():
            given = {**vars(usual), "skip_layers": None} if "skip_layers" in vars(usual) else vars(usual)
            assert vars(sampled_as(usual, given, "")) == given


def test_a_wrong_word_of_a_models_sampling_names_its_file(tmp_path: Path) -> None:
    tiny.write_sd3_model(tmp_path, t5_padding="both")
    says = "sd3.safetensors: the metadata eridiff.sampling is invalid: t5_padding must be one of original, diffusers, not 'both'"
    with pytest.raises(ConfigError, match=re.escape(says)):
        eridiff.load(tmp_path, progress=False)


def test_the_folder_of_another_pipeline_is_named(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "m")
    (tmp_path / "m" / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    with pytest.raises(CheckpointError, match="folder of a PixArtAlphaPipeline, not of Flux"):
        eridiff.load(tmp_path / "m")
    (tmp_path / "m" / "model_index.json").write_text("{")
    with pytest.raises(CheckpointError, match="model_index.json' is damaged: it is not valid JSON"):
        eridiff.load(tmp_path / "m")


def test_inspect_says_what_a_file_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_network(tiny.flux(), tmp_path / "m.safetensors", metadata={"modelspec.title": "small"})
    assert main(["inspect", str(path)]) == 0
    assert "a Flux, original layout" in capsys.readouterr().out
    assert main(["inspect", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["components"][0]["config"]["hidden"] == 32 and report["components"][0]["unused"] == []
    assert report["components"][0]["metadata"]["modelspec.title"] == "small"


def test_inspect_reads_the_values_when_asked(saved: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(lambda state: state["img_in.weight"].fill_(float("nan")))
    assert main(["inspect", str(path)]) == 0
    assert main(["inspect", str(path), "--values"]) == 2
    assert "'img_in.weight' has 2048 values that are not finite" in capsys.readouterr().out


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(EridiffError, match="cannot be written"):
        save_network(tiny.flux(), tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    path = save_network(tiny.flux(), tmp_path / "new" / "m.safetensors")
    assert [p.name for p in path.parent.iterdir()] == ["m.safetensors"]
    (tmp_path / "as others").touch()
    assert path.stat().st_mode == (tmp_path / "as others").stat().st_mode


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
