"""Writing: `eridiff convert` and `save_network`. What is written holds every bit, loads elsewhere, and says how it is sampled."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor, nn

import eridiff
from eridiff import load_network, save_network
from eridiff.cli import main
from eridiff.cli.convert import convert
from eridiff.errors import ConfigError
from eridiff.lora import attach_lora, inject_lora, load_lora, merge_into, save_lora
from eridiff.models.flux import Flux, FluxConfig
from eridiff.models.unet import UNetConfig
from eridiff.trace.record import relative_l2
from eridiff.weights.detect import sizes_of
from eridiff.weights.header import open_checkpoint
from eridiff.weights.keymap import key_map
from eridiff.weights.locate import locate
from eridiff.weights.save import write_tensors
from tests import tiny
from tests.sparse import write_sparse

DISTILLED = UNetConfig(
    4, 4, 64, (1, 2, 2), (0, 1, 2), 0, 32, 16, 8 + 6 * 256, up_depths=((0, 0, 0), (2, 1, 1), (2, 2, 3)), middle_blocks=1
)
MMDIT = replace(tiny.MMDIT, mlp_ratio=4.0)  # the only one that diffusers builds
INPAINT = UNetConfig(9, 4, 64, (1, 2, 2), (0, 1, 2), 2, 32, 16, 8 + 6 * 256, guidance=True)  # and what lcm-sdxl has
MODELS = {
    "flux": tiny.write_model,
    "flux-fill": lambda folder: tiny.write_model(folder, FluxConfig(384, 64, 8, 12, 32, 2, 4.0, 2, 2, (4, 6, 6))),
    "sd3": lambda folder: tiny.write_sd3_model(folder, MMDIT),
    "sd3-without-t5": lambda folder: tiny.write_sd3_model(folder, MMDIT, t5=False),
    "sdxl": tiny.write_sdxl_model,
    "sdxl-refiner": lambda folder: tiny.write_sdxl_model(folder, tiny.SDXL_REFINER),
    "sdxl-inpaint": lambda folder: tiny.write_sdxl_model(folder, INPAINT),
    "sdxl-distilled": lambda folder: tiny.write_sdxl_model(folder, DISTILLED),
}


SCHNELL = replace(tiny.FLUX, guidance=False)


@pytest.fixture(scope="module", params=MODELS)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A model, and what became of it: original -> one file -> diffusers -> one file -> diffusers."""
    folder = tmp_path_factory.mktemp(request.param)
    source = MODELS[request.param](folder / "model")
    convert(source, folder / "one.safetensors", "original")
    parts = {"path": folder / "one.safetensors", "tokenizers": source}  # a file does not mention tokenizers
    convert(parts, folder / "diffusers", "diffusers")
    convert(folder / "diffusers", folder / "two.safetensors", "original")
    convert({"path": folder / "two.safetensors", "tokenizers": source}, folder / "again", "diffusers")
    return request.param, folder


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def test_every_network_comes_back_bit_for_bit_through_both_layouts(converted: tuple[str, Path]) -> None:
    _, folder = converted
    assert same(load_file(folder / "one.safetensors"), load_file(folder / "two.safetensors"))
    written = sorted(path.relative_to(folder / "diffusers") for path in (folder / "diffusers").rglob("*.safetensors"))
    assert len(written) >= 3
    for file in written:
        assert same(load_file(folder / "diffusers" / file), load_file(folder / "again" / file))
    first, last = (open_checkpoint(folder / name).metadata for name in ("one.safetensors", "two.safetensors"))
    assert json.loads(first["eridiff.config"]) == json.loads(last["eridiff.config"])
    assert "eridiff.sampling" in first and first["eridiff.sampling"] == last["eridiff.sampling"]


def test_what_is_written_holds_what_the_source_holds(converted: tuple[str, Path]) -> None:
    _, folder = converted
    source = locate(folder / "model").components
    for name in ("one.safetensors", "diffusers"):
        found = locate(folder / name).components
        assert found.keys() == source.keys()
        for network in set(found) & {"flux", "mmdit", "unet", "vae"}:
            own, other = (eridiff.weights.load.build(c[network], progress=False) for c in (source, found))
            assert own.config == other.config and same(own.state_dict(), other.state_dict())


def test_what_no_network_uses_stays_in_the_layout_that_has_it(tmp_path: Path) -> None:
    source = tiny.write_sdxl_model(tmp_path / "m")
    path = source / "sdxl.safetensors"
    kept = {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6052),
    }
    write_tensors(load_file(path) | kept, path, open_checkpoint(path).metadata)
    convert(source, tmp_path / "again.safetensors", "original", dtype=torch.bfloat16)
    found = load_file(tmp_path / "again.safetensors")
    assert found.keys() == load_file(path).keys()
    assert same({name: found[name] for name in kept}, kept)  # neither a weight: their dtype stays
    convert(source, tmp_path / "d", "diffusers")
    assert not any(word in name for file in (tmp_path / "d").rglob("*.safetensors") for name in load_file(file)
                   for word in ("position_ids", "logit_scale"))  # fmt: skip


def test_diffusers_loads_the_folder_and_every_part(converted: tuple[str, Path]) -> None:
    name, folder = converted
    import diffusers
    import transformers

    index = json.loads((folder / "diffusers" / "model_index.json").read_text())
    for place, entry in index.items():
        if (
            place.startswith("_")
            or entry[0] is None
            or place in ("scheduler", "tokenizer", "tokenizer_2", "tokenizer_3")
        ):
            continue
        kind = getattr({"diffusers": diffusers, "transformers": transformers}[entry[0]], entry[1])
        module, told = kind.from_pretrained(folder / "diffusers" / place, output_loading_info=True)
        assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (place, told)
        state, file = module.state_dict(), next((folder / "diffusers" / place).glob("*.safetensors"))
        tensors = load_file(file)
        assert all(torch.equal(state.get(n, state.get(n.removeprefix("text_model."))), t) for n, t in tensors.items())
    absent = {place: None for place, entry in index.items() if entry == [None, None]}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / "diffusers", **absent)
    assert type(pipeline).__name__ == index["_class_name"]
    expected = {"flux": "FluxPipeline", "flux-fill": "FluxFillPipeline", "sd3": "StableDiffusion3Pipeline",
                "sdxl": "StableDiffusionXLPipeline", "sdxl-inpaint": "StableDiffusionXLInpaintPipeline"}  # fmt: skip
    assert index["_class_name"] == expected.get(name, index["_class_name"])


def test_the_same_image_is_generated_from_every_form(converted: tuple[str, Path]) -> None:
    name, folder = converted
    if name not in ("flux", "sd3", "sdxl"):
        return

    def drawn(model: Any) -> Tensor:
        return (
            eridiff.load(model, device="cpu", progress=False)
            .generate("a swan", seed=1, steps=2, height=32, width=32, keep=("latents",))
            .latents
        )

    expected = drawn(folder / "model")
    for form in (folder / "diffusers", {"path": folder / "one.safetensors", "tokenizers": folder / "model"}):
        assert (
            relative_l2(drawn(form), expected) < 1e-5
        )  # tensors that lie otherwise in memory are added in another order


def test_one_part_becomes_the_folder_that_its_class_loads(tmp_path: Path) -> None:
    source = tiny.write_model(tmp_path / "model")
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import T5EncoderModel

    for file, kind in (("flux", FluxTransformer2DModel), ("ae", AutoencoderKL), ("t5", T5EncoderModel)):
        assert main(["convert", str(source / f"{file}.safetensors"), str(tmp_path / file), "--to", "diffusers"]) == 0
        assert kind.from_pretrained(tmp_path / file) is not None and (tmp_path / file / "config.json").is_file()
        assert not (tmp_path / file / "model_index.json").exists()
        back = tmp_path / f"{file}.safetensors"
        assert main(["convert", str(tmp_path / file), str(back), "--to", "original"]) == 0
        held, expected = load_file(back), load_file(source / f"{file}.safetensors")
        assert all(torch.equal(held[name], tensor) for name, tensor in expected.items())


def test_shards_are_as_large_as_asked_and_load_here_and_in_diffusers(tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    path = save_network(tiny.flux(), tmp_path / "flux.safetensors")
    assert main(["convert", str(path), str(tmp_path / "d"), "--to", "diffusers", "--shard", "0.0001"]) == 0
    shards = sorted((tmp_path / "d").glob("*.safetensors"))
    assert len(shards) > 2 and all(s.stat().st_size < 120_000 for s in shards)
    index = json.loads((tmp_path / "d" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in tiny.flux().parameters())
    assert same(load_network(tmp_path / "d").state_dict(), tiny.flux().state_dict())
    assert len(FluxTransformer2DModel.from_pretrained(tmp_path / "d").state_dict()) == len(index["weight_map"])
    assert main(["convert", str(path), str(tmp_path / "o"), "--to", "original", "--shard", "0.0001"]) == 0
    assert same(load_network(tmp_path / "o" / "flux").state_dict(), tiny.flux().state_dict())


def test_the_built_in_flux_comes_back_through_a_pipeline_of_diffusers(tmp_path: Path) -> None:
    from diffusers import FluxPipeline

    assert main(["convert", "tiny-flux", str(tmp_path / "d"), "--to", "diffusers"]) == 0
    pipe = FluxPipeline.from_pretrained(tmp_path / "d", torch_dtype=torch.float32)
    # a pipeline's folder has no place for the last two, which the model's own file says
    asked: dict[str, Any] = {"seed": 3, "steps": 2, "width": 64, "height": 64, "guidance_scale": 1.5, "t5_length": 12, "schedule": "schnell"}  # fmt: skip
    models = (
        eridiff.load("tiny-flux", progress=False, device="cpu", dtype=torch.float32),
        eridiff.FluxInference.from_diffusers(pipe, progress=False),
    )
    found, expected = (model.generate("a swan on mars", **asked, keep=("latents",)).latents for model in models)
    assert relative_l2(found, expected) < 1e-5


def test_another_number_of_files_replaces_what_a_folder_held(tmp_path: Path) -> None:
    other = tiny.flux()
    with torch.no_grad():
        other.image_in.weight.add_(1)
    paths = [save_network(network, tmp_path / f"{i}.safetensors") for i, network in enumerate((tiny.flux(), other))]
    folder, kept = tmp_path / "d", tmp_path / "d" / "diffusion_pytorch_model_notes.safetensors"
    for turn, shard in enumerate(("0.0001", None, "0.0001", "0.00005", None)):
        flags = [] if shard is None else ["--shard", shard]
        assert main(["convert", str(paths[turn % 2]), str(folder), "--to", "diffusers", *flags]) == 0
        kept.touch()
        expected = other if turn % 2 else tiny.flux()
        held = {path.name for path in folder.glob("*.safetensors*")} - {kept.name}
        if shard is None:
            assert held == {"diffusion_pytorch_model.safetensors"}
        else:
            assert len({name.rpartition("-of-")[2] for name in held if "-of-" in name}) == 1
            assert "diffusion_pytorch_model.safetensors" not in held
        kept.unlink()
        assert same(load_network(folder).state_dict(), expected.state_dict())


def test_a_folder_of_another_model_or_layout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a reader would take what lies there in place of what is written, or with it."""

    def written(model: str, out: str, *flags: str) -> int:
        code = main(["convert", model, str(tmp_path / out), "--to", *flags])
        assert code == 0 or re.search(r"'[^']+' holds \S+ of another model or layout", capsys.readouterr().err)
        return code

    for folder, layout in (("o", "original"), ("d", "diffusers")) * 2:  # the same again replaces it
        assert written("tiny-flux", folder, layout) == 0
    files = sorted(tmp_path.rglob("*"))
    assert written("tiny-flux", "o", "original", "--shard", "0.001") == 2
    assert written("tiny-flux", "d", "original") == 2
    assert written("tiny-sdxl", "d", "diffusers") == 2  # the transformer would stay
    assert sorted(tmp_path.rglob("*")) == files
    merge = ["lora", "merge", "tiny-style", "--model", "tiny-flux", "--out"]
    assert main([*merge, str(tmp_path / "m")]) == 0 == main([*merge, str(tmp_path / "m")])
    assert main([*merge, str(tmp_path / "d")]) == 2
    assert "of another model or layout; give another folder" in capsys.readouterr().err
    assert written("tiny-flux", "o", "diffusers") == 0 and written("tiny-flux", "o", "original") == 2


# dtypes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["original", "diffusers"])
@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_parameters_get_the_dtype_and_tables_keep_their_own(
    to: str, name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    path = save_network(tiny.mmdit(MMDIT), tmp_path / "sd3.safetensors")
    out = tmp_path / ("x.safetensors" if to == "original" else "x")
    assert main(["convert", str(path), str(out), "--to", to, "--dtype", name]) == 0
    found, own = load_network(out), tiny.mmdit(MMDIT)
    assert {p.dtype for p in found.parameters()} == {dtype} and found.positions.table.dtype == torch.float32
    assert all(torch.equal(p, q.to(dtype)) for p, q in zip(found.parameters(), own.parameters(), strict=True))


def test_fp8_keeps_what_a_scale_for_each_layer_can_keep(tmp_path: Path) -> None:
    source = tiny.write_model(tmp_path / "model")
    own = load_network(source / "flux.safetensors")
    for to, bound in (("original", 0.04), ("diffusers", 0.04)):
        out = tmp_path / ("x.safetensors" if to == "original" else "x")
        assert main(["convert", str(source / "flux.safetensors"), str(out), "--to", to, "--dtype", "fp8"]) == 0
        found = load_network(out, dtype=torch.float32)
        for (name, p), q in zip(found.named_parameters(), own.parameters(), strict=True):
            assert float((p - q).norm() / q.norm()) < bound, name
            assert p.ndim == 2 or torch.equal(p, q), "norms and biases stay"
    tensors = load_file(tmp_path / "x.safetensors")
    assert tensors["img_in.weight"].dtype == torch.float8_e4m3fn and tensors["img_in.scale_weight"].shape == ()
    assert tensors["scaled_fp8"].shape == (0,) and float(tensors["img_in.weight"].float().abs().max()) == 448
    small = tmp_path / "small.safetensors"  # weights so small that plain float8 has nothing of them left
    write_tensors(
        {n: t / 1e4 for n, t in load_file(source / "flux.safetensors").items()},
        small,
        open_checkpoint(source / "flux.safetensors").metadata,
    )
    assert main(["convert", str(small), str(tmp_path / "y.safetensors"), "--to", "original", "--dtype", "fp8"]) == 0
    found, own = load_network(tmp_path / "y.safetensors", dtype=torch.float32), load_network(small)
    assert float((found.image_in.weight - own.image_in.weight).norm() / own.image_in.weight.norm()) < 0.04
    for file in ("t5", "clip", "ae"):
        assert (
            main(
                [
                    "convert",
                    str(source / f"{file}.safetensors"),
                    str(tmp_path / f"{file}.safetensors"),
                    "--to",
                    "original",
                    "--dtype",
                    "fp8",
                ]
            )
            == 0
        )
        locate(tmp_path / f"{file}.safetensors")
    again = tmp_path / "bf16.safetensors"  # and out of fp8, multiplied in float32 and cast once
    assert main(["convert", str(tmp_path / "x.safetensors"), str(again), "--to", "original", "--dtype", "bf16"]) == 0
    q, scale = tensors["img_in.weight"].float(), tensors["img_in.scale_weight"]
    assert torch.equal(load_file(again)["img_in.weight"], (q * scale).bfloat16())


def test_a_weight_that_overflows_is_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = tiny.flux()
    network.double_blocks[1].image.qkv.weight[3, 3] = 70000.0
    path = save_network(network, tmp_path / "flux.safetensors")
    assert main(["convert", str(path), str(tmp_path / "x.safetensors"), "--to", "original", "--dtype", "fp16"]) == 2
    assert (
        "'double_blocks.1.img_attn.qkv.weight' has the value 70000, which torch.float16 cannot hold; write bf16"
        in capsys.readouterr().err
    )
    with pytest.raises(ConfigError, match="cannot hold"):
        save_network(network, tmp_path / "y.safetensors", dtype=torch.float16)
    assert [file.name for file in tmp_path.iterdir()] == ["flux.safetensors"]
    assert main(["convert", str(path), str(tmp_path / "x.safetensors"), "--to", "original", "--dtype", "bf16"]) == 0


def large_flux(folder: Path) -> Path:
    """256 MB of weights that take no place on the disk."""
    config = FluxConfig(hidden=1024, heads=8, text_width=1024, double_depth=4, single_depth=4, rope_axes=(16, 56, 56))
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in Flux(config).state_dict().items()}
    entries = key_map("flux").layouts["original"].entries(shapes, sizes_of(config))
    return write_sparse(folder / "flux.safetensors", {e.foreign[0]: ("BF16", shapes[e.native]) for e in entries})


def anonymous_megabytes(*commands: list[str], first: str = "") -> float:
    """How much memory that is not a file's some commands of `eridiff` take at most, beside what the program takes.

    `first` is a line of Python that is run before them.
    """
    program = f"""
import threading, time
import torch, transformers
from eridiff.cli import main
def anonymous():
    return sum(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1e3
def watch():
    while True:
        most[0] = max(most[0], anonymous())
        time.sleep(0.002)
torch.ones(8).to(torch.bfloat16)
{first}
before, most = anonymous(), [0.0]
threading.Thread(target=watch, daemon=True).start()
for command in {list(commands)!r}:
    assert main(command) == 0
print("MB", most[0] - before)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return float(ran.stdout.split("MB")[1])


def test_memory_for_one_tensor_is_enough(tmp_path: Path) -> None:
    """What is not the file's takes a few tensors of 15 MB, in either direction and with another dtype."""
    path, folder = large_flux(tmp_path), str(tmp_path / "d")
    assert path.stat().st_size > 250e6
    back = ["convert", folder, str(tmp_path / "o.safetensors"), "--to", "original", "--dtype", "fp16"]
    assert anonymous_megabytes(["convert", str(path), folder, "--to", "diffusers"], back) < 120


# what says how to sample ----------------------------------------------------------------------------------------------


def test_prediction_zero_snr_and_variant_are_carried_along(tmp_path: Path) -> None:
    source = tiny.write_sdxl_model(tmp_path / "sdxl-turbo")
    marked = load_file(source / "sdxl.safetensors") | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    metadata = open_checkpoint(source / "sdxl.safetensors").metadata
    write_tensors(
        marked, source / "sdxl.safetensors", metadata | {"modelspec.title": "fox", "modelspec.hash_sha256": "0"}
    )

    def told(model: Any) -> tuple[Any, ...]:
        found = eridiff.load(model, device="cpu", progress=False)
        return found.prediction, found.zero_terminal_snr, found.variant, found.sampling.steps

    assert told(source) == ("v", True, "turbo", 2)
    convert(source, tmp_path / "a" / "one.safetensors", "original")
    convert(source, tmp_path / "b", "diffusers")
    convert(tmp_path / "b", tmp_path / "c" / "one.safetensors", "original")
    tokenizers = {"tokenizers": {"clip": source / "tokenizer"}}
    for model in (
        {"path": tmp_path / "a", **tokenizers},
        tmp_path / "b",
        {"path": tmp_path / "c" / "one.safetensors", **tokenizers},
    ):
        assert told(model) == ("v", True, "turbo", 2)
    assert {"v_pred", "ztsnr"} <= load_file(tmp_path / "c" / "one.safetensors").keys(), "as other programs read it"
    scheduler = json.loads((tmp_path / "b" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"]) == ("v_prediction", True)
    held = open_checkpoint(tmp_path / "a" / "one.safetensors").metadata
    assert held["modelspec.title"] == "fox" and "modelspec.hash_sha256" not in held, (
        "a hash of the old file is none of the new"
    )
    drawn = eridiff.load(source, device="cpu", progress=False)  # a trainer's way
    for layout in ("original", "diffusers"):
        file = save_network(drawn.network, tmp_path / layout / "step-5.safetensors", layout=layout)
        assert told({"path": source, "transformer": file}) == ("v", True, "turbo", 2)
    alone = load_network(source / "sdxl.safetensors")
    assert "v_pred" in load_file(save_network(alone, tmp_path / "alone.safetensors"))


@pytest.mark.parametrize(
    ("name", "shift", "dynamic"), [("flux", 3.0, True), ("schnell", 1.0, False), ("sd3", 3.0, None)]
)
def test_the_shift_is_reported_as_published(name: str, shift: float, dynamic: bool | None, tmp_path: Path) -> None:
    write = MODELS.get(name, lambda folder: tiny.write_model(folder, SCHNELL))
    convert(write(tmp_path / "model"), tmp_path / "d", "diffusers")
    told = json.loads((tmp_path / "d" / "scheduler" / "scheduler_config.json").read_text())
    assert (told["shift"], told.get("use_dynamic_shifting")) == (shift, dynamic)
    (tmp_path / "d" / "scheduler" / "scheduler_config.json").write_text(json.dumps(told | {"shift": 4.5}))
    convert(tmp_path / "d", tmp_path / "e", "diffusers", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "e" / "scheduler" / "scheduler_config.json").read_text())["shift"] == 4.5, (
        "a model's own stays"
    )


def test_words_stay_in_a_copy_and_not_in_what_was_trained(tmp_path: Path) -> None:
    """A small model's file lists the words that it knows; a trained one may know others."""
    source = tiny.write_model(tmp_path / "model")
    own = open_checkpoint(source / "flux.safetensors")
    tensors = {name: own.read(name).clone() for name in own.tensors}
    write_tensors(tensors, source / "flux.safetensors", own.metadata | {"eridiff.words": "{}"})
    convert(source / "flux.safetensors", tmp_path / "copy.safetensors", "original")
    save_network(load_network(source / "flux.safetensors"), tmp_path / "trained.safetensors")
    told = [open_checkpoint(tmp_path / f"{name}.safetensors").metadata for name in ("copy", "trained")]
    assert ["eridiff.words" in metadata for metadata in told] == [True, False]
    assert all("eridiff.sampling" in metadata for metadata in told)


def test_tensors_lie_at_multiples_of_64_bytes_as_in_memory(tmp_path: Path) -> None:
    """A kernel's sum may depend on where its numbers lie, and a saved network generates what it generated."""
    sizes = {"a": 3, "b": 64, "c": 16, "d": 1, "e": 1024}
    tensors = {name: torch.arange(size, dtype=torch.float32) for name, size in sizes.items()}
    tensors |= {f"half {name}": tensor.half() for name, tensor in tensors.items()}
    file = open_checkpoint(write_tensors(tensors, tmp_path / "x.safetensors", {"a": "b"}))
    assert all(entry.begin % 64 == 0 for entry in file.tensors.values() if (entry.end - entry.begin) % 64 == 0)
    assert all(entry.begin % entry.dtype.itemsize == 0 for entry in file.tensors.values())
    assert all(torch.equal(file.read(name), tensor) for name, tensor in tensors.items())


# networks as trainers hold them ---------------------------------------------------------------------------------------


def test_what_a_lora_changed_in_place_is_not_written_and_a_merge_is(tmp_path: Path) -> None:
    network = tiny.flux()
    plain = save_network(network, tmp_path / "plain.safetensors").read_bytes()
    wider = torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
    tensors = {
        "transformer.x_embedder.lora_A.weight": wider, "transformer.x_embedder.lora_B.weight": torch.ones(32, 4),
        "lora_unet_double_blocks_0_img_attn_norm_query_norm.diff": torch.ones(16),
    }  # fmt: skip
    write_tensors(tensors, tmp_path / "lora.safetensors", {})
    lora = load_lora(tmp_path / "lora.safetensors", network)
    attached = attach_lora(network, lora)
    assert network.config.in_channels == 128 and attached.originals
    file = save_network(network, tmp_path / "attached.safetensors")
    assert file.read_bytes() == plain and load_network(file).config == tiny.FLUX
    attached.detach()
    trained = inject_lora(network, 2)
    for branch in trained.all_branches():
        nn.init.normal_(branch.up)
    file = save_lora(trained, tmp_path / "t.safetensors")
    trained.detach()
    merged = merge_into(network, load_lora(file, network))
    assert save_network(network, tmp_path / "merged.safetensors").read_bytes() != plain
    merged.restore()
    assert save_network(network, tmp_path / "restored.safetensors").read_bytes() == plain


def test_compiled_and_wrapped_networks_are_written_plain(tmp_path: Path) -> None:
    network = tiny.flux()
    plain = save_network(network, tmp_path / "plain.safetensors").read_bytes()
    averaged = torch.optim.swa_utils.AveragedModel(network)
    for i, module in enumerate((torch.compile(network), nn.DataParallel(network), averaged)):
        assert save_network(module, tmp_path / f"{i}.safetensors").read_bytes() == plain
    with pytest.raises(ConfigError, match="a Linear cannot be saved"):
        save_network(nn.DataParallel(nn.Linear(2, 2)), tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="'bfl' is not a layout of a Flux; there are original, diffusers"):
        save_network(network, tmp_path / "x.safetensors", layout="bfl")
    with pytest.raises(ConfigError, match="metadata are texts by name, and 'step' is 3"):
        save_network(network, tmp_path / "x.safetensors", metadata={"step": 3})  # type: ignore[dict-item]


def _sharded(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    from torch.distributed.fsdp import fully_shard

    network = tiny.flux()
    for block in [*network.double_blocks, *network.single_blocks]:
        fully_shard(block)
    fully_shard(network)
    save_network(network, f"{folder}/sharded-{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def test_a_network_that_fsdp2_shards_is_written_whole_by_the_first_process(tmp_path: Path) -> None:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.spawn(_sharded, (str(tmp_path), port), nprocs=2)
    assert [p.name for p in tmp_path.iterdir()] == ["sharded-0.safetensors"]
    plain = save_network(tiny.flux(), tmp_path / "plain.safetensors").read_bytes()
    assert (tmp_path / "sharded-0.safetensors").read_bytes() == plain


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{0}", "{1}/x.safetensors", "--to", "diffusers"], "is one file, and diffusers reads a folder"),
        (["{0}", "{1}/x.safetensors", "--to", "original", "--shard", "1"], "shards are in a folder"),
        (["{0}", "{1}", "--to", "diffusers"], "holds what is to be converted; give another folder"),
        (["{0}", "{1}/x", "--to", "original", "--shard", "-1"], "more than 0 bytes"),
        (["{1}/none.safetensors", "{1}/x", "--to", "original"], "does not exist"),
        (["{2}", "{1}/x", "--to", "diffusers"], "MLPs 4 times as wide as the rest, not 2; write the original layout"),
        (["{3}", "{1}/x", "--to", "diffusers"], "diffusers builds no UNet with 2 blocks and the depth 1 in the middle"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_one_sentence(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    paths = [save_network(tiny.flux(), folder / "flux.safetensors"), folder]
    for network in (tiny.mmdit(), tiny.unet(replace(tiny.UNET, middle_depth=1))):
        paths.append(save_network(network, tmp_path / f"{len(paths)}.safetensors"))
    before = sorted(tmp_path.rglob("*"))
    assert main(["convert", *(argument.format(*paths) for argument in arguments)]) == 2
    assert told in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before
