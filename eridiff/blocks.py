"""Networks as trainers treat them, from outside: compiled and checkpointed blocks, wrappers around the whole."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from eridiff.errors import ConfigError
from eridiff.lora.branches import install_slots

GRAPHS = 64  # all kinds of blocks times the LoRAs that come and go; torch's 8 would leave SDXL's later ones uncompiled


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of a model's `nn.ModuleList`s that hold no further list; raises ConfigError for a model that has none."""
    members = [block for child in model.modules() if isinstance(child, nn.ModuleList) for block in child]
    blocks = [block for block in members if not any(isinstance(m, nn.ModuleList) for m in block.modules())]
    if not blocks:
        raise ConfigError(f"{type(model).__name__} has no repeated blocks")
    return blocks


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """`torch.compile` each repeated block, with these options; equal blocks are compiled once.

    LoRAs that are attached, changed or detached afterwards take effect; another number or shape of them is compiled anew,
    other values are not.
    """
    install_slots(model)
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options = {"recompile_limit": GRAPHS} | options
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


def members(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Every module inside, once, by its whole name; LoRAs beside a layer, which are in no module's tree, too."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for top, whole in modules.items():
        for name, module in whole.named_modules():
            own = f"{top}.{name}".rstrip(".")
            found[id(module)] = (own, module)
            for i, branch in enumerate(vars(module).get("lora_branches", ())):
                found[id(branch)] = (f"{own}'s LoRA {i}", branch)
    return dict(found.values())


@contextmanager
def evaluation(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Evaluation mode, set where torch looks for it: a module's own `eval` may do more, merge an adapter for example."""
    before = [(module, module.training) for module in members(modules).values()]
    try:
        for module, _ in before:
            module.training = False
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def checkpoint_blocks(model: nn.Module) -> Iterator[None]:
    """Within the block, the model's repeated blocks keep no activations and compute them again in the backward pass.

    Outputs and gradients stay the same; raises ConfigError for a model that has none.
    """
    blocks = repeated_blocks(model)
    own = [vars(block).get("forward") for block in blocks]  # of an outer checkpoint_blocks; else the class has it
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
