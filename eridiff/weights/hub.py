"""A path or a hub id becomes a path; paths that exist win. Of a repository only what is read is fetched."""

import os
import re
from collections.abc import Collection, Iterable
from glob import escape
from pathlib import Path
from typing import Any

from eridiff.errors import CheckpointError, quoted
from eridiff.weights.format import read_json_file
from eridiff.weights.header import (
    HALF_SINGLE_NAMES,
    PICKLED_SUFFIXES,
    SINGLE_NAMES,
    choose_index,
    choose_single,
    read_index,
    refuse_folder,
)

HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/((?:[^/\\]+/)*[^/\\]+\.safetensors))?")
# a name that ends so is not a repository
FILES = (".safetensors", ".json", ".yaml", ".yml", ".gguf", *PICKLED_SUFFIXES)
PIPELINES = ("Flux", "StableDiffusion3", "StableDiffusionXL")  # how the class names of readable diffusers folders begin
SUBFOLDERS = ("transformer", "unet", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")  # of a diffusers folder
TOKENIZER_FOLDERS = {"clip": ("tokenizer", "clip_tokenizer"), "t5": ("tokenizer_3", "tokenizer_2", "t5_tokenizer")}
TOKENIZER_FILE = re.compile(
    rf"(?:(?:{'|'.join(sum(TOKENIZER_FOLDERS.values(), ()))})/)?(?:[^/]+\.json|merges\.txt|spiece\.model)"
)
# a name alone means a model, a folder tiny-* of it, or a LoRA, a folder in its loras
BUILT_IN = Path(__file__).parents[1] / "assets"
FOLDERS = {"model": BUILT_IN, "lora": BUILT_IN / "loras"}
# of a LoRA that is published as a folder
LORA_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")


def resolve(name: str | os.PathLike[str], wanted: str = "model", without: Collection[str] = ()) -> Path:
    """An existing path, the folder of what is built in, or where the hub's cache has what a repository `org/name`, or a file of it, is read from.

    What lacks there is fetched by huggingface_hub, which goes on with interrupted downloads.

    - name: a path, a built-in model such as `tiny-flux` or LoRA, `tiny-style`, `org/name`, or `org/name/file.safetensors`. A path whose first folder exists here, or a name with the
      ending of a file, is never asked for at the hub.
    - wanted: "model" (a pipeline's folders, or one file), "part" (one network), "lora", or "tokenizers".
    - without: folders of a pipeline that are not fetched, as something else stands in for them.

    Raises CheckpointError when there is neither, which names the files that lack, and for a repository in which nothing, or more
    than one file, could be meant.
    """
    text = os.fspath(name)
    path = Path(text).expanduser()
    if text and os.path.lexists(path):
        return path
    if text in built_in(wanted):
        return FOLDERS[wanted] / text
    found = HUB_ID.fullmatch(text)
    if found is None or ".." in path.parts or (found[2] is None and path.suffix.lower() in FILES):
        raise CheckpointError(
            f"{quoted(text)} does not exist and is not a hub id such as black-forest-labs/FLUX.1-schnell or ORG/NAME/FILE.safetensors"
            + (f"; built in are {', '.join(built_in(wanted))}" if wanted in FOLDERS else "")
        )
    if os.path.lexists(path.parts[0]):
        raise CheckpointError(
            f"{quoted(text)} does not exist; it is not a hub id, as the folder {quoted(path.parts[0])} is here"
        )
    repository = _Repository(found[1])
    if found[2]:
        return repository.fetch([found[2], *repository.beside(found[2], wanted)]) / found[2]
    if wanted == "tokenizers":
        return repository.fetch(filter(TOKENIZER_FILE.fullmatch, repository.names))
    files = [name for name in LORA_NAMES if name in repository.names][:1] if wanted == "lora" else []
    if not files and ("model_index.json" in repository.names or any(map(repository.weights_in, SUBFOLDERS))):
        if wanted != "model":
            raise CheckpointError(
                f"{quoted(text)} is a whole pipeline; give one file of it, such as {text}/vae/{SINGLE_NAMES[0]}"
            )
        return repository.pipeline(without)
    files = files or repository.network("", LORA_NAMES[1] if wanted == "lora" else SINGLE_NAMES[0])
    folder = repository.fetch([*files, *repository.beside(files[0], wanted)])
    return folder / files[0] if len(files) == 1 else folder


def built_in(wanted: str = "model") -> list[str]:
    """The names of the models, or of the LoRAs, that ship with the package."""
    return sorted(path.name for path in FOLDERS[wanted].glob("tiny-*")) if wanted in FOLDERS else []


def check_pipeline(where: object, index: dict[str, Any]) -> None:
    """Raises CheckpointError for a model_index.json of another model than Flux, SD 3 and SDXL."""
    kind = index.get("_class_name")
    if not isinstance(kind, str) or not kind.startswith(PIPELINES):
        raise CheckpointError(
            f"{quoted(where)} is the folder of a {quoted(kind, 60)[1:-1] if kind else 'pipeline without a name'}, not of Flux, SD 3 "
            "or SDXL, and is not loaded"
        )


class _Repository:
    """A repository: the names of its files, or where the hub does not answer, of those that the cache holds."""

    def __init__(self, id: str) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.constants import HF_HUB_CACHE

        self.id, self.problem = id, ""
        try:
            self.names = sorted(file.rfilename for file in HfApi().model_info(id).siblings or ())
        except Exception as error:  # the hub's errors have no common base and their texts hold links and tokens' hints
            self.problem = _problem(error)
            self.names = self._cached()[1]
            if not self.names:
                raise CheckpointError(
                    f"{quoted(id)} is not a path here, {self.problem}, and the cache {quoted(HF_HUB_CACHE)} holds nothing of it"
                ) from None

    def fetch(self, files: Iterable[str]) -> Path:
        """The cached folder, after the files were fetched; raises CheckpointError, which names what lacks."""
        from huggingface_hub import snapshot_download

        files = list(files)
        if files and not self.problem:
            try:
                snapshot_download(self.id, allow_patterns=[escape(file) for file in files])
            except Exception as error:
                self.problem = _problem(error)
        folder, held = self._cached()
        missing = [file for file in files if file not in held]
        if folder is None or missing:
            lacks = f"lacks {quoted(', '.join(missing), 150)}" if missing else "holds nothing of it"
            raise CheckpointError(
                f"{quoted(self.id)}: {self.problem or 'the hub did not send all'}, and the cache {lacks}"
            )
        return folder

    def pipeline(self, without: Collection[str]) -> Path:
        """The folders that model_index.json names, or that hold weights where there is none, and the tokenizers'."""
        folders = [folder for folder in SUBFOLDERS if self.weights_in(folder)]
        if "model_index.json" in self.names:
            index = read_json_file(self.fetch(["model_index.json"]) / "model_index.json")
            check_pipeline(self.id, index)
            folders = [folder for folder in SUBFOLDERS if isinstance(index.get(folder), list) and any(index[folder])]
        small = ("model_index.json", "scheduler/scheduler_config.json")
        files = [n for n in self.names if n in small or "/" in n and TOKENIZER_FILE.fullmatch(n)]
        for folder in folders:
            if folder not in without:
                weights = self.network(f"{folder}/", SINGLE_NAMES["text_encoder" in folder])
                files += [*weights, *self.beside(weights[0], "model")]
        return self.fetch(files)

    def network(self, prefix: str, usual: str) -> list[str]:
        """The weights of a network as `open_checkpoint` chooses them, an index and its shards, or one file.

        Where neither is cached and the hub does not answer, the file that there `usual`ly is.
        """
        inside = self._inside(prefix)
        place = Path(self.id) / prefix
        index, single = choose_index(place, inside), choose_single(inside)
        if index:
            shards = sorted(set(read_index(self.fetch([prefix + index]) / prefix / index).values()))
            if not single or set(shards) <= set(inside):
                return [prefix + name for name in (index, *shards)]
        if single:
            return [prefix + single]
        if not self.problem:
            refuse_folder(place, inside)
        return [prefix + usual]

    def beside(self, file: str, wanted: str) -> list[str]:
        """The configuration that is read with a file."""
        folder, _, name = file.rpartition("/")
        prefix = f"{folder}/" if folder else ""
        inside = self._inside(prefix)
        known = name in (*SINGLE_NAMES, *HALF_SINGLE_NAMES, choose_single(inside), choose_index(Path(self.id), inside))
        found = ["config.json"] * known + ["adapter_config.json"] * (wanted == "lora")
        return [prefix + name for name in found if name in inside]

    def weights_in(self, folder: str) -> bool:
        return any(".safetensors" in name for name in self._inside(f"{folder}/"))

    def _inside(self, prefix: str) -> list[str]:
        inside = (name.removeprefix(prefix) for name in self.names if name.startswith(prefix))
        return [name for name in inside if "/" not in name]

    def _cached(self) -> tuple[Path | None, list[str]]:
        """Where the cache has the repository, and the files that are there; a link to what is not there is none."""
        from huggingface_hub import snapshot_download

        try:  # a pattern of no file: huggingface_hub 2 would refuse a copy in part
            folder = Path(snapshot_download(self.id, local_files_only=True, allow_patterns=["/"]))
        except Exception:
            return None, []
        return folder, sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def _problem(error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "its licence must be accepted on its page at the hub first, and HF_TOKEN set"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub knows no such repository (or it is private: set HF_TOKEN)"
    if isinstance(error, OfflineModeIsEnabled):
        return "the hub is not asked (HF_HUB_OFFLINE is set)"
    return f"the hub could not be reached ({type(error).__name__})"
