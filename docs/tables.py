"""Write the tables of docs/configuration.md that follow from the code: `python docs/tables.py`; a test runs it.

A table stands between `<!-- NAME -->` and `<!-- end -->`.
"""

import re
from collections.abc import Iterator
from pathlib import Path

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
    """Every field of `Request`: its name in Python and in a PNG, in sections, on the command line, and in trainers' files."""
    flags: dict[str, list[str]] = {}
    for flag, (key, _) in FLAGS.items():
        name = {"scale": "cfg_scale", "prompt_2": "prompt"}.get(key, SAID.get(key, key))
        flags.setdefault(name, []).append(f"`--{flag}`")
    kohya = {WORDS.get(name, name): key for key, name in KOHYA_KEYS.items()}
    for name, told in FIELDS.items():
        data = told.metadata
        if data["python"]:
            yield f"| `{name}` | with tensors, in a program alone | | | {data['help']} |"
            continue
        keys = [f"`{key}`" for key in dict.fromkeys((name, *data["words"])) if key in SAID or key == "prompts"]
        line = ["`--prompt`"] if name == "prompt" else [f"`--{f.replace('_', '-')}`" for f in (*data["flags"], name)]
        trainers = [*([f"`{kohya[name]}`"] if name in kohya else []), *flags.get(name, [])] or keys[:1]
        low, high = data["low"], data["high"]
        ends = f"; {low:g} to {high:g}" if high is not None else f"; at least {low:g}" if low is not None else ""
        yield f"| `{name}` | {', '.join(keys)} | {', '.join(line)} | {', '.join(trainers)} | {data['help']}{ends} |"


TABLES = {
    "request": ("| Python and PNG | section | command line | trainers' prompts | what |", doors),
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


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text()))
