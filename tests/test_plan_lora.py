"""The plan's two LoRA tests, by their names, for all three families: the network and the text encoders, from files."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from eridiff.cli import main
from eridiff.errors import ConfigError, LoraError
from eridiff.inference import DiffusionInference, FluxInference
from eridiff.lora import inject_lora, load_lora, merge_into, save_lora
from eridiff.lora.load import Lora
from eridiff.lora.names import network_of
from eridiff.trace.record import relative_l2
from eridiff.weights.header import open_checkpoint
from eridiff.weights.load import load_network
from eridiff.weights.save import write_tensors
from tests import tiny

WRITERS: dict[str, Callable[[Path], Path]] = {
    "flux": tiny.write_model, "sd3": tiny.write_sd3_model, "sdxl": tiny.write_sdxl_model,
}  # fmt: skip
FORMATS = ("kohya", "diffusers", "native")


@pytest.fixture(scope="module", params=list(WRITERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole small model, and in `lora/` a LoRA on its network and all its text encoders in every format."""
    folder = WRITERS[request.param](tmp_path_factory.mktemp(request.param) / "model")
    model = tiny.load(DiffusionInference, folder)
    modules = model.model.modules()
    items = []
    for kind, module in modules.items():
        made = inject_lora(module, 3, 1.5, "all-linear").detach()
        with torch.no_grad():
            for branch in made.all_branches():
                nn.init.normal_(branch.up, std=0.3, generator=torch.Generator().manual_seed(len(items)))

        items += [replace(item, target=replace(item.target, network=kind)) for item in made.lora().items]
    (folder.parent / "lora").mkdir()
    for format in FORMATS:
        save_lora(Lora(tuple(items)), folder.parent / "lora" / f"{format}.safetensors", modules, format=format)
    return folder


@pytest.fixture
def model(folder: Path) -> Any:
    return tiny.load(DiffusionInference, folder)


@pytest.mark.parametrize("format", FORMATS)
def test_lora_application(model: Any, folder: Path, format: str) -> None:
    """Every module of the file changes, in the network and the text encoders; sampling equals sampling with merged weights."""
    file = folder.parent / "lora" / f"{format}.safetensors"
    before = {kind: {n: t.clone() for n, t in m.state_dict().items()} for kind, m in model.model.modules().items()}
    handle = model.apply_lora(file, 0.7)
    assert {row.status for row in handle.ledger} <= {"applied", "applied to a slice"}
    measured = load_lora(file, model.model.modules(), measure=True).ledger
    assert all(row.change and row.change > 0 for row in measured)
    assert all(row.change is None for row in handle.ledger), "no weight is read for a column that nobody asked for"
    attached = tiny.draw(model, "a swan")
    for kind, module in model.model.modules().items():
        assert all(torch.equal(t, before[kind][name]) for name, t in module.state_dict().items())
    assert {target.network for one in handle.sets for target in one.targets()} == set(before)
    merged = tiny.draw(model, "a swan") if handle.merge() else None
    assert not any(one.attached for one in handle.sets), "what is merged takes no time per step"
    assert merged.settings[0]["loras"] == attached.settings[0]["loras"]
    assert relative_l2(attached.latents, merged.latents) < 1e-4 and not torch.equal(attached.latents, merged.latents)
    with pytest.raises(LoraError, match="merged at one scale: detach it"):
        handle.set_scale(0.5)
    handle.detach()
    for kind, module in model.model.modules().items():
        assert all(torch.equal(t, before[kind][name]) for name, t in module.state_dict().items())


def test_what_has_no_one_scale_is_not_merged_and_stays_attached(model: Any, folder: Path) -> None:
    handle = model.apply_lora(folder.parent / "lora" / "kohya.safetensors", torch.tensor([0.7]))
    attached = tiny.draw(model, "a swan").latents
    with pytest.raises(LoraError, match="merged at one scale for all"):
        handle.merge()
    assert torch.equal(tiny.draw(model, "a swan").latents, attached)
    handle.detach()


def test_lora_weights_properly_affect_output(model: Any, folder: Path) -> None:
    """The image changes, more with a larger scale; at scale 0 and after detaching it is, bit for bit, what it was."""
    plain = tiny.draw(model, "a swan")
    handle = model.apply_lora(folder.parent / "lora" / "kohya.safetensors")
    distances = []
    for scale in (0.0, 0.1, 0.5, 1.0):
        handle.set_scale(scale)
        drawn = tiny.draw(model, "a swan")
        distances.append(relative_l2(drawn.latents, plain.latents))
        assert drawn.settings[0]["loras"] == [{"file": str(handle.path), "scale": scale}]
    assert distances[0] == 0 and 1e-3 < distances[1] < distances[2] < distances[3]
    text = tiny.draw(model, "a swan").conditioning.positive.text
    assert relative_l2(text, plain.conditioning.positive.text) > 1e-3
    handle.detach()
    again = tiny.draw(model, "a swan")
    assert torch.equal(again.latents, plain.latents) and again.settings[0]["loras"] is None
    assert again.images[0].tobytes() == plain.images[0].tobytes()


def test_a_batch_holds_base_and_lora_side_by_side(model: Any, folder: Path) -> None:
    lora = load_lora(folder.parent / "lora" / "kohya.safetensors", model.model.modules()).of(model.family)
    given = {"seed": [1, 1], "cfg_scale": 1.0}
    plain = tiny.draw(model, ["a swan"] * 2, **given).latents
    with model.apply_lora(lora) as handle:
        whole = tiny.draw(model, ["a swan"] * 2, **given).latents
        handle.set_scale(torch.tensor([0.0, 1.0]))
        rows = tiny.draw(model, ["a swan"] * 2, **given).latents
    assert relative_l2(rows[0], plain[0]) < 1e-5 and relative_l2(rows[1], whole[1]) < 1e-5
    assert relative_l2(rows[0], rows[1]) > 1e-2


def test_nothing_is_left_of_a_lora_that_does_not_fit(model: Any, folder: Path, tmp_path: Path) -> None:
    plain = tiny.draw(model, "a swan")
    with pytest.raises(LoraError, match=r"no module of the LoRA matches 'nowhere\.\*'"):
        model.apply_lora(folder.parent / "lora" / "kohya.safetensors", {"nowhere.*": 1.0})
    other = next(path for path in (tiny.flux(), tiny.mmdit(), tiny.unet()) if not isinstance(path, type(model.network)))
    save_lora(inject_lora(other, 2), tmp_path / "other.safetensors", format="kohya")
    with pytest.raises(LoraError, match="nothing in it fits"):
        model.apply_lora(tmp_path / "other.safetensors")
    modules = {network_of(other): other, "clip": model.clip.module}  # CLIP-L is the same one in all families
    items = [
        replace(item, target=replace(item.target, network=kind))
        for kind, module in modules.items()
        for item in inject_lora(module, 2, targets="all-linear").detach().lora().items
    ]
    save_lora(Lora(tuple(items)), tmp_path / "other.safetensors", modules, format="kohya")
    with pytest.raises(LoraError, match="little in it fits .*; its names look like "):
        model.apply_lora(tmp_path / "other.safetensors")
    assert model.loras == [] and torch.equal(tiny.draw(model, "a swan").latents, plain.latents)


def test_rows_of_equal_prompts_have_scales_of_their_own_in_text_encoders_too(folder: Path) -> None:
    model = tiny.load(DiffusionInference, folder)
    lora = load_lora(folder.parent / "lora" / "kohya.safetensors", model.model.modules())
    rows = {}
    for part in ("network", "text_encoders"):
        with model.apply_lora(lora, torch.tensor([0.0, 1.0]), part=part):
            rows[part] = tiny.draw(model, ["a swan"] * 2, seed=3).latents
        for scale in (0.0, 1.0):
            with model.apply_lora(lora, scale, part=part):
                one = tiny.draw(model, "a swan", seed=3).latents
            assert relative_l2(rows[part][int(scale)], one[0]) < 1e-5
    assert relative_l2(rows["text_encoders"][0], rows["text_encoders"][1]) > 1e-3


def test_files_and_scales_come_from_yaml_and_the_command_line(folder: Path, tmp_path: Path, capsys: Any) -> None:
    lora, out = folder.parent / "lora", tmp_path / "swan.png"

    def drawn(*arguments: str) -> tuple[bytes, Any]:
        assert main(["sample", *arguments, "--model", str(folder), "--prompt", "a swan", "--out", str(out)]) == 0
        image = Image.open(out)
        return image.tobytes(), json.loads(image.text["eridiff"])["loras"]  # type: ignore[attr-defined]

    plain, none = drawn()
    line, told = drawn("--lora", f"{lora}/kohya.safetensors:0.5", "--lora", f"{lora}/diffusers.safetensors")
    assert none is None and plain != line and [entry["scale"] for entry in told] == [0.5, 1.0]
    assert "modules: " in capsys.readouterr().err
    config = tmp_path / "run.yaml"
    text = f"sample:\n  lora: [{lora}/kohya.safetensors, {{file: {lora}/diffusers.safetensors, scale: 1}}]\n  lora_scale: 0.5\n"
    config.write_text(text)
    assert drawn(str(config)) == (line, told)
    config.write_text(text + "  use_lora: false\n")
    assert drawn(str(config)) == (plain, None)
    assert main(["sample", "--lora", f"{lora}/nix.safetensors", "--model", str(folder), "--prompt", "a swan"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("eridiff: ")


def test_the_command_line_checks_converts_merges_extracts_and_resizes(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    def run(*arguments: object) -> str:
        assert main(["lora", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    lora = folder.parent / "lora"
    assert main(["lora", "check", str(lora / "kohya.safetensors"), "--model", "sdxl-bas"]) == 2
    assert capsys.readouterr().err.endswith(
        "'sdxl-bas' is not a file and not a published model; did you mean 'sdxl-base'?\n"
    )
    model = ("--model", folder)
    modules = tiny.load(DiffusionInference, folder).model.modules()
    ledger = run("check", lora / "kohya.safetensors", *model, "--wide").splitlines()
    count = len(load_lora(lora / "kohya.safetensors", modules).items)
    assert len(ledger) == count + 2 and "|dW|/|W|" in ledger[0] and ledger[-1] == f"{count} modules: {count} applied"
    run("convert", lora / "kohya.safetensors", *model, "--format", "diffusers", "--out", tmp_path / "d.safetensors")
    run("convert", tmp_path / "d.safetensors", *model, "--format", "kohya", "--out", tmp_path / "k.safetensors")
    there, back = (open_checkpoint(file) for file in (lora / "kohya.safetensors", tmp_path / "k.safetensors"))
    assert there.metadata == back.metadata and there.tensors.keys() == back.tensors.keys()
    assert all(torch.equal(there.read(name), back.read(name)) for name in there.tensors)

    own = next(iter(modules))
    only = tmp_path / "network.safetensors"
    save_lora(load_lora(lora / "kohya.safetensors", modules).of(own), only, modules, format="kohya")
    assert "tensors changed" in run("merge", f"{only}:0.5", *model, "--out", tmp_path / "merged.safetensors")
    merged, base = load_network(tmp_path / "merged.safetensors", progress=False), modules[own]
    with merge_into(base, load_lora(only, base), 0.5):
        assert all(torch.equal(t, base.state_dict()[name]) for name, t in merged.state_dict().items())
    difference = tmp_path / "difference.safetensors"
    said = run("extract", tmp_path / "merged.safetensors", folder, "--rank", 3, "--out", difference)
    assert "100.00% of the energy kept" in said
    with merge_into(base, load_lora(difference, base)):
        assert all(relative_l2(base.state_dict()[name], t) < 1e-5 for name, t in merged.state_dict().items())
    small = run("resize", lora / "kohya.safetensors", *model, "--rank", 1, "--out", tmp_path / "small.safetensors")
    assert {item.rank for item in load_lora(tmp_path / "small.safetensors", modules).items} == {1}
    assert 0.4 < float(small.splitlines()[-2].split("%")[0].split()[-1]) / 100 < 0.95


def test_a_control_lora_makes_a_flux_follow_an_image_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    model = tiny.load(FluxInference, tiny.write_model(tmp_path / "m"))
    g = torch.Generator().manual_seed(0)
    shapes = {
        "img_in.lora_A.weight": (4, 128), "img_in.lora_B.weight": (32, 4), "img_in.lora_B.bias": (32,),
        "double_blocks.0.img_attn.norm.query_norm.scale": (16,),
    }  # fmt: skip
    tensors = {name: 1.5 * torch.randn(shape, generator=g) for name, shape in shapes.items()}
    file = write_tensors(tensors, tmp_path / "flux1-depth-lora.safetensors", {})
    plain = tiny.draw(model, "a swan")
    state = {name: t.clone() for name, t in model.network.state_dict().items()}
    controls = [torch.full((1, 3, 32, 32), value) for value in (-0.5, 0.5)]
    with pytest.raises(ConfigError, match="control has no effect on Flux dev"):
        tiny.draw(model, "a swan", control=controls[0])
    with model.apply_lora(file, 0.85) as handle:
        assert model.variant == "depth" and model.network.config.in_channels == 128
        with pytest.raises(ConfigError, match="needs a control image"):
            tiny.draw(model, "a swan")
        first, second = (tiny.draw(model, "a swan", control=control).latents for control in controls)
        assert relative_l2(first, second) > 1e-3
        with pytest.raises(LoraError, match="enlarges image_in.weight"):
            handle.merge()
        assert torch.equal(tiny.draw(model, "a swan", control=controls[1]).latents, second), "attached as before"
    assert model.variant == "dev" and model.network.config.in_channels == 64
    assert all(torch.equal(t, state[name]) for name, t in model.network.state_dict().items())
    assert torch.equal(tiny.draw(model, "a swan").latents, plain.latents)
