"""Checkpoints by their headers: one safetensors file, or a folder that holds one or an index of shards; tensors are mapped when read."""

import logging
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any, NoReturn

import torch

from eridiff.errors import CheckpointError, ConfigError, quoted
from eridiff.weights.format import (
    PICKLED,
    TensorEntry,
    file_size,
    is_text,
    read_header,
    read_json_file,
    refuse,
    short,
    status_of,
)

INDEX_NAMES = ("diffusion_pytorch_model.safetensors.index.json", "model.safetensors.index.json")
SINGLE_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
HALF_INDEX_NAMES = ("diffusion_pytorch_model.safetensors.index.fp16.json", "model.safetensors.index.fp16.json")
HALF_SINGLE_NAMES = ("diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors")
SHARD_NAME = re.compile(r"-\d+-of-\d+\b")
PICKLED_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")

log = logging.getLogger(__name__)


@dataclass
class Checkpoint:
    """A safetensors file or a sharded folder: headers checked, no data read yet.

    `metadata` of several shards is merged, the first shard by name wins. `config` is the folder's config.json, also of a file
    given alone that its folder would be read from, and `{}` where there is none. `module`: not a file but a module that
    a trainer holds, `path` its class.
    """

    path: Path
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    config: dict[str, Any]
    module: bool = False
    _handles: dict[Path, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def config_name(self) -> str:
        """Where `config` stands, for messages."""
        return "its configuration" if self.module else "config.json"

    def remedy(self, text: str) -> str:
        """What messages advise about a file, behind a semicolon; nothing of a module."""
        return "" if self.module else f"; {text}"

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, mapped from its file without a copy, in the file's dtype and shape.

        Raises CheckpointError if there is no such tensor or the file was changed since it was opened.
        """
        entry = self.tensors.get(name)
        if entry is None:
            refuse(self.path, f"has no tensor {quoted(name, 60)}", "look at the names it holds")
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype)
        # a slice is a storage of its own that keeps the mapping alive, so tensors can be saved one by one
        storage = self._mapped(entry.file)[entry.begin : entry.end]
        return torch.empty(0, dtype=entry.dtype, device="cpu").set_(storage, 0, entry.shape)  # type: ignore[call-overload]

    def _mapped(self, file: Path) -> Any:
        """The whole file, mapped privately: a write changes memory and never the file."""
        if file not in self._handles:
            size = file_size(file)
            if size != max(entry.end for entry in self.tensors.values() if entry.file == file):
                refuse(file, "was changed after it was opened", "open it again")  # reading past its end would kill
            try:
                self._handles[file] = torch.UntypedStorage.from_file(os.fspath(file), False, size)
            except RuntimeError as error:
                refuse(
                    file, f"cannot be mapped ({' '.join(str(error).split())[:200]})", "check the disk and the memory"
                )
        return self._handles[file]


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a safetensors file, or a folder that holds one or an index of shards; only headers are read. `~` is the home.

    Raises CheckpointError, one sentence that names the file, or ConfigError for a broken config.json.
    """
    if not os.fspath(path):
        raise CheckpointError("the path of the checkpoint is empty; give a safetensors file or a folder")
    location = Path(path).expanduser()
    if stat.S_ISDIR(status_of(location).st_mode):
        return _open_folder(location)
    return Checkpoint(location, *read_header(location), config=_config_beside(location))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not os.path.lexists(path):
        return {}
    try:
        return read_json_file(path)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error


def _config_beside(file: Path) -> dict[str, Any]:
    """The config.json that belongs to a file: its name is a published one, or it is the only model of its folder."""
    if not (file.parent / "config.json").exists():
        return {}
    try:
        only = choose_single(os.listdir(file.parent))
    except OSError:  # a folder that may be entered and not listed
        only = None
    return _read_config(file.parent) if file.name in (only, *SINGLE_NAMES, *HALF_SINGLE_NAMES) else {}


def _open_folder(folder: Path) -> Checkpoint:
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        refuse(folder, f"cannot be listed ({error.strerror})", "check its permissions")
    index, single = choose_index(folder, names), choose_single(names)
    shards = read_index(folder / index) if index else {}
    missing = [shard for shard in sorted(set(shards.values())) if not os.path.exists(folder / shard)]
    alone = single and single not in shards.values()
    if index and missing and not alone:
        refuse(folder / index, f"names the file {quoted(missing[0])}, which is not there", "download that file too")
    if index and not missing:
        if alone:
            log.info("%r: %r is used, not %r", str(folder), index, single)
        return Checkpoint(folder, *_read_shards(folder, index, shards), config=_read_config(folder))
    if not single:
        refuse_folder(folder, names)
    if missing:
        log.warning("%r: %r lacks %r, so %r is used", str(folder), index, missing[0], single)
    return Checkpoint(folder, *read_header(folder / single), config=_read_config(folder))


def choose_index(folder: Path, names: list[str]) -> str | None:
    """An index in half precision counts only where there is no plain file, single or sharded."""
    plain = [name for name in names if name.endswith(".safetensors.index.json")]
    if len(plain) > 1 and not set(plain) & set(INDEX_NAMES):
        refuse(folder, f"holds several indexes, {short.repr(plain)}", "keep one")
    half = () if set(names) & set(SINGLE_NAMES) else HALF_INDEX_NAMES
    return next((name for name in (*INDEX_NAMES, *plain, *half) if name in names), None)


def choose_single(names: list[str]) -> str | None:
    files = [name for name in names if name.endswith(".safetensors")]
    only = files if len(files) == 1 and not SHARD_NAME.search(files[0]) else ()
    return next((name for name in (*SINGLE_NAMES, *HALF_SINGLE_NAMES, *only) if name in names), None)


def refuse_folder(folder: Path, names: list[str]) -> NoReturn:
    files = [name for name in names if name.endswith(".safetensors")]
    pickled = [name for name in names if name.endswith(PICKLED_SUFFIXES)]
    if any(map(SHARD_NAME.search, files)):
        refuse(folder, f"holds shards such as {quoted(files[0])} but not their index", "download the index too")
    if files:
        refuse(folder, f"holds several safetensors files, {short.repr(files)}", "give one of them")
    if pickled:
        raise CheckpointError(f"{quoted(folder)} holds no safetensors file but {short.repr(pickled[0])}, {PICKLED}")
    if "model_index.json" in names:
        refuse(folder, "is a whole pipeline and holds no weights itself", "give a folder in it such as 'transformer'")
    refuse(folder, "holds no safetensors file", "check the name or download it again")


def read_index(path: Path) -> dict[str, str]:
    """Tensor name to shard, as the index says; every shard is a plain name in the index's own folder, or a link there."""
    shards = read_json_file(path).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(is_text(shard) for shard in shards.values()):
        refuse(path, f"has a weight_map that is not an object of strings but {short.repr(shards)}")
    for shard in set(shards.values()):
        # The Windows rules know every separator and drive letters, so the answer is the same on all systems.
        if shard in ("", ".", "..") or "\0" in shard or PureWindowsPath(shard).name != shard:
            refuse(path, f"names the shard {short.repr(shard)}, not a plain file name", "do not trust this folder")
    return shards


def _read_shards(folder: Path, index: str, shards: dict[str, str]) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Tensors and metadata of all shards; the index and the headers say the same of every tensor."""
    tensors: dict[str, TensorEntry] = {}
    metadata: dict[str, str] = {}
    for shard in sorted(set(shards.values())):
        found, claims = read_header(folder / shard)
        for name in found:
            if shards.get(name) != shard:
                place = f"maps it to {quoted(shards[name], 40)}" if name in shards else "does not map it"
                refuse(folder / shard, f"holds the tensor {quoted(name, 60)} but the index {quoted(index, 40)} {place}")
        tensors |= found
        metadata = claims | metadata
    for name, shard in shards.items():
        if name not in tensors:
            refuse(folder / index, f"maps the tensor {quoted(name, 60)} to {quoted(shard, 60)}, which lacks it")
    return tensors, metadata
