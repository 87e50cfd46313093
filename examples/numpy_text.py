"""CLIP and T5 in NumPy, beside `numpy_flux.py`, whose functions it shares; the names of Hugging Face's files.

eridiff golden export text-clip-l-tiny --out case --layout huggingface
python examples/numpy_text.py case mine.npz
eridiff diff mine.npz case --explain
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from numpy_flux import TRACE, gelu, kept
from safetensors.numpy import load_file

erf = np.vectorize(math.erf, otypes=[np.float64])


def linear(weights, name, x):
    out = x @ weights[f"{name}.weight"].T
    return kept(name, out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out)


def shared_out(x, share, v):
    joined = (share / share.sum(-1, keepdims=True)) @ v
    return joined.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[1], -1)  # B T H*D


def heads_of(x, heads):
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)  # B H T D


# CLIP -----------------------------------------------------------------------------------------------------------------


def normed(weights, name, x):
    centred = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return centred * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def layer_norm(weights, name, x):
    return kept(name, normed(weights, name, x))


def activated(x, kind):
    if kind == "quick_gelu":
        return x / (1 + np.exp(-1.702 * x))
    return (0.5 * x * (1 + erf(x / math.sqrt(2)))).astype(x.dtype)


def masked(scores):
    return np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf)


def clip_scores(q, k):
    return masked(q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]))


def clip_attention(weights, name, x, heads):
    q, k, v = (heads_of(linear(weights, f"{name}.{part}_proj", x), heads) for part in "qkv")
    scores = clip_scores(q, k)
    attended = shared_out(x, np.exp(scores - scores.max(-1, keepdims=True)), v)
    return linear(weights, f"{name}.out_proj", kept(f"{name}.attended", attended))


def embedded(weights, ids):
    places = weights["text_model.embeddings.position_embedding.weight"]
    table = weights["text_model.embeddings.token_embedding.weight"]
    return kept("hidden.0", kept("text_model.embeddings.token_embedding", table[ids]) + places[: ids.shape[1]])


def clip_layer(weights, name, x, config):
    x = x + clip_attention(
        weights, f"{name}.self_attn", layer_norm(weights, f"{name}.layer_norm1", x), config["num_attention_heads"]
    )
    h = linear(weights, f"{name}.mlp.fc1", layer_norm(weights, f"{name}.layer_norm2", x))
    h = kept(f"{name}.mlp.activated", activated(h, config["hidden_act"]))
    return kept(name, x + linear(weights, f"{name}.mlp.fc2", h))


def taken(hidden, norm):
    return hidden[-2]


def pooled(last, ids, end):
    return last[np.arange(len(ids)), (ids == end).argmax(1)]


def projected(weights, one):
    return kept("projected", one @ weights["text_projection.weight"].T)


def padded(ids, end):
    return ids


def clip(weights, config, ids):
    """ids `[B, 77]` -> what SDXL and SD 3 take, `[B, 77, D]`, and the projected pooled state `[B, P]`."""
    hidden = [embedded(weights, padded(kept("ids", ids), config["end_token"]))]
    for b in range(config["num_layers"]):
        hidden.append(clip_layer(weights, f"text_model.encoder.layers.{b}", hidden[-1], config))
    last = layer_norm(weights, "text_model.final_layer_norm", hidden[-1])
    one = kept("pooled", pooled(last, ids, config["end_token"]))
    text = kept("penultimate", taken(hidden, lambda x: normed(weights, "text_model.final_layer_norm", x)))
    return text, projected(weights, one)


# T5 -------------------------------------------------------------------------------------------------------------------


def rms_norm(weights, name, x):
    return kept(name, x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weights[f"{name}.weight"])


def bucket_of(distance):
    """Key minus query -> 0 to 31: one bucket for each distance below 8, wider ones up to 128, behind 16 for keys ahead."""
    far = np.abs(distance)
    wide = 8 + (np.log(np.maximum(far, 1) / 8) / math.log(128 / 8) * 8).astype(int)
    return np.where(far < 8, far, np.minimum(wide, 15)) + 16 * (distance > 0)


def bias_of(weights, name, tokens):
    places = np.arange(tokens)
    return kept(name, weights[f"{name}.weight"][bucket_of(places[None] - places[:, None])])  # T T H


def t5_scores(q, k, bias):
    return q @ k.swapaxes(-1, -2) + bias.transpose(2, 0, 1)


def seen(scores, ids):
    return scores


def t5_attention(weights, name, x, bias, heads, ids):
    q, k, v = (heads_of(linear(weights, f"{name}.{part}", x), heads) for part in "qkv")
    scores = seen(t5_scores(q, k, bias), ids)
    attended = shared_out(x, np.exp(scores - scores.max(-1, keepdims=True)), v)
    return linear(weights, f"{name}.o", kept(f"{name}.attended", attended))


def gated(gate, value):
    return gelu(gate) * value


def final_norm(weights, x):
    return rms_norm(weights, "encoder.final_layer_norm", x)


def looked_up(weights, ids):
    return kept("shared", weights["shared.weight"][ids])


def t5(weights, config, ids):
    """ids `[B, T]` -> `[B, T, D]` after the final norm."""
    x = looked_up(weights, kept("ids", ids))
    bias = bias_of(weights, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias", ids.shape[1])
    for b in range(config["num_layers"]):
        name = f"encoder.block.{b}.layer"
        normed = rms_norm(weights, f"{name}.0.layer_norm", x)
        x = x + t5_attention(weights, f"{name}.0.SelfAttention", normed, bias, config["num_heads"], ids)
        h = rms_norm(weights, f"{name}.1.layer_norm", x)
        wide = [linear(weights, f"{name}.1.DenseReluDense.{part}", h) for part in ("wi_0", "wi_1")]
        h = kept(f"{name}.1.DenseReluDense.gated", gated(*wide))
        x = kept(f"hidden.{b + 1}", x + linear(weights, f"{name}.1.DenseReluDense.wo", h))
    return kept("output", final_norm(weights, x))


if __name__ == "__main__":
    case, target = Path(sys.argv[1]), sys.argv[2]
    config = json.loads((case / "case.json").read_text())["config"]
    weights, ids = load_file(case / "weights.safetensors"), load_file(case / "inputs.safetensors")["ids"]
    (t5 if "d_kv" in config else clip)(weights, config, ids)
    np.savez(target, **TRACE)
