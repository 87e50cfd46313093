"""LoRAs and compiled blocks on a GPU, and with the same code on the CPU; bounds as in devices.py."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from eridiff.blocks import compile_blocks
from eridiff.lora import Lora, attach_lora, inject_lora, merge_into
from eridiff.trace.record import relative_l2
from tests.devices import device as device
from tests.devices import far
from tests.devices import float32_convolutions as float32_convolutions
from tests.loras import EVERY_KIND, FAMILIES, arguments, ask, filled, some_lora


@torch.no_grad()
def ask_on(network: Any, device: torch.device) -> Tensor:
    """`ask` with everything that the network takes on a device; the result on the CPU."""
    latents, given = arguments(network)
    run = network.prepare(*(t.to(device) if isinstance(t, Tensor) else t for t in given))
    return torch.stack([network.step(latents.to(device), run, i) for i in (0, 1)], dim=1).cpu()


@torch.no_grad()
def expected(family: str, lora: Lora | None, dtype: torch.dtype) -> Tensor:
    """With the LoRA, on the CPU."""
    network = FAMILIES[family]().to(dtype)
    if lora is not None:
        attach_lora(network, lora)
    return ask(network)


def near(found: Tensor, family: str, lora: Lora | None) -> bool:
    wide = expected(family, lora, torch.float64)
    return relative_l2(found, wide) <= far(expected(family, lora, torch.float32), wide) < 1e-4


@pytest.mark.parametrize("when", ["before the move", "after the move"])
@pytest.mark.parametrize("family", EVERY_KIND)
def test_every_kind_of_lora_acts_on_the_device(family: str, when: str, device: torch.device) -> None:
    network = FAMILIES[family]()
    lora = EVERY_KIND[family](network)
    if when == "after the move":
        network.to(device)
    attached = attach_lora(network, lora)
    network.to(device)
    assert near(ask_on(network, device), family, lora)
    attached.detach()
    assert near(ask_on(network, device), family, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_attached_lora_equals_the_merged_one_on_the_device(family: str, device: torch.device) -> None:
    network = FAMILIES[family]()
    lora = some_lora(FAMILIES[family]())
    network.to(device)
    plain = ask_on(network, device)
    attached = attach_lora(network, lora)
    assert near(ask_on(network, device), family, lora)
    attached.detach()
    with merge_into(network, lora):
        assert near(ask_on(network, device), family, lora)
    assert torch.equal(ask_on(network, device), plain)


def test_a_lora_in_training_follows_its_network(device: torch.device) -> None:
    network = FAMILIES["flux"]()
    lora = filled(inject_lora(network, 2))
    before = ask_on(network, torch.device("cpu"))
    network.to(device)
    latents, given = arguments(network)
    run = network.prepare(*(t.to(device) if isinstance(t, Tensor) else t for t in given))
    network.step(latents.to(device), run, 0).square().mean().backward()
    for p in lora.parameters():
        assert p.device.type == device.type and p.grad is not None and bool(p.grad.any())
    network.to("cpu")
    assert torch.equal(ask_on(network, torch.device("cpu")), before)


@pytest.fixture
def compiler(device: torch.device) -> Iterator[dict[str, Any]]:
    """Options of the compiler: on the CPU inductor takes minutes (test_lora_compile.py has it)."""
    torch.compiler.reset()
    logging.getLogger("torch.__trace").propagate = False  # pytest would keep all of it
    yield {} if device.type == "cuda" else {"backend": "eager"}
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("device", "family"), [("cpu", "flux"), *(pytest.param("cuda", f, marks=pytest.mark.gpu) for f in ("flux", "mmdit"))],
    indirect=["device"],
)  # fmt: skip
def test_compiled_blocks_equal_eager_ones_and_take_other_loras(
    device: torch.device, family: str, compiler: dict[str, Any]
) -> None:
    network = FAMILIES[family]().to(device)
    compile_blocks(network, **compiler)
    plain = ask_on(network, device)
    assert near(plain, family, None)
    for seed in (5, 6):
        lora = some_lora(FAMILIES[family](), seed=seed)
        attached = attach_lora(network, lora)
        assert near(ask_on(network, device), family, lora)
        attached.detach()
        assert torch.equal(ask_on(network, device), plain)
