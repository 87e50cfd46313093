"""The format of a safetensors file: its header, read and checked before anything is mapped.

The format: 8 bytes, little-endian, say how long the header is; the header is one JSON object in UTF-8 that gives
each tensor its dtype, shape and byte range; the data follows without gaps. The safetensors library accepts some
damaged files silently (a name given twice), its errors never name the file, and it reads what is only mapped here.
"""

import json
import math
import os
import re
import reprlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch

from eridiff.errors import CheckpointError, quoted
from eridiff.files import kind_by_content

MAXIMUM_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAXIMUM_TENSORS = 100_000  # published files stay below 3,000, the trace of a whole run of Flux has 30,000
MAXIMUM_DIMENSIONS = 8
MAXIMUM_JSON_VALUES = 2_000_000  # bounds the memory that a hostile header can take
INTEGER_LIMIT = 2**63

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip
UNREADABLE_DTYPES = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0")  # in the format, but no plain tensors in torch

PICKLED = "a pickled checkpoint, never opened because it can run code; convert it to safetensors elsewhere"
WEB_PAGE = "a web page or a server's error message saved as a model; download it again"
FIRST_BYTES = {
    b"PK\x03\x04": PICKLED,
    **{bytes([0x80, protocol]): PICKLED for protocol in range(2, 6)},
    b"GGUF": "a GGUF file, quantised by llama.cpp's tools and not supported; use a safetensors file",
    b"<!do": WEB_PAGE, b"<htm": WEB_PAGE, b"<?xm": WEB_PAGE, b'{"er': WEB_PAGE,
    b"\x93numpy": "a NumPy file; convert it to safetensors",
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"\x89hdf": "an HDF5 file; convert it to safetensors",
}  # fmt: skip

short = reprlib.Repr()
short.maxstring = short.maxother = 60
short.maxlist = MAXIMUM_DIMENSIONS


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as a header declares it: `begin` and `end` are absolute byte positions in `file`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Tensors and metadata of one safetensors file, every declaration checked; raises CheckpointError."""
    size = file_size(path)
    with _open(path) as file:
        raw = _header_bytes(path, file, size)
    try:
        declared = _parse_json(raw)
    except _JsonError as error:
        refuse(path, f"has a header that {error}")
    metadata = declared.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(is_text(value) for value in metadata.values()):
        refuse(path, "has __metadata__ that is not an object of strings", "save it again without")
    if not declared:
        refuse(path, "declares no tensors")
    if len(declared) > MAXIMUM_TENSORS:
        refuse(path, f"declares {len(declared)} tensors, the limit is {MAXIMUM_TENSORS}", "use another file")
    start = 8 + len(raw)
    tensors = {name: _entry(path, name, value, start) for name, value in declared.items()}
    _check_layout(path, tensors, start, size)
    return tensors, metadata


def refuse(path: Path, problem: str, remedy: str | None = None) -> NoReturn:
    """CheckpointError; without a `remedy` the file is damaged."""
    said = f"{problem}; {remedy}" if remedy else f"is damaged: it {problem}; download it again"
    raise CheckpointError(f"{quoted(path)} {said}")


def status_of(path: Path) -> os.stat_result:
    try:
        return os.stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            refuse(path, "is a link to a file that does not exist", "download the file again")
        refuse(path, "does not exist", "check the name")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        refuse(path, f"cannot be opened ({getattr(error, 'strerror', None) or error})", "check the name")


def file_size(path: Path) -> int:
    """Bytes of a regular file. Asked before `open`, because opening a pipe waits for its writer for ever."""
    status = status_of(path)
    if stat.S_ISDIR(status.st_mode):
        refuse(path, "is a folder where a file is expected", "give a file")
    if not stat.S_ISREG(status.st_mode):
        refuse(path, "is a device, a pipe or a socket", "give a regular file")
    return status.st_size


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        refuse(path, f"cannot be read ({error.strerror})", "check its permissions and the disk")


def _header_bytes(path: Path, file: BinaryIO, size: int) -> bytes:
    """The header's bytes; its length is compared with the file's `size` before anything is allocated."""
    first = file.read(512)
    if size == 0:
        refuse(path, "is empty")
    if foreign := _foreign_kind(first):
        raise CheckpointError(f"{quoted(path)} is {foreign}")
    if size < 8:
        refuse(path, f"is too short for a header: {size} bytes")
    length = int.from_bytes(first[:8], "little")
    if length > MAXIMUM_HEADER_BYTES and length > size - 8:
        kind = kind_by_content(path)
        what = f"it is {kind}" if kind else f"its first 8 bytes would mean a header of {length} bytes"
        raise CheckpointError(f"{quoted(path)} is not a safetensors file: {what}")
    if length > MAXIMUM_HEADER_BYTES:
        refuse(path, f"has a header of {length} bytes, larger than the limit of {MAXIMUM_HEADER_BYTES}")
    if length > size - 8:
        refuse(path, f"is an incomplete download, its header has {length} bytes and the file {size}")
    file.seek(8)
    raw = file.read(length)
    if len(raw) != length:
        refuse(path, "became shorter while it was read")
    return raw


def _foreign_kind(first: bytes) -> str | None:
    """What a file that is not safetensors is, and what to do, told by its `first` 512 bytes."""
    if len(first) >= 8 and not first.strip(b"\0"):
        return "an unfinished download: it begins with zeros only; download it again"
    if first[2:8] == bytes(6) or first[4:8] == bytes(4) and first[8:9] in (b"{", b" "):
        return None  # a header's length, which may happen to look like the first bytes of another format
    if first.startswith(b"version https://git-lfs"):
        found = re.search(rb"\nsize (\d{1,19})", first)
        wanted = f"to a file of {found[1].decode()} bytes" if found else "to a file of unknown size"
        return f"a Git LFS pointer {wanted}, not the file itself; fetch it with `git lfs pull` or download it again"
    if first[257:262] == b"ustar":
        return "a tar archive; unpack it, and convert it to safetensors if it is a checkpoint"
    start = first.lstrip(b" \t\r\n").lower()
    for beginning, kind in FIRST_BYTES.items():
        if first.startswith(beginning) or start.startswith(beginning):
            return kind
    if re.match(rb'\{\s*["}]', start):
        return "JSON text and no weights; give the folder if it is an index, or download the file again"
    return None


class _JsonError(ValueError):
    """A JSON text is refused; the message is a predicate: 'is not UTF-8'."""


def is_text(value: object) -> bool:
    """A string without lone surrogates, which JSON's escapes can smuggle in and no file name or print can hold."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if not is_text(name):
            raise _JsonError(f"has a name that is not valid Unicode, {quoted(name, 60)}")
        if name in result:
            raise _JsonError(f"has the duplicate name {quoted(name, 60)}")
        result[name] = value
    return result


def _finite_number(text: str) -> float:
    """Also called for the constants NaN and Infinity, which JSON does not have and Python reads."""
    number = float(text)
    if not math.isfinite(number):
        raise _JsonError(f"has the number {short.repr(text)}, not a finite one")
    return number


def _parse_json(raw: bytes) -> dict[str, Any]:
    """One JSON object from strict UTF-8, without duplicate names and without NaN; raises _JsonError."""
    try:
        text = raw.decode("utf-8")  # Given bytes, json.loads would accept UTF-16 too.
        if sum(map(text.count, "[{,")) > MAXIMUM_JSON_VALUES:
            raise _JsonError(f"has more than {MAXIMUM_JSON_VALUES} values")
        hooks: Any = {"parse_constant": _finite_number, "parse_float": _finite_number}
        document = json.loads(text, object_pairs_hook=_unique_names, **hooks)
    except _JsonError:
        raise
    except UnicodeDecodeError as error:
        raise _JsonError(f"is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise _JsonError("is not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise _JsonError(f"is not valid JSON ({error})") from None
    if not isinstance(document, dict):
        raise _JsonError(f"is not an object but {short.repr(document)}")
    return document


def _are_sizes(value: object) -> bool:
    """`type` and not `isinstance`, because JSON's true is an int to Python."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < INTEGER_LIMIT for item in value)


def _entry(path: Path, name: str, declared: Any, start: int) -> TensorEntry:
    """The entry that a header declares for `name`; the data begins at byte `start` of the file."""
    label = f"tensor {quoted(name, 60)}"
    if not name:
        refuse(path, "has a tensor without a name")
    if not isinstance(declared, dict) or set(declared) != {"dtype", "shape", "data_offsets"}:
        refuse(path, f"declares {label} not by dtype, shape and data_offsets but by {short.repr(declared)}")
    kind, shape, offsets = declared["dtype"], declared["shape"], declared["data_offsets"]
    if kind in UNREADABLE_DTYPES:
        refuse(path, f"has {label} in the dtype {kind}, which is not supported", "use a 16-bit or fp8 file")
    if not isinstance(kind, str) or kind not in DTYPES:
        refuse(path, f"has {label} in the unknown dtype {short.repr(kind)}")
    if not _are_sizes(shape):
        refuse(path, f"has {label} with the impossible shape {short.repr(shape)}")
    if len(shape) > MAXIMUM_DIMENSIONS:
        refuse(path, f"has {label} with {len(shape)} dimensions, the limit is {MAXIMUM_DIMENSIONS}", "use another")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse(path, f"has {label} with the impossible offsets {short.repr(offsets)}")
    size = math.prod(shape) * DTYPES[kind].itemsize
    if size != offsets[1] - offsets[0]:
        held = f"{offsets[1] - offsets[0]} bytes"
        refuse(path, f"has {label} in {held} although its shape {shape} of {kind} takes {size}")
    if math.prod(length for length in shape if length) >= INTEGER_LIMIT // 16:  # strides of an empty tensor
        refuse(path, f"has {label} with the impossible shape {shape}")
    return TensorEntry(DTYPES[kind], tuple(shape), path, start + offsets[0], start + offsets[1])


def _check_layout(path: Path, tensors: dict[str, TensorEntry], start: int, size: int) -> None:
    """The data of all tensors fills the file from byte `start` to its `size` without a gap or an overlap."""
    position, previous = start, "the header"
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        label = f"tensor {quoted(name, 60)}"
        if entry.begin > position:
            refuse(path, f"has a gap of {entry.begin - position} bytes between {previous} and {label}")
        if entry.begin < position:
            refuse(path, f"has an overlap of {previous} and {label}")
        position, previous = entry.end, label
    if size < position:
        refuse(path, f"is an incomplete download, {position - size} of {position} bytes are missing")
    if size > position:
        refuse(path, f"has {size - position} byte{'s' * (size - position > 1)} more than its header declares")


def read_json_file(path: Path) -> dict[str, Any]:
    """One JSON object from a file; raises CheckpointError."""
    size = file_size(path)
    if size > MAXIMUM_HEADER_BYTES:
        refuse(path, f"has {size} bytes, too many for a JSON file", "check what it is")
    try:
        with _open(path) as file:
            return _parse_json(file.read(MAXIMUM_HEADER_BYTES))
    except _JsonError as error:
        refuse(path, str(error))
