"""The command `eridiff ladder`: what rounding does at each place of a network."""

import argparse
from typing import Any

import torch

from eridiff.errors import TraceError, quoted
from eridiff.trace.cases import find_case
from eridiff.trace.names import Source
from eridiff.trace.record import record
from eridiff.trace.replay import floors

RUNGS = (torch.float32, torch.bfloat16, torch.float16)


def add_parser(commands: Any) -> None:
    """Put `ladder` beside the other commands."""
    parser = commands.add_parser(
        "ladder",
        help="what rounding does in a network",
        description="What rounding to each dtype does at each place of a golden case's network, by itself.",
    )
    parser.set_defaults(run=_ladder)
    parser.add_argument("case", metavar="CASE", help="a golden case by name or folder")


def _ladder(options: argparse.Namespace) -> int:
    case = find_case(options.case)
    if case is None:
        raise TraceError(f"there is no case {quoted(options.case)}; `eridiff golden list` names those there are")
    with record(case.network) as recording, torch.no_grad():
        case.run(torch.float64)(case.network)
    sources = {
        name: Source((name,)) for name, value in recording.items() if ":" not in name and value.is_floating_point()
    }
    columns = [floors(case.network, case.run, dtype, sources) for dtype in RUNGS]
    width = max(map(len, sources))
    print(f"{'':{width}}" + "".join(f"  {str(dtype).removeprefix('torch.'):>9}" for dtype in RUNGS))
    for name in sources:
        print(f"{name:{width}}" + "".join(f"  {column.get(name, 0.0):9.1e}" for column in columns))
    return 0
