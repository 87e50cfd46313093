"""kohya's sd-scripts: prompt files (.txt, .toml, .json), and the TOML of a training.

library/train_util.py of sd-scripts says what the keys mean there (get_my_scheduler, sample_images_common, sample_image_inference), and
library/flux_train_utils.py and sd3_train_utils.py what is otherwise for Flux and SD 3.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from eridiff.config import FOR_TRAINING, RunConfig, TrainingSchedule, parse_config
from eridiff.errors import ConfigError
from eridiff.prompt_files import Entry, read_json, read_prompts, read_toml
from eridiff.run_files.common import (
    NEUTRAL,
    dtype_named,
    flag,
    model_of,
    named_file,
    naming,
    read_text,
    settings,
    trained,
    unread,
    value_of,
    with_random_seeds,
)

PARTS = {  # key -> part of a model
    "pretrained_model_name_or_path": "path", "vae": "vae", "ae": "vae", "clip_l": "clip", "clip_g": "clip_g", "t5xxl": "t5",
}  # fmt: skip
MODULES = {
    "networks.lora_flux": "flux",
    "networks.oft_flux": "flux",
    "networks.lora_sd3": "mmdit",
}  # network_module -> family
OTHERS = ("lumina", "anima", "hunyuan")  # words of a network_module for another family
SCHEDULE_KEYS = ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first")
TRAINING_KEYS = (
    *PARTS, *SCHEDULE_KEYS, "sample_prompts", "sample_sampler", "v_parameterization", "apply_t5_attn_mask", "mixed_precision",
    "output_dir", "output_name", "network_module", "model_type", "v2", "t5xxl_max_token_length",
)  # fmt: skip
UNUSED_TRAINING_KEYS = {
    "clip_skip": "the text encoders are read at the layer of the published models",
    "zero_terminal_snr": "kohya's images have the usual noise levels; --zero-terminal-snr changes their last",
    "apply_lg_attn_mask": "CLIP's padding is not hidden here",
    **dict.fromkeys(["network_weights", "base_weights"], f"{FOR_TRAINING}; --lora takes them"),
    **dict.fromkeys(  # names that are near to one that is read
        [f"{what}_every_n_{unit}" for what in ("save", "validate") for unit in ("steps", "epochs")], FOR_TRAINING
    ),
    **dict.fromkeys(["fp8_base", "fp8_base_unet"], "weights are used as they are stored"),
}


def read_prompt_file(text: str, ending: str, unused: dict[str, str]) -> list[Entry]:
    """The entries of a prompt file by its ending. Raises ConfigError, naming line or entry."""
    document = text if ending == ".txt" else read_toml(text) if ending == ".toml" else read_json(text)
    return read_prompts(document, unused)


def of_prompts(entries: list[Entry], unused: dict[str, str]) -> RunConfig:
    """A prompt file alone: the model's numbers where an entry has none."""
    return parse_config({"sample": with_random_seeds({"samples": entries, "lenient": True})}, unused)


def is_training(document: Mapping[str, Any]) -> bool:
    """Whether a TOML is the configuration of a training: its keys may be in sections."""
    return bool({*TRAINING_KEYS, *UNUSED_TRAINING_KEYS} & _flat(document).keys())


def read_training(document: Mapping[str, Any], folder: Path) -> RunConfig:
    """What the TOML of a training means for sampling; raises ConfigError. folder is the one of the file."""
    section = _flat(document)
    family = _family(section)
    out = value_of(section, "output_dir", str)
    made = f"{value_of(section, 'output_name', str) or 'last'}.safetensors"
    place = str(Path(out, made)) if out else made
    option = "--lora" if "network_module" in section else "--model"
    reasons = UNUSED_TRAINING_KEYS | {key: trained(place, option) for key in ("network_module", "output_name")}
    known = [key for key in TRAINING_KEYS if key not in reasons]
    unused = unread(section, known, "kohya's configuration of a training", "", reasons)

    sampler = value_of(section, "sample_sampler", str)
    masked: bool | None = flag(section, "apply_t5_attn_mask") or None
    if masked and family != "flux":
        unused["apply_t5_attn_mask"], masked = "kohya puts zeros in place of T5's padding, which is not done here", None
    own = settings({
        "model": model_of((part, value_of(section, key, str)) for key, part in PARTS.items()),
        "dtype": dtype_named(section, "mixed_precision", none=("no",)),
        "prediction": "v" if flag(section, "v_parameterization") else None, "t5_mask": masked,
        "t5_length": value_of(section, "t5xxl_max_token_length", int),
    })  # fmt: skip
    shared = {**own["sample"], **({"sampler": sampler} if sampler else {}), "lenient": True} | (
        {"out": str(Path(out, "sample"))} if out else {}
    )
    entries: list[Entry] = []
    if name := value_of(section, "sample_prompts", str):
        path = named_file(name, folder)
        with naming(path):
            entries = read_prompt_file(read_text(path), path.suffix.lower(), unused)
    own["sample"] = with_random_seeds(shared | ({"samples": entries} if entries else {}))
    read = parse_config(own, unused)
    sample = replace(read.sample, euler_elsewhere=True)
    return replace(read, family=family, sample=sample, training=_schedule(section, read.unused))


def _schedule(section: Mapping[str, Any], unused: dict[str, str]) -> TrainingSchedule:
    """When kohya samples; epochs overrule steps there."""
    unused |= {key: FOR_TRAINING for key in SCHEDULE_KEYS if section.get(key) not in NEUTRAL}
    steps, first = value_of(section, "sample_every_n_steps", int) or 0, flag(section, "sample_at_first")
    if steps < 0:
        raise ConfigError(f"sample_every_n_steps must not be negative, but is {steps}")
    if value_of(section, "sample_every_n_epochs", int):
        unused["sample_every_n_epochs"], steps = "a Sampler counts steps, not epochs", 0
    return TrainingSchedule(sample_every=steps, skip_first=not first, at_end=False)


def _flat(document: Mapping[str, Any]) -> dict[str, Any]:
    """All keys of the sections of a TOML in one, as kohya reads it."""
    found: dict[str, Any] = {}
    for key, value in document.items():
        found |= value if isinstance(value, dict) else {key: value}
    return found


def _family(section: Mapping[str, Any]) -> str | None:
    """The family that the keys of a training say, if they do: which script trains is not in the file."""
    module, kind = (value_of(section, key, str) or "" for key in ("network_module", "model_type"))
    other = next((word for word in OTHERS if re.search(word, module)), None)
    if flag(section, "v2") or kind not in ("", "flux") or other:
        what = "v2" if section.get("v2") else f"model_type: {kind}" if kind not in ("", "flux") else module
        raise ConfigError(f"{what} is not one of the supported families: SDXL, SD 3 and Flux")
    if module in MODULES or kind:
        return MODULES.get(module, kind)
    return "flux" if section.get("ae") else "mmdit" if section.get("clip_g") else None
