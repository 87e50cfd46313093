"""Tiny networks with LoRAs of every kind, and what to ask them."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eridiff.lora import Lora, LoraSet, inject_lora
from eridiff.lora.deltas import Item
from eridiff.lora.names import Target, network_of
from tests import tiny

FAMILIES: dict[str, Callable[[], Any]] = {"flux": tiny.flux, "mmdit": tiny.mmdit, "unet": tiny.unet}
Sizes = Mapping[str, tuple[int, ...]]


def arguments(network: Any, batch: int = 2, dtype: torch.dtype | None = None) -> tuple[Tensor, tuple[Any, ...]]:
    """Latents, and what `prepare` takes, for two evaluations at times that all rows share."""
    g = torch.Generator().manual_seed(3)
    c, dtype = network.config, dtype or next(network.parameters()).dtype

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    times = torch.tensor([0.7, 0.3], dtype=torch.float64)
    text = noise(batch, 5, c.text_width)
    family = network_of(network)
    if family == "flux":
        return noise(batch, 6, c.in_channels), (
            text,
            noise(batch, c.pooled_width),
            times,
            (2, 3),
            torch.full((batch,), 3.5),
        )
    if family == "mmdit":
        return noise(batch, c.in_channels, 4, 6), (text, noise(batch, c.pooled_width), times, (2, 3))
    return noise(batch, c.in_channels, 8, 12), (text, noise(batch, c.vector_width), 1000 * times)


def ask(network: Any, batch: int = 2, dtype: torch.dtype | None = None) -> Tensor:
    """The network's outputs at two points of a run, joined behind the batch: `[B, 2, ...]`."""
    latents, given = arguments(network, batch, dtype)
    run = network.prepare(*given)
    return torch.stack([network.step(latents, run, i) for i in (0, 1)], dim=1)


def item(
    network: nn.Module, module: str, sizes: Sizes, kind: str = "lora", rows: tuple[int, int] | None = None,
    swapped: bool = False, ratio: float = 1.0, seed: int = 5,
) -> Item:  # fmt: skip
    """What a file may do to a module: random tensors of these shapes; lengths are those of the weight, a little changed."""
    g = torch.Generator().manual_seed(seed)
    target = Target(network_of(network), module, "weight", rows, swapped)
    tensors = {}
    for name, shape in sizes.items():
        values = torch.randn(shape, generator=g, dtype=torch.float64) * (0.5 if name in ("down", "mid") else 0.2)
        if name in ("magnitude", "dora_scale"):
            base = target.take(network.get_submodule(module).weight.detach()).double()
            axis = 1 if name == "dora_scale" and shape[0] == 1 else 0
            values = (base.transpose(0, axis).flatten(1).norm(dim=1) * (1 + values.flatten())).reshape(shape)
        tensors[name] = torch.tensor(shape[0] if shape else 0) if name == "on_input" else values
    return Item(module, target, kind, tensors, ratio)


def every_kind_on_flux(network: nn.Module) -> Lora:
    """A LoRA of `tiny.FLUX` with every kind of change of a linear layer, whole, of rows, with halves exchanged."""
    double, single = "double_blocks.{}.{}".format, "single_blocks.{}.{}".format
    return Lora((
        item(network, "image_in", {"down": (3, 64), "up": (32, 3), "up_bias": (32,)}, ratio=0.7),
        item(network, "text_in", {"hada_w1_a": (32, 2), "hada_w1_b": (2, 12), "hada_w2_a": (32, 2), "hada_w2_b": (2, 12)}, "loha", ratio=3.0),
        item(network, "time_in.in_layer", {"lokr_w1": (4, 8), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 32)}, "lokr", ratio=0.5),
        item(network, "time_in.out_layer", {"down": (2, 32), "up": (32, 2), "up_bias": (32,)}),
        item(network, "pooled_in.in_layer", {"diff": (32, 8), "diff_b": (32,)}, "full"),
        item(network, double(0, "image.qkv"), {"down": (2, 32), "up": (32, 2), "magnitude": (32,)}, rows=(0, 32)),
        item(network, double(0, "image.qkv"), {"down": (4, 32), "up": (32, 4)}, rows=(32, 64), ratio=0.25),
        item(network, double(0, "text.qkv"), {"down": (2, 32), "up": (96, 2), "dora_scale": (1, 32)}),
        item(network, double(1, "image.proj"), {"multiplier": (32,), "on_input": ()}, "ia3"),
        item(network, double(1, "text.proj"), {"multiplier": (32,), "on_input": (1,)}, "ia3"),
        item(network, double(1, "text.modulation"), {"diff_b": (192,)}, "full"),
        item(network, double(0, "image.q_norm"), {"w_norm": (16,)}, "norm"),
        item(network, single(0, "linear1"), {"diff": (128, 32), "diff_b": (128,)}, "full", rows=(96, 224)),
        item(network, single(1, "linear2"), {"down": (2, 160), "up": (32, 2), "magnitude": (32,), "up_bias": (32,)}),
        item(network, "final.modulation", {"down": (2, 32), "up": (64, 2), "up_bias": (64,), "dora_scale": (64, 1)}, swapped=True),
    ))  # fmt: skip


def every_kind_on_unet(network: nn.Module) -> Lora:
    """A LoRA of `tiny.UNET` with every kind of change of a convolution, of stride 1 and 2."""
    residual = "down.1.residual.{}.{}".format
    return Lora((
        item(network, "conv_in", {"down": (2, 4, 3, 3), "up": (64, 2, 1, 1), "up_bias": (64,)}, ratio=0.7),
        item(network, "down.0.downsample.conv", {"down": (2, 64, 3, 3), "up": (64, 2, 1, 1), "magnitude": (64,)}),
        item(network, residual(0, "conv1"), {"down": (2, 64, 1, 1), "mid": (2, 3, 3, 3), "up": (128, 2, 1, 1)} | {"down": (3, 64, 1, 1)}),
        item(network, residual(0, "shortcut"), {"down": (2, 64), "up": (128, 2)}),
        item(network, residual(0, "modulation"), {"down": (2, 256), "up": (128, 2), "up_bias": (128,)}),
        item(network, residual(0, "conv2"), {"hada_w1_a": (2, 128), "hada_w1_b": (2, 128), "hada_t1": (2, 2, 3, 3), "hada_w2_a": (2, 128), "hada_w2_b": (2, 128), "hada_t2": (2, 2, 3, 3)}, "loha", ratio=9.0),
        item(network, residual(1, "conv1"), {"lokr_w1": (4, 8), "lokr_w2_a": (32, 2), "lokr_w2_b": (2, 16 * 9)}, "lokr"),
        item(network, residual(1, "conv2"), {"multiplier": (128,), "on_input": (1,)}, "ia3"),
        item(network, "middle.residual.0.conv1", {"diff": (128, 128, 3, 3), "diff_b": (128,)}, "full"),
        item(network, "middle.residual.0.conv2", {"down": (2, 128, 3, 3), "up": (128, 2, 1, 1), "dora_scale": (1, 128, 1, 1)}),
        item(network, "down.1.downsample.conv", {"down": (2, 128, 1, 1), "mid": (2, 2, 3, 3), "up": (128, 2, 1, 1), "up_bias": (128,)}),
        item(network, "norm_out", {"w_norm": (64,), "b_norm": (64,)}, "norm"),
        item(network, "middle.transformer.0.blocks.0.cross_attention.k", {"down": (2, 16), "up": (128, 2)}),
    ))  # fmt: skip


def filled(lora: LoraSet, seed: int = 5, size: float = 0.2) -> LoraSet:
    """Every matrix random, as after training."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * size)
    return lora


def same(a: Tensor, b: Tensor, bound: float = 1e-12) -> bool:
    """Equal to a relative bound."""
    return float((a - b).norm() / b.norm()) <= bound


def bits(module: nn.Module) -> dict[str, Tensor]:
    """A copy of everything that a module holds."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def unchanged(module: nn.Module, before: Mapping[str, Tensor]) -> bool:
    now = module.state_dict()
    return list(now) == list(before) and all(
        t.dtype == before[n].dtype and torch.equal(t, before[n]) for n, t in now.items()
    )


def with_weights(network: Any, state: dict[str, Tensor]) -> Any:
    other = copy.deepcopy(network)
    other.load_state_dict(state)
    return other


def some_lora(network: Any, seed: int = 5, rank: int = 3) -> Lora:
    """A LoRA of the family's usual targets, with matrices as after training."""
    lora = filled(inject_lora(network, rank), seed)
    lora.detach()
    return lora.lora()


EVERY_KIND = {"flux": every_kind_on_flux, "unet": every_kind_on_unet}


def layers(family: str) -> Iterator[tuple[Any, Any, Lora]]:
    """A network, a layer of it and a LoRA of that layer, for every kind of change."""
    network = FAMILIES[family]().double()
    for one in EVERY_KIND[family](network).items:
        if one.kind != "norm":
            yield network, network.get_submodule(one.target.module), Lora((one,))


def features(layer: Any, batch: int = 2) -> Tensor:
    g = torch.Generator().manual_seed(4)
    shape = (batch, layer.in_channels, 8, 6) if isinstance(layer, nn.Conv2d) else (batch, 7, layer.in_features)
    return torch.randn(shape, generator=g, dtype=torch.float64)
