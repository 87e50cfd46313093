"""Recording by hooks: the networks know nothing of it, and no bit of what they compute changes."""

import inspect
import os
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eridiff.blocks import unwrapped
from eridiff.errors import TraceError, quoted
from eridiff.files import replacing
from eridiff.inference.base import DiffusionInference
from eridiff.trace.format import TraceFile, probe
from eridiff.weights.keymap import without_wrappers
from eridiff.weights.load import NETWORKS
from eridiff.weights.locate import TEXT_ENCODERS

METHODS = ("encode", "decode", "conditioning_vector", "prepare", "step")  # of a network, beside its modules
Calls = Literal["last", "all"] | int | Collection[int]


class Recording(dict[str, Tensor]):
    """Tensors in the order of their computation, by the names that docs/traces.md explains.

    `unrecorded` says of each module that gave no tensor why; `probes` gives the shapes of what was recorded as probes.
    """

    def __init__(self, device: torch.device | str | None) -> None:
        super().__init__()
        self.unrecorded: dict[str, str] = {}
        self.probes: dict[str, list[int]] = {}
        self.device = device

    def store(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device or tensor.device, copy=True)

    def put(self, name: str, stored: Tensor) -> None:
        self.pop(name, None)
        self[name] = stored


@contextmanager
def record(
    module: nn.Module | DiffusionInference | Mapping[str, nn.Module],
    patterns: str | Sequence[str] = "*",
    *,
    calls: Calls = "last",
    to: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = "cpu",
    probes: bool = False,
) -> Iterator[Recording | TraceFile]:
    """Record every sub-module's inputs and outputs while the block runs; hooks are gone afterwards, errors or not.

    - module: a network, several with prefixes for their names, or a whole `eridiff.load(...)`: its network without a prefix,
      the others behind `autoencoder.`, `clip.`, `clip_g.` and `t5.`.
    - patterns: which tensors, `"double_blocks.0.*"`; `*` stands for anything, dots too.
    - calls: of a module that runs several times the last call, all, or those with these numbers, from 0.
    - to: a safetensors file, written tensor by tensor, so that memory for the whole is never needed; None keeps all in memory.
    - device: where copies in memory lie; None is where each was computed, which is faster and takes that device's memory.
    - probes: keep statistics and 64 values of each tensor (`eridiff.trace.probe`) in place of all its values.

    Yields the tensors by name, to which others may be added. Raises TraceError for a compiled module, whose inside cannot be
    seen, and for a pattern that no tensor has.
    """
    roots = _roots(module)
    for prefix, root in roots.items():
        _refuse_compiled(prefix, root)
    with ExitStack() as stack:
        if to is None:
            recording: Recording | TraceFile = Recording(device)
        else:
            target = Path(to).expanduser()
            temporary = stack.enter_context(replacing(target))
            recording = TraceFile(stack.enter_context(tempfile.TemporaryFile(dir=target.parent)))
        recorder = _Recorder(recording, [patterns] if isinstance(patterns, str) else list(patterns), calls, probes)
        with ExitStack() as hooks:
            for prefix, root in roots.items():
                recorder.watch(prefix, root, hooks)
            yield recording
        recorder.finish()
        if isinstance(recording, TraceFile):
            recording.write(temporary, {"eridiff.config": _configs(roots)})


class _Recorder:
    """What the hooks do."""

    def __init__(self, recording: Recording | TraceFile, patterns: Sequence[str], calls: Calls, probes: bool) -> None:
        self.recording, self.patterns, self.calls, self.probes = recording, patterns, calls, probes
        self.matched: dict[str, bool] = {}  # by name: whether a pattern selects it
        self.counts: Counter[str] = Counter()  # calls of each module
        self.kept: dict[int, tuple[weakref.ref[Tensor], int, Any]] = {}  # of living tensors: version, what was stored

    def watch(self, prefix: str, root: nn.Module, hooks: ExitStack) -> None:
        for path, child in root.named_modules():
            if type(child).forward is nn.Module.forward:
                continue  # a list, or a part that its owner calls by other names: it never runs itself
            name = prefix + (without_wrappers(path) or "forward")
            before, after = self._hooks(name, inspect.signature(child.forward) if child is root else None)
            for handle in (
                child.register_forward_pre_hook(before, with_kwargs=True),
                child.register_forward_hook(after, with_kwargs=True),
            ):
                hooks.callback(handle.remove)
            self.recording.unrecorded[name] = "never ran"
        for method in METHODS:
            if callable(getattr(type(root), method, None)):
                self._wrap(root, method, prefix + method, hooks)

    def _hooks(self, name: str, signature: inspect.Signature | None) -> tuple[Callable[..., None], Callable[..., None]]:
        running: list[int] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            running.append(self._count(name))
            named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
            given = named if signature is None else signature.bind(*args, **kwargs).arguments
            for key, value in given.items():
                self._keep_tree(f"{name}:{key}", value, running[-1])

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not self._keep_tree(name, output, running.pop()):
                self.recording.unrecorded[name] = f"its output, a {type(output).__name__}, holds no tensor"
            else:
                self.recording.unrecorded.pop(name, None)

        return before, after

    def _wrap(self, root: nn.Module, method: str, name: str, hooks: ExitStack) -> None:
        """Functions of a network that are no modules: their tensors, where no module has had the same before."""
        inner, own = getattr(root, method), vars(root).get(method)
        signature = inspect.signature(inner)

        @wraps(inner)  # which keeps the signature for a recording inside this one
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            call = self._count(name)
            for key, value in signature.bind(*args, **kwargs).arguments.items():
                if isinstance(value, Tensor):
                    self._keep(f"{name}:{key}", value, call)
            output = inner(*args, **kwargs)
            for leaf, tensor in leaves(name, output):
                if leaf == name or self._known(tensor) is None:
                    self._keep(leaf, tensor, call)
            return output

        def restore() -> None:
            delattr(root, method)
            if own is not None:
                setattr(root, method, own)

        setattr(root, method, wrapped)
        hooks.callback(restore)

    def _count(self, name: str) -> int:
        self.counts[name] += 1
        return self.counts[name] - 1

    def _keep_tree(self, name: str, value: Any, call: int) -> bool:
        """Whether there is a tensor in `value`."""
        found = list(leaves(name, value))
        for leaf, tensor in found:
            self._keep(leaf, tensor, call)
        return bool(found)

    def _keep(self, name: str, tensor: Tensor, call: int) -> None:
        if name not in self.matched:
            self.matched[name] = any(fnmatchcase(name, pattern) for pattern in self.patterns)
        if not self.matched[name]:
            return
        if self.calls == "last":
            call = 0
        elif self.calls != "all" and call not in ([self.calls] if isinstance(self.calls, int) else self.calls):
            return
        whole = f"{name}@{call}" if call else name
        with torch.no_grad():
            stored = self._known(tensor)
            if stored is None:
                stored = self.recording.store(probe(tensor) if self.probes else tensor.detach())
                if not tensor.is_inference():  # those have no version
                    forget = partial(self._forget, id(tensor))
                    self.kept[id(tensor)] = (weakref.ref(tensor, forget), tensor._version, stored)
            self.recording.put(whole, stored)
            if self.probes:
                self.recording.probes[whole] = list(tensor.shape)

    def _known(self, tensor: Tensor) -> Any:
        """What was stored of this very tensor, if it was not changed since: outputs are inputs of what comes next."""
        held, version, stored = self.kept.get(id(tensor), (None, 0, None))
        return stored if held is not None and held() is tensor and version == tensor._version else None

    def _forget(self, key: int, reference: weakref.ref[Tensor]) -> None:
        if self.kept.get(key, (None,))[0] is reference:
            del self.kept[key]

    def finish(self) -> None:
        """Raises TraceError for a pattern without a tensor."""
        for pattern in self.patterns:
            if pattern != "*" and not any(fnmatchcase(name, pattern) for name in self.matched):
                near = get_close_matches(pattern, self.matched, 3, 0.3)
                raise TraceError(
                    f"no tensor is called {quoted(pattern)}, of {len(self.matched)}; "
                    + (f"the nearest are {', '.join(near)}" if near else "did the recorded module run?")
                )


def leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a value by name; lists, tuples, mappings and dataclasses are trees, a single element has no number."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(f"{name}.{key}", item)
    elif is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            yield from leaves(f"{name}.{part.name}", getattr(value, part.name))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from leaves(name if len(value) == 1 else f"{name}.{i}", item)


def _roots(module: nn.Module | DiffusionInference | Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Prefix of names -> module."""
    if isinstance(module, nn.Module):
        return {"": module}
    if isinstance(module, Mapping):
        return {f"{name}." if name else "": root for name, root in module.items()}
    encoders = {f"{name}.": encoder.module for name in TEXT_ENCODERS if (encoder := getattr(module, name, None))}
    return {"": module.network, "autoencoder.": module.autoencoder, **encoders}


def _configs(roots: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The configurations of our networks, as `save_network` writes them."""
    kinds = {kind: name for name, kind in NETWORKS.items()}
    inner = (unwrapped(root) for root in roots.values())
    return {kinds[type(root)]: asdict(root.config) for root in inner if type(root) in kinds}


def _refuse_compiled(prefix: str, root: nn.Module) -> None:
    for path, child in root.named_modules():
        compiled = child._compiled_call_impl is not None or "_orig_mod" in child._modules
        forward = vars(child).get("forward")
        if compiled or isinstance(child, torch.jit.ScriptModule) or hasattr(forward, "_torchdynamo_orig_callable"):
            raise TraceError(
                f"{quoted(prefix + path) if prefix + path else 'the network'} is compiled, and what runs inside cannot be seen; "
                "record before it is compiled"
            )


@dataclass(frozen=True)
class Difference:
    """Where two recordings part: the tensor's name and the relative L2 distance there (infinite for other shapes)."""

    name: str
    relative: float


def relative_l2(found: Tensor, expected: Tensor) -> float:
    """`|found - expected| / |expected|` in float64, on the CPU; infinite when shapes differ or a value is not finite."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = (t.detach().to("cpu", torch.float64) for t in (found, expected))
    distance = float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float64).tiny))
    return distance if distance == distance else float("inf")


def first_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float) -> Difference | None:
    """The first tensor of `expected`, in its order, whose relative L2 distance exceeds `bound`; None if none does.

    Raises TraceError when a name of `expected` was not recorded.
    """
    for name, value in expected.items():
        if name not in found:
            raise TraceError(
                f"'{name}' was not recorded; there are {len(found)} tensors, the first is '{next(iter(found), '')}'"
            )
        distance = relative_l2(found[name], value)
        if distance > bound:
            return Difference(name, distance)
    return None
