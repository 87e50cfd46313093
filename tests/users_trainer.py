"""What README's training loop takes for granted: somebody's pipeline of diffusers, data and loss, small enough for a test."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tests.test_from_diffusers import flux_pipeline


def trainer() -> tuple[Any, Iterable[int], Callable[[Any, int], Tensor]]:
    """A new pipeline, batches, and the loss of a transformer on a batch."""
    pipe = flux_pipeline()
    with torch.no_grad():
        text, pooled, text_ids = pipe.encode_prompt("a photo of a cat", None)

    def training_loss(transformer: Any, batch: int) -> Tensor:
        tokens, times, ids = (t.to(text.device) for t in (torch.randn(1, 4, 64), torch.rand(1), torch.zeros(4, 3)))
        return transformer(tokens, text, pooled, times, ids, text_ids, times).sample.square().mean()

    return pipe, range(2), training_loss
