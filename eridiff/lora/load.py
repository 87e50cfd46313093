"""Read a LoRA file of any format for the networks it was made for; nothing in it is dropped silently."""

import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from eridiff.errors import CheckpointError, LoraError
from eridiff.lora import hints
from eridiff.lora.check import Incomplete, Misshapen, check_overlaps, check_roles, check_shapes
from eridiff.lora.deltas import FACTORED, Item, kind_of, widened
from eridiff.lora.formats import Source, sort_names
from eridiff.lora.ledger import APPLIED, LEFT_OUT, Row, counted
from eridiff.lora.names import PEFT, Names, Target, find, inner, names_of, network_of
from eridiff.lora.peft import Scaling
from eridiff.weights.format import read_json_file
from eridiff.weights.header import Checkpoint, open_checkpoint
from eridiff.weights.hub import FOLDERS, LORA_NAMES, resolve
from eridiff.weights.locate import DENOISERS, TEXT_ENCODERS

log = logging.getLogger(__name__)
Network = nn.Module | Mapping[str, Tensor]  # or a text encoder's native state dict
OPTIONAL = {  # role of a tensor -> what a module lacks without it
    "up_bias": "bias", "diff_b": "bias", "b_norm": "bias", "diff": "weight", "w_norm": "weight",
    "dora_scale": "DoRA lengths", "magnitude": "DoRA lengths",
}  # fmt: skip
UNKNOWN_ENDING = "unknown ending"
PARTS = {"network": DENOISERS, "text_encoders": TEXT_ENCODERS}  # what `part` may choose
FIRST = {  # network -> its first layer, whose other inputs than the latents a variant may have, and its last
    "flux": ("image_in", "final.linear"), "unet": ("conv_in", "conv_out"),
}  # fmt: skip


@dataclass(frozen=True)
class Lora:
    """A LoRA, resolved: what it does to which tensor, and the ledger of its file."""

    items: tuple[Item, ...]
    ledger: tuple[Row, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = None

    @property
    def networks(self) -> tuple[str, ...]:
        """flux, mmdit, unet, clip, clip_g, t5: which it changes."""
        return tuple(dict.fromkeys(item.target.network for item in self.items))

    def of(self, *networks: str) -> "Lora":
        """Its part for one network, or for some."""
        return replace(self, items=tuple(i for i in self.items if i.target.network in networks))


class Refusal(LoraError):
    """Why a file is not loaded, with the ledger as far as it could be written."""

    def __init__(self, message: str, ledger: tuple[Row, ...] = ()) -> None:
        super().__init__(message)
        self.ledger = ledger


def load_lora(
    path: str | os.PathLike[str],
    networks: nn.Module | Mapping[str, Network],
    *,
    part: str | None = None,
    allow_partial: bool = False,
    alpha_is_rank: bool = False,
    measure: bool = False,
) -> Lora:
    """Read a file, a peft folder or a hub id for a network, or for several by kind: `{"unet": ..., "clip": ...}`.

    Nothing is changed in the networks, which may be on the meta device; the tensors are copies, so the file may change.
    `part`, "network" or "text_encoders", leaves the other part of the file out. `allow_partial` loads what fits and leaves
    the rest in the ledger. `alpha_is_rank` takes the scale 1 for a peft file whose adapter_config.json is lost. `measure`
    fills the ledger's column |dW|/|W|, for which every changed weight is read. Raises LoraError, one sentence that names the
    file and the tensor, for anything that would be dropped, guessed or spread (NaN), and for a file in which nothing fits.
    """
    given = {network_of(networks): networks} if isinstance(networks, nn.Module) else dict(networks)
    wrong = next((name for name in given if name not in (*DENOISERS, *TEXT_ENCODERS, "")), None)
    if wrong is not None or not given:
        what = "no network is given" if wrong is None else f"'{wrong}' is not a kind of network"
        raise LoraError(f"{what}; a LoRA is for {', '.join((*DENOISERS, *TEXT_ENCODERS))}, or another module alone")
    if part is not None and part not in PARTS:
        raise LoraError(f"part must be {' or '.join(PARTS)}, not {part!r}")
    tables = {name: names_of(name, network) for name, network in given.items()}
    states = {n: (_tensors_of(m) if isinstance(m, nn.Module) else m) for n, m in given.items()}
    rows: list[Row] = []
    try:
        checkpoint, scaling = _open(path, given)
        lora = _Reader(checkpoint, scaling, tables, states, rows, alpha_is_rank, measure).read(part, allow_partial)
    except (LoraError, CheckpointError) as error:
        text = str(error) if os.fspath(path) in str(error) else f"{os.fspath(path)}: {error}"
        raise Refusal(text, tuple(rows)) from None
    if any(row.status not in (*APPLIED, LEFT_OUT) for row in lora.ledger):
        log.warning("%s: %s; the ledger says which", os.fspath(path), counted(lora.ledger))
    return lora


def _open(path: str | os.PathLike[str], kinds: Iterable[str]) -> tuple[Checkpoint, Scaling]:
    """A file, and what it or a file beside it declares of its scale. What is built in has a file for each kind of network."""
    location = resolve(path, "lora")
    if location.is_dir():
        names = (*LORA_NAMES, *(f"{kind}.safetensors" for kind in kinds if location.parent == FOLDERS["lora"]))
        location = next((location / name for name in names if (location / name).is_file()), location)
    checkpoint = open_checkpoint(location)
    beside = location.parent / "adapter_config.json"
    pefts = location.name in LORA_NAMES or any(name.startswith(PEFT) for name in checkpoint.tensors)
    config = read_json_file(beside) if pefts and location.is_file() and beside.is_file() else None
    return checkpoint, Scaling.read(checkpoint.metadata, config)


def _tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """Tensors by name; for a quantised layer, whose weight is packed or kept under other names, one of the layer's shape."""
    found = network.state_dict()
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear):
            shape, own = (layer.out_features, layer.in_features), found.get(f"{name}.weight")
            if own is None or own.shape != shape:
                found[f"{name}.weight"] = torch.empty(shape, device="meta")
    return found


class _Reader:
    """One file on its way to a `Lora`."""

    def __init__(
        self, checkpoint: Checkpoint, scaling: Scaling, tables: Mapping[str, Names],
        states: Mapping[str, Mapping[str, Tensor]], rows: list[Row], alpha_is_rank: bool, measure: bool,
    ) -> None:  # fmt: skip
        """`rows` becomes the ledger, as far as it can be written."""
        self.checkpoint, self.scaling, self.tables, self.states, self.rows = checkpoint, scaling, tables, states, rows
        self.alpha_is_rank, self.measure = alpha_is_rank, measure
        self.embeddings = [name for name in checkpoint.tensors if name.startswith("bundle_emb.")]
        names = [name for name in checkpoint.tensors if name not in self.embeddings]
        self.sources, self.unknown = sort_names(names, scaling.replaces)
        scaling.check({key: source.names for key, source in self.sources.items()})
        self.hints = 5  # for how many names the nearest is looked for, which takes a tenth of a second each
        self.widths: list[tuple[str, int, int]] = []  # of matrices that do not fit: network, their width, the network's
        self.parts: dict[str, set[str]] = {}  # kind -> which optional parts some module of that kind has
        for source in self.sources.values():
            self.parts.setdefault(kind_of(source.names.keys()), set()).update(_parts(source.names))

    def read(self, part: str | None, allow_partial: bool) -> Lora:
        if self.unknown and not self.sources:
            raise LoraError(
                f"its names are of no known LoRA format, the first are {', '.join(map(repr, self.unknown[:3]))}"
            )
        left = {network for name, networks in PARTS.items() if part not in (None, name) for network in networks}
        items: list[Item] = []
        try:
            for source in self.sources.values():
                row, item = self._module(source, left)
                self.rows.append(row)
                items += [item] if item else []
        except Incomplete:
            if self.unknown:
                raise LoraError(self._strange()) from None
            raise
        self.rows += [Row(name, status="unmatched", note=UNKNOWN_ENDING) for name in self.unknown]
        for name in self.embeddings:
            word = name.removeprefix("bundle_emb.").rpartition(".")[0]
            left_out = f"the embedding of the word '{word}' is left out: eridiff has no embeddings of words"
            self.rows.append(Row(name, kind="embedding", status="embedding", note=left_out))
        check_overlaps(items)
        self._judge(items, part, allow_partial)
        return Lora(tuple(items), tuple(self.rows), dict(self.checkpoint.metadata), self.checkpoint.path)

    def _module(self, source: Source, left: Set[str]) -> tuple[Row, Item | None]:
        """What becomes of a module of the file: its row, and its item if it is applied; `left` are networks to leave out."""
        target = find(source.key, self.tables)
        meant = {target.network} if target else set(inner(source.key)[1])
        if meant <= left and (target or meant.isdisjoint(self.tables)):
            known = target or hints.unmatched(source, self.tables, False)[0] != "unmatched"
            if known or not meant <= set(TEXT_ENCODERS):
                return self._row(source, LEFT_OUT, target), None
        if target is None:
            status, problem = hints.unmatched(source, self.tables, self.hints > 0)
            self.hints -= 1
            return self._row(source, status, note=problem), None
        try:
            item = self._item(source, target)
        except Misshapen as error:
            return self._row(source, "shape mismatch", target, str(error)), None
        return self._applied(item), item

    def _judge(self, items: list[Item], part: str | None, allow_partial: bool) -> None:
        """Raises LoraError for what was not found good, unless it is left out on request."""
        noted = [(row.status, row.note) for row in self.rows if row.note != UNKNOWN_ENDING]
        problems = [note for status, note in noted if status in ("unmatched", "no text encoder here")]
        misshapen = [note for status, note in noted if status == "shape mismatch"]
        given = set(DENOISERS) & self.tables.keys()
        # names that mean one of the given denoisers, and that it does not have
        strangers = [r.key for r in self.rows if r.status == "unmatched" and given & set(inner(r.key)[1])]
        known = [item.target.network for item in items] + [network for network, _, _ in self.widths]
        other = len(strangers) > len([network for network in known if network in given]) and not allow_partial
        if other or not (items or misshapen):
            if problems:
                networks = [n for n in self.tables if n not in TEXT_ENCODERS] or list(self.tables)
                names, metadata = strangers or list(self.sources), self.checkpoint.metadata
                raise LoraError(hints.fits_nowhere(names, networks, metadata, problems[0], bool(items)))
            if part is not None and any(row.status == LEFT_OUT for row in self.rows):
                raise LoraError(f"it has nothing for the part '{part}'")
        if misshapen and not (items and allow_partial):
            made = hints.made_for(self.widths) if not items else ""
            raise LoraError(f"{made}; {misshapen[0]}" if made else misshapen[0])
        if allow_partial:
            return
        if self.unknown:
            raise LoraError(self._strange())
        if problems:
            others = f"; {len(problems) - 1} more modules do not fit" if len(problems) > 1 else ""
            raise LoraError(f"{problems[0]}{others}; allow_partial loads the rest")
        if all(row.status == "dead" for row in self.rows if row.module):
            raise LoraError(
                "it changes nothing: all its matrices are zero, as before the first training step; allow_partial loads it"
            )

    def _strange(self) -> str:
        name, others = self.unknown[0], len(self.unknown) - 1
        more = f"; {others} more are unknown" if others else ""
        return f"'{name}' has an unknown ending, the nearest known is '{hints.nearest_ending(name)}'{more}"

    def _row(self, source: Source, status: str, target: Target | None = None, note: str = "") -> Row:
        down = source.names.get("down")
        rank = self.checkpoint.tensors[down].shape[:1] if down else ()
        kind = kind_of(source.names.keys()) or "?"
        return Row(source.key, str(target or ""), kind, rank[0] if rank else None, status=status, note=note)

    def _applied(self, item: Item) -> Row:
        """The row of an item."""
        notes = []
        if item.kind in FACTORED and item.alpha is None:
            notes.append("no alpha: scale 1")
        lacking = self.parts[item.kind] - _parts(item.tensors)
        if self._bias(item.target) is None:
            lacking -= {"bias"}
        notes += [f"no {part}, which other modules have" for part in sorted(lacking)]
        if item.target.module in FIRST.get(item.target.network, ()) and "down" in item.tensors:
            there, own = item.tensors["down"].shape[1], self.states[item.target.network][item.target.name].shape[1]
            if there != own:
                notes.append("for the latents alone" if there < own else "widens the layer for a control image")
        if item.ratio < 0:
            notes.append("negative scale")
        metadata = self.checkpoint.metadata
        if item.kind == "lora" and re.search(r'"split_qkv"\s*:\s*"?[Tt]rue', metadata.get("ss_network_args", "")):
            parts = 4 if item.key.endswith("linear1") else 3 if item.key.endswith("qkv") else 1
            if parts > 1:
                notes.append(f"trained with split_qkv: {parts} times stronger in training than any loader makes it")
        if item.kind == "lokr" and item.alpha is not None and {"lokr_w1", "lokr_w2"} <= item.tensors.keys():
            dimension = metadata.get("ss_network_dim")
            if dimension and dimension not in ("None", f"{item.alpha:g}"):
                notes.append(
                    f"both factors are whole, so alpha {item.alpha:g} has no effect; the metadata say dim {dimension}"
                )
        if item.dead:
            notes.append("all zero: changes nothing")
        kind = item.kind + "+dora" * item.dora + "+bias" * (item.changes_bias and item.kind != "norm")
        status = "dead" if item.dead else APPLIED[item.target.rows is not None]
        numbers = item.rank, item.alpha, item.ratio, self._change(item)
        return Row(item.key, str(item.target), kind, *numbers, status, "; ".join(notes))

    def _change(self, item: Item) -> float | None:
        if not (self.measure and item.changes_weight):
            return None
        base = item.target.take(self.states[item.target.network][item.target.name])
        if base.is_meta:
            return None
        base = widened(base.float(), item)
        change, length = (float(torch.linalg.vector_norm(t)) for t in (item.change(base), base))
        return change / length if length else float("inf")

    # one module

    def _item(self, source: Source, target: Target) -> Item:
        """A module's tensors, read and checked against its target."""
        kind = kind_of(source.names.keys())
        check_roles(source, kind)
        tensors = {role: self._tensor(name, role) for role, name in source.names.items()}
        shape = self._shape(source, target, tensors)
        try:
            check_shapes(source, target, kind, tensors, shape)
        except Misshapen:
            if kind == "lora" and not target.rows and tensors["down"].ndim > 1:
                self.widths.append((target.network, tensors["down"].shape[1], shape[1]))
            raise
        if source.names.keys() & {"up_bias", "diff_b", "b_norm"} and self._bias(target) is None:
            raise LoraError(f"{source} changes a bias, and {target} has none")
        alpha, rank, ratio = self._scale(source, kind, tensors)
        tensors = {role: t for role, t in tensors.items() if role not in ("alpha", "reshape_weight")}
        return Item(source.key, target, kind, tensors, ratio, alpha, rank)

    def _tensor(self, name: str, role: str) -> Tensor:
        tensor = self.checkpoint.read(name).clone()  # not the mapped file, which may be written anew
        if role in ("on_input", "reshape_weight"):
            return tensor
        if not tensor.numel():
            raise LoraError(f"'{name}' of the shape {list(tensor.shape)} is empty")
        if tensor.is_complex() or not (tensor.is_floating_point() or role == "alpha"):
            raise LoraError(f"'{name}' holds {tensor.dtype}, and a LoRA's matrices are floating point numbers")
        if not bool(torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all()):
            raise LoraError(f"'{name}' holds values that are not finite")
        return tensor

    def _bias(self, target: Target) -> Tensor | None:
        return self.states[target.network].get(f"{target.module}.bias")

    def _shape(self, source: Source, target: Target, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """The shape of the rows that a module of the file changes.

        Its first layer may read less than the network's, which is made for the latents alone, or twice as much, which makes
        the network read a control image.
        """
        shape = tuple(self.states[target.network][target.name].shape)
        if target.rows:
            shape = (target.rows[1] - target.rows[0], *shape[1:])
        first, last = FIRST.get(target.network, ("", ""))
        matrix = next((tensors[name] for name in ("down", "diff", "hada_w1_b") if name in tensors), None)
        if target.module == first and matrix is not None and matrix.ndim > 1 and len(shape) > 1:
            area = math.prod(shape[2:]) if matrix.ndim == 2 else 1
            end = self.states[target.network].get(f"{last}.weight")
            lengths = {"dora_scale", "magnitude"} & tensors.keys()
            for columns, good in (
                (end.shape[0] if end is not None else 0, not lengths),
                (2 * shape[1], target.network == "flux" and "down" in tensors),
            ):
                if good and matrix.shape[1] == columns * area != shape[1] * area:
                    return (shape[0], columns, *shape[2:])
        return shape

    def _scale(
        self, source: Source, kind: str, tensors: Mapping[str, Tensor]
    ) -> tuple[float | None, int | None, float]:
        """(alpha as stored, rank, scale)."""
        alpha = None
        if "alpha" in tensors:
            if tensors["alpha"].numel() != 1:
                raise LoraError(
                    f"'{source.names['alpha']}' has {tensors['alpha'].numel()} values, and an alpha is one number"
                )
            alpha = float(tensors["alpha"])
        whole = {"lokr_w1", "lokr_w2"} <= tensors.keys()
        if kind not in FACTORED:
            return alpha, None, 1.0
        first = {"lora": ("down",), "loha": ("hada_w1_b",), "lokr": ("lokr_w2_b", "lokr_w1_b")}.get(kind, ())
        ranks = [tensors[name].shape[0] for name in first if name in tensors]
        rank = ranks[0] if ranks else None
        said = self.scaling.of(source.key, kind, rank)
        if alpha == 0 and not whole or said and said[0] == 0:
            where = f"'{source.names['alpha']}'" if alpha == 0 else f"the alpha that the metadata say for {source}"
            raise LoraError(
                f"{where} is 0, which some tools read as 'alpha is the rank' (scale 1) and others as scale 0; write {rank or 1} or "
                "remove the module"
            )
        if said and alpha is None:
            return said[0], rank, said[1]
        if alpha is None and source.key.startswith(PEFT) and not self.alpha_is_rank:
            raise LoraError(
                f"{source} has no alpha: peft has it in adapter_config.json; put that file beside this one, or write "
                f'{{"r": {rank or 1}, "lora_alpha": ...}}; alpha_is_rank takes the scale 1'
            )
        if rank is None:  # LyCORIS' rule for two whole factors
            return alpha, None, 1.0
        if said and alpha is not None and not math.isclose(said[1], alpha / rank, rel_tol=2**-8):  # bfloat16's rounding
            raise LoraError(
                f"'{source.names['alpha']}' makes the scale {alpha / rank:g} and the metadata lora_adapter_metadata make it "
                f"{said[1]:g}; remove one of them"
            )
        return alpha, rank, 1.0 if alpha is None else alpha / rank


def _parts(roles: Iterable[str]) -> set[str]:
    """Which parts a module has of those that it may lack and still load."""
    return {OPTIONAL[role] for role in roles if role in OPTIONAL}
