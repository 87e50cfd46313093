"""Errors of ports of CLIP and T5."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.bugs.flux import of_layer
from tests.bugs.unet import torch_gelu
from tests.ports import Bug


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


def q_and_k(port: Any, right: Any) -> Any:
    """Of the attention of CLIP or T5: the weights of both are exchanged."""

    def attention(weights: Any, name: str, *rest: Any) -> Any:
        pairs = [
            (n, n.replace(".q", ".-").replace(".k", ".q").replace(".-", ".k")) for n in weights if n.startswith(name)
        ]
        return right(weights | {n: weights[other] for n, other in pairs}, name, *rest)

    return attention


def padding_hidden(port: Any, right: Any) -> Any:
    """CLIP with a mask that hides what follows the first end token."""
    seen: list[Any] = []

    def padded(ids: Any, end: int) -> Any:
        seen.append(((ids == end).cumsum(1) <= (ids == end))[:, None, None])
        return ids

    port.modules[-1].padded = padded
    return lambda q, k: np.where(seen[-1], right(q, k), -np.inf)


def pooled_of_layer(number: int) -> Callable[..., Any]:
    """The pooled state before the final norm, of the last layer, the last but one, ..."""

    def wrong(port: Any, right: Any) -> Any:
        states: list[Any] = []
        layer = port.clip_layer
        port.modules[-1].clip_layer = lambda *given: states.append(layer(*given)) or states[-1]
        return lambda last, ids, end: right(states[number], ids, end)

    return wrong


def first_pool(place: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda port, right: lambda last, ids, end: place(last, ids)


LAYER = "text_model.encoder.layers.0"
ATTENDED, ACTIVATED, NORM1 = f"{LAYER}.self_attn.attended", f"{LAYER}.mlp.activated", f"{LAYER}.layer_norm1"
TOKENS = "text_model.embeddings.token_embedding"
CLIP = {
    "layer norm eps 1e-6": Bug("layer_norm", of_layer(lambda x, w, b: layer_normed(x, 1e-6) * w + b), NORM1, "layer norm's epsilon is 1e-6"),
    "layer norm eps 1e-12": Bug("layer_norm", of_layer(lambda x, w, b: layer_normed(x, 1e-12) * w + b), NORM1, "layer norm's epsilon is 1e-12"),
    "no gain": Bug("layer_norm", of_layer(lambda x, w, b: layer_normed(x, 1e-5)), NORM1, "layer norm's gain and offset"),
    "no final norm": Bug("layer_norm", of_layer(lambda x, w, b: x, "final"), "text_model.final_layer_norm", "layer norm is left out"),
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
    "normed last": Bug("taken", lambda p, r: lambda hidden, norm: norm(hidden[-1]), "penultimate", "the last layer's state with the final norm"),
    "pooled without norm": Bug("pooled", pooled_of_layer(-1), "pooled", "before the final norm"),
    "pooled of the last but one": Bug("pooled", pooled_of_layer(-2), "pooled", "from the last but one layer"),
    "no projection": Bug("projected", lambda p, r: lambda weights, one: p.kept("projected", one), "projected", "projection of the pooled state is left out"),
    "padding hidden": Bug("clip_scores", padding_hidden, ATTENDED, "a mask hides the padding"),
    "q and k": Bug("clip_attention", q_and_k, f"{LAYER}.self_attn.q_proj", "q and k are exchanged"),
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
        "seen", lambda p, r: lambda scores, ids: np.where((ids != 0)[:, None, None], scores, -np.inf), T5_ATTENDED, "hides the padding",
    ),
    "q and k": Bug("t5_attention", q_and_k, f"{BLOCK}.0.SelfAttention.q", "q and k are exchanged"),
    "embedding scaled": Bug("looked_up", lambda p, r: lambda weights, ids: p.kept("shared", r(weights, ids) * 32**0.5), "shared", "square root of its width"),
    "erf gelu": Bug("gated", lambda p, r: lambda gate, value: torch_gelu("none")(p, r)(gate) * value, GATED, "erf form of GELU"),
    "relu": Bug("gated", lambda p, r: lambda gate, value: np.maximum(gate, 0) * value, GATED, "ReLU in place of GELU"),
    "silu": Bug("gated", lambda p, r: lambda gate, value: gate / (1 + np.exp(-gate)) * value, GATED, "SiLU in place of GELU"),
    "quick gelu": Bug("gated", lambda p, r: lambda gate, value: gate / (1 + np.exp(-1.702 * gate)) * value, GATED, "quick GELU"),
    "gate on wi_1": Bug("gated", lambda p, r: lambda gate, value: r(value, gate), GATED, "activation is on wi_1"),
    "heads merged": Bug("shared_out", heads_merged, T5_ATTENDED, "heads are joined as"),
    "matrix reshaped": Bug("linear", of_matrix(lambda w: w.reshape(w.shape[::-1]).T, "block.0.layer.0.SelfAttention.q"), f"{BLOCK}.0.SelfAttention.q", "other order"),
}  # fmt: skip
