"""What is loaded: the modules that images are generated with, and what is known of them."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eridiff.adopt import Adopted
from eridiff.blocks import unwrapped
from eridiff.inference.family import Encoder, Family
from eridiff.inference.handed_in import check_family, check_sharding, own_autoencoder, own_encoders
from eridiff.inference.latents import device_of
from eridiff.inference.lora import LoraHandle, attached
from eridiff.inference.words import Words
from eridiff.lora.attach import Scale
from eridiff.lora.load import Lora
from eridiff.text.encoders import T5Encoder

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Model:
    """Made whole by `Model.of`, from modules of any origin; files are read by `loading.read`."""

    kind: type[Family]
    network: Any
    autoencoder: Any  # eridiff's Autoencoder; None where nothing is decoded
    encoders: dict[str, Encoder]  # by component; those that are loaded
    variant: str
    sampling: Any  # the variant's Defaults, or what replaces them
    why: str  # it is this variant
    source: dict[str, Any] = field(default_factory=dict)  # which files, for the record
    words: Words | None = None  # that it knows, if its file lists them
    adopted: tuple[Adopted, ...] = ()  # the network and the autoencoder of a trainer
    loras: list[LoraHandle] = field(default_factory=list)
    # of any variant's defaults, what a pipeline says in their place
    followed: dict[str, Any] = field(default_factory=dict)
    # what it was before control LoRAs, by configuration
    narrower: dict[Any, tuple[str, Any, str]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, kind: type[Family], network: nn.Module, autoencoder: nn.Module | None, encoders: Mapping[str, Any], *,
        name: str = "", variant: str | None = None, adopted: tuple[Adopted, ...] = (),
    ) -> "Model":  # fmt: skip
        """A model of these modules, out of the wrappers of a trainer.

        - name: what the variant is recognised by among those of equal sizes.
        - variant: the one that is asked for.

        Raises ConfigError for modules of another family or kind, and for what does not fit together.
        """
        check_family(kind, network)
        check_sharding(network)
        own: Any = unwrapped(network)
        codec = None if autoencoder is None else own_autoencoder(kind, autoencoder)
        if codec is not None:
            kind.check_latents(own.config, codec.config)
        chosen, why = kind.choose_variant(own.config, name, variant)
        log.info("the network is used as %s (%s)", chosen, why)
        return cls(kind, own, codec, own_encoders(kind, encoders), chosen, kind.variants[chosen], why, adopted=adopted)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return device_of(self.network)

    def modules(self) -> dict[str, nn.Module]:
        """The network and the text encoders by component: what a LoRA can change."""
        return {self.kind.family: self.network} | {name: encoder.module for name, encoder in self.encoders.items()}

    def sample_as(self, variant: str, sampling: Any = None, why: str = "as asked") -> None:
        """Take a variant, and its defaults or others in their place.

        T5 gives as many tokens as the defaults say, unless it was passed with another number.
        """
        before, t5 = getattr(self.sampling, "text_length", None), self.encoders.get("t5")
        self.sampling = replace(self.kind.variants[variant], **self.followed) if sampling is None else sampling
        self.variant, self.why = variant, why
        if isinstance(t5, T5Encoder) and t5.length == before:
            t5.length = self.sampling.text_length

    def follow(self, **said: Any) -> None:
        """Take over what a pipeline says in place of the variant's defaults."""
        self.followed |= said
        self.sampling = replace(self.sampling, **said)

    def apply_lora(
        self, weights: str | os.PathLike[str] | Lora, scale: Scale | Mapping[str, Scale] | None = None, *,
        allow_partial: bool = False, part: str | None = None, dora: str = "peft",
    ) -> LoraHandle:  # fmt: skip
        """As `DiffusionInference.apply_lora`."""
        config = self.network.config
        handle = attached(
            self.modules(), weights, scale, allow_partial=allow_partial, part=part, dora=dora, taken_away=self._without
        )
        if self.network.config != config:  # a control LoRA: the network takes an image more
            self.narrower[config] = self.variant, self.sampling, self.why
            chosen, why = self.kind.choose_variant(self.network.config, Path(handle.path or "").stem)
            self.sample_as(chosen, why=why)
        self.loras.append(handle)
        return handle

    def _without(self, handle: LoraHandle) -> None:
        """Forget a LoRA; a network that is narrow again is sampled as before."""
        if handle in self.loras:
            self.loras.remove(handle)
            before = self.narrower.pop(self.network.config, None)
            if before is not None:
                self.sample_as(*before)
