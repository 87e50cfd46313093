"""Where the parts of a model are: one file, a folder of files, a diffusers folder, a hub id, or each part by name."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from eridiff.errors import CheckpointError, ConfigError
from eridiff.weights.detect import DESCRIPTIONS, Component, component_of, detect
from eridiff.weights.header import SHARD_NAME, open_checkpoint, read_json_file
from eridiff.weights.hub import resolve

PART_NAMES = {"transformer": "flux", "vae": "vae", "clip": "clip", "t5": "t5"}  # of the model section
SUBFOLDERS = ("transformer", "vae", "text_encoder", "text_encoder_2")  # of a diffusers folder
TOKENIZER_FOLDERS = {"clip": ("tokenizer", "clip_tokenizer"), "t5": ("tokenizer_2", "t5_tokenizer")}
Model = str | os.PathLike[str] | Mapping[str, object]


@dataclass(frozen=True)
class Parts:
    """The networks of a model by kind (flux, vae, clip, t5) and its tokenizers' files or folders (clip, t5)."""

    components: dict[str, Component] = field(default_factory=dict)
    tokenizers: dict[str, Path] = field(default_factory=dict)


def locate(model: Model) -> Parts:
    """The parts of a model; headers are read, weights are not.

    `model` is a path, a hub id, or a mapping with `path` and the parts that it lacks or that replace its own:
    transformer, vae, clip, t5, tokenizers (a folder of both, or {clip: PATH, t5: PATH}). Raises CheckpointError for a
    file that is damaged or holds something else, ConfigError for an unknown part.
    """
    if not isinstance(model, Mapping):
        return _search(resolve(model))
    unknown = sorted(set(model) - {"path", "tokenizers", *PART_NAMES})
    if unknown:
        raise ConfigError(
            f"'{unknown[0]}' is no part of a model; there are path, {', '.join(PART_NAMES)} and tokenizers"
        )
    parts = _search(resolve(_path("path", model["path"]))) if "path" in model else Parts()
    for name, network in PART_NAMES.items():
        if name in model:
            parts.components[network] = component_of(open_checkpoint(resolve(_path(name, model[name]))), network)
    return Parts(parts.components, parts.tokenizers | _tokenizers(model.get("tokenizers")))


def _path(name: str, value: object) -> str | os.PathLike[str]:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ConfigError(f"the model's part '{name}' must be a path or a hub id, not {value!r}")
    return value


def _tokenizers(given: object) -> dict[str, Path]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        folder = resolve(_path("tokenizers", given))
        found = _beside(folder)
        if not found:
            raise CheckpointError(
                f"'{folder}' holds no tokenizer folder ({', '.join(sum(TOKENIZER_FOLDERS.values(), ()))})"
            )
        return found
    unknown = sorted(set(given) - set(TOKENIZER_FOLDERS))
    if unknown:
        raise ConfigError(f"'{unknown[0]}' is no tokenizer; there are {' and '.join(TOKENIZER_FOLDERS)}")
    return {name: resolve(_path(f"tokenizers: {name}", value)) for name, value in given.items()}


def _beside(folder: Path) -> dict[str, Path]:
    return {
        kind: folder / name for kind, names in TOKENIZER_FOLDERS.items() for name in names if (folder / name).is_dir()
    }


def _search(path: Path) -> Parts:
    if not path.is_dir():
        return Parts({c.network: c for c in detect(open_checkpoint(path))})
    if (path / "model_index.json").exists():
        kind = read_json_file(path / "model_index.json").get("_class_name")
        if not isinstance(kind, str) or not kind.startswith("Flux"):
            raise CheckpointError(
                f"'{path}' is the folder of a {kind or 'pipeline without a name'}, not of Flux, and is not loaded"
            )
    places = [path / name for name in SUBFOLDERS if any((path / name).glob("*.safetensors*"))]
    if not places:  # whole files side by side, or the folder of one network
        files = sorted(p for p in path.glob("*.safetensors") if not SHARD_NAME.search(p.name))
        places = files if len(files) > 1 and not (path / "config.json").exists() else [path]
    components: dict[str, Component] = {}
    for place in places:
        for component in detect(open_checkpoint(place)):
            if component.network in components:
                first = components[component.network].checkpoint.path
                raise CheckpointError(
                    f"'{path}' holds {DESCRIPTIONS[component.network]} twice, in {first.name} and {place.name}; give the parts by name"
                )
            components[component.network] = component
    return Parts(components, _beside(path))
