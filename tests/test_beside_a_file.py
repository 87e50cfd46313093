"""What is beside a file counts: its config.json, links, the home folder, and parts that do not belong together."""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import eridiff
from eridiff import Autoencoder, AutoencoderConfig, load_network, save_network
from eridiff.errors import ConfigError, EridiffError, quoted
from eridiff.models.unet import UNet, UNetConfig
from eridiff.report import inspect
from eridiff.text.tokenizers import clip_tokenizer, published_clip_tokenizer
from eridiff.trace.record import relative_l2
from eridiff.training import adopt
from eridiff.weights.header import open_checkpoint
from eridiff.weights.locate import locate
from eridiff.weights.save import write_tensors
from tests import tiny
from tests.manifest import read_manifest
from tests.sparse import sparse_manifest, write_sparse
from tests.test_handing_in import under_the_originals_names

SD3_VAE = {"scaling_factor": 1.5305, "shift_factor": 0.0609, "latent_channels": 16, "block_out_channels": [32, 32]}


def bare_autoencoder(path: Path, **config: Any) -> Path:
    """Without what our writer says of it."""
    torch.manual_seed(0)
    saved = save_network(Autoencoder(AutoencoderConfig(32, (1, 1), 1, **config)), path, layout="diffusers")
    save_file(load_file(saved), saved)
    return saved


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.safetensors", "model.fp16.safetensors", "sd3_vae.safetensors"]
)
def test_the_config_of_its_folder_counts_for_a_file_given_alone(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = bare_autoencoder(tmp_path / "vae" / name)
    (tmp_path / "vae" / "config.json").write_text(json.dumps(SD3_VAE))
    for given in (path, tmp_path / "vae"):
        found = load_network(given, progress=False).config
        assert (found.scale, found.shift) == (1.5305, 0.0609)
    assert "statistics" not in caplog.text


def test_a_config_is_not_taken_for_another_file_of_the_folder(tmp_path: Path) -> None:
    bare_autoencoder(tmp_path / "diffusion_pytorch_model.safetensors")
    other = bare_autoencoder(tmp_path / "flux_ae.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(SD3_VAE))
    assert load_network(other, progress=False).config.scale == 0.3611


@pytest.mark.parametrize(
    ("family", "statistics"), [(None, (0.3611, 0.1159)), ("flux", (0.3611, 0.1159)), ("sd3", (1.5305, 0.0609))]
)
def test_a_bare_autoencoder_takes_the_statistics_of_its_family_or_says_which_were_assumed(
    family: str | None, statistics: tuple[float, float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = bare_autoencoder(tmp_path / "ae.safetensors")
    caplog.clear()
    found = load_network(path, family=family, progress=False).config
    assert (found.scale, found.shift) == statistics
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.name.startswith("eridiff")]
    assert len(told) == (family is None)
    assert family or re.search(r"Flux's are taken, scale 0.3611 and shift 0.1159; family='sd3'", told[0])


def test_a_bare_autoencoder_decodes_with_the_statistics_of_the_family_that_it_is_handed_to(tmp_path: Path) -> None:
    """Where nothing states its own: neither its file, nor a config.json, nor the caller. Its decoder is the same."""
    path = bare_autoencoder(tmp_path / "ae.safetensors")
    latents = torch.randn(1, 16, 4, 4)
    families: list[tuple[Any, Any, str]] = [
        (eridiff.SD35Inference, tiny.mmdit(), "sd3"),
        (eridiff.FluxInference, tiny.flux(), "flux"),
    ]
    for kind, network, family in families:
        found: Any = load_network(path, progress=False)
        again: Any = load_network(save_network(found, tmp_path / "again.safetensors"), progress=False)
        for bare in (found, again, adopt(under_the_originals_names(found, "vae")).network):
            drawer = kind(network, nn.DataParallel(bare), progress=False)
            usual = AutoencoderConfig.preset(family)
            assert drawer.autoencoder is bare
            expected = bare.decoder(latents / usual.scale + usual.shift).clamp(-1, 1)
            assert relative_l2(drawer.decode_vae(latents), expected) < 1e-6


def test_an_autoencoder_that_states_its_statistics_keeps_them_in_every_family(tmp_path: Path) -> None:
    called = Autoencoder(AutoencoderConfig(32, (1, 1), 1, scale=0.5, shift=0.25))
    saved = load_network(save_network(called, tmp_path / "own.safetensors"), progress=False)
    older = tmp_path / "older.safetensors"  # as it was written before files said whether they state them
    told = json.dumps({"vae": {"scale": 0.5, "shift": 0.25}})
    save_file(load_file(tmp_path / "own.safetensors"), older, metadata={"eridiff.config": told})
    chosen = load_network(bare_autoencoder(tmp_path / "ae.safetensors"), family="flux", progress=False)
    for given, scale in ((called, 0.5), (saved, 0.5), (load_network(older, progress=False), 0.5), (chosen, 0.3611)):
        drawer = eridiff.SD35Inference(tiny.mmdit(), given, progress=False)  # type: ignore[arg-type]
        assert drawer.autoencoder.config.scale == scale


def test_a_family_that_is_none_and_one_with_other_latents(tmp_path: Path) -> None:
    path = bare_autoencoder(tmp_path / "ae.safetensors", latent_channels=4)
    assert load_network(path, family="sd3", progress=False).config.scale == 0.13025
    with pytest.raises(ConfigError, match="'sd4' is not a family; there are flux, sd3, sdxl"):
        load_network(path, family="sd4")


CONTRADICTIONS = [
    ("ae", {"latent_channels": 4}), ("ae", {"block_out_channels": [128, 256, 512, 1024]}), ("ae", {"layers_per_block": 3}),
    ("ae", {"use_quant_conv": True}), ("ae", {"scaling_factor": "x"}),
    ("clip_l", {"hidden_size": 1024}), ("clip_l", {"num_hidden_layers": 11}), ("clip_l", {"vocab_size": 49407}),
    ("clip_l", {"text_config": {"intermediate_size": 5}}), ("clip_g-hf", {"projection_dim": 768}),
    ("t5xxl", {"d_ff": 5120}), ("t5xxl", {"num_layers": 12}), ("t5xxl", {"relative_attention_num_buckets": 64}),
    ("flux1-dev", {"out_channels": 16}), ("flux1-dev", {"patch_size": 2}),
    ("sd3.5-medium", {"out_channels": 4}),
    ("sdxl-base-unet-diffusers", {"cross_attention_dim": 768}), ("sdxl-base-unet-diffusers", {"block_out_channels": [320, 640]}),
    ("sdxl-base-unet-diffusers", {"transformer_layers_per_block": [1, 2, 4]}),
    ("sdxl-base-unet-diffusers", {"transformer_layers_per_block": [1, [2, 1], 10]}),
    ("sdxl-base-unet-diffusers", {"projection_class_embeddings_input_dim": 2560}),
    ("sdxl-base-unet-diffusers", {"layers_per_block": 1}), ("sdxl-base-unet-diffusers", {"attention_head_dim": [5, 10, 10]}),
    ("sdxl-base-unet-diffusers", {"attention_head_dim": 7}),
]  # fmt: skip


@pytest.mark.parametrize(("manifest", "config"), CONTRADICTIONS)
def test_a_size_in_a_config_json_that_the_tensors_contradict_is_an_error(
    manifest: str, config: dict[str, Any], tmp_path: Path
) -> None:
    path = sparse_manifest(tmp_path / "model.safetensors", manifest)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for given in (tmp_path, path):
        with pytest.raises(ConfigError, match="config.json says") as error:
            inspect(given)
        key = next(iter(config.get("text_config", config)))
        assert (key in str(error.value) or "heads" in str(error.value)) and len(str(error.value)) <= 300


PUBLISHED = [  # what the published folders say, as far as sizes go
    ("sdxl-base-unet-diffusers", {
        "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048, "in_channels": 4,
        "layers_per_block": 2, "out_channels": 4, "projection_class_embeddings_input_dim": 2816, "num_attention_heads": None,
        "transformer_layers_per_block": [1, 2, 10], "reverse_transformer_layers_per_block": None, "time_cond_proj_dim": None}),
    ("sdxl-refiner-unet-diffusers", {
        "attention_head_dim": [6, 12, 24, 24], "block_out_channels": [384, 768, 1536, 1536], "cross_attention_dim": 1280,
        "projection_class_embeddings_input_dim": 2560, "transformer_layers_per_block": 4}),
    ("flux1-diffusers-vae", {
        "block_out_channels": [128, 256, 512, 512], "latent_channels": 16, "layers_per_block": 2, "scaling_factor": 0.3611,
        "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False, "in_channels": 3, "out_channels": 3}),
    ("flux1-dev-diffusers-transformer", {
        "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56], "guidance_embeds": True, "in_channels": 64, "out_channels": None,
        "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38, "patch_size": 1,
        "pooled_projection_dim": 768}),
    ("clip_l", {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
                "projection_dim": 768, "vocab_size": 49408, "hidden_act": "quick_gelu", "max_position_embeddings": 77}),
    ("t5xxl", {"d_ff": 10240, "d_kv": 64, "d_model": 4096, "num_heads": 64, "num_layers": 24, "vocab_size": 32128,
               "relative_attention_num_buckets": 32, "feed_forward_proj": "gated-gelu"}),
]  # fmt: skip


@pytest.mark.parametrize(("manifest", "config"), PUBLISHED)
def test_what_published_folders_say_agrees(manifest: str, config: dict[str, Any], tmp_path: Path) -> None:
    sparse_manifest(tmp_path / "model.safetensors", manifest)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert inspect(tmp_path)["problems"] == []


@pytest.mark.parametrize("key", ["attention_head_dim", "num_attention_heads"])
def test_a_unets_heads_are_read_from_its_config(key: str, tmp_path: Path) -> None:
    """diffusers' attention_head_dim is the number of heads; (2, 4, 8) of 64, 128 and 256 channels are heads of 32 features."""
    config = UNetConfig(4, 4, 64, (1, 2, 4), (1, 1, 2), 1, 32, 16, 40)
    torch.manual_seed(0)
    network = eridiff.UNet(config).eval().requires_grad_(False)
    path = save_network(network, tmp_path / "diffusion_pytorch_model.safetensors", layout="diffusers")
    save_file(load_file(path), path)
    (tmp_path / "config.json").write_text(json.dumps({key: [2, 4, 8]}))
    for given in (tmp_path, path):
        found = load_network(given, progress=False)
        assert found.config == config
        inputs = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16), torch.randn(1, 40), torch.tensor([7.0])
        torch.testing.assert_close(found(*inputs), network(*inputs))


def test_shards_may_be_links_out_of_their_folder(tmp_path: Path) -> None:
    state = load_file(save_network(tiny.flux(), tmp_path / "whole.safetensors"))
    metadata = open_checkpoint(tmp_path / "whole.safetensors").metadata
    half = len(state) // 2
    weight_map = {}
    (tmp_path / "store").mkdir()
    (tmp_path / "m").mkdir()
    for number, names in enumerate((sorted(state)[:half], sorted(state)[half:]), 1):
        shard = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({n: state[n] for n in names}, tmp_path / "store" / f"blob{number}", metadata=metadata)
        (tmp_path / "m" / shard).symlink_to(tmp_path / "store" / f"blob{number}")
        weight_map |= dict.fromkeys(names, shard)
    index = tmp_path / "m" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert all(
        torch.equal(t, tiny.flux().state_dict()[n]) for n, t in load_network(tmp_path / "m").state_dict().items()
    )


def test_the_home_folder_is_known_at_every_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = save_network(tiny.flux(), "~/models/flux.safetensors")
    assert path == tmp_path / "models" / "flux.safetensors" and path.is_file()
    assert load_network("~/models/flux.safetensors", progress=False).config == tiny.flux().config
    assert load_network("~/models", progress=False).config == tiny.flux().config
    assert open_checkpoint("~/models").tensors and "flux" in locate("~/models/flux.safetensors").components
    tiny.write_model(tmp_path / "whole")
    assert eridiff.load("~/whole", progress=False).network.config == tiny.flux().config


def test_names_are_quoted_on_one_short_line() -> None:
    assert quoted("a\nb") == r"'a\nb'" and quoted(Path("/a b")) == "'/a b'" and quoted("\ud83d") == r"'\ud83d'"
    assert len(quoted("x" * 5000)) == 90 and "..." in quoted("x" * 5000)
    assert quoted("x" * 5000 + "end", 60).endswith("end'")


# tokenizers of transformers 5 -------------------------------------------------------------------------------------------------


def test_a_tokenizer_saved_by_transformers_5_is_read(tmp_path: Path) -> None:
    """tokenizer.json and tokenizer_config.json alone."""
    published_clip_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert sorted(os.listdir(tmp_path / "tokenizer")) == ["tokenizer.json", "tokenizer_config.json"]
    found = clip_tokenizer(tmp_path / "tokenizer")
    for prompt in ("a photo of a cat", "Ünïcode, 日本語!", "", "x" * 99):
        assert found(prompt).input_ids == published_clip_tokenizer()(prompt).input_ids


def test_a_pipeline_saved_by_transformers_5_has_t5s_tokenizer_where_clip_g_has_not(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "m")
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).unlink()  # a link
        clip_tokenizer(tiny.TOKENIZERS / "clip").save_pretrained(folder / name)
    (folder / "tokenizer_3").symlink_to(tiny.TOKENIZERS / "t5")
    assert not list(folder.glob("*/merges.txt")) and not list(folder.glob("*/vocab.json"))
    assert {kind: path.name for kind, path in locate(folder).tokenizers.items()} == {
        "clip": "tokenizer",
        "t5": "tokenizer_3",
    }
    assert len(eridiff.load(folder, progress=False).generate("a swan", steps=1, width=64, height=64).images) == 1
    (folder / "tokenizer_3").unlink()
    assert "t5" not in locate(folder).tokenizers


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["model"]["merges"].pop(), "do not belong together: 1 tokens"),
        (lambda d: d["model"]["vocab"].pop(next(iter(d["model"]["vocab"]))), "without a hole"),
        (lambda d: d.pop("model"), "cannot be read"),
        (lambda d: d["model"].update(merges=3), "cannot be read"),
    ],
)
def test_a_damaged_tokenizer_json_of_clip_is_one_sentence(change: Any, says: str, tmp_path: Path) -> None:
    clip_tokenizer(tiny.TOKENIZERS / "clip").save_pretrained(tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    change(document)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(EridiffError, match=says):
        clip_tokenizer(tmp_path)


# parts that do not belong together ----------------------------------------------------------------------------------------------


def other_autoencoder(channels: int) -> Autoencoder:
    return tiny.autoencoder(AutoencoderConfig(32, (1, 1, 2, 2), 1, channels))


@pytest.mark.parametrize("family", ["flux", "sd3", "sdxl"])
def test_another_familys_autoencoder_is_refused_before_any_weight_is_read(family: str, tmp_path: Path) -> None:
    make = {"flux": tiny.write_model, "sd3": tiny.write_sd3_model, "sdxl": tiny.write_sdxl_model}[family]
    folder = make(tmp_path / "m")
    parts = locate(folder)
    own = parts.components["vae"].config.latent_channels
    vae = save_network(other_autoencoder(own * 2), tmp_path / "ae.safetensors")
    with pytest.raises(
        EridiffError, match=f"the autoencoder has {own * 2} latent channels, .* generates {own}: it belongs to another"
    ):
        eridiff.load({"path": folder, "vae": vae}, progress=False)


@pytest.mark.parametrize("kind", [eridiff.FluxInference, eridiff.SD35Inference, eridiff.SDXLInference])
def test_modules_that_do_not_belong_together_are_refused_when_they_are_passed(kind: Any) -> None:
    network = {"flux": tiny.flux, "mmdit": tiny.mmdit, "unet": tiny.unet}[kind.family]()
    own = kind.channels_drawn(network.config)
    model = kind(network, other_autoencoder(own), device="cpu")
    assert model.network is network
    with pytest.raises(ConfigError, match=f"has {own + 4} latent channels, .* generates {own}"):
        kind(network, other_autoencoder(own + 4), device="cpu")


def test_every_manifest_still_names_its_own_family(tmp_path: Path) -> None:
    """A config.json of sizes alone decides nothing."""
    path = write_sparse(tmp_path / "model.safetensors", read_manifest("sd_xl_base_1.0"))
    (tmp_path / "config.json").write_text("{}")
    assert [c["network"] for c in inspect(path)["components"]] == ["unet", "vae", "clip", "clip_g"]


def test_each_part_of_one_file_loads_by_its_name(tmp_path: Path) -> None:
    source = tiny.write_sdxl_model(tmp_path / "m")
    path = source / "sdxl.safetensors"
    assert type(load_network(path)) is type(load_network(path, part="transformer")) is UNet
    assert isinstance(load_network(path, part="vae"), Autoencoder)
    encoder = eridiff.load_encoder(path, "clip_g", dtype=torch.float64)
    assert torch.equal(
        encoder.text_projection.weight.float(), eridiff.load_encoder(source, "clip_g").text_projection.weight
    )
    assert encoder.dtype == torch.float64 and not encoder.training
    lone = write_tensors(
        {name: tensor.contiguous() for name, tensor in eridiff.load_encoder(path, "clip").state_dict().items()},
        tmp_path / "clip_l.safetensors", open_checkpoint(path).metadata,
    )  # fmt: skip
    assert eridiff.load_encoder(lone).config.hidden_size == eridiff.load_encoder(path, "clip").config.hidden_size
    for call, words in (
        (
            lambda: load_network(path, part="clip"),
            "part is transformer or vae, not 'clip'; load_encoder loads text encoders",
        ),
        (lambda: load_network(lone), "holds a text encoder, which load_encoder loads"),
        (lambda: load_network(lone, part="vae"), "text encoder, not an autoencoder"),
        (lambda: eridiff.load_encoder(path), "a CLIP text encoder and a CLIP-G text encoder; choose by part='clip'"),
        (lambda: eridiff.load_encoder(path, "t5"), "not a T5 text encoder"),
        (
            lambda: eridiff.load_encoder(path, "vae"),
            "part is clip, clip_g, t5, not 'vae'; load_network loads the others",
        ),
    ):
        with pytest.raises(EridiffError) as error:
            call()
        assert words in str(error.value)
