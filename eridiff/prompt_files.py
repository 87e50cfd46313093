"""Prompts with flags, as kohya's and ai-toolkit's trainers write them, and kohya's prompt files (.txt, .toml, .json).

A flag begins with `--` after a blank and ends with the next one: `a swan --w 832 --h 1216 --n blurry, text`. Everything
before the first is the prompt. `--` inside a word or before a blank is text. Capitals are as good as small letters.
"""

import json
import re
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from eridiff.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FLAGS: dict[str, tuple[str, type]] = {  # flag -> key of an entry, type of its value
    "n": ("negative_prompt", str), "w": ("width", int), "h": ("height", int), "d": ("seed", int), "seed": ("seed", int),
    "s": ("sample_steps", int), "steps": ("sample_steps", int), "l": ("scale", float), "cfg": ("scale", float),
    "g": ("guidance_scale", float), "gr": ("cfg_rescale", float), "ss": ("sampler", str), "ref": ("hand_over", float),
    "m": ("lora_scale", float), "network_multiplier": ("lora_scale", float), "p2": ("prompt_2", str),
    "ctrl_img": ("references", str),
}  # fmt: skip
UNUSED_FLAGS = {
    **dict.fromkeys(["cn", "ctrl_idx", "a"], "there are no adapters"),
    **dict.fromkeys(["ctr", "rcfg", "fs", "ev", "extra_values"], "no model here takes them"),
    **dict.fromkeys(["frames", "num_frames", "fps"], "images do not move"),
    **dict.fromkeys(["n2"], "a negative prompt is one for all encoders"),
    **dict.fromkeys(
        ["i", "t", "am", "ow", "oh", "nw", "nh", "ct", "cl", "c", "nl", "f", "glt"], "it is not for prompts of training"
    ),
}
KOHYA_KEYS = {"scale": "true_cfg_scale", "sample_sampler": "sampler"}
UNUSED_KOHYA_KEYS = {
    "controlnet_image": "there are no adapters",
    "prompt_2": "a prompt is one for all encoders",
    **dict.fromkeys(["cfg_trunc_ratio", "renorm_cfg", "flow_shift"], "no model here takes them"),
}
Entry = dict[str, Any]  # keys as in the `sample:` section's `samples`


def split_flags(line: str, where: str, unused: dict[str, str]) -> Entry:
    """`prompt` and what the flags say; `scale` is what `--l` says, whose meaning is the trainer's.

    Raises ConfigError, naming `where`, for a flag that is unknown or has a value that it cannot have. Flags without effect
    go into `unused`, with the reason.
    """
    prompt, *pieces = re.split(r"(?:^|\s+)--(?=[A-Za-z])", line.strip())
    entry: Entry = {"prompt": prompt}
    for piece in pieces:
        flag, value = [*piece.split(maxsplit=1), ""][:2]
        name = flag.lower()
        if name in UNUSED_FLAGS:
            unused[f"--{name}"] = UNUSED_FLAGS[name]
        elif name in FLAGS:
            key, kind = FLAGS[name]
            entry[key] = _value(value.strip(), kind, f"{where}: --{flag}")
        else:
            raise ConfigError(f"{where}: '--{flag}' is not a flag{_hint(name)}")
    return entry


DIGITS = 40  # Python converts no number of thousands, and no setting has so many


def _value(text: str, kind: type, what: str) -> Any:
    if kind is str:
        return text
    pattern = r"[-+]?\d+" if kind is int else r"[-+]?(\d+\.?\d*|\.\d+)"
    if len(text) > DIGITS or not re.fullmatch(pattern, text):
        raise ConfigError(f"{what} must be {'a whole number' if kind is int else 'a number'}, not '{text}'")
    return kind(text)


def _hint(name: str) -> str:
    joined = re.fullmatch(r"([a-z]+)=?([-+.\d].*)", name)
    if joined and joined[1] in FLAGS:
        return f"; a blank stands between a flag and its value: --{joined[1]} {joined[2]}"
    long = {key: flag for flag, (key, _) in reversed(FLAGS.items())}  # the names of settings lead to their flags
    near = get_close_matches(name, [*FLAGS, *long], 1, 0.6)
    known = long.get(near[0], near[0]) if near else None
    if known:
        return f"; did you mean --{known}?"
    return f" (text goes on with a blank after '--'); there are {', '.join(f'--{flag}' for flag in FLAGS)}"


def read_prompts(given: object, unused: dict[str, str]) -> list[Entry]:
    """The entries of kohya's prompt file, given as text, TOML's tables or JSON's list. Raises ConfigError, naming line or entry.

    In a text every line is an image; blank ones and those that begin with # are not. In TOML `[prompt]` holds what the
    entries `[[prompt.subset]]` do not say. JSON is a list of entries, or of lines as in a text.
    """
    if isinstance(given, str):
        lines = [(n, line) for n, line in enumerate(given.split("\n"), 1) if line.strip() and not line.startswith("#")]
        entries = [_kohya(split_flags(line, f"line {n}", unused), unused) for n, line in lines]
    else:
        given = _subsets(given) if isinstance(given, dict) else given
        if not isinstance(given, list):
            raise ConfigError("a list of prompts is expected")
        entries = [_entry(each, f"entry {n}", unused) for n, each in enumerate(given, 1)]
    if not entries:
        raise ConfigError("the file holds no prompt")
    return entries


def _entry(given: object, where: str, unused: dict[str, str]) -> Entry:
    if isinstance(given, str):
        return _kohya(split_flags(given, where, unused), unused)
    if not isinstance(given, dict) or not isinstance(given.get("prompt"), str):
        raise ConfigError(f"{where} must be a text, or a mapping with a prompt, not {given!r}")
    return _kohya(given, unused)


def _kohya(entry: Mapping[str, Any], unused: dict[str, str]) -> Entry:
    """An entry in our words: kohya's scale is true guidance, for Flux too."""
    unused |= {key: UNUSED_KOHYA_KEYS[key] for key in entry if key in UNUSED_KOHYA_KEYS}
    return {KOHYA_KEYS.get(key, key): value for key, value in entry.items() if key not in UNUSED_KOHYA_KEYS}


def _subsets(document: Mapping[str, Any]) -> list[object]:
    section = document.get("prompt")
    if not isinstance(section, dict) or not isinstance(section.get("subset"), list) or len(document) > 1:
        raise ConfigError("a list of prompts or, in TOML, a table [prompt] with entries [[prompt.subset]] is expected")
    usual = {key: value for key, value in section.items() if key != "subset"}
    return [usual | entry if isinstance(entry, dict) else entry for entry in section["subset"]]


def read_toml(text: str) -> dict[str, Any]:
    """TOML; raises ConfigError for a mistake."""
    try:
        return tomllib.loads(text)
    except ValueError as error:  # Python's limit of digits too
        raise ConfigError(f"is not TOML: {error}") from None
    except RecursionError:
        raise ConfigError("lists or mappings are nested too deep") from None


def read_json(text: str) -> Any:
    """JSON with `//` and `/* */` comments, as in .jsonc; raises ConfigError for a mistake or a repeated key."""

    def pairs(given: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in given:
            if key in result:
                raise ConfigError(f"the key '{key}' is repeated")
            result[key] = value
        return result

    strings_or_comments = r'("(?:\\.|[^"\\])*")|//[^\n]*|/\*.*?\*/'
    plain = re.sub(strings_or_comments, lambda m: m[1] or re.sub(r"[^\n]", " ", m[0]), text, flags=re.DOTALL)
    try:
        return json.loads(plain, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise ConfigError(f"line {error.lineno}: is not JSON: {error.msg}") from None
    except ValueError:  # Python's limit
        raise ConfigError("a number has too many digits") from None
    except RecursionError:
        raise ConfigError("lists or mappings are nested too deep") from None
