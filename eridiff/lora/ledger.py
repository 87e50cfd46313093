"""One row for each module that a LoRA file names: what became of it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

APPLIED = ("applied", "applied to a slice")
LEFT_OUT = "left out"  # on request: the other part


@dataclass(frozen=True)
class Row:
    """What became of one module of a file."""

    key: str  # its name in the file
    module: str = ""  # our name, with the rows of a slice; "" if there is none
    kind: str = "?"  # lora, loha, lokr, full, norm, ia3, set; with "+dora", "+bias"
    rank: int | None = None
    alpha: float | None = None  # as stored
    # alpha / rank, or what the format has in its place, at strength 1; None if nothing is applied
    scale: float | None = None
    change: float | None = None  # |dW| / |W| at strength 1, Frobenius; None where not asked for
    # applied, applied to a slice, dead, left out, embedding, unmatched, no text encoder here, shape mismatch
    status: str = APPLIED[0]
    note: str = ""


def table(rows: Sequence[Row]) -> str:
    """The rows as text, most important column first, and a line that counts them."""
    head = ("status", "file key", "module", "kind", "rank", "alpha", "scale", "|dW|/|W|", "note")
    lines = [head] + [
        (
            row.status, row.key, row.module or "-", row.kind, _number(row.rank), _number(row.alpha), _number(row.scale),
            _number(row.change), row.note,
        )
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, counted(rows)])


def counted(rows: Sequence[Row]) -> str:
    """How many rows have which status."""
    counts = Counter(row.status for row in rows)
    return f"{len(rows)} modules: " + ", ".join(f"{count} {status}" for status, count in counts.items())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
