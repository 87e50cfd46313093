"""`eridiff inspect`: say what a file is."""

import argparse
import json
from typing import Any

from eridiff.inspect import inspect, summary


def add_parser(commands: Any) -> None:
    """Put the command beside the others."""
    parser = commands.add_parser(
        "inspect", help="say what a file is", description="Say what a checkpoint is, to the last key."
    )
    parser.set_defaults(run=_inspect)
    parser.add_argument("path", metavar="FILE|FOLDER")
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    parser.add_argument("--values", action="store_true", help="read every weight and name those that are not finite")


def _inspect(options: argparse.Namespace) -> int:
    report = inspect(options.path, values=options.values)
    print(json.dumps(report, indent=2) if options.json else summary(report))
    return 2 if report["problems"] else 0
