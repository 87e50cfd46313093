"""The YAML that says what to draw: read with YAML 1.2's scalars, every key known, every mistake one sentence.

PyYAML reads YAML 1.1, where a prompt `no` is False, `16:9` is 969 and `1e-4` is text; duplicate keys pass silently.
"""

import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from eridiff.errors import ConfigError


class Reader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema, without aliases, with text keys that stand once."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # its own, not the process's

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ConfigError(
                f"{_place(self.peek_event())}: '*' begins an alias, which is not supported; quote the text"
            )
        event = self.peek_event()
        if getattr(event, "anchor", None):
            raise ConfigError(f"{_place(event)}: '&' begins an anchor, which is not supported; quote the text")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        result: dict[Hashable, Any] = {}
        lines: dict[Hashable, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{_place(key_node)}: a key must be a word")
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in result:
                raise ConfigError(f"{_place(key_node)}: the key '{key}' stands twice, first in line {lines[key]}")
            result[key], lines[key] = self.construct_object(value_node, deep=True), line
        return result


for _tag, _pattern, _first in [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
]:
    Reader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _number(loader: Reader, node: Any) -> int | float:
    return (int if node.tag.endswith("int") else float)(loader.construct_scalar(node))


Reader.add_constructor("tag:yaml.org,2002:int", _number)
Reader.add_constructor("tag:yaml.org,2002:float", _number)
Reader.add_constructor("tag:yaml.org,2002:map", Reader.construct_mapping)


def read_yaml(text: str) -> Any:
    """What a YAML document says; raises ConfigError with the line of a mistake and what may be meant."""
    try:
        return yaml.load(text, Reader)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_explained(error, text)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"a character that YAML does not allow: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError("lists or mappings are nested too deep") from None


def _place(thing: Any) -> str:
    return f"line {thing.start_mark.line + 1}"


def _explained(error: yaml.MarkedYAMLError, text: str) -> str:
    mark = error.problem_mark or error.context_mark
    number = mark.line if mark else 0
    lines = text.splitlines()
    line = lines[number].strip() if number < len(lines) else ""
    problem = str(error.problem or error.context)
    if "\t" in problem or "\\t" in problem:
        return f"line {number + 1}: a tab where spaces are needed"
    if "unknown escape" in problem:
        return f"line {number + 1}: a backslash in double quotes begins an escape; use single quotes or '/': {line}"
    if "but found another document" in problem:
        return f"line {number + 1}: a second document begins; one is expected"
    body = re.sub(r"^(- |\w+:\s+)+", "", line)
    quoted = f"'{body.replace(chr(39), chr(39) * 2)}'"
    return f"line {number + 1}: {problem}; text with : # [ ] {{ }} & * ! or quotes in it must be quoted, here perhaps {quoted}"


@dataclass(frozen=True)
class SampleSettings:
    """The `sample:` section; None is the model's own default."""

    prompts: tuple[str | dict[str, str], ...] = ()  # a text, or one for each text encoder
    negative_prompt: str | None = None
    sample_steps: int | None = None
    guidance_scale: float | None = None  # what a guidance embedding is told
    cfg_scale: float | None = None  # classifier-free guidance; what it means for Flux: see `settle_guidance`
    true_cfg_scale: float | None = None  # the same without a second meaning
    cfg_rescale: float = 0.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    skip_layers: bool | dict[str, Any] = False  # True is the published setting, else blocks, scale, start and end
    sampler: str | None = None
    schedule: str | tuple[float, ...] | None = None  # by name, or the sigmas
    shift: float | None = None
    hand_over: float | None = None  # share of the run after which a refiner goes on
    original_size: tuple[int, int] | None = None  # (height, width); these five are what SDXL is told of the picture
    crop: tuple[int, int] | None = None  # (top, left)
    target_size: tuple[int, int] | None = None
    aesthetic_score: float | None = None  # the refiner's
    negative_aesthetic_score: float | None = None
    seed: int = 42
    walk_seed: bool = False  # seed, seed + 1, ... over the prompts
    width: int | None = None
    height: int | None = None
    image: str | None = None
    strength: float | None = None
    mask: str | None = None
    control: str | None = None
    out: str = "samples"
    sample_every: int = 100  # steps of training; these five are for eridiff.training.Sampler
    sample_start_step: int = 0
    sample_skip_first: bool = False
    sample_at_end: bool = True
    sample_max_seconds: float | None = None  # of all pictures of a step


@dataclass(frozen=True)
class RunConfig:
    """A whole file: what to load, how to run, what to draw, and what to tell the reader of the file."""

    model: str | dict[str, Any] | None = None
    device: str | None = None
    dtype: str | None = None
    offload: str | None = None
    refiner: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # how the model is loaded: MODEL_OPTIONS
    sample: SampleSettings = field(default_factory=SampleSettings)
    notices: tuple[str, ...] = ()


SYNONYMS = {"neg": "negative_prompt", "negative": "negative_prompt", "steps": "sample_steps"}
NO_EFFECT = {  # known words of training configurations
    **{
        name: "it is for training"
        for name in ("sample_every", "sample_start_step", "sample_skip_first", "sample_at_end", "sample_max_seconds")
    },
    "use_lora": "no LoRA file is given",
    "lora_scale": "no LoRA file is given",
    "network_multiplier": "no LoRA file is given",
    "format": "pictures are PNG",
}
SAMPLER_SYNONYMS = {"flowmatch": "euler"}  # of ai-toolkit
MODEL_OPTIONS: dict[str, type] = {
    "variant": str, "t5_padding": str, "without_t5": str, "clip_windows": str, "prediction": str, "empty_negative": str,
    "vae_rows": int,
}  # fmt: skip
TOP = ("model", "refiner", "device", "dtype", "offload", *MODEL_OPTIONS, "sample")
ENCODERS = ("clip", "clip_g", "t5")  # a prompt may be given for each


def load_config(path: str | Path) -> RunConfig:
    """Read a YAML file; raises ConfigError, naming file and line, for anything that is unknown or impossible."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return parse_config(read_yaml(text))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_config(document: Any) -> RunConfig:
    """The configuration that a YAML document means; raises ConfigError."""
    if document is None:
        raise ConfigError("the file is empty; it needs a section 'sample'")
    if not isinstance(document, dict):
        raise ConfigError(f"a mapping with a section 'sample' is expected, not {type(document).__name__}")
    _known(document, TOP, "the file")
    model = document.get("model")
    if model is not None and not isinstance(model, str | dict):
        raise ConfigError(f"model must be a path, a hub id or the parts by name, not {model!r}")
    section = document.get("sample") or {}
    if not isinstance(section, dict):
        raise ConfigError(f"sample must be a mapping, not {section!r}")
    names = [f.name for f in fields(SampleSettings)]
    _known(section, [*names, *SYNONYMS, *NO_EFFECT], "sample")
    notices = tuple(
        f"{key} has no effect here: {NO_EFFECT[key]}"
        for key in section
        if key in NO_EFFECT and section[key] is not False
    )
    values: dict[str, Any] = {}
    for key, value in section.items():
        name = str(SYNONYMS.get(key, key))
        if (name in NO_EFFECT and name not in names) or value is None:
            continue
        if name in values:
            raise ConfigError(f"sample: '{key}' and another key both mean {name}; keep one")
        read = _SPECIAL.get(name)
        values[name] = read(value) if read else _scalar(f"sample: {key}", value, _TYPES[name])
    texts = {
        name: _scalar(name, document.get(name), str)
        for name in ("device", "dtype", "offload", "refiner")
        if document.get(name)
    }
    options = {n: _scalar(n, document[n], kind) for n, kind in MODEL_OPTIONS.items() if document.get(n) is not None}
    return RunConfig(model=model, options=options, sample=SampleSettings(**values), notices=notices, **texts)


_TYPES: dict[str, type] = {
    f.name: next(t for t in (bool, int, float, str) if t.__name__ in str(f.type)) for f in fields(SampleSettings)
}


def _known(section: Mapping[str, Any], known: Any, where: str) -> None:
    for key in section:
        if key not in known:
            near = get_close_matches(key.lower(), list(known), 1, 0.5)
            hint = f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(known)}"
            raise ConfigError(f"'{key}' is no key of {where}{hint}")


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise ConfigError(f"sample: {name} must be a list of numbers such as [0, 0.8], not {value!r}")
    return tuple(_scalar(f"sample: {name}", number, float) for number in value)


def _schedule(value: Any) -> str | tuple[float, ...]:
    return _numbers("schedule", value) if isinstance(value, list) else _scalar("sample: schedule", value, str)


def size_of(name: str, text: Any) -> tuple[int, int]:
    """(height, width) of a size written as WIDTHxHEIGHT."""
    found = re.fullmatch(r"(\d+)[xX](\d+)", text) if isinstance(text, str) else None
    if not found:
        raise ConfigError(f"{name} must be WIDTHxHEIGHT such as 1024x768, not {text!r}")
    return int(found[2]), int(found[1])


def _crop(value: Any) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise ConfigError(f"sample: crop must be two numbers, top and left, such as [0, 64], not {value!r}")
    top, left = (_scalar("sample: crop", number, int) for number in value)
    return top, left


def _sampler(value: Any) -> str:
    name = _scalar("sample: sampler", value, str)
    return SAMPLER_SYNONYMS.get(name, name)


def _skip_layers(value: Any) -> bool | dict[str, Any]:
    if not isinstance(value, dict):
        return _scalar("sample: skip_layers", value, bool)
    _known(value, ("blocks", "scale", "start", "end"), "skip_layers")
    blocks = value.get("blocks")
    if not isinstance(blocks, list) or not all(type(block) is int and block >= 0 for block in blocks):
        raise ConfigError(f"sample: skip_layers needs blocks, a list of numbers such as [7, 8, 9], not {blocks!r}")
    numbers = {"scale": 2.5, "start": 0.01, "end": 0.2} | {k: v for k, v in value.items() if k != "blocks"}
    return {"blocks": tuple(blocks)} | {k: _scalar(f"skip_layers: {k}", v, float) for k, v in numbers.items()}


def _prompts(value: Any) -> tuple[str | dict[str, str], ...]:
    entries = value if isinstance(value, list) else [value]
    for number, entry in enumerate(entries, 1):
        if isinstance(entry, dict) and entry and set(entry) <= set(ENCODERS):
            for name, text in entry.items():
                _scalar(f"sample: prompt {number}, {name}", text, str)
        elif isinstance(entry, dict):
            text = ", ".join(f"{k}: {v}" if v is not None else f"{k}:" for k, v in entry.items())
            raise ConfigError(f'sample: prompt {number} has a colon and must be quoted: - "{text}"')
        elif entry is None:
            raise ConfigError(
                f"sample: prompt {number} is empty; '#' begins a comment, and an empty prompt is written \"\""
            )
        elif isinstance(entry, list):
            raise ConfigError(f"sample: prompt {number} begins with '[' and must be quoted")
        elif not isinstance(entry, str):
            raise ConfigError(f'sample: prompt {number} is read as a {type(entry).__name__}; quote it: - "{entry}"')
    if not entries:
        raise ConfigError("sample: the list of prompts is empty")
    return tuple(entry.strip() if isinstance(entry, str) else entry for entry in entries)


_SPECIAL: dict[str, Callable[[Any], Any]] = {
    "prompts": _prompts, "cfg_interval": partial(_numbers, "cfg_interval"), "schedule": _schedule, "sampler": _sampler,
    "skip_layers": _skip_layers, "original_size": partial(size_of, "sample: original_size"),
    "target_size": partial(size_of, "sample: target_size"), "crop": _crop,
}  # fmt: skip


def _scalar(name: str, value: Any, kind: type) -> Any:
    """A value of the type wanted; whole numbers serve as floats."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is kind:
        return value
    wanted = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]
    digits = isinstance(value, str) and re.fullmatch(r"[\d_, ]+", value)
    hint = f"; write {re.sub('[^0-9]', '', value)}" if digits else ""
    hint = "; write true or false" if kind is bool else hint
    raise ConfigError(f"{name} must be {wanted}, not {value!r}{hint}")


def settle_guidance(
    settings: SampleSettings, embedding: bool, by_cfg: bool = False
) -> tuple[SampleSettings, list[str]]:
    """What `cfg_scale` means for a model, and a notice that says so: afterwards only `true_cfg_scale` asks twice a step.

    A family that is steered by_cfg takes it as it is, and a lone guidance_scale too, as other tools call it. A Flux with a
    guidance embedding and no guidance_scale takes it as the embedding's, as in the trainers that write it; beside a
    guidance_scale it is true guidance; a Flux without the embedding takes neither, so it has no effect.
    """
    cfg, told = settings.cfg_scale, settings.guidance_scale
    if cfg is not None and settings.true_cfg_scale is not None:
        raise ConfigError("sample: cfg_scale and true_cfg_scale both ask for true guidance; keep true_cfg_scale")
    if by_cfg:
        asked = settings.true_cfg_scale if cfg is None else cfg
        notices = []
        if told is not None:
            meaning = (
                f"is taken as cfg_scale {told:g}" if asked is None else f"has no effect beside cfg_scale {asked:g}"
            )
            notices = [f"guidance_scale {told:g} {meaning}: this model has no guidance embedding"]
        return replace(
            settings, cfg_scale=None, guidance_scale=None, true_cfg_scale=told if asked is None else asked
        ), notices
    if cfg is None:
        return settings, []
    if not embedding:
        return replace(settings, cfg_scale=None), [
            f"cfg_scale {cfg:g} has no effect: this Flux has no guidance embedding (true_cfg_scale asks for true guidance)"
        ]
    if told is None:
        return replace(settings, cfg_scale=None, guidance_scale=cfg), [
            f"cfg_scale {cfg:g} is taken as guidance_scale, the guidance embedding (true_cfg_scale asks for true guidance)"
        ]
    return replace(settings, cfg_scale=None, true_cfg_scale=cfg), []
