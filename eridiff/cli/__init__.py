"""The command line: one file per command. A command's file, and torch with it, is imported when the command is used."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from eridiff import __version__
from eridiff.errors import EridiffError

COMMANDS = {  # name -> what it does; its file is called the same
    "sample": "generate images",
    "resample": "generate an image again",
    "recipe": "why two programs' images differ",
    "plan": "say what a model needs on the device",
    "inspect": "say what a file is",
    "convert": "write a model in another layout or dtype",
    "lora": "look into LoRA files and change them",
    "diff": "find the first tensor that differs",
    "ladder": "what rounding does in a network",
    "golden": "cases for ports",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0, or 2 after one sentence on stderr for input that is invalid."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Format())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        options = _parser(given).parse_args(given)
        code = int(options.run(options))
        sys.stdout.flush()
        return code
    except (EridiffError, argparse.ArgumentError) as error:
        print(f"eridiff: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if any(kind.__name__ == "BackendCompilerFailed" for kind in type(error).__mro__):  # of torch
            reason = str(error).strip().split("\n")[0]
            print(f"eridiff: the network cannot be compiled here: {reason}; leave --compile out", file=sys.stderr)
            return 2
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":  # of torch
            raise
        print(
            "eridiff: out of memory: --offload stages keeps one component on the device, --offload stream a few of its blocks, "
            "--vae-rows 64 decodes in strips; eridiff plan says what is needed",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:  # the reader of a pipe has gone, as `| head` does; nothing may be flushed to it at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


class _Format(logging.Formatter):
    """Each warning under the name of the package that gives it."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.name.partition('.')[0]}: {record.getMessage()}"


class _Parser(argparse.ArgumentParser):
    """argparse, whose mistakes are one sentence as all others are, with the nearest name."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # -1GiB is a value too, which its option refuses

    def error(self, message: str) -> None:  # type: ignore[override]
        raise EridiffError(f"{message}; {self.prog} --help shows what there is")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """What is not known is refused by the command that it is given to, which knows its own options."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown[0].partition("=")[0]))
        return options, unknown

    def _unknown(self, name: str) -> str:
        if not name.startswith("-"):
            return f"{self.prog} takes no further argument, and got {name!r}"
        text = f"{name} is not an option of {self.prog}"
        near = _other_tools(name) if self.prog.endswith(" sample") else None
        known = [option for option in self._option_string_actions if option.startswith("--")]
        near = near or next(iter(get_close_matches(name, known, 1, 0.6)), None)
        return f"{text}; did you mean {near}?" if near else text

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            name = "/".join(action.option_strings) or str(action.metavar or action.dest).lower()
            choices = [str(choice) for choice in action.choices]
            near = get_close_matches(str(value), choices, 1, 0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(choices)}"
            what = "is not a command" if name == "command" else f"is not a value of {name}"
            raise EridiffError(f"'{value}' {what}; {hint}")


def _other_tools(name: str) -> str | None:
    """The option that other programs' name of an option means."""
    from eridiff.request import WORDS

    field = WORDS.get(name.lstrip("-").replace("-", "_"))
    return f"--{field.replace('_', '-')}" if field else None


def _parser(wanted: Sequence[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """The parser of all commands; only those that are `wanted` know their arguments."""
    parser = _Parser(
        prog="eridiff",
        description="Generate images with Flux, Stable Diffusion 3 and SDXL, from published checkpoints.",
        epilog="eridiff COMMAND --help shows the options and examples of a command.",
    )
    parser.add_argument("--version", action="version", version=f"eridiff {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, help in COMMANDS.items():
        if name in wanted:
            import_module(f"eridiff.cli.{name}").add_parser(commands)
        else:
            commands.add_parser(name, help=help)
    return parser


if __name__ == "__main__":
    sys.exit(main())
