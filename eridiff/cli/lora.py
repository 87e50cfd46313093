"""`eridiff lora check | convert | merge | extract | resize`."""

import argparse
import re
import textwrap
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eridiff.cli.common import check_model, dtype_of, scaled
from eridiff.errors import ConfigError
from eridiff.lora.decompose import energy_table, extract_lora, resize_lora
from eridiff.lora.ledger import APPLIED, Row, counted, table
from eridiff.lora.load import PARTS, Refusal, load_lora
from eridiff.lora.merge import merge_file, merge_folder
from eridiff.lora.save import FORMATS, save_lora
from eridiff.models import flux, mmdit, unet
from eridiff.text.encoders import build_encoder, empty, published_encoder
from eridiff.weights.hub import built_in, resolve
from eridiff.weights.load import NETWORKS, build
from eridiff.weights.locate import DENOISERS, TEXT_ENCODERS, locate

PUBLISHED: dict[str, tuple[str, Any, tuple[str, ...]]] = {  # name -> network, configuration, text encoders
    **{f"flux-{name}": ("flux", config, ("clip", "t5")) for name, config in flux.PRESETS.items()},
    **{name: ("mmdit", config, TEXT_ENCODERS) for name, config in mmdit.PRESETS.items()},
    **{f"sdxl-{name}": ("unet", config, ("clip", "clip_g")) for name, config in unet.PRESETS.items()},
}
DTYPES = ("float32", "bfloat16", "float16")
MODEL_HELP = f"for what it is: a checkpoint or a folder, which also gives the relative change of each weight, or by name one of {', '.join(PUBLISHED)}"


def add_parser(commands: Any) -> None:
    """Put `lora` and its five commands beside the others."""
    parser = commands.add_parser(
        "lora", help="look into LoRA files and change them", description="Look into LoRA files and change them."
    )
    kinds = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], help: str, model: bool = True) -> Any:
        made = kinds.add_parser(name, help=help, description=help)
        made.set_defaults(run=run)
        if model:
            made.add_argument("--model", required=True, metavar="PATH|NAME", help=MODEL_HELP)
            made.add_argument("--partial", action="store_true", help="go on with what fits")
            made.add_argument("--part", choices=PARTS, help="leave the other part of the file out")
        return made

    def output(made: Any, default: str) -> None:
        made.add_argument("--out", required=True, type=Path, metavar="FILE")
        made.add_argument("--format", choices=FORMATS, default=default, help=f"default: {default}")
        made.add_argument("--dtype", choices=DTYPES, help="dtype of the matrices (the file's)")

    check = command("check", _check, "show what becomes of each module, and how much it changes")
    check.add_argument("file", metavar="FILE")
    check.add_argument("--wide", action="store_true", help="one line per module, as wide as its names are")
    convert = command("convert", _convert, "write a LoRA in another format")
    convert.add_argument("file", metavar="FILE")
    output(convert, "kohya")
    merge = command("merge", _merge, "write the network with LoRAs in its weights")
    merge.add_argument("lora", nargs="+", metavar="FILE[:SCALE]")
    merge.add_argument(
        "--out", required=True, type=Path, metavar="FILE|FOLDER", help="a name ending in .safetensors for the network's file; of a model's folder otherwise all of it"
    )  # fmt: skip
    merge.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (the file's)")
    extract = command("extract", _extract, "make a LoRA of the difference of two checkpoints", model=False)
    extract.add_argument("tuned", metavar="TUNED", help="the checkpoint that was trained")
    extract.add_argument("base", metavar="BASE", help="what it was trained from")
    extract.add_argument("--rank", type=int, default=32, metavar="N", help="rank of the LoRA (32)")
    extract.add_argument("--targets", nargs="+", default=["*"], metavar="PATTERN", help="of native module names (all)")
    output(extract, "kohya")
    resize = command("resize", _resize, "write a LoRA with a smaller rank")
    resize.add_argument("file", metavar="FILE")
    resize.add_argument("--rank", type=int, required=True, metavar="N", help="rank of the new LoRA")
    output(resize, "kohya")


def _check(options: argparse.Namespace) -> int:
    check_model(options.file)
    shown = table if options.wide else grouped
    try:
        lora = load_lora(
            options.file, _networks(options.model), part=options.part, allow_partial=options.partial, measure=True
        )
    except Refusal as error:
        if error.ledger:
            print(shown(error.ledger))
        raise
    print(shown(lora.ledger))
    return 0


def grouped(rows: Sequence[Row], width: int = 80) -> str:
    """The rows in lines of at most `width` characters: modules that differ in numbers alone are one line, with their count."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        pattern = re.sub(r"\d+", "#", row.module or row.key)
        groups.setdefault((row.status not in APPLIED, row.status, pattern, row.kind, row.rank, row.scale), []).append(
            row
        )
    lines = [f"{'module':36} count  kind   rank   scale  |dW|/|W|"]
    said = ""
    for (refused, status, _, *_), members in sorted(groups.items(), key=lambda group: bool(group[0][0])):
        if status != said:
            lines.append(f"{status}:")
            said = str(status)
        lines += _line(members)
        note = members[0].note
        if refused and note:
            others = f" ({len(members) - 1} more like it)" if len(members) > 1 else ""
            lines += textwrap.wrap(note + others, width, initial_indent="      ", subsequent_indent="      ")
    return "\n".join([*lines, counted(rows)])


def _line(rows: Sequence[Row]) -> list[str]:
    """The columns of modules that differ in numbers alone; a long name has a line of its own."""
    names = [row.module or row.key for row in rows]
    numbers = zip(*(re.findall(r"\d+", name) for name in names), strict=True)
    ranges = iter(
        [
            f"{low}-{high}" if low != high else f"{low}"
            for low, high in ((min(n), max(n)) for n in (list(map(int, c)) for c in numbers))
        ]
    )
    name = "  " + re.sub(r"\d+", lambda _: next(ranges), names[0])
    changes = sorted(row.change for row in rows if row.change is not None)
    change = "" if not changes else f"{changes[0]:.2g}" if len(changes) == 1 else f"{changes[0]:.2g}-{changes[-1]:.2g}"
    row = rows[0]
    rank, scale = (f"{value:.4g}" if value is not None else "-" for value in (row.rank, row.scale))
    cells = f"{len(rows):5}  {row.kind:5}  {rank:>4}  {scale:>6}  {change}".rstrip()
    if len(name) <= 36:
        return [f"{name:36} {cells}"]
    pieces = textwrap.wrap(name.strip(), 76, break_on_hyphens=False)
    return [*(f"  {piece}" for piece in pieces), f"{'':36} {cells}"]


def _convert(options: argparse.Namespace) -> int:
    networks = _networks(options.model, weights=False)
    lora = load_lora(options.file, networks, part=options.part, allow_partial=options.partial)
    kept = {name: value for name, value in lora.metadata.items() if name.startswith(("ss_", "modelspec."))}
    for name in (
        "ss_network_dim",
        "ss_network_alpha",
        "ss_network_module",
        "ss_network_args",
    ):  # of the old file's matrices
        kept.pop(name, None)
    print(save_lora(lora, options.out, networks, format=options.format, dtype=dtype_of(options.dtype), metadata=kept))
    return 0


def _merge(options: argparse.Namespace) -> int:
    components = {} if _is_published(options.model) else locate(options.model).components
    network = next((name for name in DENOISERS if name in components), None)
    if network is None:
        raise ConfigError(f"'{options.model}' holds no weights to merge into; give a checkpoint")
    modules = {name: empty(c) for name, c in components.items()}
    loras = []
    for text in options.lora:
        file, scale = scaled(text)
        known = {name: module for name, module in modules.items() if name in (*DENOISERS, *TEXT_ENCODERS)}
        lora = load_lora(file, known, part=options.part, allow_partial=options.partial)
        loras.append((lora, 1.0 if scale is None else scale))
    source, dtype = components[network].checkpoint.path, dtype_of(options.dtype)
    held = {name: (component, modules[name]) for name, component in components.items()}
    folder = resolve(options.model)
    if folder.is_dir() and options.out.suffix != ".safetensors":
        files, merged = merge_folder(folder, held, loras, options.out, dtype=dtype)
    else:
        one, merged = merge_file({n: own for n, own in held.items() if own[0].checkpoint.path == source}, loras, options.out, dtype=dtype)  # fmt: skip
        files = [one]
    print(merged)
    print(*files, sep="\n")
    return 0


def _extract(options: argparse.Namespace) -> int:
    tuned, base = _networks(options.tuned), _networks(options.base)
    if set(base) & set(DENOISERS) != set(tuned) & set(DENOISERS):
        raise ConfigError(f"'{options.tuned}' and '{options.base}' do not hold the same network")
    both = {name: module for name, module in base.items() if name in tuned}
    for name in sorted(tuned.keys() ^ base.keys()):
        print(f"{name} is in one of the two alone, and left out")
    lora, kept = extract_lora(tuned, both, options.rank, tuple(options.targets))
    print("\n".join(energy_table(kept)))
    print(save_lora(lora, options.out, both, format=options.format, dtype=dtype_of(options.dtype)))
    return 0


def _resize(options: argparse.Namespace) -> int:
    networks = _networks(options.model, weights=False)
    lora = load_lora(options.file, networks, part=options.part, allow_partial=options.partial)
    shapes = {name: {n: tuple(t.shape) for n, t in module.state_dict().items()} for name, module in networks.items()}
    resized, kept = resize_lora(lora, options.rank, shapes)
    print("\n".join(energy_table(kept)))
    print(save_lora(resized, options.out, networks, format=options.format, dtype=dtype_of(options.dtype)))
    return 0


def _is_published(model: str) -> bool:
    return model in PUBLISHED and not Path(model).exists()


def _networks(model: str, weights: bool = True) -> dict[str, nn.Module]:
    """The network and the text encoders of a checkpoint, or of a published model by name, then without weights."""
    if _is_published(model):
        network, config, encoders = PUBLISHED[model]
        with torch.device("meta"):
            module = NETWORKS[network](config)
        return {network: module} | {name: published_encoder(name) for name in encoders}
    if not Path(model).suffix and "/" not in model and not Path(model).exists() and model not in built_in():
        near = get_close_matches(model, PUBLISHED, 1)
        raise ConfigError(f"'{model}' is not a file and not a published model" + (f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(PUBLISHED)}"))  # fmt: skip
    check_model(model)
    components = {n: c for n, c in locate(model).components.items() if n in (*DENOISERS, *TEXT_ENCODERS)}
    if not weights:
        return {name: empty(component) for name, component in components.items()}
    return {n: build_encoder(c) if n in TEXT_ENCODERS else build(c) for n, c in components.items()}
