"""Write the tables that follow from the code or from measurements, and docs/cli.md: `python docs/tables.py`; a test runs it.

A table stands between `<!-- NAME -->` and `<!-- end -->`.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

from eridiff.cli import _parser
from eridiff.config import KEYS, NO_EFFECT, SAID
from eridiff.prompt_files import FLAGS, KOHYA_KEYS
from eridiff.request import FIELDS, WORDS

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "benchmarks" / "results"
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


def on_a_gpu() -> Iterator[str]:
    """Milliseconds a step on an H200, of the last run and of the one before: eridiff's, diffusers' and the limit by arithmetic."""
    cases = {
        "G1": "FLUX.1-dev, 512 text tokens", "G3": "SD 3.5 large, guidance", "G5": "SDXL base, guidance",
        "G6a": "decoding, 16 channels",
    }  # fmt: skip
    found: dict[str, dict[str, dict[str, float]]] = {}
    for run in ("-before", "", "-sdxl-compiled"):
        for part in json.loads((RESULTS / f"gpu-nvidia-h200{run}.json").read_text())["sections"]:
            rows = {row["name"]: row for row in part["rows"] if "ms" in row}
            found[part["name"] + run] = rows or found.get(part["name"] + run, {})

    def ms(section: str, row: str) -> str:
        return f"{found[section][row]['ms']:.0f}" if row in found.get(section, {}) else ""

    for name, what in cases.items():
        row = "ours" if name == "G6a" else "ours, step"
        compiled = f"{name} compiled" + ("-sdxl-compiled" if name == "G5" else "")
        limit = found[name][row]["ms"] * found[name][row]["of_limit"]
        eager, theirs = found[name][row]["ms"], found[name]["diffusers"]["ms"]
        cells = (
            ms(f"{name}-before", row), f"**{eager:.0f}**", f"{theirs:.0f}", f"{theirs / eager:.2f}",
            ms(name, "ours, step, as a CUDA graph"), ms(compiled, "ours compiled, step"),
            ms(compiled, "ours compiled, step, as a CUDA graph"), ms(compiled, "diffusers compiled"), f"{limit:.0f}",
        )  # fmt: skip
        yield f"| {what} | {' | '.join(cells)} |"


TABLES = {
    "configuration.md": {
        "request": (
            "| Python, PNG, resample | section, ai-toolkit's too | command line | ai-toolkit's prompts | kohya's prompts | what |",
            doors,
        ),
        "section": ("| key | example | each | here |", section),
    },
    "speed.md": {
        "gpu": (
            "| 1024 x 1024, bfloat16, ms | before | eager | diffusers | faster | CUDA graph | compiled | both | diffusers compiled | limit |",
            on_a_gpu,
        ),
    },
}


def written(document: str) -> str:
    """The document with its tables made anew."""
    text = (FOLDER / document).read_text()
    for name, (head, rows) in TABLES[document].items():
        made = f"<!-- {name} -->\n\n{table(head, rows())}\n\n<!-- end -->"
        text, count = re.subn(rf"<!-- {name} -->.*?<!-- end -->", lambda _, made=made: made, text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{document} has {count} places for the table '{name}'")
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


COMMANDS = FOLDER / "cli.md"

if __name__ == "__main__":
    COMMANDS.write_text(command_line())
    for document in TABLES:
        (FOLDER / document).write_text(written(document))
