"""LoRAs on a pretended GPU (`tests/pretend_gpu.py`): they follow, are weighed and merged there as on the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from eridiff import Prompt
from eridiff.lora import Lora, attach_lora, decompose, deltas, merge_lora
from eridiff.precision import matmul_precision, set_matmul_precision
from eridiff.trace.record import relative_l2
from tests import families, loras, tiny
from tests.on_gpu import folder as folder
from tests.on_gpu import gpu as gpu
from tests.on_gpu import same
from tests.pretend_gpu import CUDA, PretendedGPU

LORAS: dict[str, Callable[[Any], Lora]] = {"flux": loras.every_kind_on_flux, "unet": loras.every_kind_on_unet}


@pytest.mark.parametrize("family", list(LORAS))
def test_branches_of_every_kind_go_where_the_network_goes(family: str, gpu: PretendedGPU) -> None:
    network = loras.FAMILIES[family]()
    attached = attach_lora(network, LORAS[family](network), 0.7)
    latents, given = loras.arguments(network)
    expected = network.step(latents, network.prepare(*given), 0)
    network.to("cuda")
    on_gpu = [t.to("cuda") if isinstance(t, Tensor) and t.dtype != torch.float64 else t for t in given]

    def ask() -> Tensor:
        return network.step(latents.to("cuda"), network.prepare(*on_gpu), 0).cpu()

    assert relative_l2(ask(), expected) < 1e-5
    assert {branch.device for branch in attached.all_branches()} == {CUDA}
    attached.detach()
    plain = ask()
    network.to("cpu")
    assert relative_l2(plain, network.step(latents, network.prepare(*given), 0)) < 1e-5


def test_a_scale_per_row_works_on_the_gpu(gpu: PretendedGPU) -> None:
    network = tiny.flux()
    lora = loras.every_kind_on_flux(network)
    attached = attach_lora(network.to("cuda"), lora, dora="interpolate")
    for item, _ in list(attached.patches):
        attached.set_scale({item.target.module: 1.0})
    attached.set_scale({branch.target.module: torch.tensor([0.0, 1.0]) for branch in attached.all_branches()})
    assert {branch.scale.device.type for branch in attached.all_branches()} == {"cpu"}
    latents, given = loras.arguments(network)
    on_gpu = [t.to("cuda") if isinstance(t, Tensor) and t.dtype != torch.float64 else t for t in given]
    rows = network.step(latents.to("cuda"), network.prepare(*on_gpu), 0).cpu()
    lora_proper = [branch for branch in attached.all_branches() if branch.told.kind == "lora"]
    assert {branch.factor.device for branch in lora_proper} == {CUDA}  # so that no call waits for them
    network.to("cpu")
    assert relative_l2(rows, network.step(latents, network.prepare(*given), 0)) < 1e-5


def test_merging_on_the_gpu_equals_merging_on_the_cpu(gpu: PretendedGPU) -> None:
    network = tiny.flux()
    lora = loras.every_kind_on_flux(network)
    expected = merge_lora(network.state_dict(), lora, 0.7).state
    found = merge_lora(network.to("cuda").state_dict(), lora, 0.7).state
    assert all(torch.equal(found[name].cpu(), tensor) for name, tensor in expected.items())


def test_merges_are_computed_in_float32_whatever_the_trainer_does(monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny.flux()
    lora = loras.every_kind_on_flux(network)
    expected = merge_lora(network.state_dict(), lora, 0.7).state
    seen = []
    low_rank = deltas.low_rank
    monkeypatch.setattr(deltas, "low_rank", lambda *given: seen.append(matmul_precision()) or low_rank(*given))
    before = matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            found = merge_lora(network.state_dict(), lora, 0.7).state
            attached = attach_lora(network, lora, 0.7)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
        set_matmul_precision(before)  # which may be "none", where an older call gives "ieee"
    assert seen and set(seen) <= {"highest", ("ieee", "ieee")}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    patched = {name: expected[name] for name in attached.originals}
    assert patched and all(torch.equal(network.get_parameter(n), tensor) for n, tensor in patched.items())


def test_shrinking_a_large_change_touches_no_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompose, "EXACT_UP_TO", 8)
    g = torch.Generator().manual_seed(0)
    change = torch.randn(40, 6, generator=g) @ torch.randn(6, 30, generator=g)
    seeded: list[int] = []
    monkeypatch.setattr(torch.random, "manual_seed", seeded.append)
    monkeypatch.setattr(torch, "manual_seed", seeded.append)
    state = torch.get_rng_state()
    down, up, energy = decompose.nearest(change, 6)
    assert torch.equal(torch.get_rng_state(), state) and seeded == []
    assert relative_l2(up @ down, change) < 1e-5 and energy == pytest.approx(1.0)
    _, _, share = decompose.nearest(change, 3)
    s = torch.linalg.svdvals(change)
    assert share == pytest.approx(float(s[:3].square().sum() / s.square().sum()), rel=1e-5)


@pytest.mark.parametrize("family", list(LORAS))
def test_a_lora_with_changes_in_place_is_weighed_while_offloaded(family: str, gpu: PretendedGPU) -> None:
    """In a callback, when the network works with copies on the GPU: both they and their originals change."""
    model = families.inference(family)
    prompt = Prompt(families.conditioning(model), families.conditioning(model, seed=5))
    given: dict[str, Any] = {"conditioning": prompt, "width": 64, "height": 64, "steps": 4, "seed": 1}
    attached = attach_lora(model.network, LORAS[family](model.network))
    assert attached.patches

    def weigh(step: Any) -> None:
        attached.set_scale(0.25 if step.index == 0 else 1.0)

    resident = model.generate(**given, callback=weigh).images[0]
    kept = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    offloaded = type(model)(model.network, model.autoencoder, device="cuda", offload="stages", progress=False)
    assert same(offloaded.generate(**given, callback=weigh).images[0], resident)
    assert all(torch.equal(p, kept[name]) for name, p in model.network.named_parameters())
    attached.detach()
    assert all(
        torch.equal(p, tensor)
        for p, tensor in zip(model.network.parameters(), loras.FAMILIES[family]().parameters(), strict=True)
    )
