"""Errors of a port of SDXL's UNet."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.bugs.flux import of_attention, rounded_to_bfloat16
from tests.bugs.vae import bilinear, convolved_first, of_kernel, without_bias, without_input
from tests.ports import Bug


def group_norm_of(eps: float) -> Callable[..., Any]:
    def wrong(port: Any, right: Any) -> Any:
        return lambda weights, name, x: port.kept(
            name,
            port.group_norm(x, eps) * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None],
        )

    return wrong


def layer_norm_of(eps: float) -> Callable[..., Any]:
    def wrong(port: Any, right: Any) -> Any:
        return lambda weights, name, x: port.kept(
            name,
            (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * weights[f"{name}.weight"]
            + weights[f"{name}.bias"],
        )

    return wrong


def torch_gelu(approximate: str) -> Callable[..., Any]:
    return lambda port, right: lambda x: torch.nn.functional.gelu(torch.from_numpy(x), approximate=approximate).numpy()


def gate_in_front(port: Any, right: Any) -> Any:
    return lambda x: right(np.concatenate(np.split(x, 2, -1)[::-1], -1))


def late_shift(port: Any, right: Any) -> Any:
    def residual(weights: Any, name: str, x: Any, vec: Any) -> Any:
        h = port.conv(weights, f"{name}.in_layers.2", port.silu(port.of_block(weights, f"{name}.in_layers.0", x)))
        told = port.linear(weights, f"{name}.emb_layers.1", port.added(vec))[:, :, None, None]
        h = port.silu(port.of_block(weights, f"{name}.out_layers.0", h) + told)
        h, shortcut = port.conv(weights, f"{name}.out_layers.3", h), f"{name}.skip_connection"
        return port.kept(name, h + (port.conv(weights, shortcut, x) if f"{shortcut}.weight" in weights else x))

    return residual


def padded_behind(port: Any, right: Any) -> Any:
    return lambda weights, name, x, stride=1, *rest: right(
        weights, name, x, stride, *([((0, 1), (0, 1))] if stride == 2 else rest)
    )


def transformer_as(cross_first: bool = False, of_norm: bool = False) -> Callable[..., Any]:
    def wrong(port: Any, right: Any) -> Any:
        def transformer(weights: Any, name: str, x: Any, context: Any, head: int) -> Any:
            normed = port.of_transformer(weights, f"{name}.norm", x)
            h, depth = port.linear(weights, f"{name}.proj_in", normed.reshape(*x.shape[:2], -1).swapaxes(1, 2)), 0
            while f"{name}.transformer_blocks.{depth}.norm1.weight" in weights:
                block = f"{name}.transformer_blocks.{depth}"
                for n in (2, 1) if cross_first else (1, 2):
                    a = port.layer_norm(weights, f"{block}.norm{n}", h)
                    h = h + port.attended(weights, f"{block}.attn{n}", a, a if n == 1 else context, head)
                wide = port.linear(weights, f"{block}.ff.net.0.proj", port.layer_norm(weights, f"{block}.norm3", h))
                h = port.kept(block, h + port.linear(weights, f"{block}.ff.net.2", port.gated(wide)))
                depth += 1
            out = port.linear(weights, f"{name}.proj_out", h).swapaxes(1, 2).reshape(x.shape)
            return port.kept(name, (normed if of_norm else x) + out)

        return transformer

    return wrong


UNET = {
    "block's eps": Bug("of_block", group_norm_of(1e-6), "input_blocks.1.0.in_layers.0", "group norm's epsilon is 1e-6"),
    "transformer's eps": Bug("of_transformer", group_norm_of(1e-5), "input_blocks.4.1.norm", "group norm's epsilon is 1e-5"),
    "layer norm's eps": Bug("layer_norm", layer_norm_of(1e-6), "input_blocks.4.1.transformer_blocks.0.norm1", "layer norm's epsilon is 1e-6"),
    "tanh gelu": Bug("gelu", torch_gelu("tanh"), "input_blocks.4.1.transformer_blocks.0.ff.net.2", "tanh form of GELU"),
    "gate in front": Bug("gated", gate_in_front, "input_blocks.4.1.transformer_blocks.0.ff.net.2", "gate is the first half"),
    "skip in front": Bug("joined", lambda p, r: lambda x, skip: r(skip, x), "output_blocks.0.0.in_layers.0", "skip before stream"),
    "time / 1000": Bug("sinusoid", lambda p, r: lambda t, width: r(t / 1000, width), "time_embed:0", "scale of 1 in place of 1000"),
    "sine first": Bug("sinusoid", lambda p, r: lambda t, width: np.roll(r(t, width), width // 2, -1), "time_embed:0", "sines first"),
    "no silu before the embedding": Bug("added", lambda p, r: lambda vec: vec, "input_blocks.1.0.emb_layers.1", "SiLU is left out"),
    "scores": Bug(
        "attention", lambda p, r: lambda q, k, v: r(q * q.shape[-1] ** 0.5, k, v), "input_blocks.4.1.transformer_blocks.0.attn1.to_out.0",
        "scores are not scaled",
    ),
    "scores by width": Bug(
        "attention", lambda p, r: of_attention(p, r, lambda q: (q.shape[1] * q.shape[3]) ** -0.5),
        "input_blocks.4.1.transformer_blocks.0.attn1.to_out.0", "scaled by the whole width",
    ),
    "quick gelu": Bug("gelu", lambda p, r: lambda x: x / (1 + np.exp(-1.702 * x)), "input_blocks.4.1.transformer_blocks.0.ff.net.2", "quick GELU"),
    "kernel's rows": Bug("conv", of_kernel(lambda w: w.swapaxes(2, 3), "input_blocks.3"), "input_blocks.3.0.op", "rows and columns are exchanged"),
    "kernel flipped": Bug("conv", of_kernel(lambda w: w[..., ::-1, ::-1], "out.2"), "out.2", "kernel is flipped"),
    "no bias": Bug("conv", without_bias("input_blocks.0.0"), "input_blocks.0.0", "convolution's bias is left out"),
    "block's input": Bug("residual", without_input("input_blocks.1"), "input_blocks.1.0", "block's input is not added"),
    "transformer's input": Bug(
        "transformer", lambda p, r: lambda weights, name, x, *rest: p.kept(name, r(weights, name, x, *rest) - x), "input_blocks.4.1",
        "block's input is not added",
    ),
    "transformer's norm": Bug("transformer", transformer_as(of_norm=True), "input_blocks.4.1", "transformer adds to what was normed"),
    "cross-attention first": Bug("transformer", transformer_as(cross_first=True), "input_blocks.4.1.transformer_blocks.0.norm1", "cross-attention comes before"),
    "time behind the norm": Bug("residual", late_shift, "input_blocks.1.0.out_layers.0", "added behind the second norm"),
    "padded behind": Bug("conv", padded_behind, "input_blocks.3.0.op", "right and bottom in place of all sides"),
    "convolution first": Bug("conv", convolved_first("output_blocks.2.2"), "output_blocks.2.2.conv", "convolution comes before the upsampling"),
    "eight heads": Bug(
        "attended", lambda p, r: lambda weights, name, x, context, head: r(weights, name, x, context, x.shape[-1] // 8),
        "input_blocks.4.1.transformer_blocks.0.attn1.to_out.0", "twice as many heads",  # of four in this case
    ),
    "silu for gelu": Bug("gelu", lambda p, r: lambda x: x / (1 + np.exp(-x)), "input_blocks.4.1.transformer_blocks.0.ff.net.2", "SiLU in place of GELU"),
    "no vector": Bug(
        "two_layers", lambda p, r: lambda weights, first, *rest: r(weights, first, *rest) * ("label" not in first), "emb", "vector of text and sizes is left out",
    ),
    "time one late of base": Bug("sinusoid", lambda p, r: lambda t, width: r(t + 1, width), "time_embed:0", "one of 1000 too late"),
    "time in bfloat16": Bug("sinusoid", lambda p, r: lambda t, width: r(rounded_to_bfloat16(t), width), "time_embed:0", "times are rounded to bfloat16"),
    "sinusoid in bfloat16": Bug("sinusoid", lambda p, r: lambda t, width: rounded_to_bfloat16(r(t, width)), "time_embed:0", "sinusoid is rounded to bfloat16"),
    "bilinear": Bug("larger", bilinear, "output_blocks.2.2.conv", "bilinear in place of nearest"),
    "half - 1": Bug(
        "sinusoid", lambda p, r: lambda t, width: np.concatenate([
            f(t[:, None] * np.exp(-np.log(10000) * np.arange(width // 2) / (width // 2 - 1))) for f in (np.cos, np.sin)
        ], -1), "time_embed:0", "half - 1",
    ),
}  # fmt: skip
