"""`eridiff lora extract | resize | merge`: nothing is lost silently, nothing grows, and files stay what they were."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import eridiff
from eridiff import load_network, save_network
from eridiff.cli import main
from eridiff.cli.convert import convert
from eridiff.errors import LoraError
from eridiff.lora import Lora, inject_lora, load_lora, merge_into, save_lora
from eridiff.lora.decompose import energy, energy_table, extract_lora, resize_lora
from eridiff.lora.deltas import Item
from eridiff.lora.names import Target
from eridiff.text.encoders import build_encoder
from eridiff.trace.record import relative_l2
from eridiff.weights.header import open_checkpoint
from eridiff.weights.locate import locate
from eridiff.weights.save import write_tensors
from tests import tiny
from tests.loras import filled, some_lora
from tests.test_convert import anonymous_megabytes, large_flux

FAMILIES: dict[str, Any] = {"flux": tiny.flux, "mmdit": tiny.mmdit, "unet": tiny.unet}


def tuned(network: Any, seed: int = 9) -> Any:
    """A fine-tune of everything: matrices by a change of rank 2, biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            if p.ndim == 1:
                p += 0.01 * torch.randn(p.shape, generator=generator)
            else:
                up, down = (torch.randn(n, 2, generator=generator) for n in (p.shape[0], p[0].numel()))
                p += (0.01 * up @ down.T).reshape(p.shape)
    return network


# extract --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "format"), [*((family, "kohya") for family in FAMILIES), ("flux", "native")])
def test_an_extracted_lora_makes_the_whole_fine_tune_of_the_base(family: str, format: str, tmp_path: Path) -> None:
    base, whole = FAMILIES[family](), tuned(FAMILIES[family]())
    lora, kept = extract_lora(whole, base, 2)
    assert energy(kept) > 1 - 1e-6 and {entry.rank for entry in kept} == {2, None}
    file = save_lora(lora, tmp_path / "x.safetensors", base, format=format)
    names = load_file(file)
    if format == "kohya":
        assert any(n.endswith(".diff_b") for n in names) and any(n.endswith(".diff") for n in names)
    with merge_into(base, load_lora(file, base)):
        for (name, p), q in zip(base.named_parameters(), whole.parameters(), strict=True):
            assert relative_l2(p, q) < 1e-5, name


def test_what_no_pattern_chooses_is_counted(tmp_path: Path) -> None:
    base, whole = tiny.flux(), tuned(tiny.flux())
    lora, kept = extract_lora(whole, base, 2, ["double_blocks.*"])
    left = [entry for entry in kept if entry.rank == 0]
    assert {item.target.module.split(".")[0] for item in lora.items} == {"double_blocks"}
    assert {entry.module.split(".")[0] for entry in left} >= {"single_blocks", "image_in", "final"}
    assert f"{len(left)} more are left out" in list(energy_table(kept))[-1] and energy(kept) < 0.9
    assert any("diff_b" in item.tensors for item in lora.items), "biases of the chosen layers too"
    with pytest.raises(LoraError, match="equal where a LoRA could change them"):
        extract_lora(base, base, 2)
    with pytest.raises(LoraError, match="different sizes"):
        extract_lora(tiny.mmdit(), base, 2)


def test_text_encoders_are_extracted_with_the_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, other = tiny.write_sdxl_model(tmp_path / "base"), tiny.write_sdxl_model(tmp_path / "tuned")
    state = load_file(other / "sdxl.safetensors")
    changed = ["model.diffusion_model.input_blocks.0.0.bias", "conditioner.embedders.0.transformer.text_model.encoder.layers.1.mlp.fc1.weight",
               "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight", "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"]  # fmt: skip
    for name in changed:
        state[name] = state[name] + 0.1 * torch.randn(state[name].shape, generator=torch.Generator().manual_seed(1))
    write_tensors(state, other / "sdxl.safetensors", open_checkpoint(other / "sdxl.safetensors").metadata)
    out = tmp_path / "x.safetensors"
    assert main(["lora", "extract", str(other), str(source), "--rank", "16", "--out", str(out)]) == 0
    assert "6 modules, 0 more are left out, 100.00% of the energy kept" in capsys.readouterr().out
    model = eridiff.load(source, device="cpu", progress=False)
    model.apply_lora(out)
    expected = eridiff.load(other, device="cpu", progress=False)
    given: dict[str, Any] = {"seed": 1, "steps": 2, "height": 32, "width": 32, "keep": ("latents",)}
    assert relative_l2(model.generate("a swan", **given).latents, expected.generate("a swan", **given).latents) < 1e-4


# resize ---------------------------------------------------------------------------------------------------------------


def test_a_smaller_rank_is_the_nearest_there_is_and_a_larger_one_changes_no_bit() -> None:
    network = tiny.flux()
    lora = some_lora(network, rank=6)
    same, kept = resize_lora(lora, 16)
    assert same.items == lora.items and energy(kept) == 1
    small, kept = resize_lora(lora, 2)
    for item, own, entry in zip(small.items, lora.items, kept, strict=True):
        change = own.ratio * own.tensors["up"].flatten(1).float() @ own.tensors["down"].flatten(1).float()
        s = torch.linalg.svdvals(change)
        assert item.rank == 2 and item.ratio == 1 and item.tensors["up"].dtype == own.tensors["up"].dtype
        left = item.tensors["up"].flatten(1).float() @ item.tensors["down"].flatten(1).float() - change
        assert float(left.norm()) == pytest.approx(float(s[2:].norm()), rel=1e-3)
        assert entry.energy == pytest.approx(float((s[:2] ** 2).sum() / (s**2).sum()), abs=1e-5)


def test_resizing_never_enlarges_a_file_of_mixed_ranks_or_of_other_kinds(tmp_path: Path) -> None:
    network = tiny.unet()
    g = torch.Generator().manual_seed(0)
    weight = network.down[1].transformer[0].blocks[0].self_attention.q.weight
    items = [
        Item("a", Target("unet", "conv_in"), "lora", {"down": torch.randn(1, 4, 3, 3, generator=g), "up": torch.randn(64, 1, 1, 1, generator=g)}, 0.5, 0.5, 1),
        Item("b", Target("unet", "down.1.transformer.0.blocks.0.self_attention.q"), "lokr", {"lokr_w1": torch.randn(4, 4, generator=g), "lokr_w2": torch.randn(weight.shape[0] // 4, weight.shape[1] // 4, generator=g)}, 1.0),
        Item("c", Target("unet", "down.1.transformer.0.blocks.0.self_attention.k"), "lora", {"down": torch.randn(8, 128, generator=g), "up": torch.randn(128, 8, generator=g)}, -0.25, -2.0, 8),
    ]  # fmt: skip
    lora = Lora(tuple(items))
    before = save_lora(lora, tmp_path / "a.safetensors", network).stat().st_size
    shapes = {"unet": {n: tuple(t.shape) for n, t in network.state_dict().items()}}
    for rank in (1, 4, 16, 64):
        resized, _ = resize_lora(lora, rank, shapes)
        assert save_lora(resized, tmp_path / "b.safetensors", network).stat().st_size <= before
        assert (resized.items[0], resized.items[2].rank) == (items[0], min(rank, 8))
        assert resized.items[1].kind == ("lora" if rank < 8 else "lokr"), "where it takes fewer numbers"
        if rank >= 8:
            assert resized.items == lora.items
    delta = resized.items[2].delta(torch.zeros(128, 128))
    assert relative_l2(delta, items[2].delta(torch.zeros(128, 128))) < 1e-6, "a negative scale too"
    loha = Item("d", items[2].target, "loha", {n: torch.randn(128, 8, generator=g) if n[-1] == "a" else torch.randn(8, 128, generator=g) for n in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}, 1.0, 8.0, 8)  # fmt: skip
    (one,), _ = resize_lora(Lora((loha,)), 4, shapes)[0].items, None
    assert one.kind == "lora" and one.rank == 4


def test_large_layers_are_resized_without_their_product() -> None:
    """A product of 9216 x 3072 would be 113 MB; the exact singular values come from a matrix of 64 x 64."""
    g = torch.Generator().manual_seed(0)
    item = Item(
        "a",
        Target("", "x"),
        "lora",
        {"down": torch.randn(64, 3072, generator=g), "up": torch.randn(9216, 64, generator=g)},
        1.0,
        64.0,
        64,
    )
    asked: list[tuple[int, ...]] = []
    own = torch.linalg.svd

    def spy(matrix: Tensor, **options: Any) -> Any:
        asked.append(tuple(matrix.shape))
        return own(matrix, **options)

    torch.linalg.svd = spy  # type: ignore[assignment]
    try:
        resized, kept = resize_lora(Lora((item,)), 16)
    finally:
        torch.linalg.svd = own
    assert asked == [(64, 64)] and resized.items[0].rank == 16
    gram = (item.tensors["up"].double().T @ item.tensors["up"].double()) @ (
        item.tensors["down"].double() @ item.tensors["down"].double().T
    )
    values = torch.linalg.eigvals(gram).real.sort(descending=True).values
    assert kept[0].energy == pytest.approx(float(values[:16].sum() / values.sum()), abs=1e-5)


# merge ----------------------------------------------------------------------------------------------------------------


def sdxl_lora(folder: Path, source: Path) -> tuple[Path, Lora]:
    """A LoRA on an SDXL's UNet and both its encoders."""
    parts = locate(source).components
    modules: dict[str, Any] = {
        "unet": load_network(source / "sdxl.safetensors"),
        **{n: build_encoder(parts[n]) for n in ("clip", "clip_g")},
    }
    items: list[Item] = []
    for name, module in modules.items():
        own = filled(
            inject_lora(module, 2, targets=["*.q_proj", "*.fc1"] if name != "unet" else ["*.self_attention.*"])
        ).detach()
        items += [
            Item(i.key, Target(name, i.target.module), i.kind, i.tensors, i.ratio, i.alpha, i.rank)
            for i in own.lora().items
        ]
    lora = Lora(tuple(items))
    return save_lora(lora, folder / "lora.safetensors", modules), lora


def test_merging_into_a_whole_file_keeps_all_of_it_and_merges_its_encoders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny.write_sdxl_model(tmp_path / "m")
    path = source / "sdxl.safetensors"
    marks = {
        "v_pred": torch.zeros(0),
        "ztsnr": torch.zeros(0),
        "denoiser.sigmas": torch.arange(1000.0),
        "conditioner.embedders.1.model.logit_scale": torch.ones(()),
    }
    metadata = open_checkpoint(path).metadata | {"modelspec.title": "fox", "modelspec.prediction_type": "v"}
    write_tensors(load_file(path) | marks, path, metadata)
    file, lora = sdxl_lora(tmp_path, source)
    out = tmp_path / "merged" / "sdxl.safetensors"
    assert main(["lora", "merge", f"{file}:0.5", "--model", str(source), "--out", str(out)]) == 0
    assert "tensors changed" in capsys.readouterr().out
    before, after = load_file(path), load_file(out)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] + name.split(".")[2][:1] * name.startswith("cond") for name in changed} == {
        "model",
        "conditioner0",
        "conditioner1",
    }
    assert (
        len(changed)
        == len({str(i.target.module).replace("k_proj", "q_proj") for i in lora.items if i.target.network == "unet"})
        + 4
        + 4
    )
    told = open_checkpoint(out).metadata
    assert (told["modelspec.title"], told["eridiff.sampling"]) == ("fox", metadata["eridiff.sampling"])
    tokenizers = {"clip": source / "tokenizer"}
    model = eridiff.load({"path": out, "tokenizers": tokenizers}, device="cpu", progress=False)
    assert (model.prediction, model.zero_terminal_snr) == ("v", True)
    attached = eridiff.load(source, device="cpu", progress=False)
    attached.apply_lora(file, 0.5)
    given: dict[str, Any] = {
        "seed": 1,
        "steps": 2,
        "height": 32,
        "width": 32,
        "keep": ("latents",),
        "schedule": "trailing",
    }
    assert relative_l2(model.generate("a swan", **given).latents, attached.generate("a swan", **given).latents) < 1e-4
    assert main(["lora", "merge", str(file), "--model", str(source), "--part", "text_encoders", "--out", str(out)]) == 0
    after = load_file(out)
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith("model."))


def test_a_lora_for_an_encoder_in_another_file_is_refused_or_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny.write_model(tmp_path / "m")
    parts = locate(source).components
    modules = {"flux": tiny.flux(), "clip": build_encoder(parts["clip"])}
    items = [Item(i.key, Target(name, i.target.module), i.kind, i.tensors, i.ratio, i.alpha, i.rank)
             for name, module in modules.items() for i in filled(inject_lora(module, 2)).detach().lora().items]  # fmt: skip
    file = save_lora(Lora(tuple(items)), tmp_path / "lora.safetensors", modules)
    out = tmp_path / "merged.safetensors"
    arguments = ["lora", "merge", str(file), "--model", str(source), "--out", str(out)]
    assert main(arguments) == 2 and not out.exists()
    assert "the LoRA changes clip, which is not in the file" in capsys.readouterr().err
    for other in (source / "in", tmp_path):
        assert main([*arguments[:-1], str(other)]) == 2 and not (source / "in").exists()
        assert "are one in the other; give another folder" in capsys.readouterr().err
    assert main([*arguments, "--part", "network"]) == 0
    with merge_into(modules["flux"], load_lora(file, modules).of("flux")):
        assert all(torch.equal(t, modules["flux"].state_dict()[n]) for n, t in load_network(out).state_dict().items())
    assert main(["lora", "merge", f"{file}:nan", "--model", str(source), "--part", "network", "--out", str(out)]) == 2
    assert "a scale is a finite number, not nan" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_merging_into_a_folder_merges_each_part_and_copies_the_rest(layout: str, tmp_path: Path) -> None:
    source = tiny.write_sdxl_model(tmp_path / "m")
    file, _ = sdxl_lora(tmp_path, source)
    folder, out = tmp_path / "folder", tmp_path / "merged"
    convert(source, folder, layout, shard=3e-4 if layout == "diffusers" else None)
    (folder / "of-nobody.bin").write_bytes(b"other weights")
    if layout == "diffusers":
        shutil.copy(
            next((folder / "vae").glob("*.safetensors")), folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
        )
        assert (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").exists()
    assert main(["lora", "merge", f"{file}:0.5", "--model", str(folder), "--out", str(out)]) == 0
    before, after = locate(folder).components, locate(out).components
    assert before.keys() == after.keys()
    for name, component in before.items():
        tensors = {n: component.checkpoint.read(n) for n in component.checkpoint.tensors}
        same = [torch.equal(t, after[name].checkpoint.read(n)) for n, t in tensors.items()]
        assert after[name].checkpoint.tensors.keys() == tensors.keys() and all(same) == (name == "vae")
    files = {
        path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and "safetensors" not in path.name
    }
    assert {path.relative_to(out) for path in out.rglob("*") if path.is_file() and "safetensors" not in path.name} == {
        path for path in files if path.name != "of-nobody.bin"
    }
    attached = eridiff.load(folder, device="cpu", progress=False)
    attached.apply_lora(file, 0.5)
    given: Any = {"seed": 1, "steps": 1, "height": 32, "width": 32, "keep": ("latents",)}
    merged = eridiff.load(out, device="cpu", progress=False).generate("a swan", **given).latents
    assert relative_l2(merged, attached.generate("a swan", **given).latents) < 1e-4


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_merged_file_stays_in_its_layout_and_dtype_and_a_control_lora_widens_it(layout: str, tmp_path: Path) -> None:
    path = save_network(tiny.flux(), tmp_path / "flux.safetensors", layout=layout, dtype=torch.bfloat16)
    g = torch.Generator().manual_seed(0)
    tensors = {"img_in.lora_A.weight": torch.randn(4, 128, generator=g), "img_in.lora_B.weight": torch.randn(32, 4, generator=g),
               "double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(16)}  # fmt: skip
    file, out = write_tensors(tensors, tmp_path / "lora.safetensors", {}), tmp_path / "merged.safetensors"
    assert main(["lora", "merge", str(file), "--model", str(path), "--out", str(out)]) == 0
    found = load_network(out)
    assert found.config.in_channels == 128 and {t.dtype for t in load_file(out).values()} == {torch.bfloat16}
    assert load_file(out).keys() == load_file(path).keys()
    own = tiny.flux().image_in.weight.bfloat16().float()
    change = tensors["img_in.lora_B.weight"] @ tensors["img_in.lora_A.weight"]
    assert torch.equal(found.image_in.weight, (torch.cat([own, torch.zeros(32, 64)], 1) + change).bfloat16())
    assert main(["lora", "merge", str(file), "--model", str(path), "--out", str(out), "--dtype", "float32"]) == 0
    assert {t.dtype for t in load_file(out).values()} == {torch.float32}


def test_merging_takes_memory_for_a_tensor_at_a_time(tmp_path: Path) -> None:
    path = large_flux(tmp_path)
    network = {
        "lora_unet_double_blocks_0_img_attn_qkv": (3072, 1024),
        "lora_unet_single_blocks_3_linear1": (7168, 1024),
    }
    tensors = {}
    for name, (rows, columns) in network.items():
        tensors |= {f"{name}.lora_down.weight": torch.ones(4, columns), f"{name}.lora_up.weight": torch.ones(rows, 4)}
    save_file(tensors, tmp_path / "lora.safetensors")
    out = tmp_path / "merged.safetensors"
    assert (
        anonymous_megabytes(
            ["lora", "merge", str(tmp_path / "lora.safetensors"), "--model", str(path), "--out", str(out)]
        )
        < 200
    )
    assert bool(open_checkpoint(out).read("double_blocks.0.img_attn.qkv.weight").eq(4).all())


# writing --------------------------------------------------------------------------------------------------------------


def test_a_lora_is_written_as_other_programs_read_it_by_default(tmp_path: Path) -> None:
    names = load_file(save_lora(some_lora(tiny.flux()), tmp_path / "x.safetensors", tiny.flux())).keys()
    assert all(name.startswith("lora_unet_") and "." in name for name in names)
    other = nn.Sequential(nn.Linear(4, 4))
    file = save_lora(filled(inject_lora(other, 2)), tmp_path / "y.safetensors")
    assert "0.lora_down.weight" in load_file(file) and load_lora(file, nn.Sequential(nn.Linear(4, 4))).items


def test_an_alpha_is_not_rounded_to_the_dtype_of_the_matrices(tmp_path: Path) -> None:
    lora = inject_lora(tiny.flux(), 2, alpha=0.7)
    for format in ("kohya", "native"):
        tensors = load_file(save_lora(lora, tmp_path / "x.safetensors", format=format, dtype=torch.bfloat16))
        alphas = {float(t) for name, t in tensors.items() if name.endswith(".alpha")}
        assert alphas == {float(torch.tensor(0.7))} or alphas == {0.7}
        assert {t.dtype for name, t in tensors.items() if not name.endswith(".alpha")} == {torch.bfloat16}
