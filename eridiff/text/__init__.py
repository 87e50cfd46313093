"""A prompt becomes tensors: tokenizers, CLIP and T5, by transformers' classes."""

from dataclasses import dataclass

from torch import Tensor


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
