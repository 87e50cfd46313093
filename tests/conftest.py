"""Fixtures of several test files."""

from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("eridiff", deadline=None)  # a busy machine is not a mistake
settings.load_profile("eridiff")


@pytest.fixture(params=["flux", "sd3", "sdxl"])
def family(request: pytest.FixtureRequest) -> Any:
    """A small network as a trainer holds it, by its family."""
    import torch

    from tests.trainers import FAMILIES  # not before: it imports diffusers

    torch.manual_seed(0)
    return FAMILIES[request.param]
