"""Two traces side by side: what is equal, what differs, what was made where, and why."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import torch
from torch import Tensor, nn

from eridiff.errors import TraceError
from eridiff.trace.explain import causes_of
from eridiff.trace.format import parts_of, probe
from eridiff.trace.inputs import cause_of
from eridiff.trace.names import NETWORKS, nearest
from eridiff.trace.replay import Local, Run, amplified, floors, replay, trace_run
from eridiff.trace.report import BROKEN, CARRIED, EQUAL, HERE, Report, Row
from eridiff.trace.shapes import distances, fit, heat
from eridiff.trace.side import Side, configs_of, order_of, sides
from eridiff.trace.watch import METHODS

FAR = 1e-3  # from the other trace, where no value is wrong by itself: float32 sinusoids alone move Flux Fill by 2.5e-4


@dataclass(frozen=True)
class Replayed:
    """What our network says of a trace, run on the trace's own values."""

    run: Run
    places: Mapping[str, Local]
    eps: float  # of the trace's dtype
    rounding: Mapping[str, float] = field(default_factory=dict)  # what the trace's dtype does there on the right values
    amplified: Mapping[str, float] = field(default_factory=dict)  # what it does there on the trace's, where one differs

    def bound(self, native: str) -> float:
        """What rounding may do there."""
        least = max(self.eps, 1e-14)  # long sums in float64 are not better
        return max(10 * max(least, self.rounding.get(native.partition("[")[0], 0.0)), self.amplified.get(native, 0.0))


def compare(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    network: nn.Module | None = None,
    run: Callable[[torch.dtype], Run] | None = None,
    layout: tuple[str, str | None] | None = None,
    tolerance: float | None = None,
    explain: bool = False,
) -> Report:
    """Compare a trace with another.

    - found, expected: names to tensors, or traces; in any of the three namings, dtypes and arrangements.
    - network: eridiff's in float64, with the weights of `found`; errors are then found where they were made, by `replay`.
    - run: calls it, `dtype -> replay.arguments_run`; None is as the trace says that it was called.
    - layout: network and layout by whose names `found` is read (`names.parse_map`); None finds them.
    - tolerance: relative L2 that counts as equal; None is ten times what rounding to the coarser dtype does.
    - explain: try the known causes on what was made here.

    Raises TraceError when there is nothing to compare.
    """
    own = {name: network.config for name, kind in NETWORKS.items() if network is not None and isinstance(network, kind)}
    mine, theirs = sides(
        found, expected, {**configs_of(found), **configs_of(expected), **own}, layout or (next(iter(own), None), None)
    )
    order = order_of(mine, theirs)
    if not order and (network is None or not mine.network):
        near = [f"'{n}'" + (f" (nearest: '{like}')" if (like := nearest(n, expected)) else "") for n in list(found)[:3]]
        raise TraceError(
            f"no tensor of the two traces has the same name: {', '.join(near)}; give --map, or rename them"
        )
    dtype = mine.coarsest
    floor = eps = torch.finfo(dtype).eps
    far = 100 * floor
    replayed = None
    if network is not None and mine.network:
        replayed = _replayed(network, run, mine, theirs, dtype)
        order = [*replayed.places, *(n for n in order if n not in replayed.places)]
        floor = max(floor, median(replayed.rounding.values()) if replayed.rounding else 0.0)
        far = max(FAR, 100 * floor)
    rows: list[Row] = []
    before = 0.0  # the largest difference of what was computed before
    for native in order:
        rows.append(_row(native, mine, theirs, replayed, tolerance, eps, far, before))
        before = max(before, rows[-1].distance or 0.0)
    if explain:
        rows = _explained(rows, mine, theirs, network, replayed)
    return Report(
        tuple(rows),
        (*(theirs.name(n) for n in theirs.sources if n not in mine), *theirs.unknown),
        tuple(mine.name(n) for n in mine.sources if n not in theirs),
        tuple((n, nearest(n, map(theirs.name, theirs.sources))) for n in mine.unknown),
        str(dtype).removeprefix("torch."), floor, replayed is not None,
    )  # fmt: skip


def _replayed(
    network: nn.Module, run: Callable[[torch.dtype], Run] | None, mine: Side, theirs: Side, dtype: torch.dtype
) -> Replayed:
    kind = type(network)
    run = run or trace_run(kind, mine.trace, mine.sources) or trace_run(kind, theirs.trace, theirs.sources)
    if run is None:
        raise TraceError("neither trace has the network's inputs; record them (forward:latents, ...), or give a case")
    calls = run(torch.float64)
    places = {place.native: place for place in replay(network, mine.trace, mine.sources, calls)}
    rounding = floors(network, run, dtype, mine.sources) if dtype != torch.float64 else {}
    replayed = Replayed(calls, places, torch.finfo(dtype).eps, rounding)
    if all(place.relative <= replayed.bound(native) for native, place in places.items()):
        return replayed
    return replace(replayed, amplified=amplified(network, mine.trace, mine.sources, calls, places.values(), dtype))


def _row(
    native: str,
    mine: Side,
    theirs: Side,
    replayed: Replayed | None,
    tolerance: float | None,
    eps: float,
    far: float,
    before: float,
) -> Row:
    value = mine.read(native)
    row = Row(native, mine.name(native), theirs.name(native), "", EQUAL, None, None, 0.0)
    if not all(bool(part.isfinite().all()) for part in parts_of(value)):
        place = [int(i) for i in (~value.isfinite()).nonzero()[0]]
        count = int((~value.isfinite()).sum())
        how = f"{count} of {value.numel()} values are not finite, the first at {place}"
        return replace(row, how=how, verdict=BROKEN)
    eps = max(eps, theirs.eps(native))
    bound, far = tolerance or 10 * eps, tolerance or max(far, 100 * eps)
    fitted = None
    if native in theirs:
        value, wanted = _as_probes(native, mine, theirs)
        fitted = fit(value, wanted)
        if fitted is None:
            row = replace(row, how=f"{list(value.shape)} against {list(wanted.shape)}", distance=float("inf"))
        else:
            measures = distances(fitted.tensor, wanted)
            row = replace(row, how=fitted.how, distance=float(measures["relative"]), measures=measures)
    differs = (row.distance or 0.0) > far
    if replayed is not None and native in replayed.places:
        local = replayed.places[native]
        bound = tolerance or replayed.bound(native)
        # what was taken from the trace itself to call the network was compared with itself
        given = _is_input(native, mine) and local.relative == 0.0 and differs
        made = local.relative > bound or given
        row = replace(row, local=local.relative, how=row.how or local.how)
    else:
        made = (
            replayed is None
            and row.distance is not None
            and row.distance > max(bound, 10 * _carried(native, mine, theirs, before))
        )
        differs = (row.distance or 0.0) > max(bound, far)
    if made and fitted is not None:
        row = replace(row, measures={**row.measures, "map": heat(fitted.tensor, wanted)})
    return replace(row, bound=bound, verdict=HERE if made else CARRIED if differs else EQUAL)


def _as_probes(native: str, mine: Side, theirs: Side) -> tuple[Tensor, Tensor]:
    """The value of both sides, as probes where one of them is kept so."""
    value, wanted = mine.read(native), theirs.read(native)
    if mine.is_probe(native) == theirs.is_probe(native):
        return value, wanted
    return (value, probe(wanted)) if mine.is_probe(native) else (probe(value), wanted)


def _carried(native: str, mine: Side, theirs: Side, before: float) -> float:
    """How far the inputs of a module differ; what was computed before it, where they are not known."""
    known = []
    for name in mine.sources:
        if name.startswith(f"{native}:") and name in theirs:
            wanted = theirs.read(name)
            fitted = fit(mine.read(name), wanted)
            if fitted is not None:
                known.append(float(distances(fitted.tensor, wanted)["relative"]))
    return max(known, default=before)


def _is_input(native: str, side: Side) -> bool:
    """Whether it is what the network is given from outside; of the latents those of the first step alone.

    Where `forward` has inputs, it calls the other functions itself.
    """
    function, _, argument = native.partition(":")
    outside = ("forward",) if any(name.startswith("forward:") for name in side.sources) else METHODS
    return bool(argument) and function in outside and not argument.startswith("latents@")


# causes ---------------------------------------------------------------------------------------------------------------


def _explained(
    rows: Sequence[Row], mine: Side, theirs: Side, network: nn.Module | None, replayed: Replayed | None
) -> list[Row]:
    """The rows of errors with their causes: of inputs, of the network, or that a dtype is narrower than the trace's."""
    causes: dict[str, tuple[str, float] | None] = {}
    for row in (r for r in rows if r.verdict == HERE and _is_input(r.native, mine)):
        place = replayed.places.get(row.native) if replayed is not None else None
        wanted = theirs.read(row.native) if row.native in theirs else place.given if place is not None else None
        if wanted is not None:
            causes[row.native] = cause_of(row.native, mine.read(row.native), wanted, max(row.bound, 1e-6))
    local = {r.native: (r.local, r.bound) for r in rows if r.verdict != BROKEN and r.local is not None}
    if network is not None and replayed is not None and any(made > bound for made, bound in local.values()):
        of_network = causes_of(network, mine.trace, mine.sources, replayed.run, local)
        causes |= {native: cause for native, cause in of_network.items() if causes.get(native) is None}
    for row in (r for r in rows if r.verdict == HERE and r.local is not None and not causes.get(r.native)):
        causes[row.native] = _rounding(mine.read(row.native), row.local or 0.0)
    left: dict[str, float] = {}  # of each cause, the worst fit
    for cause in causes.values():
        if cause is not None:
            left[cause[0]] = max(cause[1], left.get(cause[0], 0.0))
    said = {
        native: f"{cause[0]} (fits to {left[cause[0]]:.0e})" for native, cause in causes.items() if cause is not None
    }
    return [replace(row, cause=said.get(row.native, "")) for row in rows]


def _rounding(value: Tensor, difference: float) -> tuple[str, float] | None:
    """The cause of values that are those of a narrower dtype than their own."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        eps = torch.finfo(dtype).eps
        if not value.is_floating_point() or eps <= torch.finfo(value.dtype).eps or difference > eps:
            continue
        if torch.equal(value.to(dtype).to(value.dtype), value):
            return f"it is rounded to {str(dtype).removeprefix('torch.')}", difference
    return None
