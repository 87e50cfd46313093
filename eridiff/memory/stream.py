"""Blocks that pass through the device: a ring of buffers there, filled while the blocks before compute.

While one block computes, the next is copied, by the order in which the blocks were asked for in the pass before; a wrong guess
costs a copy that is waited for. A block is one allocation, so that one copy moves it, and nothing is copied back. A buffer is
filled again only when what was computed with it has ended, and computed with only when it is filled: `Streams` holds what
makes the one wait for the other, `Ring` what is asked for in which order.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eridiff.errors import ConfigError
from eridiff.models.layers import keeps_nothing
from eridiff.weights.load import machine_memory

RING = 2  # buffers on the device, and as many in pinned memory
PINNED = 0.25  # of the machine's memory may be pinned, so that blocks need not be read from their file in each step
ALIGNED = 256  # bytes at which a tensor begins, as where torch allocates it


class InOrder:
    """Copies and computing one after the other, for devices without streams."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def host_memory(self, size: int) -> Tensor:
        """`[size]` uint8 from which is copied."""
        return torch.empty(size, dtype=torch.uint8, device="cpu")

    def mark(self) -> Any:
        """An event: what the device was asked to compute so far has ended."""

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Begin a copy to the device as soon as `after` has happened; the event of its end."""
        target.copy_(source)

    def wait(self, copied: Any) -> None:
        """What is computed from now on begins after a copy's end."""

    def finish(self, copied: Any) -> None:
        """Return after a copy's end."""


class Streams(InOrder):
    """CUDA: copies from pinned memory on a stream of their own, beside the computing on the current one."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.copies = torch.cuda.Stream(device)

    def host_memory(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)

    def mark(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        self.copies.wait_event(after)
        with torch.cuda.stream(self.copies):
            target.copy_(source, non_blocking=True)
        return self.copies.record_event()

    def wait(self, copied: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(copied)

    def finish(self, copied: Any) -> None:
        copied.synchronize()


def queue_of(device: torch.device) -> InOrder:
    """What copies to a device."""
    return Streams(device) if device.type == "cuda" else InOrder(device)


class Block:
    """The tensors of some modules, without those of their children, as one piece of memory."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        tables: list[dict[str, Any]] = [table for m in modules for table in (m._parameters, m._buffers)]
        self.entries = [(table, name) for table in tables for name, tensor in table.items() if tensor is not None]
        self.own: list[Tensor] = [table[name] for table, name in self.entries]
        self.places, self.size = [], 0
        for tensor in self.own:
            self.places.append(self.size)
            self.size += -(-tensor.nbytes // ALIGNED) * ALIGNED
        self.strides = [torch.empty_like(tensor, device="meta").stride() for tensor in self.own]
        self.read: list[tuple[Tensor, int]] = []  # the tensors and their versions as they were copied last
        self.kept: Memory | None = None  # pinned, for this block alone
        self.slot: Memory | None = None  # on the device

    def views(self, memory: Tensor) -> list[Tensor]:
        """The block's tensors in `[size]` uint8, in the arrangement of its own."""
        parts = (memory[start : start + t.nbytes].view(t.dtype) for t, start in zip(self.own, self.places, strict=True))
        return [part.as_strided(t.shape, s) for part, t, s in zip(parts, self.own, self.strides, strict=True)]

    def gather(self, memory: Tensor) -> None:
        """Copy the block's tensors into one piece of the host's memory."""
        self.read = [(t.detach(), 0 if t.is_inference() else t._version) for t in self.own]
        for view, (tensor, _) in zip(self.views(memory), self.read, strict=True):
            view.copy_(tensor)

    @property
    def changed(self) -> bool:
        """Whether a tensor was changed since, as a LoRA does that is weighed in a callback."""
        both = zip(self.own, self.read, strict=True)
        return any(
            t.data_ptr() != seen.data_ptr() or (not t.is_inference() and t._version != then) for t, (seen, then) in both
        )

    def put(self, memory: Tensor) -> None:
        """Let the modules work with the block's tensors in memory on the device."""
        for (table, name), own, view in zip(self.entries, self.own, self.views(memory), strict=True):
            copy: Any = nn.Parameter(view, False) if isinstance(own, nn.Parameter) else view
            copy.copy_of = getattr(own, "copy_of", own)  # a LoRA that is weighed meanwhile changes both
            table[name] = copy

    def restore(self) -> None:
        """Let the modules work with their own tensors."""
        for (table, name), own in zip(self.entries, self.own, strict=True):
            table[name] = own


@dataclass(eq=False)
class Memory:
    """A piece of memory for a block, on the device or pinned."""

    bytes: Tensor
    copied: Any = None  # the event of the last copy to it, or from it
    left: Any = None  # that of what was computed with it
    block: Block | None = None  # that is in it


class Ring:
    """Brings blocks to the device as they are asked for."""

    def __init__(self, blocks: Sequence[Block], queue: InOrder, resident: Sequence[Block] = ()) -> None:
        """`blocks` in the order that is expected of the first pass; `resident` ones come once and stay."""
        self.queue, self.blocks, self.resident = queue, blocks, resident
        self.follow = dict(zip(blocks, [*blocks[1:], *blocks[:1]], strict=True))  # whom each block was followed by
        self.current: Block | None = None  # computes, or is about to
        self.last: Block | None = None
        self.begun: Any = None  # the last copy
        self.spare = int(PINNED * machine_memory())
        self.pinned, self.slots = deque[Memory](), deque[Memory]()  # the one to be filled next first

    def start(self) -> None:
        """Take the memory, and bring the blocks that stay."""
        every = [*self.resident, *self.blocks]
        largest = max((block.size for block in every), default=0)
        self.pinned.extend(Memory(self.queue.host_memory(largest)) for _ in every[:RING])
        for block in self.resident:
            self._load(block, self._memory(block.size))
        largest = max((block.size for block in self.blocks), default=0)
        self.slots.extend(self._memory(largest) for _ in self.blocks[:RING])
        for block in self.resident:
            self._arrive(block)

    def _memory(self, size: int) -> Memory:
        memory = torch.empty(size, dtype=torch.uint8, device=self.queue.device)
        return Memory(memory, left=self.queue.mark())  # it may have been freed by what is still being computed

    def ask(self, block: Block) -> None:
        """What is computed from now on finds this block on the device, as it is now."""
        if torch.is_grad_enabled():
            raise ConfigError(
                "offload='stream' copies blocks over one another, so no gradient can pass through them: "
                "compute under torch.no_grad(), or without offload"
            )
        if block is not self.current:
            self.leave()
            if block.slot is None or block.changed:
                other = next((slot for slot in self.slots if slot.block is not self.last), self.slots[0])
                self._load(block, block.slot or other)
            if self.last is not None:
                self.follow[self.last] = block
            self.current = self.last = block
            self._arrive(block)

    def leave(self) -> None:
        """The block that was asked for last has been computed with."""
        if self.current is not None and self.current.slot is not None:
            self.current.slot.left = self.queue.mark()
            self._touch(self.current.slot)
            self.current = None

    def foresee(self) -> None:
        """Begin to copy those that are expected next."""
        block = self.last
        for _ in range(len(self.slots) - 1):
            block = self.follow[block] if block else None
            if block is not None:
                if block.slot is None:
                    self._load(block, self.slots[0])
                self._touch(block.slot)

    def _touch(self, slot: Memory | None) -> None:
        """Let a slot be the last that is filled anew."""
        assert slot is not None
        self.slots.remove(slot)
        self.slots.append(slot)

    def _load(self, block: Block, slot: Memory) -> None:
        """Begin to copy a block into a slot, in place of the one that is there."""
        if slot.block is not None:
            slot.block.restore()
            slot.block.slot = None
        slot.block, block.slot = block, slot
        source = self._gathered(block)
        self.begun = self.queue.copy(slot.bytes[: block.size], source.bytes[: block.size], slot.left)
        slot.copied = source.copied = self.begun

    def _gathered(self, block: Block) -> Memory:
        """Pinned memory that holds the block: its own from its second copy on, if there is room for that."""
        if block.kept is not None and not block.changed:
            return block.kept
        if block.kept is None and block.read and block.size <= self.spare:
            self.spare -= block.size
            block.kept = Memory(self.queue.host_memory(block.size))
        memory = block.kept or self.pinned[0]
        self.pinned.rotate(-1)
        if memory.copied is not None:
            self.queue.finish(memory.copied)
        block.gather(memory.bytes)
        return memory

    def _arrive(self, block: Block) -> None:
        assert block.slot is not None
        self.queue.wait(block.slot.copied)
        block.put(block.slot.bytes)

    def close(self) -> None:
        """The modules work with their own tensors again, and the device's memory is free."""
        if self.begun is not None:
            self.queue.wait(self.begun)  # else what takes the memory next would be copied over
        self.slots.clear()
        for block in [*self.resident, *self.blocks]:
            block.restore()
            block.slot = None  # not left to Python's search for circles


@contextmanager
def streamed(
    blocks: Mapping[nn.Module, Sequence[nn.Module]], device: torch.device, room: int | None = None
) -> Iterator[None]:
    """Within the block the modules of each block are on the device when one of them is called.

    - blocks: by the module that is called, the modules whose own tensors come.
    - room: bytes of the device for all of them, which so many stay on as fit; with None none does.

    Raises ConfigError under grad, and for compiled blocks, whose hooks torch does not call.
    """
    made = {module: Block(parts) for module, parts in blocks.items()}
    passing = set(chosen([block.size for block in made.values()], room))
    ring_blocks = {module: block for i, (module, block) in enumerate(made.items()) if i in passing}
    if any(module._compiled_call_impl is not None for module in ring_blocks):
        raise ConfigError(
            "offload='stream' is for blocks that are not compiled: a compiled block does not call its hooks"
        )
    resident = [block for i, block in enumerate(made.values()) if i not in passing]
    ring = Ring(list(ring_blocks.values()), queue_of(device), resident)
    with ExitStack() as stack:
        stack.callback(ring.close)
        ring.start()
        for module, block in ring_blocks.items():
            for part in blocks[module]:
                asked = keeps_nothing(lambda *_, block=block: ring.ask(block))
                arrive = part.register_forward_pre_hook(asked, prepend=True)
                stack.callback(arrive.remove)
            for then in (ring.leave, ring.foresee):
                stack.callback(module.register_forward_hook(lambda *_, then=then: then()).remove)
        yield


def chosen(sizes: Sequence[int], room: int | None) -> list[int]:
    """Which of blocks of these sizes pass through the ring: as few as `room` asks for, evenly spaced, so that copies have time."""
    for count in range(len(sizes) if room else 0):
        passing = [(2 * i + 1) * len(sizes) // (2 * count) for i in range(count)]
        through = [sizes[i] for i in passing]
        if sum(sizes) - sum(through) + ring_size(through) <= (room or 0):
            return passing
    return list(range(len(sizes)))


def ring_size(sizes: Sequence[int]) -> int:
    """Bytes of the ring on the device through which blocks of these sizes pass."""
    return min(RING, len(sizes)) * max(sizes, default=0)
