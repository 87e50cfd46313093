"""The sections of `benchmarks/gpu.py`: what becomes of them, their tables, their file."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_measure import Budget, OutOfTime, free


@dataclass
class Section:
    """A part of the run, and what became of it."""

    name: str
    what: str
    expected_seconds: float
    work: Callable[["Bench"], None]
    outcome: str = "not run"
    why: str | None = "the run ended before"
    seconds: float = 0.0
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)  # what a process of its own said of its errors

    def record(self) -> dict[str, Any]:
        rows = [{"name": name, **row} for name, row in self.rows.items()]
        return {k: v for k, v in vars(self).items() if k != "work"} | {"rows": rows}


@dataclass
class Bench:
    """What every section is given."""

    device: torch.device
    budget: Budget
    tiny: bool
    host_bytes: float  # free memory of the host; 0 where nobody says
    sections: list[Section] = field(default_factory=list)
    section: Section = field(default_factory=lambda: Section("", "", 0, lambda _: None))  # the one that runs
    rates: tuple[float, float] | None = None  # FLOP/s, bytes/s
    flops: dict[str, int] = field(default_factory=dict)  # of a case's forward

    def row(self, name: str, outcome: str = "done", why: str | None = None, **values: Any) -> None:
        """Put a row into the section's table, in place of an earlier one of that name."""
        self.section.rows[name] = {"outcome": outcome, "why": why, **values}

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """An error within the block becomes the row of that name."""
        try:
            yield
        except Exception as error:
            self.row(name, "failed", said(error))

    @property
    def compiler(self) -> dict[str, Any]:
        """Options of torch.compile; on the CPU inductor takes minutes, and nothing is to be measured."""
        return {"backend": "eager"} if self.tiny else {}


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def run_section(bench: Bench, section: Section) -> None:
    if bench.budget.left < section.expected_seconds:
        section.why = f"about {section.expected_seconds:.0f} s are needed, {max(0, bench.budget.left):.0f} s were left"
        return
    bench.section, begun = section, time.monotonic()
    section.outcome, section.why = "done", None
    try:
        with bench.budget.limit():
            section.work(bench)
    except OutOfTime:
        section.outcome, section.why = "stopped", "the time was spent"
    except Exception as error:
        section.outcome, section.why = "failed", said(error)
    if any(row["outcome"] == "failed" for row in section.rows.values()):
        section.outcome = "failed"
    section.seconds = time.monotonic() - begun
    free(bench.device)


def shown(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(shown, value))
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 0.001 else f"{value:.4g}"
    return "" if value is None else str(value)


def table(section: Section) -> str:
    """A section as Markdown, with the columns that its rows have."""
    why = f": {section.why}" if section.why else ""
    head = f"\n## {section.name}: {section.what}\n{section.outcome}{why}; {section.seconds:.0f} s"
    columns = list(dict.fromkeys(c for row in section.rows.values() for c, v in row.items() if v is not None))
    if not columns:
        return head
    lines = ["| " + " | ".join(["", *columns]) + " |", "|" + "---|" * (len(columns) + 1)]
    for name, row in section.rows.items():
        lines.append("| " + " | ".join([name, *(shown(row.get(c)) for c in columns)]) + " |")
    return head + "\n\n" + "\n".join(lines)


def write(path: Path, machine: dict[str, Any], options: dict[str, Any], bench: Bench) -> None:
    """The file is whole at any time."""
    found = {"machine": machine, "options": options, "sections": [section.record() for section in bench.sections]}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(found, indent=1) + "\n")
    temporary.replace(path)
