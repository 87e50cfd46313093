"""The one table of names: `weights_map/*.yaml`, our name on the left, a published file's on the right.

A rule's left side is matched against the names that a module really has, so a map needs no conditions: `{b}` binds a
number (`{s}` encoder or decoder, `{c}` a letter), `*` the rest of the name. The right side may compute with what was bound and
with the sizes of the configuration: `{levels - 1 - l}`, `{1 + attends[l]}`. `blocks` say once what is the same at several places.
"""

import ast
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from eridiff.errors import CheckpointError, ConfigError

Shape = tuple[int, ...]
OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
# what torch.compile, DistributedDataParallel and averaged models, FSDP and activation checkpointing put around a module
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
WRAPPED = re.compile(rf"(?:(?<=\.)|^)(?:{'|'.join(WRAPPERS)})\.")
OPERATIONS = ("same", "rows", "swap_halves", "squeeze", "transpose", "part", "alias", "default")


def map_folder() -> Path:
    """Where the maps are: inside an installed package, or at the top of a source tree."""
    installed = Path(__file__).parent.parent / "weights_map"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "weights_map"


def evaluate(expression: str, values: Mapping[str, Any]) -> Any:
    """The value of a name, an integer, an entry of a list, or a sum, difference, product or floor quotient of them."""

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return values[node.id]
        if isinstance(node, ast.Subscript):
            return value(node.value)[value(node.slice)]
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise CheckpointError(f"a key map cannot compute '{expression}'")

    return value(ast.parse(expression, mode="eval").body)


@dataclass(frozen=True)
class Entry:
    """How one native tensor is stored in a layout: an operation and the foreign tensors it takes."""

    native: str
    operation: str
    foreign: tuple[str, ...]
    sizes: tuple[int, ...] = ()  # rows: of each foreign tensor along dimension 0; part: (index, number of parts)

    def native_shape(self, shapes: list[Shape]) -> Shape:
        """The shape that the foreign shapes give."""
        first = shapes[0]
        if self.operation == "rows":
            return (sum(shape[0] for shape in shapes), *first[1:])
        if self.operation == "part":
            return (first[0] // self.sizes[1], *first[1:])
        return first[::-1] if self.operation == "transpose" else first

    def foreign_shapes(self, shape: Shape) -> list[Shape]:
        """The shapes that the foreign tensors of a native `shape` have."""
        if self.operation == "rows":
            return [(size, *shape[1:]) for size in self.row_sizes(shape[0])]
        if self.operation == "part":
            return [(shape[0] * self.sizes[1], *shape[1:])]
        if self.operation == "squeeze" and len(shape) == 4:
            return [shape[:2]]
        return [shape[::-1] if self.operation == "transpose" else shape] * len(self.foreign)

    def rows_of(self, shape: Shape) -> dict[str, tuple[int, int]]:
        """Which rows of a native tensor of `shape` each foreign one of `rows` is."""
        ends = list(accumulate((size for size, *_ in self.foreign_shapes(shape)), initial=0))
        return dict(zip(self.foreign, pairwise(ends), strict=True))

    def row_sizes(self, rows: int) -> tuple[int, ...]:
        """Those that the map says, or equal ones."""
        return self.sizes or (rows // len(self.foreign),) * len(self.foreign)

    def read(self, tensors: list[Tensor], shape: Shape) -> Tensor:
        """Foreign tensors -> the native tensor of `shape`; a view wherever the operation allows one."""
        first = tensors[0]
        if self.operation == "rows":
            return torch.cat(tensors)
        if self.operation == "swap_halves":
            return torch.cat(first.chunk(2)[::-1])
        if self.operation == "part":
            return first.chunk(self.sizes[1])[self.sizes[0]]
        if self.operation == "transpose":
            return first.T.contiguous()
        return first.reshape(shape)

    def write(self, tensor: Tensor) -> list[Tensor]:
        """The native tensor -> the foreign ones (of a `part`, its rows alone)."""
        if self.operation == "rows":
            return list(tensor.split(list(self.row_sizes(tensor.shape[0]))))
        if self.operation == "swap_halves":
            return [torch.cat(tensor.chunk(2)[::-1])]
        if self.operation == "transpose":
            return [tensor.T.contiguous()]
        if self.operation in ("part", "alias"):
            return [tensor] * (1 if self.operation == "part" else len(self.foreign))
        return [tensor.reshape(self.foreign_shapes(tuple(tensor.shape))[0])]


class Rule:
    """One line of a map."""

    def __init__(self, native: str, right: str | Mapping[str, Any]) -> None:
        self.native = native
        body = {"same": right} if isinstance(right, str) else dict(right)
        self.operation = next((name for name in OPERATIONS if name in body), "")
        if not self.operation:
            raise CheckpointError(f"the rule for {native} has none of the operations {', '.join(OPERATIONS)}")
        foreign = body[self.operation]
        self.foreign: list[str] = [foreign] if isinstance(foreign, str) else list(foreign)
        self.old: list[str] = [body["old"]] if "old" in body else []  # names that other writers use, read only
        self.sizes: list[str] = [str(size) for size in body.get("sizes", [])]
        if self.operation == "part":
            self.sizes = [str(body["index"]), str(body["of"])]
        self.pattern = re.compile(self._expression(native))

    @staticmethod
    def _expression(pattern: str) -> str:
        parts = re.split(r"(\{\w+\}|\*)", pattern)
        words = {"*": r"(?P<rest>.+)", "{s}": r"(?P<s>encoder|decoder)", "{c}": r"(?P<c>[a-z])"}
        return "".join(
            words.get(part) or (f"(?P<{part[1:-1]}>\\d+)" if part.startswith("{") else re.escape(part))
            for part in parts
        )

    def entry(self, native: str, sizes: Mapping[str, Any], held: Collection[str] = ()) -> Entry | None:
        """This rule applied to one native name; None if it does not match.

        Of two spellings it takes the one whose names are all in `held`, the names of a file, and else the first.
        """
        found = self.spellings(native, sizes)
        whole = [entry for entry in found if held and all(name in held for name in entry.foreign)]
        return next(iter(whole + found), None)

    def spellings(self, native: str, sizes: Mapping[str, Any]) -> list[Entry]:
        """This rule applied to one native name, in each spelling that files have; empty if it does not match."""
        match = self.pattern.fullmatch(native)
        if match is None:
            return []
        bound = {
            name: int(text) if text.isdigit() and name != "rest" else text for name, text in match.groupdict().items()
        }
        values = {**sizes, **bound}
        rest = str(bound.get("rest", ""))

        def filled(pattern: str) -> str:
            return re.sub(r"\{([^}]+)\}", lambda m: str(evaluate(m[1], values)), pattern).replace("*", rest)

        rows = tuple(evaluate(size, values) for size in self.sizes)
        both = [self.foreign, self.old] if self.old else [self.foreign]
        return [Entry(native, self.operation, tuple(map(filled, patterns)), rows) for patterns in both]


class Layout:
    """One way in which a network is published."""

    def __init__(self, network: str, name: str, body: Mapping[str, Any]) -> None:
        self.network, self.name = network, name
        self.prefixes: list[str] = body["prefixes"]
        self.carry: list[str] = body.get("carry", [])
        inside = {
            f"{native}.{rule}": f"{foreign}.{right}"
            for block in body.get("blocks", {}).values()
            for native, foreign in block["at"].items()
            for rule, right in block["rules"].items()
        }
        self.rules = [Rule(native, right) for native, right in {**body["rules"], **inside}.items()]

    def entry(self, native: str, sizes: Mapping[str, Any], held: Collection[str] = ()) -> Entry:
        """The entry of one native name, as a file with the names `held` spells it; CheckpointError if not exactly one rule matches."""
        found = [entry for rule in self.rules if (entry := rule.entry(native, sizes, held))]
        if len(found) != 1:
            raise CheckpointError(
                f"{len(found)} rules of the map {self.network}, layout {self.name}, match '{native}'; one must"
            )
        return found[0]

    def entries(self, natives: Iterable[str], sizes: Mapping[str, Any], held: Collection[str] = ()) -> list[Entry]:
        """One entry a native name."""
        return [self.entry(native, sizes, held) for native in natives]

    def spellings(self, natives: Iterable[str], sizes: Mapping[str, Any]) -> list[Entry]:
        """The entries of native names in every spelling."""
        other = [rule for rule in self.rules if rule.old]
        first = self.entries(natives, sizes)
        return first + [entry for n in natives for rule in other for entry in rule.spellings(n, sizes)[1:]]

    def pieces(self, shapes: Mapping[str, Shape], sizes: Mapping[str, Any]) -> list["Piece"]:
        """How native tensors of these shapes are written, in their order; parts of one foreign tensor are one piece."""
        entries = self.entries(shapes, sizes)
        whole: dict[str, list[Entry]] = {}
        for entry in entries:
            whole.setdefault(entry.foreign[0] if entry.operation == "part" else entry.native, []).append(entry)
        return [
            Piece(tuple(sorted(group, key=lambda entry: entry.sizes[:1])), group[0].foreign_shapes(shapes[group[0].native]))
            for group in whole.values()
        ]  # fmt: skip

    def to_foreign(self, state: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> dict[str, Tensor]:
        """A native state dict in this layout; parts are joined in their order, values and bits unchanged."""
        result: dict[str, Tensor] = {}
        for piece in self.pieces({name: tuple(tensor.shape) for name, tensor in state.items()}, sizes):
            result.update(zip(piece.foreign, piece.write([state[name] for name in piece.natives]), strict=True))
        return result


@dataclass(frozen=True)
class Piece:
    """Native tensors that are written together, and the foreign ones that they make."""

    entries: tuple[Entry, ...]
    shapes: list[Shape]  # of the foreign tensors

    @property
    def natives(self) -> list[str]:
        return [entry.native for entry in self.entries]

    @property
    def foreign(self) -> tuple[str, ...]:
        return self.entries[0].foreign

    def write(self, tensors: list[Tensor]) -> list[Tensor]:
        first = self.entries[0]
        return [torch.cat(tensors)] if first.operation == "part" else first.write(tensors[0])


class KeyMap:
    """All layouts of a network: `KeyMap("flux").layouts["diffusers"]`."""

    def __init__(self, network: str, body: Mapping[str, Any] | None = None) -> None:
        """`body` replaces the map's file (as read from YAML)."""
        body = body or yaml.safe_load((map_folder() / f"{network}.yaml").read_text(encoding="utf-8"))
        self.network = network
        self.layouts = {name: Layout(network, name, layout) for name, layout in body["layouts"].items()}
        rules = body.get("lora", {})  # names that LoRA files alone use
        self.lora_rules = [Rule(native, right) for native, right in rules.items()]
        # readable names of what stands between modules, and where a trace has it
        self.value_rules = [Rule(name, place) for name, place in body.get("values", {}).items()]


@cache
def key_map(network: str) -> KeyMap:
    """The map of a network, read once; both CLIPs have one."""
    return key_map("clip") if network == "clip_g" else KeyMap(network)


def without_wrappers(name: str) -> str:
    """A tensor's name without what torch puts into it when a module, or one of its blocks, is compiled or sharded."""
    return WRAPPED.sub("", name)


def unwrapped(module: nn.Module) -> Any:
    """The module inside compiled, distributed, checkpointing and averaging wrappers. Raises ConfigError for what is not a module."""
    if not isinstance(module, nn.Module):
        hint = ": pass its .network" if isinstance(getattr(module, "network", None), nn.Module) else ""
        raise ConfigError(f"a network must be an nn.Module, not of type {type(module).__name__}{hint}")
    inner: nn.Module | None = module
    while inner is not None:
        module = inner
        inner = next((m for name in WRAPPERS if (m := module._modules.get(name)) is not None), None)
    return module
