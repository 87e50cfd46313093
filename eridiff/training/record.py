"""The record of a run that people look at: one page beside the images, strips, and figures of how far images moved.

All of it is read off the PNGs: each says its step, its prompt and which weights generated it.
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

COARSE = 8  # pixels a block: what is left of an image when its texture is averaged away


@dataclass(frozen=True)
class Entry:
    """An image of the record."""

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
        """What images of one row share: the entry of the section, its prompt, noise and size, and which weights generated them."""
        told = (json.dumps(self.settings.get(n)) for n in ("prompt", "seed", "width", "height"))
        number = self.settings["training"].get("entry", self.name[14:16])  # older ones have it in their name alone
        return (f"{number:0>2}", *told, self.weights)


def read_entries(folder: str | os.PathLike[str]) -> dict[str, Entry]:
    """The images of a folder that were sampled in training, by file name; nothing else is read than their headers."""
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
    """The images of each row, by step; rows in the order of the prompts, the plain weights before their EMA weights."""
    found: dict[tuple[str, ...], list[Entry]] = {}
    order = {"base": 0, "live": 1}
    prefix = len("step-00000000-00")  # the step and the number of the prompt
    for entry in sorted(entries.values(), key=lambda e: (e.step, e.name[:prefix], order.get(e.weights, 2), e.name)):
        found.setdefault(entry.row, []).append(entry)
    return found


def drift(picture: Image.Image, reference: Image.Image) -> dict[str, float]:
    """How far an image is from another of its size, in levels of 255: root mean square over pixels, and over 8 x 8 blocks.

    `rms` sees everything; `coarse` hardly sees texture, so it tells a new composition from sharper edges.
    """
    figures = {}
    for name, factor in (("rms", 1), ("coarse", COARSE)):
        a, b = (np.asarray(p.convert("RGB").reduce(factor), dtype=np.float64) for p in (picture, reference))
        figures[name] = round(math.sqrt(((a - b) ** 2).mean()), 2)
    return figures


def drift_of(picture: Image.Image, entry: Entry, entries: Mapping[str, Entry], folder: Path) -> dict[str, Any]:
    """From the first image of its row, from the one before, and from the live weights' of the same step."""
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
    """`index.html` beside the images: a row per prompt and weights, a column per step, the newest first.

    Styles and script are in the page and images are linked relatively, so that the folder can be moved and opened anywhere.
    Raises EridiffError when it cannot be written.
    """
    entries = read_entries(folder) if entries is None else entries
    steps = sorted({entry.step for entry in entries.values()}, reverse=True)
    found = rows(entries)
    highest = max((y for row in found.values() for _, y in _points(row)), default=0.0)
    head = "".join(f"<th>step {step}</th>" for step in steps)
    body = "\n".join(_row(row, steps, highest) for row in found.values())
    text = PAGE.format(
        style=STYLE, script=SCRIPT, about=escape(_about(list(entries.values()))), count=len(entries), steps=len(steps),
        highest=f"{highest:.1f}", head=head, body=body,
    )  # fmt: skip
    return write_text(Path(folder) / "index.html", text)


STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #222; --faint: #666; --line: #bbb; --curve: #36c }
@media (prefers-color-scheme: dark) { :root { --page: #16191d; --text: #e4e7eb; --faint: #9aa5b1; --line: #555; --curve: #7aa7ff } }
* { box-sizing: border-box }
body { font: 14px/1.4 system-ui, sans-serif; margin: 0; height: 100dvh; display: flex; flex-direction: column; color: var(--text); background: var(--page) }
header { padding: 10px 16px } h1 { font-size: 18px; margin: 0 } header p { margin: 2px 0; color: var(--faint) }
.scroll { flex: 1; overflow: auto; border-top: 1px solid var(--line) }
table { border-collapse: separate; border-spacing: 0 }
th, td { padding: 4px 6px; vertical-align: top; text-align: left; font-weight: normal }
thead th { position: sticky; top: 0; z-index: 1; background: var(--page); border-bottom: 1px solid var(--line) }
th:first-child { position: sticky; left: 0; background: var(--page); width: 200px; min-width: 200px; overflow-wrap: anywhere; border-right: 1px solid var(--line) }
thead th:first-child { z-index: 2 }
td img { display: block; width: 160px; height: auto; background: #8883; cursor: zoom-in }
small { color: var(--faint) } svg { display: block; margin-top: 6px; max-width: 100% }
dialog { border: 0; padding: 12px; max-width: 96vw; max-height: 96dvh; color: var(--text); background: var(--page) }
dialog img { display: block; max-width: 100%; width: min(88vw, 74dvh); height: auto } dialog::backdrop { background: #000b }
dialog p { margin: 0 0 8px } dialog button { font: inherit; padding: 4px 12px }
@media (max-width: 600px) {
  header { padding: 8px 10px } th:first-child { width: 36vw; min-width: 36vw; font-size: 12px } td img { width: 52vw }
}
"""
SCRIPT = """
const dialog = document.querySelector("dialog"), [large, words] = [dialog.querySelector("img"), dialog.querySelector("span")];
let row = [], at = 0;
const show = (i) => { at = Math.min(Math.max(i, 0), row.length - 1); large.src = row[at].src; words.textContent = row[at].alt; };
document.querySelector("tbody").addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (!link || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  row = [...link.closest("tr").querySelectorAll("img")];
  show(row.indexOf(link.querySelector("img")));
  dialog.showModal();
});
const [newer, older, close] = dialog.querySelectorAll("button");
newer.onclick = () => show(at - 1); older.onclick = large.onclick = () => show(at + 1 < row.length ? at + 1 : 0);
close.onclick = () => dialog.close();
dialog.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") show(at - 1);
  if (event.key === "ArrowRight") show(at + 1);
});
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Samples: {about}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head><body>
<header><h1>{about}</h1>
<p>{count} images at {steps} steps, the newest first. Each row starts from the same noise. Below an image: its difference from the
first of its row, in levels of 255 (root mean square over pixels; over blocks of 8 &times; 8). All curves have one scale, 0 to
{highest}.</p></header>
<div class="scroll"><table><thead><tr><th>prompt, seed, weights</th>{head}</tr></thead><tbody>
{body}
</tbody></table></div>
<dialog><p><button>newer</button> <button>older</button> <button>close</button> <span></span></p><img alt="the image that was chosen"></dialog>
<script>{script}</script></body></html>
"""


def _about(entries: Sequence[Entry]) -> str:
    """The model and the settings in which all images agree: "flux schnell, 64 x 64, 8 steps, euler, float32"."""
    if not entries:
        return "Samples"

    def common(*names: str) -> list[Any]:
        found = {json.dumps([entry.settings.get(name) for name in names]) for entry in entries}
        return json.loads(next(iter(found))) if len(found) == 1 else [None] * len(names)

    model, variant, width, height = common("model")[0], common("variant")[0], *common("width", "height")
    name = Path(model).stem if isinstance(model, str) else model and "several files"
    said = [name, variant if variant != name else None, width and height and f"{width} x {height}"]
    texts = {
        "steps": "{} steps",
        "sampler": "{}",
        "guidance_scale": "guidance {:g}",
        "cfg_scale": "cfg {:g}",
        "dtype": "{}",
    }
    for key, text in texts.items():
        (value,) = common(key)
        said.append(text.format(value) if value is not None and (key, value) != ("cfg_scale", 1.0) else None)
    return ", ".join(str(text) for text in said if text) or "Samples"


def _row(row: Sequence[Entry], steps: Sequence[int], highest: float) -> str:
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
        what = f"{first_text(entry.settings['prompt'])}, {entry.weights}, step {step}"
        cells.append(
            f'<td><a href="{link}"><img loading="lazy" src="{link}" alt="{escape(what)}"></a><small>{figures}</small></td>'
        )
    title = escape(first_text(first.settings["prompt"])) or "<i>empty prompt</i>"
    label = f"{title}<br><small>seed {first.settings['seed']}, {escape(first.weights)}</small>{_curve(row, highest)}"
    return f"<tr><th>{label}</th>{''.join(cells)}</tr>"


def _points(row: Sequence[Entry]) -> list[tuple[int, float]]:
    """Step and difference from the first image of each image of a row."""
    return [(e.step, e.settings["training"].get("drift", {}).get("first", {}).get("rms", 0.0)) for e in row]


def _curve(row: Sequence[Entry], highest: float) -> str:
    """The difference from the first image over the steps, as a small figure whose height is `highest`, the largest of all rows."""
    points = _points(row)
    if len(points) < 2:
        return ""
    first, span, largest = points[0][0], max(points[-1][0] - points[0][0], 1), max(y for _, y in points)
    path = " ".join(f"{(x - first) / span * 118 + 1:.1f},{29 - y / max(highest, 1e-9) * 28:.1f}" for x, y in points)
    return (
        f'<svg width="120" height="30" role="img"><title>difference from the first image, up to {largest:.1f}</title>'
        f'<polyline points="{path}" fill="none" stroke="var(--curve)" stroke-width="1.5"/></svg>'
    )


def write_strip(
    folder: str | os.PathLike[str], path: str | os.PathLike[str] | None = None, columns: int = 8, side: int = 128
) -> Path:
    """One image of the whole run: for each prompt a row for each kind of weights, steps from left to right.

    Of more steps than `columns` the first, the last and some between are shown, `side` pixels each. Below each stands its
    drift from the first of its row. Written to `strips/strip.png` in the folder when `path` is None. Raises EridiffError
    for a folder without images.
    """
    entries = read_entries(folder)
    steps = sorted({entry.step for entry in entries.values()})
    if not steps:
        raise EridiffError(f"'{folder}' holds no images that were sampled in training")
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
