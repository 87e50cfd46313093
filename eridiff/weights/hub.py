"""A path or a hub id becomes a path; paths that exist win."""

import os
import re
from pathlib import Path

from eridiff.errors import CheckpointError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
PATTERNS = ["model_index.json", "*/config.json", "*/*.safetensors", "*/*.safetensors.index.json",
            "tokenizer*/*.json", "tokenizer*/merges.txt", "scheduler/*.json"]  # fmt: skip


def resolve(name: str | os.PathLike[str]) -> Path:
    """An existing path, or the cached (else downloaded) folder of the hub repository `organisation/name`.

    Only configurations, safetensors and tokenizers are fetched. Raises CheckpointError when there is neither.
    """
    path = Path(name).expanduser()
    text = os.fspath(name)
    if os.path.lexists(path):
        return path
    if not HUB_ID.fullmatch(text):
        raise CheckpointError(f"'{text}' does not exist and is no hub id such as black-forest-labs/FLUX.1-schnell")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(text, allow_patterns=PATTERNS))
    except Exception as error:  # the hub's errors have no common base and their texts hold links and tokens' hints
        reason = "; its licence must be accepted on its page first" if "Gated" in type(error).__name__ else ""
        raise CheckpointError(
            f"'{text}' is no path here, and the hub repository of that name could not be had ({type(error).__name__}){reason}"
        ) from None
    if not any(folder.glob("*/*.safetensors")):
        raise CheckpointError(f"the cached copy of '{text}' in {folder} holds no weights; download it again")
    return folder
