"""Errors made at a place, apart from errors carried to it: our network runs on what a trace has, value by value."""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eridiff.trace.names import Source, twin
from eridiff.trace.record import record, relative_l2
from eridiff.trace.shapes import fit
from eridiff.trace.watch import METHODS, exchanged, watched

Run = Callable[[nn.Module], Any]
SAMPLED = 4096  # values of each computed tensor that are kept, or up to twice as many


@dataclass(frozen=True)
class Local:
    """One tensor of a trace beside what our network computes from the trace's own values before it."""

    native: str
    source: Source
    how: str  # in which arrangement it is the network's; empty if in the same
    relative: float  # L2 distance; infinite if the shapes do not fit or a value is not finite
    computed: Tensor  # some values of what our network computes, evenly spaced
    given: Tensor | None = None  # of an input from outside: what the network was called with


def replay(
    network: nn.Module,
    trace: Mapping[str, Tensor],
    sources: Mapping[str, Source],
    run: Run,
    see: Callable[[str, Tensor], None] | None = None,
    rounding: float = 0.0,
) -> list[Local]:
    """Run `network`, exchanging each value that the trace has, in the order of computation.

    - network: in float64.
    - sources: the trace's tensors by our names.
    - run: calls the network; `arguments_run` or `trace_run`.
    - see: is shown each computed value, under autograd, before it is exchanged.
    - rounding: by which part of itself each value is moved before it goes on, up or down at random.

    What differs at one place is what was done between it and the values before it that the trace has; so three errors give
    three differences, wherever they stand.
    """
    found: dict[str, Local] = {}
    chance = torch.Generator().manual_seed(0)

    def change(name: str, computed: Tensor, call: int) -> Tensor:
        whole = f"{name}@{call}" if call else name
        if f"{whole}[0]" in sources:
            return torch.stack([meet(f"{whole}[{i}]", part) for i, part in enumerate(computed)])
        return meet(whole, computed)

    def meet(native: str, computed: Tensor) -> Tensor:
        source = _source(native, computed, trace, sources)
        if source is None or native in found:
            return computed
        if see is not None:
            see(native, computed)
        fitted = fit(source.read(trace), computed.detach())
        if fitted is None:
            how = f"{_shape(source, trace)} against {list(computed.shape)}"
            found[native] = Local(native, source, how, float("inf"), _sample(computed))
            return computed
        value = fitted.tensor.to(computed.device, computed.dtype)
        outside = native.partition(":")[0] in ("forward", *METHODS) and ":" in native
        relative = relative_l2(value, computed)
        found[native] = Local(native, source, fitted.how, relative, _sample(computed), computed if outside else None)
        another = see is not None or relative > 0
        finite = math.isfinite(relative) or bool(value.isfinite().all())
        return value if another and finite else computed

    def moved(value: Tensor) -> Tensor:
        if not rounding or not value.is_floating_point():
            return value
        signs = 2 * torch.randint(2, value.shape, generator=chance, dtype=torch.float64) - 1
        return value * (1 + rounding * signs.to(value.device))

    def visit(name: str, value: Any, call: int) -> Any:
        return exchanged(name, value, lambda leaf, tensor: moved(change(leaf, tensor, call)))

    with torch.set_grad_enabled(see is not None), watched(network, visit):
        run(network)
    return list(found.values())


def _sample(computed: Tensor) -> Tensor:
    values = computed.detach().reshape(-1)
    return values[:: max(1, len(values) // SAMPLED)].clone()


def _shape(source: Source, trace: Mapping[str, Tensor]) -> list[int]:
    return list(source.read(trace).shape)


def _source(native: str, computed: Tensor, trace: Mapping[str, Tensor], sources: Mapping[str, Source]) -> Source | None:
    """The trace's tensor of this name; of two outputs that another implementation gives in the other order, the one that fits.

    None where it gives one alone and that is the other.
    """
    own, other = sources.get(native), sources.get(twin(native))
    if own is None or not twin(native):
        return own
    if other is None:
        alone = twin(native).partition("@")[0].endswith(".0") and fit(own.read(trace), computed) is None
        return None if alone else own
    shapes = [_shape(source, trace) for source in (own, other)]
    return other if shapes[0] != shapes[1] == list(computed.shape) else own


def arguments_run(arguments: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> Run:
    """Calls the network with these arguments, floating ones in `dtype`."""
    given = {name: _cast(value, dtype) for name, value in arguments.items()}
    return lambda network: network(**given)


def trace_run(
    kind: type[nn.Module], trace: Mapping[str, Tensor], sources: Mapping[str, Source]
) -> Callable[[torch.dtype], Run] | None:
    """Calls a network of this kind as the trace says that it was called: its `forward`, or `prepare` and each `step`; None if it does not.

    What it returns takes the dtype of floating arguments.
    """

    def arguments(function: str, dtype: torch.dtype, call: str = "") -> dict[str, Any]:
        names = {n: f"{function}:{n}{call}" for n in inspect.signature(getattr(kind, function)).parameters}
        return {n: _cast(sources[s].read(trace), dtype) for n, s in names.items() if s in sources}

    steps = [name.removeprefix("step:latents") for name in sources if name.startswith("step:latents")]

    def stepwise(network: Any, dtype: torch.dtype) -> None:
        prepared = network.prepare(**arguments("prepare", dtype))
        for i, call in enumerate(steps):
            given = arguments("step", dtype, call)
            network.step(given["latents"], prepared, given.get("i", i))

    def given(function: str) -> bool:
        parameters = inspect.signature(getattr(kind, function)).parameters.values()
        needed = [p.name for p in parameters if p.default is p.empty and p.name not in ("self", "run", "i")]
        return all(f"{function}:{name}" in sources for name in needed)

    if given("forward"):
        return lambda dtype: lambda network: network(**arguments("forward", dtype))
    if hasattr(kind, "step") and given("prepare") and given("step"):
        return lambda dtype: lambda network: stepwise(network, dtype)
    return None


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and not value.is_floating_point() and value.ndim < 2:
        numbers = value.tolist()  # a grid, or the number of a step
        return tuple(numbers) if isinstance(numbers, list) else numbers
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def amplified(
    network: nn.Module,
    trace: Mapping[str, Tensor],
    sources: Mapping[str, Source],
    run: Run,
    places: Iterable[Local],
    dtype: torch.dtype,
) -> dict[str, float]:
    """How far what is computed at each of `places` moves where every value before it is moved by the epsilon of `dtype`.

    A few epsilons; of a sinusoid as many as its arguments are large. Those are computed in float32 at least by every program.
    """
    eps = min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    moved = {local.native: local.computed for local in replay(network, trace, sources, run, rounding=eps)}
    found = {local.native: relative_l2(moved[local.native], local.computed) for local in places}
    return {native: distance for native, distance in found.items() if math.isfinite(distance)}


def floors(
    network: nn.Module, run: Callable[[torch.dtype], Run], dtype: torch.dtype, sources: Mapping[str, Source]
) -> dict[str, float]:
    """What rounding to `dtype` alone gives at each place on this network: the measure of what counts as an error there."""
    narrow = copy.deepcopy(network).to(dtype)
    with torch.no_grad(), record(narrow, calls="all") as recording:
        run(dtype)(narrow)
    own = {name: Source((name,)) for name in recording if name in sources or f"{name}[0]" in sources}
    return {local.native: local.relative for local in replay(network, recording, own, run(torch.float64))}
