"""Write a network in a published layout."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from eridiff.errors import ConfigError
from eridiff.files import replacing
from eridiff.models.autoencoder import Autoencoder
from eridiff.models.flux import Flux
from eridiff.models.mmdit import MMDiT
from eridiff.models.unet import UNet
from eridiff.weights.detect import DESCRIPTIONS, sizes_of
from eridiff.weights.keymap import key_map, without_wrappers
from eridiff.weights.load import NETWORKS


def save_network(
    module: Flux | MMDiT | UNet | Autoencoder,
    path: str | os.PathLike[str],
    *,
    layout: str = "original",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write the module's parameters under a layout's names, its configuration as metadata `eridiff.config`.

    The file appears whole or not at all. Raises ConfigError for another module and for an unknown layout, EridiffError when
    the file cannot be written.
    """
    network = next((name for name, kind in NETWORKS.items() if type(module) is kind), None)
    if network is None:
        known = ", ".join(kind.__name__ for kind in NETWORKS.values())
        raise ConfigError(f"a {type(module).__name__} cannot be saved; pass one of eridiff's networks: {known}")
    layouts = key_map(network).layouts
    if layout not in layouts:
        raise ConfigError(f"'{layout}' is not a layout of {DESCRIPTIONS[network]}; there are {', '.join(layouts)}")
    found = layouts[layout]
    sizes = sizes_of(module.config)
    state = {
        without_wrappers(name): tensor.detach().cpu().to(dtype or tensor.dtype).contiguous()
        for name, tensor in module.state_dict().items()
    }
    foreign = {name: tensor.contiguous().clone() for name, tensor in found.to_foreign(state, sizes).items()}
    text = json.dumps({network: asdict(module.config)}, sort_keys=True)
    return write_tensors(foreign, path, {**(metadata or {}), "eridiff.config": text})


def write_tensors(
    tensors: Mapping[str, torch.Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]
) -> Path:
    """A safetensors file that appears whole or not at all; its folder is made."""
    target = Path(path).expanduser()
    with replacing(target) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=dict(metadata))
        except SafetensorError as error:
            raise OSError(" ".join(str(error).split())) from None
    return target
