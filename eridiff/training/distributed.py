"""Many processes: networks sharded by FSDP2, pictures spread over the ranks of torch.distributed."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from eridiff.blocks import repeated_blocks
from eridiff.errors import ConfigError, EridiffError

Network = TypeVar("Network", bound=nn.Module)
Value = TypeVar("Value")
ASKED = ("prepare", "step", "modulate", "keys_values")  # what a network and its blocks are asked beside `forward`


def shard(network: Network, **options: Any) -> Network:
    """FSDP2 on a network of ours: every repeated block and the rest are sharded over the ranks; returns `network`.

    options are `fully_shard`'s (mesh, mp_policy, offload_policy). The network trains by its `forward` and draws as before,
    with every rank asking it equally often. Nothing stays gathered after a call, not even the root's parameters, which by
    default do: after a step of the optimizer a picture would be drawn with those from before. Raises ConfigError for a module
    without repeated blocks, and for one that `adopt` made.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if hasattr(network, "adopted_from"):
        raise ConfigError(
            f"this {type(network).__name__} was adopted and has the parameters of the trainer's {network.adopted_from}, so it cannot be "
            "sharded: train eridiff's own network by `shard`, or draw with a module that is not sharded"
        )
    blocks = [block for block in repeated_blocks(network) if any(True for _ in block.parameters())]
    modules: list[nn.Module] = [*blocks, network]
    for module in modules:
        fully_shard(module, reshard_after_forward=True, **options)
        for name in ASKED:
            if hasattr(module, name):
                register_fsdp_forward_method(module, name)
    return network


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
        raise EridiffError(f"pictures could not be drawn on {'; '.join(failed)}")
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


def sharded(module: nn.Module) -> bool:
    """Whether FSDP2 keeps a part of the module's parameters on each rank, so that all must ask it together."""
    return any(hasattr(parameter, "device_mesh") for parameter in module.parameters())


def agreed(value: Value) -> Value:
    """Rank 0's value, on every rank."""
    if not _several():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
