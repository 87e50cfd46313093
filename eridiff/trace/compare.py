"""Two traces side by side: what is equal, what differs, what was made where, and why."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from eridiff.errors import TraceError
from eridiff.trace.causes import causes_of
from eridiff.trace.format import Trace, natural, parts_of, probe
from eridiff.trace.inputs import cause_of
from eridiff.trace.names import NETWORKS, Aligned, Source, align, nearest
from eridiff.trace.replay import Run, floors, replay, trace_run
from eridiff.trace.shapes import distances, fit
from eridiff.trace.watch import METHODS

EQUAL, CARRIED, HERE, BROKEN = "equal", "carried", "made here", "not finite"
FAR = 1e-3  # from the other trace, where no value is wrong by itself: float32 sinusoids alone move Flux Fill by 2.5e-4
NAMED = 3  # names of a kind that are printed; the rest is counted


@dataclass(frozen=True)
class Row:
    """One tensor of both traces, or, with a replay, of one alone."""

    name: str  # as the first trace has it
    other: str  # as the second has it; empty if it does not
    how: str  # in which arrangement; empty if in the same
    verdict: str
    distance: float | None  # relative L2 from the second trace; infinite if the shapes do not fit
    local: float | None  # relative L2 from what our network computes of the first trace's own values before it
    bound: float  # what rounding may do there
    measures: Mapping[str, Any] = field(default_factory=dict)  # of `shapes.distances`
    cause: str = ""


@dataclass(frozen=True)
class Report:
    """What `eridiff diff` prints."""

    rows: tuple[Row, ...]  # in the order of computation
    missing: tuple[str, ...]  # the second trace has them
    added: tuple[str, ...]  # the first has them
    unknown: tuple[tuple[str, str], ...]  # names of the first that no map knows, and the nearest name
    dtype: str
    floor: float
    replayed: bool

    @property
    def equal(self) -> bool:
        return all(row.verdict == EQUAL for row in self.rows)

    @property
    def made(self) -> list[Row]:
        """The rows at which an error was made, in the order of computation; what is not finite comes first of all."""
        return sorted((r for r in self.rows if r.verdict in (HERE, BROKEN)), key=lambda r: r.verdict != BROKEN)

    def groups(self) -> list[list[Row]]:
        """Rows that show one error: those of one cause, else those of one place in each block."""
        found: dict[tuple[str, str], list[Row]] = {}
        for row in self.made:
            place = ".".join(part for part in row.name.replace(":", ".").split(".") if not part.isdigit())
            found.setdefault((row.verdict, row.cause or place), []).append(row)
        return list(found.values())

    def as_json(self) -> dict[str, Any]:
        plain = asdict(self)
        for row in plain["rows"]:
            row["measures"].pop("map", None)  # an image
        return {**plain, "equal": self.equal, "errors": [[row.name for row in group] for group in self.groups()]}


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
    configs = {**_configs(found), **_configs(expected), **({} if network is None else _config_of(network))}
    kind, way = layout or (None, None)
    mine = align(list(found), configs, way, kind)
    theirs = align(list(expected), configs, None, mine.network or None)
    if mine.network != theirs.network:
        plain = [Aligned("", "native", {n: Source((n,)) for n in names}, ()) for names in (found, expected)]
        mine, theirs = plain
    literal = {name: Source((name,)) for name in theirs.unknown if name in mine.unknown}
    mine, theirs = (
        replace(side, sources=side.sources | literal, unknown=tuple(n for n in side.unknown if n not in literal))
        for side in (mine, theirs)
    )
    mine, theirs = (_whole(side, found, expected) for side in (mine, theirs))
    mine = _outputs_in_order(mine, theirs, found, expected)
    shared = [n for n in theirs.sources if n in mine.sources]
    if not shared and (network is None or not mine.network):
        near = [f"'{n}' (nearest: '{nearest(n, expected)}')" for n in list(found)[:3]]
        raise TraceError(
            f"no tensor of the two traces has the same name: {', '.join(near)}; give --map, or rename them"
        )
    dtypes = {native: _dtype(source, found) for native, source in mine.sources.items()}
    dtype = max(
        (d for d in dtypes.values() if d.is_floating_point), key=lambda d: torch.finfo(d).eps, default=torch.float64
    )
    rows, floor = [], torch.finfo(dtype).eps
    far = 100 * floor
    order = _order(mine, theirs, found, expected)
    local: dict[str, tuple[float, float, str]] = {}
    calls: Run | None = None
    if network is not None and mine.network:
        run = run or _called(network, found, mine) or _called(network, expected, theirs)
        if run is None:
            raise TraceError(
                "neither trace has the network's inputs; record them (forward:latents, ...), or give a case"
            )
        calls = run(torch.float64)
        visited = replay(network, found, mine.sources, calls)
        rounding = floors(network, run, dtype, mine.sources) if dtype != torch.float64 else {}
        floor = max(floor, median(rounding.values()) if rounding else 0.0)
        far = max(FAR, 100 * floor)
        for place in visited:
            least = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-14
            bound = tolerance or 10 * max(least, rounding.get(place.native.partition("[")[0], 0.0))
            local[place.native] = place.relative, bound, place.how
        order = [*local, *(n for n in order if n not in local)]
    before = 0.0  # the largest difference of what was computed before
    for native in order:
        row = _row(
            native, mine, theirs, found, expected, local.get(native), tolerance, dtype, far, before, calls is not None
        )
        before = max(before, row.distance or 0.0)
        rows.append(row)
    if explain:
        rows = [_with_cause_of_input(n, row, mine, theirs, found, expected) for n, row in zip(order, rows, strict=True)]
    if explain and network is not None and calls is not None:
        known = {
            n: (r.local, r.bound)
            for n, r in zip(order, rows, strict=True)
            if r.verdict != BROKEN and r.local is not None
        }
        made = any(difference > bound for difference, bound in known.values())
        causes = causes_of(network, found, mine.sources, calls, known) if made else {}
        rows = [
            row if row.cause or n not in causes else replace(row, cause=f"{causes[n][0]} (fits to {causes[n][1]:.0e})")
            for n, row in zip(order, rows, strict=True)
        ]
        rows = _one_fit(rows)
    return Report(
        tuple(rows),
        (*(s.name for n, s in theirs.sources.items() if n not in mine.sources), *theirs.unknown),
        tuple(s.name for n, s in mine.sources.items() if n not in theirs.sources),
        tuple((n, nearest(n, [s.name for s in theirs.sources.values()])) for n in mine.unknown),
        str(dtype).removeprefix("torch."), floor, calls is not None,
    )  # fmt: skip


def _is_input(native: str, names: Mapping[str, Any]) -> bool:
    """Whether it is what the network is given from outside; of the latents those of the first step alone.

    Where `forward` has inputs, it calls the other functions itself.
    """
    function, _, argument = native.partition(":")
    outside = ("forward",) if any(name.startswith("forward:") for name in names) else METHODS
    return bool(argument) and function in outside and not argument.startswith("latents@")


def _with_cause_of_input(
    native: str, row: Row, mine: Aligned, theirs: Aligned, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> Row:
    if row.verdict != HERE or not row.other or not _is_input(native, mine.sources):
        return row
    value, wanted = mine.sources[native].read(found), theirs.sources[native].read(expected)
    cause = cause_of(native, value, wanted, max(row.bound, 1e-6))
    return replace(row, cause=f"{cause[0]} (fits to {cause[1]:.0e})") if cause else row


def _called(network: nn.Module, trace: Mapping[str, Tensor], aligned: Aligned) -> Callable[[torch.dtype], Run] | None:
    """The network's calls as a trace has them."""
    if trace_run(type(network), trace, aligned.sources) is None:
        return None
    return lambda dtype: trace_run(type(network), trace, aligned.sources, dtype)  # type: ignore[return-value]


def _whole(aligned: Aligned, *traces: Mapping[str, Tensor]) -> Aligned:
    """Without what is joined or cut, where a trace has only probes of its tensors."""
    if not any(getattr(trace, "probes", {}) for trace in traces):
        return aligned
    return replace(aligned, sources={n: s for n, s in aligned.sources.items() if s.operation == "same"})


def _outputs_in_order(
    mine: Aligned, theirs: Aligned, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> Aligned:
    """Of two outputs that one implementation gives in the other order, each by the name of that whose shape it has."""

    def shape(source: Source, trace: Mapping[str, Tensor]) -> list[int]:
        return list(source.read(trace).shape)

    moved: dict[str, Source] = {}
    for native, source in mine.sources.items():
        base, _, index = native.partition("@")[0].rpartition(".")
        other = f"{base}.{1 - int(index)}{native[len(base) + 2 :]}" if index in ("0", "1") else native
        if other in theirs.sources and native in theirs.sources and other != native:
            own, wanted, swapped = shape(source, found), *(shape(theirs.sources[n], expected) for n in (native, other))
            moved[other if own != wanted and own == swapped else native] = source
        else:
            moved[native] = source
    return replace(mine, sources=moved)


def _one_fit(rows: list[Row]) -> list[Row]:
    """Rows of one cause say the same, the worst fit, so that they are one group."""
    fits: dict[str, str] = {}
    for row in rows:
        says = row.cause.partition(" (fits")[0]
        fits[says] = max(fits.get(says, ""), row.cause, key=_residue)
    return [replace(row, cause=fits[row.cause.partition(" (fits")[0]]) if row.cause else row for row in rows]


def _residue(cause: str) -> float:
    return float(cause.rpartition(" ")[2].rstrip(")")) if cause else -1.0


def _order(mine: Aligned, theirs: Aligned, found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """The names that both have, in the order of the one that says one."""
    shared = [n for n in theirs.sources if n in mine.sources]
    if getattr(expected, "ordered", True):
        return shared
    if getattr(found, "ordered", True):
        return [n for n in mine.sources if n in theirs.sources]
    return sorted(shared, key=natural)


def _row(
    native: str, mine: Aligned, theirs: Aligned, found: Mapping[str, Tensor], expected: Mapping[str, Tensor],
    local: tuple[float, float, str] | None, tolerance: float | None, dtype: torch.dtype, far: float, before: float,
    replayed: bool,
) -> Row:  # fmt: skip
    source, other = mine.sources[native], theirs.sources.get(native)
    value = source.read(found)
    if not all(bool(part.isfinite().all()) for part in parts_of(value)):
        place = [int(i) for i in (~value.isfinite()).nonzero()[0]]
        count = int((~value.isfinite()).sum())
        how = f"{count} of {value.numel()} values are not finite, the first at {place}"
        return Row(source.name, other.name if other else "", how, BROKEN, None, None, 0.0)
    eps = max(torch.finfo(d).eps for d in (dtype, _floating(other, expected)))
    bound, far = tolerance or 10 * eps, tolerance or max(far, 100 * eps)
    how, distance, measures = "", None, {}
    if other is not None:
        value, wanted = _as_probes(value, other.read(expected), source, other, found, expected)
        fitted = fit(value, wanted)
        if fitted is None:
            how, distance = f"{list(value.shape)} against {list(wanted.shape)}", float("inf")
        else:
            measures = distances(fitted.tensor, wanted)
            how, distance = fitted.how, float(measures["relative"])
    names = source.name, other.name if other else "", how or (local[2] if local else "")
    if local is not None:
        # what was taken from the trace itself to call the network was compared with itself
        given = _is_input(native, mine.sources) and distance is not None and local[0] == 0.0 and distance > far
        verdict = HERE if local[0] > local[1] or given else CARRIED if (distance or 0.0) > far else EQUAL
        return Row(*names, verdict, distance, local[0], local[1], measures)
    if distance is None:
        return Row(*names, EQUAL, None, None, bound)
    inputs = [_distance(n, mine, theirs, found, expected) for n in mine.sources if n.startswith(f"{native}:")]
    known = [d for d in inputs if d is not None]
    made = not replayed and distance > max(bound, 10 * (max(known) if known else before))
    verdict = HERE if made else CARRIED if distance > max(bound, far) else EQUAL
    return Row(*names, verdict, distance, None, bound, measures)


def _distance(
    native: str, mine: Aligned, theirs: Aligned, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> float | None:
    if native not in theirs.sources:
        return None
    wanted = theirs.sources[native].read(expected)
    fitted = fit(mine.sources[native].read(found), wanted)
    return None if fitted is None else float(distances(fitted.tensor, wanted)["relative"])


def _as_probes(
    value: Tensor,
    wanted: Tensor,
    source: Source,
    other: Source,
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Both as probes where one of them is kept so."""
    short = [s.names[0] in getattr(side, "probes", {}) for s, side in ((source, found), (other, expected))]
    if any(short):
        return (value if short[0] else probe(value)), (wanted if short[1] else probe(wanted))
    return value, wanted


def _dtype(source: Source, trace: Mapping[str, Tensor]) -> torch.dtype:
    return torch.as_tensor(trace[source.names[0]]).dtype


def _floating(source: Source | None, trace: Mapping[str, Tensor]) -> torch.dtype:
    dtype = torch.float64 if source is None else _dtype(source, trace)
    return dtype if dtype.is_floating_point else torch.float64


def _configs(trace: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a trace says of the networks' configurations."""
    said = trace.metadata.get("eridiff.config", {}) if isinstance(trace, Trace) else {}
    made = {}
    for network, values in said.items() if isinstance(said, dict) else ():
        if network in NETWORKS:
            kind = NETWORKS[network].__init__.__annotations__["config"]
            made[network] = kind(**{k: _tuples(v) for k, v in values.items()})
    return made


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _config_of(network: nn.Module) -> dict[str, Any]:
    return {name: network.config for name, kind in NETWORKS.items() if isinstance(network, kind)}
