"""A report as one HTML file that needs nothing else: error over depth, a heat map for each error, the whole table."""

import math
from collections.abc import Sequence
from html import escape

from eridiff.trace.report import BROKEN, HERE, Report, Row

STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 1.5em; color: #222; background: #fff; max-width: 70em }
table { border-collapse: collapse } th, td { padding: 2px 8px; text-align: right; white-space: nowrap }
th { font-weight: normal; color: #666; border-bottom: 1px solid #999 }
th:first-child, td:first-child, td:last-child { text-align: left } tr.here { background: #fdd } tr.carried { background: #ffd }
svg { display: block; margin: 0.5em 0; max-width: 100% } .scroll svg { min-width: 45em; max-width: none }
td:last-child { white-space: normal; min-width: 20em } small { color: #666 } .scroll { overflow-x: auto } h2 { font-size: 16px }
"""
WIDTH, HEIGHT, MAPS = 900, 220, 4
LOWEST, HIGHEST = -17, 2  # powers of ten of the figure


def page(report: Report, title: str = "Traces") -> str:
    """The report as HTML."""
    found = "".join(_error(group) for group in report.groups()) or "<p>No error.</p>"
    worst = [group[0] for group in report.groups() if group[0].measures.get("map")][:MAPS]
    maps = "".join(f"<h2>{escape(row.name)}</h2>{_heat(row.measures['map'])}" for row in worst)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>\n'
        f"{found}\n<p><small>{_counts(report)}</small></p><h2>Error over depth</h2><p><small>Relative L2, from left to right in the order of computation. Red: made at "
        f"this place. Grey: distance from the other trace. Dotted: what rounding to {report.dtype} does.</small></p>"
        f'<div class="scroll">{_curve(report)}</div>\n{maps}\n<h2>All tensors</h2>{_table(report)}</body></html>\n'
    )


def _counts(report: Report) -> str:
    compared = sum(bool(row.other) for row in report.rows)
    missing = f"; missing: {escape(', '.join(report.missing))}" if report.missing else ""
    return f"{compared} of {compared + len(report.missing)} tensors compared; noise floor of {report.dtype} here {report.floor:.0e}{missing}"


def _error(group: Sequence[Row]) -> str:
    first, more = group[0], len(group) - 1
    size = (
        "not finite" if first.verdict == BROKEN else f"{first.local if first.local is not None else first.distance:.1e}"
    )
    cause = f": {escape(first.cause)}" if first.cause else ""
    return f"<p><b>{escape(first.name)}</b> {size}{f', and in {more} more' if more else ''}{cause}</p>"


def _height(value: float | None) -> float | None:
    """Where a value is in the figure; None for one that is not."""
    if value is None or value != value:
        return None
    power = min(max(math.log10(value) if value > 0 else LOWEST, LOWEST), HIGHEST)
    return HEIGHT * (HIGHEST - power) / (HIGHEST - LOWEST)


def _curve(report: Report) -> str:
    step = WIDTH / max(len(report.rows), 1)
    marks = []
    for i, row in enumerate(report.rows):
        for value, colour, what in ((row.distance, "#999", "from the other trace"), (row.local, "#c22", "made here")):
            height = _height(value)
            if height is not None:
                title = f"<title>{escape(row.name)}: {value:.1e} {what}</title>"
                marks.append(
                    f'<circle cx="{(i + 0.5) * step:.1f}" cy="{height:.1f}" r="3" fill="{colour}">{title}</circle>'
                )
    lines = []
    for power in range(LOWEST + 1, HIGHEST + 1, 4):
        y = _height(10.0**power)
        lines.append(f'<line x1="0" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        lines.append(f'<text x="{WIDTH + 4}" y="{y:.1f}" font-size="11" fill="#666">1e{power}</text>')
    floor = _height(report.floor)
    lines.append(f'<line x1="0" x2="{WIDTH}" y1="{floor:.1f}" y2="{floor:.1f}" stroke="#36c" stroke-dasharray="3"/>')
    inner = "".join(lines + marks)
    return f'<svg viewBox="-4 -6 {WIDTH + 50} {HEIGHT + 12}" width="100%" role="img"><title>error over depth</title>{inner}</svg>'


def _heat(cells: Sequence[Sequence[float]], side: int = 14) -> str:
    """Rows from above, features from left to right; the darkest is the largest difference."""
    largest = max((value for row in cells for value in row if value == value), default=0.0) or 1.0
    drawn = []
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            share = min(value / largest, 1.0) if value == value else 1.0
            drawn.append(
                f'<rect x="{x * side}" y="{y * side}" width="{side}" height="{side}" fill="#c22" opacity="{share:.2f}"/>'
            )
    width, height = len(cells[0]) * side, len(cells) * side
    size = f'width="{width}" viewBox="0 0 {width} {height}"'
    return (
        f"<p><small>absolute difference, up to {largest:.1e}; each cell is the largest of a part, rows from above, features "
        f'from left to right</small></p><svg {size} role="img"><title>difference</title>{"".join(drawn)}</svg>'
    )


def _table(report: Report) -> str:
    body = []
    for row in report.rows:
        m = row.measures
        cells = [f"{m[n]:.1e}" if m else "" for n in ("relative", "max_abs", "max_rel", "ulp")]
        cells.insert(3, f"{m['cosine']:.6f}" if m else "")
        made = "" if row.local is None else f"{row.local:.1e}"
        kind = "here" if row.verdict in (HERE, BROKEN) else row.verdict
        said = escape(row.cause or row.how)
        body.append(
            f'<tr class="{kind}"><td>{escape(row.name)}</td>{"".join(f"<td>{c}</td>" for c in cells)}<td>{made}</td><td>{said}</td></tr>'
        )
    head = "".join(
        f"<th>{h}</th>" for h in ("tensor", "relative", "max abs", "max rel", "cosine", "ULP", "made here", "")
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
