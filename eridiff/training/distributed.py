"""Networks sharded by FSDP2."""

from typing import Any, TypeVar

from torch import nn

from eridiff.blocks import repeated_blocks
from eridiff.errors import ConfigError

Network = TypeVar("Network", bound=nn.Module)
ASKED = ("prepare", "step", "modulate", "keys_values")  # what a network and its blocks are asked beside `forward`


def shard(network: Network, **options: Any) -> Network:
    """FSDP2 on an eridiff network: every repeated block and the rest are sharded over the ranks; returns `network`.

    options are `fully_shard`'s (mesh, mp_policy, offload_policy). The network trains by its `forward` and is sampled as before,
    with every rank asking it equally often. Nothing stays gathered after a call, not even the root's parameters, which by
    default do: after a step of the optimizer an image would be generated with those from before. Raises ConfigError for a module
    without repeated blocks, and for one that `adopt` made.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if hasattr(network, "adopted_from"):
        raise ConfigError(
            f"this {type(network).__name__} was adopted and has the parameters of the trainer's {network.adopted_from}, so it "
            "cannot be sharded: train eridiff's own network by `shard`, or sample with a module that is not sharded"
        )
    blocks = [block for block in repeated_blocks(network) if any(True for _ in block.parameters())]
    modules: list[nn.Module] = [*blocks, network]
    for module in modules:
        fully_shard(module, reshard_after_forward=True, **options)
        for name in ASKED:
            if hasattr(module, name):
                register_fsdp_forward_method(module, name)
    return network


def sharded(module: nn.Module) -> bool:
    """Whether FSDP2 keeps a part of the module's parameters on each rank, so that all must ask it together."""
    return any(hasattr(parameter, "device_mesh") for parameter in module.parameters())
