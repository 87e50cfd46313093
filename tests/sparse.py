"""Full-size files that hold no data: a published header, and a hole where the weights would be."""

import json
import math
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eridiff.weights.format import DTYPES
from eridiff.weights.header import open_checkpoint
from eridiff.weights.keymap import Shape
from tests.manifest import Tensors, read_manifest


def write_sparse(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    """A valid safetensors file of the tensors' full size that takes a few kilobytes on the disk."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-DTYPES[item[1][0]].itemsize, item[0])):
        begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return path


def sparse_manifest(
    path: Path, manifest: str, *, prefix: str = "", drop: tuple[str, ...] = (), add: Tensors | None = None
) -> Path:
    tensors = {prefix + name: value for name, value in read_manifest(manifest).items() if name not in drop}
    return write_sparse(path, tensors | (add or {}))


def write_random(path: Path, tensors: Tensors, draw: Callable[[str, Shape], Tensor]) -> Path:
    """The same file with `draw(name, shape)` for each tensor, one at a time, so that a full-size file needs little memory."""
    write_sparse(path, tensors)
    for name, entry in open_checkpoint(path).tensors.items():
        values = draw(name, entry.shape).to(entry.dtype).contiguous().flatten().view(torch.uint8)
        with open(path, "r+b") as file:
            file.seek(entry.begin)
            file.write(memoryview(values.numpy()))
    return path


def write_scattered(path: Path, tensors: Tensors, pieces: int = 24, numbers: int = 64) -> Path:
    """A full-size file with random numbers in so many places of each tensor, the first and the last among them, and holes between.

    T5's two names of its words have the same numbers, as published.
    """
    write_sparse(path, tensors)
    with open(path, "r+b") as file:
        for name, entry in open_checkpoint(path).tensors.items():
            seed = zlib.crc32(name.replace("encoder.embed_tokens", "shared").encode())
            generator, size = torch.Generator().manual_seed(seed), entry.dtype.itemsize
            values = torch.randn(pieces, min(numbers, (entry.end - entry.begin) // size), generator=generator).to(
                entry.dtype
            )
            for i, piece in enumerate(values):
                last = (entry.end - entry.begin) // size - len(piece)
                file.seek(entry.begin + last * i // (pieces - 1) * size)
                file.write(memoryview(piece.contiguous().view(torch.uint8).numpy()))
    return path


class SparseWriter:
    """`open(path, "wb")` that leaves holes for blocks of zeros, so that full-size files can be written on a small disk."""

    BLOCK = 1 << 16

    def __init__(self, path: os.PathLike[str], mode: str) -> None:
        self.file: Any = open(path, mode)  # noqa: SIM115

    def __enter__(self) -> "SparseWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.truncate(self.file.tell())
        self.file.close()

    def write(self, data: Any) -> None:
        whole = np.frombuffer(data, np.uint8)
        for start in range(0, len(whole), self.BLOCK):
            block = whole[start : start + self.BLOCK]
            if block.any():
                self.file.write(block)
            else:
                self.file.seek(len(block), os.SEEK_CUR)
