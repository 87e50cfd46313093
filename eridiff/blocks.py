"""Networks as trainers treat them, from outside: compiled and checkpointed blocks, wrappers around the whole."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from eridiff.errors import ConfigError
from eridiff.lora.branches import install_slots


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of a model's `nn.ModuleList`s that hold no further list; raises ConfigError for a model that has none."""
    members = [block for child in model.modules() if isinstance(child, nn.ModuleList) for block in child]
    blocks = [block for block in members if not any(isinstance(m, nn.ModuleList) for m in block.modules())]
    if not blocks:
        raise ConfigError(f"{type(model).__name__} has no repeated blocks")
    return blocks


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """`torch.compile` each repeated block, with these options; equal blocks are compiled once.

    LoRAs that are attached, changed or detached afterwards take effect.
    """
    install_slots(model)
    for block in repeated_blocks(model):
        block.compile(**options)


WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module")  # torch.compile; DDP and averaged models; FSDP


def unwrapped(module: nn.Module) -> Any:
    """The module inside compiled, distributed and averaging wrappers."""
    inner: nn.Module | None = module
    while inner is not None:
        module = inner
        inner = next((m for name in WRAPPERS if (m := module._modules.get(name)) is not None), None)
    return module


@contextmanager
def checkpoint_blocks(model: nn.Module) -> Iterator[None]:
    """Within the block, the model's repeated blocks keep no activations and compute them again in the backward pass.

    Outputs and gradients stay the same; raises ConfigError for a model that has none.
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
