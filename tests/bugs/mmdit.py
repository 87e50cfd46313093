"""Errors of a port of Stable Diffusion 3.5."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tests.bugs.flux import FLUX, HIDDEN, IN, Q_NORM, left_out, of_layer, without_gates, without_silu
from tests.ports import Bug


def late_mlp(port: Any, right: Any) -> Any:
    def updated(weights: Any, name: str, x: Any, attended: Any, chunks: Any) -> Any:
        after = x + chunks[2] * port.linear(weights, f"{name}.attn.proj", attended)
        hidden = port.gelu(
            port.linear(weights, f"{name}.mlp.fc1", port.kept(f"{name}.mlp:0", port.modulated(x, chunks[3], chunks[4])))
        )
        return after + chunks[5] * port.linear(weights, f"{name}.mlp.fc2", hidden)

    return updated


def patches_channel_last(port: Any, right: Any) -> Any:
    def patches(weights: Any, x: Any) -> Any:
        b, c, height, width = x.shape
        cut = x.reshape(b, c, height // 2, 2, width // 2, 2).transpose(0, 2, 4, 3, 5, 1).reshape(b, -1, c * 4)
        kernel = weights["x_embedder.proj.weight"]
        return cut @ kernel.reshape(len(kernel), -1).T + weights["x_embedder.proj.bias"]

    return patches


def patches_channel_first(port: Any, right: Any) -> Any:
    def unpatched(tokens: Any, h: int, w: int) -> Any:
        b, _, features = tokens.shape
        cut = tokens.reshape(b, h, w, features // 4, 2, 2)
        return cut.transpose(0, 3, 1, 4, 2, 5).reshape(b, features // 4, 2 * h, 2 * w)

    return unpatched


def rounded(dtype: torch.dtype, factor: float) -> Callable[..., Any]:
    def wrong(port: Any, right: Any) -> Any:
        return lambda t: right(torch.from_numpy(t * factor).to(dtype).double().numpy() / factor)

    return wrong


def table_cut(change: Callable[[Any, int, int], Any]) -> Callable[..., Any]:
    """Of the table of positions, `[S, S, D]`."""

    def wrong(port: Any, right: Any) -> Any:
        def middle(table: Any, side: int, h: int, w: int) -> Any:
            return change(table.reshape(side, side, -1), h, w).reshape(1, h * w, -1)

        return middle

    return wrong


def up(square: Any, h: int, w: int) -> Any:
    top, left = -((h - len(square)) // 2), -((w - len(square)) // 2)
    return square[top : top + h, left : left + w]


def of_latents(square: Any, h: int, w: int) -> Any:
    top, left = (max(len(square) - 2 * size, 0) // 2 for size in (h, w))
    return square[top : top + h, left : left + w]


def turned(square: Any, h: int, w: int) -> Any:
    top, left = ((len(square) - size) // 2 for size in (h, w))
    return square.swapaxes(0, 1)[top : top + h, left : left + w]


def resized(square: Any, h: int, w: int) -> Any:
    whole = torch.from_numpy(square).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(whole, size=(h, w), mode="bilinear")[0].permute(1, 2, 0).numpy()


def columns_first(port: Any, right: Any) -> Any:
    def unpatched(tokens: Any, h: int, w: int) -> Any:
        b, _, features = tokens.shape
        cut = tokens.reshape(b, h, w, 2, 2, features // 4)
        return cut.transpose(0, 5, 1, 4, 2, 3).reshape(b, features // 4, 2 * h, 2 * w)

    return unpatched


def v_normed(port: Any, right: Any) -> Any:
    def head_inputs(*given: Any) -> Any:
        q, k, v = right(*given)
        return q, k, v / np.sqrt((v**2).mean(-1, keepdims=True) + 1e-6)

    return head_inputs


def over_all_heads(port: Any, right: Any) -> Any:
    return lambda x, scale: x / np.sqrt((x**2).mean((1, 3), keepdims=True) + 1e-6) * scale


def text_unseen(port: Any, right: Any) -> Any:
    def attention(q: Any, k: Any, v: Any) -> Any:
        seen = np.arange(q.shape[2]) >= TEXT
        scores = np.where(seen, q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5, -np.inf)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        joined = (share / share.sum(-1, keepdims=True)) @ v
        return joined.transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], -1)

    return attention


def second_of(chunks: Callable[[list[Any]], list[Any]]) -> Callable[..., Any]:
    return lambda port, right: (
        lambda weights, name, x, given, heads: right(
            weights, name, x, chunks(given) if len(given) == 9 else given, heads
        )
    )


def second_late(port: Any, right: Any) -> Any:
    """The second attention reads what the first one was added to."""

    def updated(weights: Any, name: str, x: Any, attended: Any, chunks: Any) -> Any:
        x = x + chunks[2] * port.linear(weights, f"{name}.attn.proj", attended)
        x = right(weights, name, x, chunks, HEADS)
        a = port.kept(f"{name}.mlp:0", port.modulated(x, chunks[3], chunks[4]))
        hidden = port.gelu(port.linear(weights, f"{name}.mlp.fc1", a))
        return x + chunks[5] * port.linear(weights, f"{name}.mlp.fc2", hidden)

    port.modules[-1].updated = updated
    return lambda weights, name, x, chunks, heads: x


def second_in_the_middle(chunks: list[Any]) -> list[Any]:
    return [*chunks[:3], *chunks[6:], *chunks[3:6]] if len(chunks) == 9 else chunks


TEXT, HEADS = 6, 4  # tokens of sd35-large-tiny, heads of sd35-medium-tiny
SECOND = "joint_blocks.0.x_block.attn2.qkv:0"
X_IN = "joint_blocks.0.x_block.attn.qkv:0"
LN_Q = "joint_blocks.0.x_block.attn.ln_q"
PLACES = {IN: X_IN, Q_NORM: LN_Q, HIDDEN: "joint_blocks.0.x_block.mlp.fc2", "time.sinusoid": "t_embedder.freq",
    "double_blocks.0.attention": "joint_blocks.0.attention", "double_blocks.0.img_attn.norm.key_norm": "joint_blocks.0.x_block.attn.ln_k",
    "time_in.out_layer": "t_embedder.mlp.2", "final_layer.linear:0": "final_layer.linear:0",
}  # fmt: skip
SD35 = {  # those of Flux that this network can have, at their places here
    name: replace(bug, first=PLACES[bug.first]) for name, bug in FLUX.items() if bug.first in PLACES and bug.function not in ("linear", "chunks_of", "attention_inputs", "image_of")
} | {
    "mlp of the input": Bug("updated", late_mlp, "joint_blocks.0.x_block.mlp:0", "reads the stream before"),
    "no bias": Bug("linear", of_layer(lambda x, w, b: x @ w.T, "attn.proj"), "joint_blocks.0.x_block.attn.proj", "bias is left out"),
    "image first": Bug("joined_streams", lambda p, r: lambda t, i: r(i, t), "joint_blocks.0.attention", "joined is in the other order"),
    "patches read": Bug("patches", patches_channel_last, "x_in", "2 x 2 patches are read as"),
    "patches written": Bug("unpatched", patches_channel_first, "output", "2 x 2 patches are written as (channel"),
    "patches read by columns": Bug(
        "patches", lambda p, r: lambda weights, x: r(weights | {"x_embedder.proj.weight": weights["x_embedder.proj.weight"].swapaxes(2, 3)}, x),
        "x_in", "kernel's rows and columns",
    ),
    "patches written by columns": Bug("unpatched", columns_first, "output", "2 x 2 patches are written as (column"),
    "attention's gate": Bug("updated", without_gates(2), "joint_blocks.0.x_block.mlp:0", "attention's gate is left out"),
    "no silu before modulation": Bug("chunks_of", without_silu, "joint_blocks.0.x_block.adaLN_modulation.1", "SiLU is left out"),
    "v normed": Bug("head_inputs", v_normed, "joint_blocks.0.attention", "v is normed"),
    "rms over all heads": Bug("rms_norm", over_all_heads, LN_Q, "spans all heads"),
    "layer norm on q, k": Bug(
        "rms_norm", lambda p, r: lambda x, scale: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale, LN_Q,
        "a layer norm in place of the RMS norm",
    ),
    "text unseen": Bug("attention", text_unseen, "joint_blocks.0.attention", "text is not attended to"),
    "no second attention of medium": Bug("second_attention", lambda p, r: lambda weights, name, x, *_: x, "joint_blocks.0.x_block.mlp:0", "second attention is left out"),
    "second attention late of medium": Bug("second_attention", second_late, SECOND, "reads what the first was added to"),
    "second shift and scale of medium": Bug("second_attention", second_of(lambda c: [*c[:6], *c[:2], c[8]]), SECOND, "first one's shift and scale"),
    "second gate of medium": Bug("second_attention", second_of(lambda c: [*c[:8], c[2]]), "joint_blocks.0.x_block.mlp:0", "first one's gate"),
    "second in the middle of medium": Bug(
        "chunks_of", lambda p, r: lambda weights, name, vec, count: second_in_the_middle(r(weights, name, vec, count)),
        SECOND, "stand before the MLP's",
    ),
    "time in bfloat16": Bug("sinusoid", rounded(torch.bfloat16, 1), "t_embedder.freq", "times are rounded to bfloat16"),
    "time in float16": Bug("sinusoid", rounded(torch.float16, 1000), "t_embedder.freq", "times are rounded to float16"),
    "whole times": Bug("sinusoid", lambda p, r: lambda t: r((1000 * t).round() / 1000), "t_embedder.freq", "times are rounded to whole"),
    "no pooled": Bug("embedded", left_out("y_embedder"), "c", "pooled text is left out"),
    "table rounded up": Bug("middle", table_cut(up), "pos_embed.crop", "rounded up"),
    "table of latents": Bug("middle", table_cut(of_latents), "pos_embed.crop", "one of latents in place of patches"),
    "table turned": Bug("middle", table_cut(turned), "pos_embed.crop", "table's rows and columns are exchanged"),
    "table resized": Bug("middle", table_cut(resized), "pos_embed.crop", "resized in place of cropped"),
    "table's corner": Bug("middle", lambda p, r: lambda table, side, h, w: table.reshape(side, side, -1)[:h, :w].reshape(1, h * w, -1), "pos_embed.crop", "upper left corner"),
}  # fmt: skip
