"""Networks, training steps, tables and EMA weights on a pretended GPU (`tests/pretend_gpu.py`)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eridiff import Prompt
from eridiff.models.flux import position_ids
from eridiff.schedulers.flow_match import flow_schedule
from eridiff.trace.record import first_difference, record, relative_l2
from eridiff.training import Sampler, averaged_weights
from eridiff.training.objective import discrete_levels, flow_levels, noised, squared_error, target, timesteps, uniform
from tests import families, loras, tiny
from tests.on_gpu import folder as folder
from tests.on_gpu import gpu as gpu
from tests.on_gpu import moved
from tests.pretend_gpu import CPU, CUDA, PretendedGPU, pretend_gpu


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_training_step_runs_on_the_gpu(family: str, gpu: PretendedGPU) -> None:
    """Times, levels and noise come from the CPU and follow the latents."""
    model = families.inference(family)
    model.network.train().requires_grad_(True)
    channels = model.network.config.in_channels if family != "flux" else 16
    clean, noise = families.rows(2, 2, channels, 4, 4, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    levels = flow_levels(uniform(2, generator)) if family != "unet" else discrete_levels(timesteps(2, generator))
    given = families.inputs(model, levels)

    def loss(device: str) -> Tensor:
        told = tuple(t.to(device) if isinstance(t, Tensor) and i < 2 else t for i, t in enumerate(given))
        latents = clean.to(device)
        output = model.network(families.packed(family, noised(latents, noise, levels)), *told)
        return squared_error(output, families.packed(family, target(latents, noise, levels)))

    expected = float(loss("cpu").detach())
    model.network.to("cuda")
    found = loss("cuda")
    found.backward()
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)
    assert all(p.grad.device == CUDA for p in model.network.parameters() if p.grad is not None)


def test_the_table_of_positions_crosses_once_per_size(gpu: PretendedGPU) -> None:
    network = tiny.mmdit().to("cuda")
    text, pooled = torch.zeros(1, 5, 20, device="cuda"), torch.zeros(1, 16, device="cuda")
    times = torch.zeros(1, device="cuda")

    def crossed(grid: tuple[int, int]) -> int:
        before = gpu.to_device
        network.prepare(text, pooled, times, grid)
        return gpu.to_device - before

    crossed((3, 3))  # with what crosses once whatever the size
    first = crossed((2, 2))
    assert first == 1 and [crossed((2, 2)), crossed((2, 2)), crossed((2, 3)), crossed((2, 2))] == [
        first - 1,
        first - 1,
        first,
        first,
    ]
    network.positions.table += 1  # a table that changed is read anew
    assert crossed((2, 2)) == first
    assert torch.equal(
        network.positions((2, 2), CUDA, torch.float32).cpu(), tiny.mmdit().positions((2, 2), CPU, torch.float32) + 1
    )


def test_a_table_of_positions_that_is_loaded_anew_is_cropped_anew() -> None:
    network, other = tiny.mmdit(), tiny.mmdit(seed=4)
    before = network.positions((2, 2), CPU, torch.float32)
    network.load_state_dict(other.state_dict())
    after = network.positions((2, 2), CPU, torch.float32)
    assert not torch.equal(before, after) and torch.equal(after, other.positions((2, 2), CPU, torch.float32))


@pytest.mark.parametrize("family", list(loras.FAMILIES))
def test_a_training_forward_on_the_gpu_waits_for_no_table(family: str) -> None:
    with pretend_gpu() as gpu:
        network = loras.FAMILIES[family]().to("cuda")
        latents, (text, pooled, times, *rest) = loras.arguments(network)
        told = text.to("cuda"), pooled.to("cuda"), times[:1].float().to("cuda")
        rest = [t.to("cuda") if isinstance(t, Tensor) else t for t in rest]
        crossed = []
        for _ in range(2):
            before = gpu.to_device
            network.prepare(*told, *rest)
            crossed.append(gpu.to_device - before)
    assert crossed[1] == 0


def test_a_rotary_table_that_was_made_for_inference_serves_training() -> None:
    network = tiny.flux().requires_grad_(True)
    latents, given = loras.arguments(network)
    with torch.inference_mode():
        network.step(latents, network.prepare(*given), 0)
    network.step(latents, network.prepare(*given), 0).square().mean().backward()
    assert network.image_in.weight.grad is not None


@pytest.mark.parametrize("family", ["flux", "mmdit"])
def test_masks_positions_and_sigmas_follow_what_they_meet(family: str, gpu: PretendedGPU) -> None:
    network = loras.FAMILIES[family]()
    latents, (text, pooled, times, grid, *rest) = loras.arguments(network)
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    options: dict[str, Any] = {"mask": mask}
    if family == "flux":
        options |= {"ids": position_ids((2, 3)).float(), "guidance": rest[0]}
    given = (text, pooled, times) if family == "flux" else (text, pooled, times, grid)
    expected = network.step(latents, network.prepare(*given, **options), 0)
    network.to("cuda")
    on_gpu = (text.to("cuda"), pooled.to("cuda"), *given[2:])
    for place in ("cpu", "cuda"):
        there = options | ({"ids": options["ids"].to(place)} if "ids" in options else {})
        found = network.step(latents.to("cuda"), network.prepare(*on_gpu, **there), 0)
        assert relative_l2(found, expected) < 1e-5
    sigmas = torch.tensor([1.0, 0.5, 0.0]).to("cuda")
    assert flow_schedule(sigmas).sigmas.tolist() == [1.0, 0.5, 0.0]


def test_recordings_are_compared_across_devices(gpu: PretendedGPU) -> None:
    network = tiny.flux()
    latents, given = loras.arguments(network)
    with record(network) as expected:
        network.step(latents, network.prepare(*given), 0)
    network.to("cuda")
    on_gpu = [t.to("cuda") if isinstance(t, Tensor) and t.dtype != torch.float64 else t for t in given]
    with record(network) as found, record(network, device=None) as kept:
        network.step(latents.to("cuda"), network.prepare(*on_gpu), 0)
    on_the_cpu = (":times", ":guidance", "prepare:grid", "step:i")  # float64, and plain numbers
    there = {t.device for name, t in kept.items() if not name.endswith(on_the_cpu)}
    assert {t.device.type for t in found.values()} == {"cpu"} and there == {CUDA}
    assert first_difference(found, expected, 1e-5) is None and first_difference(kept, expected, 1e-5) is None
    assert relative_l2(kept["final"], found["final"]) == 0.0


def test_ema_weights_on_the_cpu_are_copied_into_the_parameters_own_memory(gpu: PretendedGPU) -> None:
    network, averages = tiny.flux(), {n: t.clone() for n, t in tiny.flux(seed=1).state_dict().items()}
    network.to("cuda")
    trained = {n: (t, t.data_ptr(), t.cpu().clone()) for n, t in network.named_parameters()}
    with averaged_weights(network, averages):
        for name, parameter in network.named_parameters():
            assert parameter is trained[name][0] and parameter.data_ptr() == trained[name][1]
            assert torch.equal(parameter.cpu(), averages[name])
    assert all(torch.equal(p.cpu(), values) and p.data_ptr() == place for p, place, values in trained.values())


def test_ema_weights_of_another_dtype_leave_a_graph_valid() -> None:
    network = tiny.flux().requires_grad_(True)
    latents, given = loras.arguments(network)
    output = network.step(latents, network.prepare(*given), 0).square().mean()
    expected = torch.autograd.grad(output, network.final.linear.weight, retain_graph=True)[0]
    with averaged_weights(network, {n: t.double() for n, t in tiny.flux(seed=1).state_dict().items()}):
        assert not torch.equal(network.final.linear.weight, tiny.flux().final.linear.weight)
    assert torch.equal(torch.autograd.grad(output, network.final.linear.weight)[0], expected)


def test_float32_ema_weights_are_used_by_a_bfloat16_network_on_the_same_device() -> None:
    """The commonest case of a trainer; the parameters stay the same objects of the same dtype."""
    network = tiny.flux().bfloat16()
    trained = {n: (p, p.clone()) for n, p in network.named_parameters()}
    averages = {n: t.float() for n, t in tiny.flux(seed=1).state_dict().items()}
    with averaged_weights(network, averages):
        for name, parameter in network.named_parameters():
            assert parameter is trained[name][0] and torch.equal(parameter, averages[name].bfloat16())
    assert all(torch.equal(p, values) for p, values in trained.values())


def test_ema_weights_of_the_table_of_positions_are_used() -> None:
    with pretend_gpu():
        network = tiny.mmdit().to("cuda")
        given = torch.zeros(1, 5, 20, device="cuda"), torch.zeros(1, 16, device="cuda"), torch.zeros(1, device="cuda")
        averages = {n: t.to("cuda") for n, t in tiny.mmdit(seed=9).state_dict().items()}
        live = network.prepare(*given, (2, 2)).positions.cpu()
        with averaged_weights(network, averages):
            averaged = network.prepare(*given, (2, 2)).positions.cpu()
    assert not torch.equal(averaged, live)


def test_the_sampler_checks_ema_weights_without_moving_them(tmp_path: Path, gpu: PretendedGPU) -> None:
    model = moved(families.inference("flux"), "cuda")
    model.encode_prompt = lambda *_: Prompt(families.conditioning(model))
    before = gpu.to_device
    Sampler(model, {"prompts": ["a swan"], "out": str(tmp_path)}, ema=tiny.flux(seed=1).state_dict())
    assert gpu.to_device == before
