"""Many processes: which of them this is, who generates what, and what all of them know."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from eridiff.errors import EridiffError

Value = TypeVar("Value")


@contextmanager
def launched() -> Iterator[int]:
    """This process's rank, 0 for a single one; within the block those that `torchrun` started have a gloo group."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield dist.get_rank() if _several() else 0
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
        dist.barrier()  # a rank that ends before the others would close connections that they use
    finally:
        gc.collect()  # wrappers of networks are circles, and hold the group
        dist.destroy_process_group()


def spread(count: int, draw: Callable[[int], Value]) -> list[Value]:
    """`draw(0)`, `draw(1)`, ... `draw(count - 1)`, each on one rank in turn: all of them on rank 0, `[]` on the others.

    Not for a sharded network, which all ranks ask together. When `draw` raises, its rank and rank 0 do, once all have come
    to an end; nobody waits for what will not come.
    """
    if not _several():
        return [draw(i) for i in range(count)]
    rank, size = ranks()
    drawn: dict[int, Value] = {}
    failure: Exception | None = None
    try:
        for i in range(rank, count, size):
            drawn[i] = draw(i)
    except Exception as error:
        failure = error
    gathered = collected((drawn, failure and str(failure)))
    if failure is not None:
        raise failure
    if rank != 0:
        return []
    failed = [f"rank {r}: {message}" for r, (_, message) in enumerate(gathered) if message is not None]
    if failed:
        raise EridiffError(f"images could not be generated on {'; '.join(failed)}")
    every = {i: item for part, _ in gathered for i, item in part.items()}
    return [every[i] for i in range(count)]


def ranks() -> tuple[int, int]:
    """This process's rank and their number; 0 and 1 for a process alone."""
    return (dist.get_rank(), dist.get_world_size()) if _several() else (0, 1)


def collected(value: Value) -> list[Value]:
    """Every rank's value, in their order, on rank 0; `[]` on the others."""
    rank, size = ranks()
    if size == 1:
        return [value]
    gathered: list[Any] = [None] * size
    dist.gather_object(value, gathered if rank == 0 else None)
    return gathered if rank == 0 else []


def everyones(value: Value) -> list[Value]:
    """Every rank's value, in their order, on every rank."""
    if not _several():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def agreed(value: Value) -> Value:
    """Rank 0's value, on every rank."""
    if not _several():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
