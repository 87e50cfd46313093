"""The configuration of what to generate: every key known, every mistake one sentence."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from eridiff.errors import ConfigError
from eridiff.request import ENCODERS, FIELDS, GUIDANCE, WORDS, Text, known_names, merged, scalar
from eridiff.schedulers.samplers import SAMPLERS

Words = dict[
    str, Any
]  # what a file says of an image: by field of `Request`, and by the words of guidance as they stand


@dataclass(frozen=True)
class SampleSettings:
    """The `sample:` section."""

    shared: Words = field(default_factory=dict)  # of all images
    entries: tuple[Words, ...] = ()  # one per image: its prompt, and what it has in place of the above
    walk_seed: bool = False  # seed, seed + 1, ... over the prompts
    lenient: bool = False  # as in trainers: sides go down to what the model can generate, Karras' levels to SDXL alone
    lora: tuple[tuple[str, float | None], ...] = ()  # files, each with its scale; None is each image's `lora_scale`
    use_lora: bool | None = None  # false generates without them
    lora_partial: bool = False  # what does not fit is left out, not an error
    euler_elsewhere: bool = False  # the file's sampler is SDXL's: its program samples other families by Euler
    out: str = "samples"

    def each(self) -> list[Words]:
        """What is given for each image: its prompt, its seed, and the section's values where it has none of its own."""
        first = self.shared.get("seed", 42)
        return [
            merged(self.shared, {"seed": first + i * self.walk_seed}, entry) for i, entry in enumerate(self.entries)
        ]

    def over(self, layer: Words) -> "SampleSettings":
        """The section with what a stronger layer says of every image in its place."""
        entries = tuple(
            {name: value for name, value in merged(entry, layer).items() if name not in layer} for entry in self.entries
        )
        return replace(self, shared=merged(self.shared, layer), entries=entries)

    @property
    def prompts(self) -> tuple[Text, ...]:
        """The prompt of each image."""
        return tuple(entry["prompt"] for entry in self.entries)


@dataclass(frozen=True)
class TrainingSchedule:
    """When a training run samples; nothing of it has an effect outside training."""

    sample_every: int = 100  # steps; 0 is never
    start_step: int = 0  # no images before it
    skip_first: bool = False  # no images before the first step
    at_end: bool = True
    max_seconds: float | None = None  # of one round of images; None is any


@dataclass(frozen=True)
class RunConfig:
    """A whole file: what to load, how to run, what to generate, and notices for the reader of the file."""

    model: str | dict[str, Any] | None = None
    family: str | None = None  # flux, mmdit or unet, where the file says it; the model must agree
    device: str | None = None
    dtype: str | None = None
    offload: str | None = None
    refiner: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # how the model is loaded: MODEL_OPTIONS
    sample: SampleSettings = field(default_factory=SampleSettings)
    first_sample: SampleSettings | None = None  # in place of `sample` the first time that a training run samples
    training: TrainingSchedule = field(default_factory=TrainingSchedule)
    unused: dict[str, str] = field(default_factory=dict)  # keys without effect, with the reason
    told: tuple[str, ...] = ()  # what else the reader of the file should know
    program: str | None = None  # the trainer whose configuration it is, which is also a recipe's name

    @property
    def notices(self) -> tuple[str, ...]:
        """What `eridiff sample` says of the file."""
        return (*_listed(self.unused), *self._told())

    @property
    def notices_in_training(self) -> tuple[str, ...]:
        """What the `Sampler` says of it: keys for training are the trainer's own."""
        kept = {key: reason for key, reason in self.unused.items() if not reason.startswith(FOR_TRAINING)}
        return (*_listed(kept), *self._told())

    def _told(self) -> tuple[str, ...]:
        name = self.program
        if name is None or self.sample.shared.get("recipe") != name:
            return self.told
        return (*self.told, f"generated as {name} generates: recipe {name}; recipe eridiff takes the published numbers")


KEYS: dict[str, type] = {  # of the section alone, and their types
    "walk_seed": bool, "lenient": bool, "lora": list, "use_lora": bool, "lora_partial": bool, "out": str,
}  # fmt: skip
SCHEDULE_KEYS = {  # key of the section -> field of TrainingSchedule
    "sample_every": "sample_every", "sample_start_step": "start_step", "skip_first_sample": "skip_first",
    "sample_at_end": "at_end", "sample_max_seconds": "max_seconds",
}  # fmt: skip
FOR_TRAINING = "it is for training"
MOST = 20  # keys of a training in a notice: a file that its program writes has hundreds
NO_EFFECT = {  # known words of training configurations
    **dict.fromkeys(SCHEDULE_KEYS, FOR_TRAINING),
    "format": "images are PNG",
    **dict.fromkeys(
        ["adapter_conditioning_scale", "ctrl_idx", "ctrl_img_1", "ctrl_img_2", "ctrl_img_3"],
        "there are no adapters, and of several images Kontext takes a list, references",
    ),
    **dict.fromkeys(["extra_values", "do_cfg_norm"], "no model here takes them"),
    **dict.fromkeys(["num_frames", "fps"], "images do not move"),
}
SAID = {  # key of a section or an entry -> field of Request; words of guidance stay until the network is asked
    **{name: name for name, told in FIELDS.items() if not told.metadata["python"] and name != "prompt"},
    **{word: word if word in GUIDANCE else name for word, name in WORDS.items() if name != "prompt"},
}
SAMPLER_SYNONYMS = {  # of ai-toolkit and kohya
    "flowmatch": "euler", "euler_a": "euler_ancestral", "dpmsolver++": "dpmpp_2m", "dpmsingle": "dpmpp_2s", "dpm_2": "dpm2",
    "dpm_2_a": "dpm2_ancestral", "dpm_2_ancestral": "dpm2_ancestral", "uni_pc": "unipc", "uni_pc_bh2": "unipc",
    "custom_lcm": "lcm",
}  # fmt: skip
ABSENT_SAMPLERS = ("dpmsolver", "mean_flow")
MODEL_OPTIONS: dict[str, type] = {
    "variant": str, "prediction": str, "vram": str, "vae_rows": int, "compile": bool, "zero_terminal_snr": bool, "allow_unknown": bool,
}  # fmt: skip
TOP = ("model", "refiner", "device", "dtype", "offload", *MODEL_OPTIONS, "sample", "first_sample")


def parse_config(document: Any, without_effect: Mapping[str, str] | None = None) -> RunConfig:
    """The configuration that a YAML document means; raises ConfigError.

    What has no effect is listed in one notice, with that of `without_effect`, key -> reason.
    """
    if document is None:
        raise ConfigError("the file is empty; it needs a section 'sample'")
    if not isinstance(document, dict):
        raise ConfigError(f"a mapping with a section 'sample' is expected, not {type(document).__name__}")
    lost = next((name for name in document if name not in TOP and name in ("prompts", "samples", *SAID, *KEYS)), None)
    if lost is not None:
        raise ConfigError(f"'{lost}' belongs under 'sample:'")
    _known_keys(document, TOP, "the file")
    model = document.get("model")
    if model is not None and not isinstance(model, str | dict):
        raise ConfigError(f"model must be a path, a hub id or the parts by name, not {model!r}")
    unused = dict(without_effect or {})
    notices: list[str] = []
    section = _mapping("sample", document.get("sample") or {})
    sample = _sample(section, unused, notices)
    texts = {
        name: scalar(name, document.get(name), str)
        for name in ("device", "dtype", "offload", "refiner")
        if document.get(name)
    }
    if type(document.get("vram")) is int:  # bytes, or a size whose unit is missing
        document = document | {"vram": str(document["vram"])}
    options = {n: scalar(n, document[n], kind) for n, kind in MODEL_OPTIONS.items() if document.get(n) is not None}
    first = document.get("first_sample")
    if first is not None:
        unused["first_sample"] = FOR_TRAINING
    return RunConfig(
        model=model, options=options, sample=sample, training=_training(section),
        first_sample=None if first is None else _sample(_mapping("first_sample", first), {}, []),
        unused=unused, told=tuple(dict.fromkeys(notices)), **texts,
    )  # fmt: skip


def _known_keys(given: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """As `known_names`; options of a model that are in a section get the line that has an effect."""
    for name in (name for name in given if name not in known):
        inner = {name: given[name]} if name in TOP else given[name]
        said = {key: inner[key] for key in inner if key in TOP} if isinstance(inner, dict) else {}
        lines = [f"{key}: {str(value).lower() if isinstance(value, bool) else value}" for key, value in said.items()]
        if lines:
            raise ConfigError(f"'{name}' is not a key of {where}; write {' and '.join(lines)} at the top of the file")
    known_names(given, known, where)


def _listed(unused: Mapping[str, str]) -> list[str]:
    """One notice of all keys that have no effect, by reason; the keys of a training come last, and the first of them do."""
    groups: dict[str, list[str]] = {}
    for key, reason in unused.items():
        groups.setdefault(reason, []).append(key)
    if (training := groups.pop(FOR_TRAINING, None)) is not None:
        more = len(training) - MOST
        groups[FOR_TRAINING] = [*training[:MOST], f"and {more} more"] if more > 0 else training
    told = "; ".join(f"{', '.join(keys)} ({reason})" for reason, keys in groups.items())
    return [f"without effect here: {told}"] if told else []


def _sample(section: Mapping[str, Any], unused: dict[str, str], notices: list[str]) -> SampleSettings:
    _known_keys(section, ["prompts", "samples", *SAID, *KEYS, *NO_EFFECT], "sample")
    if "samples" in section and section.get("prompts") is not None:
        raise ConfigError("sample: 'prompts' and 'samples' both list prompts; keep one")
    values: dict[str, Any] = {}
    for key, kind in KEYS.items():
        if (value := section.get(key)) is not None:
            values[key] = _loras(value) if key == "lora" else scalar(f"sample: {key}", value, kind)
    if section.get("prompts") is not None:
        values["entries"] = tuple({"prompt": prompt} for prompt in prompts_of(section["prompts"]))
    entries = section.get("samples")
    if entries is not None:
        if not isinstance(entries, list) or not all(isinstance(e, dict) and "prompt" in e for e in entries):
            raise ConfigError("sample: samples must be a list of mappings, each with a prompt")
        prompts, own = prompts_of([entry["prompt"] for entry in entries]), []
        for number, (prompt, entry) in enumerate(zip(prompts, entries, strict=True), 1):
            settings = {key: value for key, value in entry.items() if key != "prompt"}
            _known_keys(settings, [*SAID, *NO_EFFECT], f"sample: entry {number}")
            own.append({"prompt": prompt} | _values(settings, f"sample: entry {number}", unused, notices))
        values["entries"] = tuple(own)
    return SampleSettings(shared=_values(section, "sample", unused, notices), **values)


def _values(section: Mapping[str, Any], where: str, unused: dict[str, str], notices: list[str]) -> Words:
    """What a section or an entry says of an image."""
    values: Words = {}
    for key, value in section.items():
        if key in NO_EFFECT and value is not None and value is not False:
            unused[key] = NO_EFFECT[key]
        if key not in SAID or value is None:
            continue
        name = SAID[key]
        if name in values:
            raise ConfigError(f"{where}: '{key}' and another key both mean {name}; keep one")
        values[name] = FIELDS[WORDS.get(name, name)].metadata["kind"].read(f"{where}: {key}", value)
    if {"cfg_scale", "true_cfg_scale"} <= values.keys():
        raise ConfigError(
            f"{where}: cfg_scale and true_cfg_scale both ask for classifier-free guidance; keep true_cfg_scale"
        )
    if "sampler" in values:
        values = _sampler(values.pop("sampler"), notices) | values
    return values


def _training(section: Mapping[str, Any]) -> TrainingSchedule:
    kinds = {"sample_every": int, "start_step": int, "skip_first": bool, "at_end": bool, "max_seconds": float}
    never = "sample_every" in section and section["sample_every"] in (None, False)
    given = {n: section[k] for k, n in SCHEDULE_KEYS.items() if section.get(k) is not None}
    given |= {"sample_every": 0} if never else {}
    values = {n: scalar(f"sample: {n}", value, kinds[n]) for n, value in given.items()}
    for name, value in values.items():
        if value < 0:
            raise ConfigError(f"sample: {name} must not be negative, but is {value}")
    return TrainingSchedule(**values)


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be a mapping, not {value!r}")
    return value


def _sampler(name: str, notices: list[str]) -> dict[str, str]:
    """The sampler that a trainer's name means; nothing, and a notice, for one that is not there.

    kohya's `k_euler` is its `euler`: diffusers' scheduler without Karras' levels (library/train_util.py, get_my_scheduler).
    """
    plain = name.removeprefix("k_")
    if plain in ABSENT_SAMPLERS or name.startswith("sample_"):
        notices.append(f"the sampler '{name}' is not available: the model's own is used")
        return {}
    found = SAMPLER_SYNONYMS.get(plain, plain)
    if found not in SAMPLERS:
        written = found.lower().replace("+", "p")
        near = [each for each in SAMPLERS if each.startswith(written)] or get_close_matches(written, SAMPLERS, 1, 0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(SAMPLERS)}"
        raise ConfigError(f"sampler: '{name}' is not a sampler; {hint}")
    return {"sampler": found}


def prompts_of(value: Any) -> tuple[str | dict[str, str], ...]:
    """Prompts of a YAML list, or one alone; raises ConfigError for an entry that lacks quotes."""
    entries = value if isinstance(value, list) else [value]
    for number, entry in enumerate(entries, 1):
        if isinstance(entry, dict) and entry and set(entry) <= set(ENCODERS):
            for name, text in entry.items():
                scalar(f"sample: prompt {number}, {name}", text, str)
        elif isinstance(entry, dict) and "prompt" in entry:
            raise ConfigError(f"sample: prompt {number} has fields of its own: write 'samples:' in place of 'prompts:'")
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
            raise ConfigError(
                f'sample: prompt {number} is read as {"an" if type(entry) is int else "a"} {type(entry).__name__}; quote it: - "{entry}"'
            )
    if not entries:
        raise ConfigError("sample: the list of prompts is empty")
    return tuple(entry.strip() if isinstance(entry, str) else entry for entry in entries)


def _loras(value: Any) -> tuple[tuple[str, float | None], ...]:
    found: list[tuple[str, float | None]] = []
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, dict):
            known_names(entry, ("file", "scale"), "lora")
            scale = entry.get("scale")
            file = scalar("sample: lora: file", entry.get("file"), str)
            found.append((file, None if scale is None else scalar("sample: lora: scale", scale, float)))
        else:
            found.append((scalar("sample: lora", entry, str), None))
    return tuple(found)
