"""Adapters of other trainers, written anew: they act on a layer as those do, and save what those save.

kohya's scripts and ai-toolkit replace `layer.forward` by a method of a module that is in no tree; others use hooks and
parametrizations. All start with random matrices in both halves, so that they act at once.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

RANK, ALPHA = 2, 3.0


def chosen(module: nn.Module, patterns: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """The layers whose names end with one of the patterns."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and name.endswith(tuple(patterns)):
            yield name, layer


def matrices(layer: Any) -> tuple[Any, Any]:
    """Down and up, as modules of the layer's kind; random in both."""
    if isinstance(layer, nn.Conv2d):
        down: Any = nn.Conv2d(layer.in_channels, RANK, layer.kernel_size, layer.stride, layer.padding, bias=False)
        up: Any = nn.Conv2d(RANK, layer.out_channels, 1, bias=False)
    else:
        down, up = nn.Linear(layer.in_features, RANK, bias=False), nn.Linear(RANK, layer.out_features, bias=False)
    for half in (down, up):
        nn.init.normal_(half.weight, std=0.3 / half.weight[0].numel() ** 0.5)
    return down, up


class KohyaLora(nn.Module):
    """As kohya's: keeps the bound forward from before, and three kinds of dropout."""

    def __init__(
        self, layer: Any, dropout: float = 0.0, rank_dropout: float = 0.0, module_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.lora_down, self.lora_up = matrices(layer)
        self.scale, self.multiplier = ALPHA / RANK, 1.0
        self.dropout, self.rank_dropout, self.module_dropout = dropout, rank_dropout, module_dropout
        self.org_module: Any = [layer]

    def apply_to(self) -> None:
        layer = self.org_module[0]
        self.org_forward = layer.forward
        layer.forward = self.forward
        self.org_module = None

    def forward(self, x: Tensor) -> Tensor:
        base = self.org_forward(x)
        if self.training and self.module_dropout and torch.rand(1) < self.module_dropout:
            return base
        hidden = self.lora_down(x)
        if self.training and self.dropout:
            hidden = F.dropout(hidden, self.dropout)
        if self.training and self.rank_dropout:
            hidden = hidden * (torch.rand(RANK) > self.rank_dropout).to(hidden.dtype).mean()
        return base + self.lora_up(hidden) * self.multiplier * self.scale


class AiToolkitLora(nn.Module):
    """As ai-toolkit's: asks its network, by a weak reference, whether it is on and how strong."""

    def __init__(self, layer: Any, network: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.lora_down, self.lora_up = matrices(layer)
        self.network_ref, self.orig_module_ref = weakref.ref(network), weakref.ref(layer)
        self.dropout = nn.Dropout(dropout)
        self.org_forward = layer.forward
        layer.forward = self.forward

    def forward(self, x: Tensor) -> Tensor:
        network: Any = self.network_ref()
        base = self.org_forward(x)
        if not network.is_active:
            return base
        change = self.lora_up(self.dropout(self.lora_down(x.to(self.lora_down.weight.dtype))))
        return base + (change * network.multiplier * (ALPHA / RANK)).to(base.dtype)


class Network(nn.Module):
    """All adapters of one kind on a module, itself in no module's tree."""

    def __init__(self, names: list[str], loras: list[nn.Module]) -> None:
        super().__init__()
        self.names, self.loras = names, nn.ModuleList(loras)
        self.is_active, self.multiplier = True, 1.0

    def set_multiplier(self, multiplier: float) -> None:
        self.multiplier = multiplier
        for lora in self.loras:
            lora.multiplier = multiplier  # type: ignore[assignment]

    def save(self, path: Path, name: Callable[[str], str]) -> Path:
        """kohya's suffixes, under the names that `name` makes of the layers'."""
        tensors: dict[str, Tensor] = {}
        for layer, lora in zip(self.names, self.loras, strict=True):
            halves: Any = lora
            tensors[f"{name(layer)}.lora_down.weight"] = halves.lora_down.weight.detach()
            tensors[f"{name(layer)}.lora_up.weight"] = halves.lora_up.weight.detach()
            tensors[f"{name(layer)}.alpha"] = torch.tensor(ALPHA)
        save_file(tensors, path)
        return path


def kohya(module: nn.Module, patterns: Iterable[str], **dropouts: float) -> Network:
    found = dict(chosen(module, patterns))
    network = Network([*found], [KohyaLora(layer, **dropouts) for layer in found.values()])
    for lora in network.loras:
        lora.apply_to()  # type: ignore[operator]
    return network


def ai_toolkit(module: nn.Module, patterns: Iterable[str], dropout: float = 0.0) -> Network:
    found = dict(chosen(module, patterns))
    network = Network([*found], [])
    network.loras.extend(AiToolkitLora(layer, network, dropout) for layer in found.values())
    return network


class Halves(nn.Module):
    """The two matrices alone, to be used by a hook or as a parametrization of the weight."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.lora_down, self.lora_up = matrices(layer)

    def change(self, x: Tensor) -> Tensor:
        return self.lora_up(self.lora_down(x)) * (ALPHA / RANK)

    def forward(self, weight: Tensor) -> Tensor:
        """As a parametrization."""
        down, up = self.lora_down.weight, self.lora_up.weight
        return weight + (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * (ALPHA / RANK)


def hooks(module: nn.Module, patterns: Iterable[str]) -> Network:
    found = dict(chosen(module, patterns))
    network = Network([*found], [Halves(layer) for layer in found.values()])
    for layer, halves in zip(found.values(), network.loras, strict=True):
        layer.register_forward_hook(lambda _, args, output, halves=halves: output + halves.change(args[0]))
    return network


def input_hooks(module: nn.Module, patterns: Iterable[str]) -> Network:
    """A learned scale of each input feature; no LoRA, so there is no file of it."""
    found = dict(chosen(module, patterns))
    scales = []
    for layer in found.values():
        features = getattr(layer, "in_features", None)
        scale = nn.Linear(1, 1, bias=False)
        scale.weight = nn.Parameter(torch.rand(features or 1, 1) + 0.5)
        layer.register_forward_pre_hook(lambda _, args, scale=scale: args[0] * scale.weight[:, 0])
        scales.append(scale)
    return Network([*found], [*scales])


def parametrized(module: nn.Module, patterns: Iterable[str]) -> Network:
    found = dict(chosen(module, patterns))
    network = Network([*found], [Halves(layer) for layer in found.values()])
    for layer, halves in zip(found.values(), network.loras, strict=True):
        parametrize.register_parametrization(layer, "weight", halves)
    return network


def renamed(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name.replace(".", "_")


WAYS: Mapping[str, Callable[[nn.Module, Iterable[str]], Network]] = {
    "kohya": lambda module, patterns: kohya(module, patterns, dropout=0.3, rank_dropout=0.3, module_dropout=0.3),
    "ai-toolkit": lambda module, patterns: ai_toolkit(module, patterns, dropout=0.3),
    "hook": hooks,
    "parametrization": parametrized,
    "pre-hook": input_hooks,
}
