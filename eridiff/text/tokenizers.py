"""Tokenizers from files and folders, checked before they are used: a damaged one gives other ids silently.

CLIP's published merges ship with the package (OpenAI, MIT); a T5 tokenizer comes from a file, a folder or the hub cache.
"""

import gzip
import importlib.util
import json
import logging
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from eridiff.errors import CheckpointError, quoted
from eridiff.text.emphasis import Pieces

log = logging.getLogger(__name__)
Token = tuple[int, float]  # its id and its weight in the prompt
ASSETS = Path(__file__).parents[1] / "assets"
SAMPLE = "a photo of a cat"
CLIP_TOKENS, CLIP_SAMPLE = 49408, [49406, 320, 1125, 539, 320, 2368, 49407]
T5_TOKENS, T5_SAMPLE = 32100, [3, 9, 1202, 13, 3, 9, 1712, 1]
CLIP_ENDS = ("<|startoftext|>", "<|endoftext|>")
T5_NAMES = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
# hub repositories whose cached copies hold the T5 tokenizer of every published Flux and SD3
T5_CACHED = [
    ("black-forest-labs/FLUX.1-dev", "tokenizer_2/tokenizer.json"),
    ("black-forest-labs/FLUX.1-schnell", "tokenizer_2/tokenizer.json"),
    ("stabilityai/stable-diffusion-3.5-large", "tokenizer_3/tokenizer.json"),
    ("stabilityai/stable-diffusion-3.5-medium", "tokenizer_3/tokenizer.json"),
]


def clip_tokenizer(folder: Path | None = None) -> Any:
    """CLIP's tokenizer from a folder, or the published one that ships with the package.

    The folder holds vocab.json and merges.txt, or, as transformers 5 writes it, tokenizer.json alone. Raises CheckpointError
    for a folder that is incomplete or whose vocabulary and merges do not belong together.
    """
    if folder is None:
        return published_clip_tokenizer()
    missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    if missing and not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{quoted(folder)} is not a CLIP tokenizer: it lacks {missing[0]}; vocab.json and merges.txt are needed, or "
            "tokenizer.json"
        )
    _check_merges(folder, "tokenizer.json" if missing else "vocab.json")
    tokenizer = _from_folder(folder)
    if len(tokenizer) == CLIP_TOKENS and tokenizer(SAMPLE).input_ids != CLIP_SAMPLE:
        raise CheckpointError(
            f"{quoted(folder)} has the size of the published CLIP tokenizer but gives other ids; download it again"
        )
    return tokenizer


@cache
def published_clip_tokenizer() -> Any:
    """The tokenizer of OpenAI's CLIP, from the merges in the package."""
    merges = gzip.decompress((ASSETS / "clip_merges.txt.gz").read_bytes()).decode().split("\n")
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = {token: i for i, token in enumerate(clip_vocabulary(merges))}
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        lines = "\n".join(["#version: 0.2", *merges, ""])
        (Path(folder) / "merges.txt").write_text(lines, encoding="utf-8")
        return _from_folder(Path(folder))


def clip_vocabulary(merges: list[str]) -> list[str]:
    """Tokens in the order of their ids: 256 bytes, the same at a word's end, one for each merge, begin and end."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    joined = [merge.replace(" ", "") for merge in merges]
    return [*characters, *(c + "</w>" for c in characters), *joined, *CLIP_ENDS]


def _from_folder(folder: Path) -> Any:
    from transformers import CLIPTokenizerFast

    try:
        tokenizer = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
        tokenizer("")  # a setting of a wrong type is noticed here
        return tokenizer
    except Exception as error:  # the Rust library raises bare Exception
        raise CheckpointError(f"'{folder}' holds a CLIP tokenizer that cannot be read ({_line(error)})") from None


def _vocabulary_and_merges(folder: Path, file: str) -> tuple[dict[str, int], set[str]]:
    """Token -> id, and what the merges make."""
    document = json.loads((folder / file).read_text(encoding="utf-8"))
    if file == "tokenizer.json":
        model = document["model"]
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        added = {entry["content"]: entry["id"] for entry in document.get("added_tokens", ())}
        return {**model["vocab"], **added}, {"".join(pair) for pair in pairs}
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    return document, {line.replace(" ", "", 1) for line in lines if line and not line.startswith("#version")}


def _check_merges(folder: Path, file: str) -> None:
    """Every token longer than one character comes from a merge, and every id stands once."""
    try:
        vocabulary, made = _vocabulary_and_merges(folder, file)
        ids = sorted(vocabulary.values())
        whole = {t for t in vocabulary if len(t.removesuffix("</w>")) > 1 and t not in CLIP_ENDS}
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        names = "tokenizer.json" if file == "tokenizer.json" else "vocab.json or merges.txt"
        raise CheckpointError(f"{quoted(folder)} holds a {names} that cannot be read ({_line(error)})") from None
    if ids != list(range(len(ids))):
        raise CheckpointError(
            f"{quoted(folder / file)} does not number its {len(ids)} tokens from 0 without a hole; download it again"
        )
    if any(end not in vocabulary for end in CLIP_ENDS):
        raise CheckpointError(f"{quoted(folder / file)} lacks {' or '.join(CLIP_ENDS)}: it is not a CLIP tokenizer")
    if made != whole:
        raise CheckpointError(
            f"{quoted(folder)} holds a vocabulary and merges that do not belong together: {len(whole - made)} tokens of {file} "
            f"have no merge and {len(made - whole)} merges have no token; download them again"
        )


def t5_tokenizer(path: Path | None = None) -> Any:
    """T5's tokenizer from a tokenizer.json, a folder that holds one (or a spiece.model), or the hub cache.

    Raises CheckpointError for a missing or damaged file; the sentence says what to put where.
    """
    found = path if path is not None else _cached_t5()
    if found is None:
        raise CheckpointError(
            "no T5 tokenizer was found: pass --tokenizers FOLDER with tokenizer_2/tokenizer.json (of FLUX.1-dev, for example), or "
            "'tokenizers: {t5: PATH}' in the model section, or place it beside the model as 'tokenizer_2'"
        )
    file = found / "tokenizer.json" if found.is_dir() else found
    if not file.exists() and (found / "spiece.model").exists():
        return _from_sentencepiece(found)
    if not file.is_file():
        raise CheckpointError(f"'{found}' is not a T5 tokenizer: there is no tokenizer.json")
    return _checked_t5(file, _read_t5(file))


def _read_t5(file: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), **T5_NAMES)
        tokenizer("")
        return tokenizer
    except Exception as error:  # the Rust library raises bare Exception
        raise CheckpointError(f"'{file}' cannot be read as a tokenizer ({_line(error)}); download it again") from None


def _from_sentencepiece(folder: Path) -> Any:
    missing = [
        name for name in ("sentencepiece", "google.protobuf") if importlib.util.find_spec(name.split(".")[0]) is None
    ]
    if missing:
        raise CheckpointError(
            f"'{folder}' holds only spiece.model, which needs the packages sentencepiece and protobuf; install them or "
            "add tokenizer.json"
        )
    from transformers import T5TokenizerFast

    return _checked_t5(folder / "spiece.model", T5TokenizerFast.from_pretrained(folder, local_files_only=True))


def _checked_t5(file: Path, tokenizer: Any) -> Any:
    vocabulary = tokenizer.get_vocab()
    ends = (vocabulary.get("<pad>"), vocabulary.get("</s>"))
    if ends != (0, 1) or tokenizer("").input_ids != [1]:
        raise CheckpointError(
            f"'{file}' is not a T5 tokenizer: <pad> and </s> must be the ids 0 and 1 and end every prompt"
        )
    if len(tokenizer) == T5_TOKENS and tokenizer(SAMPLE).input_ids != T5_SAMPLE:
        raise CheckpointError(
            f"'{file}' has the size of the published T5 tokenizer but gives other ids; download it again"
        )
    return tokenizer


def _cached_t5() -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for repository, name in T5_CACHED:
        found = try_to_load_from_cache(repository, name)
        if isinstance(found, str):
            log.info("T5 tokenizer from the hub cache of %s", repository)
            return Path(found)
    return None


def tokens_of(tokenizer: Any, prompt: Pieces) -> tuple[list[Token], list[Token], Token]:
    """What begins a prompt, its own tokens, each piece of text read for itself, and what ends it."""
    *begin, end = [(token, 1.0) for token in tokenizer("")["input_ids"]]
    own = [(token, weight) for text, weight in prompt for token in _ids(tokenizer, text)]
    return begin, own, end


def one_window(
    tokenizer: Any, prompt: Pieces, length: int, pad: int, name: str, whole_words: bool = False
) -> list[Token]:
    """Exactly `length` tokens; a longer prompt keeps its first tokens and the end, and a warning names the words cut.

    `name` is the encoder's, for the warning. `whole_words` keeps a word of fewer than 8 tokens whole or leaves it out, as
    the original of SD 3 does.
    """
    begin, own, end = tokens_of(tokenizer, prompt)
    room = length - len(begin) - 1
    if len(own) > room:
        text, words = "".join(text for text, _ in prompt), _words(tokenizer, prompt)
        cut = words[min(max(room, 0), len(words) - 1)]  # the word in which the cut falls
        log.warning(
            "%s takes %d tokens, the prompt has %d: cut from %r on", name, length, len(begin) + len(own) + 1,
            text[cut:].strip(),
        )  # fmt: skip
        if whole_words and words.count(cut) < 8 and words.index(cut) > 0:
            room = words.index(cut)
        own = own[: max(room, 0)]
    found = [*begin, *own, end]
    return found + [(pad, 1.0)] * (length - len(found))


def token_ids(tokenizer: Any, prompt: str, length: int, pad: int, name: str, whole_words: bool = False) -> list[int]:
    """The ids of `one_window` of a plain text."""
    return [token for token, _ in one_window(tokenizer, [(prompt, 1.0)], length, pad, name, whole_words)]


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Of a text without begin and end."""
    return list(tokenizer(text, add_special_tokens=False, truncation=False, padding=False, verbose=False)["input_ids"])


def _words(tokenizer: Any, prompt: Pieces) -> list[int]:
    """For each token of a prompt where its word begins. Words are read one by one: slow tokenizers tell no offsets."""
    found, start = [], 0
    for text, _ in prompt:
        words = [(start + word.start(), word.group()) for word in re.finditer(r"\S+", text)]
        found += [begin for begin, word in words for _ in _ids(tokenizer, word)]
        start += len(text)
    return found or [0]


def all_windows(tokenizer: Any, prompt: Pieces, length: int, pad: int, windows: int = 1) -> list[Token]:
    """The whole prompt in windows of `length` tokens, one after the other: begin, a part of it, end, padding.

    At least as many as asked for; the last ones are then empty.
    """
    begin, own, end = tokens_of(tokenizer, prompt)
    size = length - len(begin) - 1
    parts = [own[i : i + size] for i in range(0, max(len(own), windows * size, 1), size)]
    rows = [[*begin, *part, end] + [(pad, 1.0)] * (size - len(part)) for part in parts]
    return [token for row in rows for token in row]


def _line(error: BaseException) -> str:
    """An error's text on one line, without the sentence's own end."""
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
