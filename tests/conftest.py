"""Fixtures of several test files, and what every test must leave as it was."""

import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

from eridiff.training.restore import FLAGS

settings.register_profile("eridiff", deadline=None)  # a busy machine is not a mistake
settings.load_profile("eridiff")

everywhere = torch.nn.modules.module
WRITTEN = ("PYTEST_", "_TORCH", "TRITON_")  # by pytest and inductor themselves


def shared() -> dict[str, Any]:
    """What all tests of a process share, read in less than 0.1 ms."""
    root, own = logging.getLogger(), logging.getLogger("eridiff")
    found: dict[str, Any] = {
        "the environment": {(n, value) for n, value in os.environ.items() if not n.startswith(WRITTEN)},
        "the working folder": os.getcwd(),
        "sys.path": [folder for folder in sys.path if "setuptools" not in folder],  # which adds one on its import
        "sys.argv": sys.argv.copy(),
        "loggers": [(log.level, log.disabled, log.propagate, log.handlers.copy()) for log in (root, own)],
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "the default dtype and device": (torch.get_default_dtype(), torch.get_default_device()),
        "a process group": torch.distributed.is_initialized(),
        "hooks on all modules": {
            name: list(value or ()) for name, value in vars(everywhere).items() if name.startswith("_global_")
        },
        **{name: read() for name, (read, _) in FLAGS.items()},
    }
    for name in ("torch._dynamo.config", "torch._inductor.config"):
        if name in sys.modules:
            options = sys.modules[name]
            found[name] = options.get_hash(), [option for option, entry in options._config.items() if entry.hide]
    return found


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """A test that changes what all share restores it: otherwise a later test on the same worker fails, or passes, by its order."""
    before = shared()
    yield
    after = shared()
    left = {name: (value, after[name]) for name, value in before.items() if after[name] != value}
    if environment := left.get("the environment"):
        left["the environment"] = sorted(environment[0] ^ environment[1])
    assert not left


@pytest.fixture(params=["flux", "sd3", "sdxl"])
def family(request: pytest.FixtureRequest) -> Any:
    """A small network as a trainer holds it, by its family."""
    from tests.trainers import FAMILIES  # not before: it imports diffusers

    torch.manual_seed(0)
    return FAMILIES[request.param]
