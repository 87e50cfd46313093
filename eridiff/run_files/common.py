"""What the readers of all programs' files share: reading a text, the types of values, keys that are not read, random seeds."""

import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from eridiff.config import FOR_TRAINING, SAID
from eridiff.errors import ConfigError
from eridiff.files import kind_by_content
from eridiff.request import scalar

FAMILY_NAMES = {"flux": "Flux", "mmdit": "SD 3", "unet": "SDXL"}
DTYPES = {  # of all programs, in small letters -> eridiff's
    "bf16": "bfloat16", "bfloat16": "bfloat16", "bfloat_16": "bfloat16", "fp16": "float16", "float16": "float16",
    "float_16": "float16", "fp32": "float32", "float": "float32", "float32": "float32", "float_32": "float32",
}  # fmt: skip
NEUTRAL = (None, False, "", 0)  # values with which a setting that is not carried over changes nothing


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the block begin with the file's name."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_text(path: Path) -> str:
    """The text of a file; raises ConfigError, without the file's name, for one that cannot be read or holds something else."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = kind_by_content(path)
        if kind == "a PNG image":
            raise ConfigError("is an image; eridiff resample generates it again, --image begins from it") from None
        if kind is not None:
            raise ConfigError(f"is {kind}, not a configuration; --image begins from an image") from None
        raise ConfigError(f"is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except (FileNotFoundError, ValueError):  # a name with a NUL
        hint = "; pass a prompt with --prompt" if " " in path.name and not path.suffix else ""
        raise ConfigError(f"is not a file{hint}") from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from None


def named_file(name: str, folder: Path) -> Path:
    """A file that a configuration names: as seen from here, as its program does, else as seen from the configuration.

    Raises ConfigError where it is in neither place.
    """
    try:
        found = next((path for path in (Path(name), folder / name) if path.is_file()), None)
    except (OSError, ValueError):  # a name that no file can have
        found = None
    if found is None:
        raise ConfigError(f"{name}: is not a file")
    return found


def mapping(section: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A section of a file; nothing where it is not there."""
    value = section.get(name) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be a mapping, not {value!r}")
    return value


def value_of(section: Mapping[str, Any], key: str, kind: type, where: str = "") -> Any:
    """A value of the type wanted, or None where it is not there. Raises ConfigError."""
    value = section.get(key)
    return None if value is None else scalar(f"{where}{key}", value, kind)


def flag(section: Mapping[str, Any], key: str, where: str = "") -> bool:
    """Whether a key is true; ConfigError for what is neither true nor false."""
    return bool(value_of(section, key, bool, where))


def dtype_named(section: Mapping[str, Any], key: str, where: str = "", none: Sequence[str] = ()) -> str | None:
    """The dtype that a program's word means; `none` are its words for none in particular."""
    name = section.get(key)
    if name is None or name in none:
        return None
    if not isinstance(name, str) or name.lower() not in DTYPES:
        raise ConfigError(f"{where}{key} must be one of {', '.join((*DTYPES, *none))}, not {name!r}")
    return DTYPES[name.lower()]


def unread(
    section: Mapping[str, Any], known: Sequence[str], where: str, prefix: str = "", reasons: Mapping[str, str] | None = None
) -> dict[str, str]:  # fmt: skip
    """The keys of a trainer's section that are not read here, with the reason; ConfigError for one that is nearly one that is."""
    reasons, found = reasons or {}, {}
    for key, value in section.items():
        if key in known:
            continue
        near = None if key in reasons else get_close_matches(str(key), known, 1, 0.8)
        if near:
            raise ConfigError(f"'{key}' is not a key of {where}; did you mean '{near[0]}'?")
        if key not in reasons or value not in NEUTRAL:
            found[f"{prefix}{key}"] = reasons.get(key, FOR_TRAINING)
    return found


def trained(file: str, option: str = "--lora") -> str:
    """Why a key of a training has no effect, and where what it trains will be."""
    return f"{FOR_TRAINING}; what it trains is {file}, which {option} takes"


def settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of how a model is loaded and of its images by one name each, in the sections where eridiff has them."""
    own: dict[str, Any] = {"sample": {}}
    for name, value in given.items():
        if value is not None:
            (own["sample"] if name in SAID else own)[name] = value
    return own


def model_of(parts: Iterable[tuple[str, str | None]]) -> str | dict[str, str] | None:
    """A model by its parts' names and files, as `eridiff.load` takes it; parts without a file are left out."""
    given = {part: file for part, file in parts if file}
    return given["path"] if list(given) == ["path"] else given or None


def size(where: str, text: str) -> tuple[int, int]:
    """(width, height) of `1024x768`, or of `1024`, a square."""
    found = re.fullmatch(r"(\d{1,9})(?:[xX](\d{1,9}))?", text.strip())
    if found is None:
        raise ConfigError(f"{where} must be a size such as 1024x768 or 1024, not '{text}'")
    return int(found[1]), int(found[2] or found[1])


def with_random_seeds(section: dict[str, Any]) -> dict[str, Any]:
    """A section with a number for every seed of -1, which is random.

    With walk_seed the first is and the others follow; ai-toolkit goes on with 0, 1, 2.
    """
    if section.get("seed") == -1:
        section = section | {"seed": secrets.randbits(32)}
        if not section.get("walk_seed"):
            section["samples"] = [{"seed": secrets.randbits(32)} | entry for entry in section.get("samples", [])]
    entries = section.get("samples", [])
    chosen = [entry | ({"seed": secrets.randbits(32)} if entry.get("seed") == -1 else {}) for entry in entries]
    return section | ({"samples": chosen} if chosen else {})
