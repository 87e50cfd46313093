"""Sampling inside a training run without a trace: `undisturbed` restores everything that sampling may touch.

Each of the context managers below keeps one kind of state. What they keep are references and small values: only the weights
of a schedule-free optimizer, which averages them in place, are copied for the time of an image.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eridiff.blocks import evaluation, members, unwrapped
from eridiff.errors import ConfigError
from eridiff.precision import (
    check_autocast,
    cudnn_precision,
    matmul_precision,
    set_cudnn_precision,
    set_matmul_precision,
)
from eridiff.weights.keymap import without_wrappers

CHECKPOINTING = ("forward", "gradient_checkpointing", "_gradient_checkpointing_func")  # set on a module from outside


@contextmanager
def undisturbed(
    modules: Mapping[str, nn.Module], optimizer: Any = None, *, autocast: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[None]:  # fmt: skip
    """Within the block the modules are ready to sample; after it all is as before it, whatever happened inside.

    Ready to sample: evaluation mode, nothing requires gradients, the optimizer's averaged weights if it keeps them (schedule-free), and
    the precision of inference: float32 as the default dtype, no autocast unless a dtype for it is given. Restored are: random
    states of Python, NumPy, torch's CPU and every CUDA device; the mode of every module; which tensors are its parameters
    and buffers, where they lie, `requires_grad` and `.grad`; gradient checkpointing; grad mode, autocast, default dtype
    and device, and the flags of torch's backends. A graph of autograd that is under construction stays valid.
    """
    check_autocast(autocast)
    with ExitStack() as stack:
        stack.enter_context(random_states(device))
        stack.enter_context(flags())
        stack.enter_context(precision(device, autocast))
        stack.enter_context(tensors(modules))
        stack.enter_context(evaluation(modules))
        stack.enter_context(checkpointing(modules))
        stack.enter_context(grad_mode())
        stack.enter_context(schedule_free(optimizer))
        yield


@contextmanager
def random_states(device: torch.device | str = "cpu") -> Iterator[None]:
    """The global generators of Python, NumPy, torch on the CPU and on every CUDA device."""
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # asking for CUDA's states would start CUDA
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() or "cuda" in str(device) else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


_cuda = torch.backends.cuda
FLAGS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {  # name -> how it is read and set
    **{f"cudnn.{n}": _attribute(torch.backends.cudnn, n) for n in ("enabled", "benchmark", "deterministic")},
    "float32 precision of cudnn": (cudnn_precision, set_cudnn_precision),
    "float32 matmul precision": (matmul_precision, set_matmul_precision),
    **{
        f"cuda.matmul.{n}": _attribute(_cuda.matmul, n)
        for n in ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    },
    "attention by flash": (_cuda.flash_sdp_enabled, _cuda.enable_flash_sdp),
    "attention by mem_efficient": (_cuda.mem_efficient_sdp_enabled, _cuda.enable_mem_efficient_sdp),
    "attention by math": (_cuda.math_sdp_enabled, _cuda.enable_math_sdp),
    "attention by cudnn": (_cuda.cudnn_sdp_enabled, _cuda.enable_cudnn_sdp),
    "deterministic algorithms": (_deterministic, lambda v: torch.use_deterministic_algorithms(v[0], warn_only=v[1])),
    "threads": (torch.get_num_threads, torch.set_num_threads),
}


@contextmanager
def flags() -> Iterator[None]:
    """The flags of torch's backends."""
    before = {name: read() for name, (read, _) in FLAGS.items()}
    try:
        yield
    finally:
        for name, (read, put) in FLAGS.items():
            if read() != before[name]:
                put(before[name])


def autocast_types(device: torch.device | str) -> list[str]:
    return sorted({"cpu", "cuda", torch.device(device).type})


@contextmanager
def precision(device: torch.device | str = "cpu", autocast: torch.dtype | None = None) -> Iterator[None]:
    """Default dtype float32 and device CPU; autocast off, or to a dtype on the device alone.

    Autocast keeps the weights that it casts until its outermost region ends, which may be the trainer's: a second copy of
    the network, stale after the next step. So it keeps none here.
    """
    types = autocast_types(device)
    before = [(t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in types]
    cached, default = torch.is_autocast_cache_enabled(), torch.get_default_dtype()
    try:
        torch.set_autocast_cache_enabled(False)
        torch.set_default_dtype(torch.float32)
        for kind in types:
            torch.set_autocast_enabled(kind, False)
        if autocast is not None:
            kind = torch.device(device).type
            torch.set_autocast_dtype(kind, autocast)
            torch.set_autocast_enabled(kind, True)
        with ExitStack() as stack:
            if torch.get_default_device().type != "cpu":
                stack.enter_context(torch.device("cpu"))
            yield
    finally:
        for kind, enabled, dtype in before:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(cached)
        torch.set_default_dtype(default)


@contextmanager
def grad_mode() -> Iterator[None]:
    """No gradients; the mode that was there afterwards, whoever set another."""
    before = torch.is_grad_enabled()
    try:
        torch.set_grad_enabled(False)
        yield
    finally:
        torch.set_grad_enabled(before)


@contextmanager
def tensors(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Which tensors are parameters and buffers, the memory that they lie in, `requires_grad` and `.grad`.

    Within the block no parameter requires gradients: even without grad mode `torch.matmul` takes another path for weights
    that do, and the image differs in its last bits from that of the saved checkpoint.
    """
    tables = [table for m in members(modules).values() for table in (m._parameters, m._buffers)]
    entries = [(table, dict(table)) for table in tables]
    unique = {id(t): t for _, entry in entries for t in entry.values() if t is not None}
    states = [(t, t.data, t.requires_grad) for t in unique.values()]
    gradients = [(t, t.grad, None if t.grad is None else t.grad.data) for t in unique.values() if t.is_leaf]
    try:
        for tensor, _, requires_grad in states:
            if requires_grad and tensor.is_leaf:
                tensor.requires_grad_(False)
        yield
    finally:
        for table, entry in entries:
            if [(n, id(t)) for n, t in table.items()] != [(n, id(t)) for n, t in entry.items()]:
                table.clear()
                table.update(entry)  # type: ignore[arg-type]
        for tensor, data, requires_grad in states:
            if place(tensor) != place(data):
                tensor.data = data
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
        for tensor, gradient, values in gradients:
            if gradient is not None and values is not None and place(gradient) != place(values):
                gradient.data = values  # sent away together with its parameter
            if tensor.grad is not gradient:
                tensor.grad = gradient


def place(tensor: Tensor) -> list[tuple[torch.device, int, torch.dtype]]:
    return [(t.device, t.data_ptr(), t.dtype) for t in stored(tensor)]


def stored(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold a tensor's numbers: one of a spread tensor's on this process, several of a quantised one."""
    if hasattr(tensor, "_local_tensor"):
        return [tensor._local_tensor]
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [inner for name in tensor.__tensor_flatten__()[0] for inner in stored(getattr(tensor, name))]


@contextmanager
def checkpointing(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Gradient checkpointing as trainers switch it on: by a flag, or by a forward of the module's own."""
    before = [(vars(m), {n: vars(m)[n] for n in CHECKPOINTING if n in vars(m)}) for m in members(modules).values()]
    try:
        yield
    finally:
        for attributes, kept in before:
            for name in CHECKPOINTING:
                if name in kept:
                    attributes[name] = kept[name]
                else:
                    attributes.pop(name, None)


@contextmanager
def schedule_free(optimizer: Any) -> Iterator[None]:
    """The averaged weights of a schedule-free optimizer (Defazio et al. 2024), and the trained ones back bit for bit.

    Such an optimizer turns one into the other in place, by arithmetic that does not come back exactly. So it works on copies;
    a shard of FSDP2, which is read where it lies, is copied away instead and restored.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    able = callable(getattr(inner, "eval", None)) and callable(getattr(inner, "train", None))
    if not able or not trains(inner):
        yield
        return
    trained = tuple(p for group in inner.param_groups for p in group["params"])
    shards = [p.to_local() if hasattr(p, "to_local") else None for p in trained]
    kept = [p.data if shard is None else shard.clone() for p, shard in zip(trained, shards, strict=True)]
    # the in-place arithmetic must not count as a change for a graph that is under construction
    with torch.autograd._unsafe_preserve_version_counter(trained):  # type: ignore[attr-defined]
        try:
            for p, shard in zip(trained, shards, strict=True):
                if shard is None:
                    p.data = p.data.clone()
            inner.eval()
            yield
        finally:
            inner.train()
            for p, shard, data in zip(trained, shards, kept, strict=True):
                if shard is None:
                    p.data = data
                else:
                    shard.copy_(data)


def trains(optimizer: Any) -> bool:
    """Whether a schedule-free optimizer's weights are the trained ones; a wrapper keeps that in an attribute of its own."""
    return getattr(optimizer, "train_mode", True) and all(g.get("train_mode", True) for g in optimizer.param_groups)


def _plain_name(name: str) -> str:
    """A name without what compiled, distributed and peft's wrappers put before it."""
    return without_wrappers(name).removeprefix("base_model.model.")


def averages_of(module: nn.Module, averages: Any) -> Callable[[], Any]:
    """A function that gives EMA weights as `averaged_weights` takes them, as they are when it is called.

    An object with `shadow_params` (diffusers' EMAModel, torch_ema's and others) has no names: it was made from the
    module's parameters, or from those that are trained, in their order. Raises ConfigError where their number fits neither.
    """
    if not hasattr(averages, "shadow_params"):
        return lambda: averages
    every = dict(module.named_parameters())
    trained = [name for name, p in every.items() if p.requires_grad]
    count = len(averages.shadow_params)
    names = next((names for names in (list(every), trained) if len(names) == count), None)
    if names is None:
        raise ConfigError(
            f"{type(averages).__name__} keeps {count} EMA weights, {type(module).__name__} has {len(every)} parameters, {len(trained)} "
            "of them trained; for those of an adapter beside it use weights= with averaged_weights(adapter, ema)"
        )
    return lambda: dict(zip(names, averages.shadow_params, strict=True))


Places = dict[str, tuple[dict[str, Any], str, Tensor]]  # name -> the module's table, the name in it, the average


def places_of(module: nn.Module, averages: Mapping[str, Tensor] | nn.Module) -> Places:
    """Where EMA weights belong in a module, by name; nothing is moved.

    Raises ConfigError for a name or a shape that the module does not have.
    """
    if isinstance(averages, nn.Module):
        inner = unwrapped(averages)
        averages = dict(inner.named_parameters(remove_duplicate=False)) | dict(
            inner.named_buffers(remove_duplicate=False)
        )
    places = {
        _plain_name(f"{prefix}.{name}".lstrip(".")): (table, name)
        for prefix, m in module.named_modules(remove_duplicate=False)
        for table in (m._parameters, m._buffers, vars(m))  # a table of positions is a plain attribute
        for name, tensor in table.items()
        if isinstance(tensor, Tensor)
    }
    own = {_plain_name(name): tensor for name, tensor in averages.items()}
    wrong = next((n for n, t in own.items() if n not in places or t.shape != places[n][0][places[n][1]].shape), None)
    if wrong is not None or not own:
        what = f"have '{wrong}', which {type(module).__name__} has not in that shape" if wrong else "are empty"
        raise ConfigError(f"the averaged weights {what}; give a mapping from the network's names to tensors")
    return {name: (*places[name], tensor.detach()) for name, tensor in own.items()}


@contextmanager
def averaged_weights(module: nn.Module, averages: Mapping[str, Tensor] | nn.Module) -> Iterator[None]:
    """Within the block the module's parameters and buffers are the EMA weights of the same names; others stay as they are.

    EMA weights of the same dtype on the same device take the parameters' places in the module's tables. Others are copied into
    the parameters' own memory, one tensor at a time, while the trained values wait on the CPU: so EMA weights on the CPU need
    no memory of the GPU. The same goes for parameters that FSDP2 shards, whose shards it gathers from their own memory.
    Raises ConfigError for a name or a shape that the module does not have.
    """
    pointed: list[tuple[dict[str, Any], str, Tensor]] = []
    copied: dict[int, tuple[Tensor, Tensor]] = {}
    try:
        for table, name, average in places_of(module, averages).values():
            own = table[name]
            alike = own.device == average.device and own.dtype == average.dtype and not hasattr(own, "device_mesh")
            if "_parameters" in table:  # a plain attribute, a table of positions: small, and watched by its identity
                alike, average = True, average.to(own.device, own.dtype)
            if alike:
                pointed.append((table, name, own))
                table[name] = nn.Parameter(average, False) if isinstance(own, nn.Parameter) else average
            elif id(own) not in copied:
                local = _local(own.data)  # of `data`, whose changes no graph under construction takes for its own
                copied[id(own)] = local, local.to("cpu", copy=True)
                local.copy_(_local(_spread_as(average, own)))
        yield
    finally:
        for table, name, own in pointed:
            table[name] = own
        for local, trained in copied.values():
            local.copy_(trained)


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is spread over processes; another tensor is its own."""
    return getattr(tensor, "_local_tensor", tensor)


def _spread_as(average: Tensor, own: Any) -> Tensor:
    """The average spread over processes as the parameter is."""
    if not hasattr(own, "device_mesh") or hasattr(average, "device_mesh"):
        return average
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(average.to(own.device), own.device_mesh, own.placements)
