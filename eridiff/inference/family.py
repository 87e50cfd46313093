"""What sets a family of models apart, whatever is loaded: its variants, its text encoders, and the sizes that fit together."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from eridiff.errors import CheckpointError, ConfigError, EridiffError
from eridiff.text.encoders import ClipEncoder, T5Encoder
from eridiff.weights.detect import DESCRIPTIONS

Encoder = ClipEncoder | T5Encoder


class Family(ABC):
    """The part of an inference that needs no module: configurations in, facts out."""

    family: ClassVar[str]  # of the network, as in weights/detect.py
    variants: ClassVar[Mapping[str, Any]]  # published variant -> Defaults
    encoders: ClassVar[tuple[str, ...]]  # in the order of diffusers' text_encoder, text_encoder_2, text_encoder_3
    kinds: ClassVar[dict[str, "type[Family]"]] = {}  # by family

    def __init_subclass__(cls) -> None:
        if "family" in vars(cls):
            Family.kinds.setdefault(cls.family, cls)

    @staticmethod
    @abstractmethod
    def possible_variants(config: Any) -> list[str]:
        """The published variants that have a network's sizes."""

    @staticmethod
    @abstractmethod
    def variants_of_inputs(config: Any) -> list[str]:
        """The published variants that take the same inputs as a network; they may differ in other sizes."""

    @staticmethod
    @abstractmethod
    def needed(config: Any) -> tuple[str, ...]:
        """The text encoders without which a network of these sizes cannot generate."""

    @staticmethod
    @abstractmethod
    def text_encoders(modules: Mapping[str, Any], tokenizers: Mapping[str, Any], sampling: Any) -> dict[str, Encoder]:
        """The text encoders around transformers' modules, by component, as a variant's Defaults want them."""

    @staticmethod
    @abstractmethod
    def text_widths(configs: Mapping[str, Mapping[str, Any]]) -> tuple[int | None, int]:
        """Widths of the text rows, None if any will do, and of the pooled vector that encoders of these configurations give."""

    @staticmethod
    def told_widths(config: Any) -> tuple[int, int]:
        """Widths of the text rows and of the pooled vector that a network takes."""
        return config.text_width, config.pooled_width

    @staticmethod
    def channels_drawn(config: Any) -> int:
        """Of the latents that a network of these sizes generates."""
        return int(config.out_channels)

    @classmethod
    def title(cls) -> str:
        """The family's name in a sentence, without an article."""
        return DESCRIPTIONS[cls.family].split(" ", 1)[1]

    @classmethod
    def choose_variant(cls, config: Any, name: str, asked: str | None = None) -> tuple[str, str]:
        """The published variant whose defaults serve, and why: the one asked for, else by sizes, among equal ones by a name.

        Any variant that takes the same inputs may be asked for, as weights may be trained for another way of sampling.
        Raises ConfigError for one that takes other inputs.
        """
        if asked is not None:
            same = cls.variants_of_inputs(config)
            if asked not in same:
                raise ConfigError(f"the network takes the inputs of {' or '.join(same)}, not of {asked}")
            return asked, "as asked"
        possible = cls.possible_variants(config)
        words = set(re.split(r"[^a-z0-9]+", name.lower()))
        by_name = [v for v in possible if v.rsplit("-", 1)[-1] in words]
        why = "by its sizes"
        if len(possible) > 1:
            found = f"by the name '{name}'" if by_name else "as its name says no other"
            why = f"{found}; {', '.join(possible)} have the same sizes"
        return (by_name[::-1] or possible)[0], why

    @classmethod
    def check_widths(cls, network: Any, encoders: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises CheckpointError unless encoders of these configurations give what a network of that configuration takes."""
        given, told = cls.text_widths(encoders), cls.told_widths(network)
        if given not in (told, (None, told[1])):
            raise CheckpointError(
                f"the text encoders give {given[0]} features a token and {given[1]} pooled, {DESCRIPTIONS[cls.family]} takes "
                f"{' and '.join(map(str, told))}; they belong to another model"
            )

    @classmethod
    def check_latents(cls, network: Any, autoencoder: Any, error: type[EridiffError] = ConfigError) -> None:
        """Raises an error unless the latents of an autoencoder are those of a network, by their configurations."""
        wanted, given = cls.channels_drawn(network), autoencoder.latent_channels
        if wanted != given:
            raise error(
                f"the autoencoder has {given} latent channels, {DESCRIPTIONS[cls.family]} generates {wanted}: it belongs to "
                f"another family; give {cls.title()}'s own as vae"
            )
