"""The words that a small model was trained on, and what becomes of a prompt with others.

A model trained on a few words generates mush for the rest. Its network's file can list them in the metadata
`eridiff.words`: a JSON object of four lists of texts, `nouns`, `backgrounds`, `sizes` and `function_words`.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields

from eridiff.errors import ConfigError
from eridiff.request import Text
from eridiff.weights.detect import Component

log = logging.getLogger(__name__)
LIST = "eridiff sample --list"
MARKS = ".,;:!?"


@dataclass(frozen=True)
class Words:
    """A prompt is "a [SIZE] NOUN BACKGROUND"; a background is a phrase such as "on the sea"."""

    nouns: tuple[str, ...]
    backgrounds: tuple[str, ...]
    sizes: tuple[str, ...]
    function_words: tuple[str, ...]

    @property
    def pattern(self) -> str:
        return f"a [{'|'.join(self.sizes)}] NOUN BACKGROUND"

    def check(self, prompts: Sequence[Text], *, refuse: bool = True) -> None:
        """Warn of each distinct prompt with unknown words, naming them. The empty prompt is allowed.

        Raises ConfigError for a prompt without a known noun, unless refuse is False.
        """
        known = {word for group in vars(self).values() for phrase in group for word in phrase.split()}
        texts = [text for p in prompts for text in ([p] if isinstance(p, str) else p.values())]
        for text in filter(split, dict.fromkeys(texts)):
            words = split(text)
            readable = {word.strip(MARKS) for word in words}
            if refuse and not any(set(noun.split()) <= readable for noun in self.nouns):
                raise ConfigError(
                    f"{text!r} names none of the nouns that this model knows ({', '.join(self.nouns[:3])}, ...); {LIST} shows "
                    "them all, and --any-prompt, or inference.words = None, ends this check"
                )
            unknown = [repr(word) for word in dict.fromkeys(words) if word not in known]
            found = [f"does not know {', '.join(unknown)}"] if unknown else []
            if not any(background in " ".join(words) for background in self.backgrounds):
                found.append("finds no background that it knows")
            if found:
                log.warning(
                    "this model %s in %r; write prompts as '%s' with the words that %s shows",
                    " and ".join(found), text, self.pattern, LIST,
                )  # fmt: skip


def split(text: str) -> list[str]:
    """The words of a prompt. The model reads capitals, and marks at the end of the text; other signs hide a word from it."""
    return text.lower().rstrip(MARKS + " \n").split()


def read_words(component: Component) -> Words | None:
    """What the file of a network says; None where it has none. Raises ConfigError for a list that is not one."""
    text = component.checkpoint.metadata.get("eridiff.words")
    if text is None:
        return None
    try:
        given = json.loads(text)
        if not all(group and isinstance(group, list) and {*map(type, group)} == {str} for group in given.values()):
            raise ValueError
        return Words(**{name: tuple(group) for name, group in given.items()})
    except (ValueError, TypeError, AttributeError):
        names = ", ".join(field.name for field in fields(Words))
        raise ConfigError(
            f"{component.checkpoint.path}: the metadata eridiff.words must be a JSON object of the filled lists {names}"
        ) from None
