"""The files that say what to generate: eridiff's own, ai-toolkit's and EriDiffusion's YAML or JSON, kohya's prompt files.

Whatever a trainer's file says is put into the words of our own, so `eridiff.config` reads and checks all of them. What a
file does not say is the published variant's number, not the trainer's. docs/configuration.md lists every key.
"""

import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from eridiff.config import FOR_TRAINING, SAID, RunConfig, parse_config, prompts_of
from eridiff.errors import ConfigError
from eridiff.files import kind_by_content
from eridiff.prompt_files import read_json, read_prompt_file, split_flags
from eridiff.yaml_reader import read_yaml

WEIGHTS = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
PROMPT_FILES = (".txt", ".toml")  # and .json that holds a list
ARCHITECTURES = {"flux": "flux", "flex1": "flux", "sd3": "mmdit", "sdxl": "unet"}  # ai-toolkit's name -> family
FLAGGED = {"is_flux": "flux", "is_v3": "mmdit", "is_xl": "unet", "is_sdxl": "unet"}  # a key that is true -> family
DTYPES = {
    "bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16", "fp32": "float32",
    "float": "float32", "float32": "float32",
}  # fmt: skip
SECOND = {"flux": ("clip", "t5"), "mmdit": ("clip", "clip_g", "t5"), "unet": ("clip", "clip_g")}  # encoders, by family
PROCESS_KEYS = ("model", "sample", "first_sample", "train", "trigger_word")  # what is read of a process
LORA_KEYS = ("lora_path", "inference_lora_path")  # what is merged into the model, or beside it when sampling
MODEL_KEYS = (
    "name_or_path", "vae_path", "refiner_name_or_path", "dtype", "low_vram", "use_flux_cfg", "is_v_pred", "arch", *FLAGGED,
    *LORA_KEYS,
)  # fmt: skip
TRAIN_KEYS = ("skip_first_sample", "disable_sampling")
UNUSED_KEYS = {
    "device": "--device says where",
    "network": "a LoRA's own file says it",
    **dict.fromkeys(["quantize", "quantize_te", "qtype", "qtype_te"], "weights are used as they are stored"),
    **dict.fromkeys(["assistant_lora_path"], FOR_TRAINING),
    **dict.fromkeys(
        ["te_name_or_path", "unet_path", "name_or_path_original"], "--transformer, --clip, --clip-g and --t5 give parts"
    ),
}


def load_config(path: str | Path) -> RunConfig:
    """Read any of the files; raises ConfigError, naming file and line, for anything that is unknown or impossible.

    The kind is known by the ending (.txt and .toml are kohya's, .json is a list of prompts or a configuration, all else is
    YAML), a trainer's configuration by its section `config`.
    """
    path = Path(path)
    if path.suffix.lower() in WEIGHTS:
        raise ConfigError(f"{path}: is a checkpoint; pass it as --model")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = kind_by_content(path)
        if kind == "a PNG image":
            raise ConfigError(
                f"{path}: is an image; eridiff resample generates it again, --image begins from it"
            ) from None
        if kind is not None:
            raise ConfigError(f"{path}: is {kind}, not a configuration; --image begins from an image") from None
        raise ConfigError(f"{path}: is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except FileNotFoundError:
        hint = "; pass a prompt with --prompt" if " " in path.name and not path.suffix else ""
        raise ConfigError(f"{path}: is not a file{hint}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return _parsed(text, path.suffix.lower())
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _parsed(text: str, ending: str) -> RunConfig:
    json = ending in (".json", ".jsonc")
    if ending in PROMPT_FILES or json and re.match(r"(\s|//[^\n]*|/\*.*?\*/)*\[", text, re.DOTALL):
        unused: dict[str, str] = {}
        entries = read_prompt_file(text, ".json" if json else ending, unused)
        return parse_config({"sample": _drawn({"samples": entries, "lenient": True})}, unused)
    if re.search(r'^config\s*:|"config"\s*:', text, re.MULTILINE):
        text = _with_environment(text)
    document = read_json(text) if json else read_yaml(text)
    if isinstance(document, dict) and "config" in document:
        return parse_trainer(document)
    return parse_config(document)


def _with_environment(text: str) -> str:
    """`${NAME}` is the environment variable's value wherever it stands, as in ai-toolkit."""

    def value(found: re.Match[str]) -> str:
        if found[1] not in os.environ:
            line = text.count("\n", 0, found.start()) + 1
            raise ConfigError(f"line {line}: the environment variable {found[1]} is not set")
        return os.environ[found[1]]

    return re.sub(r"\$\{([^}\n]+)\}", value, text)


def parse_trainer(document: Mapping[str, Any]) -> RunConfig:
    """What a configuration of ai-toolkit or EriDiffusion means for sampling; raises ConfigError."""
    unused = {key: FOR_TRAINING for key in document if key != "config"}
    config = document["config"]
    processes = config.get("process") if isinstance(config, dict) else None
    if not isinstance(processes, list) or not all(isinstance(process, dict) for process in processes):
        raise ConfigError("config needs a list 'process'")
    if isinstance(config.get("name"), str):
        processes = _replaced(processes, "[name]", config["name"])
    drawing = [number for number, process in enumerate(processes) if isinstance(process.get("sample"), dict)]
    if not drawing:
        raise ConfigError("config: no process has a section 'sample'")
    process = processes[drawing[0]]
    unused |= {f"process {n + 1}": "one process is used" for n in range(len(processes)) if n != drawing[0]}
    unused |= _unread(process, PROCESS_KEYS, "config: process", "")

    own, family = _model(_mapping(process, "model"), unused)
    train = _mapping(process, "train")
    unused |= {"train": FOR_TRAINING} if train else {}
    skip, never = (_flag(train, key, "train") for key in TRAIN_KEYS)
    notices: list[str] = []
    own["sample"] = _sample(process, "sample", family, unused, notices)
    files = [_mapping(process, "model").get(key) for key in LORA_KEYS]
    if any(files):
        own["sample"]["lora"] = [{"file": file, "scale": 1.0} for file in files if file]
    if process.get("first_sample") is not None:
        own["first_sample"] = _sample(process, "first_sample", family, {}, [])
    read = parse_config(own, unused)
    training = replace(read.training, skip_first=skip or read.training.skip_first)
    if never:
        training = replace(training, sample_every=0, at_end=False)
    return replace(read, family=family, training=training, told=(*read.told, *notices))


def _model(section: Mapping[str, Any], unused: dict[str, str]) -> tuple[dict[str, Any], str | None]:
    """The model in our words, and the family that the section names."""
    named = {family for key, family in FLAGGED.items() if _flag(section, key, "model")}
    other = next((key for key, on in section.items() if key.startswith("is_") and on and key not in MODEL_KEYS), None)
    arch = section.get("arch")
    if other or arch is not None and arch not in list(ARCHITECTURES):
        what = other or f"arch: {arch}"
        raise ConfigError(f"model: {what} is not one of the supported families: {', '.join(ARCHITECTURES)}")
    named |= {ARCHITECTURES[arch]} if arch is not None else set()
    if len(named) > 1:
        raise ConfigError(
            f"model: {', '.join(k for k in section if k in FLAGGED or k == 'arch')} contradict each other"
        )
    read = {key: value for key, value in section.items() if not key.startswith("is_") or key in MODEL_KEYS}
    unused |= _unread(read, MODEL_KEYS, "model", "model: ")
    own: dict[str, Any] = {"model": section.get("name_or_path"), "refiner": section.get("refiner_name_or_path")}
    if section.get("vae_path") is not None:
        own["model"] = {"path": own["model"], "vae": section["vae_path"]}
    if _flag(section, "low_vram", "model"):
        own["offload"] = "stages"
    if _flag(section, "is_v_pred", "model"):
        own["prediction"] = "v"
    dtype = section.get("dtype")
    if dtype is not None and dtype not in list(DTYPES):
        raise ConfigError(f"model: dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    own["dtype"] = DTYPES[dtype] if dtype is not None else None
    return own, next(iter(named), None)


def _sample(
    process: Mapping[str, Any], name: str, family: str | None, unused: dict[str, str], notices: list[str]
) -> dict[str, Any]:
    """A trainer's `sample` section in eridiff's words: flags read, the trigger put in, every random seed chosen."""
    section = _mapping(process, name)
    given = {key: value for key, value in section.items() if key not in ("prompts", "samples")}
    if given.get("neg") is False:
        del given["neg"]
    refiner = _mapping(process, "model").get("refiner_name_or_path")
    if not refiner and given.pop("refiner_start_at", None) is not None:
        unused["refiner_start_at"] = "no refiner is given"
    entries = [{"prompt": prompt} for prompt in prompts_of(section["prompts"])] if section.get("prompts") else []
    if section.get("samples") is not None:
        unused |= {"prompts": "samples is given too"} if entries else {}
        entries = section["samples"]
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ConfigError(f"{name}: samples must be a list of mappings, each with a prompt")
    read = [_entry(entry, f"{name}: prompt {n}", process, family, unused) for n, entry in enumerate(entries, 1)]
    notices += _sticky(entries, given)
    own = _drawn({**_multiplier(given, unused), **({"samples": read} if read else {}), "lenient": True})
    return _truly_guided(own) if _flag(_mapping(process, "model"), "use_flux_cfg", "model") else own


def _entry(
    entry: Mapping[str, Any], where: str, process: Mapping[str, Any], family: str | None, unused: dict[str, str]
) -> dict[str, Any]:
    prompt, trigger = entry.get("prompt"), process.get("trigger_word") or ""
    if not isinstance(prompt, str):
        raise ConfigError(f"{where} must be text, not {prompt!r}")
    if not isinstance(trigger, str):
        raise ConfigError(f"config: trigger_word must be text, not {trigger!r}")
    for word in ("[trigger]", "[name]") if trigger else ():
        prompt = prompt.replace(word, trigger)
    flagged = split_flags(prompt, where, unused)
    if "scale" in flagged:  # for ai-toolkit --l is the section's guidance_scale, for kohya true guidance
        flagged["guidance_scale"] = flagged.pop("scale")
    second = flagged.pop("prompt_2", None)
    if second is not None:
        if family is None:
            raise ConfigError(f"{where}: --p2 needs to know the model's family; say arch: flux, sd3 or sdxl")
        first = flagged["prompt"]
        flagged["prompt"] = {n: second if n == SECOND[family][1] else first for n in SECOND[family]}
    said, flagged = (
        {SAID.get(key, key): value for key, value in given.items() if value is not None} for given in (entry, flagged)
    )
    return _multiplier(said | flagged, unused)


def _drawn(section: dict[str, Any]) -> dict[str, Any]:
    """A section with a number for every seed of -1, which is random.

    With walk_seed the first is and the others follow; ai-toolkit goes on with 0, 1, 2.
    """
    if section.get("seed") == -1:
        section = section | {"seed": secrets.randbits(32)}
        if not section.get("walk_seed"):
            section["samples"] = [{"seed": secrets.randbits(32)} | entry for entry in section.get("samples", [])]
    entries = section.get("samples", [])
    drawn = [entry | ({"seed": secrets.randbits(32)} if entry.get("seed") == -1 else {}) for entry in entries]
    return section | ({"samples": drawn} if drawn else {})


def _sticky(entries: list[dict[str, Any]], section: Mapping[str, Any]) -> list[str]:
    """A notice where ai-toolkit would go on with the seed of an entry and the section's is taken here."""
    last = None
    for number, entry in enumerate(entries, 1):
        if entry.get("seed") is not None:
            last = entry["seed"]
        elif last is not None and not section.get("walk_seed"):
            return [f"prompt {number} has no seed and takes the section's; ai-toolkit would go on with {last}"]
    return []


def _multiplier(values: dict[str, Any], unused: dict[str, str]) -> dict[str, Any]:
    """ai-toolkit takes a network_multiplier that is text for a number, and for 1 if it is none."""
    key = next((key for key in ("network_multiplier", "lora_scale") if isinstance(values.get(key), str)), None)
    if key is None:
        return values
    try:
        return values | {key: float(values[key])}
    except ValueError:
        unused[f"{key}: {values[key]}"] = "it is not a number and means 1"
        return values | {key: 1.0}


def _truly_guided(section: dict[str, Any]) -> dict[str, Any]:
    """With use_flux_cfg guidance_scale is true guidance."""
    renamed = {"true_cfg_scale" if key == "guidance_scale" else key: value for key, value in section.items()}
    return renamed | (
        {"samples": [_truly_guided(entry) for entry in section["samples"]]} if "samples" in section else {}
    )


def _unread(section: Mapping[str, Any], known: Sequence[str], where: str, prefix: str) -> dict[str, str]:
    """The keys of a trainer's section that are not read here; ConfigError for one that is nearly one that is."""
    unread = {}
    for key in section:
        if key in known:
            continue
        near = None if key in UNUSED_KEYS else get_close_matches(key, known, 1, 0.8)
        if near:
            raise ConfigError(f"'{key}' is not a key of {where}; did you mean '{near[0]}'?")
        unread[prefix + key] = UNUSED_KEYS.get(key, FOR_TRAINING)
    return unread


def _replaced(value: Any, word: str, text: str) -> Any:
    """A document with a word replaced in all its texts."""
    if isinstance(value, dict):
        return {key: _replaced(each, word, text) for key, each in value.items()}
    if isinstance(value, list):
        return [_replaced(each, word, text) for each in value]
    return value.replace(word, text) if isinstance(value, str) else value


def _mapping(section: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = section.get(name) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be a mapping, not {value!r}")
    return value


def _flag(section: Mapping[str, Any], key: str, where: str) -> bool:
    value = section.get(key)
    if value not in (None, True, False):
        raise ConfigError(f"{where}: {key} must be true or false, not {value!r}")
    return bool(value)
