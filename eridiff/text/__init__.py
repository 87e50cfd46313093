"""A prompt becomes tensors: tokenizers, CLIP and T5, by transformers' classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eridiff.errors import ConfigError


@dataclass(frozen=True)
class Conditioning:
    """What a network is given of a prompt."""

    text: Tensor  # [B, T, D], one row per token
    pooled: Tensor  # [B, P], the whole prompt in one vector
    mask: Tensor | None = None  # [B, T] bool, the rows that the network attends to; None is all, as published

    def __len__(self) -> int:
        return len(self.text)

    def __repr__(self) -> str:
        mask = "" if self.mask is None else f", mask {list(self.mask.shape)}"
        return f"Conditioning(text {list(self.text.shape)}, pooled {list(self.pooled.shape)}{mask}, {self.text.dtype})"

    def repeat(self, count: int) -> "Conditioning":
        """A single prompt for `count` images."""
        mask = None if self.mask is None else self.mask.expand(count, -1)
        return Conditioning(self.text.expand(count, -1, -1), self.pooled.expand(count, -1), mask)

    def rows(self, rows: slice) -> "Conditioning":
        """Some of the prompts."""
        return Conditioning(self.text[rows], self.pooled[rows], None if self.mask is None else self.mask[rows])

    def to(self, device: torch.device, dtype: torch.dtype) -> "Conditioning":
        """On a device, of a dtype."""
        mask = None if self.mask is None else self.mask.to(device)
        return Conditioning(self.text.to(device, dtype), self.pooled.to(device, dtype), mask)

    @staticmethod
    def joined(parts: Sequence["Conditioning"]) -> "Conditioning":
        """All prompts in one batch; raises ConfigError when they have different numbers of rows."""
        lengths = [part.text.shape[1] for part in parts]
        if len(set(lengths)) > 1:
            raise ConfigError(
                f"the prompt has {lengths[0]} rows of text and the negative one {lengths[1]}: encode them in one call"
            )
        masks = [p.mask for p in parts if p.mask is not None]
        if masks and len(masks) < len(parts):
            raise ConfigError(
                "the prompt or the negative one has a mask and the other has none: encode them in one call"
            )
        text, pooled = (torch.cat([getattr(p, name) for p in parts]) for name in ("text", "pooled"))
        return Conditioning(text, pooled, torch.cat(masks) if masks else None)
