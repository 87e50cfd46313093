"""Files that appear whole or not at all, whenever the process is killed, and what they are known by."""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from eridiff.errors import EridiffError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new, empty file beside `target`, which takes target's place at the end of the block; its folder is made.

    The name is random: process numbers repeat over the containers and machines that share a disk. The file is as readable as
    any new one, even if what writes it makes its own with fewer permissions. Raises EridiffError where it cannot be written;
    nothing of it is left then.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        yield temporary
        temporary.chmod(mode & 0o777)
        os.replace(temporary, target)
    except OSError as error:
        raise EridiffError(f"'{target}' cannot be written: {error.strerror or error}") from None
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


BEGINNINGS = (  # of files -> what they are
    (b"\x89PNG", "a PNG image"), (b"\xff\xd8\xff", "a JPEG image"), (b"GIF8", "a GIF image"), (b"RIFF", "a WebP image or another RIFF file"),
    (b"%PDF", "a PDF"),
)  # fmt: skip


def kind_by_content(path: Path) -> str | None:
    """What a file that is not a checkpoint holds, "a PNG image" or "text ('# README')"; None for all others."""
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError:
        return None
    kind = next((kind for beginning, kind in BEGINNINGS if start.startswith(beginning)), None)
    if kind is None and len(start) >= 8 and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        return f"text, which begins with {start.decode('ascii')!r}"
    return kind


def content_hash(path: str | os.PathLike[str]) -> str:
    """The first 16 hexadecimal digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return _digest(file)[:16]


def tensors_hash(path: str | os.PathLike[str]) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of a safetensors file behind its header, as A1111 knows LoRAs by."""
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return _digest(file)[:12]


def _digest(file: BinaryIO) -> str:
    found = hashlib.sha256()
    while block := file.read(1 << 20):
        found.update(block)
    return found.hexdigest()
