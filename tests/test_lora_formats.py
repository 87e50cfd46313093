"""LoRAs from one format to another and back, and merged: nothing lost, nothing rounded silently."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from eridiff.errors import LoraError
from eridiff.lora import Lora, Row, load_lora, merge_lora, save_lora, table
from eridiff.lora.deltas import Item
from eridiff.lora.names import Target
from eridiff.lora.save import FORMATS, lora_tensors
from tests.lora_files import CASES, loaded, look_names_up_once, networks_of, write
from tests.tiny import flux

CANNOT = {  # (case, format) -> what the sentence says; every other case can be written in every format
    ("lora-ai-toolkit-flux", "diffusers"): "single_blocks.0.k_norm: a diffusers-PEFT file cannot hold 'full'",
    ("lora-bfl-control-flux", "diffusers"): "double_blocks.0.image.k_norm: a diffusers-PEFT file cannot hold 'set'",
    ("lora-comfy-prefix-flux", "diffusers"): "double_blocks.0.image.q_norm: a diffusers-PEFT file cannot hold 'set'",
    ("lora-dora-kohya-axis", "diffusers"): "cannot hold a DoRA of the input's lengths; write kohya",
    ("lora-full-diff", "diffusers"): "v_proj: a diffusers-PEFT file cannot hold 'full'; write kohya or native",
    ("lora-ia3", "diffusers"): "cannot hold 'ia3'; write kohya or native",
    ("lora-kohya-locon", "diffusers"): "cannot hold 'mid'; write kohya or native",
    ("lora-loha", "diffusers"): "cannot hold 'loha'; write kohya or native",
    ("lora-lokr", "diffusers"): "cannot hold 'lokr'; write kohya or native",
    ("lora-lokr-flux-lycoris", "diffusers"): "cannot hold 'lokr'",
    ("lora-lokr-flux-lycoris", "kohya"): "kind lokr of some of its rows make none of the whole weight",
    ("lora-lokr-flux-lycoris", "native"): "kind lokr of some of its rows make none of the whole weight",
}


@pytest.fixture(autouse=True)
def names_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    look_names_up_once(monkeypatch)


def state_of(network: nn.Module | dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(network.state_dict()) if isinstance(network, nn.Module) else network


def distance(one: Lora, other: Lora, networks: dict[str, Any]) -> float:
    """The largest difference between the merged weights of two LoRAs, in float64, over the largest change."""
    worst = 0.0
    for network in {*one.networks, *other.networks}:
        state = {n: t.double() for n, t in state_of(networks[network]).items()}
        first, second = (merge_lora(state, lora.of(network), dtype=torch.float64) for lora in (one, other))
        assert set(first.tensors) == set(second.tensors)
        for name in first.tensors:
            moved = first.state[name] - second.state[name]
            change = first.state[name] - (state[name] if state[name].shape == moved.shape else 0)
            worst = max(worst, float(moved.abs().max() / change.abs().max()))
    return worst


def alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """The same names, dtypes and bits."""
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one
    )


def one_scale_a_weight(lora: Lora) -> bool:
    """Whether no fused weight gets parts of different scale: a format with one alpha folds those into the matrices."""
    scales: dict[str, set[float]] = {}
    for item in lora.items:
        scales.setdefault(item.target.network + item.target.name, set()).add(item.ratio)
    return all(len(found) == 1 for found in scales.values())


@pytest.mark.parametrize("case", CASES)
def test_every_golden_comes_back_from_every_format_that_can_hold_it(case: str, tmp_path: Path) -> None:
    """Written in one format, read and written in another, it is bit for bit what is written in the other at once."""
    networks, lora = networks_of(case), loaded(f"{case}/lora.safetensors")
    possible = [form for form in FORMATS if (case, form) not in CANNOT]
    for form in possible:
        again = load_lora(save_lora(lora, tmp_path / "f", networks, format=form), networks)
        assert distance(lora, again, networks) < 1e-6
        for other in possible if one_scale_a_weight(lora) else ():
            at_once, after = (lora_tensors(found, networks, format=other) for found in (lora, again))
            assert alike(at_once[0], after[0]) and at_once[1] == after[1], (form, other)


@pytest.mark.parametrize(("case", "form"), CANNOT)
def test_what_a_format_cannot_hold_is_reported_and_nothing_written(case: str, form: str, tmp_path: Path) -> None:
    with pytest.raises(LoraError) as raised:
        save_lora(loaded(f"{case}/lora.safetensors"), tmp_path / "f", networks_of(case), format=form)
    assert CANNOT[case, form] in str(raised.value) and list(tmp_path.iterdir()) == []


FUSED = {  # names in diffusers' layout that are rows of one weight of eridiff's, and the fused name
    "transformer_blocks.0.attn.to_{}": ("qkv", "double_blocks_0_img_attn_qkv"),
    "single_transformer_blocks.0.{}": (["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"], "single_blocks_0_linear1"),
}
NETWORK = {"flux": flux()}


@st.composite
def split_files(draw: st.DrawFn) -> dict[str, Tensor]:
    """A file of some parts of fused weights: any rank, any alpha or none, in any dtype."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    tensors = {}
    for pattern, (parts, _) in FUSED.items():
        for part in draw(st.sets(st.sampled_from(list(parts)), min_size=1)):
            name, rank = "transformer." + pattern.format(part), draw(st.integers(1, 3))
            rows = 128 if part == "proj_mlp" else 32
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, 32, generator=g).to(dtype)
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank, generator=g).to(dtype)
            alpha = draw(st.sampled_from([None, 1.0, 0.5, -2.0, 0.7]))
            if alpha is not None:
                tensors[f"{name}.alpha"] = torch.tensor(alpha).to(dtype)
    return tensors


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=split_files(), forms=st.permutations(FORMATS))
def test_any_parts_of_fused_weights_survive_all_formats(
    tensors: dict[str, Tensor], forms: list[str], tmp_path: Path
) -> None:
    lora = load_lora(write(tmp_path / "f", tensors), NETWORK)
    found = lora
    for form in forms:
        found = load_lora(save_lora(found, tmp_path / "g", NETWORK, format=form), NETWORK)
    assert distance(lora, found, NETWORK) < 5e-7  # folded into the matrices, a scale is rounded once, in float32
    if one_scale_a_weight(lora):
        for form in FORMATS:
            assert alike(*(lora_tensors(each, NETWORK, format=form)[0] for each in (lora, found)))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rank=st.integers(1, 4), alpha=st.floats(-8, 8).filter(lambda a: abs(a) > 0.01), seed=st.integers(0, 1000),
    forms=st.permutations(FORMATS), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_a_fused_lora_survives_being_split(
    rank: int, alpha: float, seed: int, forms: list[str], dtype: torch.dtype, tmp_path: Path
) -> None:
    """Each part gets the same `down`, and the file that comes back has it once."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for (_, name), rows in zip(FUSED.values(), (96, 224), strict=True):
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(rank, 32, generator=g).to(dtype)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(rows, rank, generator=g).to(dtype)
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(alpha).to(dtype)
    lora = found = load_lora(write(tmp_path / "f", tensors), NETWORK)
    for form in forms:
        found = load_lora(save_lora(found, tmp_path / "g", NETWORK, format=form), NETWORK)
    written = lora_tensors(found, NETWORK, format="kohya")[0]
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(written[name].double(), tensor.double()), name
    assert distance(lora, found, NETWORK) == 0


def test_a_scale_folded_into_bfloat16_matrices_makes_them_float32(tmp_path: Path) -> None:
    """A kohya file has one alpha for q, k and v: rounding 0.7 times `up` to bfloat16 would be off by 0.4 %."""
    name, tensors, g = "transformer.transformer_blocks.0.attn.to_", {}, torch.Generator().manual_seed(0)
    for part, alpha in (("q", 0.7), ("k", 1.0)):
        tensors[f"{name}{part}.lora_A.weight"] = torch.randn(2, 32, generator=g).bfloat16()
        tensors[f"{name}{part}.lora_B.weight"] = torch.randn(32, 2, generator=g).bfloat16()
        tensors[f"{name}{part}.alpha"] = torch.tensor(alpha)
    lora = load_lora(write(tmp_path / "f", tensors), NETWORK)
    again = load_lora(save_lora(lora, tmp_path / "g", NETWORK, format="kohya"), NETWORK)
    assert again.items[0].tensors["up"].dtype == torch.float32 and 0 < distance(lora, again, NETWORK) < 1e-6


def lora_of(**changes: Item) -> Lora:
    return Lora(tuple(changes.values()))


def plain_item(rows: int, columns: int, module: str = "fc", rank: int = 2, seed: int = 0, **options: Any) -> Item:
    g = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, columns, generator=g), torch.randn(rows, rank, generator=g)
    return Item(module, Target("", module), "lora", {"down": down, "up": up}, rank=rank, **options)


def test_merging_is_w_plus_scale_times_up_times_down() -> None:
    weight, item = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), plain_item(6, 4)
    merged = merge_lora({"fc.weight": weight, "fc.bias": torch.zeros(6)}, lora_of(fc=item), scale=0.8)
    expected = weight + 0.8 * item.tensors["up"] @ item.tensors["down"]
    assert torch.allclose(merged.state["fc.weight"], expected, rtol=0, atol=1e-6)
    assert merged.tensors == ("fc.weight",) and merged.changed == 24 and merged.rounded_away == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float32])
def test_the_count_of_weights_that_rounding_swallows_is_right(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    weight, item = (torch.randn(64, 48, generator=g) * 0.02).to(dtype), plain_item(64, 48, ratio=1e-4)
    item.tensors["up"][:8] = 0  # rows that do not change are not counted
    merged = merge_lora({"fc.weight": weight, "other": weight}, lora_of(fc=item), dtype=torch.float64)
    old = weight.double()
    wanted = old + 1e-4 * (item.tensors["up"].double() @ item.tensors["down"].double())
    swallowed = (wanted != old) & (wanted.to(dtype).double() == old)
    assert merged.rounded_away == int(swallowed.sum()) and merged.changed == int((wanted != old).sum())
    assert (merged.rounded_away > 1000) == (dtype in (torch.bfloat16, torch.float8_e4m3fn))
    assert torch.equal(merged.state["fc.weight"].double(), wanted.to(dtype).double()), "rounded once"
    assert f"{merged.rounded_away / merged.changed:.1%} of {merged.changed} weights" in str(merged)


def test_a_part_of_a_state_dict_is_merged_and_nothing_of_it_is_an_error() -> None:
    lora = lora_of(a=plain_item(6, 4, "a"), b=plain_item(6, 4, "b"))
    state = {"a.weight": torch.ones(6, 4), "c.weight": torch.ones(6, 4)}
    merged = merge_lora(state, lora)
    assert merged.tensors == ("a.weight",) and merged.state.keys() == state.keys()
    assert merged.state["c.weight"] is state["c.weight"] and torch.equal(state["a.weight"], torch.ones(6, 4))
    with pytest.raises(LoraError, match="changes nothing of this state dict"):
        merge_lora({"c.weight": torch.ones(6, 4)}, lora)


def test_several_loras_on_one_weight_add_up_whatever_their_order() -> None:
    """Also DoRA and (IA)3, which depend on the weight: each is computed on the unmerged one."""
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain, dora = plain_item(6, 4), plain_item(6, 4, seed=1)
    dora = dataclasses.replace(dora, tensors={**dora.tensors, "magnitude": torch.arange(1.0, 7.0)})
    ia3 = Item("fc", Target("", "fc"), "ia3", {"multiplier": torch.ones(6) / 4, "on_input": torch.tensor(0)})
    alone = [merge_lora({"fc.weight": weight}, lora_of(fc=i), dtype=torch.float64).state["fc.weight"] for i in (plain, dora, ia3)]  # fmt: skip
    expected = weight + sum(found - weight for found in alone)
    for items in ((plain, dora, ia3), (ia3, plain, dora)):
        found = merge_lora({"fc.weight": weight}, Lora(items), dtype=torch.float64).state["fc.weight"]
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_the_ledger_as_text_has_every_status_and_the_counts() -> None:
    empty = (None, None, None, None)
    rows = [
        Row("k1", "double_blocks.0.image.qkv", "lora", 4, 2.0, 0.5, 0.0123456, "applied"),
        Row("k2", "single_blocks.0.linear1[0:16]", "lora+bias", 4, None, 1.0, None, "applied to a slice", "no alpha: scale 1"),
        Row("k3", "time_in", "lora", 4, 2.0, 0.5, 0.0, "dead", "all zero: changes nothing"),
        Row("k4", "", "lora", *empty, "unmatched", "the nearest is 'k5'"),
        Row("lora_te1_k", "", "lora", *empty, "no text encoder here"),
        Row("k6", "text_in", "lora", *empty, "shape mismatch", "needs 4 columns"),
    ]  # fmt: skip
    lines = table(rows).splitlines()
    assert lines[0].split() == ["status", "file", "key", "module", "kind", "rank", "alpha", "scale", "|dW|/|W|", "note"]
    columns = [lines[0].index(word) for word in ("file key", "module", "kind", "rank", "alpha", "scale", "|dW|", "note")]  # fmt: skip
    cut = [[line[a:b].strip() for a, b in zip([0, *columns], [*columns, None], strict=True)] for line in lines[1:-1]]
    assert cut[0] == ["applied", "k1", "double_blocks.0.image.qkv", "lora", "4", "2", "0.5", "0.01235", ""]
    assert cut[1][5:] == ["-", "1", "-", "no alpha: scale 1"] and cut[3][2:] == ["-", "lora", "-", "-", "-", "-", "the nearest is 'k5'"]  # fmt: skip
    assert [line[0] for line in cut] == [row.status for row in rows]
    counts = "1 applied, 1 applied to a slice, 1 dead, 1 unmatched, 1 no text encoder here, 1 shape mismatch"
    assert lines[-1] == f"6 modules: {counts}"


@pytest.mark.parametrize("form", FORMATS)
def test_both_kinds_of_bias_survive(form: str, tmp_path: Path) -> None:
    """`lora_B.bias` is multiplied by the scale, `diff_b` is not; kohya has only the second, peft only the first."""
    network = flux()
    g = torch.Generator().manual_seed(0)
    tensors = {"down": torch.randn(2, 32, generator=g), "up": torch.randn(32, 2, generator=g)}
    biases = {"diff_b": torch.randn(32, generator=g), "up_bias": torch.randn(32, generator=g)}
    target = Target("flux", "double_blocks.0.image.proj")
    lora = Lora((Item("", target, "lora", {**tensors, **biases}, 0.25, 0.5, 2),))
    again = load_lora(save_lora(lora, tmp_path / "f", network, format=form), network)
    assert distance(lora, again, {"flux": network}) < 1e-6 and len(again.items) == 1


@pytest.mark.parametrize("form", FORMATS)
def test_dora_of_a_convolution_survives(form: str, tmp_path: Path) -> None:
    """peft stores the lengths of the outputs as [1, o, 1, 1], which looks like LyCORIS' lengths of the inputs."""
    network = nn.Sequential(nn.Conv2d(4, 6, 3))
    g = torch.Generator().manual_seed(0)
    tensors = {
        "0.lora_A.weight": torch.randn(2, 4, 3, 3, generator=g), "0.lora_B.weight": torch.randn(6, 2, 1, 1, generator=g),
        "0.lora_magnitude_vector": torch.rand(1, 6, 1, 1, generator=g) + 1,
    }  # fmt: skip
    lora = load_lora(write(tmp_path / "f", tensors), network)
    again = lora_tensors(lora, network, format=form)[0]
    lengths = next(t for name, t in again.items() if name.endswith(("dora_scale", "magnitude_vector", "magnitude")))
    assert torch.equal(lengths.flatten(), tensors["0.lora_magnitude_vector"].flatten())
    assert lengths.shape == ((1, 6, 1, 1) if form == "diffusers" else (6, 1, 1, 1))


def test_an_alpha_that_bfloat16_would_round_is_written_wider(tmp_path: Path) -> None:
    tensors = {"down": torch.ones(2, 32).bfloat16(), "up": torch.ones(32, 2).bfloat16()}
    item = Item("", Target("flux", "double_blocks.0.image.proj"), "lora", tensors, 0.35, 0.7, 2)
    again = load_lora(save_lora(Lora((item,)), tmp_path / "f", NETWORK, format="kohya"), NETWORK)
    assert again.items[0].ratio == 0.35 and again.items[0].tensors["up"].dtype == torch.bfloat16


def test_rows_that_cross_the_parts_of_a_format_are_refused(tmp_path: Path) -> None:
    tensors = {"down": torch.ones(2, 32), "up": torch.ones(48, 2)}
    item = Item("", Target("flux", "double_blocks.0.image.qkv", rows=(0, 48)), "lora", tensors, rank=2)
    with pytest.raises(LoraError, match="the rows of its LoRA cross those of"):
        save_lora(Lora((item,)), tmp_path / "f", NETWORK, format="diffusers")
