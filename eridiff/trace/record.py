"""Recording by hooks: the networks know nothing of it, and no bit of what they compute changes."""

import os
import tempfile
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eridiff.blocks import unwrapped
from eridiff.errors import TraceError, quoted
from eridiff.files import replacing
from eridiff.inference.base import DiffusionInference
from eridiff.trace.format import TraceFile, probe
from eridiff.trace.watch import METHODS, leaves, refuse_compiled, watched
from eridiff.weights.load import NETWORKS
from eridiff.weights.locate import TEXT_ENCODERS

NUMBERS = ("grid", "i")  # arguments of a network's functions that are not tensors and decide what it computes
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

    def __repr__(self) -> str:
        size = sum(tensor.nbytes for tensor in self.values())
        return f"Recording({len(self)} tensors, {size / 2**20:.1f} MiB)"

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
        refuse_compiled(prefix, root)
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
                names = hooks.enter_context(watched(root, recorder.visit, prefix))
                recording.unrecorded.update(dict.fromkeys(names, "never ran"))
            yield recording
        recorder.finish()
        if isinstance(recording, TraceFile):
            recording.write(temporary, {"eridiff.config": _configs(roots)})


class _Recorder:
    """What the hooks do."""

    def __init__(self, recording: Recording | TraceFile, patterns: Sequence[str], calls: Calls, probes: bool) -> None:
        self.recording, self.patterns, self.calls, self.probes = recording, patterns, calls, probes
        self.matched: dict[str, bool] = {}  # by name: whether a pattern selects it
        self.kept: dict[int, tuple[weakref.ref[Tensor], int, Any]] = {}  # of living tensors: version, what was stored

    def visit(self, name: str, value: Any, call: int) -> Any:
        """Keep what is in `value`, which goes on as it is."""
        found = list(leaves(name, value))
        own, _, argument = name.rpartition(":")
        function = (own or name).rpartition(".")[2]
        if argument in NUMBERS and function in (*METHODS, "forward") and value is not None:
            found = [(name, torch.as_tensor(value))]
        for leaf, tensor in found:
            # of a function's tree only what no module had: the rest would stand there under two names
            if leaf == name or function not in METHODS or self._known(tensor) is None:
                self._keep(leaf, tensor, call)
        if found:
            self.recording.unrecorded.pop(name, None)
        elif name in self.recording.unrecorded:
            self.recording.unrecorded[name] = f"its output, a {type(value).__name__}, holds no tensor"
        return value

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
    size = torch.linalg.vector_norm(expected).clamp_min(torch.finfo(torch.float64).tiny)
    distance = float(torch.linalg.vector_norm(found - expected) / size)
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
