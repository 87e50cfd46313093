"""What a training run is made of, as a mapping from names to digests and values: two of them name what changed."""

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eridiff.blocks import members, unwrapped
from eridiff.training.restore import CHECKPOINTING, FLAGS, autocast_types, stored


def digest(tensor: Tensor) -> str:
    """BLAKE2 of a tensor's bytes, shape and dtype."""
    found = hashlib.blake2b(digest_size=16)
    for part in stored(tensor.detach()):
        found.update(f"{tuple(part.shape)} {part.dtype}".encode())
        if not part.is_meta:
            found.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def fingerprint(
    modules: Mapping[str, nn.Module], optimizer: Any = None, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """name -> digest or value, of everything that `undisturbed` promises to keep, and of the optimizer's state."""
    return {**_of_modules(modules), **_of_optimizer(optimizer), **_of_process(device)}


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The names whose values differ, or that only one of both has."""
    return [name for name in {**before, **after} if before.get(name, "") != after.get(name, "")]


def _of_modules(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    digests: dict[int, str] = {}  # of tensors that several modules share, once
    for name, module in members({top: unwrapped(m) for top, m in modules.items()}).items():
        found[f"training mode of {name}"] = module.training
        for attribute in CHECKPOINTING:
            if attribute in vars(module):
                found[f"{attribute} of {name}"] = id(vars(module)[attribute])
        plain = vars(module)  # the scale of a LoRA, a table of positions
        for kind, table in (("parameter", module._parameters), ("buffer", module._buffers), ("tensor", plain)):
            for short, tensor in table.items():
                if not isinstance(tensor, Tensor):
                    continue
                own = f"{name}.{short}"
                if id(tensor) not in digests:
                    digests[id(tensor)] = digest(tensor)
                found[f"{kind} {own}"] = id(tensor), digests[id(tensor)], str(tensor.device)
                if tensor.is_leaf:
                    found[f"requires_grad of {own}"] = tensor.requires_grad
                    found[f"gradient of {own}"] = None if tensor.grad is None else digest(tensor.grad)
    return found


def _of_optimizer(optimizer: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[name] = digest(value)
        elif isinstance(value, Mapping):
            for key, part in value.items():
                walk(f"{name} {key}", part)
        elif isinstance(value, list | tuple):
            for i, part in enumerate(value):
                walk(f"{name} {i}", part)
        else:
            found[name] = repr(value)

    if optimizer is not None:
        walk("optimizer", optimizer.state_dict())
        inner = getattr(optimizer, "optimizer", optimizer)
        found["mode of the optimizer"] = getattr(inner, "train_mode", None)  # of a schedule-free wrapper
    return found


def _of_process(device: torch.device | str) -> dict[str, Any]:
    states = {"the CPU": torch.get_rng_state()}
    if torch.cuda.is_initialized() or "cuda" in str(device):
        states |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    legacy = np.random.get_state()
    return {
        **{f"torch's random state on {name}": digest(state) for name, state in states.items()},
        "Python's random state": random.getstate(),
        "NumPy's random state": [part.tolist() if isinstance(part, np.ndarray) else part for part in legacy],
        "grad mode": torch.is_grad_enabled(),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        **{
            f"autocast on {kind}": (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in autocast_types(device)
        },
        **{f"flag {name}": read() for name, (read, _) in FLAGS.items()},
    }
