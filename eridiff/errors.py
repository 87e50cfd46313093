"""Everything that eridiff raises on bad input: one sentence that says what is wrong, where, and what to do."""

import os


def quoted(name: object, limit: int = 90) -> str:
    """A name or a path as an error shows it: in quotes, on one line, without its middle where it is long."""
    text = repr(os.fspath(name) if isinstance(name, os.PathLike) else name)
    return text if len(text) <= limit else f"{text[: limit // 3]}...{text[-(limit - limit // 3 - 3) :]}"


class EridiffError(Exception):
    """Base of all errors of this package; its text is one sentence for a person."""


class CheckpointError(EridiffError):
    """A model file or folder, a tokenizer included, is damaged, incomplete, or of a kind that cannot be loaded."""


class ConfigError(EridiffError):
    """A setting has an unknown name, a wrong type or an impossible value."""


class LoraError(EridiffError):
    """A LoRA file is damaged, of an unknown or unsupported format, or does not fit the network; or a LoRA is misused."""


class TraceError(EridiffError):
    """Two recordings cannot be compared."""


class TrainingError(EridiffError):
    """Sampling inside a training run changed the run, failed, or took too long."""
