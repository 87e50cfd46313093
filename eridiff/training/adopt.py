"""A trainer's own module, of diffusers' classes or in any published layout, seen as ours: its parameters, not copies.

Nothing of the foreign library is imported: the names and shapes of its parameters, read by the key maps, say what it is.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from eridiff.blocks import unwrapped
from eridiff.errors import ConfigError
from eridiff.models.autoencoder import Autoencoder
from eridiff.models.flux import Flux
from eridiff.models.mmdit import MMDiT
from eridiff.models.unet import UNet
from eridiff.weights.detect import component_of
from eridiff.weights.header import Checkpoint, TensorEntry
from eridiff.weights.keymap import Entry
from eridiff.weights.load import NETWORKS, plan

COPIED = ("rows", "swap_halves", "transpose")  # the other operations of a key map rename, or view


class Adopted:
    """`network` is ours, with the parameters of `foreign` itself wherever the key map renames, and copies where it fuses.

    `refresh` makes the copies anew, in place, and is to be called before pictures are drawn: neither hook can do it, for
    `prepare` and `step` are no `forward`, and an optimizer's step is seen by no module. `release` gives the copies' memory
    back; a network that was released cannot draw, rather than draw with old weights.
    """

    def __init__(self, foreign: nn.Module, network: nn.Module, entries: list[Entry]) -> None:
        self.foreign, self.network = foreign, network
        self._entries, self._branches = entries, list[RemovableHandle]()
        self.refresh()

    @property
    def copied_bytes(self) -> int:
        """Of all copies together, held between `refresh` and `release`."""
        return _copied_bytes(self._entries, _tensors(self.foreign))

    @torch.no_grad()
    def refresh(self) -> None:
        """Point ours at the foreign tensors and adapters as they are now; make what must be copied anew."""
        tensors, adapters = _tensors(self.foreign), _adapters(self.foreign)
        for handle in self._branches:
            handle.remove()
        self._branches.clear()
        for entry in self._entries:
            owner, name = _place(self.network, entry)
            held, sources = getattr(owner, name), [tensors[foreign] for foreign in entry.foreign]
            if entry.operation not in COPIED:
                same = sources[0].shape == held.shape
                _put(owner, name, sources[0] if same else sources[0].view(held.shape))
            elif held.device == sources[0].device and held.dtype == sources[0].dtype:
                held.copy_(entry.read(sources, tuple(held.shape)))
            else:
                _put(owner, name, entry.read(sources, tuple(held.shape)))
            layers = [adapters.get(foreign.removesuffix(".weight")) for foreign in entry.foreign]
            if any(layers):
                self._branches.append(owner.register_forward_hook(_branch(entry, layers)))

    def release(self) -> None:
        """Give the copies' memory back; `refresh` makes them again."""
        for entry in self._entries:
            if entry.operation in COPIED:
                owner, name = _place(self.network, entry)
                _put(owner, name, getattr(owner, name).detach().to("meta"))


def adopt(module: nn.Module, *, allow_copies: bool = False) -> Adopted:
    """Our network of a trainer's Flux, Stable Diffusion 3, SDXL or autoencoder, whose steps it follows.

    Wrappers (DDP, torch.compile, a peft model) are seen through; LoRA layers of peft act as branches, unmerged. A module of
    ours is adopted as it is. Raises CheckpointError for a module that is none of these, ConfigError where tensors would have to
    be copied and `allow_copies` is not said, for sharded parameters, and for adapters that are no plain LoRA.
    """
    foreign = unwrapped(module)
    foreign = unwrapped(foreign.get_base_model()) if hasattr(foreign, "get_base_model") else foreign
    if isinstance(foreign, Flux | MMDiT | UNet | Autoencoder):
        return Adopted(foreign, foreign, [])
    what, tensors, config = type(foreign).__name__, _tensors(foreign), getattr(foreign, "config", {})
    if any(hasattr(tensor, "device_mesh") for tensor in tensors.values()):
        raise ConfigError(f"the parameters of this {what} are sharded, so ours cannot share them; shard ours instead")
    entries = {n: TensorEntry(t.dtype, tuple(t.shape), Path(), 0, 0) for n, t in tensors.items()}
    settings = json.loads(
        json.dumps(dict(config) if isinstance(config, Mapping) else {}, default=str)
    )  # as in its file
    component = component_of(Checkpoint(Path(what), entries, {}, settings), *NETWORKS)
    with torch.device("meta"):
        network = NETWORKS[component.network](component.config).eval()
    planned = plan(component, {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()})
    size = _copied_bytes(planned, tensors)
    if size and not allow_copies:
        raise ConfigError(
            f"{what} keeps apart what is one matrix here, so that {size} bytes ({size / 2**30:.2f} GiB) must be copied: "
            "say allow_copies=True, and call refresh() before pictures are drawn"
        )
    return Adopted(foreign, network, planned)


def _copied_bytes(entries: list[Entry], tensors: Mapping[str, Tensor]) -> int:
    fused = [tensors[name] for entry in entries if entry.operation in COPIED for name in entry.foreign]
    return sum(math.prod(tensor.shape) * tensor.element_size() for tensor in fused)


def _place(network: nn.Module, entry: Entry) -> tuple[nn.Module, str]:
    path, _, name = entry.native.rpartition(".")
    return network.get_submodule(path), name


def _put(owner: nn.Module, name: str, value: Tensor) -> None:
    """Parameters stay the very objects of the trainer, so that whatever becomes of their data is seen."""
    if name in owner._parameters:
        owner._parameters[name] = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
    else:
        setattr(owner, name, value)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and stored buffers, not detached, by the names that they have without adapters."""
    adapters = dict(_wrapped(module))
    found: dict[str, Tensor] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        parts = path.split(".")
        inside = next((".".join(parts[:i]) for i in range(len(parts) + 1) if ".".join(parts[:i]) in adapters), None)
        if inside is not None and not f"{path}.".startswith(f"{inside}.base_layer."):
            continue
        base = path.replace(".base_layer", "")
        stored = {n: b for n, b in child._buffers.items() if n not in child._non_persistent_buffers_set}
        for name, tensor in {**child._parameters, **stored}.items():
            if tensor is not None:
                found[f"{base}.{name}" if base else name] = tensor
    return found


# adapters of peft, told by their attributes ---------------------------------------------------------------------------------


def _wrapped(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that an adapter is wrapped around, by their names."""
    return ((path, child) for path, child in module.named_modules() if "base_layer" in child._modules)


def _adapters(module: nn.Module) -> dict[str, Any]:
    """The LoRA layers by name; ConfigError for an adapter that is more than a product of two matrices on top."""
    found = dict(_wrapped(module))
    for path, layer in found.items():
        plain = hasattr(layer, "lora_A") and not getattr(layer, "lora_variant", None)
        if not plain or not isinstance(layer.base_layer, nn.Linear | nn.Conv2d):
            raise ConfigError(
                f"'{path}' has an adapter that is no plain LoRA ({type(layer).__name__}); merge it before pictures are drawn"
            )
    return found


def _branch(entry: Entry, layers: list[Any]) -> Any:
    """A forward hook that adds what the LoRAs of an entry's foreign layers add, in our order of the outputs."""
    if entry.operation not in ("same", "rows", "swap_halves"):
        raise ConfigError(f"an adapter on '{entry.foreign[0]}' cannot be followed; merge it before pictures are drawn")

    def add(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        changes = [0 if layer is None else _change(layer, inputs[0]) for layer in layers]
        if entry.operation == "rows":
            pieces = output.split(list(entry.sizes or entry.equal_sizes(output.shape[-1])), dim=-1)
            return torch.cat([p + change for p, change in zip(pieces, changes, strict=True)], dim=-1).to(output.dtype)
        change = changes[0]
        if entry.operation == "swap_halves" and isinstance(change, Tensor):
            change = torch.cat(change.chunk(2, dim=-1)[::-1], dim=-1)
        return (output + change).to(output.dtype)

    return add


def _change(layer: Any, x: Tensor) -> Tensor | int:
    """What a layer's active LoRAs add to its output; 0 where they are switched off or merged."""
    if layer.disable_adapters or layer.merged:
        return 0
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    downs = {name: layer.lora_A[name] for name in active}
    return sum(layer.lora_B[n](down(x.to(down.weight.dtype))) * layer.scaling[n] for n, down in downs.items())
