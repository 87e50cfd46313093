"""Networks as trainers treat them, from outside: checkpointed blocks, wrappers around the whole."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from eridiff.errors import ConfigError

WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module")  # torch.compile; DDP and averaged models; FSDP


def unwrapped(module: nn.Module) -> Any:
    """The module inside compiled, distributed and averaging wrappers."""
    inner: nn.Module | None = module
    while inner is not None:
        module = inner
        inner = next((m for name in WRAPPERS if (m := module._modules.get(name)) is not None), None)
    return module


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of its `nn.ModuleList`s that hold no further list; raises ConfigError for a model that has none."""
    members = [block for child in model.modules() if isinstance(child, nn.ModuleList) for block in child]
    blocks = [block for block in members if not any(isinstance(m, nn.ModuleList) for m in block.modules())]
    if not blocks:
        raise ConfigError(f"{type(model).__name__} has no repeated blocks")
    return blocks


@contextmanager
def checkpoint_blocks(model: nn.Module) -> Iterator[None]:
    """Within the block, the model's `repeated_blocks` keep no activations and compute them again in the backward pass.

    Outputs and gradients stay the same.
    """
    blocks = repeated_blocks(model)
    originals: list[Callable[..., Any]] = [block.forward for block in blocks]
    for block, forward in zip(blocks, originals, strict=True):
        block.forward = partial(checkpoint, forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
