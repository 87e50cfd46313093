"""Errors of a port of the autoencoder."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.ports import Bug


def group_norm_with(eps: float) -> Callable[..., Any]:
    def norm(x: Any, groups: int = 32) -> Any:
        grouped = x.reshape(len(x), groups, -1)
        return ((grouped - grouped.mean(-1, keepdims=True)) / np.sqrt(grouped.var(-1, keepdims=True) + eps)).reshape(
            x.shape
        )

    return lambda port, right: norm


def padded_first(port: Any, right: Any) -> Any:
    return lambda weights, name, x: port.kept(name, port.conv(weights, f"{name}.conv", x, 2, ((1, 0), (1, 0))))


def bilinear(port: Any, right: Any) -> Any:
    return lambda x: torch.nn.functional.interpolate(torch.from_numpy(x), scale_factor=2.0, mode="bilinear").numpy()


def of_kernel(change: Callable[[Any], Any], where: str) -> Callable[..., Any]:
    def wrong(port: Any, right: Any) -> Any:
        def conv(weights: Any, name: str, x: Any, *rest: Any) -> Any:
            kernel = weights[f"{name}.weight"]
            return right({**weights, f"{name}.weight": change(kernel) if where in name else kernel}, name, x, *rest)

        return conv

    return wrong


def without_bias(where: str) -> Callable[..., Any]:
    def wrong(port: Any, right: Any) -> Any:
        def conv(weights: Any, name: str, x: Any, *rest: Any) -> Any:
            return right({**weights, f"{name}.bias": weights[f"{name}.bias"] * (where not in name)}, name, x, *rest)

        return conv

    return wrong


def without_input(where: str) -> Callable[..., Any]:
    def wrong(port: Any, right: Any) -> Any:
        def residual(weights: Any, name: str, x: Any, *rest: Any) -> Any:
            out = right(weights, name, x, *rest)
            shortcut = next(
                (f"{name}.{n}" for n in ("nin_shortcut", "skip_connection") if f"{name}.{n}.weight" in weights), ""
            )
            return port.kept(name, out - (port.conv(weights, shortcut, x) if shortcut else x)) if where in name else out

        return residual

    return wrong


def attended_with(heads: int) -> Callable[..., Any]:
    def wrong(port: Any, right: Any) -> Any:
        def attended(weights: Any, name: str, x: Any) -> Any:
            h = port.norm(weights, f"{name}.norm", x)
            q, k, v = (
                port.conv(weights, f"{name}.{p}", h).reshape(len(x), heads, x.shape[1] // heads, -1) for p in "qkv"
            )
            scores = q.swapaxes(2, 3) @ k / q.shape[2] ** 0.5
            share = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = (v @ (share / share.sum(-1, keepdims=True)).swapaxes(2, 3)).reshape(x.shape)
            return port.kept(name, x + port.conv(weights, f"{name}.proj_out", mixed))

        return attended

    return wrong


def silu_first(port: Any, right: Any) -> Any:
    def residual(weights: Any, name: str, x: Any) -> Any:
        h = port.conv(weights, f"{name}.conv1", port.norm(weights, f"{name}.norm1", port.silu(x)))
        h = port.conv(weights, f"{name}.conv2", port.norm(weights, f"{name}.norm2", port.silu(h)))
        shortcut = f"{name}.nin_shortcut"
        return port.kept(name, h + (port.conv(weights, shortcut, x) if f"{shortcut}.weight" in weights else x))

    return residual


def convolved_first(where: str) -> Callable[..., Any]:
    """A convolution that comes before the upsampling in place of behind it."""

    def wrong(port: Any, right: Any) -> Any:
        def conv(weights: Any, name: str, x: Any, *rest: Any) -> Any:
            if where not in name:
                return right(weights, name, x, *rest)
            return port.larger(right(weights, name, x[:, :, ::2, ::2], *rest))

        return conv

    return wrong


def eps_of_attention(port: Any, right: Any) -> Any:
    def norm(weights: Any, name: str, x: Any) -> Any:
        gain, offset = (weights[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        return (
            port.kept(name, group_norm_with(1e-5)(port, right)(x) * gain + offset)
            if "attn" in name
            else right(weights, name, x)
        )

    return norm


VAE = {
    "group norm eps 1e-5": Bug("group_norm", group_norm_with(1e-5), "encoder.down.0.block.0.norm1", "group norm's epsilon is 1e-5"),
    "gelu": Bug("silu", lambda p, r: lambda x: torch.nn.functional.gelu(torch.from_numpy(x)).numpy(), "encoder.down.0.block.0.conv1", "GELU in place of SiLU"),
    "no silu": Bug("silu", lambda p, r: lambda x: x, "encoder.down.0.block.0.conv1", "SiLU is left out"),
    "padding": Bug("halved", padded_first, "encoder.down.0.downsample.conv", "padding at the left and top"),
    "bilinear": Bug("larger", bilinear, "decoder.up.1.upsample.conv", "bilinear in place of nearest"),
    "scores": Bug("attention_scale", lambda p, r: lambda channels: 1.0, "encoder.mid.attn_1.proj_out", "scores are not scaled"),
    "no shift": Bug("from_latents", lambda p, r: lambda z, c: z / c["scale_factor"], "decoder.conv_in", "latents' shift is left out"),
    "no scale": Bug("from_latents", lambda p, r: lambda z, c: z + c["shift_factor"], "decoder.conv_in", "latents' scale is left out"),
    "kernel flipped": Bug("conv", of_kernel(lambda w: w[..., ::-1, ::-1], "decoder.mid.block_1.conv"), "decoder.mid.block_1.conv1", "kernel is flipped"),
    "kernel's rows": Bug("conv", of_kernel(lambda w: w.swapaxes(2, 3), "decoder.up.0"), "decoder.up.0.block.0.conv1", "rows and columns are exchanged"),
    "kernel's inputs": Bug("conv", of_kernel(lambda w: w.swapaxes(0, 1), "decoder.up.0.block.1.conv"), "decoder.up.0.block.1.conv1", "inputs and outputs are exchanged"),
    "no bias": Bug("conv", without_bias("decoder.conv_in"), "decoder.conv_in", "convolution's bias is left out"),
    "block's input": Bug("residual", without_input("decoder"), "decoder.mid.block_1", "block's input is not added"),
    "no gain": Bug("norm", lambda p, r: lambda weights, name, x: p.kept(name, p.group_norm(x)), "encoder.down.0.block.0.norm1", "gain and offset are left out"),
    "one group": Bug("group_norm", lambda p, r: lambda x, groups=32: r(x, 1), "encoder.down.0.block.0.norm1", "one group for all"),
    "shift first": Bug("from_latents", lambda p, r: lambda z, c: (z + c["shift_factor"]) / c["scale_factor"], "decoder.conv_in", "shifted before they are divided"),
    "encoder's shift": Bug("to_latents", lambda p, r: lambda z, c: z * c["scale_factor"], "latents.mode", "latents' shift is left out"),
    "encoder's scale": Bug("to_latents", lambda p, r: lambda z, c: z - c["shift_factor"], "latents.mode", "latents' scale is left out"),
    "eight heads": Bug("attended", attended_with(8), "encoder.mid.attn_1.proj_out", "8 heads, whatever the width"),
    "no attention": Bug("attended", lambda p, r: lambda weights, name, x: p.kept(name, x), "encoder.mid.attn_1", "attention is left out"),
    "attention's input": Bug(
        "attended", lambda p, r: lambda weights, name, x: p.kept(name, r(weights, name, x) - x), "encoder.mid.attn_1", "block's input is not added",
    ),
    "eps of the attention": Bug("norm", eps_of_attention, "encoder.mid.attn_1.norm", "group norm's epsilon is 1e-5"),
    "silu before the norm": Bug("residual", silu_first, "encoder.down.0.block.0.norm1", "norms behind SiLU"),
    "convolution first": Bug("conv", convolved_first("upsample"), "decoder.up.1.upsample.conv", "convolution comes before the upsampling"),
    "sdxl's scale": Bug("from_latents", lambda p, r: lambda z, c: z / 0.13025, "decoder.conv_in", "are those of sdxl"),
    "sd3's scale": Bug("from_latents", lambda p, r: lambda z, c: z / 1.5305 + 0.0609, "decoder.conv_in", "are those of sd3"),
    "encoder's shift behind": Bug(
        "to_latents", lambda p, r: lambda z, c: z * c["scale_factor"] - c["shift_factor"], "latents.mode", "latents are shifted behind the scale",
    ),
    "log-variance": Bug("mean_of", lambda p, r: lambda moments: np.split(moments, 2, 1)[1], "latents.mode", "log-variance is taken"),
}  # fmt: skip
