"""Errors of a port of Flux."""

from collections.abc import Callable
from itertools import count
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


def of_layer(change: Callable[[Any, Any, Any], Any], where: str = "") -> Callable[..., Any]:
    """Of the linear layers or norms whose name has `where` in it: `change(x, weight, bias)`."""

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


def without_gates(*numbers: int) -> Callable[..., Any]:
    def wrong(port: Any, right: Any) -> Any:
        return lambda *given: right(*given[:-1], [1.0 if i in numbers else c for i, c in enumerate(given[-1])])

    return wrong


def gates_exchanged(port: Any, right: Any) -> Any:
    return lambda *given: right(*given[:-1], [given[-1][i] for i in (0, 1, 5, 3, 4, 2)])


def every_second(change: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Of a function that is called for q and k, or for time and guidance, in turn: the second call."""

    def wrong(port: Any, right: Any) -> Any:
        calls = count()
        return lambda *given: change(port, right)(*given) if next(calls) % 2 else right(*given)

    return wrong


def of_image(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """Of the rotary positions: those of the image's tokens, which follow the text's zeros."""

    def wrong(port: Any, right: Any) -> Any:
        def rope_table(ids: Any, axes: Any, theta: Any) -> Any:
            text = int(ids.any(-1).argmax()) - 1
            return right(np.concatenate([ids[:text], change(ids[text:])]), axes, theta)

        return rope_table

    return wrong


def text_counted(port: Any, right: Any) -> Any:
    def rope_table(ids: Any, axes: Any, theta: Any) -> Any:
        text, ids = int(ids.any(-1).argmax()) - 1, ids.copy()
        ids[:text, 1] = np.arange(text)
        return right(ids, axes, theta)

    return rope_table


def of_the_whole_head(port: Any, right: Any) -> Any:
    def rope_table(ids: Any, axes: Any, theta: Any) -> Any:
        angles = [ids[:, i, None] * theta ** -(np.arange(0, w, 2) / sum(axes)) for i, w in enumerate(axes)]
        joined = np.concatenate(angles, -1)
        return np.cos(joined), np.sin(joined)

    return rope_table


def rope_in_float32(port: Any, right: Any) -> Any:
    def rope_table(ids: Any, axes: Any, theta: Any) -> Any:
        frequencies = [(theta ** -(np.arange(0, w, 2) / w)).astype(np.float32) for w in axes]
        joined = np.concatenate([ids[:, i, None].astype(np.float32) * f for i, f in enumerate(frequencies)], -1)
        return np.cos(joined), np.sin(joined)

    return rope_table


def without_silu(port: Any, right: Any) -> Any:
    return lambda weights, name, vec, count: np.split(port.linear(weights, name, vec)[:, None], count, -1)


def norms_of(stream: str, take: Callable[[str], str]) -> Callable[..., Any]:
    """Gains of the norms of q and k that are those of another name."""

    def wrong(port: Any, right: Any) -> Any:
        def attention_inputs(weights: Any, name: str, *rest: Any) -> Any:
            own = {
                f"{name}.norm.{n}_norm.scale": weights[take(f"{name}.norm.{n}_norm.scale")] for n in ("query", "key")
            }
            return right(weights | own if stream in name else weights, name, *rest)

        return attention_inputs

    return wrong


def exchanged(name: str) -> str:
    return name.replace("query", "-").replace("key", "query").replace("-", "key")


def image_first_in_single(port: Any, right: Any) -> Any:
    port.modules[0].image_of = lambda x, length: x[:, :-length]
    return lambda text, image: right(image, text)


def last_text_unchanged(port: Any, right: Any) -> Any:
    def double_block(weights: Any, block: str, image: Any, text: Any, *rest: Any) -> Any:
        after = right(weights, block, image, text, *rest)
        return (after[0], port.kept(f"{block}.text", text)) if block == "double_blocks.1" else after

    return double_block


def single_as(late_norm: bool = False, residual: bool = True) -> Callable[..., Any]:
    def wrong(port: Any, right: Any) -> Any:
        def single_block(weights: Any, block: str, x: Any, vec: Any, rope: Any, heads: int) -> Any:
            shift, scale, gate = port.chunks_of(weights, f"{block}.modulation.lin", vec, 3)
            normed = port.kept(f"{block}.linear1:0", port.modulated(x, shift, scale))
            qkv, mlp = np.split(port.linear(weights, f"{block}.linear1", normed), [3 * x.shape[-1]], -1)
            *both, v = port.heads_of(qkv, heads)
            turned = []
            for part, n, letter in zip(both, ("query", "key"), "qk", strict=True):
                name, part = f"{block}.norm.{n}_norm", port.rotated(part, *rope) if late_norm else part
                part = port.kept(name, port.rms_norm(part, weights[f"{name}.scale"]))
                turned.append(port.kept(f"{block}.{letter}_rope", part if late_norm else port.rotated(part, *rope)))
            attended = port.kept(f"{block}.attention", port.attention(*turned, v))
            out = port.linear(weights, f"{block}.linear2", np.concatenate([attended, port.gelu(mlp)], -1))
            return port.kept(block, (x if residual else normed) + gate * out)

        return single_block

    return wrong


def left_out(where: str) -> Callable[..., Any]:
    """Of what is added to the conditioning vector."""
    return lambda port, right: lambda weights, name, x: right(weights, name, x) * (name != where)


def rounded_to_bfloat16(x: Any) -> Any:
    return torch.from_numpy(x).bfloat16().double().numpy().astype(x.dtype)


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
        "linear", of_layer(lambda x, w, b: x @ w + b, "attn.proj"), "double_blocks.0.img_attn.proj", "square matrix is transposed",
    ),
    "matrix reshaped": Bug(
        "linear", of_layer(lambda x, w, b: x @ w.reshape(w.shape[::-1]) + b, "qkv"), "double_blocks.0.img_attn.qkv", "other order",
    ),
    "no bias": Bug("linear", of_layer(lambda x, w, b: x @ w.T, "linear2"), "single_blocks.0.linear2", "bias is left out"),
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
    "no gates": Bug("updated", without_gates(2, 5), "double_blocks.0.img_mlp:0", "gates are left out"),
    "mlp of the input": Bug("updated", mlp_of_the_input, "double_blocks.0.img_mlp:0", "reads the stream before"),
    "time scale": Bug("sinusoid", sinusoid(factor=1.0), "time.sinusoid", "scale of 1 in place of 1000"),
    "sine first": Bug("sinusoid", sinusoid(sine_first=True), "time.sinusoid", "sines first"),
    "half - 1": Bug("sinusoid", sinusoid(divisor=127), "time.sinusoid", "half - 1"),
    "attention's gate": Bug("updated", without_gates(2), "double_blocks.0.img_mlp:0", "attention's gate is left out"),
    "gates exchanged": Bug("updated", gates_exchanged, "double_blocks.0.img_mlp:0", "gates of attention and MLP are exchanged"),
    "mlp's gate": Bug("updated", without_gates(5), "double_blocks.0.image", "MLP's gate is left out"),
    "rope on q alone": Bug("rotated", every_second(lambda p, r: lambda x, c, s: x), "double_blocks.0.k_rope", "rotation is left out"),
    "rope of the image from 1": Bug("rope_table", of_image(lambda ids: ids + [0, 1, 1]), "rope.cos", "image's rotary positions start at 1"),
    "rope spread": Bug("rope_table", of_image(lambda ids: ids * 63 / np.maximum(ids.max(0), 1)), "rope.cos", "spread over 0 to 63"),
    "rope of the text": Bug("rope_table", text_counted, "rope.cos", "text's rotary positions are counted"),
    "rope of the head": Bug("rope_table", of_the_whole_head, "rope.cos", "span the whole head"),
    "rope in float32": Bug("rope_table", rope_in_float32, "rope.cos", "rounded to float32"),
    "no silu before modulation": Bug("chunks_of", without_silu, MOD, "SiLU is left out"),
    "norms of q and k": Bug("attention_inputs", norms_of("attn", exchanged), Q_NORM, "norms of q and k are exchanged"),
    "image's norms": Bug(
        "attention_inputs", norms_of("txt", lambda name: name.replace("txt", "img")), "double_blocks.0.txt_attn.norm.query_norm",
        "image's norms of q and k are the text's",
    ),
    "image first in single": Bug("one_sequence", image_first_in_single, "single_blocks.0.linear1:0", "before the text in the single blocks"),
    "first tokens": Bug("image_of", lambda p, r: lambda x, length: x[:, :-length], "final_layer.linear:0", "first tokens are taken"),
    "last text": Bug("double_block", last_text_unchanged, "double_blocks.1.text", "leaves the text as it was"),
    "single norms late": Bug("single_block", single_as(late_norm=True), "single_blocks.0.norm.query_norm", "norms q and k behind the rotation"),
    "single residual": Bug("single_block", single_as(residual=False), "single_blocks.0", "adds to what was normed"),
    "no pooled": Bug("vector_mlp", left_out("vector_in"), "vec", "pooled text is left out"),
    "no guidance": Bug("vector_mlp", left_out("guidance_in"), "vec", "guidance embedding is left out"),
    "guidance scale": Bug("sinusoid", every_second(lambda p, r: lambda g: r(g / 1000)), "guidance.sinusoid", "guidance is on the scale of 1"),
    "guidance in bfloat16": Bug(
        "sinusoid", every_second(lambda p, r: lambda g: r(rounded_to_bfloat16(1000 * g) / 1000)), "guidance.sinusoid", "bfloat16 behind the factor",
    ),
    "sinusoid in float32": Bug("sinusoid", sinusoid(dtype=np.float32), "time.sinusoid", "computed in float32"),
}  # fmt: skip
