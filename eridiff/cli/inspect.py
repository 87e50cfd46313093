"""`eridiff inspect`: say what a file is."""

import argparse
import json
from typing import Any

from eridiff.cli.common import check_model
from eridiff.report import inspect, inspect_lora, lora_summary, summary


def add_parser(commands: Any) -> None:
    """Put the command beside the others."""
    parser = commands.add_parser(
        "inspect", help="say what a file is", description="Identify a checkpoint or a LoRA, and check every key."
    )
    parser.set_defaults(run=_inspect)
    parser.add_argument("path", metavar="FILE|FOLDER")
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    parser.add_argument("--values", action="store_true", help="read every weight and name those that are not finite")
    parser.add_argument(
        "--keys", action="store_true", help="list every tensor: its name, dtype, shape and eridiff's name"
    )


def _inspect(options: argparse.Namespace) -> int:
    check_model(options.path)
    lora = inspect_lora(options.path)
    if lora is not None:
        print(json.dumps(lora, indent=2) if options.json else lora_summary(lora))
        return 0
    report = inspect(options.path, values=options.values, keys=options.keys)
    print(json.dumps(report, indent=2) if options.json else summary(report))
    return 2 if report["problems"] else 0
