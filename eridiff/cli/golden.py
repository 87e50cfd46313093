"""The command `eridiff golden`: cases of the original code for ports in any language, and how a port does on them."""

import argparse
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from eridiff.cli.diff import case_report, text
from eridiff.errors import ConfigError, TraceError, quoted
from eridiff.trace.cases import Case, cases, inputs_of, open_case, weights_of
from eridiff.trace.format import natural, read_trace
from eridiff.trace.names import NATIVE, align, names_of
from eridiff.weights.detect import sizes_of
from eridiff.weights.keymap import key_map
from eridiff.weights.save import write_tensors

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_parser(commands: Any) -> None:
    """Put `golden` and its three commands beside the others."""
    parser = commands.add_parser("golden", help="cases for ports", description="Cases of the original code for ports.")
    kinds = parser.add_subparsers(required=True, metavar="COMMAND")
    listed = kinds.add_parser("list", help="say which cases there are", description="Say which cases there are.")
    listed.set_defaults(run=_list)
    export = kinds.add_parser(
        "export", help="write a case", description="Write a case: weights, inputs, what is expected."
    )
    export.set_defaults(run=_export)
    export.add_argument("name", metavar="NAME")
    export.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    export.add_argument(
        "--layout", default="original", metavar="LAYOUT", help="of the weights' names: original, diffusers or native"
    )
    export.add_argument("--dtype", choices=DTYPES, default="float64", help="dtype of weights and inputs (float64)")
    check = kinds.add_parser(
        "check", help="compare traces with all cases of a family",
        description="Compare traces with all cases that belong together; 0 if all are equal, 1 if not, 2 if they cannot be compared.",
    )  # fmt: skip
    check.set_defaults(run=_check)
    check.add_argument(
        "traces", nargs="+", type=Path, metavar="TRACE", help="named as their cases: flux-dev-tiny.npz flux-eps.npz"
    )
    check.add_argument("--explain", action="store_true", help="name the causes")


def _list(_: argparse.Namespace) -> int:
    found = [open_case(folder) for folder in cases().values()]
    width = max(len(case.name) for case in found)
    for case in found:
        size = sum(tensor.numel() for tensor in weights_of(case.description).values()) * 8
        shows = "shows wrong epsilons: run this one too" if case.name.endswith("-eps") else _what(case)
        print(
            f"{case.name:{width}}  {len(case.expected):3} tensors  {size / 2**20:5.1f} MiB of weights in float64  {shows}"
        )
    return 0


def _what(case: Case) -> str:
    """The blocks, by the names of the weights."""
    names = (re.match(r"(.*?_blocks)\.(\d+)", name) for name, _ in case.description["parameters"])
    kinds = sorted({(m[1], int(m[2])) for m in names if m})
    return ", ".join(
        f"{1 + max(n for k, n in kinds if k == kind)} {kind}" for kind in dict.fromkeys(k for k, _ in kinds)
    )


def _export(options: argparse.Namespace) -> int:
    folder = cases().get(options.name)
    if folder is None:
        raise TraceError(f"there is no case {quoted(options.name)}; `eridiff golden list` names those there are")
    case, dtype, out = open_case(folder), DTYPES[options.dtype], options.out
    layouts = key_map(case.family).layouts
    state: dict[str, torch.Tensor] = dict(case.network.state_dict())
    if options.layout == "original":
        state = weights_of(case.description)
    elif options.layout in layouts:
        state = layouts[options.layout].to_foreign(state, sizes_of(case.config))
    elif options.layout != NATIVE:
        raise ConfigError(
            f"'{options.layout}' is not a layout of {case.family}; there are {NATIVE}, {', '.join(layouts)}"
        )
    inputs = inputs_of(case.description)
    if case.family == "flux":
        inputs |= {"img": case.arguments["latents"], "ids": case.arguments["ids"]}
    out.mkdir(parents=True, exist_ok=True)
    said = {"eridiff.config": json.dumps({case.family: asdict(case.config)})}
    for name, tensors, metadata in (("weights", state, said), ("inputs", inputs, {})):
        narrow = {n: (t.to(dtype) if t.is_floating_point() else t).contiguous() for n, t in tensors.items()}
        write_tensors(narrow, out / f"{name}.safetensors", metadata)
    for name in ("case.json", "expected.safetensors"):
        shutil.copyfile(folder / name, out / name)
    (out / "names.txt").write_text("".join(f"{line}\n" for line in names_table(case)), encoding="utf-8")
    for path in sorted(out.iterdir()):
        print(path)
    return 0


def names_table(case: Case) -> list[str]:
    """A line for each tensor of the case: its name, the original's, diffusers', the shape; `-` where a layout has none."""
    aligned = align(list(case.expected), {case.family: case.config})
    rows = [("name", *key_map(case.family).layouts, "shape")]
    for native, source in aligned.sources.items():
        foreign = [
            names_of(case.family, layout, case.config).foreign(native) for layout in key_map(case.family).layouts
        ]
        rows.append((source.name, *foreign, str(list(case.expected[source.name].shape))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _check(options: argparse.Namespace) -> int:
    given = {path.name.removesuffix(".npz").removesuffix(".safetensors"): path for path in options.traces}
    known = cases()
    wrong = next((name for name in given if name not in known), None)
    if wrong is not None:
        raise TraceError(f"{quoted(given[wrong])} is not named as a case; `eridiff golden list` names them")
    code = 0
    for name, path in sorted(given.items(), key=lambda item: natural(item[0])):
        case = open_case(known[name])
        report = case_report(read_trace(path), case, explain=options.explain)
        print(
            f"{name}: {text(report)}"
            if not report.equal
            else f"{name}: equal, {sum(bool(r.other) for r in report.rows)} tensors"
        )
        code |= not report.equal
    for eps in dict.fromkeys(open_case(known[name]).epsilons for name in given):
        if eps not in given:
            print(f"{eps} is missing: without it a wrong epsilon passes")
            code = 1
    return code
