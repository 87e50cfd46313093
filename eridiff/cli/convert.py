"""`eridiff convert`: a model's files in another layout or dtype, one tensor in memory at a time."""

import argparse
import copy
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eridiff.errors import ConfigError, quoted
from eridiff.inference import FAMILIES
from eridiff.inference.loading import model_name
from eridiff.lora.save import DIFFUSERS_ENCODERS
from eridiff.precision import check_dtype
from eridiff.text.encoders import empty
from eridiff.text.tokenizers import clip_tokenizer, t5_tokenizer
from eridiff.weights.configs import config_json
from eridiff.weights.detect import Component
from eridiff.weights.keymap import key_map
from eridiff.weights.load import MARKERS, NETWORKS, VARIANT, native_reader, prediction_told, said_by_file
from eridiff.weights.locate import DENOISERS, ModelPath, Parts, locate, subfolders
from eridiff.weights.save import Stored, copies, marked, stored, write_file, write_json, write_shards

LAYOUTS = ("original", "diffusers")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}
ENCODERS = {
    "clip": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
}
PLACES: dict[str, dict[str, str]] = {  # denoiser -> where its parts are in one file of all, as published and as ComfyUI saves
    "flux": {"flux": "model.diffusion_model.", "vae": "vae.", **ENCODERS},
    "mmdit": {"mmdit": "model.diffusion_model.", "vae": "first_stage_model.", **ENCODERS},
    "unet": {
        "unet": "model.diffusion_model.", "vae": "first_stage_model.", "clip": "conditioner.embedders.0.transformer.",
        "clip_g": "conditioner.embedders.1.model.",
    },
}  # fmt: skip
FILES = {
    "flux": "flux",
    "mmdit": "sd3",
    "unet": "sdxl",
    "vae": "ae",
    "clip": "clip_l",
    "clip_g": "clip_g",
    "t5": "t5xxl",
}
PIPELINES = {  # denoiser, or a variant of it -> diffusers' class
    "flux": "FluxPipeline", "fill": "FluxFillPipeline", "canny": "FluxControlPipeline", "depth": "FluxControlPipeline",
    "mmdit": "StableDiffusion3Pipeline", "unet": "StableDiffusionXLPipeline", "inpaint": "StableDiffusionXLInpaintPipeline",
    "refiner": "StableDiffusionXLImg2ImgPipeline",
}  # fmt: skip
UNSHARDED = 1 << 62


def add_parser(commands: Any) -> None:
    """Put `convert` beside the other commands."""
    parser = commands.add_parser(
        "convert", help="write a model in another layout or dtype",
        description="Write a model, or a part of one, in another layout or dtype; what says how it is sampled is carried along.",
    )  # fmt: skip
    parser.set_defaults(run=_convert)
    parser.add_argument("model", metavar="IN", help="a file, a folder or a hub id")
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="a folder; or a name ending in .safetensors: all parts in one file"
    )
    parser.add_argument("--to", required=True, choices=LAYOUTS)
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (the file's); fp8: of linear layers, with a scale per layer in the original layout and without in diffusers', which knows none")  # fmt: skip
    parser.add_argument("--shard", type=float, metavar="GB", help="files of at most so many 10^9 bytes, and an index")
    parser.add_argument("--allow-unknown", action="store_true", help="leave out what a network does not use")


def _convert(options: argparse.Namespace) -> int:
    for path in convert(
        options.model, options.out, options.to, dtype=DTYPES.get(options.dtype), shard=options.shard, allow_unknown=options.allow_unknown
    ):  # fmt: skip
        print(path)
    return 0


def convert(
    model: ModelPath, out: str | os.PathLike[str], to: str, *, dtype: torch.dtype | None = None, shard: float | None = None,
    allow_unknown: bool = False,
) -> list[Path]:  # fmt: skip
    """Write the parts of a model in another layout or dtype; a part at a time, a tensor at a time.

    - model: as for `locate`: a file, a folder, a hub id, or parts by name.
    - out: a folder; for the original layout also a file, `*.safetensors`, that holds all parts. A lone part becomes the
      folder that its class' `from_pretrained` reads, several become a pipeline's.
    - to: original or diffusers.
    - dtype: of the parameters; None keeps the file's (of a file with fp8 weights, what they are scaled to).
    - shard: the most that a file holds, in 10^9 bytes.

    Returns what was written. Raises CheckpointError for files that cannot be read, ConfigError for what cannot be written so.
    """
    check_dtype(dtype)
    target = Path(out).expanduser()
    if to not in LAYOUTS:
        raise ConfigError(f"{quoted(to)} is not a layout to write; there are {' and '.join(LAYOUTS)}")
    if shard is not None and not shard > 0:
        raise ConfigError(f"a file holds more than 0 bytes, not {shard} GB")
    alone = target.suffix == ".safetensors"
    if alone and (to == "diffusers" or shard is not None):
        raise ConfigError(f"{quoted(target)} is one file, and {'diffusers reads' if to == 'diffusers' else 'shards are in'} a folder; give a folder")  # fmt: skip
    parts = locate(model, allow_unknown)
    inside = next(
        (
            c
            for c in parts.components.values()
            if not alone and c.checkpoint.path.resolve().is_relative_to(target.resolve())
        ),
        None,
    )
    if inside is not None:
        raise ConfigError(f"{quoted(target)} holds what is to be converted; give another folder")
    if not parts.components:
        raise ConfigError("there is nothing to convert: the model holds no network")
    denoiser = next((name for name in DENOISERS if name in parts.components), "")
    variant = _variant(parts.components[denoiser], parts) if denoiser else ""
    limit = UNSHARDED if shard is None else int(shard * 1e9)
    if alone:
        return [_write_whole(parts, denoiser, variant, target, dtype)]
    folders = _folders(parts, denoiser, target) if to == "diffusers" else {}
    others = [folder for folder in subfolders(target) if folder not in folders.values()]
    if to == "original" and shard is not None:
        others += [file for name in parts.components if (file := target / f"{FILES[name]}.safetensors").exists()]
    if others:
        raise ConfigError(
            f"{quoted(target)} holds {others[0].name} of another model or layout, which would be read in place of what is written "
            "or beside it; give another folder"
        )
    if to == "diffusers":
        return _write_folders(parts, denoiser, variant, target, folders, dtype, limit)
    written = []
    for name, component in parts.components.items():
        tensors, metadata = _part(component, "original", dtype, "", variant)
        written.append(
            write_shards(tensors, target / FILES[name] if limit < UNSHARDED else target, FILES[name], metadata, limit)
        )
    return [*written, *_write_tokenizers(parts, denoiser, target)]


def _variant(component: Component, parts: Parts) -> str:
    """Which of the published models with these sizes it is, told as when it is loaded."""
    family = next(family for family in FAMILIES if family.family == component.network)
    return family.choose_variant(component.config, model_name(component, parts))[0]


def _part(
    component: Component, to: str, dtype: torch.dtype | None, prefix: str, variant: str
) -> tuple[list[Stored], dict[str, str]]:
    """The tensors of one network as they will be written, and the file's metadata."""
    module = empty(component)
    native, shapes, dtypes = native_reader(component, module)
    if dtype is not None:
        parameters = {name for name, _ in module.named_parameters()}
        eights = {f"{n}.weight" for n, m in module.named_modules() if isinstance(m, nn.Linear)}
        chosen = parameters if dtype != torch.float8_e4m3fn else eights if component.network != "vae" else set()
        dtypes |= {name: dtype for name in shapes if name in chosen}
    scaled = [name for name in shapes if dtype == torch.float8_e4m3fn and to == "original" and dtypes[name] == dtype]
    layout = to
    if component.network not in NETWORKS:
        layout = "openclip" if "embedders" in prefix and component.network == "clip_g" else "huggingface"
    tensors = stored(
        key_map(component.network).layouts[layout],
        shapes,
        component.sizes,
        dtypes,
        native,
        prefix=prefix,
        scaled=scaled,
    )
    if to == "original" and layout == component.layout.name:
        tensors += copies(component, prefix)
    if to == "diffusers" or layout == "openclip":  # transformers ties the embedding's second name itself
        tensors = [tensor for tensor in tensors if not tensor.name.endswith("encoder.embed_tokens.weight")]
    metadata = said_by_file(component) | {
        "eridiff.config": json.dumps({component.network: _sizes(component)}, sort_keys=True)
    }
    if component.network in DENOISERS:
        metadata[VARIANT] = variant
        if to == "original":
            tensors += marked(metadata.pop(MARKERS, ""))
    return tensors, {"format": "pt", **metadata}


def _sizes(component: Component) -> dict[str, Any]:
    return dict(component.config) if isinstance(component.config, Mapping) else asdict(component.config)


def _write_whole(parts: Parts, denoiser: str, variant: str, target: Path, dtype: torch.dtype | None) -> Path:
    """All parts in one file; a lone one without a prefix."""
    places = dict(PLACES[denoiser or "flux"])
    if denoiser == "unet" and "clip" not in parts.components:  # the refiner has one encoder
        places["clip_g"] = "conditioner.embedders.0.model."
    several = len(parts.components) > 1
    tensors, metadata, configs = [], dict[str, str](), dict[str, Any]()
    for name, component in parts.components.items():
        own, told = _part(component, "original", dtype, places[name] if several else "", variant)
        tensors += own
        configs |= json.loads(told["eridiff.config"])
        metadata = told | metadata if name != denoiser else metadata | told
    return write_file(tensors, target, metadata | {"eridiff.config": json.dumps(configs, sort_keys=True)})


def _folders(parts: Parts, denoiser: str, target: Path) -> dict[str, Path]:
    """Where diffusers has each part: in a folder of its own, a lone one in `target` itself."""
    places = {"flux": "transformer", "mmdit": "transformer", "unet": "unet", "vae": "vae"}
    places |= {name: f"text_encoder{_number(i)}" for i, name in enumerate(DIFFUSERS_ENCODERS[denoiser])}
    return {name: target / places[name] if len(parts.components) > 1 else target for name in parts.components}


def _write_folders(
    parts: Parts, denoiser: str, variant: str, target: Path, folders: Mapping[str, Path], dtype: torch.dtype | None, limit: int
) -> list[Path]:  # fmt: skip
    """A folder for each part as diffusers and transformers read it; of several parts a pipeline's folder around them."""
    several, written, index = len(parts.components) > 1, [], dict[str, Any]()
    for name, component in parts.components.items():
        tensors, metadata = _part(component, "diffusers", dtype, "", variant)
        folder = folders[name]
        stem = "diffusion_pytorch_model" if name in NETWORKS else "model"
        if name in NETWORKS:
            config = config_json(name, component.config)
            index[folder.name] = ["diffusers", config["_class_name"]]
        else:
            config = _transformers_config(component, tensors)
            index[folder.name] = ["transformers", config["architectures"][0]]
        written.append(write_json(config, folder / "config.json"))
        written.append(write_shards(tensors, folder, stem, metadata, limit))
    if not (several and denoiser):
        return written
    tokenizers = _write_tokenizers(parts, denoiser, target)
    index |= {folder.name: ["transformers", kind] for folder, kind in tokenizers.items()}
    scheduler = _write_scheduler(parts.components[denoiser], variant, target)
    index["scheduler"] = ["diffusers", json.loads(scheduler.read_text())["_class_name"]]
    for i in range(len(DIFFUSERS_ENCODERS[denoiser])):
        for place in (f"text_encoder{_number(i)}", f"tokenizer{_number(i)}"):
            index.setdefault(place, [None, None])
    kind = PIPELINES.get(variant, PIPELINES[denoiser])
    document = {"_class_name": kind, "_diffusers_version": "0.30.0", **index}
    return [*written, *tokenizers, scheduler, write_json(document, target / "model_index.json")]


def _transformers_config(component: Component, tensors: list[Stored]) -> dict[str, Any]:
    config: dict[str, Any] = empty(component).config.to_dict()
    projected = any(tensor.name == "text_projection.weight" for tensor in tensors)
    if component.network == "t5":
        return config | {"architectures": ["T5EncoderModel"]}
    # 2 in published files: pooling takes the highest id, whatever the vocabulary's size
    ends = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    return config | ends | {"architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"]}


def _number(index: int) -> str:
    """How diffusers counts encoders and tokenizers: the first has none."""
    return f"_{index + 1}" if index else ""


def _write_tokenizers(parts: Parts, denoiser: str, target: Path) -> dict[Path, str]:
    """The tokenizers of the encoders that are there, as transformers saves them, and their classes.

    T5's is left out where none is found.
    """
    written = {}
    for i, encoder in enumerate(DIFFUSERS_ENCODERS[denoiser] if denoiser else ()):
        kind = "t5" if encoder == "t5" else "clip"
        if encoder not in parts.components or kind == "t5" and "t5" not in parts.tokenizers:
            continue
        tokenizer = copy.deepcopy((t5_tokenizer if kind == "t5" else clip_tokenizer)(parts.tokenizers.get(kind)))
        if encoder == "clip_g":
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
        folder = target / f"tokenizer{_number(i)}"
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(folder)
        if kind == "t5":  # whose class adds a hundred to a vocabulary without these, if nothing says how many there are
            path = folder / "tokenizer_config.json"
            extra = sum(token.startswith("<extra_id_") for token in tokenizer.get_vocab())
            write_json(json.loads(path.read_text()) | {"extra_ids": extra}, path)
        written[folder] = "T5TokenizerFast" if kind == "t5" else "CLIPTokenizer"
    return written


def _write_scheduler(component: Component, variant: str, target: Path) -> Path:
    """The model's own scheduler_config.json, or the one that its published variant has."""
    path, beside = (
        target / "scheduler" / "scheduler_config.json",
        component.checkpoint.path.parent / "scheduler" / "scheduler_config.json",
    )
    if component.checkpoint.path.is_dir() and beside.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copyfile(beside, path)) if path != beside else path
    defaults: Any = next(family for family in FAMILIES if family.family == component.network).variants[variant]
    if component.network == "unet":
        prediction, zero = prediction_told(component)
        trailing = zero or variant in ("turbo", "lightning")
        return write_json(
            {
                "_class_name": "EulerAncestralDiscreteScheduler" if defaults.sampler == "euler_ancestral" else "EulerDiscreteScheduler",
                "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
                "prediction_type": "v_prediction" if prediction in ("v", "v_prediction") else prediction or "epsilon",
                "rescale_betas_zero_snr": zero, "timestep_spacing": "trailing" if trailing else "leading", "steps_offset": 1,
            },
            path,
        )  # fmt: skip
    kind: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
    if component.network == "mmdit":
        return write_json({**kind, "shift": defaults.shift}, path)
    numbers = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    shift = {"use_dynamic_shifting": defaults.shift, "shift": 3.0 if defaults.shift else 1.0}
    return write_json({**kind, **shift, **numbers}, path)
