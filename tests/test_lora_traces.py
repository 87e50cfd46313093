"""A LoRA that is taken away leaves no trace: bits, names, classes, copies, dtypes and places."""

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eridiff.lora import Lora, MergedModule, attach_lora, install_slots, merge_into, merge_lora
from eridiff.memory.stages import asked_once, on_device
from tests import tiny
from tests.loras import (
    FAMILIES,
    ask,
    bits,
    every_kind_on_flux,
    features,
    item,
    layers,
    some_lora,
    unchanged,
)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_times_attached_and_detached_leave_every_bit(dtype: torch.dtype) -> None:
    network = tiny.flux().to(dtype)
    before, plain = bits(network), ask(network)
    lora = every_kind_on_flux(network)
    with_lora = None
    for cycle in range(10):
        attached = attach_lora(network, lora, 0.7)
        for _ in range(99):
            attached.detach()
            attached.attach()
        found = ask(network)
        with_lora = found if with_lora is None else with_lora
        assert torch.equal(found, with_lora), cycle
        attached.detach()
    assert unchanged(network, before) and torch.equal(ask(network), plain)
    assert not any(module.lora_branches for module in network.modules() if hasattr(module, "lora_branches"))
    assert all(len(module._forward_hooks) == 1 for module in network.modules() if isinstance(module, nn.Linear))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hundred_merges_and_restores_leave_every_bit(dtype: torch.dtype) -> None:
    network = tiny.flux().to(dtype)
    before, plain = bits(network), ask(network)
    parameters = dict(network.named_parameters())
    pointers = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    lora = every_kind_on_flux(network)
    merged = None
    for _ in range(100):
        with merge_into(network, lora, 0.7):
            merged = bits(network) if merged is None else merged
            assert unchanged(network, merged)
    assert unchanged(network, before) and torch.equal(ask(network), plain)
    assert not unchanged(network, merged)
    for name, parameter in network.named_parameters():
        assert parameter is parameters[name] and parameter.data_ptr() == pointers[name] and not vars(parameter)


@pytest.mark.parametrize("family", FAMILIES)
def test_while_attached_names_classes_and_the_tree_are_the_networks_own(family: str) -> None:
    network = FAMILIES[family]()

    def tree() -> list[tuple[str, type]]:
        return [(name, type(module)) for name, module in network.named_modules()]

    names, modules, parameters = list(network.state_dict()), tree(), [id(p) for p in network.parameters()]
    attached = attach_lora(network, some_lora(network))
    assert list(network.state_dict()) == names and tree() == modules
    assert [id(p) for p in network.parameters()] == parameters
    assert not any(p is q for p in attached.parameters() for q in network.parameters())
    assert not [name for name, _ in attached.named_modules() if "_network" in name]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_merges_and_attached_loras_come_off_in_any_order(order: tuple[int, ...]) -> None:
    network = tiny.flux()
    before = bits(network)
    first, second = (some_lora(network, seed) for seed in (1, 2))
    norm = Lora((item(network, "double_blocks.0.image.q_norm", {"w_norm": (16,)}, "norm"),))
    kinds: list[Callable[[Any], Any]] = [
        lambda n: merge_into(n, first), lambda n: attach_lora(n, norm, 0.5), lambda n: merge_into(n, second), lambda n: merge_into(n, norm),
    ]  # fmt: skip
    changes = [change(network) for change in kinds]
    both = merge_lora(tiny.flux().state_dict(), [(first, 1.0), (second, 1.0)]).state
    name = "double_blocks.0.image.qkv.weight"
    assert torch.equal(network.get_parameter(name), both[name]), "each computed on the network's own weights"
    for count, place in enumerate(order, 1):
        one = changes[place]
        one.restore() if isinstance(one, MergedModule) else one.detach()
        other = tiny.flux()
        for left in sorted(order[count:]):
            kinds[left](other)
        assert unchanged(network, bits(other)), "what is left is as if it had been alone"
    assert unchanged(network, before)
    changes[0].restore()
    assert unchanged(network, before)


def test_what_is_left_after_one_merge_is_taken_out_is_the_other() -> None:
    network, lora = tiny.flux(), some_lora(tiny.flux(), 2)
    with merge_into(network, some_lora(network, 1)):
        kept = merge_into(network, lora, 0.3)
    with merge_into(tiny.flux(), lora, 0.3) as alone:
        assert unchanged(network, bits(alone.module))
    assert kept.originals.keys() == set(kept.merged.tensors)


def test_merges_of_different_weights_come_off_in_any_order() -> None:
    network = tiny.flux()
    before = bits(network)
    items = some_lora(network).items
    first, second = (merge_into(network, Lora(part)) for part in (items[:5], items[5:]))
    first.restore()
    assert not unchanged(network, before)
    second.restore()
    assert unchanged(network, before)


def test_a_merge_is_restored_on_the_network_where_it_is_now() -> None:
    network = tiny.flux()
    merged = merge_into(network, some_lora(network))
    network.double()
    merged.restore()
    assert {p.dtype for p in network.parameters()} == {torch.float64}
    assert unchanged(network, bits(tiny.flux().double()))


@torch.no_grad()
def test_a_copied_network_is_without_the_branches_and_its_own() -> None:
    network = tiny.flux()
    plain = ask(network)
    attached = attach_lora(network, some_lora(network))
    found = ask(network)
    other = copy.deepcopy(network)
    other_network, other_set = copy.deepcopy((network, attached))
    attached.detach()
    assert torch.equal(ask(network), plain)
    assert torch.equal(ask(other), plain) and torch.equal(ask(other_network), plain)
    assert other_set.network is other_network and not other_set.attached
    other_set.attach()
    assert torch.equal(ask(other_network), found)
    other_set.detach()
    assert torch.equal(ask(other_network), plain)
    attach_lora(network, some_lora(network, seed=9))
    assert torch.equal(ask(other), plain)


def test_parameters_are_in_an_order_that_no_file_changes() -> None:
    network = tiny.flux()
    items = some_lora(network).items
    turned = [replace(one, tensors=dict(reversed(one.tensors.items()))) for one in reversed(items)]
    sets = attach_lora(network, Lora(items)), attach_lora(network, Lora(tuple(turned)))
    first, second = ([name for name, _ in one.named_parameters()] for one in sets)
    assert first == second


@torch.no_grad()
def test_a_saved_network_with_slots_is_read_back() -> None:
    network = tiny.flux()
    install_slots(network)
    plain = ask(network)
    attached = attach_lora(network, some_lora(network))
    found = ask(network)
    for what in (network, (network, attached)):
        file = io.BytesIO()
        torch.save(what, file)
        file.seek(0)
        back = torch.load(file, weights_only=False)
        assert torch.equal(ask(back if what is network else back[0]), found)
        if what is not network:
            back[1].detach()
            assert torch.equal(ask(back[0]), plain)


# dtypes and places


@torch.no_grad()
def test_a_sets_dtype_moves_and_its_scale_stays_exact() -> None:
    network = tiny.flux()
    attached = attach_lora(network, some_lora(network), 0.7, dtype=torch.float32)
    attached.to(torch.bfloat16).half().to(torch.float64)
    assert {p.dtype for p in attached.parameters()} == {torch.float64}
    assert {(branch.scale.dtype, float(branch.scale)) for branch in attached.all_branches()} == {(torch.float64, 0.7)}
    assert ask(network).dtype == torch.float32
    assert not [name for name in attached.state_dict() if name.endswith("scale")]


class Float8Linear(nn.Linear):
    """Weights stored in a byte, computed in the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


@torch.no_grad()
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_branches_of_every_kind_work_beside_weights_stored_in_float8(stored: torch.dtype) -> None:
    for network, layer, lora in layers("flux"):
        network.to(torch.bfloat16)
        layer.weight.data = layer.weight.data.to(stored).to(torch.bfloat16)
        x = features(layer).bfloat16()
        attached = attach_lora(network, lora, 0.7)
        expected = layer(x)
        attached.detach()
        plain, layer.__class__, layer.weight.data = layer(x), Float8Linear, layer.weight.data.to(stored)
        attached = attach_lora(network, lora, 0.7)
        assert {p.dtype for p in attached.parameters()} == {torch.bfloat16}
        assert torch.equal(layer(x), expected) and not torch.equal(expected, plain), lora.items
        attached.detach()
        assert torch.equal(layer(x), plain) and layer.weight.dtype == stored
        with merge_into(network, lora, 0.7) as merged:
            assert layer.weight.dtype == stored and merged.merged.rounded_away < merged.merged.changed
        assert torch.equal(layer(x), plain)
        layer.__class__, layer.weight.data = nn.Linear, layer.weight.data.to(torch.bfloat16)


@torch.no_grad()
def test_branches_come_along_when_a_network_visits_a_device() -> None:
    network = tiny.flux()
    lora = every_kind_on_flux(network)
    attached = attach_lora(network, lora, 0.7)
    found = ask(network)
    own = [id(t) for t in [*attached.parameters(), *attached.buffers()]]
    with on_device(network, torch.device("meta")):
        once = {id(p) for layer in asked_once(network) for p in layer.parameters()}
        assert once and all(t.is_meta != (id(t) in once) for t in network.parameters())
        assert all(t.is_meta for t in [*attached.parameters(), *attached.buffers()])
    with on_device(network, torch.device("cpu")):
        assert torch.equal(ask(network), found)
    assert [id(t) for t in [*attached.parameters(), *attached.buffers()]] == own
    assert torch.equal(ask(network), found)
