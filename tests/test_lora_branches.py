"""LoRAs beside a network: every kind computes its merge; several add up, weighed by module and by row; errors."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from eridiff.errors import LoraError
from eridiff.lora import Lora, attach_lora, inject_lora, merge_into, merge_lora
from tests import loras, tiny
from tests.loras import (
    EVERY_KIND,
    FAMILIES,
    arguments,
    ask,
    bits,
    every_kind_on_flux,
    features,
    item,
    layers,
    same,
    some_lora,
    unchanged,
    with_weights,
)

# what a branch computes


@torch.no_grad()
@pytest.mark.parametrize("dora", ["peft", "interpolate"])
@pytest.mark.parametrize("scale", [1.0, 0.4, -1.5, 0.0])
@pytest.mark.parametrize("family", EVERY_KIND)
def test_a_branch_of_every_kind_equals_its_merge_at_every_scale(family: str, scale: float, dora: str) -> None:
    for network, layer, lora in layers(family):
        plain = layer(features(layer))
        attached = attach_lora(network, lora, scale, dora=dora)
        beside = layer(features(layer))
        attached.detach()
        with merge_into(network, lora, scale, dtype=torch.float64, dora=dora):
            assert same(beside, layer(features(layer))), lora.items
        acts = scale != 0 or (lora.items[0].dora and dora == "peft")
        assert same(beside, plain, 1e-6) != acts, lora.items


@torch.no_grad()
@pytest.mark.parametrize("family", EVERY_KIND)
def test_every_kind_takes_a_scale_for_each_row(family: str) -> None:
    for network, layer, lora in layers(family):
        plain = layer(features(layer))
        attached = attach_lora(network, lora, dora="interpolate")
        whole = layer(features(layer))
        attached.set_scale([0.0, 1.0])
        rows = layer(features(layer))
        assert torch.equal(rows[0], plain[0]) and same(rows[1], whole[1]), lora.items
        shared = features(layer, batch=1)  # times that all rows share
        rows = layer(shared)
        attached.set_scale(1.0)
        assert rows.shape[0] == 2 and same(rows[1:], layer(shared)), lora.items
        attached.detach()
        assert same(rows[:1], layer(shared)), lora.items


@torch.no_grad()
@pytest.mark.parametrize("family", EVERY_KIND)
def test_all_kinds_together_equal_their_merge(family: str) -> None:
    network = FAMILIES[family]().double()
    lora = EVERY_KIND[family](network)
    merged = with_weights(network, merge_lora(network.state_dict(), lora, dtype=torch.float64).state)
    before, plain = bits(network), ask(network)
    attached = attach_lora(network, lora)
    assert same(ask(network), ask(merged))
    attached.detach()
    assert unchanged(network, before) and torch.equal(ask(network), plain)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_one_batch_holds_a_row_of_the_base_and_one_of_the_lora(family: str) -> None:
    network = FAMILIES[family]()
    lora = some_lora(network)
    plain = ask(network)
    attached = attach_lora(network, lora, 0.8)
    whole = ask(network)
    attached.set_scale([0.0, 0.8])
    rows = ask(network)
    assert torch.equal(rows[0], plain[0]) and torch.equal(rows[1], whole[1])
    assert not torch.allclose(rows[1], plain[1], rtol=1e-3)


@torch.no_grad()
def test_a_batch_of_three_rows_has_three_scales_in_forward_too() -> None:
    network = tiny.flux().double()
    lora = some_lora(network)
    latents, (text, pooled, _, grid, guidance) = arguments(network, batch=3)
    times = torch.tensor([[0.9, 0.5, 0.1]], dtype=torch.float64)
    attached = attach_lora(network, lora, torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64))
    rows = network(latents, text, pooled, times, grid, guidance)
    for row, scale in enumerate([0.3, -1.0, 2.0]):
        attached.set_scale(scale)
        assert same(rows[row], network(latents, text, pooled, times, grid, guidance)[row])


# several, and their weights


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_several_loras_add_up_each_at_its_own_scale(family: str) -> None:
    network = FAMILIES[family]().double()
    loras = [
        (some_lora(network, seed, rank), scale) for seed, rank, scale in ((1, 2, 0.5), (2, 5, -0.75), (3, 1, 1.25))
    ]
    state = network.state_dict()
    total = {name: tensor.clone() for name, tensor in state.items()}
    for lora, scale in loras:
        for name, tensor in merge_lora(state, lora, scale, dtype=torch.float64).state.items():
            total[name] += tensor - state[name]
    summed = ask(with_weights(network, total))
    for lora, scale in loras:
        attach_lora(network, lora, scale)
    assert same(ask(network), summed, 1e-11)


@torch.no_grad()
@given(st.permutations([(lora, on) for lora in range(3) for on in (True, False)]))
@settings(max_examples=15, deadline=None)
def test_in_whatever_order_loras_come_and_go_only_those_that_are_there_count(order: list[tuple[int, bool]]) -> None:
    network = tiny.flux().double()
    loras = [some_lora(network, seed) for seed in range(3)]
    sets = [attach_lora(network, lora).detach() for lora in loras]
    plain, there = ask(network), set()
    for which, on in order:
        (sets[which].attach if on else sets[which].detach)()
        there = there | {which} if on else there - {which}
    fresh = tiny.flux().double()
    for which in there:
        attach_lora(fresh, loras[which])
    assert same(ask(network), ask(fresh))
    for lora in sets:
        lora.detach()
    assert torch.equal(ask(network), plain)


@torch.no_grad()
def test_attaching_twice_counts_once_and_a_detached_set_comes_back_with_its_scale() -> None:
    network = tiny.mmdit()
    attached = attach_lora(network, some_lora(network), 0.6)
    found = ask(network)
    assert torch.equal(ask((attached.attach(), network)[1]), found)
    attached.detach().detach()
    attached.attach()
    assert torch.equal(ask(network), found)


@torch.no_grad()
def test_patterns_weigh_blocks_and_modules_and_leave_the_others() -> None:
    network = tiny.flux().double()
    lora = some_lora(network)
    whole = attach_lora(
        network, lora, {"double_blocks.0.*": 0.0, "double_blocks.*.qkv": 0.5, "single_blocks.1.linear2": 2.0}
    )
    found = ask(network)
    whole.detach()

    def part(pattern: str, *, but: str = "?") -> Lora:
        from fnmatch import fnmatchcase

        chosen = (i for i in lora.items if fnmatchcase(i.target.module, pattern) and but not in i.target.module)
        return Lora(tuple(chosen))

    attach_lora(network, part("double_blocks.1.*.qkv"), 0.5)
    attach_lora(network, part("double_blocks.1.*", but="qkv"))
    attach_lora(network, part("single_blocks.0.*"))
    attach_lora(network, part("single_blocks.1.*", but="linear2"))
    attach_lora(network, part("single_blocks.1.linear2"), 2.0)
    assert same(found, ask(network))


@torch.no_grad()
def test_a_pattern_of_a_module_weighs_all_its_rows_and_the_rows_have_names_too() -> None:
    network = tiny.flux().double()
    qkv = "double_blocks.0.image.qkv"
    rows = [item(network, qkv, {"down": (2, 32), "up": (32, 2)}, rows=(i, i + 32), seed=i) for i in (0, 32, 64)]
    attached = attach_lora(network, Lora(tuple(rows)), {"double_blocks.*.qkv": 0.5})
    assert [float(branch.scale) for branch in attached.all_branches()] == [0.5, 0.5, 0.5]
    attached.set_scale({f"{qkv}[32:64]": 2.0})
    assert [float(branch.scale) for branch in attached.all_branches()] == [0.5, 2.0, 0.5]


@pytest.mark.parametrize(
    "scale, words",
    [
        ({"double_block.*": 1.0}, "matches 'double_block.*'; there are double_blocks.0.image.qkv, "),
        ({"double_blocks.0.*": 1.0, "up.*": 0.0}, "matches 'up.*'"),
        (float("nan"), "a finite number"),
        ([1.0, float("inf")], "a finite number"),
        ([[1.0]], "a finite number"),
    ],
)
def test_a_scale_that_means_nothing_is_refused_and_changes_nothing(scale: Any, words: str) -> None:
    network = tiny.flux()
    attached = attach_lora(network, some_lora(network), 0.5)
    with pytest.raises(LoraError, match=words.replace("*", r"\*").replace(".", r"\.")):
        attached.set_scale(scale)
    assert {float(branch.scale) for branch in attached.all_branches()} == {0.5}
    plain = tiny.flux()
    with pytest.raises(LoraError):
        attach_lora(plain, some_lora(plain), scale)
    assert torch.equal(ask(plain), ask(tiny.flux()))


def test_what_has_one_scale_for_all_rows_says_so() -> None:
    network = tiny.flux().double()
    items = every_kind_on_flux(network).items
    directed = attach_lora(network, Lora(tuple(i for i in items if i.dora)))
    with pytest.raises(LoraError, match="interpolate"):
        directed.set_scale([0.0, 1.0])
    norm = attach_lora(network, Lora(tuple(i for i in items if i.kind == "norm")))
    with pytest.raises(LoraError, match="double_blocks.0.image.q_norm is changed in place"):
        norm.set_scale([0.0, 1.0])


@torch.no_grad()
def test_what_is_changed_in_place_follows_its_scale_attached_or_not() -> None:
    network = tiny.flux().double()
    norm = network.double_blocks[0].image.q_norm.weight
    before = norm.clone()
    change = item(network, "double_blocks.0.image.q_norm", {"w_norm": (16,)}, "norm")
    attached = attach_lora(network, Lora((change,)), 0.5)
    assert torch.allclose(norm, before + 0.5 * change.tensors["w_norm"])
    attached.set_scale({"double_blocks.*": -2.0})
    assert torch.allclose(norm, before - 2 * change.tensors["w_norm"])
    attached.detach()
    assert torch.equal(norm, before)
    attached.set_scale(0.25)
    assert torch.equal(norm, before)
    attached.attach()
    assert torch.allclose(norm, before + 0.25 * change.tensors["w_norm"])


# refused


def test_a_lora_for_another_network_is_refused_in_a_sentence() -> None:
    flux, unet = tiny.flux(), tiny.unet()
    lora = some_lora(flux)
    with pytest.raises(LoraError, match="the LoRA is for flux, and this network is unet"):
        attach_lora(unet, lora)
    with pytest.raises(LoraError, match="parts for flux and unet; choose one"):
        attach_lora(unet, Lora(lora.items + some_lora(unet).items))
    with pytest.raises(LoraError, match="parts for nothing"):
        attach_lora(unet, Lora(()))
    with pytest.raises(LoraError, match="Linear has no double_blocks.0.image.qkv.weight, which the LoRA changes"):
        attach_lora(nn.Linear(2, 2), lora)
    with pytest.raises(LoraError, match="dora must be peft or interpolate, not 'x'"):
        attach_lora(flux, lora, dora="x")
    with pytest.raises(LoraError, match="two modules of the LoRA change double_blocks"):
        attach_lora(flux, Lora(lora.items[:1] * 2))


def test_layers_beside_which_a_branch_would_do_nothing_are_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.grouped = nn.Conv2d(4, 4, 3, groups=2)
            self.ring = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")

    for pattern, words in {
        "attention.out_proj": "attention.out_proj is never called", "grouped": "grouped has groups", "ring": "pads by circular",
    }.items():  # fmt: skip
        with pytest.raises(LoraError, match=words):
            inject_lora(Net(), 2, targets=[pattern])


THIN: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "lora": ("lora", {"down": (2, 96), "up": (64, 2)}),
    "lokr": ("lokr", {"lokr_w1": (4, 8), "lokr_w2": (16, 12)}),
    "lokr of low rank": ("lokr", {"lokr_w1": (4, 8), "lokr_w2_a": (16, 2), "lokr_w2_b": (2, 12)}),
    "loha": ("loha", {"hada_w1_a": (64, 2), "hada_w1_b": (2, 96), "hada_w2_a": (64, 3), "hada_w2_b": (3, 96)}),
    "dora": ("lora", {"down": (2, 96), "up": (64, 2), "magnitude": (64,)}),
    "dora by LyCORIS": ("lora", {"down": (2, 96), "up": (64, 2), "dora_scale": (64, 1)}),
}


@pytest.mark.parametrize("rule", ["peft", "interpolate"])
@pytest.mark.parametrize("kind", THIN)
def test_beside_a_linear_layer_nothing_of_the_weights_size_is_made(kind: str, rule: str) -> None:
    """And what comes out is the changed weight's product, with another LoRA beside it too."""
    network = nn.Sequential(nn.Linear(96, 64)).double().requires_grad_(False)
    wanted = loras.item(network, "0", THIN[kind][1], THIN[kind][0], ratio=0.6)
    other = loras.item(network, "0", {"down": (2, 96), "up": (64, 2)}, seed=9)
    x = torch.randn(3, 5, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight, bias = network[0].weight, network[0].bias
    change = wanted.change(weight, 0.7, rule) + other.change(weight)
    expected = torch.nn.functional.linear(x, weight + change, bias)
    attach_lora(network, Lora((other,)))
    attach_lora(network, Lora((wanted,)), 0.7, dora=rule)

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not any(t is weight for t in args):
                self.largest = max(self.largest, out.untyped_storage().nbytes())
            return out

    with torch.no_grad(), Sizes() as sizes:
        found = network(x)
    assert loras.same(found, expected) and 0 < sizes.largest < weight.nbytes


@pytest.mark.parametrize("kind", ["lokr", "loha", "dora"])
def test_in_bfloat16_a_change_is_as_exact_as_its_rounding(kind: str) -> None:
    network = nn.Sequential(nn.Linear(96, 64)).requires_grad_(False)
    wanted = loras.item(network, "0", THIN[kind][1], THIN[kind][0])
    x = torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.linear(x, network[0].weight + wanted.change(network[0].weight), network[0].bias)
    narrow = network.to(torch.bfloat16)
    attach_lora(narrow, Lora((wanted,)))
    distance = float((narrow(x.bfloat16()).float() - expected).norm() / expected.norm())
    assert distance < 2 * torch.finfo(torch.bfloat16).eps
