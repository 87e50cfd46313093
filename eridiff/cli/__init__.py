"""The command line: one file a command."""

import argparse
import logging
import os
import sys

import torch

from eridiff import __version__
from eridiff.cli import convert, diff, golden, inspect, ladder, lora, plan, resample, sample
from eridiff.errors import EridiffError

COMMANDS = (sample, resample, plan, inspect, convert, lora, diff, ladder, golden)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0, or 2 after one sentence on stderr for input that cannot be used."""
    logging.basicConfig(format="eridiff: %(message)s", level=logging.WARNING)
    try:
        options = _parser().parse_args(arguments)
        code = int(options.run(options))
        sys.stdout.flush()
        return code
    except (EridiffError, argparse.ArgumentError) as error:
        print(f"eridiff: {error}", file=sys.stderr)
        return 2
    except (MemoryError, torch.OutOfMemoryError):
        print(
            "eridiff: out of memory: --offload stages keeps one component on the device, --offload layers one layer, "
            "--vae-rows 64 decodes in strips; eridiff plan says what is needed",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:  # the reader of a pipe has gone, as `| head` does; nothing may be flushed to it at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    """argparse, whose mistakes are one sentence as all others are."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise EridiffError(f"{message}; {self.prog} --help shows what there is")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="eridiff",
        description="Generate images with Flux, Stable Diffusion 3 and SDXL, from published checkpoints.",
    )
    parser.add_argument("--version", action="version", version=f"eridiff {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
