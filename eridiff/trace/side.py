"""One side of a comparison, a trace by our names, and how two sides are brought together."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eridiff.trace.format import Trace, natural
from eridiff.trace.names import NETWORKS, Source, align, twin


@dataclass(frozen=True)
class Side:
    """A trace whose tensors are read by our names."""

    trace: Mapping[str, Tensor]
    network: str  # "" if the names are compared as they are
    sources: Mapping[str, Source]  # our name -> how it is read
    unknown: tuple[str, ...]  # the trace's names that no map knows

    def __contains__(self, native: str) -> bool:
        return native in self.sources

    def read(self, native: str) -> Tensor:
        """The tensor; complex numbers are pairs of real ones along a new last axis."""
        found = self.sources[native].read(self.trace)
        return torch.view_as_real(found) if found.is_complex() else found

    def name(self, native: str) -> str:
        """As the trace has it; empty if it does not."""
        return self.sources[native].name if native in self.sources else ""

    def dtype(self, native: str) -> torch.dtype:
        return torch.as_tensor(self.trace[self.sources[native].names[0]]).dtype.to_real()

    def eps(self, native: str) -> float:
        """Of the tensor's dtype; of float64 for whole numbers, and for what the trace does not have."""
        dtype = self.dtype(native) if native in self.sources else torch.float64
        return torch.finfo(dtype if dtype.is_floating_point else torch.float64).eps

    @property
    def coarsest(self) -> torch.dtype:
        found = [d for d in map(self.dtype, self.sources) if d.is_floating_point]
        return max(found, key=lambda d: torch.finfo(d).eps, default=torch.float64)

    @property
    def ordered(self) -> bool:
        """Whether the trace says the order of computation."""
        return getattr(self.trace, "ordered", True)

    def is_probe(self, native: str) -> bool:
        return self.sources[native].names[0] in getattr(self.trace, "probes", {})


def sides(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    configs: Mapping[str, Any],
    layout: tuple[str | None, str | None] = (None, None),
) -> tuple[Side, Side]:
    """Both traces by the same names; `layout` is the network and the layout whose names the first has, None finds it."""
    kind, way = layout
    names = align(list(found), configs, way, kind)
    others = align(list(expected), configs, None, names.network or None)
    if names.network == others.network:
        mine = Side(found, names.network, names.sources, names.unknown)
        theirs = Side(expected, others.network, others.sources, others.unknown)
    else:
        mine, theirs = (Side(trace, "", {n: Source((n,)) for n in trace}, ()) for trace in (found, expected))
    both = {name: Source((name,)) for name in theirs.unknown if name in mine.unknown}
    mine, theirs = (
        replace(side, sources={**side.sources, **both}, unknown=tuple(n for n in side.unknown if n not in both))
        for side in (mine, theirs)
    )
    if any(getattr(side.trace, "probes", {}) for side in (mine, theirs)):  # which cannot be joined or cut
        mine, theirs = (
            replace(side, sources={n: s for n, s in side.sources.items() if s.operation == "same"})
            for side in (mine, theirs)
        )
    return _outputs_in_order(mine, theirs), theirs


def _outputs_in_order(mine: Side, theirs: Side) -> Side:
    """Of two outputs that one implementation gives in the other order, each by the name of that whose shape it has."""
    moved: dict[str, Source] = {}
    for native, source in mine.sources.items():
        other, swapped = twin(native), False
        if other in theirs and native in theirs:
            own = mine.read(native).shape
            swapped = theirs.read(native).shape != own == theirs.read(other).shape
        moved[other if swapped else native] = source
    return replace(mine, sources=moved)


def order_of(mine: Side, theirs: Side) -> list[str]:
    """Our names of what both have, in the order of the one that says one."""
    shared = [n for n in theirs.sources if n in mine]
    if theirs.ordered:
        return shared
    return [n for n in mine.sources if n in theirs] if mine.ordered else sorted(shared, key=natural)


def configs_of(trace: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a trace says of the networks' configurations, by network."""
    said = trace.metadata.get("eridiff.config", {}) if isinstance(trace, Trace) else {}
    made = {}
    for network, values in said.items() if isinstance(said, dict) else ():
        if network in NETWORKS:
            kind = NETWORKS[network].__init__.__annotations__["config"]
            made[network] = kind(**{k: _tuples(v) for k, v in values.items()})
    return made


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
