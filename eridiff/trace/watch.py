"""See, and perhaps exchange, every value that goes into and out of a network's modules, from outside."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from eridiff.errors import TraceError, quoted
from eridiff.graphs import Steps
from eridiff.weights.keymap import without_wrappers

METHODS = ("encode", "decode", "conditioning_vector", "prepare", "step")  # of a network, beside its modules
# what is called with a value's name, the value and the number of the call; gives the value back, or another one
Visit = Callable[[str, Any, int], Any]


@contextmanager
def watched(root: nn.Module, visit: Visit, prefix: str = "") -> Iterator[list[str]]:
    """Within the block `visit` sees each input before and each output after a module or a method of `METHODS` runs.

    Names are those of docs/traces.md without `@`. Yields the names of the modules that can run. Raises TraceError for a
    compiled module, whose inside cannot be seen.
    """
    refuse_compiled(prefix, root)
    undo: list[Callable[[], None]] = []
    counts: Counter[str] = Counter()
    names = []
    try:
        for path, child in root.named_modules():
            if type(child).forward is nn.Module.forward:
                continue  # a list, or a part that its owner calls by other names: it never runs itself
            names.append(prefix + (without_wrappers(path) or "forward"))
            signature = inspect.signature(child.forward) if child is root else None
            before, after = _hooks(names[-1], signature, visit, counts)
            undo.append(child.register_forward_pre_hook(before, with_kwargs=True).remove)
            undo.append(child.register_forward_hook(after).remove)
        for method in METHODS:
            if callable(getattr(type(root), method, None)):
                undo.append(_wrap(root, method, prefix + method, visit, counts))
        yield names
    finally:
        for restore in reversed(undo):
            restore()


def _hooks(
    name: str, signature: inspect.Signature | None, visit: Visit, counts: Counter[str]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    running: list[int] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        running.append(_count(counts, name))
        if signature is None:
            seen = tuple(visit(f"{name}:{i}", value, running[-1]) for i, value in enumerate(args))
            named = {key: visit(f"{name}:{key}", value, running[-1]) for key, value in kwargs.items()}
        else:
            bound = signature.bind(*args, **kwargs)
            for key, value in bound.arguments.items():
                bound.arguments[key] = visit(f"{name}:{key}", value, running[-1])
            seen, named = bound.args, bound.kwargs
        same = all(a is b for a, b in zip([*seen, *named.values()], [*args, *kwargs.values()], strict=False))
        return None if same else (seen, named)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        changed = visit(name, output, running.pop())
        return None if changed is output else changed

    return before, after


def _wrap(root: nn.Module, method: str, name: str, visit: Visit, counts: Counter[str]) -> Callable[[], None]:
    """Functions of a network that are not modules."""
    inner, own = getattr(root, method), vars(root).get(method)
    signature = inspect.signature(inner)

    @wraps(inner)  # which keeps the signature for a recording inside this one
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        call, bound = _count(counts, name), signature.bind(*args, **kwargs)
        for key, value in bound.arguments.items():
            if not is_dataclass(value):  # what `prepare` gave and was seen there
                bound.arguments[key] = visit(f"{name}:{key}", value, call)
        return visit(name, inner(*bound.args, **bound.kwargs), call)

    def restore() -> None:
        delattr(root, method)
        if own is not None:
            setattr(root, method, own)

    setattr(root, method, wrapped)
    return restore


def _count(counts: Counter[str], name: str) -> int:
    counts[name] += 1
    return counts[name] - 1


def leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a value by name: lists, tuples, mappings and dataclasses are trees, a single element has no number."""
    if isinstance(value, Tensor):
        yield name, value
    else:
        for key, item in _parts(value).items():
            yield from leaves(f"{name}.{key}" if key != "" else name, item)


def exchanged(name: str, value: Any, change: Callable[[str, Tensor], Tensor]) -> Any:
    """The tree with every tensor exchanged; the value itself where none is another."""
    if isinstance(value, Tensor):
        return change(name, value)
    parts = _parts(value)
    new = {key: exchanged(f"{name}.{key}" if key != "" else name, item, change) for key, item in parts.items()}
    if all(new[key] is item for key, item in parts.items()):
        return value
    if isinstance(value, Mapping):
        kind: Any = type(value)
        copy = kind(value)
        for key, item in new.items():
            copy[key] = item
        return copy
    if is_dataclass(value):
        return replace(value, **new)  # type: ignore[type-var]
    return value._make(new.values()) if hasattr(value, "_make") else type(value)(new.values())


def _parts(value: Any) -> Mapping[Any, Any]:
    if isinstance(value, Mapping):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {part.name: getattr(value, part.name) for part in fields(value)}
    if isinstance(value, list | tuple):
        return dict(enumerate(value)) if len(value) != 1 else {"": value[0]}
    return {}


def refuse_compiled(prefix: str, root: nn.Module) -> None:
    for path, child in root.named_modules():
        compiled = child._compiled_call_impl is not None or "_orig_mod" in child._modules
        forward = vars(child).get("forward")
        compiled = compiled or isinstance(vars(child).get("step"), Steps)
        if compiled or isinstance(child, torch.jit.ScriptModule) or hasattr(forward, "_torchdynamo_orig_callable"):
            raise TraceError(
                f"{quoted(prefix + path) if prefix + path else 'the network'} is compiled or a graph, and what runs inside cannot be seen; "
                "record before it is compiled"
            )
