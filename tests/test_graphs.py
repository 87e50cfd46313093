"""Steps as CUDA graphs: `Tape` records and replays as a graph does, on the CPU; tests of the gpu marker take real graphs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import eridiff
from eridiff.blocks import compile_blocks
from eridiff.errors import ConfigError, TraceError
from eridiff.graphs import graph_steps
from eridiff.lora import attach_lora, inject_lora
from eridiff.trace import record
from tests import tiny
from tests.devices import far
from tests.loras import FAMILIES, arguments, filled, same, some_lora
from tests.test_gpu_loras import ask_on, expected, relative_l2


class Tape(TorchDispatchMode):
    """The operations of a step. As in a CUDA graph the memory that each reads and writes is fixed, and so are its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.captures = 0

    def __call__(self, ask: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        self.captures += 1
        self.operations = operations = []
        ask()
        operations.clear()
        with self:
            output = ask()
        with torch.no_grad():
            output.fill_(float("nan"))  # capturing computes nothing
        return lambda: self.replay(operations), output

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fixed = tree_map(lambda t: t.clone() if isinstance(t, Tensor) and t.ndim == 0 else t, args)
        out = function(*args, **(kwargs or {}))
        self.operations.append((function, fixed, kwargs or {}, out))
        return out

    @staticmethod
    def replay(operations: list[tuple[Any, Any, Any, Any]]) -> None:
        for function, args, kwargs, out in operations:
            if (
                any(result.alias_info is not None for result in function._schema.returns)
                and not function._schema.is_mutable
            ):
                continue  # a view of what is fixed
            new = function(*args, **kwargs)
            for kept, made in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if isinstance(kept, Tensor) and kept is not made:
                    kept.copy_(made)


class Twins:
    """A network whose steps are graphs, and its twin that is asked eagerly."""

    def __init__(self, family: str) -> None:
        self.graphed, self.eager = FAMILIES[family](), FAMILIES[family]()
        self.tape = Tape()
        self.steps = graph_steps(self.graphed, self.tape)

    def both(self, change: Callable[[Any], Any]) -> list[Any]:
        return [change(network) for network in (self.graphed, self.eager)]

    @torch.no_grad()
    def agree(self, batch: int = 2, scale: float = 1.0) -> Tensor:
        """Both, equal bit for bit at two points of a run, whatever is asked between."""
        latents, (text, *given) = arguments(self.graphed, batch)
        runs = self.both(lambda network: network.prepare(scale * text, *given))
        outputs = [
            torch.stack([network.step((1 + i) * latents, run, i) for i in (0, 1, 0)])
            for network, run in zip((self.graphed, self.eager), runs, strict=True)
        ]
        assert torch.equal(*outputs) and not torch.equal(outputs[0][0], outputs[0][1])
        return outputs[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_serves_all_steps_of_all_runs_of_a_shape(family: str) -> None:
    twins = Twins(family)
    first, other = twins.agree(), twins.agree(scale=0.5)
    assert twins.tape.captures == 1 and not torch.equal(first, other)
    small = twins.agree(batch=1)
    assert twins.tape.captures == 2 and not torch.equal(small, first[:, :1])
    assert torch.equal(twins.agree(), first) and twins.tape.captures == 2


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_two_runs_of_a_shape_may_take_turns_and_keep_their_outputs(family: str) -> None:
    twins = Twins(family)
    latents, (text, *given) = arguments(twins.graphed)
    runs = [twins.eager.prepare(scale * text, *given) for scale in (1.0, 0.5)]
    asked = [(run, i) for i in (0, 1) for run in runs]
    expected = [twins.eager.step(latents, run, i) for run, i in asked]
    found = [twins.graphed.step(latents, run, i) for run, i in asked]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) and twins.tape.captures == 1


def test_weights_change_in_place_or_move_and_the_next_step_knows() -> None:
    twins = Twins("flux")
    first = twins.agree()
    for p in twins.both(lambda network: network.single_blocks[0].linear1.weight.data):
        p.mul_(1.5)
    second = twins.agree()
    assert twins.tape.captures == 1 and not torch.equal(first, second)

    def moved(network: Any) -> None:
        network.final.linear.weight = nn.Parameter(2 * network.final.linear.weight.detach(), False)

    twins.both(moved)
    assert not torch.equal(twins.agree(), second) and twins.tape.captures == 2
    assert len(twins.steps.captured) == 1  # the old graph is gone


def test_loras_come_are_weighed_and_go() -> None:
    twins = Twins("flux")
    plain = twins.agree()
    lora = some_lora(twins.eager)
    sets = twins.both(lambda network: attach_lora(network, lora))
    seen = [plain, twins.agree()]
    for one in sets:
        one.set_scale(0.5)
    seen.append(twins.agree())
    count = twins.tape.captures
    for one in sets:
        filled(one, seed=9)  # in place
    seen.append(twins.agree())
    assert twins.tape.captures == count
    for one in sets:
        one.set_scale([0.0, 1.0])
    seen.append(twins.agree())
    for one in sets:
        one.detach()
    assert torch.equal(twins.agree(), plain)
    assert all(not same(a, b, 1e-4) for i, a in enumerate(seen) for b in seen[:i])


def test_training_asks_the_network_itself() -> None:
    twins = Twins("flux")
    before = twins.agree()
    for network, lora in zip(
        (twins.graphed, twins.eager), twins.both(lambda n: filled(inject_lora(n, 2))), strict=True
    ):
        latents, given = arguments(network)
        network.step(latents, network.prepare(*given), 1).square().mean().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in lora.parameters())
        lora.detach()
    assert torch.equal(twins.agree(), before)


@torch.no_grad()
def test_blocks_that_are_skipped_have_a_graph_of_their_own() -> None:
    twins = Twins("mmdit")
    latents, given = arguments(twins.graphed)
    run = twins.eager.prepare(*given)
    for skip in ((), (1,), (0, 1), ()):
        assert torch.equal(twins.graphed.step(latents, run, 1, skip), twins.eager.step(latents, run, 1, skip))
    assert twins.tape.captures == 3


def test_an_image_is_the_same() -> None:
    model = eridiff.load("tiny-flux", device="cpu", progress=False)
    asked: dict[str, Any] = {"seed": 3, "steps": 3, "width": 64, "height": 64}
    plain = model.generate("a swan on mars", **asked).images[0].tobytes()
    tape = Tape()
    steps = graph_steps(model.network, tape)
    assert model.generate("a swan on mars", **asked).images[0].tobytes() == plain
    assert model.generate("a swan on mars", **{**asked, "steps": 2}).images[0].tobytes() != plain and tape.captures == 1
    assert steps.nbytes > 0
    steps.remove()
    assert steps.nbytes == 0 and "step" not in vars(model.network)
    assert model.generate("a swan on mars", **asked).images[0].tobytes() == plain and tape.captures == 1


def test_what_cannot_be_is_refused() -> None:
    network = tiny.flux()
    with pytest.raises(ConfigError, match="need a network on a CUDA device, and this Flux is on cpu"):
        graph_steps(network)
    graph_steps(network, Tape())
    with pytest.raises(ConfigError, match="graphs already"):
        graph_steps(network, Tape())
    with pytest.raises(TraceError, match="a graph"), record(network):
        pass
    model = eridiff.load("tiny-flux", device="cpu", progress=False)
    graph_steps(model.network, Tape())
    with pytest.raises(ConfigError, match="^block_cache decides anew in each step, and graph_steps replays one"):
        model.generate("a swan on mars", steps=2, width=64, height=64, block_cache=0.3)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_real_graphs_equal_the_eager_steps(family: str, compiled: bool) -> None:
    device = torch.device("cuda")
    network = FAMILIES[family]().to(device)
    if compiled:
        compile_blocks(network)
    steps = graph_steps(network)

    def near(lora: Any = None) -> bool:
        wide = expected(family, lora, torch.float64)
        bound = far(expected(family, lora, torch.float32), wide)
        return relative_l2(ask_on(network, device), wide) <= bound

    assert near() and near() and len(steps.captured) == 1
    lora = some_lora(FAMILIES[family]())
    attached = attach_lora(network, lora)
    assert near(lora)
    attached.detach()
    assert near() and len(steps.captured) == 1
