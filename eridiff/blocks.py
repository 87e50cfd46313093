"""Networks as trainers treat them, from outside: compiled and checkpointed blocks, wrappers around the whole."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eridiff.errors import ConfigError
from eridiff.lora.branches import install_slots
from eridiff.models.layers import Attention
from eridiff.weights.keymap import unwrapped as unwrapped

GRAPHS = 64  # all kinds of blocks times the LoRAs that come and go; torch's 8 would leave SDXL's later ones uncompiled


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of a model's `nn.ModuleList`s that hold no further list; raises ConfigError for a model that has none."""
    members = [block for child in unwrapped(model).modules() if isinstance(child, nn.ModuleList) for block in child]
    blocks = [block for block in members if not any(isinstance(m, nn.ModuleList) for m in block.modules())]
    if not blocks:
        raise ConfigError(f"{type(model).__name__} has no repeated blocks")
    return blocks


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """`torch.compile` each repeated block, with these options; equal blocks are compiled once. Works with `fullgraph=True`.

    LoRAs that are attached, changed or detached afterwards take effect; another number or shape of them is compiled anew,
    other values are not. A second image size compiles each kind of block once more, and further sizes none. Raises
    ConfigError for a model that has no repeated blocks.
    """
    blocks = compiled_parts(model)
    install_slots(model)
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options = {"recompile_limit": GRAPHS} | options
    for block in blocks:
        for attention in (m for m in block.modules() if isinstance(m, Attention)):
            if _read_kernels not in attention._forward_pre_hooks.values():
                attention.register_forward_pre_hook(_read_kernels)
        block._compiled_call_impl = partial(_call, torch.compile(block._call_impl, **options))  # as nn.Module.compile


def compiled_parts(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks that have a `forward` of their own, of `nn.Sequential` its parts, and what is made of the same.

    The last is the middle of an autoencoder, which is in no list.
    """
    parts = [part for block in repeated_blocks(model) for part in _parts(block)]
    kinds = {type(part) for part in parts}

    def made_of_these(module: nn.Module) -> bool:
        lists = any(isinstance(m, nn.ModuleList) for m in module.modules())
        return not lists and any(type(child) in kinds for child in module.children())

    return parts + [m for m in model.modules() if type(m) not in {nn.Sequential, *kinds} and made_of_these(m)]


def _parts(block: nn.Module) -> list[nn.Module]:
    if type(block) is nn.Sequential:
        return [part for child in block for part in _parts(child)]
    return [] if type(block).__module__.startswith("torch.nn.") else [block]  # of which the compiler sees nothing


KERNELS = [""]  # of attention, as chosen when a compiled block was called last
NAMES: dict[tuple[Any, ...], str] = {}  # of each choice a text, which is what the compiler guards


def _read_kernels(*_: Any) -> None:
    """Within compiled code: it is for this choice alone, of which the compiler does not know by itself."""
    assert KERNELS[0]


def _call(compiled: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """Call a compiled block; `sdpa_kernel` around it takes effect."""
    if torch.compiler.is_compiling():  # a whole network around its blocks
        return compiled(*args, **named)
    KERNELS[0] = chosen_kernels()
    if not torch.is_grad_enabled():
        # a linear layer's output is a view, and a block's is not, for which the compiler would make two graphs
        args = tuple(a.data if isinstance(a, Tensor) and a._is_view() else a for a in args)
    return compiled(*args, **named)


def chosen_kernels() -> str:
    """Which kernels `scaled_dot_product_attention` may take, as `torch.nn.attention.sdpa_kernel` sets them."""
    cuda = torch.backends.cuda
    order: list[int] = getattr(torch._C, "_get_sdp_priority_order", list)()
    allowed = (cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled, cuda.cudnn_sdp_enabled)
    chosen = (*(enabled() for enabled in allowed), *order)
    if chosen not in NAMES:
        NAMES[chosen] = str(chosen)
    return NAMES[chosen]


def without_peft(module: nn.Module) -> Any:
    """The network inside wrappers and a peft model; its adapters stay on its layers."""
    inner = unwrapped(module)
    return unwrapped(inner.get_base_model()) if hasattr(inner, "get_base_model") else inner


def members(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Every module inside, once, by its whole name; what acts on a layer and is in no module's tree too.

    These are eridiff's LoRAs beside a layer, and other libraries' adapters behind a replaced forward or a hook.
    """
    found: dict[int, tuple[str, nn.Module]] = {}
    acting: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()

    def add(top: str, whole: nn.Module) -> None:
        for name, module in whole.named_modules():
            if id(module) not in found:
                own = f"{top}.{name}".rstrip(".")
                found[id(module)] = (own, module)
                for i, branch in enumerate(vars(module).get("lora_branches", ())):
                    add(f"{own}'s LoRA {i}", branch)
                for i, adapter in enumerate(outside(module, seen)):
                    acting.append((f"{own}'s {type(adapter).__name__} {i}", adapter))

    for top, whole in modules.items():
        add(top, whole)
    for name, adapter in acting:  # after the trees, whose modules keep their own names; grows meanwhile
        add(name, adapter)
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


def outside(module: nn.Module, seen: set[int]) -> list[nn.Module]:
    """Modules that act on this one without being in its tree: owners of its forward and hooks, and what those hold.

    What is in `seen`, by id, is passed by, and what is looked at is put there.
    """
    waiting = [vars(module).get("forward"), *module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    found: list[nn.Module] = []
    while waiting:
        thing = waiting.pop()
        if thing is not None and id(thing) not in seen:
            seen.add(id(thing))
            waiting += [held for held in _held(thing) if isinstance(held, HOLDERS) or _is_functor(held)]
            found += [thing] if isinstance(thing, nn.Module) else []
    return found


HOLDERS = (nn.Module, FunctionType, MethodType, partial, list, tuple, dict)


def _held(thing: Any) -> Iterable[Any]:
    """What a function, or what stands for one, may work with."""
    if isinstance(thing, nn.Module):  # its children are found by its tree
        return [held for held in vars(thing).values() if isinstance(held, FunctionType | MethodType | partial)]
    if isinstance(thing, MethodType):
        owner = thing.__self__
        return [
            thing.__func__,
            owner,
            *(() if isinstance(owner, nn.Module) else getattr(owner, "__dict__", {}).values()),
        ]
    if isinstance(thing, partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, FunctionType):
        cells = (_content(cell) for cell in thing.__closure__ or ())
        return [*cells, *(thing.__defaults__ or ()), *vars(thing).values()]
    if isinstance(thing, list | tuple | dict):
        return thing.values() if isinstance(thing, dict) else thing
    return vars(thing).values()


def _is_functor(thing: Any) -> bool:
    return callable(thing) and not isinstance(thing, type) and hasattr(thing, "__dict__")


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


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
