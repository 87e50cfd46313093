"""Kernels of one step and the memory that they write anew, on the meta device: `python -m benchmarks.kernels`.

The published sizes of `benchmarks/gpu_cases.py`, eridiff's and, where it is installed, diffusers'. No weights, no GPU: every
operation that is not a view counts as one kernel. Attention and RMS norm are counted as CUDA runs them, as one kernel each,
after a copy of what lies scattered in memory for the norm; a convolution's bias and a product's partial sums are not seen.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import gpu_cases
from benchmarks.gpu_cases import Case, on_meta
from eridiff.memory.plan import Fused

META = torch.device("meta")
SYNCHRONISING = ("aten._local_scalar_dense.default", "aten.nonzero.default")  # which wait for the device


@dataclass
class Count:
    """Of the calls within."""

    kernels: int = 0
    fresh_bytes: int = 0
    copies_from_host: int = 0
    synchronisations: int = 0
    names: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, *made: Tensor) -> None:
        self.kernels += 1
        self.fresh_bytes += sum(t.untyped_storage().nbytes() for t in made)
        self.names[name] = self.names.get(name, 0) + 1


class _Operations(TorchDispatchMode):
    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = operation(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        owned = {t.untyped_storage()._cdata for t in given}
        made = [t for t in tree_leaves(found) if isinstance(t, Tensor) and t.device == META]
        fresh = [t for t in made if t.untyped_storage()._cdata not in owned]
        name = str(operation)
        self.count.synchronisations += name in SYNCHRONISING
        self.count.copies_from_host += name == "aten._to_copy.default" and any(t.device != META for t in given)
        in_place = operation._schema.is_mutable
        if name.startswith("aten.new_empty"):  # memory without a kernel
            self.count.fresh_bytes += sum(t.untyped_storage().nbytes() for t in fresh)
        elif (fresh or in_place) and not name.startswith("aten.empty"):
            self.count.add(name, *fresh)
        return found


class _Fused(Fused):
    """Attention and RMS norm as CUDA runs them."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def attention(self, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
        b, h, length, _width = query.shape
        made = torch.empty(b, length, h, value.shape[-1], dtype=query.dtype, device=META)
        self.count.add("attention", made)
        return made.transpose(1, 2)

    def norm(self, x: Tensor) -> Tensor:
        made = super().norm(x)
        if not x.is_contiguous():
            self.count.add("copy before an RMS norm", made)
        self.count.add("RMS norm", made)
        return made


@torch.no_grad()
def count(ask: Callable[[], Any]) -> Count:
    """What a call on the meta device asks of a GPU."""
    found = Count()
    with _Fused(found), _Operations(found):
        ask()
    return found


def of_step(case: Case, dtype: torch.dtype = torch.bfloat16) -> Count:
    """Of one step of our network, without its preparation."""
    networks, x = on_meta(case.ours), case.inputs(META, dtype)
    with torch.no_grad():
        run = case.prepare(networks, x)
    return count(lambda: case.step(networks, x, run))


def of_theirs(case: Case, dtype: torch.dtype = torch.bfloat16) -> Count:
    """Of one call of diffusers' network, which prepares anew."""
    networks, x = on_meta(case.theirs), case.inputs(META, dtype)
    return count(lambda: case.ask_theirs(networks, x))


def main() -> None:
    print("| | kernels | GB written anew |\n|---|---|---|")
    for case in gpu_cases.published():
        if case.name in ("G1", "G3", "G4", "G5", "G6a"):
            for name, of in (("ours", of_step), ("diffusers", of_theirs)):
                found = of(case)
                print(f"| {case.what}: {name} | {found.kernels:,} | {found.fresh_bytes / 1e9:.1f} |", flush=True)
                if "--names" in sys.argv:
                    print(*sorted(found.names.items(), key=lambda pair: -pair[1]), sep="\n")


if __name__ == "__main__":
    main()
