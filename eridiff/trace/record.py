"""Recording by forward hooks: the network knows nothing of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eridiff.errors import TraceError


class Recording(dict[str, Tensor]):
    """Tensors in the order of their computation.

    `path` is a module's output (`path.0`, `path.1` for several); `path:0`, `path:1` are its inputs. A module that ran
    several times keeps its last call.
    """


@contextmanager
def record(module: nn.Module, device: torch.device | str | None = "cpu") -> Iterator[Recording]:
    """Record every sub-module while the block runs, detached; hooks are gone afterwards, errors or not.

    Copies lie on `device`; None keeps each where it was computed, which is faster and takes that device's memory.
    """
    recording = Recording()

    def keep(path: str, value: object, mark: str) -> None:
        values = value if isinstance(value, tuple) else (value,)
        for i, item in enumerate(values):
            if isinstance(item, Tensor):
                name = path + (f"{mark}{i}" if mark == ":" or len(values) > 1 else "")
                recording.pop(name, None)
                recording[name] = item.detach().to(device or item.device, copy=True)

    def hook(path: str):  # type: ignore[no-untyped-def]
        def after(_: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            keep(path, inputs, ":")
            keep(path, output, ".")

        return after

    handles = [child.register_forward_hook(hook(path)) for path, child in module.named_modules() if path]
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Difference:
    """Where two recordings part: the tensor's name and the relative L2 distance there (infinite for other shapes)."""

    name: str
    relative: float


def relative_l2(found: Tensor, expected: Tensor) -> float:
    """`|found - expected| / |expected|` in float64, on the CPU; infinite when shapes differ or a value is not finite."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = (t.detach().to("cpu", torch.float64) for t in (found, expected))
    distance = float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float64).tiny))
    return distance if distance == distance else float("inf")


def first_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float) -> Difference | None:
    """The first tensor of `expected`, in its order, whose relative L2 distance exceeds `bound`; None if none does.

    Raises TraceError when a name of `expected` was not recorded.
    """
    for name, value in expected.items():
        if name not in found:
            raise TraceError(
                f"'{name}' was not recorded; there are {len(found)} tensors, the first is '{next(iter(found), '')}'"
            )
        distance = relative_l2(found[name], value)
        if distance > bound:
            return Difference(name, distance)
    return None
