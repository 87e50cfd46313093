"""A trainer's own module, of diffusers' classes or in any published layout, as an eridiff network: its parameters, not copies.

Nothing of the foreign library is imported: the names and shapes of its parameters, read by the key maps, say what it is.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eridiff.adopt.layers import Elsewhere, calling, check_followed, check_ordinary, layers, named_tensors, reads
from eridiff.blocks import without_peft
from eridiff.errors import ConfigError
from eridiff.models.autoencoder import Autoencoder
from eridiff.models.flux import Flux
from eridiff.models.mmdit import MMDiT
from eridiff.models.unet import UNet
from eridiff.weights.detect import component_of
from eridiff.weights.format import TensorEntry
from eridiff.weights.header import Checkpoint
from eridiff.weights.keymap import Entry, without_wrappers
from eridiff.weights.load import NETWORKS, empty_network, plan

STATISTICS = {"scaling": "scale", "shift": "shift"}  # of latents: diffusers' settings, the original's attributes
COPIED = ("rows", "swap_halves", "transpose")  # the other operations of a key map rename, or view


class Adopted:
    """`network` is eridiff's. Where a layer of `foreign` is what its tensors say, it has those tensors, not copies of them; where
    more acts on that layer (an adapter, a hook, quantised weights), it calls the layer in each step, so that all of it acts.

    What eridiff keeps in one matrix and the trainer in several is called too, or copied with `copies`. `refresh` looks anew at
    what acts, follows tensors that were moved or exchanged, and makes the copies; call it before images are generated (`Sampler`
    does, for each kind of weights). `release` gives the copies' memory back; a network that was released calls the trainer's
    layers in their place, so that it never computes with old copies.
    """

    def __init__(self, foreign: nn.Module, network: nn.Module, entries: list[Entry], copies: bool = False) -> None:
        self.foreign, self.network, self.copies = foreign, network, copies
        self._shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} if entries else {}
        self._layers: dict[str, list[Entry]] = {}  # of each layer of `network`
        for entry in entries:
            self._layers.setdefault(entry.native.rpartition(".")[0], []).append(entry)
        self.copied_bytes = 0  # of all copies together, held between `refresh` and `release`
        if entries:
            network.adopted_from = type(foreign).__name__  # type: ignore[assignment]  # `shard` refuses it
        self.refresh()

    def refresh(self) -> None:
        """Follow the trainer's module as it is now; make what must be copied anew.

        Raises ConfigError for what acts on it and cannot be followed.
        """
        self._follow(copy=self.copies)

    def release(self) -> None:
        """Give the copies' memory back; `refresh` makes them again."""
        self._follow(copy=False)

    @torch.no_grad()
    def _follow(self, copy: bool) -> None:
        _check_whole(self.foreign, self.foreign)
        whole, tensors = dict(layers(self.foreign)), named_tensors(self.foreign)
        paths = {
            path: list(dict.fromkeys(n.rpartition(".")[0] for e in es for n in e.foreign))
            for path, es in self._layers.items()
        }
        if self._layers:
            check_followed(self.foreign, {path: whole[path] for ps in paths.values() for path in ps if path in whole})
        self.copied_bytes = 0
        for path, entries in self._layers.items():
            owner: Any = self.network.get_submodule(path)
            theirs = [(name, whole[name]) for name in paths[path] if name in whole]
            fused = any(entry.operation in COPIED for entry in entries)
            called = not all(reads(layer) for _, layer in theirs) or (fused and not copy)
            vars(owner).pop("forward", None)
            if called:
                weight = next((entry for entry in entries if entry.native.endswith(".weight")), entries[0])
                owner.forward = calling(weight, theirs, self.copies)
            for entry in entries:
                gone = next((name for name in entry.foreign if name not in tensors), None)
                if gone is not None:
                    raise ConfigError(
                        f"'{gone}' is no longer in this {type(self.foreign).__name__}, which was adopted with it"
                    )
                sources = [tensors[name] for name in entry.foreign]
                _put(owner, entry, self._placed(entry, owner, sources, called))

    def _placed(self, entry: Entry, owner: nn.Module, sources: list[Tensor], called: bool) -> Tensor:
        """What a tensor of `network` becomes: the trainer's, a view of it, a copy, or nothing but a shape."""
        shape, first = self._shapes[entry.native], sources[0]
        if called:
            who = getattr(first, "who", f"'{entry.foreign[0].rpartition('.')[0]}'")
            return Elsewhere(shape, first.dtype, first.device, who)
        for name, source in zip(entry.foreign, sources, strict=True):
            check_ordinary(name, source)
        if entry.operation not in COPIED:
            return first if first.shape == shape else first.view(shape)
        self.copied_bytes += sum(source.nbytes for source in sources)
        held = getattr(owner, entry.native.rpartition(".")[2])
        if type(held.data) is Tensor and held.device == first.device and held.dtype == first.dtype:
            return held.copy_(entry.read(sources, shape))
        return entry.read(sources, shape)


def adopt(module: nn.Module, *, allow_copies: bool = False) -> Adopted:
    """eridiff's network of a trainer's Flux, Stable Diffusion 3, SDXL or autoencoder, whose steps it follows.

    Wrappers (DDP, torch.compile, a peft model) are seen through. LoRAs and other adapters act as they do in the trainer's own
    forward, also those that are put on later, and quantised layers compute by themselves. allow_copies joins what is one
    matrix here and several there into copies while images are generated, in place of several calls. An eridiff module is
    adopted as it is. Raises CheckpointError for a module that is none of these, ConfigError for sharded parameters and for
    what acts on the module and cannot be followed.
    """
    foreign = without_peft(module)
    _check_whole(module, foreign)
    if isinstance(foreign, Flux | MMDiT | UNet | Autoencoder):
        return Adopted(foreign, foreign, [])
    what, tensors, config = type(foreign).__name__, named_tensors(foreign), getattr(foreign, "config", {})
    inside = next((name for name in tensors if without_wrappers(name) != name), None)
    if inside is not None:
        raise ConfigError(
            f"'{inside}' is inside a wrapper that is not torch's own and may do more than call what it holds; take it off"
        )
    entries = {n: TensorEntry(t.dtype, tuple(t.shape), Path(), 0, 0) for n, t in tensors.items()}
    statistics = {f"{n}_factor": vars(foreign).get(f"{own}_factor") for n, own in STATISTICS.items()}
    said = {name: value for name, value in statistics.items() if isinstance(value, int | float)}
    said |= config if isinstance(config, Mapping) else {}
    settings = json.loads(json.dumps(said, default=str))  # as in its file
    component = component_of(Checkpoint(Path(what), entries, {}, settings, module=True), *NETWORKS)
    if component.prefix:
        raise ConfigError(f"the network is inside this {what}, and not all of it: adopt its '{component.prefix[:-1]}'")
    network = empty_network(component).eval()
    planned = plan(component, {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()})
    return Adopted(foreign, network, planned, allow_copies)


def _check_whole(module: nn.Module, foreign: nn.Module) -> None:
    """ConfigError for parameters of which each process has a part: of FSDP2 (by their mesh), FSDP1 and DeepSpeed's ZeRO-3.

    And for parameters in several places, which the trainer's forward moves block by block.
    """
    parted = any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in foreign.parameters())
    if parted or any(type(inner).__name__ == "FullyShardedDataParallel" for inner in module.modules()):
        raise ConfigError(
            f"the parameters of this {type(foreign).__name__} are sharded, so eridiff cannot share them: train eridiff's own "
            "network by `shard`, or generate with a module that is not sharded"
        )
    places = {p.device: name for name, p in foreign.named_parameters()}
    if len(places) > 1:
        held = " and ".join(f"'{name}' on {device}" for device, name in places.items())
        raise ConfigError(
            f"this {type(foreign).__name__} has {held}: eridiff's network computes in one place, so put blocks that are swapped or offloaded "
            "onto the device while images are generated"
        )


def _put(owner: nn.Module, entry: Entry, value: Tensor) -> None:
    """Parameters stay the very objects of the trainer, so that whatever becomes of their data is seen."""
    name = entry.native.rpartition(".")[2]
    if name in owner._parameters:
        owner._parameters[name] = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
    else:
        setattr(owner, name, value)
