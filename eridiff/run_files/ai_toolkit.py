"""ai-toolkit's and EriDiffusion's configurations: of a training, and of a job that generates images.

toolkit/config.py, toolkit/config_modules.py and jobs/process/GenerateProcess.py of ai-toolkit say what the keys mean there.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from eridiff.config import FOR_TRAINING, SAID, RunConfig, parse_config, prompts_of
from eridiff.errors import ConfigError
from eridiff.prompt_files import split_flags
from eridiff.request import known_names
from eridiff.run_files.common import (
    dtype_named,
    flag,
    mapping,
    named_file,
    naming,
    read_text,
    trained,
    unread,
    value_of,
    with_random_seeds,
)

ARCHITECTURES = {  # `arch`, without its tag -> family
    "flux": "flux", "flex1": "flux", "sd3": "mmdit", "sdxl": "unet", "flux_kontext": "flux",
}  # fmt: skip
FLAGGED = {"is_flux": "flux", "is_v3": "mmdit", "is_xl": "unet", "is_sdxl": "unet"}  # a key that is true -> family
SECOND = {"flux": ("clip", "t5"), "mmdit": ("clip", "clip_g", "t5"), "unet": ("clip", "clip_g")}  # encoders, by family
PROCESS_KEYS = ("model", "sample", "first_sample", "train", "trigger_word", "training_folder")  # of a training
GENERATE_PROCESS_KEYS = ("type", "model", "generate", "output_folder", "dtype", "trigger_word")  # of `job: generate`
GENERATE_KEYS = (  # those that mean what they mean in `sample`, and three of the section's own
    "sampler", "width", "height", "neg", "seed", "guidance_scale", "guidance_rescale", "sample_steps", "prompts", "prompt_2",
    "num_repeats",
)  # fmt: skip
UNUSED_GENERATE_KEYS = {
    "ext": "images are PNG",
    "prompt_file": "a PNG says how it was generated",
    "compile": "it changes no image",
    "size_list": "one size is for all images, not one at random",
    "neg_2": "a negative prompt is one for all encoders",
    **dict.fromkeys(
        ["random_prompts", "max_random_per_prompt", "max_images", "shuffle"], "every prompt is generated, in its order"
    ),
}
REPEATS = 10_000
LORA_KEYS = ("lora_path", "inference_lora_path")  # what is merged into the model, or beside it when sampling
MODEL_KEYS = (
    "name_or_path", "vae_path", "refiner_name_or_path", "dtype", "low_vram", "use_flux_cfg", "is_v_pred", "arch", *FLAGGED,
    *LORA_KEYS,
)  # fmt: skip
KARRAS = {  # SDXL's samplers with Karras' levels (toolkit/sampler.py): between the ends of the steps, or of the training's table
    "k_lms": {"schedule": "leading_karras"}, "k_euler": {"schedule": "leading_karras"},
    "k_dpmsolver++": {"schedule": "karras", "timestep_rounding": "nearest"},
}  # fmt: skip
TRAIN_KEYS = ("skip_first_sample", "disable_sampling")
UNUSED_KEYS = {
    "device": "--device says where",
    "adapter": "the trainer's images are guided by an adapter, and these are not",
    **dict.fromkeys(["quantize", "quantize_te", "qtype", "qtype_te"], "weights are used as they are stored"),
    **dict.fromkeys(["assistant_lora_path"], FOR_TRAINING),
    **dict.fromkeys(
        ["te_name_or_path", "unet_path", "name_or_path_original"], "--transformer, --clip, --clip-g and --t5 give parts"
    ),
}


def with_environment(text: str) -> str:
    """`${NAME}` is the environment variable's value wherever it stands, as in ai-toolkit."""

    def value(found: re.Match[str]) -> str:
        if found[1] not in os.environ:
            line = text.count("\n", 0, found.start()) + 1
            raise ConfigError(f"line {line}: the environment variable {found[1]} is not set")
        return os.environ[found[1]]

    return re.sub(r"\$\{([^}\n]+)\}", value, text)


def read(document: Mapping[str, Any], folder: Path = Path()) -> RunConfig:
    """What a configuration means for sampling; raises ConfigError. folder is the one of the file, for those that it names."""
    unused = {key: FOR_TRAINING for key in document if key != "config" and (key, document[key]) != ("job", "generate")}
    config = document["config"]
    processes = config.get("process") if isinstance(config, dict) else None
    if not isinstance(processes, list) or not all(isinstance(process, dict) for process in processes):
        raise ConfigError("config needs a list 'process'")
    name = config.get("name")
    if isinstance(name, str):
        processes = _replaced(processes, "[name]", name)
    able = [
        n for n, process in enumerate(processes) for key in ("sample", "generate") if isinstance(process.get(key), dict)
    ]
    if not able:
        raise ConfigError("config: no process has a section 'sample' or 'generate'")
    process = processes[able[0]]
    unused |= {f"process {n + 1}": "one process is used" for n in range(len(processes)) if n != able[0]}
    if isinstance(process.get("sample"), dict):
        return _training(process, name, unused)
    return _generating(process, folder, unused)


def _training(process: Mapping[str, Any], name: object, unused: dict[str, str]) -> RunConfig:
    place = value_of(process, "training_folder", str, "config: ")
    root = Path(place, name) if place and isinstance(name, str) and name else None
    lora = trained(str(root / f"{name}.safetensors")) if root else f"{FOR_TRAINING}; --lora takes what it trains"
    unused |= unread(process, PROCESS_KEYS, "config: process", "", UNUSED_KEYS | {"network": lora})
    own, family = _model(mapping(process, "model"), unused)
    train = mapping(process, "train")
    unused |= {"train": FOR_TRAINING} if train else {}
    skip, never = (flag(train, key, "train: ") for key in TRAIN_KEYS)
    notices: list[str] = []
    own["sample"] |= _sample(process, "sample", family, unused, notices) | (
        {"out": str(root / "samples")} if root else {}
    )
    if process.get("first_sample") is not None:
        own["first_sample"] = _sample(process, "first_sample", family, {}, [])
    read = parse_config(own, unused)
    training = replace(read.training, skip_first=skip or read.training.skip_first)
    if never:
        training = replace(training, sample_every=0, at_end=False)
    return replace(read, family=family, training=training, told=(*read.told, *notices))


def _generating(process: Mapping[str, Any], folder: Path, unused: dict[str, str]) -> RunConfig:
    """A process of `job: generate`: its section read as `sample`."""
    if process.get("type") not in (None, "to_folder"):
        raise ConfigError(
            f"config: the type {process['type']!r} of a process with 'generate' is not read; to_folder is"
        )
    unused |= unread(process, GENERATE_PROCESS_KEYS, "config: process", "", UNUSED_KEYS)
    own, family = _model(mapping(process, "model"), unused)
    own["dtype"] = dtype_named(process, "dtype", "config: ") or own["dtype"]
    section = mapping(process, "generate")
    known_names(section, [*GENERATE_KEYS, *UNUSED_GENERATE_KEYS], "generate")
    unused |= unread(section, GENERATE_KEYS, "generate", "", UNUSED_GENERATE_KEYS)
    prompts = section.get("prompts")
    if isinstance(prompts, str):  # a file with a prompt per line
        path = named_file(prompts, folder)
        with naming(path):
            prompts = [line for line in read_text(path).splitlines() if line.strip()]
    repeats = value_of(section, "num_repeats", int, "generate: ")
    repeats = 1 if repeats is None else repeats
    if not 1 <= repeats <= REPEATS:
        raise ConfigError(f"generate: num_repeats must be between 1 and {REPEATS}, not {repeats}")
    second = value_of(section, "prompt_2", str, "generate: ")
    entries = [{"prompt": prompt} for prompt in (prompts_of(prompts) if prompts else [])] * repeats
    shared = {key: value for key, value in section.items() if key in SAID}
    sample = shared | ({"samples": entries} if entries else {})
    own["sample"] |= _sample({**process, "sample": sample}, "sample", family, unused, [], second)
    if (out := value_of(process, "output_folder", str, "config: ")) is not None:
        own["sample"]["out"] = out
    return replace(parse_config(own, unused), family=family)


def _model(section: Mapping[str, Any], unused: dict[str, str]) -> tuple[dict[str, Any], str | None]:
    """The model in eridiff's words, and the family that the section names."""
    named = {family for key, family in FLAGGED.items() if flag(section, key, "model: ")}
    other = next((key for key, on in section.items() if key.startswith("is_") and on and key not in MODEL_KEYS), None)
    arch = section.get("arch")
    arch = arch.split(":")[0] if isinstance(arch, str) else arch  # the tag is the UI's
    if other or arch is not None and arch not in list(ARCHITECTURES):
        what = other or f"arch: {arch}"
        raise ConfigError(f"model: {what} is not one of the supported families: {', '.join(ARCHITECTURES)}")
    named |= {ARCHITECTURES[arch]} if arch is not None else set()
    if len(named) > 1:
        raise ConfigError(
            f"model: {', '.join(k for k in section if k in FLAGGED or k == 'arch')} contradict each other"
        )
    read = {key: value for key, value in section.items() if not key.startswith("is_") or key in MODEL_KEYS}
    unused |= unread(read, MODEL_KEYS, "model", "model: ", UNUSED_KEYS)
    own: dict[str, Any] = {"model": section.get("name_or_path"), "refiner": section.get("refiner_name_or_path")}
    if section.get("vae_path") is not None:
        own["model"] = {"path": own["model"], "vae": section["vae_path"]}
    if flag(section, "low_vram", "model: "):
        own["offload"] = "stages"
    if flag(section, "is_v_pred", "model: "):
        own["prediction"] = "v"
    files = [section.get(key) for key in LORA_KEYS]
    own["sample"] = {"lora": [{"file": file, "scale": 1.0} for file in files if file]} if any(files) else {}
    return own | {"dtype": dtype_named(section, "dtype", "model: ")}, next(iter(named), None)


def _sample(
    process: Mapping[str, Any], name: str, family: str | None, unused: dict[str, str], notices: list[str],
    second: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A trainer's `sample` section in eridiff's words: flags read, the trigger put in, every random seed chosen.

    second is the prompt for the second encoder where an entry has none of its own.
    """
    section = mapping(process, name)
    given = {key: value for key, value in section.items() if key not in ("prompts", "samples")}
    if given.get("neg") is False:
        del given["neg"]
    if given.get("sampler") == "pndm":  # without its warm-up there: skip_prk_steps in toolkit/sampler.py
        given["sampler"] = "plms"
    if family == "unet" and given.get("sampler") in KARRAS:
        given = {**KARRAS[given["sampler"]], **given}
    refiner = mapping(process, "model").get("refiner_name_or_path")
    if not refiner and given.pop("refiner_start_at", None) is not None:
        unused["refiner_start_at"] = "no refiner is given"
    entries = [{"prompt": prompt} for prompt in prompts_of(section["prompts"])] if section.get("prompts") else []
    if section.get("samples") is not None:
        unused |= {"prompts": "samples is given too"} if entries else {}
        entries = section["samples"]
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ConfigError(f"{name}: samples must be a list of mappings, each with a prompt")
    read = [_entry(e, f"{name}: prompt {n}", process, family, unused, second) for n, e in enumerate(entries, 1)]
    notices += _sticky(entries, given)
    own = with_random_seeds({**_multiplier(given, unused), **({"samples": read} if read else {}), "lenient": True})
    return _truly_guided(own) if flag(mapping(process, "model"), "use_flux_cfg", "model: ") else own


def _entry(
    entry: Mapping[str, Any], where: str, process: Mapping[str, Any], family: str | None, unused: dict[str, str],
    second: str | None,
) -> dict[str, Any]:  # fmt: skip
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
    second = flagged.pop("prompt_2", second)
    if second is not None:
        if family is None:
            raise ConfigError(f"{where}: a second prompt needs to know the model's family; say arch: flux, sd3 or sdxl")
        first = flagged["prompt"]
        flagged["prompt"] = {n: second if n == SECOND[family][1] else first for n in SECOND[family]}
    said, flagged = (
        {SAID.get(key, key): value for key, value in given.items() if value is not None} for given in (entry, flagged)
    )
    return _multiplier(said | flagged, unused)


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


def _replaced(value: Any, word: str, text: str) -> Any:
    """A document with a word replaced in all its texts."""
    if isinstance(value, dict):
        return {key: _replaced(each, word, text) for key, each in value.items()}
    if isinstance(value, list):
        return [_replaced(each, word, text) for each in value]
    return value.replace(word, text) if isinstance(value, str) else value
