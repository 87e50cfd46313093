"""One component on the device at a time, for one image or for several together."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from eridiff.blocks import repeated_blocks
from eridiff.memory.stream import streamed
from eridiff.models.layers import keeps_nothing

T = TypeVar("T")
Stages = Generator[nn.Module, None, T]  # work that yields the component which its next lines compute with


def together(
    runs: Sequence[Stages[T]], stage: Callable[[nn.Module], AbstractContextManager[object]], last: nn.Module
) -> Iterator[T]:
    """Take several runs to their ends, one component at a time for all that need it next; their results in order.

    `stage(component)` is entered while the component is used. `last` is used when no run needs another one, so that no run
    falls behind. An error before any component is used is raised at once. After any other, Ctrl-C included, the runs before
    the one that failed are finished and their results given, as images may have taken minutes; then it is raised.
    """
    needed: dict[int, nn.Module | None] = dict.fromkeys(range(len(runs)))  # None: not begun
    results: dict[int, T] = {}
    failure: BaseException | None = None
    while needed:
        module = next((m for m in needed.values() if m is not last), last)
        with torch.no_grad(), nullcontext() if module is None else stage(module):
            for i in [i for i, m in needed.items() if m is module]:
                try:
                    needed[i] = next(runs[i])
                except StopIteration as end:
                    results[i] = end.value
                    del needed[i]
                except BaseException as error:
                    if module is None:
                        raise
                    failure, needed = error, {j: m for j, m in needed.items() if j < i}
                    break
    yield from (results[i] for i in sorted(results))
    if failure is not None:
        raise failure


def asked_once(network: nn.Module) -> list[nn.Linear]:
    """The layers that a run asks before its steps alone: those of modulation, more than a quarter of Flux and of SD 3.5."""
    named = (m for name, m in network.named_modules() if name.rsplit(".", 1)[-1] in ("modulation", "last_modulation"))
    return [layer for layer in named if isinstance(layer, nn.Linear)]


# what is on the device at once, the fastest first: a component, or of most components a few blocks, or a layer
OFFLOAD = ("stages", "stream", "layers")


def block_parts(module: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """The repeated blocks of a network or a text encoder, each with its modules and the LoRAs beside them.

    Layers that are `asked_once` are left out: they have visits of their own. Raises ConfigError for a module without blocks.
    """
    apart = set(map(id, asked_once(module)))
    parts = {b: with_branches([m for m in b.modules() if id(m) not in apart]) for b in repeated_blocks(module)}
    return {block: modules for block, modules in parts.items() if held_bytes(modules)}


def with_branches(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Modules and the LoRAs beside them, which are not in the tree of any."""
    return [*modules, *(branch for m in modules for branch in vars(m).get("lora_branches", ()))]


@contextmanager
def on_device(
    module: nn.Module, device: torch.device, offload: str = "stages", room: int | None = None
) -> Iterator[None]:
    """Within the block the module works with copies of its parameters and buffers on `device`, its own afterwards; LoRAs beside it come along.

    The module's tensors are left as they are and not copied back: memory-mapped weights stay mapped, an optimizer keeps
    its parameters, and tensors that several modules share are copied once. Layers that are `asked_once` come for each call
    alone, so that they take no memory beside the steps; with "layers" every `nn.Linear` does. With "stream" blocks pass
    through a ring of buffers, but for those that stay, as many as `room` bytes hold beside the rest; on the CPU nothing moves.
    """
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    visitors = linears if offload == "layers" else asked_once(module)
    blocks = block_parts(module) if offload == "stream" and device.type != "cpu" else {}
    apart = set(map(id, [*visitors, *chain(*blocks.values())]))
    staying = [m for m in with_branches(list(module.modules())) if id(m) not in apart]
    with ExitStack() as stack:
        for layer in visitors:
            stack.enter_context(_visiting(layer, device))
        stack.enter_context(_copied(staying, device))
        if blocks:
            rest = held_bytes(staying) + max((held_bytes([layer]) for layer in visitors), default=0)
            stack.enter_context(streamed(blocks, device, None if room is None else room - rest))
        yield


def held_bytes(modules: Sequence[nn.Module]) -> int:
    """Of the tensors of modules, without those of their children; one that several have is counted once."""
    own = {id(t): t.nbytes for m in modules for t in [*m._parameters.values(), *m._buffers.values()] if t is not None}
    return sum(own.values())


@contextmanager
def _visiting(layer: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block a layer is on the device while it is called. Hooks that were there before, a LoRA's, find it there."""
    call = ExitStack()

    @keeps_nothing
    def arrive(*_: object) -> None:
        call.enter_context(_copied([layer], device))

    @keeps_nothing
    def leave(*_: object) -> None:
        call.close()

    hooks = [layer.register_forward_pre_hook(arrive), layer.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        call.close()


@contextmanager
def _copied(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Within the block modules work with copies of their own tensors, without those of their children, on the device."""
    own: list[tuple[dict[str, Any], str]] = [
        (table, name) for m in modules for table in (m._parameters, m._buffers) for name in table
    ]
    kept = [table[name] for table, name in own]
    copies: dict[int, Tensor] = {}
    try:
        for table, name in own:
            tensor = table[name]
            if tensor is not None:
                if id(tensor) not in copies:
                    moved = tensor.detach().to(device)
                    copy: Any = nn.Parameter(moved, False) if isinstance(tensor, nn.Parameter) else moved
                    copy.copy_of = getattr(tensor, "copy_of", tensor)  # a LoRA that is weighed meanwhile changes both
                    copies[id(tensor)] = copy
                table[name] = copies[id(tensor)]
        yield
    finally:
        for (table, name), tensor in zip(own, kept, strict=True):
            table[name] = tensor
