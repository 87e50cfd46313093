"""Everything that eridiff raises on bad input: one sentence that says what is wrong, where, and what to do."""

import os
import re

LONGEST = 300  # characters of an error


def quoted(name: object, limit: int = 90) -> str:
    """A name or a path as an error shows it: in quotes, on one line, without its middle where it is long."""
    text = repr(os.fspath(name) if isinstance(name, os.PathLike) else name)
    return text if len(text) <= limit else f"{text[: limit // 3]}...{text[-(limit - limit // 3 - 3) :]}"


class EridiffError(Exception):
    """Base of all errors of this package; its text is one sentence for a person, on one line of at most 300 characters.

    What a file says may get into it by many ways: characters that do not print are escaped, and what is too long loses words in its middle.
    """

    def __init__(self, text: str = "") -> None:
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
        super().__init__(line if len(line) <= LONGEST else _without_middle(line))


def _without_middle(line: str) -> str:
    """The beginning and the end of a line, each cut at a word where one is near."""
    head = re.sub(r" \S{0,40}$", "", line[: LONGEST - 105])
    tail = re.sub(r"^\S{0,40} ", "", line[-100:])
    return f"{head} ... {tail}"


class CheckpointError(EridiffError):
    """A model file or folder, a tokenizer included, is damaged, incomplete, or of a kind that cannot be loaded."""


class ConfigError(EridiffError):
    """A setting has an unknown name, a wrong type or an impossible value."""


class MemoryPlanError(EridiffError):
    """What is asked does not fit the memory that there is."""


class LoraError(EridiffError):
    """A LoRA file is damaged, of an unknown or unsupported format, or does not fit the network; or a LoRA is misused."""


class TraceError(EridiffError):
    """Two recordings cannot be compared."""


class TrainingError(EridiffError):
    """Sampling inside a training run changed the run, failed, or took too long."""
