"""Where the parts of a model are: one file, a folder of files, a diffusers folder, a hub id, or each part by name."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from eridiff.errors import CheckpointError, ConfigError, quoted
from eridiff.weights.detect import DESCRIPTIONS, Component, chosen, component_of, detect, with_statistics
from eridiff.weights.format import read_json_file
from eridiff.weights.header import SHARD_NAME, open_checkpoint
from eridiff.weights.hub import SUBFOLDERS, TOKENIZER_FOLDERS, check_pipeline, resolve

DENOISERS = ("flux", "mmdit", "unet")
TEXT_ENCODERS = ("clip", "clip_g", "t5")
PART_NAMES = {  # of the model section -> the components that it may be
    "transformer": DENOISERS, "vae": ("vae",), "clip": ("clip",), "clip_g": ("clip_g",), "t5": ("t5",),
}  # fmt: skip
FOLDERS_OF = {"transformer": ("transformer", "unet"), "vae": ("vae",)}  # of a diffusers folder, which a part replaces
ModelPath = str | os.PathLike[str] | Mapping[str, object]


@dataclass(frozen=True)
class Parts:
    """The networks of a model by kind (flux, mmdit or unet, vae, clip, clip_g, t5) and its tokenizers' files or folders (clip, t5)."""

    components: dict[str, Component] = field(default_factory=dict)
    tokenizers: dict[str, Path] = field(default_factory=dict)
    name: str = ""  # of the folder or the hub id that the network is in; nothing for a network given as a file


def locate(model: ModelPath | Parts, allow_unknown: bool = False) -> Parts:
    """The parts of a model; headers are read, weights are not.

    `allow_unknown` leaves out tensors that a network does not use, with a warning, in place of an error.

    `model` is a path, a hub id, or a mapping with `path` and the parts that it lacks or that replace its own:
    transformer, vae, clip, clip_g, t5, tokenizers (a folder of both, or {clip: PATH, t5: PATH}). Raises CheckpointError for a
    file that is damaged or holds something else, ConfigError for an unknown part.
    """
    if isinstance(model, Parts):
        return model
    if not isinstance(model, Mapping):
        return _with_statistics(_search(resolve(model), allow_unknown))
    unknown = sorted(set(model) - {"path", "tokenizers", *PART_NAMES})
    if unknown:
        raise ConfigError(
            f"{quoted(unknown[0])} is not a part of a model; there are path, {', '.join(PART_NAMES)} and tokenizers"
        )
    parts = Parts()
    if "path" in model:
        replaced = [folder for part, folders in FOLDERS_OF.items() if part in model for folder in folders]
        parts = _search(resolve(_path("path", model["path"]), without=replaced), allow_unknown)
    for name, networks in PART_NAMES.items():
        if name in model:
            file = open_checkpoint(resolve(_path(name, model[name]), "part"))
            found = component_of(file, *networks, allow_unknown=allow_unknown)
            kept = {n: c for n, c in parts.components.items() if n not in networks}
            name_of_all = parts.name if name != "transformer" else _name(file.path) if file.path.is_dir() else ""
            parts = Parts({found.network: found, **kept}, parts.tokenizers, name_of_all)
    tokenizers = parts.tokenizers | _tokenizers(model.get("tokenizers"))
    return _with_statistics(replace(parts, tokenizers=tokenizers))


def locate_part(path: str | os.PathLike[str], part: str, allow_unknown: bool = False) -> Component:
    """One part of a file, a folder or a hub id, by its name in `PART_NAMES`; of a pipeline at the hub no other network is fetched.

    Raises ConfigError for an unknown part, CheckpointError for what cannot be read or does not hold it.
    """
    if part not in PART_NAMES:
        raise ConfigError(f"{quoted(part)} is not a part of a model; there are {', '.join(PART_NAMES)}")
    own = FOLDERS_OF.get(part) or tuple(folder for folder in SUBFOLDERS if folder.startswith("text_encoder"))
    place = resolve(path, without=[folder for folder in SUBFOLDERS if folder not in own])
    held = _with_statistics(_search(place, allow_unknown)).components
    return chosen(held.values(), PART_NAMES[part], path)


def _name(folder: Path) -> str:
    """What a folder is called: a network's in a pipeline as the pipeline, one in the hub's cache as the hub calls it."""
    folder = folder.parent if folder.name in ("transformer", "unet") else folder
    if folder.parent.name == "snapshots":  # models--ORGANISATION--NAME/snapshots/REVISION
        return folder.parent.parent.name.rsplit("--", 1)[-1]
    return folder.name


def _with_statistics(parts: Parts) -> Parts:
    """The latents' scale and shift are in no single file, and SD 3's autoencoder has the names and shapes of Flux's."""
    vae = parts.components.get("vae")
    if vae is None or "mmdit" not in parts.components:
        return parts
    return replace(parts, components={**parts.components, "vae": with_statistics(vae, "sd3")})


def _path(name: str, value: object) -> str | os.PathLike[str]:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ConfigError(f"the model's part '{name}' must be a path or a hub id, not {quoted(value)}")
    return value


def _tokenizers(given: object) -> dict[str, Path]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        folder = resolve(_path("tokenizers", given), "tokenizers")
        found = _beside(folder)
        if not found:
            raise CheckpointError(
                f"{quoted(folder)} holds no tokenizer folder ({', '.join(sum(TOKENIZER_FOLDERS.values(), ()))})"
            )
        return found
    unknown = sorted(set(given) - set(TOKENIZER_FOLDERS))
    if unknown:
        raise ConfigError(f"{quoted(unknown[0])} is not a tokenizer; there are {' and '.join(TOKENIZER_FOLDERS)}")
    return {name: resolve(_path(f"tokenizers: {name}", value), "tokenizers") for name, value in given.items()}


def _beside(folder: Path) -> dict[str, Path]:
    """The tokenizers' folders; tokenizer_2 is T5's in Flux and CLIP-G's, which has merges, in SD 3."""
    found: dict[str, Path] = {}
    for kind, names in TOKENIZER_FOLDERS.items():
        for name in names:
            if (folder / name).is_dir() and kind not in found and not (kind == "t5" and _is_clips(folder / name)):
                found[kind] = folder / name
    return found


def _is_clips(folder: Path) -> bool:
    """Whether a tokenizer is made of merges; transformers 5 writes them into tokenizer.json alone."""
    if (folder / "merges.txt").exists() or not (folder / "tokenizer.json").is_file():
        return (folder / "merges.txt").exists()
    try:
        model = read_json_file(folder / "tokenizer.json").get("model")
    except CheckpointError:
        return False  # said when it is read
    return isinstance(model, dict) and "merges" in model


def subfolders(path: Path) -> list[Path]:
    """Of a model's folder those of diffusers that hold weights; they are read before files beside them."""
    return [path / name for name in SUBFOLDERS if any((path / name).glob("*.safetensors*"))]


def _search(path: Path, allow_unknown: bool) -> Parts:
    if not path.is_dir():
        return Parts({c.network: c for c in detect(open_checkpoint(path), allow_unknown)})
    if (path / "model_index.json").exists():
        check_pipeline(path, read_json_file(path / "model_index.json"))
    places = subfolders(path)
    if not places:  # whole files side by side, or the folder of one network
        files = sorted(p for p in path.glob("*.safetensors") if not SHARD_NAME.search(p.name))
        places = files if len(files) > 1 and not (path / "config.json").exists() else [path]
    components: dict[str, Component] = {}
    for place in places:
        for component in detect(open_checkpoint(place), allow_unknown):
            if component.network in components:
                first = components[component.network].checkpoint.path
                raise CheckpointError(
                    f"{quoted(path)} holds {DESCRIPTIONS[component.network]} twice, in {quoted(first.name, 60)} and {quoted(place.name, 60)}; give the parts by name"
                )
            components[component.network] = component
    return Parts(components, _beside(path), _name(path))
