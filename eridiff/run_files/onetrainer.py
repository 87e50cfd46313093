"""OneTrainer's samples.json, and the training configuration that names it.

modules/util/config/SampleConfig.py, modules/util/config/TrainConfig.py and modules/modelSampler/ of OneTrainer say what the keys
mean there.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from eridiff.config import FOR_TRAINING, RunConfig, TrainingSchedule, parse_config
from eridiff.errors import ConfigError
from eridiff.prompt_files import read_json
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
    trained,
    unread,
    value_of,
    with_random_seeds,
)

SIGNS = ("__version", "diffusion_steps", "noise_scheduler", "random_seed")  # keys that no other program's samples have
SAMPLE_KEYS: dict[str, tuple[str, type]] = {  # key -> eridiff's, type
    "prompt": ("prompt", str), "negative_prompt": ("negative", str), "width": ("width", int), "height": ("height", int),
    "seed": ("seed", int), "diffusion_steps": ("steps", int), "cfg_scale": ("cfg_scale", float),
}  # fmt: skip
SCHEDULERS = {  # noise_scheduler, which is SDXL's alone -> sampler, and schedule where it is Karras'
    "DDIM": "ddim", "EULER": "euler", "EULER_A": "euler_ancestral", "DPMPP": "dpmpp_2m", "DPMPP_SDE": "dpmpp_2m_sde",
    "UNIPC": "unipc",
}  # fmt: skip
OWN_SAMPLE_KEYS = (*SAMPLE_KEYS, "noise_scheduler", "random_seed", "enabled", "__version")
UNUSED_SAMPLE_KEYS = {
    **dict.fromkeys(
        [f"text_encoder_{n}_layer_skip" for n in (1, 2, 3, 4)], "the text encoders are read at the layer of the published models"
    ),
    **dict.fromkeys(
        ["text_encoder_1_sequence_length", "text_encoder_2_sequence_length", "transformer_attention_mask"],
        "OneTrainer takes it from the configuration of the training",
    ),
    "force_last_timestep": "the noise levels are the schedule's",
    **dict.fromkeys(["sample_inpainting", "base_image_path", "mask_image_path"], "--image and --mask repaint an image"),
    **dict.fromkeys(["frames", "length"], "images do not move"),
}  # fmt: skip
STILL = {"frames": 1, "length": 10.0}  # values that say nothing of an image

MODEL_TYPES = {
    "FLUX_DEV_1": "flux", "FLUX_FILL_DEV_1": "flux", "STABLE_DIFFUSION_3": "mmdit", "STABLE_DIFFUSION_35": "mmdit",
    "STABLE_DIFFUSION_XL_10_BASE": "unet", "STABLE_DIFFUSION_XL_10_BASE_INPAINTING": "unet",
}  # fmt: skip
PARTS = {
    "transformer": "transformer",
    "unet": "transformer",
    "vae": "vae",
}  # sections with a model_name -> part of a model
PREDICTIONS = {"force_v_prediction": "v", "force_epsilon_prediction": "epsilon"}
TRAINING_SIGNS = ("base_model_name", "model_type", "sample_definition_file_name", "workspace_dir", "training_method")
TRAINING_KEYS = (
    *PARTS, "base_model_name", "model_type", "workspace_dir", "sample_definition_file_name", "samples", "sample_after",
    "sample_after_unit", "sample_skip_first", "train_dtype", *PREDICTIONS, "training_method", "output_model_destination",
    "text_encoder_2_sequence_length", "__version",
)  # fmt: skip
UNUSED_TRAINING_KEYS = {
    **dict.fromkeys(["text_encoder_layer_skip", *(f"text_encoder_{n}_layer_skip" for n in (2, 3, 4))], UNUSED_SAMPLE_KEYS["text_encoder_1_layer_skip"]),
    "text_encoder_sequence_length": "no text encoder of these models takes it",
    "rescale_noise_scheduler_to_zero_terminal_snr": "--zero-terminal-snr changes the last noise level",
    "lora_model_name": f"{FOR_TRAINING}; --lora takes it",
    "sample_image_format": "images are PNG",
    "save_skip_first": FOR_TRAINING,
}  # fmt: skip


def is_samples(document: object) -> bool:
    """Whether a JSON list holds OneTrainer's samples, not kohya's prompts."""
    return isinstance(document, list) and any(isinstance(e, dict) and any(k in e for k in SIGNS) for e in document)


def is_training(document: Mapping[str, Any]) -> bool:
    """Whether a JSON is the configuration of a training: it has all keys there are."""
    return sum(key in document for key in TRAINING_SIGNS) > 1


def of_samples(document: object, unused: dict[str, str], own: Mapping[str, Any] | None = None) -> RunConfig:
    """What the samples of a file mean, with what a training's configuration says in eridiff's words. Raises ConfigError."""
    if not isinstance(document, list):
        raise ConfigError("a list of samples is expected")
    entries = [_entry(each, f"sample {n}", unused) for n, each in enumerate(document, 1) if _enabled(each, n)]
    if document and not entries:
        raise ConfigError("every sample of the file is switched off by enabled: false")
    own = dict(own or {})
    given = own.get("sample", {}) | {"lenient": True} | ({"samples": entries} if entries else {})
    read = parse_config(own | {"sample": with_random_seeds(given)}, unused)
    return replace(read, sample=replace(read.sample, euler_elsewhere=True))


def read_training(document: Mapping[str, Any], folder: Path) -> RunConfig:
    """What the configuration of a training means for sampling; raises ConfigError. folder is the one of the file."""
    kind = value_of(document, "model_type", str)
    if kind is not None and kind not in MODEL_TYPES:
        raise ConfigError(f"model_type: {kind} is not one of the supported models: {', '.join(MODEL_TYPES)}")
    result = value_of(document, "output_model_destination", str) or "in output_model_destination"
    method = value_of(document, "training_method", str)
    made = trained(result, "--lora" if method == "LORA" else "--model")
    made = f"{FOR_TRAINING}; embeddings of new words are not loaded" if method == "EMBEDDING" else made
    reasons = UNUSED_TRAINING_KEYS | {"output_model_destination": made}
    known = [key for key in TRAINING_KEYS if key not in reasons]
    unused = unread(document, known, "OneTrainer's configuration of a training", "", reasons)

    parts = [(part, value_of(mapping(document, key), "model_name", str, f"{key}: ")) for key, part in PARTS.items()]
    own = settings({
        "model": model_of([("path", value_of(document, "base_model_name", str)), *parts]),
        "dtype": dtype_named(document, "train_dtype", none=("NONE", "TFLOAT_32")),
        "prediction": next((kind for key, kind in PREDICTIONS.items() if flag(document, key)), None),
        "t5_length": _t5_length(document, MODEL_TYPES.get(kind or "")),
    })  # fmt: skip
    if flag(mapping(document, "transformer"), "attention_mask", "transformer: "):
        unused["transformer: attention_mask"] = "OneTrainer puts zeros in place of T5's padding, which is not done here"
    if place := value_of(document, "workspace_dir", str):
        own["sample"]["out"] = str(Path(place, "samples"))
    samples = document.get("samples")
    if samples is None and (name := value_of(document, "sample_definition_file_name", str)):
        path = named_file(name, folder)
        with naming(path):
            samples = read_json(read_text(path))
    read = of_samples([] if samples is None else samples, unused, own)
    return replace(read, family=MODEL_TYPES.get(kind or ""), training=_schedule(document, read.unused))


def _t5_length(document: Mapping[str, Any], family: str | None) -> int | None:
    """The rows of T5, which are Flux' choice alone; null is all that its tokenizer has."""
    if family not in (None, "flux") or "text_encoder_2_sequence_length" not in document:
        return None
    length = value_of(document, "text_encoder_2_sequence_length", int)
    return 512 if length is None else length


def _enabled(sample: object, number: int) -> bool:
    return not isinstance(sample, dict) or value_of(sample, "enabled", bool, f"sample {number}: ") is not False


def _entry(sample: object, where: str, unused: dict[str, str]) -> dict[str, Any]:
    """A sample in the words of an entry of `samples`."""
    if not isinstance(sample, dict):
        raise ConfigError(f"{where} must be a mapping with a prompt, not {sample!r}")
    known_names(sample, [*OWN_SAMPLE_KEYS, *UNUSED_SAMPLE_KEYS], where)
    for key, reason in UNUSED_SAMPLE_KEYS.items():
        if sample.get(key) not in (*NEUTRAL, STILL.get(key)):
            unused[key] = reason
    read = {name: value_of(sample, key, kind, f"{where}: ") for key, (name, kind) in SAMPLE_KEYS.items()}
    entry = {name: value for name, value in read.items() if value is not None}
    if "prompt" not in entry:
        raise ConfigError(f"{where} has no prompt")
    if flag(sample, "random_seed", f"{where}: "):
        entry["seed"] = -1
    if (scheduler := value_of(sample, "noise_scheduler", str, f"{where}: ")) is not None:
        plain = scheduler.removesuffix("_KARRAS")
        if plain not in SCHEDULERS:
            raise ConfigError(f"{where}: noise_scheduler must be one of {', '.join(SCHEDULERS)}, not '{scheduler}'")
        entry["sampler"] = SCHEDULERS[plain]
        entry |= {"schedule": "karras"} if plain != scheduler else {}
    return entry


def _schedule(document: Mapping[str, Any], unused: dict[str, str]) -> TrainingSchedule:
    """When OneTrainer samples, if it counts steps."""
    for key in ("sample_after", "sample_after_unit", "sample_skip_first"):
        if document.get(key) not in NEUTRAL:
            unused[key] = FOR_TRAINING
    unit = value_of(document, "sample_after_unit", str)
    after, skip = value_of(document, "sample_after", float), value_of(document, "sample_skip_first", int)
    if unit != "STEP":
        if unit not in (None, "NEVER", "ALWAYS"):
            unused["sample_after_unit"] = f"a Sampler counts steps, not {unit}"
        return TrainingSchedule(sample_every=int(unit == "ALWAYS"), at_end=False)
    for key, steps in (("sample_after", after or 0), ("sample_skip_first", skip or 0)):
        if not 0 <= steps < 2**31:
            raise ConfigError(f"{key} must be a number of steps, not {steps}")
    return TrainingSchedule(sample_every=int(after or 0), start_step=skip or 0, at_end=False)
