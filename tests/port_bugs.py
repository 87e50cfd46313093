"""The errors that are planted into the ports: one for each way in which ports go wrong."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tests.ports import Bug


def split_last(x: Any, parts: int) -> list[Any]:
    return np.split(x, parts, -1)


def halves_rotated(x: Any, cos: Any, sin: Any) -> Any:
    a, b = split_last(x, 2)
    return np.concatenate([cos * a - sin * b, sin * a + cos * b], -1)


def rms(eps: float, gain: Callable[[Any], Any] = lambda scale: scale) -> Callable[..., Any]:
    return lambda port, right: lambda x, scale: x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain(scale)


def of_linear(change: Callable[[Any, Any, Any], Any], where: str) -> Callable[..., Any]:
    def wrong(port: Any, right: Any) -> Any:
        def linear(weights: Any, name: str, x: Any) -> Any:
            if where not in name:
                return right(weights, name, x)
            return port.kept(name, change(x, weights[f"{name}.weight"], weights[f"{name}.bias"]))

        return linear

    return wrong


def of_chunks(order: list[int], where: str) -> Callable[..., Any]:
    def wrong(port: Any, right: Any) -> Any:
        def chunks_of(weights: Any, name: str, vec: Any, count: int) -> Any:
            chunks = right(weights, name, vec, count)
            return [chunks[i] for i in order] if where in name else chunks

        return chunks_of

    return wrong


def of_attention(port: Any, right: Any, scale: Callable[[Any], float], causal: bool = False) -> Any:
    def attention(q: Any, k: Any, v: Any) -> Any:
        scores = q @ k.swapaxes(-1, -2) * scale(q)
        if causal:
            scores = np.where(np.tri(q.shape[2], dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        joined = (weights / weights.sum(-1, keepdims=True)) @ v
        return joined.transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], -1)

    return attention


def heads_as(shape: tuple[str, ...], order: tuple[int, ...]) -> Callable[..., Any]:
    def wrong(port: Any, right: Any) -> Any:
        def heads_of(qkv: Any, heads: int) -> Any:
            b, tokens, _ = qkv.shape
            sizes = {"3": 3, "h": heads, "d": -1}
            return qkv.reshape(b, tokens, *(sizes[s] for s in shape)).transpose(order)

        return heads_of

    return wrong


def mlp_of_the_input(port: Any, right: Any) -> Any:
    def updated(weights: Any, block: str, stream: str, x: Any, attended: Any, chunks: Any) -> Any:
        after = x + chunks[2] * port.linear(weights, f"{block}.{stream}_attn.proj", attended)
        a = port.kept(f"{block}.{stream}_mlp:0", port.modulated(x, chunks[3], chunks[4]))
        return after + chunks[5] * port.linear(
            weights, f"{block}.{stream}_mlp.2", port.gelu(port.linear(weights, f"{block}.{stream}_mlp.0", a))
        )

    return updated


def without_gates(port: Any, right: Any) -> Any:
    def updated(weights: Any, block: str, stream: str, x: Any, attended: Any, chunks: Any) -> Any:
        return right(weights, block, stream, x, attended, [*chunks[:2], 1.0, *chunks[3:5], 1.0])

    return updated


def sinusoid(factor: float = 1000.0, divisor: int = 128, sine_first: bool = False, dtype: Any = np.float64) -> Any:
    def wrong(port: Any, right: Any) -> Any:
        def made(times: Any) -> Any:
            frequencies = np.exp(-np.log(10000) * np.arange(128) / divisor).astype(dtype)
            angles = (factor * times).astype(dtype)[:, None] * frequencies
            parts = [np.cos(angles), np.sin(angles)]
            return np.concatenate(parts[::-1] if sine_first else parts, -1)

        return made

    return wrong


Q_NORM = "double_blocks.0.img_attn.norm.query_norm"
IN = "double_blocks.0.img_attn.qkv:0"
MOD = "double_blocks.0.img_mod.lin"
HIDDEN = "double_blocks.0.img_mlp.2"
FLUX = {
    "rms eps 1e-5": Bug("rms_norm", rms(1e-5), Q_NORM, "RMS norm's epsilon is 1e-5"),
    "rms eps of float32": Bug("rms_norm", rms(2.0**-23), Q_NORM, "RMS norm's epsilon is float32's"),
    "rms without gain": Bug("rms_norm", rms(1e-6, lambda s: 1.0), Q_NORM, "gain is left out"),
    "rms gain 1 + w": Bug("rms_norm", rms(1e-6, lambda s: 1 + s), Q_NORM, "gain is taken as 1 + weight"),
    "no q, k norm": Bug("rms_norm", lambda p, r: lambda x, s: x, Q_NORM, "RMS norm is left out"),
    "layer norm eps 1e-5": Bug(
        "layer_norm", lambda p, r: lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5),
        IN, "layer norm's epsilon is 1e-5",
    ),
    "layer norm without mean": Bug(
        "layer_norm", lambda p, r: lambda x: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6), IN, "an RMS norm in place",
    ),
    "shift and scale": Bug("modulated", lambda p, r: lambda x, shift, scale: r(x, scale, shift), IN, "shift and scale are exchanged"),
    "scale for 1 + scale": Bug("modulated", lambda p, r: lambda x, shift, scale: r(x, shift, scale - 1), IN, "scale in place of 1 + scale"),
    "no shift": Bug("modulated", lambda p, r: lambda x, shift, scale: r(x, 0, scale), IN, "the shift is left out"),
    "final shift and scale": Bug(
        "final_modulated", lambda p, r: lambda x, c: r(x, c[::-1]), "final_layer.linear:0", "shift and scale are exchanged",
    ),
    "mlp's chunks first": Bug("chunks_of", of_chunks([3, 4, 5, 0, 1, 2], "_mod."), IN, "chunks of MLP and attention"),
    "gate first": Bug("chunks_of", of_chunks([1, 2, 0], "single"), "single_blocks.0.linear1:0", "gate, shift, scale"),
    "no silu": Bug("silu", lambda p, r: lambda x: x, "time_in.out_layer", "SiLU is left out"),
    "gelu erf": Bug(
        "gelu", lambda p, r: lambda x: torch.nn.functional.gelu(torch.from_numpy(x)).numpy(), HIDDEN, "erf form of GELU",
    ),
    "quick gelu": Bug("gelu", lambda p, r: lambda x: x / (1 + np.exp(-1.702 * x)), HIDDEN, "quick GELU"),
    "silu for gelu": Bug("gelu", lambda p, r: lambda x: x / (1 + np.exp(-x)), HIDDEN, "SiLU in place of GELU"),
    "relu for gelu": Bug("gelu", lambda p, r: lambda x: np.maximum(x, 0), HIDDEN, "ReLU in place of GELU"),
    "square transposed": Bug(
        "linear", of_linear(lambda x, w, b: x @ w + b, "attn.proj"), "double_blocks.0.img_attn.proj", "square matrix is transposed",
    ),
    "matrix reshaped": Bug(
        "linear", of_linear(lambda x, w, b: x @ w.reshape(w.shape[::-1]) + b, "qkv"), "double_blocks.0.img_attn.qkv", "other order",
    ),
    "no bias": Bug("linear", of_linear(lambda x, w, b: x @ w.T, "linear2"), "single_blocks.0.linear2", "bias is left out"),
    "scores not scaled": Bug("attention", lambda p, r: of_attention(p, r, lambda q: 1.0), "double_blocks.0.attention", "not scaled"),
    "scores by width": Bug(
        "attention", lambda p, r: of_attention(p, r, lambda q: (q.shape[1] * q.shape[3]) ** -0.5), "double_blocks.0.attention",
        "scaled by the whole width",
    ),
    "causal": Bug("attention", lambda p, r: of_attention(p, r, lambda q: q.shape[3] ** -0.5, True), "double_blocks.0.attention", "causal"),
    "heads merged": Bug(
        "attention", lambda p, r: lambda q, k, v: (
            r(q, k, v).reshape(q.shape[0], q.shape[2], q.shape[1], -1).swapaxes(-1, -2).reshape(q.shape[0], q.shape[2], -1)
        ), "double_blocks.0.attention", "heads are joined as (features, heads)",
    ),
    "qkv by head": Bug("heads_of", heads_as(("h", "3", "d"), (3, 0, 2, 1, 4)), Q_NORM, "(heads, 3, features)"),
    "qkv head last": Bug("heads_of", heads_as(("3", "d", "h"), (2, 0, 4, 1, 3)), Q_NORM, "(3, features, heads)"),
    "q and k": Bug("heads_of", lambda p, r: lambda qkv, h: r(qkv, h)[[1, 0, 2]], Q_NORM, "q and k are exchanged"),
    "k and v": Bug(
        "heads_of", lambda p, r: lambda qkv, h: r(qkv, h)[[0, 2, 1]], "double_blocks.0.img_attn.norm.key_norm", "k and v are exchanged",
    ),
    "rope halves": Bug("rotated", lambda p, r: halves_rotated, "double_blocks.0.q_rope", "rotation of halves"),
    "rope backwards": Bug("rotated", lambda p, r: lambda x, c, s: r(x, c, -s), "double_blocks.0.q_rope", "opposite direction"),
    "no rope": Bug("rotated", lambda p, r: lambda x, c, s: x, "double_blocks.0.q_rope", "rotation is left out"),
    "rope rows, columns": Bug("rope_table", lambda p, r: lambda i, a, t: r(i[:, [0, 2, 1]], a, t), "rope.cos", "rows and columns"),
    "rope theta": Bug("rope_table", lambda p, r: lambda i, a, t: r(i, a, 1000), "rope.cos", "not 10000 but 1000"),
    "rope from 1": Bug("rope_table", lambda p, r: lambda i, a, t: r(i + 1, a, t), "rope.cos", "start at 1"),
    "image first": Bug("joined_streams", lambda p, r: lambda t, i: r(i, t), "double_blocks.0.q_rope", "joined is in the other order"),
    "no gates": Bug("updated", without_gates, "double_blocks.0.img_mlp:0", "gates are left out"),
    "mlp of the input": Bug("updated", mlp_of_the_input, "double_blocks.0.img_mlp:0", "reads the stream before"),
    "time scale": Bug("sinusoid", sinusoid(factor=1.0), "time.sinusoid", "scale of 1 in place of 1000"),
    "sine first": Bug("sinusoid", sinusoid(sine_first=True), "time.sinusoid", "sines first"),
    "half - 1": Bug("sinusoid", sinusoid(divisor=127), "time.sinusoid", "half - 1"),
    "sinusoid in float32": Bug("sinusoid", sinusoid(dtype=np.float32), "time.sinusoid", "computed in float32"),
}  # fmt: skip


# Stable Diffusion 3.5 --------------------------------------------------------------------------------------------------


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


X_IN = "joint_blocks.0.x_block.attn.qkv:0"
LN_Q = "joint_blocks.0.x_block.attn.ln_q"
PLACES = {IN: X_IN, Q_NORM: LN_Q, HIDDEN: "joint_blocks.0.x_block.mlp.fc2", "time.sinusoid": "t_embedder.freq",
    "double_blocks.0.attention": "joint_blocks.0.attention", "double_blocks.0.img_attn.norm.key_norm": "joint_blocks.0.x_block.attn.ln_k",
    "time_in.out_layer": "t_embedder.mlp.2", "final_layer.linear:0": "final_layer.linear:0",
}  # fmt: skip
SD35 = {  # those of Flux that this network can have, at their places here
    name: replace(bug, first=PLACES[bug.first]) for name, bug in FLUX.items() if bug.first in PLACES and bug.function not in ("linear", "chunks_of")
} | {
    "mlp of the input": Bug("updated", late_mlp, "joint_blocks.0.x_block.mlp:0", "reads the stream before"),
    "no bias": Bug("linear", of_linear(lambda x, w, b: x @ w.T, "attn.proj"), "joint_blocks.0.x_block.attn.proj", "bias is left out"),
    "image first": Bug("joined_streams", lambda p, r: lambda t, i: r(i, t), "joint_blocks.0.attention", "joined is in the other order"),
    "patches read": Bug("patches", patches_channel_last, "x_in", "2 x 2 patches are read as"),
    "patches written": Bug("unpatched", patches_channel_first, "output", "2 x 2 patches are written as (channel"),
    "table's corner": Bug("middle", lambda p, r: lambda table, side, h, w: table.reshape(side, side, -1)[:h, :w].reshape(1, h * w, -1), "pos_embed.crop", "upper left corner"),
}  # fmt: skip


# the autoencoder --------------------------------------------------------------------------------------------------------


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
    "log-variance": Bug("mean_of", lambda p, r: lambda moments: np.split(moments, 2, 1)[1], "latents.mode", "log-variance is taken"),
}  # fmt: skip


# the UNet --------------------------------------------------------------------------------------------------------------


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
    "bilinear": Bug("larger", bilinear, "output_blocks.2.2.conv", "bilinear in place of nearest"),
    "half - 1": Bug(
        "sinusoid", lambda p, r: lambda t, width: np.concatenate([
            f(t[:, None] * np.exp(-np.log(10000) * np.arange(width // 2) / (width // 2 - 1))) for f in (np.cos, np.sin)
        ], -1), "time_embed:0", "half - 1",
    ),
}  # fmt: skip


# CLIP and T5 ------------------------------------------------------------------------------------------------------------


def norm_with(change: Callable[[Any, Any, Any], Any], where: str = "") -> Callable[..., Any]:
    """Of CLIP's layer norms: `change(x, gain, offset)`."""

    def wrong(port: Any, right: Any) -> Any:
        def norm(weights: Any, name: str, x: Any) -> Any:
            if where not in name:
                return right(weights, name, x)
            return port.kept(name, change(x, weights[f"{name}.weight"], weights[f"{name}.bias"]))

        return norm

    return wrong


def layer_normed(x: Any, eps: float) -> Any:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def rms_with(change: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Of T5's norms: `change(x, gain)`."""
    return lambda port, right: lambda weights, name, x: port.kept(name, change(x, weights[f"{name}.weight"]))


def rms_normed(x: Any, eps: float) -> Any:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def of_matrix(change: Callable[[Any], Any], where: str) -> Callable[..., Any]:
    def wrong(port: Any, right: Any) -> Any:
        def linear(weights: Any, name: str, x: Any) -> Any:
            matrix = weights[f"{name}.weight"]
            return right({**weights, f"{name}.weight": change(matrix) if where in name else matrix}, name, x)

        return linear

    return wrong


def heads_merged(port: Any, right: Any) -> Any:
    def joined(x: Any, share: Any, v: Any) -> Any:
        return right(x, share, v).reshape(*x.shape[:2], v.shape[1], -1).swapaxes(-1, -2).reshape(*x.shape[:2], -1)

    return joined


def positions_as(change: Callable[[Any], Any]) -> Callable[..., Any]:
    name = "text_model.embeddings.position_embedding.weight"
    return lambda port, right: lambda weights, ids: right({**weights, name: change(weights[name])}, ids)


def zeros_behind_the_end(port: Any, right: Any) -> Any:
    return lambda ids, end: np.where((ids == end).cumsum(1) > (ids == end), 0, ids)


def look_back(port: Any, right: Any) -> Any:
    def bucket_of(distance: Any) -> Any:
        far = np.maximum(-distance, 0)
        wide = 16 + (np.log(np.maximum(far, 1) / 16) / np.log(128 / 16) * 16).astype(int)
        return np.where(far < 16, far, np.minimum(wide, 31))

    return bucket_of


def up_to_64(port: Any, right: Any) -> Any:
    def bucket_of(distance: Any) -> Any:
        far = np.abs(distance)
        wide = 8 + (np.log(np.maximum(far, 1) / 8) / np.log(64 / 8) * 8).astype(int)
        return np.where(far < 8, far, np.minimum(wide, 15)) + 16 * (distance > 0)

    return bucket_of


def bias_once(port: Any, right: Any) -> Any:
    return lambda weights, name, x, bias, *rest: right(
        weights, name, x, bias if ".block.0." in name else 0 * bias, *rest
    )


def first_pool(place: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda port, right: lambda last, ids, end: place(last, ids)


LAYER = "text_model.encoder.layers.0"
ATTENDED, ACTIVATED, NORM1 = f"{LAYER}.self_attn.attended", f"{LAYER}.mlp.activated", f"{LAYER}.layer_norm1"
TOKENS = "text_model.embeddings.token_embedding"
CLIP = {
    "layer norm eps 1e-6": Bug("layer_norm", norm_with(lambda x, w, b: layer_normed(x, 1e-6) * w + b), NORM1, "layer norm's epsilon is 1e-6"),
    "layer norm eps 1e-12": Bug("layer_norm", norm_with(lambda x, w, b: layer_normed(x, 1e-12) * w + b), NORM1, "layer norm's epsilon is 1e-12"),
    "no gain": Bug("layer_norm", norm_with(lambda x, w, b: layer_normed(x, 1e-5)), NORM1, "layer norm's gain and offset"),
    "no final norm": Bug("layer_norm", norm_with(lambda x, w, b: x, "final"), "text_model.final_layer_norm", "layer norm is left out"),
    "erf gelu": Bug("activated", lambda p, r: lambda x, kind: r(x, "gelu"), ACTIVATED, "erf form of GELU in place of quick"),
    "tanh gelu": Bug("activated", lambda p, r: lambda x, kind: p.gelu(x), ACTIVATED, "tanh form of GELU in place of quick"),
    "silu": Bug("activated", lambda p, r: lambda x, kind: x / (1 + np.exp(-x)), ACTIVATED, "SiLU in place of quick GELU"),
    "quick gelu of G": Bug("activated", lambda p, r: lambda x, kind: r(x, "quick_gelu"), ACTIVATED, "quick GELU, x * sigmoid(1.702 x)"),
    "tanh gelu of G": Bug("activated", lambda p, r: lambda x, kind: p.gelu(x), ACTIVATED, "tanh form of GELU in place of erf"),
    "no mask": Bug("masked", lambda p, r: lambda scores: scores, ATTENDED, "mask is left out"),
    "scores not scaled": Bug("clip_scores", lambda p, r: lambda q, k: p.masked(q @ k.swapaxes(-1, -2)), ATTENDED, "scores are not scaled"),
    "scores by width": Bug(
        "clip_scores", lambda p, r: lambda q, k: p.masked(q @ k.swapaxes(-1, -2) / (q.shape[1] * q.shape[3]) ** 0.5), ATTENDED, "whole width",
    ),
    "heads inside": Bug(
        "heads_of", lambda p, r: lambda x, heads: x.reshape(*x.shape[:2], -1, heads).transpose(0, 3, 1, 2), ATTENDED, "heads are cut as (features",
    ),
    "half the heads": Bug("heads_of", lambda p, r: lambda x, heads: r(x, heads // 2), ATTENDED, "half as many heads"),
    "twice the heads": Bug("heads_of", lambda p, r: lambda x, heads: r(x, heads * 2), ATTENDED, "twice as many heads"),
    "heads merged": Bug("shared_out", heads_merged, ATTENDED, "heads are joined as"),
    "padded with 0": Bug("padded", zeros_behind_the_end, TOKENS, "padded with 0"),
    "positions from 1": Bug("embedded", positions_as(lambda w: np.concatenate([w[1:], w[-1:]])), "hidden.0", "positions start at 1"),
    "no positions": Bug("embedded", positions_as(lambda w: 0 * w), "hidden.0", "embedding of positions is left out"),
    "pooled at the last": Bug("pooled", first_pool(lambda last, ids: last[:, -1]), "pooled", "at the last token"),
    "pooled at the first": Bug("pooled", first_pool(lambda last, ids: last[:, 0]), "pooled", "at the first token"),
    "pooled at the largest": Bug("pooled", first_pool(lambda last, ids: last[np.arange(len(ids)), ids.argmax(1)]), "pooled", "at the largest id"),
    "pooled mean": Bug("pooled", first_pool(lambda last, ids: last.mean(1)), "pooled", "mean of all tokens"),
    "last layer": Bug("taken", lambda p, r: lambda hidden, norm: hidden[-1], "penultimate", "the last layer's state is taken"),
    "last but two": Bug("taken", lambda p, r: lambda hidden, norm: hidden[-3], "penultimate", "last but two"),
    "normed": Bug("taken", lambda p, r: lambda hidden, norm: norm(hidden[-2]), "penultimate", "final norm is applied"),
    "transposed": Bug("linear", of_matrix(lambda w: w.T, "layers.0.self_attn.q_proj"), f"{LAYER}.self_attn.q_proj", "square matrix is transposed"),
    "matrix reshaped": Bug("linear", of_matrix(lambda w: w.reshape(w.shape[::-1]).T, "layers.0.mlp.fc1"), f"{LAYER}.mlp.fc1", "other order"),
}  # fmt: skip
BLOCK = "encoder.block.0.layer"
T5_NORM, T5_ATTENDED, GATED = (
    f"{BLOCK}.0.layer_norm",
    f"{BLOCK}.0.SelfAttention.attended",
    f"{BLOCK}.1.DenseReluDense.gated",
)
BIAS = f"{BLOCK}.0.SelfAttention.relative_attention_bias"
T5 = {
    "rms eps 1e-5": Bug("rms_norm", rms_with(lambda x, w: rms_normed(x, 1e-5) * w), T5_NORM, "RMS norm's epsilon is 1e-5"),
    "rms eps of float32": Bug("rms_norm", rms_with(lambda x, w: rms_normed(x, 2.0**-23) * w), T5_NORM, "epsilon is float32's"),
    "no gain": Bug("rms_norm", rms_with(lambda x, w: rms_normed(x, 1e-6)), T5_NORM, "gain is left out"),
    "gain 1 + w": Bug("rms_norm", rms_with(lambda x, w: rms_normed(x, 1e-6) * (1 + w)), T5_NORM, "1 + weight"),
    "layer norm": Bug("rms_norm", rms_with(lambda x, w: layer_normed(x, 1e-6) * w), T5_NORM, "layer norm in place of the RMS"),
    "no final norm": Bug("final_norm", lambda p, r: lambda weights, x: p.kept("encoder.final_layer_norm", x), "encoder.final_layer_norm", "RMS norm is left out"),
    "scores scaled": Bug(
        "t5_scores", lambda p, r: lambda q, k, bias: q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5 + bias.transpose(2, 0, 1), T5_ATTENDED,
        "which T5 does not do",
    ),
    "no bias": Bug("t5_scores", lambda p, r: lambda q, k, bias: r(q, k, 0 * bias), T5_ATTENDED, "mask is left out"),
    "bias once": Bug("t5_attention", bias_once, "encoder.block.1.layer.0.SelfAttention.attended", "first block alone"),
    "other sign": Bug("bucket_of", lambda p, r: lambda distance: r(-distance), BIAS, "query minus key"),
    "looks back": Bug("bucket_of", look_back, BIAS, "look back only"),
    "up to 64": Bug("bucket_of", up_to_64, BIAS, "end at 64"),
    "a bucket for each": Bug("bucket_of", lambda p, r: lambda d: np.minimum(abs(d), 15) + 16 * (d > 0), BIAS, "a bucket for each distance"),
    "padding masked": Bug(
        "seen", lambda p, r: lambda scores, ids: np.where((ids != 0)[:, None, None], scores, -np.inf), T5_ATTENDED, "hides T5's padding",
    ),
    "embedding scaled": Bug("looked_up", lambda p, r: lambda weights, ids: p.kept("shared", r(weights, ids) * 32**0.5), "shared", "square root of its width"),
    "erf gelu": Bug("gated", lambda p, r: lambda gate, value: torch_gelu("none")(p, r)(gate) * value, GATED, "erf form of GELU"),
    "relu": Bug("gated", lambda p, r: lambda gate, value: np.maximum(gate, 0) * value, GATED, "ReLU in place of GELU"),
    "silu": Bug("gated", lambda p, r: lambda gate, value: gate / (1 + np.exp(-gate)) * value, GATED, "SiLU in place of GELU"),
    "quick gelu": Bug("gated", lambda p, r: lambda gate, value: gate / (1 + np.exp(-1.702 * gate)) * value, GATED, "quick GELU"),
    "gate on wi_1": Bug("gated", lambda p, r: lambda gate, value: r(value, gate), GATED, "activation is on wi_1"),
    "heads merged": Bug("shared_out", heads_merged, T5_ATTENDED, "heads are joined as"),
    "matrix reshaped": Bug("linear", of_matrix(lambda w: w.reshape(w.shape[::-1]).T, "block.0.layer.0.SelfAttention.q"), f"{BLOCK}.0.SelfAttention.q", "other order"),
}  # fmt: skip
BUGS = {"flux": FLUX, "mmdit": SD35, "vae": VAE, "unet": UNET, "clip": CLIP, "t5": T5}
# a case on which an error shows, where it is not the family's usual one
USUAL = {
    "flux": "flux-dev-tiny",
    "mmdit": "sd35-large-tiny",
    "vae": "ae-eps",
    "unet": "sdxl-eps",
    "clip": "text-clip-l-tiny",
    "t5": "text-t5-tiny",
}
EPSILONS = {"flux": "flux-eps", "mmdit": "sd3-eps"}
# functions of a port whose errors are in one stretch between two values of its trace, where one hides the other
STRETCHES = (
    ("rms_norm", "heads_of", "attention", "joined_streams"), ("modulated", "layer_norm", "chunks_of", "updated", "final_modulated"),
    ("masked", "clip_scores", "heads_of", "shared_out", "t5_scores", "t5_attention", "seen"), ("embedded", "padded", "looked_up"),
    ("group_norm", "norm", "of_block", "of_transformer", "silu"), ("conv", "residual", "from_latents", "larger"), ("gelu", "gated"),
)  # fmt: skip


def case_of(family: str, names: Sequence[str]) -> str:
    """The golden case on which these errors show."""
    if any(name.endswith(" of G") for name in names):
        return "text-clip-g-tiny"
    return EPSILONS.get(family, USUAL[family]) if any("eps" in name for name in names) else USUAL[family]


def alone(family: str, dtype: type = np.float64) -> list[str]:
    """Every error of a family that one can make in this dtype: a float32 port computes its sinusoid in float32 in any case."""
    return [name for name in BUGS[family] if dtype is np.float64 or name != "sinusoid in float32"]


def triples(family: str, dtype: type = np.float64) -> list[tuple[str, ...]]:
    """Every error once at least, in threes of which none hides another."""
    left = {
        n: BUGS[family][n]
        for n in alone(family, dtype)
        if case_of(family, [n]) in (USUAL[family], EPSILONS.get(family))
    }
    found = []
    waiting = list(left)
    while waiting:
        chosen = [waiting.pop(0)]
        for name in [*waiting, *left]:
            if len(chosen) < 3 and not any(_hide(left[name], left[other]) for other in chosen):
                chosen.append(name)
        waiting = [name for name in waiting if name not in chosen]
        found.append(tuple(chosen))
    return found


def _hide(one: Bug, other: Bug) -> bool:
    same = any(one.function in functions and other.function in functions for functions in STRETCHES)
    return same or one.function == other.function or one.first == other.first
