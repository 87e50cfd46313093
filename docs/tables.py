"""Write the tables of docs/configuration.md that follow from the code, and docs/cli.md: `python docs/tables.py`; a test runs it.

A table stands between `<!-- NAME -->` and `<!-- end -->`.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from eridiff.cli import _parser
from eridiff.config import KEYS, NO_EFFECT, SAID
from eridiff.prompt_files import FLAGS, KOHYA_KEYS
from eridiff.request import FIELDS, WORDS

DOCUMENT = Path(__file__).parent / "configuration.md"
EXAMPLES = {  # of keys that are not of an image
    "prompts": "[a swan, a fox]", "samples": "[{prompt: a swan, seed: 5}]", "walk_seed": "true", "lenient": "true",
    "lora": "[fox.safetensors, {file: night.safetensors, scale: 0.5}]", "use_lora": "false", "lora_partial": "true",
    "out": "pictures", "sample_every": "250", "sample_start_step": "500", "skip_first_sample": "true",
    "sample_at_end": "true", "sample_max_seconds": "60",
}  # fmt: skip
BECOMES = {
    "prompts": "`prompt: a swan`", "samples": "`{prompt: a swan, seed: 5}`", "walk_seed": "`seed: 42`",
    "lora": "`lora: [[fox.safetensors, null], [night.safetensors, 0.5]]`",
}  # fmt: skip


def table(head: str, rows: Iterator[str]) -> str:
    """A table in Markdown."""
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *rows])


def section() -> Iterator[str]:
    """Every key of the section `sample`: an example, whether an entry may have it, and what it becomes."""
    for key in ("prompts", "samples", *KEYS):
        yield f"| `{key}` | `{EXAMPLES[key]}` | | {BECOMES.get(key, f'`{key}: {EXAMPLES[key]}`')} |"
    for key, name in SAID.items():
        example = FIELDS[WORDS.get(name, name)].metadata["kind"].example
        yield f"| `{key}` | `{example}` | yes | `{name}: {example}` |"
    for key in NO_EFFECT:
        yield f"| `{key}` | `{EXAMPLES.get(key, '1')}` | yes | without effect |"


def doors() -> Iterator[str]:
    """Every field of `Request` at every door; trainers' prompts are the texts with flags, kohya's its files' entries too."""

    def flags(scale: str) -> dict[str, list[str]]:
        """Of each field, where `scale` is what a trainer means by it."""
        found: dict[str, list[str]] = {}
        for flag, (key, _) in FLAGS.items():
            name = {"scale": scale, "prompt_2": "prompt"}.get(key, SAID.get(key, key))
            found.setdefault(name, []).append(f"`--{flag}`")
        return found

    toolkit, kohya = flags("guidance_scale"), flags("cfg_scale")
    renamed = {WORDS.get(name, name): key for key, name in KOHYA_KEYS.items()}
    for name, told in FIELDS.items():
        data = told.metadata
        if data["python"]:
            yield f"| `{name}` | with tensors, in a program alone | | | | {data['help']} |"
            continue
        keys = [f"`{key}`" for key in dict.fromkeys((name, *data["words"])) if key in SAID or key == "prompts"]
        line = ["`--prompt`"] if name == "prompt" else [f"`--{f.replace('_', '-')}`" for f in (*data["flags"], name)]
        entry = [f"`{renamed.get(name, name)}`", *kohya.get(name, [])]
        text = toolkit.get(name, ["the section's key"])
        low, high = data["low"], data["high"]
        ends = f"; {low:g} to {high:g}" if high is not None else f"; at least {low:g}" if low is not None else ""
        columns = (f"`{name}`", *map(", ".join, (keys, line, text, entry)), f"{data['help']}{ends}")
        yield f"| {' | '.join(columns)} |"


TABLES = {
    "request": (
        "| Python, PNG, resample | section, ai-toolkit's too | command line | ai-toolkit's prompts | kohya's prompts | what |",
        doors,
    ),
    "section": ("| key | example | each | here |", section),
}


def written(text: str) -> str:
    """The document with its tables made anew."""
    for name, (head, rows) in TABLES.items():
        made = f"<!-- {name} -->\n\n{table(head, rows())}\n\n<!-- end -->"
        text, count = re.subn(rf"<!-- {name} -->.*?<!-- end -->", lambda _, made=made: made, text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{DOCUMENT} has {count} places for the table '{name}'")
    return text


def command_line() -> str:
    """docs/cli.md: every command with its arguments, from the parser."""
    parts = ["# Command line", "Every command takes `--help`. An error is one line on stderr, with exit status 2."]

    def page(parser: argparse.ArgumentParser) -> None:
        nested = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
        if nested is not None:
            for each in nested.choices.values():
                page(each)
            return
        parts.append(f"## {parser.prog}")
        parts.append(parser.description or "")
        for group in parser._action_groups:
            rows = [a for a in group._group_actions if a.help != argparse.SUPPRESS and a.dest != "help"]
            if rows:
                parts.append(table(f"| {group.title} | |", (f"| {_usage(a)} | {a.help or ''} |" for a in rows)))

    page(_parser())
    return "\n\n".join(part for part in parts if part) + "\n"


def _usage(action: argparse.Action) -> str:
    metavar = action.metavar or ("{" + ", ".join(map(str, action.choices)) + "}" if action.choices else "")
    value = " ".join(metavar) if isinstance(metavar, tuple) else metavar
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    taken = f" `{value}`".replace("|", " or ") if value and action.nargs != 0 else ""
    return f"{names}{taken}".strip()


COMMANDS = DOCUMENT.with_name("cli.md")

if __name__ == "__main__":
    COMMANDS.write_text(command_line())
    DOCUMENT.write_text(written(DOCUMENT.read_text()))
