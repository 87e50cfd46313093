"""Whether what a LoRA file says of a module is whole and fits: the sentences; the rules are with the formulas, in deltas.py."""

from collections.abc import Sequence

from eridiff.errors import LoraError
from eridiff.lora import hints
from eridiff.lora.deltas import EITHER, FACTORED, KINDS, Item, Tensors, demands
from eridiff.lora.formats import Source
from eridiff.lora.names import Target


class Misshapen(LoraError):
    """A module's tensors do not fit together, or not the network."""


class Incomplete(LoraError):
    """A module lacks a tensor."""


def check_roles(source: Source, kind: str) -> None:
    """Raises Incomplete for a module without a tensor of each needed group, LoraError for one with a tensor too many."""
    roles = set(source.names)
    if not kind:
        raise Incomplete(f"{source} is incomplete: it has only {', '.join(map(repr, source.names.values()))}")
    for group in KINDS[kind].needed:
        if not roles.intersection(group):
            raise Incomplete(f"{source} is incomplete: '{hints.missing(source, group[0])}' is missing")
    strange = roles - KINDS[kind].marks - set(KINDS[kind].shared)
    if strange:
        raise LoraError(f"'{source.names[min(strange)]}' has no place in a module of the kind {kind}")
    for whole, factors in EITHER:
        if whole <= roles and factors & roles:
            both = [source.names[min(whole)], source.names[min(factors & roles)]]
            raise LoraError(f"'{both[0]}' and '{both[1]}' are two forms of one matrix; keep one")


def check_shapes(source: Source, target: Target, kind: str, t: Tensors, shape: tuple[int, ...]) -> None:
    """Raises LoraError unless the tensors make a change of the target's shape."""
    if kind in (*FACTORED, "ia3") and len(shape) < 2:
        raise LoraError(f"{source} changes {target}, which has no matrix")
    for met, role, wanted in demands(kind, t, shape):
        if not met and not role:
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in t.items() if tensor.ndim)
            raise Misshapen(f"{source}: the shapes {shapes} do not make {target}'s {list(shape)}")
        if not met:
            raise Misshapen(f"'{source.names[role]}' has the shape {list(t[role].shape)}, and {target} of shape {list(shape)} needs {wanted}")  # fmt: skip


def check_overlaps(items: Sequence[Item]) -> None:
    """Raises LoraError for two modules that change the same rows of the same tensor: to add both would be a guess."""
    seen: dict[tuple[str, str], list[tuple[Item, range]]] = {}
    for item in items:
        for kind, changes in (("weight", item.changes_weight), ("bias", item.changes_bias)):
            if changes:
                place = (item.target.network, f"{item.target.name} {kind}")
                rows = range(*(item.target.rows or (0, 1 << 40)))
                for other, taken in seen.setdefault(place, []):
                    if max(rows.start, taken.start) < min(rows.stop, taken.stop):
                        raise LoraError(f"'{other.key}' and '{item.key}' both change {item.target.module}; keep one")
                seen[place].append((item, rows))
