"""One component on the device at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block the module's parameters and buffers are on `device`; afterwards they are what they were.

    The tensors left behind are kept, not copied back: memory-mapped weights stay mapped, and nothing may train meanwhile.
    """
    tensors = [*module.parameters(), *module.buffers()]
    homes = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = home
