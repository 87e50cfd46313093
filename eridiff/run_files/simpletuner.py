"""SimpleTuner's configuration (config.json or config.toml), and its prompt libraries.

simpletuner/helpers/training/validation.py of SimpleTuner says what the keys mean there; their defaults are those of its fields
(simpletuner_sdk/server/services/field_registry).
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from eridiff.config import FOR_TRAINING, KEYS, SAID, TOP, RunConfig, TrainingSchedule, parse_config
from eridiff.errors import ConfigError
from eridiff.prompt_files import read_json
from eridiff.recipe import recipe
from eridiff.request import known_names
from eridiff.run_files.common import (
    NEUTRAL,
    dtype_named,
    flag,
    mapping,
    model_of,
    named_file,
    naming,
    read_text,
    settings,
    size,
    trained,
    unread,
    value_of,
    with_random_seeds,
)

FAMILIES = {"flux": "flux", "sd3": "mmdit", "sdxl": "unet"}
FLAVOURS = {  # of a family -> the model, the first where none is named
    "flux": {"krea": "black-forest-labs/FLUX.1-Krea-dev", "dev": "black-forest-labs/FLUX.1-dev", "schnell": "black-forest-labs/FLUX.1-schnell", "kontext": "black-forest-labs/FLUX.1-Kontext-dev"},
    "mmdit": {"medium": "stabilityai/stable-diffusion-3.5-medium", "large": "stabilityai/stable-diffusion-3.5-large"},
    "unet": {"base-1.0": "stabilityai/stable-diffusion-xl-base-1.0"},
}  # fmt: skip
PARTS = {
    "pretrained_model_name_or_path": "path", "pretrained_transformer_model_name_or_path": "transformer",
    "pretrained_unet_model_name_or_path": "transformer", "pretrained_vae_model_name_or_path": "vae",
}  # fmt: skip
SAMPLERS = {  # validation_noise_scheduler -> sampler; None is not there
    "ddim": "ddim", "ddpm": "ddpm", "euler": "euler", "euler-a": "euler_ancestral", "flow_matching": "euler",
    "flow_match_euler": "euler", "unipc": "unipc", "dpm++": "dpmpp_2m", "perflow": None,
}  # fmt: skip
SCHEDULE_KEYS = (
    "validation_step_interval", "validation_steps", "validation_epoch_interval", "validation_on_startup", "validation_disable",
    "validate_after_step",
)  # fmt: skip
KNOWN_KEYS = (
    *PARTS, *SCHEDULE_KEYS, "model_family", "model_flavour", "mixed_precision", "prediction_type", "output_dir", "seed",
    "validation_prompt", "user_prompt_library", "validation_disable_unconditional", "validation_resolution",
    "validation_num_inference_steps", "validation_guidance", "validation_guidance_real", "validation_no_cfg_until_timestep",
    "validation_negative_prompt", "validation_seed", "validation_randomize", "validation_noise_scheduler", "flow_schedule_shift",
    "validation_guidance_skip_layers", "validation_guidance_skip_layers_start", "validation_guidance_skip_layers_stop",
    "validation_guidance_skip_scale", "validation_lycoris_strength", "model_type", "flux_attention_masked_training",
    "tokenizer_max_length", "validation_seed_source",
)  # fmt: skip
UNUSED_KEYS = {
    "validation_prompt_library": "SimpleTuner's own prompts are not here",
    "num_validation_images": "one image per prompt is generated",
    "validation_guidance_rescale": "SimpleTuner does not pass it to its pipelines",
    "rescale_betas_zero_snr": "--zero-terminal-snr changes the last noise level",
    "base_model_precision": "weights are used as they are stored",
    "pretrained_t5_model_name_or_path": "--t5 takes it",
    **dict.fromkeys(["validation_using_datasets", "validation_input"], "--image begins from an image"),
    **dict.fromkeys(["controlnet", "control"], "the trainer's images are guided by a ControlNet, and these are not"),
    **dict.fromkeys(["validation_adapter_path", "validation_adapter_config"], "--lora takes it"),
    **dict.fromkeys(
        ["sdxl_validation_pipeline_mode", "sdxl_validation_stage1_model", "sdxl_validation_stage2_model"],
        "--refiner finishes the images",
    ),
    **dict.fromkeys([  # names that are near to one that is read
        "flow_schedule_auto_shift", "audio_flow_schedule_shift", "eval_epoch_interval", "validate_after_epoch", "validation_method",
        "validation_preview_steps", *(f"pretrained_{name}_model_name_or_path" for name in ("evaluation", "gemma", "grounding")),
    ], FOR_TRAINING),
}  # fmt: skip
SAME = {  # values of these with which nothing changes
    "base_model_precision": "no_change", "num_validation_images": 1, "sdxl_validation_pipeline_mode": "trained-stage",
}  # fmt: skip
TEXTS = ("validation_prompt", "validation_negative_prompt", "validation_resolution")  # never numbers
LIBRARY_KEYS = ("prompt", "caption", "tags")  # the first that an entry of a library has is its prompt


def is_training(document: Mapping[str, Any]) -> bool:
    """Whether a document is SimpleTuner's configuration: its keys may be written as options of the command line."""
    return any(re.match("-*(model_family$|validation_|user_prompt_library$)", str(key)) for key in document)


def is_library(document: object) -> bool:
    """Whether a JSON is a prompt library: short names and their prompts, none of them a key of eridiff's configuration."""
    own = (*TOP, "prompts", "samples", *SAID, *KEYS)
    return (
        isinstance(document, dict)
        and bool(document)
        and all(
            isinstance(value, str) or isinstance(value, dict) and any(key in value for key in LIBRARY_KEYS)
            for value in document.values()
        )
        and not any(name in own or get_close_matches(name, TOP, 1, 0.8) for name in document)
    )


def of_library(document: Mapping[str, Any], unused: dict[str, str]) -> RunConfig:
    """A prompt library alone: the model's numbers for all images."""
    return parse_config({"sample": {"samples": _library(document, unused), "lenient": True}}, unused)


def read_training(document: Mapping[str, Any], folder: Path) -> RunConfig:
    """What a configuration means for sampling; raises ConfigError. folder is the one of the file."""
    section = {str(key).lstrip("-"): _plain(str(key).lstrip("-"), value) for key, value in document.items()}
    name = value_of(section, "model_family", str)
    if name is not None and name not in FAMILIES:
        raise ConfigError(f"model_family: {name} is not one of the supported families: {', '.join(FAMILIES)}")
    family = FAMILIES.get(name or "")
    out = value_of(section, "output_dir", str)
    reasons = dict(UNUSED_KEYS)
    if value_of(section, "model_type", str) == "lora":
        reasons["model_type"] = trained(str(Path(out, "pytorch_lora_weights.safetensors")) if out else "in output_dir")
    known = [key for key in KNOWN_KEYS if key not in reasons]
    changing = {key: value for key, value in section.items() if key not in SAME or value != SAME[key]}
    unused = unread(changing, known, "SimpleTuner's configuration", "", reasons)

    shared = _images(section, family, unused)
    prompts: list[dict[str, Any]] = []
    if not flag(section, "validation_disable_unconditional"):
        prompts.append({"prompt": ""})
    if file := value_of(section, "user_prompt_library", str):
        path = named_file(file, folder)
        with naming(path):
            library = read_json(read_text(path))
            if not isinstance(library, dict):
                raise ConfigError("a mapping of names and prompts is expected")
            prompts += _library(library, unused)
    if (prompt := value_of(section, "validation_prompt", str)) is not None:
        prompts.append({"prompt": prompt})
    said = section.get("validation_resolution") or None
    sizes = [size("validation_resolution", text) for text in str(said).split(",")] if said else []
    places = [{"width": width, "height": height} for width, height in sizes] or [{}]
    entries = [place | each for each in prompts for place in places]
    own = settings({
        "model": _model(section, family), "dtype": dtype_named(section, "mixed_precision", none=("no",)),
        "prediction": _prediction(section), "t5_mask": flag(section, "flux_attention_masked_training") or None,
        "t5_length": _t5_length(section, family, unused), "noise_device": _noise_device(section),
    })  # fmt: skip
    own["sample"] |= shared | {"lenient": True} | ({"samples": entries} if entries else {})
    own["sample"] |= {"out": str(Path(out, "validation_images"))} if out else {}
    own["sample"] = with_random_seeds(own["sample"])
    read = parse_config(own, unused)
    return replace(read, family=family, training=_schedule(section, read.unused))


def _plain(key: str, value: Any) -> Any:
    """A value as it is read from the command line, where all are text."""
    if not isinstance(value, str) or key in TEXTS:
        return None if value == "None" else value
    text = value.strip().lower()
    words = {"true": True, "false": False, "none": None, "": None}
    if text in words:
        return words[text]
    if re.fullmatch(r"[-+]?\d{1,20}", text):
        return int(text)
    number = r"[-+]?(\d{1,20}\.?\d{0,20}|\.\d{1,20})(e[-+]?\d{1,3})?"
    return float(text) if re.fullmatch(number, text) else value


def _images(section: Mapping[str, Any], family: str | None, unused: dict[str, str]) -> dict[str, Any]:
    """What is asked of all images; numbers that the file lacks are the recipe's."""
    steps = value_of(section, "validation_num_inference_steps", int)
    guidance = value_of(section, "validation_guidance", float)
    seeds = (value_of(section, key, int) for key in ("validation_seed", "seed"))
    found: dict[str, Any] = {
        **({} if steps is None else {"steps": steps}), **({} if guidance is None else {"guidance_scale": guidance}),
        "seed": -1 if flag(section, "validation_randomize") else next((seed for seed in seeds if seed), 0),
    }  # fmt: skip
    real = value_of(section, "validation_guidance_real", float)
    if family == "flux" and real is not None and real > 1:
        found["true_cfg_scale"] = real
        first = value_of(section, "validation_no_cfg_until_timestep", int)
        first = 2 if first is None else first
        of = recipe("simpletuner", family).choices["steps"].value if steps is None else steps
        if 0 < first < of:
            found["cfg_interval"] = [first / of, 1.0]
    if "validation_negative_prompt" in section:
        found["negative"] = value_of(section, "validation_negative_prompt", str) or ""
    if (strength := value_of(section, "validation_lycoris_strength", float)) not in (None, 1.0):
        found["lora_scale"] = strength
    scheduler = value_of(section, "validation_noise_scheduler", str)
    if scheduler is not None and scheduler not in SAMPLERS:
        raise ConfigError(f"validation_noise_scheduler must be one of {', '.join(SAMPLERS)}, not '{scheduler}'")
    sampler = SAMPLERS[scheduler] if scheduler else None
    if scheduler and sampler is None:
        unused[f"validation_noise_scheduler: {scheduler}"] = "the sampler is the model's own"
    found |= {"sampler": sampler} if sampler else {}
    shift = value_of(section, "flow_schedule_shift", float)
    if shift is not None:
        if family == "mmdit" and sampler in (None, "euler", "unipc"):
            found["shift"] = shift
        else:
            unused["flow_schedule_shift"] = FOR_TRAINING
    layers = section.get("validation_guidance_skip_layers")
    if layers is not None:
        numbers = {"start": ("layers_start", 0.01), "end": ("layers_stop", 0.2), "scale": ("scale", 2.8)}
        found["skip_layers"] = {"blocks": layers}
        for key, (rest, usual) in numbers.items():
            number = value_of(section, f"validation_guidance_skip_{rest}", float)
            found["skip_layers"][key] = usual if number is None else number
    return found


def _model(section: Mapping[str, Any], family: str | None) -> str | dict[str, Any] | None:
    """The model that is named, or the one that the flavour of a family is."""
    parts = [(part, value_of(section, key, str)) for key, part in PARTS.items()]
    flavour = value_of(section, "model_flavour", str)
    if not value_of(section, "pretrained_model_name_or_path", str) and family is not None:
        models = FLAVOURS[family]
        if flavour is not None and flavour not in models:
            raise ConfigError(f"model_flavour must be one of {', '.join(models)}, not '{flavour}'")
        parts.insert(0, ("path", models[flavour] if flavour else next(iter(models.values()))))
    return model_of(parts)


def _prediction(section: Mapping[str, Any]) -> str | None:
    kinds = {"v_prediction": "v", "epsilon": "epsilon", "flow_matching": None}
    kind = value_of(section, "prediction_type", str)
    if kind is not None and kind not in kinds:
        raise ConfigError(f"prediction_type must be one of {', '.join(kinds)}, not '{kind}'")
    return kinds[kind] if kind is not None else None


def _t5_length(section: Mapping[str, Any], family: str | None, unused: dict[str, str]) -> int | None:
    """The rows of T5, which are SD 3's choice alone, and at most those of the recipe unless the file insists."""
    length = value_of(section, "tokenizer_max_length", int)
    if length is None:
        return None
    if family != "mmdit":
        unused["tokenizer_max_length"] = "SimpleTuner reads it for SD 3 alone"
        return None
    most = int(recipe("simpletuner", family).choices["t5_length"].value)
    return length if flag(section, "i_know_what_i_am_doing") else min(length, most)


def _noise_device(section: Mapping[str, Any]) -> str | None:
    source = value_of(section, "validation_seed_source", str)
    if source not in (None, "cpu", "gpu"):
        raise ConfigError(f"validation_seed_source must be cpu or gpu, not '{source}'")
    return {"cpu": "cpu", "gpu": "model"}[source] if source else None


def _library(document: Mapping[str, Any], unused: dict[str, str]) -> list[dict[str, Any]]:
    """The entries of a prompt library: a name's prompt, or a mapping with it and the strength of the adapter."""
    entries = []
    for name, given in document.items():
        if isinstance(given, str):
            entries.append({"prompt": given})
            continue
        where = f"the prompt '{name}'"
        given = mapping({where: given}, where)
        known_names(given, [*LIBRARY_KEYS, "adapter_strength", "bbox_entities", "bbox_keyframes", "lyrics"], where)
        prompt = next((given[key] for key in LIBRARY_KEYS if given.get(key) is not None), None)
        if not isinstance(prompt, str):
            raise ConfigError(f"{where} must be text, not {prompt!r}")
        for key in ("bbox_entities", "bbox_keyframes", "lyrics"):
            if given.get(key) not in NEUTRAL:
                unused[key] = "no model here takes it"
        strength = value_of(given, "adapter_strength", float, f"{where}: ")
        entries.append({"prompt": prompt} | ({} if strength is None else {"lora_scale": strength}))
    return entries


def _schedule(section: Mapping[str, Any], unused: dict[str, str]) -> TrainingSchedule:
    """When SimpleTuner validates, if it counts steps."""
    unused |= {key: FOR_TRAINING for key in SCHEDULE_KEYS if section.get(key) not in NEUTRAL}
    every, older = (value_of(section, key, int) for key in ("validation_step_interval", "validation_steps"))
    every = older if every is None else every
    if value_of(section, "validation_epoch_interval", int):
        unused["validation_epoch_interval"] = "a Sampler counts steps, not epochs"
    start = value_of(section, "validate_after_step", int) or 0
    for key, steps in (("validation_step_interval", every or 0), ("validate_after_step", start)):
        if steps < 0:
            raise ConfigError(f"{key} must not be negative, but is {steps}")
    never = flag(section, "validation_disable")
    startup = flag(section, "validation_on_startup")
    return TrainingSchedule(0 if never else 100 if every is None else every, start, not startup, not never)
