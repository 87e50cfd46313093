"""Write the tables that follow from the code or from measurements, and docs/cli.md: `python docs/tables.py`; a test runs it.

A table stands between `<!-- NAME -->` and `<!-- end -->`.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from eridiff.cli import _parser
from eridiff.config import KEYS, NO_EFFECT, SAID
from eridiff.prompt_files import FLAGS, KOHYA_KEYS
from eridiff.recipe import OWN, TITLES, families, recipe, recipes
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


CASES = {"G1": "FLUX.1-dev", "G3": "SD 3.5 large", "G5": "SDXL base", "G6a": "decoding"}


def on_a_gpu() -> Iterator[str]:
    """Milliseconds a step on an H200, of the last run and of the one before: eridiff's, diffusers' and the limit by arithmetic."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for run in ("-before", "", "-sdxl-compiled"):
        for part in json.loads((RESULTS / f"gpu-nvidia-h200{run}.json").read_text())["sections"]:
            found[part["name"] + run] = {row["name"]: row for row in part["rows"] if "ms" in row}
    compiled = {name: f"{name} compiled" + ("-sdxl-compiled" if name == "G5" else "") for name in CASES}
    step = {name: "ours" if name == "G6a" else "ours, step" for name in CASES}

    def row(what: str, section: Callable[[str], str], way: Callable[[str], str]) -> str:
        rows = [found.get(section(name), {}).get(way(name)) for name in CASES]
        return " | ".join([f"| {what}", *(f"{row['ms']:.0f}" if row else "" for row in rows)]) + " |"

    def of_case(name: str) -> str:
        return name

    yield row("eridiff, before", lambda name: f"{name}-before", step.__getitem__)
    yield row("**eridiff, eager**", of_case, step.__getitem__)
    yield row("diffusers, eager", of_case, lambda _: "diffusers")
    ratios = (found[name]["diffusers"]["ms"] / found[name][step[name]]["ms"] for name in CASES)
    yield f"| diffusers / eridiff, eager | {' | '.join(f'**{ratio:.2f}**' for ratio in ratios)} |"
    yield row("eridiff, eager, as a CUDA graph", of_case, lambda _: "ours, step, as a CUDA graph")
    yield row("eridiff, compiled", compiled.__getitem__, lambda _: "ours compiled, step")
    yield row("diffusers, compiled", compiled.__getitem__, lambda _: "diffusers compiled")
    yield row(
        "eridiff, compiled, as a CUDA graph", compiled.__getitem__, lambda _: "ours compiled, step, as a CUDA graph"
    )
    limits = (found[name][step[name]]["ms"] * found[name][step[name]]["of_limit"] for name in CASES)
    yield f"| limit by arithmetic | {' | '.join(f'{limit:.0f}' for limit in limits)} |"


AIMED = {  # case, way and beside what -> under equal settings, and with defaults of one's own
    ("C1s", "step", "diffusers"): "2.6", ("C1s", "step, compiled", "diffusers"): "2.4", ("C1", "step", "diffusers"): "1.2",
    ("C2", "step", "diffusers"): "1.25, 1.4", ("C3", "step", "diffusers"): "1.05, 1.6", ("C4", "step", "diffusers"): "1.1, 1.4",
    ("C5a", "step", "diffusers"): "1.15, 1.4", ("C5b", "step", "diffusers"): "1.08, 1.4",
    ("C6a", "forward", "diffusers, channels last"): "1.15",
}  # fmt: skip


def on_a_cpu() -> Iterator[str]:
    """How many times as fast as diffusers, on a Xeon and, without the last changes, on a Zen 4."""
    now, before = (
        {(row["case"], row["way"], row["beside"]): row for row in json.loads((RESULTS / name).read_text())["rows"]}
        for name in ("cpu.json", "cpu-zen4.json")
    )
    for asked in now:
        case, way, beside = asked
        if beside == "eridiff's step":
            continue
        cells = [f"{found[asked]['ratio']:.2f}" if asked in found else "" for found in (now, before)]
        limit = f"{now[asked]['at_most']:.2f}" if "at_most" in now[asked] else ""
        other = beside.removeprefix("diffusers").removeprefix(", ")
        yield f"| {case}, {way} | {other} | **{cells[0]}** | {limit} | {cells[1]} | {AIMED.get(asked, '')} |"


def cached() -> Iterator[str]:
    """Per steps and threshold, of both built-in models: share of evaluations from the cache, distance of latents and of pixels."""
    found = json.loads((RESULTS / "lossy.json").read_text())["block_cache"]
    for flux, sd35 in zip(found["tiny-flux"], found["tiny-sd35"], strict=True):
        cells = [
            f"{row['reused']:.0%} | {row['latents']:.1%} | {row['levels']:.1f} | {row['measured']:.0%}"
            for row in (flux, sd35)
        ]
        yield f"| {flux['steps']} | {flux['threshold']:g} | {' | '.join(cells)} |"


def in_float8() -> Iterator[str]:
    """Distance of images with float8 layers from those in bfloat16, of each built-in model."""
    for name, rows in json.loads((RESULTS / "lossy.json").read_text())["float8"].items():
        for row in rows:
            yield f"| {name} | {row['steps']} | {row['latents']:.1%} | {row['levels']:.1f} | {row['measured']:.1%} |"


def choices(family: str) -> tuple[str, Callable[[], Iterator[str]]]:
    """Head and rows of what every program chooses for a family; a dagger is from reading alone."""
    names = [name for name in recipes() if name != OWN and family in families(name)]
    found = {name: recipe(name, family) for name in names}
    head = " | ".join(f"{name}{'' if found[name].seen == 'run' else ' †'}" for name in names)

    def rows() -> Iterator[str]:
        for field in FIELDS:
            told = [found[name].of().get(field) for name in names]
            if any(choice is not None for choice in told):
                cells = ["" if c is None or c.value in (None, "") else f"{c.value}" for c in told]
                yield f"| `{field}` | {' | '.join(cells)} |"

    return f"| | {head} |", rows


TABLES = {
    "same-image.md": {family: choices(family) for family in TITLES},
    "configuration.md": {
        "request": (
            "| Python, PNG, resample | section, ai-toolkit's too | command line | ai-toolkit's prompts | kohya's prompts | what |",
            doors,
        ),
        "section": ("| key | example | each | here |", section),
    },
    "speed.md": {
        "gpu": (
            f"| ms a step | {' | '.join(CASES.values())} |",
            on_a_gpu,
        ),
        "cpu": ("| diffusers / eridiff | beside diffusers as | Xeon | at most | Zen 4, before | aimed at |", on_a_cpu),
        "block_cache": (
            f"| steps | threshold |{' from the cache | latents | pixels | measured |' * 2}",
            cached,
        ),
        "float8": ("| | steps | latents | pixels | measured |", in_float8),
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
