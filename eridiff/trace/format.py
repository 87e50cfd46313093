"""Traces on the disk, as docs/traces.md says: a safetensors file, a folder of .npy or an .npz, with the tensors' names."""

import json
import math
import mmap
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from eridiff.errors import CheckpointError, TraceError, quoted
from eridiff.files import replacing
from eridiff.weights.format import DTYPES, read_header

CODES = {dtype: code for code, dtype in DTYPES.items()}
CHUNK = 1 << 24  # bytes that are copied at a time
PROBES = 64  # values at fixed positions that stand for a tensor
STATISTICS = ("mean", "deviation", "smallest", "largest", "norm", "not finite")


def probe(tensor: Tensor) -> Tensor:
    """A tensor of any shape and dtype -> `[6 + 64]` float64 on the CPU.

    Mean, deviation, smallest, largest, L2 norm and number of values that are not finite; then the values at the flat
    positions `k * numel // 64`. Complex numbers are two values each.
    """
    values = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().reshape(-1)
    places = torch.arange(PROBES, device=values.device) * values.numel() // PROBES
    chosen = values[places].to("cpu", torch.float64) if values.numel() else torch.zeros(PROBES, dtype=torch.float64)
    count, lost, mean, spread, norm = 0, 0, 0.0, 0.0, 0.0  # spread: the norm of what differs from the mean
    low, high = math.inf, -math.inf
    for part in values.split(CHUNK // 8):
        wide = part.to("cpu", torch.float64)
        finite = wide[wide.isfinite()]
        lost += len(wide) - len(finite)
        if not len(finite):
            continue
        low, high = min(low, float(finite.min())), max(high, float(finite.max()))
        size = float(finite.abs().max()) or 1.0
        centre = float((finite / size).mean()) * size
        # Chan, Golub and LeVeque 1979: from the means of both parts, as a difference of squares loses the digits of a large mean
        gap, share = centre - mean, len(finite) / (count + len(finite))
        spread = math.hypot(spread, _norm(finite - centre), gap * math.sqrt(count * share))
        mean, count, norm = mean + gap * share, count + len(finite), math.hypot(norm, _norm(finite))
    deviation = spread / math.sqrt(max(count, 1))
    return torch.cat([torch.tensor([mean, deviation, low, high, norm, lost], dtype=torch.float64), chosen])


def _norm(values: Tensor) -> float:
    """L2, of values whose squares may be more or less than float64 holds."""
    size = float(values.abs().max()) or 1.0
    return size * math.sqrt(float((values / size).square().sum()))


@dataclass(frozen=True)
class Span:
    """Where a tensor's bytes lie in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _as_bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


class TraceFile(MutableMapping[str, Tensor]):
    """A trace that goes to the disk tensor by tensor; what is overwritten before the end takes no room in the file.

    `unrecorded` and `probes` are written beside the tensors, as docs/traces.md says.
    """

    def __init__(self, data: IO[bytes]) -> None:
        self.spans: dict[str, Span] = {}
        self.unrecorded: dict[str, str] = {}
        self.probes: dict[str, list[int]] = {}
        self.data, self.size = data, 0

    def store(self, tensor: Tensor) -> Span:
        """Write the values; `put` gives them a name, or several."""
        if tensor.dtype not in CODES:
            raise TraceError(f"a tensor of {tensor.dtype} cannot be written; record it in memory, without to=")
        self.data.seek(self.size)
        span = Span(tensor.dtype, tuple(tensor.shape), self.size, self.size + self.data.write(_as_bytes(tensor)))
        self.size = span.end
        return span

    def put(self, name: str, span: Span) -> None:
        self.spans.pop(name, None)
        self.spans[name] = span

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self.put(name, self.store(tensor))

    def __getitem__(self, name: str) -> Tensor:
        span = self.spans[name]
        self.data.seek(span.begin)
        raw = bytearray(self.data.read(span.end - span.begin))
        return torch.frombuffer(raw, dtype=span.dtype).reshape(span.shape) if raw else _empty(span)

    def __delitem__(self, name: str) -> None:
        del self.spans[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.spans)

    def __len__(self) -> int:
        return len(self.spans)

    def write(self, target: Path, metadata: Mapping[str, Any]) -> None:
        """The safetensors file: wide dtypes first, so that every tensor is aligned; values under two names stand once."""
        holders = {span: name for name, span in reversed(self.spans.items())}  # the first name of each
        same = {n: holders[span] for n, span in self.spans.items() if holders[span] != n and span.end > span.begin}
        said = {
            "order": list(self.spans),
            "same": same,
            "unrecorded": self.unrecorded,
            "probes": self.probes,
            **metadata,
        }
        header: dict[str, Any] = {"__metadata__": _texts(said)}
        written = [(name, span) for name, span in self.spans.items() if name not in same]  # empty ones under each name
        written.sort(key=lambda item: (-item[1].dtype.itemsize, item[1].begin))
        place = 0
        for name, span in written:
            size = span.end - span.begin
            header[name] = {
                "dtype": CODES[span.dtype], "shape": list(span.shape), "data_offsets": [place, place + size],
            }  # fmt: skip
            place += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(target, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, span in written:
                self.data.seek(span.begin)
                for begin in range(span.begin, span.end, CHUNK):
                    file.write(self.data.read(min(CHUNK, span.end - begin)))


def _empty(span: Span) -> Tensor:
    return torch.empty(span.shape, dtype=span.dtype)


def _texts(metadata: Mapping[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value) for key, value in metadata.items() if value}


def write_trace(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None
) -> Path:
    """Tensors by name, in the order of their computation -> a safetensors file that says the order; whole or not at all.

    Raises EridiffError where it cannot be written.
    """
    target = Path(path).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=target.parent) as data:
        file = TraceFile(data)
        for name, tensor in tensors.items():
            file[name] = torch.as_tensor(tensor)
        with replacing(target) as temporary:
            file.write(temporary, metadata or {})
    return target


class Trace(Mapping[str, Tensor]):
    """The tensors of a file or folder by name, in the order of their computation if it says one; each is read when asked for.

    - ordered: whether the order is the file's own; else it is the alphabet's.
    - probes: name -> shape, of tensors of which only statistics and 64 values are kept (`probe`).
    - metadata: what else the file says, by key, read from JSON.
    """

    def __init__(
        self, path: Path, readers: Mapping[str, Any], order: list[str] | None, metadata: Mapping[str, Any] | None = None
    ) -> None:
        said = [name for name in order or () if name in readers]
        self.path, self.ordered = path, bool(said)
        self.readers = {name: readers[name] for name in [*said, *sorted(set(readers) - set(said), key=natural)]}
        self.metadata = dict(metadata or {})
        self.probes: dict[str, list[int]] = self.metadata.get("probes", {})

    def __getitem__(self, name: str) -> Tensor:
        return self.readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)


def natural(name: str) -> list[Any]:
    """A key that sorts `blocks.10` behind `blocks.9`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.replace("@", ".").split(".")]


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """A trace in any form that docs/traces.md names; tensors are read when asked for. `~` is the home.

    Raises TraceError, one sentence, for what is not a trace, damaged, or holds what cannot be compared.
    """
    location = Path(path).expanduser()
    if location.is_dir():
        return _folder(location)
    if not location.exists():
        raise TraceError(f"{quoted(path)} does not exist")
    if location.suffix == ".npz":
        return _archive(location)
    if location.suffix == ".npy":
        raise TraceError(f"{quoted(path)} is one array without a name; give the folder that holds it, or an .npz")
    return _safetensors(location)


def _safetensors(path: Path) -> Trace:
    try:
        entries, texts = read_header(path)
    except CheckpointError as error:
        raise TraceError(str(error)) from None
    metadata = {key: _parsed(text) for key, text in texts.items()}
    same, order = metadata.pop("same", {}), metadata.pop("order", None)
    if not isinstance(same, dict) or not all(other in entries for other in same.values()):
        raise TraceError(f"{quoted(path)} says in its metadata that a tensor is the same as one that it does not hold")
    spans = {name: Span(e.dtype, e.shape, e.begin, e.end) for name, e in entries.items()}
    spans |= {name: spans[other] for name, other in same.items()}
    readers = {name: _Mapped(path, span) for name, span in spans.items()}
    return Trace(path, readers, order if isinstance(order, list) else None, metadata)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@dataclass(frozen=True)
class _Mapped:
    """Reads one tensor; mapped alone, so that the memory of a large file is released with each tensor."""

    path: Path
    span: Span

    def __call__(self) -> Tensor:
        if self.span.begin == self.span.end:
            return _empty(self.span)
        try:
            size = self.span.end - self.span.begin
            raw = np.memmap(self.path, np.uint8, "c", self.span.begin, (size,))
        except (OSError, ValueError):
            raise TraceError(f"{quoted(self.path)} was changed or removed while it was read; open it again") from None
        tensor = torch.from_numpy(raw).view(self.span.dtype).reshape(self.span.shape)
        vars(tensor)["mapping"] = raw.base
        return tensor


def parts_of(tensor: Tensor, size: int = 1 << 16) -> Iterator[Tensor]:
    """The values in order, `size` at a time."""
    for part in tensor.detach().reshape(-1).split(size):
        yield part
        give_back(tensor)


def give_back(tensor: Tensor) -> None:
    """Of a tensor that `read_trace` gave, the memory of what was read of its file; the next access reads anew."""
    mapping = vars(tensor).get("mapping")
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):  # not everywhere
        mapping.madvise(mmap.MADV_DONTNEED)


def _archive(path: Path) -> Trace:
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile):
        raise TraceError(f"{quoted(path)} is not a complete .npz archive; write it again with numpy.savez") from None
    readers = {
        (name := entry.filename.removesuffix(".npy")): _Array(
            f"{quoted(path)}, array {quoted(name)},", partial(archive.open, entry), entry.file_size
        )
        for entry in archive.infolist()
    }
    return Trace(path, readers, list(readers))


def _folder(path: Path) -> Trace:
    files = sorted(path.rglob("*.npy"))
    if not files:
        raise TraceError(
            f"{quoted(path)} is a folder without .npy files; give a folder of them, a .safetensors or an .npz"
        )
    readers = {
        ".".join(file.relative_to(path).with_suffix("").parts): _Array(
            quoted(file), partial(file.open, "rb"), file.stat().st_size
        )
        for file in files
    }
    order = path / "order.txt"
    try:
        return Trace(path, readers, order.read_text(encoding="utf-8").split() if order.is_file() else None)
    except (OSError, UnicodeDecodeError):
        raise TraceError(f"{quoted(order)} is not a list of names; write one per line, or remove it") from None


REFUSED = {  # kinds of dtypes that torch does not have
    "O": "Python objects, which are never opened; save plain numbers",
    "V": "a type that NumPy does not know, bfloat16 perhaps; save float32, or a safetensors file",
}


@dataclass(frozen=True)
class _Array:
    """Reads one NumPy array. Refused when the trace is opened: one that is cut off, or of a dtype that torch does not have."""

    where: str
    open: Callable[[], Any]  # gives a file of bytes
    size: int  # of that

    def __post_init__(self) -> None:
        size, dtype = self._read(self._header)
        try:
            torch.from_numpy(np.empty(0, dtype.newbyteorder("=")))
        except TypeError:
            refused = REFUSED.get(dtype.kind, f"{dtype}, which torch does not have; save plain numbers")
            raise TraceError(f"{self.where} holds {refused}") from None
        if size > self.size:
            raise TraceError(f"{self.where} is cut off or damaged; write it again")

    def __call__(self) -> Tensor:
        array = self._read(lambda file: np.lib.format.read_array(file, allow_pickle=False))
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))

    def _header(self, file: IO[bytes]) -> tuple[int, np.dtype[Any]]:
        """How many bytes there should be, and of which dtype the values are."""
        first = np.lib.format.read_magic(file) == (1, 0)
        shape, _, dtype = (np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0)(file)
        return file.tell() + math.prod(shape) * dtype.itemsize, dtype

    def _read(self, how: Callable[[IO[bytes]], Any]) -> Any:
        try:
            with self.open() as file:
                return how(file)
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error):
            raise TraceError(f"{self.where} is cut off or damaged; write it again") from None
