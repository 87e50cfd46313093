"""One component on the device at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block the module works with copies of its parameters and buffers on `device`, its own afterwards; LoRAs beside it come along.

    The module's tensors are left as they are and not copied back: memory-mapped weights stay mapped, an optimizer keeps
    its parameters, and tensors that several modules share are copied once.
    """
    branches = [branch for m in module.modules() for branch in vars(m).get("lora_branches", ())]  # no parts of a module
    own: list[tuple[dict[str, Any], str]] = [
        (table, name) for m in [*module.modules(), *branches] for table in (m._parameters, m._buffers) for name in table
    ]
    kept = [table[name] for table, name in own]
    copies: dict[int, Tensor] = {}
    try:
        for table, name in own:
            tensor = table[name]
            if tensor is not None:
                if id(tensor) not in copies:
                    moved = tensor.detach().to(device)
                    copy: Any = nn.Parameter(moved, False) if isinstance(tensor, nn.Parameter) else moved
                    copy.copy_of = getattr(tensor, "copy_of", tensor)  # a LoRA that is weighed meanwhile changes both
                    copies[id(tensor)] = copy
                table[name] = copies[id(tensor)]
        yield
    finally:
        for (table, name), tensor in zip(own, kept, strict=True):
            table[name] = tensor
