"""The configuration that says what to draw: every key known, every mistake one sentence."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import partial
from typing import Any

from eridiff.errors import ConfigError


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
    lenient: bool = False  # as in trainers, sides go down to what the model can draw, and Karras' levels to SDXL alone
    lora: tuple[tuple[str, float | None], ...] = ()  # files, each with its scale; None is lora_scale
    use_lora: bool | None = None  # false draws without them
    lora_scale: float | None = None  # 1 when not said
    lora_partial: bool = False  # what does not fit is left out, not an error
    image: str | None = None
    strength: float | None = None
    mask: str | None = None
    control: str | None = None
    out: str = "samples"
    own: tuple[dict[str, Any], ...] = ()  # what each prompt has in place of the above, by field; none, or one a prompt

    def each(self) -> tuple["SampleSettings", ...]:
        """The settings of each picture: one prompt, its seed, and the section's values where it has none of its own.

        A guidance of its own, under whichever name, replaces the section's cfg_scale.
        """
        result = []
        for i, prompt in enumerate(self.prompts):
            own = {"seed": self.seed + i * self.walk_seed} | (self.own[i] if self.own else {})
            guidance = {"guidance_scale", "cfg_scale", "true_cfg_scale"} & own.keys()
            base = replace(self, cfg_scale=None) if guidance else self
            base = replace(base, true_cfg_scale=None) if "cfg_scale" in own else base
            result.append(replace(base, prompts=(prompt,), own=(), walk_seed=False, **own))
        return tuple(result)


@dataclass(frozen=True)
class TrainingSchedule:
    """When a training run draws; nothing of it has an effect outside training."""

    sample_every: int = 100  # steps; 0 is never
    start_step: int = 0  # no pictures before it
    skip_first: bool = False  # no pictures before the first step
    at_end: bool = True
    max_seconds: float | None = None  # of one round of pictures; None is any


@dataclass(frozen=True)
class RunConfig:
    """A whole file: what to load, how to run, what to draw, and what to tell the reader of the file."""

    model: str | dict[str, Any] | None = None
    family: str | None = None  # flux, mmdit or unet, where the file says it; the model must agree
    device: str | None = None
    dtype: str | None = None
    offload: str | None = None
    refiner: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # how the model is loaded: MODEL_OPTIONS
    sample: SampleSettings = field(default_factory=SampleSettings)
    first_sample: SampleSettings | None = None  # in place of `sample` the first time that a training run draws
    training: TrainingSchedule = field(default_factory=TrainingSchedule)
    notices: tuple[str, ...] = ()


SYNONYMS = {
    "neg": "negative_prompt", "negative": "negative_prompt", "steps": "sample_steps", "guidance_rescale": "cfg_rescale",
    "refiner_start_at": "hand_over", "network_multiplier": "lora_scale",
}  # fmt: skip
SCHEDULE_KEYS = {  # key of the section -> field of TrainingSchedule
    "sample_every": "sample_every", "sample_start_step": "start_step", "skip_first_sample": "skip_first",
    "sample_at_end": "at_end", "sample_max_seconds": "max_seconds",
}  # fmt: skip
NO_EFFECT = {  # known words of training configurations
    **dict.fromkeys(SCHEDULE_KEYS, "it is for training"),
    "format": "pictures are PNG",
    **dict.fromkeys(
        ["adapter_conditioning_scale", "ctrl_img", "ctrl_idx", "ctrl_img_1", "ctrl_img_2", "ctrl_img_3"],
        "there are no adapters",
    ),
    **dict.fromkeys(["extra_values", "do_cfg_norm"], "no model here takes them"),
    **dict.fromkeys(["num_frames", "fps"], "pictures do not move"),
}
ENTRY = (  # fields that an entry of `samples` may have for its own
    "negative_prompt", "sample_steps", "guidance_scale", "cfg_scale", "true_cfg_scale", "cfg_rescale", "sampler",
    "schedule", "shift", "hand_over", "seed", "width", "height", "lora_scale",
)  # fmt: skip
SAMPLER_SYNONYMS = {  # of ai-toolkit and kohya; `k_` before a name asks for Karras' noise levels
    "flowmatch": "euler", "euler_a": "euler_ancestral", "ddpm": "euler_ancestral", "dpmsolver++": "dpmpp_2m",
    "custom_lcm": "lcm",
}  # fmt: skip
ABSENT_SAMPLERS = ("pndm", "lms", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsingle", "mean_flow")
MODEL_OPTIONS: dict[str, type] = {
    "variant": str, "t5_padding": str, "without_t5": str, "clip_windows": str, "prediction": str, "empty_negative": str,
    "vae_rows": int, "t5_mask": bool, "allow_unknown": bool,
}  # fmt: skip
TOP = ("model", "refiner", "device", "dtype", "offload", *MODEL_OPTIONS, "sample", "first_sample")
ENCODERS = ("clip", "clip_g", "t5")  # a prompt may be given for each


def parse_config(document: Any, without_effect: Mapping[str, str] | None = None) -> RunConfig:
    """The configuration that a YAML document means; raises ConfigError.

    What has no effect is told in one notice; `without_effect`, key -> reason, is told in it too.
    """
    if document is None:
        raise ConfigError("the file is empty; it needs a section 'sample'")
    if not isinstance(document, dict):
        raise ConfigError(f"a mapping with a section 'sample' is expected, not {type(document).__name__}")
    _known(document, TOP, "the file")
    model = document.get("model")
    if model is not None and not isinstance(model, str | dict):
        raise ConfigError(f"model must be a path, a hub id or the parts by name, not {model!r}")
    unused = dict(without_effect or {})
    notices: list[str] = []
    section = _mapping("sample", document.get("sample") or {})
    sample = _sample(section, unused, notices)
    texts = {
        name: _scalar(name, document.get(name), str)
        for name in ("device", "dtype", "offload", "refiner")
        if document.get(name)
    }
    options = {n: _scalar(n, document[n], kind) for n, kind in MODEL_OPTIONS.items() if document.get(n) is not None}
    first = document.get("first_sample")
    if first is not None:
        unused["first_sample"] = NO_EFFECT["sample_every"]
    return RunConfig(
        model=model, options=options, sample=sample, training=_training(section),
        first_sample=None if first is None else _sample(_mapping("first_sample", first), {}, []),
        notices=(*_listed(unused), *dict.fromkeys(notices)), **texts,
    )  # fmt: skip


def _listed(unused: Mapping[str, str]) -> list[str]:
    """One notice of all keys that have no effect, by reason."""
    groups: dict[str, list[str]] = {}
    for key, reason in unused.items():
        groups.setdefault(reason, []).append(key)
    told = "; ".join(f"{', '.join(keys)} ({reason})" for reason, keys in groups.items())
    return [f"without effect here: {told}"] if told else []


def _sample(section: Mapping[str, Any], unused: dict[str, str], notices: list[str]) -> SampleSettings:
    _known(section, [*_TYPES, "samples", *SYNONYMS, *NO_EFFECT], "sample")
    if "samples" in section and section.get("prompts") is not None:
        raise ConfigError("sample: 'prompts' and 'samples' both say what to draw; keep one")
    values = _values(section, "sample", unused, notices)
    entries = section.get("samples")
    if entries is not None:
        if not isinstance(entries, list) or not all(isinstance(e, dict) and "prompt" in e for e in entries):
            raise ConfigError("sample: samples must be a list of mappings, each with a prompt")
        values["prompts"] = prompts_of([entry["prompt"] for entry in entries])
        own = []
        for number, entry in enumerate(entries, 1):
            settings = {key: value for key, value in entry.items() if key != "prompt"}
            _known(settings, [*ENTRY, *SYNONYMS, *NO_EFFECT], f"sample: entry {number}")
            own.append(_values(settings, f"sample: entry {number}", unused, notices))
        values["own"] = tuple(own)
    return SampleSettings(**values)


def _values(section: Mapping[str, Any], where: str, unused: dict[str, str], notices: list[str]) -> dict[str, Any]:
    """Fields of SampleSettings that a section or an entry gives."""
    values: dict[str, Any] = {}
    for key, value in section.items():
        name = SYNONYMS.get(key, key)
        if key in NO_EFFECT and value is not None and value is not False:
            unused[key] = NO_EFFECT[key]
        if name not in _TYPES or value is None:
            continue
        if name in values:
            raise ConfigError(f"{where}: '{key}' and another key both mean {name}; keep one")
        read = _SPECIAL.get(name)
        values[name] = read(value) if read else _scalar(f"{where}: {key}", value, _TYPES[name])
    if "sampler" in values:
        values = _sampler(values.pop("sampler"), notices) | values
    return values


def _training(section: Mapping[str, Any]) -> TrainingSchedule:
    kinds = {"sample_every": int, "start_step": int, "skip_first": bool, "at_end": bool, "max_seconds": float}
    never = "sample_every" in section and section["sample_every"] in (None, False)
    given = {n: section[k] for k, n in SCHEDULE_KEYS.items() if section.get(k) is not None}
    given |= {"sample_every": 0} if never else {}
    values = {n: _scalar(f"sample: {n}", value, kinds[n]) for n, value in given.items()}
    for name, value in values.items():
        if value < 0:
            raise ConfigError(f"sample: {name} must not be negative, but is {value}")
    return TrainingSchedule(**values)


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be a mapping, not {value!r}")
    return value


_TYPES: dict[str, type] = {
    f.name: next(t for t in (bool, int, float, str) if t.__name__ in str(f.type))
    for f in fields(SampleSettings)
    if f.name != "own"
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


def _sampler(name: str, notices: list[str]) -> dict[str, str]:
    """The sampler that a trainer's name means, with its schedule; nothing, and a notice, for one that is not there."""
    plain = name.removeprefix("k_")
    if plain in ABSENT_SAMPLERS or name.startswith("sample_"):
        notices.append(f"the sampler '{name}' is not there: the model's own draws")
        return {}
    found = {"sampler": SAMPLER_SYNONYMS.get(plain, plain)}
    return found if plain == name else found | {"schedule": "karras"}


def _skip_layers(value: Any) -> bool | dict[str, Any]:
    if not isinstance(value, dict):
        return _scalar("sample: skip_layers", value, bool)
    _known(value, ("blocks", "scale", "start", "end"), "skip_layers")
    blocks = value.get("blocks")
    if not isinstance(blocks, list) or not all(type(block) is int and block >= 0 for block in blocks):
        raise ConfigError(f"sample: skip_layers needs blocks, a list of numbers such as [7, 8, 9], not {blocks!r}")
    numbers = {"scale": 2.5, "start": 0.01, "end": 0.2} | {k: v for k, v in value.items() if k != "blocks"}
    return {"blocks": tuple(blocks)} | {k: _scalar(f"skip_layers: {k}", v, float) for k, v in numbers.items()}


def prompts_of(value: Any) -> tuple[str | dict[str, str], ...]:
    """Prompts of a YAML list, or one alone; raises ConfigError for an entry that lacks quotes."""
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


def _loras(value: Any) -> tuple[tuple[str, float | None], ...]:
    found: list[tuple[str, float | None]] = []
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, dict):
            _known(entry, ("file", "scale"), "lora")
            scale = entry.get("scale")
            file = _scalar("sample: lora: file", entry.get("file"), str)
            found.append((file, None if scale is None else _scalar("sample: lora: scale", scale, float)))
        else:
            found.append((_scalar("sample: lora", entry, str), None))
    return tuple(found)


_SPECIAL: dict[str, Callable[[Any], Any]] = {
    "prompts": prompts_of, "cfg_interval": partial(_numbers, "cfg_interval"), "schedule": _schedule,
    "skip_layers": _skip_layers, "original_size": partial(size_of, "sample: original_size"),
    "target_size": partial(size_of, "sample: target_size"), "crop": _crop, "lora": _loras,
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
