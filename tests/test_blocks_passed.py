"""What acts on a network from outside says in one sentence what it was given in its place."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import eridiff
from eridiff.block_cache import BlockCache
from eridiff.blocks import checkpoint_blocks, compile_blocks
from eridiff.errors import ConfigError
from eridiff.float8 import use_float8
from eridiff.graphs import graph_steps
from eridiff.onednn import use_onednn
from tests import tiny


def checkpointed(network: Any) -> None:
    with checkpoint_blocks(network):
        pass


ACTS: dict[str, Callable[[Any], Any]] = {
    "float8": use_float8, "onednn": use_onednn, "graphs": graph_steps, "compile": compile_blocks,
    "checkpoint": checkpointed, "block cache": lambda network: BlockCache(network, 0.1),
}  # fmt: skip


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_a_network_is_needed_and_a_model_has_one(act: Callable[[Any], Any]) -> None:
    for given in (None, "tiny-flux", {}):
        with pytest.raises(ConfigError, match=f"must be an nn.Module, not of type {type(given).__name__}$"):
            act(given)
    model = eridiff.FluxInference(tiny.flux(), tiny.autoencoder())
    with pytest.raises(ConfigError, match="not of type FluxInference: pass its .network$"):
        act(model)


@pytest.mark.parametrize("name", [name for name in ACTS if name != "onednn"])
def test_a_module_without_blocks_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="for a Linear|Linear has no"):
        ACTS[name](nn.Linear(2, 2))
