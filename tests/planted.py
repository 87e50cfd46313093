"""How `eridiff diff` does on ports with planted errors: `python -m tests.planted [FAMILY[:LAYOUT[:DTYPE]] ...]` prints the table of docs/porting.md.

Each error alone and in threes, in float64 and float32, the port and the reference both named as eridiff's, the original's and diffusers'
modules: in how many traces the first divergence is the right one, and of how many errors the cause is the one that is named.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np

from eridiff.trace.compare import floors
from eridiff.weights.keymap import key_map
from tests.bugs import BUGS, alone, case_of, triples
from tests.ports import Report, beside_reference, case, native_names, ported


@dataclass(frozen=True)
class Score:
    """Of one trace: whether its first divergence is right, the errors whose cause is not named, and how many places it names."""

    first: bool
    unnamed: tuple[str, ...]
    places: int


def score(family: str, names: Sequence[str], dtype: type, layout: str) -> tuple[Score, Report]:
    """What the report says of a port with these errors."""
    bugs = {name: BUGS[family][name] for name in names}
    golden = case(case_of(family, names))
    trace = ported(golden, list(bugs.values()), dtype)
    place_of = native_names(golden, trace)
    report, native = beside_reference(golden, trace, layout, explain=True)
    groups = [([native(row.name) for row in group], group[0].cause) for group in report.groups()]
    order = [native(row.name) for row in report.rows]
    firsts = {name: place_of[bug.first] for name, bug in bugs.items()}
    wanted = min(firsts.values(), key=order.index)
    unnamed = [
        n for n, bug in bugs.items() if not any(bug.says in cause and firsts[n] in rows for rows, cause in groups)
    ]
    return Score(bool(groups) and groups[0][0][0] == wanted, tuple(unnamed), len(groups)), report


def layouts(family: str) -> list[str]:
    return ["native", *key_map(family).layouts]


def rows_of(asked: str) -> list[tuple[str, str, type]]:
    """`unet`, `unet:diffusers` or `unet:diffusers:float32` -> family, layout and dtype of each row of the table."""
    family, layout, dtype = (*asked.split(":"), "", "")[:3]
    return [
        (family, name, kind)
        for name in ([layout] if layout else layouts(family))
        for kind in (np.float64, np.float32)
        if dtype in ("", kind.__name__)
    ]


def once(measure: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
    """What rounding does to the right values is the same whatever error is planted: computed once for the same names."""
    known: dict[Any, dict[str, float]] = {}

    def of(network: Any, run: Any, dtype: Any, names: Any) -> dict[str, float]:
        key = (id(network), dtype, frozenset(names))
        return known[key] if key in known else known.setdefault(key, measure(network, run, dtype, names))

    return of


def main(asked: Sequence[str]) -> int:
    print(
        f"{'':22} {'alone':>22} {'in threes':>26}\n{'':22} {'first':>11} {'cause':>10} {'first':>15} {'cause':>10}",
        flush=True,
    )
    wrong, rounding = [], once(floors)
    for rows in map(rows_of, asked):
        for family, layout, dtype in rows:
            cells = []
            for sets in ([(name,) for name in alone(family, dtype)], triples(family, dtype)):
                with patch.object(sys.modules["eridiff.trace.compare"], "floors", rounding):
                    scores = [score(family, names, dtype, layout)[0] for names in sets]
                count = sum(map(len, sets))
                named = count - sum(len(s.unnamed) for s in scores)
                cells += [f"{sum(s.first for s in scores)} of {len(sets)}", f"{named} of {count}"]
                for names, found in zip(sets, scores, strict=True):
                    if not found.first or found.unnamed:
                        place = "" if found.first else "first divergence elsewhere; "
                        wrong.append(
                            f"{family} {layout} {dtype.__name__} {' + '.join(names)}: {place}not named: {', '.join(found.unnamed) or '-'}"
                        )
            label = f"{family} {layout} {dtype.__name__}"
            print(f"{label:22} {cells[0]:>11} {cells[1]:>10} {cells[2]:>15} {cells[3]:>10}", flush=True)
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(BUGS)))
