"""The two queues of a device, copies and computing, each as early or as late as nothing forbids.

On the pretended GPU an operation has ended when it returns, so that a wait that is missing would not show. `Adversary` copies
as soon as it is asked to, or not before something waits for it; until then the memory is poison, NaN in every floating dtype.
By `Watch` it knows when memory was last computed with, or written by the host. A copy into memory that may still be computed with,
or out of memory that was written anew while the copy before may still read it, is poison too.
"""

import random
from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eridiff.memory.stream import InOrder
from tests.pretend_gpu import OnGPU, leaves

ORDERS = ("early", "late", "mixed")
POISON = 255


class Watch(TorchDispatchMode):
    """Counts operations; `used` is the last one that read or wrote a piece of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.clock, self.used, self.counts = 0, dict[int, int](), True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        returned = function._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returned)  # which computes nothing
        if self.counts and not view:
            self.clock += 1
            for tensor in leaves((args, kwargs, result)):
                if isinstance(tensor, Tensor) and not tensor.is_meta:
                    self.used[address(tensor)] = self.clock
        return result


def address(tensor: Any) -> int:
    return int((tensor.inner if isinstance(tensor, OnGPU) else tensor).untyped_storage().data_ptr())


class Adversary(InOrder):
    """Copies in one of `ORDERS`; `ignores` names a method that does nothing, as if it had not been called. Events are numbers."""

    def __init__(self, device: torch.device, watch: Watch, order: str, ignores: str = "") -> None:
        super().__init__(device)
        self.watch, self.order, self.ignores = watch, order, ignores
        self.waiting: deque[tuple[int, Tensor, Tensor]] = deque()
        self.reading: dict[int, tuple[int, int]] = {}  # of host memory: the copy that may still read it, and since when
        self.chance, self.copies = random.Random(0), 0

    def mark(self) -> Any:
        return 0 if self.ignores == "mark" else self.watch.clock

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        memory, used, place = target.inner, self.watch.used, address(source)  # type: ignore[attr-defined]
        written_anew = place in self.reading and used[place] > self.reading[place][1]
        if used.get(address(target), 0) > after or written_anew:
            source = torch.full_like(source, POISON)
        self.copies += 1
        self.reading[place] = self.copies, self.watch.clock
        self.waiting.append((self.copies, memory, source))
        self._uncounted(memory.fill_, POISON)
        if self.order == "early" or (self.order == "mixed" and self.chance.random() < 0.5):
            self._until(self.copies)
        return self.copies

    def wait(self, copied: Any) -> None:
        if self.ignores != "wait":
            self._until(copied)

    def finish(self, copied: Any) -> None:
        if self.ignores != "finish":
            self._until(copied)
            self.reading = {place: (copy, since) for place, (copy, since) in self.reading.items() if copy > copied}

    def _until(self, copied: int) -> None:
        while self.waiting and self.waiting[0][0] <= copied:
            _, memory, source = self.waiting.popleft()
            self._uncounted(memory.copy_, source)

    def _uncounted(self, function: Any, value: Any) -> None:
        """What the device does in the background is not an operation of the program."""
        self.watch.counts = False
        try:
            function(value)
        finally:
            self.watch.counts = True
