"""LoRAs on compiled networks: what is attached, swapped, weighed or detached after compiling takes effect."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from eridiff.blocks import compile_blocks
from eridiff.lora import Lora, LoraSet, attach_lora, inject_lora, install_slots
from tests import tiny
from tests.loras import FAMILIES, ask, every_kind_on_flux, filled, same, some_lora

SMALL = replace(tiny.FLUX, double_depth=1, single_depth=1)
DEEP = replace(tiny.FLUX, double_depth=2, single_depth=10)


class Compiler:
    """A backend that counts what it compiles, and runs it as it is."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


@pytest.fixture
def compiler() -> Iterator[Compiler]:
    torch.compiler.reset()
    logging.getLogger("torch.__trace").propagate = False  # pytest would keep all of it
    yield Compiler()
    torch.compiler.reset()


def small_flux() -> Any:
    return tiny.flux(SMALL)


class Pair:
    """A network that is compiled and its twin that is not, with the same LoRAs."""

    def __init__(self, compiled: Any, eager: Any) -> None:
        self.compiled, self.eager = compiled, eager
        install_slots(eager)  # or attaching to it would make the compiler forget the other

    def attach(self, make: Callable[[Any], LoraSet]) -> tuple[LoraSet, LoraSet]:
        return make(self.compiled), make(self.eager)

    def agree(self) -> Tensor:
        """Both outputs, equal bit for bit: the backend computes what eager mode does."""
        found = ask(self.compiled)
        assert torch.equal(found, ask(self.eager))
        return found


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("mmdit", "unet")]


@torch.no_grad()
@pytest.mark.parametrize("family", ["flux", *SLOW])
def test_what_happens_to_loras_after_compiling_takes_effect(family: str, compiler: Compiler) -> None:
    pair = Pair(small_flux(), small_flux()) if family == "flux" else Pair(FAMILIES[family](), FAMILIES[family]())
    compile_blocks(pair.compiled, backend=compiler, fullgraph=True)
    seen = [pair.agree()]
    lora, other = some_lora(pair.eager), some_lora(pair.eager, seed=6)
    sets = pair.attach(lambda network: attach_lora(network, lora))
    seen.append(pair.agree())
    for one in sets:
        one.set_scale(0.5)
    seen.append(pair.agree())
    for one in sets:
        one.detach()
    assert torch.equal(pair.agree(), seen[0])
    swapped = pair.attach(lambda network: attach_lora(network, other))
    seen.append(pair.agree())
    for one in sets:
        one.attach()
    seen.append(pair.agree())
    for one in sets:
        one.set_scale([0.0, 1.0])
    seen.append(pair.agree())
    for one in (*sets, *swapped):
        one.detach()
    assert torch.equal(pair.agree(), seen[0])
    assert all(not same(a, b, 1e-4) for i, a in enumerate(seen) for b in seen[:i])


@torch.no_grad()
def test_scales_tensors_and_a_second_lora_of_the_same_shape_compile_nothing_anew(compiler: Compiler) -> None:
    network = tiny.flux(DEEP)
    compile_blocks(network, backend=compiler, fullgraph=True)
    ask(network)
    assert compiler.count == 2  # a double and a single block
    first, second = some_lora(network), some_lora(network, seed=6)
    attached = attach_lora(network, first)
    found = [ask(network)]
    assert compiler.count == 4
    for change in (
        lambda: attached.set_scale(0.3),
        lambda: attached.set_scale({"double_blocks.1.*": -1.0}),
        lambda: filled(attached, seed=8),
        lambda: attached.detach(),
        lambda: attach_lora(network, second),
    ):
        change()
        found.append(ask(network))
    assert compiler.count == 4
    assert all(not same(a, b, 1e-5) for i, a in enumerate(found) for b in found[:i])


@pytest.mark.slow
@torch.no_grad()
def test_a_scale_for_each_row_changes_without_compiling(compiler: Compiler) -> None:
    network = small_flux()
    compile_blocks(network, backend=compiler, fullgraph=True)
    attached = attach_lora(network, some_lora(network), [0.0, 1.0])
    first, count = ask(network), compiler.count
    attached.set_scale([1.0, 0.0])
    second = ask(network)
    assert compiler.count == count and not torch.equal(first, second)


@pytest.mark.slow
@torch.no_grad()
def test_a_lora_of_some_blocks_reaches_these_however_many_there_are(compiler: Compiler) -> None:
    network, eager = tiny.flux(DEEP), tiny.flux(DEEP)
    compile_blocks(network, backend=compiler, fullgraph=True)
    pair = Pair(network, eager)
    pair.agree()
    for block in range(9):
        pair.attach(lambda n: filled(inject_lora(n, 2, targets=f"single_blocks.{block}.linear1")))  # noqa: B023
        pair.agree()
    assert compiler.count == 3


@pytest.mark.slow
@torch.no_grad()
def test_branches_of_every_kind_are_compiled(compiler: Compiler) -> None:
    pair = Pair(tiny.flux(), tiny.flux())
    compile_blocks(pair.compiled, backend=compiler)
    plain = pair.agree()
    items = every_kind_on_flux(pair.eager).items
    pair.attach(lambda network: attach_lora(network, Lora(items), 0.6))
    assert not torch.equal(pair.agree(), plain)


@torch.no_grad()
def test_a_whole_network_compiled_with_slots_takes_loras(compiler: Compiler) -> None:
    network, eager = small_flux(), small_flux()
    install_slots(network)
    compiled = torch.compile(network, backend=compiler)
    latents, given = tiny_forward(eager)
    plain = compiled(latents, *given)
    assert torch.equal(plain, eager(latents, *given)) and compiler.count
    lora = some_lora(eager)
    sets = attach_lora(network, lora), attach_lora(eager, lora)
    found = compiled(latents, *given)
    assert torch.equal(found, eager(latents, *given)) and not torch.equal(found, plain)
    count = compiler.count
    for one in sets:
        one.set_scale(0.25)
    scaled = compiled(latents, *given)
    assert torch.equal(scaled, eager(latents, *given)) and not torch.equal(found, scaled) and compiler.count == count
    sets[0].detach()
    assert torch.equal(compiled(latents, *given), plain)


def tiny_forward(network: Any) -> tuple[Tensor, tuple[Any, ...]]:
    from tests.loras import arguments

    latents, (text, pooled, times, grid, guidance) = arguments(network)
    return latents, (text, pooled, times[:1, None].expand(1, 2).float(), grid, guidance)


def said(caplog: pytest.LogCaptureFixture) -> str:
    return " ".join(record.message for record in caplog.records if record.name.startswith("eridiff"))


@torch.no_grad()
@pytest.mark.parametrize(
    "how", ["blocks", pytest.param("network", marks=pytest.mark.slow), pytest.param("given", marks=pytest.mark.slow)]
)
def test_a_network_compiled_without_slots_is_compiled_again_and_says_so(
    how: str, compiler: Compiler, caplog: pytest.LogCaptureFixture
) -> None:
    network: Any = small_flux()
    compiled = network
    if how == "blocks":
        for block in [*network.double_blocks, *network.single_blocks]:
            block.compile(backend=compiler)
    else:
        compiled = torch.compile(network, backend=compiler)
    latents, given = tiny_forward(network)
    plain = compiled(latents, *given)
    with caplog.at_level(logging.WARNING, "eridiff"):
        attached = attach_lora(compiled if how == "given" else network, some_lora(small_flux()))
    assert "the network had no slots for LoRAs" in said(caplog)
    found = compiled(latents, *given)
    eager = small_flux()
    attach_lora(eager, some_lora(eager))
    assert torch.equal(found, eager(latents, *given)) and not torch.equal(found, plain)
    caplog.clear()
    attached.detach()
    assert torch.equal(compiled(latents, *given), plain)
    attached.attach()
    assert torch.equal(compiled(latents, *given), found) and not said(caplog)


def test_where_nothing_was_compiled_nothing_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.utils.counters.clear()
    network = small_flux()
    torch.optim.SGD(network.parameters())  # which imports the compiler
    with caplog.at_level(logging.INFO, "eridiff"):
        attach_lora(network, some_lora(small_flux()))
    assert not said(caplog)


@pytest.mark.slow
def test_a_compiled_network_trains_its_lora_as_eager_mode_does(compiler: Compiler) -> None:
    pair = Pair(small_flux(), small_flux())
    compile_blocks(pair.compiled, backend="aot_eager", fullgraph=True)
    sets = pair.attach(lambda network: filled(inject_lora(network, 2)))
    for network in (pair.compiled, pair.eager):
        ask(network).square().mean().backward()
    for a, b in zip(*(one.parameters() for one in sets), strict=True):
        assert a.grad is not None and b.grad is not None and same(a.grad, b.grad, 1e-5)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_inductors_code_takes_loras_after_compiling(family: str, compiler: Compiler) -> None:
    network, eager = FAMILIES[family](), FAMILIES[family]()
    compile_blocks(network)
    plain = ask(network)
    lora = some_lora(eager)
    sets = attach_lora(network, lora, 0.5), attach_lora(eager, lora, 0.5)
    found = [plain, ask(network)]
    assert same(found[1], ask(eager), 1e-5)
    for one in sets:
        one.set_scale([0.0, 1.0])
    found.append(ask(network))
    assert same(found[2], ask(eager), 1e-5)
    sets[0].detach()
    assert torch.equal(ask(network), plain)
    assert all(not same(a, b, 1e-4) for i, a in enumerate(found) for b in found[:i])
