"""A network's step as a CUDA graph: the same kernels, launched as one, without the host between them.

A graph reads and writes fixed memory. So the latents and what a run holds are copied into static buffers first: of the tables
that hold a row for each step the step's own row alone, which is why one graph serves all steps of all runs of equal shapes.
To capture a graph for each step would need no copy, but the first image of a shape would wait for as many captures as it has
steps, and gain nothing. In bfloat16 at 1024 x 1024 the copies are 2 MB for a step of FLUX.1-dev, and 6 MB once for each image.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from eridiff.blocks import chosen_kernels
from eridiff.errors import ConfigError
from eridiff.models.flux import Flux
from eridiff.models.mmdit import MMDiT
from eridiff.models.unet import UNet
from eridiff.weights.keymap import unwrapped

log = logging.getLogger(__name__)

# fields of runs whose tensors `[B, T, ...]` have a row for each step
TABLES = ("double", "single", "joint", "final", "shifts")
# a step -> what replays it, and where its output then is
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]


def mapped(value: Any, change: Callable[[Tensor, bool], Any], table: bool = False) -> Any:
    """A run with `change(tensor, whether it is a table of the steps)` in the place of each tensor."""
    if isinstance(value, Tensor):
        return change(value, table)
    if isinstance(value, tuple):
        return tuple(mapped(part, change, table) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: mapped(getattr(value, f.name), change, table or f.name in TABLES) for f in fields(value)}
        return replace(value, **parts)
    return value


def leaves(run: Any, i: int) -> tuple[list[Tensor], list[Tensor]]:
    """Of a run what stays over the steps, and what step `i` reads of the tables, `[B, 1, ...]`."""
    fixed: list[Tensor] = []
    rows: list[Tensor] = []
    mapped(run, lambda t, table: rows.append(t[:, i : i + 1]) if table else fixed.append(t))
    return fixed, rows


@dataclass
class Captured:
    """A graph with its static buffers."""

    replay: Callable[[], object]
    output: Tensor
    latents: Tensor
    fixed: list[Tensor]
    rows: list[Tensor]
    run: Any = None  # whose tensors `fixed` holds; kept, so that no other run can be taken for it


class Steps:
    """In the place of a network's `step`, until `remove`: asked without gradients, it replays a graph of the network's own."""

    def __init__(self, network: Any, capture: Capture) -> None:
        self.network, self.capture = network, capture
        self.own = network.step
        self.state: Any = None  # that the graphs were captured in
        self.captured: dict[Any, Captured] = {}

    @property
    def nbytes(self) -> int:
        """Of the static buffers; beside them a graph keeps what the step's activations take at their peak."""
        tensors = [t for one in self.captured.values() for t in (one.latents, one.output, *one.fixed, *one.rows)]
        return sum(t.nbytes for t in tensors)

    def remove(self) -> None:
        """The network has its own `step` again, and the memory of the graphs is free."""
        self.captured.clear()
        vars(self.network).pop("step", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise ConfigError("a network whose steps are graphs cannot be copied: remove them before")

    def __call__(self, latents: Tensor, run: Any, i: int, *rest: Any) -> Tensor:
        """As the network's own: fresh memory, which later steps do not change."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or weighs_rows(self.network):
            return self.own(latents, run, i, *rest)
        state = state_of(self.network)
        if state != self.state:
            self.captured.clear()
            self.state = state
        fixed, rows = leaves(run, i)
        key = (str(rest), *map(form, (latents, *fixed, *rows)))
        one = self.captured.get(key)
        if one is None:
            one = self.captured[key] = self._capture(latents, run, i, rest)
        if one.run is not run:
            torch._foreach_copy_(one.fixed, fixed)
            one.run = run
        torch._foreach_copy_([one.latents, *one.rows], [latents, *rows])
        one.replay()
        return one.output.clone()

    def _capture(self, latents: Tensor, run: Any, i: int, rest: tuple[Any, ...]) -> Captured:
        static, given = mapped(run, lambda t, table: (t[:, i : i + 1] if table else t).clone()), latents.clone()
        replay, output = self.capture(lambda: self.own(given, static, 0, *rest))
        one = Captured(replay, output, given, *leaves(static, 0), run)
        log.info("captured a step of %s as a CUDA graph", list(latents.shape))
        return one


def graph_steps(network: nn.Module, capture: Capture | None = None) -> Steps:
    """Replay a network's steps as CUDA graphs, one for each form of latents and run, captured when it is first asked for.

    - network: a Flux, MMDiT or UNet on a CUDA device; its blocks may be compiled, before.
    - capture: another way to record and replay a step, for tests.

    Weights may change in place. After another LoRA, another scale of one, or weights in other memory (offload, `.to()`) the
    graphs are captured again; hooks on layers do not run in a replay. Under gradients, and with LoRAs weighed row by row, the
    network is asked as before. Raises ConfigError for another module, for a network elsewhere, and for one whose steps are
    graphs already.
    """
    if not isinstance(unwrapped(network), Flux | MMDiT | UNet):
        raise ConfigError(f"steps are those of a Flux, MMDiT or UNet, and {type(network).__name__} has none")
    if capture is None:
        device = next(network.parameters()).device
        if device.type != "cuda":
            raise ConfigError(
                f"CUDA graphs need a network on a CUDA device, and this {type(network).__name__} is on {device}"
            )
        capture = CudaCapture()
    if "step" in vars(network):
        raise ConfigError(f"the steps of this {type(network).__name__} are graphs already: remove them before")
    steps = Steps(network, capture)
    network.step = steps  # type: ignore[assignment]
    return steps


class CudaCapture:
    """Graphs that share their memory: one at a time is replayed, and its output copied before the next."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, ask: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compilers compile, and libraries make their workspaces, outside of the graph
            for _ in range(2):
                ask()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            output = ask()
        return graph.replay, output


def form(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.device


def branches(network: nn.Module) -> Iterator[Any]:
    for module in network.modules():
        yield from vars(module).get("lora_branches", ())


def weighs_rows(network: nn.Module) -> bool:
    """Whether a LoRA has a scale for each row, some kinds of which read it from the host in every step."""
    return any(branch.scale.ndim for branch in branches(network))


def state_of(network: nn.Module) -> tuple[Any, ...]:
    """What a graph has fixed beside its buffers: where each weight lies, the LoRAs and their scales, how torch computes."""
    modules = [*network.modules(), *(m for branch in branches(network) for m in branch.modules())]
    weights = [t for m in modules for table in (m._parameters, m._buffers) for t in table.values() if t is not None]
    cuda = "cuda"
    return (
        [(t.data_ptr(), form(t), t.stride()) for t in weights],
        [(id(branch), float(branch.scale), branch.training) for branch in branches(network)],
        (chosen_kernels(), torch.is_autocast_enabled(cuda), torch.get_autocast_dtype(cuda)),
        torch.get_float32_matmul_precision(),
    )
