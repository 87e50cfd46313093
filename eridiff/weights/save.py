"""Write safetensors files, one tensor in memory at a time, and networks in a published layout."""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eridiff.errors import ConfigError, quoted
from eridiff.files import replacing
from eridiff.precision import check_dtype
from eridiff.weights.detect import DESCRIPTIONS, Component, sizes_of
from eridiff.weights.format import DTYPES
from eridiff.weights.keymap import Layout, key_map, unwrapped, without_wrappers
from eridiff.weights.load import MARKERS, NETWORKS, WORDS

ALIGNED = 64  # bytes
FP8 = torch.float8_e4m3fn
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor of a file to be, made when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def save_network(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    layout: str = "original",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a network's tensors under a layout's names, and its configuration as metadata `eridiff.config`.

    - module: a Flux, MMDiT, UNet or Autoencoder, compiled, wrapped or sharded (FSDP2: every process calls, the first writes).
      What attached LoRAs have changed in place is written as it was before; what `merge_into` merged is written merged.
    - dtype: of the parameters; None keeps their own. A table of positions, which is none, keeps its own.
    - metadata: beside what the network's file said of how it is sampled, which is carried along, and in its place.

    The file appears whole or not at all. Raises ConfigError for another module, for an unknown layout and for a weight that
    overflows the dtype, EridiffError when the file cannot be written.
    """
    check_dtype(dtype)
    inner = unwrapped(module)
    network = next((name for name, kind in NETWORKS.items() if isinstance(inner, kind)), None)
    if network is None:
        known = ", ".join(kind.__name__ for kind in NETWORKS.values())
        raise ConfigError(f"a {type(inner).__name__} cannot be saved; pass one of eridiff's networks: {known}")
    layouts = key_map(network).layouts
    if layout not in layouts:
        raise ConfigError(
            f"{quoted(layout)} is not a layout of {DESCRIPTIONS[network]}; there are {', '.join(layouts)}"
        )
    texts = {**carried(inner), **(metadata or {})}
    wrong = next((name for name, text in texts.items() if not isinstance(name, str) or not isinstance(text, str)), None)
    if wrong is not None:
        raise ConfigError(
            f"metadata are texts by name, and {quoted(wrong, 60)} is {quoted(texts[wrong], 60)}; give its text"
        )
    state, first = _gathered(inner)
    config = inner.config
    for name, change in changes_of(inner):  # what is attached is not of the network, what is merged is
        own = change.value(change.merges)
        if own.shape != change.value().shape:  # a control LoRA has widened the first layer
            config = replace(config, in_channels=own.shape[1])
        state[without_wrappers(name)] = own.full_tensor() if hasattr(own, "full_tensor") else own
    parameters = {without_wrappers(name) for name, _ in inner.named_parameters()}
    dtypes = {n: dtype if dtype and n in parameters else t.dtype for n, t in state.items()}
    if not first:
        return Path(path).expanduser()
    shapes = {n: tuple(t.shape) for n, t in state.items()}
    tensors = stored(layouts[layout], shapes, sizes_of(config), dtypes, lambda native: state[native].detach().cpu())
    text = json.dumps({network: asdict(config)}, sort_keys=True)
    markers = marked(texts.pop(MARKERS, "")) if layout == "original" else []
    return write_file([*tensors, *markers], path, {**texts, "eridiff.config": text})


def carried(module: nn.Module) -> dict[str, str]:
    """What a network's file said beside its weights, as `weights.load.build` left it, but for words: it may have learned others."""
    return {name: text for name, text in vars(module).get("said_by_file", {}).items() if name != WORDS}


def marked(names: str) -> list[Stored]:
    """Tensors that say how a network is sampled by being there; empty, as published files have them."""
    return [Stored(name, torch.float32, (0,), lambda: torch.empty(0)) for name in names.split()]


def copies(component: Component, prefix: str) -> list[Stored]:
    """What a file holds beside the tensors that a network uses and that a file of the same layout keeps, as it is."""
    held = {name: component.entry(name) for name in sorted(component.keys.intersection(component.layout.carry))}
    return [Stored(prefix + n, e.dtype, e.shape, partial(component.read, n)) for n, e in held.items()]


def changes_of(network: nn.Module) -> list[tuple[str, Any]]:
    """The tensors that LoRAs change in place, by name, with what each does (`lora.inplace.Change`)."""
    return [
        (f"{path}.{short}" if path else short, change)
        for path, layer in network.named_modules()
        for short, change in vars(layer).get("lora_in_place", {}).items()
    ]


def _gathered(module: nn.Module) -> tuple[dict[str, Tensor], bool]:
    """A network's tensors by native name, and whether this process is to write them: of a sharded one the first."""
    state: dict[str, Any] = module.state_dict()
    sharded = any(hasattr(tensor, "full_tensor") for tensor in state.values())
    if sharded:
        from torch.distributed import get_rank
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(module, options=options)  # empty but for the first
    return {without_wrappers(n): t for n, t in state.items()}, not sharded or get_rank() == 0


def stored(
    layout: Layout, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, Any], dtypes: Mapping[str, torch.dtype],
    read: Callable[[str], Tensor], *, prefix: str = "", scaled: Iterable[str] = (),
) -> list[Stored]:  # fmt: skip
    """What a layout's file holds of native tensors.

    - shapes, dtypes: of the native tensors, the latter as they are to be written.
    - read: a native name -> its tensor, asked for when it is written.
    - scaled: native weights that become float8_e4m3fn with a float32 scale of their own beside them.

    Raises ConfigError, when it is written, for a value that overflows the dtype.
    """
    result: list[Stored] = []
    pieces = _Pieces(read)
    with_scales = set(scaled)
    for piece in layout.pieces(shapes, sizes):
        dtype, quantised = dtypes[piece.natives[0]], bool(with_scales.intersection(piece.natives))
        for index, (name, shape) in enumerate(zip(piece.foreign, piece.shapes, strict=True)):
            if quantised and name.endswith(".weight"):
                place = name.removesuffix("weight") + "scale_weight"
                result.append(Stored(prefix + name, FP8, shape, partial(pieces.quantised, piece, index)))
                result.append(Stored(prefix + place, torch.float32, (), partial(pieces.scale, piece, index)))
            else:
                result.append(Stored(prefix + name, dtype, shape, partial(pieces.cast, piece, index, dtype)))
    if with_scales:  # ComfyUI's note that there are scales
        result.append(Stored(f"{prefix}scaled_fp8", FP8, (0,), partial(torch.empty, 0, dtype=FP8)))
    return result


class _Pieces:
    """The tensors of one piece at a time, made once for all of them."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        self.read, self.piece, self.tensors = read, None, list[Tensor]()

    def made(self, piece: Any, index: int) -> Tensor:
        if self.piece is not piece:
            self.tensors.clear()  # before the next ones take memory
            self.piece, self.tensors = piece, piece.write([self.read(native) for native in piece.natives])
        return self.tensors[index]

    def cast(self, piece: Any, index: int, dtype: torch.dtype) -> Tensor:
        tensor = self.made(piece, index)
        if dtype != tensor.dtype and dtype.is_floating_point and tensor.numel():
            largest = float(tensor.abs().nan_to_num(0, 0).max())
            if largest > torch.finfo(dtype).max:  # would be infinite, or in float8 the largest there is
                raise ConfigError(
                    f"{quoted(piece.foreign[index])} has the value {largest:g}, which {dtype} cannot hold; write bf16"
                )
        return tensor.to(dtype)

    def scale(self, piece: Any, index: int) -> Tensor:
        largest = self.made(piece, index).float().abs().max() / torch.finfo(FP8).max
        return torch.where(largest > 0, largest, torch.ones(()))

    def quantised(self, piece: Any, index: int) -> Tensor:
        return (self.made(piece, index).float() / self.scale(piece, index)).to(FP8)


def write_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> Path:
    """A safetensors file that appears whole or not at all; its folder is made."""
    held = [Stored(name, tensor.dtype, tuple(tensor.shape), tensor.detach) for name, tensor in tensors.items()]
    return write_file(held, path, metadata)


def write_file(tensors: Sequence[Stored], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> Path:
    """A safetensors file of tensors that are made one by one; it appears whole or not at all, and its folder is made."""
    target = Path(path).expanduser()
    # a mapped tensor lies where it lies in the file, and the order of a sum may depend on that: at multiples of 64, as in memory,
    # what can, and the rest behind it, wide ones first
    ordered = sorted(tensors, key=lambda tensor: (tensor.bytes % ALIGNED != 0, -tensor.dtype.itemsize))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for tensor in ordered:
        begin, end = end, end + tensor.bytes
        dtype, shape = DTYPE_NAMES[tensor.dtype], list(tensor.shape)
        header[tensor.name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNED)
    with replacing(target) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            value = tensor.make()
            if tuple(value.shape) != tensor.shape or value.dtype != tensor.dtype:
                raise ValueError(f"{tensor.name} was announced otherwise than it is")
            if value.numel():
                file.write(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return target


def write_shards(tensors: Sequence[Stored], folder: Path, stem: str, metadata: Mapping[str, str], limit: int) -> Path:
    """Files of at most `limit` bytes, or of one tensor, and last the index that names them; one file alone has no index.

    They replace what the folder held under these names, also in another number of files, which a reader might take instead.
    """
    shards: list[list[Stored]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(held.bytes for held in shards[-1]) + tensor.bytes > limit:
            shards.append([])
        shards[-1].append(tensor)
    names = [f"{stem}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        made = write_file(shard, folder / name, metadata)
    if len(shards) > 1:
        total = sum(tensor.bytes for tensor in tensors)
        places = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        made = folder / f"{stem}.safetensors.index.json"
        write_json({"metadata": {"total_size": total}, "weight_map": places}, made)
    own = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?")
    for path in folder.iterdir():
        if own.fullmatch(path.name) and path != made and path.name not in names:
            path.unlink()
    return made


def write_json(document: Mapping[str, Any], path: Path) -> Path:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path
