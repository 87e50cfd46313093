"""The commands `eridiff diff` and `eridiff ladder`: where two traces part and why; what rounding alone does."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eridiff.errors import TraceError
from eridiff.files import replacing
from eridiff.trace.cases import Case, find_case
from eridiff.trace.compare import compare
from eridiff.trace.format import Trace, read_trace
from eridiff.trace.names import align, parse_map
from eridiff.trace.page import page
from eridiff.trace.report import BROKEN, HERE, Report, Row
from eridiff.trace.text import ENCODERS, load_encoder
from eridiff.weights.load import load_network

NAMED = 3  # names of a kind that are printed; the rest is counted


def add_parser(commands: Any) -> None:
    """Put `diff` beside the other commands."""
    parser = commands.add_parser(
        "diff",
        help="find the first tensor that differs",
        description="Compare the tensors of two programs; 0 if they are equal, 1 if not, 2 if they cannot be compared.",
    )
    parser.set_defaults(run=_diff)
    parser.add_argument("found", metavar="A", help="your trace: a safetensors file, an .npz or a folder of .npy")
    parser.add_argument("expected", metavar="B", help="what it should be: a trace, or a golden case by name or folder")
    parser.add_argument(
        "--map", metavar="NETWORK[:LAYOUT]", help="whose names A has: flux:diffusers; detected by default"
    )
    parser.add_argument("--weights", metavar="FILE", help="the checkpoint that A ran, if B is not a case")
    parser.add_argument(
        "--tolerance", type=float, metavar="T", help="relative L2 that counts as equal; ten times the rounding"
    )
    parser.add_argument("--explain", action="store_true", help="try the errors that ports make, and name what fits")
    parser.add_argument("--all", action="store_true", help="print a line for every tensor")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a report: error over depth, heat maps, the table"
    )
    parser.add_argument("--json", action="store_true", help="everything, for programs")


def _diff(options: argparse.Namespace) -> int:
    found, layout = read_trace(options.found), parse_map(options.map) if options.map else None
    case = None if Path(options.expected).is_file() else find_case(options.expected)
    told: dict[str, Any] = {"layout": layout, "tolerance": options.tolerance, "explain": options.explain}
    if case is not None:
        report = case_report(found, case, **told)
    else:
        network = _network(options.weights, layout[0] if layout else "", found) if options.weights else None
        if options.explain and network is None:
            raise TraceError(
                "to explain a difference needs the weights: give --weights FILE, or compare with a golden case"
            )
        report = compare(found, read_trace(options.expected), network=network, **told)
    if options.html:
        with replacing(options.html) as temporary:
            temporary.write_text(page(report, f"{options.found} beside {options.expected}"), encoding="utf-8")
    print(json.dumps(report.as_json(), default=str) if options.json else text(report, case, options.all))
    return 0 if report.equal else 1


def _network(weights: str, network: str, found: Trace) -> nn.Module:
    """The network of a checkpoint in float64: the one that `--map` names, or by whose names most of the trace is known."""
    network = network or align(list(found)).network
    if network in ENCODERS:
        return load_encoder(weights, network)
    return load_network(weights, dtype=torch.float64, progress=False)


def case_report(found: Trace, case: Case, **options: Any) -> Report:
    """A trace beside a golden case, whose weights and inputs are known."""
    return compare(found, case.expected, network=case.network, run=case.run, **options)


def text(report: Report, case: Case | None = None, whole: bool = False) -> str:
    """The report for a terminal."""
    compared = [row for row in report.rows if row.other]
    lines = [
        f"{len(compared)} of {len(compared) + len(report.missing)} tensors compared"
        + (f" ({len(report.missing)} missing in yours: {_some(report.missing)})" if report.missing else "")
        + f"; noise floor of {report.dtype} here {report.floor:.0e}"
    ]
    if report.unknown:
        said = [f"{name} (nearest: {near})" if near else name for name, near in report.unknown]
        lines.append(f"{len(said)} names in yours are unknown: {_some(said)}")
    if report.alone:
        lines.append(f"{len(report.alone)} in yours alone: {_some(report.alone)}")
    arranged: dict[str, list[Row]] = {}
    for row in report.rows:
        if row.how and row.verdict not in (HERE, BROKEN):
            arranged.setdefault(row.how.partition(": ")[2], []).append(row)
    for rows in arranged.values():
        more = f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""
        lines.append(f"{rows[0].name}: {rows[0].how}{more}")
    width = max((len(row.name) for row in report.rows), default=0)
    groups = report.groups()
    for number, group in enumerate(groups):
        first = group[0]
        lines.append(
            f"{first.name:{width}}  {_size(first)}  {'FIRST' if number == 0 else 'ALSO MADE HERE'}{_what(first)}"
        )
        if len(group) > 1:
            lines.append(f"    and in {len(group) - 1} more: {_some([row.name for row in group[1:]])}")
        if first.cause:
            lines.append(f"    looks like: {first.cause}")
        elif right := report.right(group):
            lines.append(f"    and right in {len(right)}: {_some([row.name for row in right])}")
    if whole:
        lines += _table(report, width)
    carried = sum(row.verdict not in (HERE, BROKEN, "equal") for row in report.rows)
    if groups:
        kind = "error" if all(group[0].cause for group in groups) else "place"  # of which several may be one error
        lines.append(
            f"{_count(len(groups), kind)}; {_count(carried, 'tensor')} behind {'it' if len(groups) == 1 else 'them'} {'differs' if carried == 1 else 'differ'}"
            + _known(report)
        )
    elif carried:
        lines.append(
            f"{_count(carried, 'tensor')} differ, though each follows from those before it: other inputs, or other weights"
        )
    else:
        lines.append("equal")
    if case is not None and not groups and case.epsilons != case.name:
        lines.append(f"a wrong epsilon may not show in {case.name}: compare with {case.epsilons} too")
    return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")


def _known(report: Report) -> str:
    if report.replayed:
        return " by what is carried on alone"
    return "; whether by more than what is carried on, the weights would tell: give --weights FILE, or compare with a golden case"


def _some(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:NAMED]) + (f", ... ({len(names) - NAMED} more)" if len(names) > NAMED else "")


def _size(row: Row) -> str:
    error = row.local if row.local is not None else row.distance
    return "    nan" if error is None else f"{error:7.1e}"


def _what(row: Row) -> str:
    """What is known beside the size."""
    carried = row.local is not None and row.distance is not None and row.distance > 2 * row.local
    return f"  {row.how}" if row.how else f"  ({row.distance:.1e} with what is carried to it)" if carried else ""


def _table(report: Report, width: int) -> list[str]:
    lines = [
        f"{'':{width}}  {'relative':>8} {'max abs':>8} {'max rel':>8} {'cosine':>9} {'ulp':>8}  {'made here':>9}  first bad"
    ]
    for row in report.rows:
        m = row.measures
        values = (
            f"{m['relative']:8.1e} {m['max_abs']:8.1e} {m['max_rel']:8.1e} {m['cosine']:9.6f} {m['ulp']:8.1e}" if m
            else f"{'-':>8} {'-':>8} {'-':>8} {'-':>9} {'-':>8}"
        )  # fmt: skip
        made = "-" if row.local is None else f"{row.local:.1e}"
        lines.append(f"{row.name:{width}}  {values}  {made:>9}  {m.get('first') or ''}  {row.verdict}".rstrip())
    return lines
