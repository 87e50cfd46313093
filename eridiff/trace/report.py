"""What a comparison finds: a row for each tensor, and which rows show one error."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

EQUAL, CARRIED, HERE, BROKEN = "equal", "carried", "made here", "not finite"
STREAMS = {"image", "text"}  # of a block


@dataclass(frozen=True)
class Row:
    """One tensor of both traces, or, with a replay, of one alone."""

    native: str  # in our names
    name: str  # as the first trace has it
    other: str  # as the second has it; empty if it does not
    how: str  # in which arrangement; empty if in the same
    verdict: str
    distance: float | None  # relative L2 from the second trace; infinite if the shapes do not fit
    local: float | None  # relative L2 from what our network computes of the first trace's own values before it
    bound: float  # what rounding may do there
    measures: Mapping[str, Any] = field(default_factory=dict)  # of `shapes.distances`; "map" of an error: `shapes.heat`
    cause: str = ""

    @property
    def place(self) -> str:
        """The same for each block, call and stream, and for all inputs of a module: an error of all is one error."""
        parts = self.native.partition("@")[0].replace(":", ".:.").split(".")
        numbers = {
            i for i, part in enumerate(parts) if part.isdigit() and parts[i - 1] != "mlp"
        }  # two layers, not blocks
        return ".".join(part for i, part in enumerate(parts) if i not in numbers and part not in STREAMS)


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
            found.setdefault((row.verdict, row.cause or row.place), []).append(row)
        return list(found.values())

    @property
    def alone(self) -> list[str]:
        """Names of the first trace that were compared with nothing: of more calls, or of what our network does not have."""
        seen = {row.name for row in self.rows}
        return [name for name in self.added if name not in seen]

    def right(self, group: list[Row]) -> list[Row]:
        """The rows of the same places without an error: those of other blocks, calls or streams."""
        places = {row.place for row in group}
        return [
            row
            for row in self.rows
            if row.place in places and row.verdict not in (HERE, BROKEN) and row.local is not None
        ]

    def as_json(self) -> dict[str, Any]:
        plain = asdict(self)
        for row in plain["rows"]:
            row["measures"].pop("map", None)  # an image
        return {**plain, "equal": self.equal, "errors": [[row.name for row in group] for group in self.groups()]}
