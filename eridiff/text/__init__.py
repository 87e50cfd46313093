"""A prompt becomes tensors: tokenizers, CLIP and T5, by transformers' classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eridiff.errors import ConfigError


@dataclass(frozen=True)
class Conditioning:
    """What a network is told of a prompt."""

    text: Tensor  # [B, T, D], one row a token
    pooled: Tensor  # [B, P], the whole prompt in one vector

    def __len__(self) -> int:
        return len(self.text)

    def repeat(self, count: int) -> "Conditioning":
        """A single prompt for `count` pictures."""
        return Conditioning(self.text.expand(count, -1, -1), self.pooled.expand(count, -1))

    def rows(self, rows: slice) -> "Conditioning":
        """Some of the prompts."""
        return Conditioning(self.text[rows], self.pooled[rows])

    def to(self, device: torch.device, dtype: torch.dtype) -> "Conditioning":
        """On a device, of a dtype."""
        return Conditioning(self.text.to(device, dtype), self.pooled.to(device, dtype))

    @staticmethod
    def joined(parts: Sequence["Conditioning"]) -> "Conditioning":
        """All prompts in one batch; raises ConfigError when they have different numbers of rows."""
        lengths = [part.text.shape[1] for part in parts]
        if len(set(lengths)) > 1:
            raise ConfigError(
                f"the prompt has {lengths[0]} rows of text and the negative one {lengths[1]}: encode them in one call"
            )
        return Conditioning(torch.cat([p.text for p in parts]), torch.cat([p.pooled for p in parts]))
