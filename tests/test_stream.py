"""offload="stream": blocks pass through a ring of buffers on the device, and every order of copies and computing gives the same bits."""

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eridiff
from eridiff import FluxInference, Prompt, SDXLInference
from eridiff.blocks import repeated_blocks
from eridiff.errors import ConfigError
from eridiff.inference.placing import RUNTIME, plan_parts
from eridiff.inference.sdxl import refiner_parts
from eridiff.lora import attach_lora
from eridiff.memory import stream
from eridiff.memory.plan import Fused, LiveBytes, _run, stages
from eridiff.memory.stages import OFFLOAD, asked_once, on_device
from eridiff.memory.stream import Block, InOrder, Ring, Streams, chosen, ring_size
from eridiff.schedulers.guidance import SkipLayers
from eridiff.training import Sampler
from eridiff.weights.detect import Component
from eridiff.weights.header import Checkpoint
from eridiff.weights.keymap import key_map
from eridiff.weights.locate import locate
from tests import families, loras, tiny
from tests.adversary import ORDERS, Adversary, Watch
from tests.on_gpu import gpu as gpu
from tests.on_gpu import photo
from tests.pretend_gpu import CUDA, PretendedGPU


class Queues:
    """The device's queues are adversaries in an order, of which `made` are all."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.order, self.ignores, self.made = watch, "late", "", list[Adversary]()

    def __call__(self, device: torch.device) -> Adversary:
        self.made.append(Adversary(device, self.watch, self.order, self.ignores))
        return self.made[-1]


@pytest.fixture
def queues(gpu: PretendedGPU, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queues]:
    with Watch() as watch:
        made = Queues(watch)
        monkeypatch.setattr(stream, "queue_of", made)
        yield made
    assert all(not queue.waiting for queue in made.made if not queue.ignores)  # no copy goes on to memory that is free


def there(value: Any) -> Any:
    return value.to("cuda") if isinstance(value, Tensor) and value.dtype != torch.float64 else value


def networks_outputs(network: Any, offload: str, room: int | None = None) -> list[Tensor]:
    """Of steps in any order, of SD 3 some without a block."""
    latents, given = loras.arguments(network)
    skips = [{}, {"skip_blocks": (1,)}] if hasattr(network, "joint_blocks") else [{}]
    steps = (0,) if hasattr(network, "conv_in") else (0, 1)
    with torch.no_grad(), on_device(network, CUDA, offload, room):
        run = network.prepare(*map(there, given))
        return [network.step(there(latents), run, i, **skip).cpu() for i in steps for skip in skips]


def text_outputs(module: Any, offload: str, room: int | None = None) -> list[Tensor]:
    ids = torch.arange(1, 13).reshape(2, 6)
    with torch.no_grad(), on_device(module, CUDA, offload, room):
        return [module(input_ids=some.to("cuda")).last_hidden_state.cpu() for some in (ids, ids.flip(1))]


MODULES: dict[str, tuple[Callable[[], Any], Callable[..., list[Tensor]]]] = {
    **{family: (make, networks_outputs) for family, make in loras.FAMILIES.items()},
    "t5": (tiny.t5_module, text_outputs), "clip": (tiny.clip_module, text_outputs),
}  # fmt: skip


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", MODULES)
def test_every_order_of_copies_and_computing_gives_the_same_bits(
    name: str, order: str, queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, outputs = MODULES[name]
    module: nn.Module = make()
    if name == "flux":
        attach_lora(module, loras.every_kind_on_flux(module))
    own = [id(p) for p in module.parameters()]
    expected, queues.order = outputs(module, "stages"), order
    monkeypatch.setattr(stream, "RING", 3 if order == "mixed" else 2)
    assert equal(outputs(module, "stream"), expected)
    assert [id(p) for p in module.parameters()] == own
    assert queues.made[0].copies >= len(repeated_blocks(module))
    assert not any(m._forward_pre_hooks for m in module.modules())


@pytest.mark.parametrize("ignored", ["mark", "wait", "finish"])
def test_the_bits_depend_on_each_wait(ignored: str, queues: Queues) -> None:
    """The double that the other tests rely on sees each that is missing."""
    network = tiny.flux()
    expected, queues.ignores = networks_outputs(network, "stages"), ignored
    assert not equal(networks_outputs(network, "stream"), expected)


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_stay_on_the_device_as_far_as_there_is_room(order: str, queues: Queues) -> None:
    network = tiny.flux(replace(tiny.FLUX, double_depth=1, single_depth=6))
    queues.order = order
    expected, copies, whole = networks_outputs(network, "stages"), [], sum(p.nbytes for p in network.parameters())
    for room in (None, 3 * whole // 4, whole):
        assert equal(networks_outputs(network, "stream", room), expected)
        copies.append(queues.made[-1].copies)
    assert copies[0] > copies[1] > copies[2] == 7  # each block once


def test_the_next_block_is_copied_while_one_computes() -> None:
    """By the order of the pass before; a wrong guess is replaced by the block that is asked for."""
    blocks = [Block([nn.Linear(2, 2)]) for _ in range(4)]
    ring, guessed = Ring(blocks, InOrder(torch.device("cpu"))), []
    ring.start()
    with torch.no_grad():
        for order in ((0, 1, 2, 3), (0, 2, 1, 3), (0, 2, 1, 3)):
            for i in order:
                guessed.append(blocks[i].slot is not None)
                ring.ask(blocks[i])
                assert torch.equal(blocks[i].own[0], blocks[i].entries[0][0]["weight"])
                ring.leave(), ring.foresee()
                assert all(b.entries[0][0]["weight"] is b.own[0] for b in blocks if b.slot is None)
    assert guessed == [False, True, True, True, True, False, False, False, True, True, True, True]
    ring.close()
    assert all(block.slot is None and block.entries[0][0]["weight"] is block.own[0] for block in blocks)


def test_on_cuda_a_copy_has_a_stream_of_its_own_between_two_events(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

        def record_event(self) -> str:
            said.append(f"{self.name} record")
            return f"event of {self.name}"

        def wait_event(self, event: str) -> None:
            said.append(f"{self.name} wait for the {event}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Named("copies"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Named("kernels"))
    monkeypatch.setattr(torch.cuda, "stream", lambda on: nullcontext(said.append(f"on the stream of {on.name}")))
    queue, target = Streams(torch.device("cpu")), torch.zeros(2)
    queue.wait(queue.copy(target, torch.ones(2), queue.mark()))
    assert target.tolist() == [1, 1] and said == [
        "kernels record", "copies wait for the event of kernels", "on the stream of copies", "copies record", "kernels wait for the event of copies",
    ]  # fmt: skip


# images -------------------------------------------------------------------------------------------------------------


def offloaded(model: Any, offload: str, **encoders: Any) -> Any:
    return type(model)(model.network, model.autoencoder, device="cuda", offload=offload, progress=False, **encoders)


def latents_of(model: Any, **asked: Any) -> Tensor:
    told = Prompt(families.conditioning(model), families.conditioning(model, seed=5))
    given = {"conditioning": told, "width": 32, "height": 32, "steps": 3, "seed": 1, "cfg_scale": 3.0} | asked
    return model.generate(**given, keep=("latents",)).latents.cpu()


ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "two calls per step": ("flux", {"cfg_batch": "apart"}),
    "image to image": ("flux", {"image": photo(), "strength": 0.7, "cfg_scale": 1.0, "steps": 2}),
    "skipped blocks": ("mmdit", {"skip_layers": SkipLayers((1,), 2.5, 0.0, 1.0), "steps": 4}),
}


@pytest.mark.parametrize("kind", ASKED)
def test_images_are_the_same_however_the_network_is_asked(kind: str, queues: Queues) -> None:
    family, asked = ASKED[kind]
    model = families.inference(family)
    expected, found = (latents_of(offloaded(model, offload), **asked) for offload in ("stages", "stream"))
    assert torch.equal(found, expected) and queues.made[0].copies > 6


def test_a_run_goes_on_in_another_network(queues: Queues) -> None:
    """As that of a base does in its refiner."""
    found = []
    for offload in ("stages", "stream"):
        first, second = (offloaded(FluxInference(tiny.flux(seed=i), tiny.autoencoder()), offload) for i in (0, 1))
        asked = {"conditioning": Prompt(families.conditioning(first)), "width": 32, "height": 32, "steps": 3, "seed": 1}
        run = first.generate(**asked, part=(0, 0.6), keep=("run",)).run
        found.append(second.generate(**asked, part=(0.6, 1), noise=run, keep=("latents",)).latents.cpu())
    assert torch.equal(*found)


@pytest.mark.parametrize("order", ORDERS)
def test_weights_that_change_meanwhile_are_never_old_ones(order: str, queues: Queues) -> None:
    """A LoRA that changes tensors in place is weighed in a callback, when the next blocks may have been copied."""
    model = families.inference("flux")
    attached = attach_lora(model.network, loras.every_kind_on_flux(model.network))
    assert attached.patches
    queues.order = order

    def weigh(step: Any) -> None:
        attached.set_scale(0.25 if step.index == 0 else 1.0)

    expected, found = (latents_of(offloaded(model, o), callback=weigh) for o in ("stages", "stream"))
    assert torch.equal(found, expected)


def test_after_an_interrupt_everything_is_as_it_was(queues: Queues) -> None:
    model = offloaded(families.inference("flux"), "stream")
    own = [id(p) for p in model.network.parameters()]
    plain, calls = latents_of(model, steps=2), 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt

    for block in repeated_blocks(model.network)[::3]:
        hooks = [layer.register_forward_hook(fail) for layer in block.modules() if isinstance(layer, nn.Linear)]
        with pytest.raises(KeyboardInterrupt):
            latents_of(model, steps=2)
        calls = 0
        for hook in hooks:
            hook.remove()
    assert [id(p) for p in model.network.parameters()] == own
    assert not any(m._forward_pre_hooks or len(m._forward_hooks) > 1 for m in model.network.modules())
    assert torch.equal(latents_of(model, steps=2), plain)


@pytest.mark.parametrize("call", ["copy", "wait"])
def test_an_interrupt_while_blocks_come_leaves_everything_as_it_was(
    call: str, queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, whole = tiny.flux(), 10**9
    own, usual = [id(p) for p in network.parameters()], getattr(Adversary, call)
    for before in range(4):
        calls = iter(range(9))

        def interrupted(self: Adversary, *given: Any, last: int = before, calls: Iterator[int] = calls) -> Any:
            if next(calls) == last:
                raise KeyboardInterrupt
            return usual(self, *given)

        monkeypatch.setattr(Adversary, call, interrupted)
        with pytest.raises(KeyboardInterrupt), on_device(network, CUDA, "stream", whole):
            pass
        assert [id(p) for p in network.parameters()] == own


def test_a_sampler_sees_the_weights_as_they_are_in_training(queues: Queues, tmp_path: Path) -> None:
    images = []
    for offload in ("stages", "stream"):
        model = offloaded(families.inference("flux"), offload)
        model.network.requires_grad_(True).train()
        model.encode_prompt = lambda *_, model=model: Prompt(families.conditioning(model))
        asked = {"width": 16, "height": 16, "sample_steps": 1, "seed": 1}
        sampler = Sampler(
            model, {"prompts": ["a swan"], "out": str(tmp_path / offload), **asked}, verify=True, raise_errors=True
        )
        optimizer = torch.optim.SGD(model.network.parameters(), lr=0.1)
        for step in (0, 1):
            images.append(sampler.sample(step).images[0].tobytes())
            latents, given = loras.arguments(model.network)
            model.network.step(latents, model.network.prepare(*given), 0).square().mean().backward()
            optimizer.step()
    assert images[:2] == images[2:] and images[0] != images[1]


def test_gradients_are_refused(queues: Queues) -> None:
    network = tiny.flux()
    latents, given = loras.arguments(network)
    with on_device(network, CUDA, "stream"):
        with torch.no_grad():
            run = network.prepare(*map(there, given))
        with pytest.raises(ConfigError, match=r"^offload='stream' copies blocks over one another, so no gradient"):
            network.step(there(latents), run, 0)


def test_compiled_blocks_are_refused_unless_they_stay(queues: Queues) -> None:
    network = tiny.flux()
    for block in repeated_blocks(network):
        block._compiled_call_impl = block._call_impl  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="is for blocks that are not compiled"), on_device(network, CUDA, "stream"):
        pass
    with on_device(network, CUDA, "stream", 10**9):
        pass


@pytest.mark.parametrize("offload", OFFLOAD)
def test_on_the_cpu_it_says_that_it_has_no_effect(offload: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = families.inference("flux")
        assert not caplog.messages
        streaming = type(model)(model.network, model.autoencoder, device="cpu", offload=offload, progress=False)
    assert caplog.messages[0].startswith(f"offload='{offload}' has no effect on the CPU")
    assert torch.equal(latents_of(streaming), latents_of(model))


# the plan -----------------------------------------------------------------------------------------------------------


class OnDevice(LiveBytes):
    """Of the meta device alone."""

    def _count(self, tensor: Tensor, given: set[int]) -> Tensor:
        return super()._count(tensor, given) if tensor.is_meta else tensor


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_plan_counts_what_is_on_the_device(family: str) -> None:
    network = loras.FAMILIES[family]()
    component = Component(
        family, key_map(family).layouts["original"], "", Checkpoint(Path(), {}, {}, {}), network.config
    )
    (stage,) = stages({family: component}, 64, 64, steps=2, text_length=5, dtype=torch.float32)
    with torch.no_grad(), OnDevice() as live, Fused(), on_device(network, torch.device("meta"), "stream"):
        _run(network, 64, 64, 2, 5, 1, torch.float32, None)
    largest = max(
        sum(p.nbytes for p in layer.parameters()) for layer in asked_once(network)
    )  # which visits when there is less work
    assert stage.peak("stream") < stage.peak("stages")
    assert stage.peak("stream") - 1.02 * largest <= live.peak <= stage.peak("stream")


def test_as_few_blocks_pass_as_the_room_asks_for() -> None:
    sizes = [3] * 4 + [2] * 8
    assert chosen(sizes, sum(sizes)) == [] and chosen(sizes, None) == list(range(12))
    for room in range(6, sum(sizes)):
        passing = chosen(sizes, room)
        staying = sum(sizes) - sum(sizes[i] for i in passing)
        assert staying + ring_size([sizes[i] for i in passing]) <= room and passing == sorted(set(passing))
    assert chosen(sizes, 25) == [1, 4, 7, 10]


def test_vram_lets_as_many_blocks_stay_as_fit(queues: Queues, tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", replace(tiny.FLUX, hidden=96, heads=6, single_depth=6))
    plan = plan_parts(FluxInference, locate(folder))
    least, most = (max(stage.peak(offload) for stage in plan.stages) for offload in ("stream", "stages"))
    model = eridiff.load(folder, progress=False, vram=RUNTIME["cuda"] + (least + most) // 2)
    assert model.offload == "stream"
    asked: dict[str, Any] = {"width": 16, "height": 16, "steps": 2, "seed": 1, "keep": ("latents",)}
    found = model.generate("a swan", **asked).latents
    assert 8 < queues.made[-1].copies < 17  # 8 blocks in 2 steps, and the first as a third would need it
    model.offload = "stages"
    assert torch.equal(found, model.generate("a swan", **asked).latents)


def test_a_refiner_follows_when_a_larger_image_has_its_base_placed_anew(queues: Queues, tmp_path: Path) -> None:
    base, refiner = tiny.write_sdxl_model(tmp_path / "b"), tiny.write_sdxl_model(tmp_path / "r", tiny.SDXL_REFINER)
    parts = locate(base)
    its = refiner_parts(parts, refiner)
    plans = [plan_parts(SDXLInference, parts, width=side, height=side, refiner=its) for side in (64, 128)]
    small, large = (next(p.needed for p in plan.placements if p.offload == "stages") for plan in plans)
    model: Any = eridiff.load(base, refiner=refiner, progress=False, vram=(small + large) // 2)
    assert (model.offload, model.refiner.offload) == ("stages", "stages")
    asked: dict[str, Any] = {"width": 128, "height": 128, "steps": 2, "hand_over": 0.5, "seed": 1, "keep": ("latents",)}
    found = model.generate("a swan", **asked).latents
    assert (model.offload, model.refiner.offload) == ("stream", "stream") and len(queues.made) >= 5
    model = eridiff.load(base, refiner=refiner, progress=False, offload="stages")
    assert torch.equal(found, model.generate("a swan", **asked).latents)
