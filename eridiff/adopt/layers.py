"""The layers of a trainer's module as they act now: which tensors say all, which layers must be called, what cannot be followed.

Adapters act on a layer from outside: by another class (peft, quantised layers), a `forward` of the layer's own (kohya's
scripts, ai-toolkit, LyCORIS), a hook, a parametrization, or a weight that is not an ordinary tensor (torchao). The layer itself
knows the sum of it all, so it is asked, and nothing of these packages is imported.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eridiff.errors import ConfigError
from eridiff.weights.keymap import WRAPPERS, Entry

PLAIN = ("torch.nn.modules.", "diffusers.models.normalization")  # classes that do what their tensors say
# packages whose wrappers and hooks around a module change the device, the dtype or what is kept for the backward pass alone
HARMLESS = ("accelerate.", "torch.", "eridiff.", "wandb.")
INNER = ("base_layer", "original_module")  # of peft: the layer that an adapter was put around
CALLABLE = ("same", "rows", "swap_halves", "squeeze")  # the operations of a key map that a layer's output can follow


class Elsewhere(Tensor):
    """In place of the weight of an eridiff layer that calls the trainer's: it has a shape, dtype and device, and no values."""

    who: str

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, who: str) -> "Elsewhere":
        found: Elsewhere = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        found.who = who
        return found

    def __init__(self, *_: Any) -> None:
        pass

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({list(self.shape)}, {self.dtype}, {self.who})"

    def __tensor_flatten__(self) -> tuple[list[str], str]:
        return [], self.who

    @classmethod
    def __torch_dispatch__(cls, call: Any, types: Any, args: Any = (), options: Any = None) -> Any:  # type: ignore[override]
        own = next(a for a in torch.utils._pytree.tree_leaves((args, options)) if isinstance(a, Elsewhere))
        if call is torch.ops.aten.detach.default:
            return Elsewhere(own.shape, own.dtype, own.device, own.who)
        raise ConfigError(
            f"{own.who} is called in the trainer's own module, so its weight can be neither read nor moved here"
        )


# layers ---------------------------------------------------------------------------------------------------------------


def wrapped(module: nn.Module) -> nn.Module | None:
    """The module inside one of torch's own wrappers, which compile, checkpoint or shard it; others may do more than that."""
    if not type(module).__module__.startswith("torch."):
        return None
    return next((inner for name in WRAPPERS if (inner := module._modules.get(name)) is not None), None)


def modules_of(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module by its name in the trainer's tree; a wrapper of torch's has that of what it wraps."""
    yield path, module
    inner = wrapped(module)
    for name, child in {"": inner}.items() if inner is not None else module._modules.items():
        if child is not None:
            yield from modules_of(child, f"{path}.{name}".strip("."))


def layers(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules that compute by themselves, adapters and parametrizations included, by their names in the trainer's tree."""
    while (whole := wrapped(module)) is not None:
        module = whole
    inner = module._modules
    if not inner or isinstance(module, nn.Linear | nn.Conv2d) or {*INNER, "parametrizations"} & inner.keys():
        yield path, module
        return
    for name, child in inner.items():
        if child is not None:
            yield from layers(child, f"{path}.{name}".lstrip("."))


def reads(module: nn.Module) -> bool:
    """Whether a layer's tensors say all that it does, so that an eridiff layer may share them; else it must be called."""
    if not _has_forward(module):
        return True  # a mere place for tensors
    published = type(module).__module__.startswith(PLAIN) and not module._modules
    acted_on = module._forward_hooks or module._forward_pre_hooks or _replaced(module)
    return published and not acted_on and all(_ordinary(tensor) for tensor in own_tensors(module).values())


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and stored buffers of a module without its children."""
    stored = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
    return {name: tensor for name, tensor in {**module._parameters, **stored}.items() if tensor is not None}


def declared(layer: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a layer stands for, whatever keeps them: quantised weights have other shapes."""
    while (inner := next((layer._modules[name] for name in INNER if name in layer._modules), None)) is not None:
        layer = inner
    if hasattr(layer, "in_features"):
        weight = (layer.out_features, layer.in_features)
    elif hasattr(layer, "in_channels") and hasattr(layer, "kernel_size"):
        weight = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    else:
        names = [*own_tensors(layer), *layer._modules.get("parametrizations", ())]
        return {name: tuple(getattr(layer, name).shape) for name in names}
    deleted = isinstance(
        layer, nn.Linear | nn.Conv2d
    )  # no such attribute: LyCORIS' full matrices take weight and bias away
    bias = getattr(layer, "bias", deleted or None) is not None
    return {"weight": weight, **({"bias": weight[:1]} if bias else {})}


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor under the name that it has without adapters; of layers that must be called those that they stand for."""
    whole = dict(layers(module))
    found: dict[str, Tensor] = {}
    for path, child in modules_of(module):
        if path not in whole and not _inside(path, whole):
            found |= {f"{path}.{name}".lstrip("."): tensor for name, tensor in own_tensors(child).items()}
    called = {}
    for path, layer in whole.items():
        if reads(layer):
            found |= {f"{path}.{name}".lstrip("."): tensor for name, tensor in own_tensors(layer).items()}
        else:
            called[path] = layer
    usual, place = usual_dtype(found.values()), next((t.device for t in found.values()), torch.device("cpu"))
    for path, layer in called.items():
        who = f"'{path}' ({type(layer).__name__})"
        held = [
            t for t in (getattr(layer, "weight", None), *layer.parameters(), *layer.buffers()) if isinstance(t, Tensor)
        ]
        dtype = held[0].dtype if held and _computes(held[0].dtype) else usual
        device = held[0].device if held else place
        for name, shape in declared(layer).items():
            found[f"{path}.{name}"] = Elsewhere(shape, dtype, device, who)
    return found


def usual_dtype(tensors: Any) -> torch.dtype:
    """The dtype of most numbers that can be computed with; bfloat16 where there are none."""
    held: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        if _computes(tensor.dtype):
            held[tensor.dtype] += tensor.numel()
    return held.most_common(1)[0][0] if held else torch.bfloat16


def check_ordinary(name: str, tensor: Tensor) -> None:
    """ConfigError for a tensor that would have to be shared, and that no layer can be called for."""
    if not _ordinary(tensor):
        kind = type(tensor)
        by = (
            f"{kind.__module__.partition('.')[0]} ({kind.__name__})"
            if kind not in (Tensor, nn.Parameter)
            else str(tensor.dtype)
        )
        raise ConfigError(
            f"'{name}' is quantised by {by} and belongs to no layer that could be called; leave it unquantised"
        )


def _ordinary(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and _computes(tensor.dtype)


def _computes(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1


def _inside(path: str, whole: Mapping[str, Any]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[:i]) in whole for i in range(len(parts)))


# calling --------------------------------------------------------------------------------------------------------------


def calling(entry: Entry, theirs: Sequence[tuple[str, nn.Module]], copies: bool) -> Callable[[Tensor], Tensor]:
    """A forward for an eridiff layer that calls the trainer's layers, with the outputs in eridiff's order; `entry` is its weight's.

    With `copies` it may stand in for a copy, which is made when images are generated.
    """
    if entry.operation not in CALLABLE:
        path, layer = theirs[0]
        raise ConfigError(
            f"'{path}' ({type(layer).__name__}) cannot be followed: its weight is stored by '{entry.operation}'"
        )
    bare = next((path for path, layer in theirs if not _has_forward(layer)), None)
    if bare is not None and not copies:
        raise ConfigError(
            f"'{bare}' has weights but no forward to call; say allow_copies=True, so that they are copied"
        )
    # the trainer's is linear, eridiff's a 1x1 convolution
    turned = entry.operation == "squeeze" and len(declared(theirs[0][1])["weight"]) == 2

    def forward(x: Tensor) -> Tensor:
        x = x.movedim(1, -1) if turned else x
        outputs = [_ask(path, layer, x) for path, layer in theirs]
        if entry.operation == "swap_halves":
            outputs = [*outputs[0].chunk(2, dim=-1)[::-1]]
        found = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return found.movedim(-1, 1) if turned else found

    return forward


def _ask(path: str, layer: nn.Module, x: Tensor) -> Tensor:
    if not _has_forward(layer):
        raise ConfigError(
            f"'{path}' has weights but no forward to call, and their copy was released: call refresh() of what adopt returned"
        )
    try:
        found = layer(x)
    except RuntimeError as error:
        if "type" not in str(error):
            raise
        raise ConfigError(
            f"'{path}' ({type(layer).__name__}) does not take {x.dtype}: {error}; generate as it is trained, under "
            "Sampler(..., autocast=torch.bfloat16)"
        ) from error
    if not isinstance(found, Tensor) or found.ndim != x.ndim or found.shape[0] != x.shape[0]:
        what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(
            f"'{path}' ({type(layer).__name__}) gave {what} for {list(x.shape)}: what acts on it is set for another batch"
        )
    return found


# what acts from outside -----------------------------------------------------------------------------------------------


def check_followed(module: nn.Module, called: Mapping[str, Any]) -> None:
    """ConfigError for what acts on a module that is not an eridiff layer, so that it would be lost: hooks, another forward,
    an attention processor that is not diffusers'.

    `called` has the layers that eridiff's share or call, by name.
    """
    for path, child in modules_of(module):
        wraps = wrapped(child) is not None
        if not wraps and (path in called or _inside(path, called)):
            continue
        forward = _replaced(child)
        if forward is not None and not wraps and not _comes_down_to(forward, type(child).forward):
            _refuse(path, child, "a forward of its own", forward)
        processor = getattr(child, "processor", None)
        if processor is not None and not type(processor).__module__.startswith("diffusers."):
            _refuse(path, child, "an attention processor", processor)
        for hook in (*child._forward_hooks.values(), *child._forward_pre_hooks.values()):
            if not _definer(hook).startswith(HARMLESS):
                _refuse(path, child, "a forward hook", hook)


def _refuse(path: str, module: nn.Module, what: str, call: Any) -> None:
    name = f"'{path}'" if path else "the whole network"
    raise ConfigError(
        f"{name} ({type(module).__name__}) has {what}, from {_definer(call)}, which cannot be followed: only layers with "
        "weights are called; take it off while images are generated"
    )


def _replaced(module: nn.Module) -> Any:
    """The forward that was put on this very module, None where it is the class's own."""
    forward = vars(module).get("forward")
    own = getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is type(module).forward
    return None if own else forward


def _comes_down_to(forward: Any, own: Any) -> bool:
    """Whether a replaced forward is the class's own within wrappers that are harmless."""
    while forward is not None:
        if getattr(forward, "__func__", forward) is own:
            return True
        if not _definer(forward).startswith(HARMLESS):
            return False
        inner = getattr(forward, "__func__", forward)
        checkpointed = inner.args[0] if isinstance(inner, partial) and inner.args and callable(inner.args[0]) else None
        forward = getattr(inner, "__wrapped__", None) or checkpointed
    return False


def _definer(call: Any) -> str:
    """The module in which a function was written; `__module__` may be copied from what it wraps."""
    call = getattr(call, "__func__", call)
    call = call.func if isinstance(call, partial) else call
    return getattr(call, "__globals__", {}).get("__name__") or type(call).__module__
