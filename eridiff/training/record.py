"""The record of a run that people look at: one page beside the pictures, strips, and figures of how far pictures moved.

All of it is read off the PNGs: each says its step, its prompt and which weights drew it.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from eridiff.errors import EridiffError
from eridiff.files import replacing
from eridiff.images import METADATA_KEY, first_text, save_png

COARSE = 8  # pixels a block: what is left of a picture when its texture is averaged away


@dataclass(frozen=True)
class Entry:
    """A picture of the record."""

    name: str  # of the file
    settings: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.settings["training"]["step"])

    @property
    def weights(self) -> str:
        return str(self.settings["training"]["weights"])

    @property
    def row(self) -> tuple[str, ...]:
        """What images of one row share: the entry of the section, its prompt, noise and size, and which weights drew them."""
        told = (json.dumps(self.settings.get(n)) for n in ("prompt", "seed", "width", "height"))
        number = self.settings["training"].get("entry", self.name[14:16])  # older ones have it in their name alone
        return (f"{number:0>2}", *told, self.weights)


def read_entries(folder: str | os.PathLike[str]) -> dict[str, Entry]:
    """The pictures of a folder that were drawn in training, by file name; nothing else is read than their headers."""
    found = {}
    for path in sorted(Path(folder).glob("*.png")):
        try:
            with Image.open(path) as image:
                settings = json.loads(image.info.get(METADATA_KEY, "null"))
        except (UnidentifiedImageError, OSError, ValueError):
            continue
        if isinstance(settings, dict) and isinstance(settings.get("training"), dict):
            found[path.name] = Entry(path.name, settings)
    return found


def rows(entries: Mapping[str, Entry]) -> dict[tuple[str, ...], list[Entry]]:
    """The pictures of each row, by step; rows in the order of the prompts, the plain weights before their averages."""
    found: dict[tuple[str, ...], list[Entry]] = {}
    order = {"base": 0, "live": 1}
    prefix = len("step-00000000-00")  # the step and the number of the prompt
    for entry in sorted(entries.values(), key=lambda e: (e.step, e.name[:prefix], order.get(e.weights, 2), e.name)):
        found.setdefault(entry.row, []).append(entry)
    return found


def drift(picture: Image.Image, reference: Image.Image) -> dict[str, float]:
    """How far a picture is from another of its size, in levels of 255: root mean square over pixels, and over 8 x 8 blocks.

    `rms` sees everything; `coarse` hardly sees texture, so it tells a new composition from sharper edges.
    """
    figures = {}
    for name, factor in (("rms", 1), ("coarse", COARSE)):
        a, b = (np.asarray(p.convert("RGB").reduce(factor), dtype=np.float64) for p in (picture, reference))
        figures[name] = round(math.sqrt(((a - b) ** 2).mean()), 2)
    return figures


def drift_of(picture: Image.Image, entry: Entry, entries: Mapping[str, Entry], folder: Path) -> dict[str, Any]:
    """From the first picture of its row, from the one before, and from the live weights' of the same step."""
    own = [e for e in rows(entries).get(entry.row, []) if e.step < entry.step]
    live = [e for e in entries.values() if e.row == (*entry.row[:-1], "live") and e.step == entry.step]
    references = {"first": own[:1], "previous": own[-1:], "live": live if entry.weights != "live" else []}
    figures = {}
    for name, (reference, *_) in ((n, r) for n, r in references.items() if r):
        try:
            with Image.open(folder / reference.name) as image:
                figures[name] = {"step": reference.step, **drift(picture, image)}
        except OSError:  # removed in the meantime
            continue
    return figures


def write_page(folder: str | os.PathLike[str], entries: Mapping[str, Entry] | None = None) -> Path:
    """`index.html` beside the pictures: a row for each prompt and weights, a column for each step, drift below each picture.

    Styles stand in the page and pictures are linked relatively, so that the folder can be moved and opened anywhere.
    Raises EridiffError when it cannot be written.
    """
    entries = read_entries(folder) if entries is None else entries
    steps = sorted({entry.step for entry in entries.values()})
    head = "".join(f"<th>step {step}</th>" for step in steps)
    body = "\n".join(_row(row, steps) for row in rows(entries).values())
    text = PAGE.format(style=STYLE, count=len(entries), steps=len(steps), head=head, body=body)
    return write_text(Path(folder) / "index.html", text)


STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 1.5em; color: #222; background: #fff }
table { border-collapse: collapse }
th, td { padding: 4px 6px; vertical-align: top; text-align: left; font-weight: normal }
thead th { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #999 }
th:first-child { position: sticky; left: 0; background: #fff; min-width: 12em; max-width: 16em }
img { display: block; width: 160px; height: auto; background: #eee }
small { color: #666 } svg { display: block; margin-top: 6px } .scroll { overflow-x: auto }
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Samples</title>
<meta name="viewport" content="width=device-width"><style>{style}</style></head><body>
<h1>Samples</h1>
<p>{count} pictures at {steps} steps, each row from the same noise. Below a picture: how far it is from the first of its row,
in levels of 255 (root mean square over pixels; over 8 &times; 8 blocks, which leave texture out).</p>
<div class="scroll"><table><thead><tr><th>prompt, seed, weights</th>{head}</tr></thead><tbody>
{body}
</tbody></table></div></body></html>
"""


def _row(row: Sequence[Entry], steps: Sequence[int]) -> str:
    first = row[0]
    by_step = {entry.step: entry for entry in row}
    cells = []
    for step in steps:
        if step not in by_step:
            cells.append("<td></td>")
            continue
        entry = by_step[step]
        moved = entry.settings["training"].get("drift", {}).get("first")
        figures = f"{moved['rms']:.1f}; {moved['coarse']:.1f}" if moved else "&nbsp;"
        link = quote(entry.name)
        cells.append(
            f'<td><a href="{link}"><img loading="lazy" src="{link}" alt="{escape(first_text(entry.settings["prompt"]))}, '
            f'step {step}"></a><small>{figures}</small></td>'
        )
    title = escape(first_text(first.settings["prompt"])) or "<i>empty prompt</i>"
    label = f"{title}<br><small>seed {first.settings['seed']}, {escape(first.weights)}</small>{_curve(row)}"
    return f"<tr><th>{label}</th>{''.join(cells)}</tr>"


def _curve(row: Sequence[Entry]) -> str:
    """The drift from the first picture over the steps, as a small drawing."""
    points = [(e.step, e.settings["training"].get("drift", {}).get("first", {}).get("rms", 0.0)) for e in row]
    if len(points) < 2:
        return ""
    first, span = points[0][0], max(points[-1][0] - points[0][0], 1)
    highest = max(max(y for _, y in points), 1e-9)
    path = " ".join(f"{(x - first) / span * 118 + 1:.1f},{29 - y / highest * 28:.1f}" for x, y in points)
    return (
        f'<svg width="120" height="30" role="img"><title>drift from the first picture, up to {highest:.1f}</title>'
        f'<polyline points="{path}" fill="none" stroke="#36c" stroke-width="1.5"/></svg>'
    )


def write_strip(
    folder: str | os.PathLike[str], path: str | os.PathLike[str] | None = None, columns: int = 8, side: int = 128
) -> Path:
    """One picture of the whole run: for each prompt a row for each kind of weights, steps from left to right.

    Of more steps than `columns` the first, the last and some between are shown, `side` pixels each. Below each stands its
    drift from the first of its row. Written to `strips/strip.png` in the folder when `path` is None. Raises EridiffError
    for a folder without pictures.
    """
    entries = read_entries(folder)
    steps = sorted({entry.step for entry in entries.values()})
    if not steps:
        raise EridiffError(f"'{folder}' holds no pictures that were drawn in training")
    if len(steps) > columns:
        steps = [steps[round(i * (len(steps) - 1) / max(columns - 1, 1))] for i in range(columns)]
    prompts: dict[tuple[str, ...], list[list[Entry]]] = {}
    for key, row in rows(entries).items():
        prompts.setdefault(key[:-1], []).append(row)
    font = ImageFont.load_default(12)
    margin, text, gap = 56, 18, 4
    height = text + sum(text + len(weights) * (side + text) for weights in prompts.values())
    sheet = Image.new("RGB", (margin + len(steps) * (side + gap), height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, step in enumerate(steps):
        draw.text((margin + i * (side + gap), 2), f"step {step}", "black", font)
    top = text
    for weights in prompts.values():
        settings = weights[0][0].settings
        title = f"{first_text(settings['prompt'])}, seed {settings['seed']}"
        draw.text((2, top + 2), title, "black", font)
        top += text
        for row in weights:
            draw.text((2, top + 2), row[0].weights, "black", font)
            for entry in (e for e in row if e.step in steps):
                left = margin + steps.index(entry.step) * (side + gap)
                with Image.open(Path(folder) / entry.name) as image:
                    sheet.paste(_fitted(image, side), (left, top))
                moved = entry.settings["training"].get("drift", {}).get("first")
                draw.text((left, top + side + 1), f"{moved['rms']:.1f}" if moved else "", "#666666", font)
            top += side + text
    return save_png(sheet, Path(folder) / "strips" / "strip.png" if path is None else path)


def _fitted(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    filtering = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return image.convert("RGB").resize([max(1, round(n * scale)) for n in image.size], filtering)


def write_text(path: Path, text: str) -> Path:
    """A text file that appears whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
