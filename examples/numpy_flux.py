"""Flux in NumPy, as a port would be: nothing of eridiff, the original's names, every intermediate written down.

    eridiff golden export flux-dev-tiny --out case
    python examples/numpy_flux.py case mine.npz
    eridiff diff mine.npz case --explain

Letters: B batch, N image tokens, L text tokens, S = L + N, H heads, D features of one head.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

TRACE = {}  # what is compared, by the original's module paths; readable names for what is not a module


def kept(name, value):
    TRACE[name] = value
    return value


def linear(weights, name, x):
    return kept(name, x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"])


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def rms_norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def modulated(x, shift, scale):
    return (1 + scale) * layer_norm(x) + shift


def final_modulated(x, chunks):
    shift, scale = chunks
    return modulated(x, shift, scale)


def sinusoid(times):
    frequencies = np.exp(-np.log(10000) * np.arange(128) / 128)
    angles = 1000 * times[:, None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], -1)


def rope_table(ids, axes, theta):
    angles = [ids[:, i, None] * theta ** -(np.arange(0, width, 2) / width) for i, width in enumerate(axes)]
    joined = np.concatenate(angles, -1)
    return np.cos(joined), np.sin(joined)  # S D/2


def rotated(x, cos, sin):
    even, odd = x[..., ::2], x[..., 1::2]
    return np.stack([cos * even - sin * odd, sin * even + cos * odd], -1).reshape(x.shape)


def heads_of(qkv, heads):
    b, tokens, _ = qkv.shape
    return qkv.reshape(b, tokens, 3, heads, -1).transpose(2, 0, 3, 1, 4)  # 3 B H L D


def attention(q, k, v):
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    joined = (weights / weights.sum(-1, keepdims=True)) @ v
    return joined.transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], -1)  # B S H*D


def vector_mlp(weights, name, x):
    return kept(name, linear(weights, f"{name}.out_layer", silu(linear(weights, f"{name}.in_layer", x))))


def chunks_of(weights, name, vec, count):
    return np.split(linear(weights, name, silu(vec))[:, None], count, -1)


def joined_streams(text, image):
    return np.concatenate([text, image], 2)  # B H S D


def attention_inputs(weights, name, x, chunks, heads):
    a = kept(f"{name}.qkv:0", modulated(x, chunks[0], chunks[1]))
    q, k, v = heads_of(linear(weights, f"{name}.qkv", a), heads)
    q = kept(f"{name}.norm.query_norm", rms_norm(q, weights[f"{name}.norm.query_norm.scale"]))
    k = kept(f"{name}.norm.key_norm", rms_norm(k, weights[f"{name}.norm.key_norm.scale"]))
    return q, k, v


def updated(weights, block, stream, x, attended, chunks):
    x = x + chunks[2] * linear(weights, f"{block}.{stream}_attn.proj", attended)
    a = kept(f"{block}.{stream}_mlp:0", modulated(x, chunks[3], chunks[4]))
    hidden = gelu(linear(weights, f"{block}.{stream}_mlp.0", a))
    return x + chunks[5] * linear(weights, f"{block}.{stream}_mlp.2", hidden)


def double_block(weights, block, image, text, vec, rope, heads):
    image_chunks = chunks_of(weights, f"{block}.img_mod.lin", vec, 6)
    text_chunks = chunks_of(weights, f"{block}.txt_mod.lin", vec, 6)
    of_image = attention_inputs(weights, f"{block}.img_attn", image, image_chunks, heads)
    of_text = attention_inputs(weights, f"{block}.txt_attn", text, text_chunks, heads)
    q, k, v = (joined_streams(t, i) for t, i in zip(of_text, of_image, strict=True))
    q, k = kept(f"{block}.q_rope", rotated(q, *rope)), kept(f"{block}.k_rope", rotated(k, *rope))
    attended = kept(f"{block}.attention", attention(q, k, v))
    length = text.shape[1]
    image = updated(weights, block, "img", image, attended[:, length:], image_chunks)
    text = updated(weights, block, "txt", text, attended[:, :length], text_chunks)
    return kept(f"{block}.image", image), kept(f"{block}.text", text)


def single_block(weights, block, x, vec, rope, heads):
    shift, scale, gate = chunks_of(weights, f"{block}.modulation.lin", vec, 3)
    whole = linear(weights, f"{block}.linear1", kept(f"{block}.linear1:0", modulated(x, shift, scale)))
    qkv, mlp = np.split(whole, [3 * x.shape[-1]], -1)
    q, k, v = heads_of(qkv, heads)
    q = kept(f"{block}.norm.query_norm", rms_norm(q, weights[f"{block}.norm.query_norm.scale"]))
    k = kept(f"{block}.norm.key_norm", rms_norm(k, weights[f"{block}.norm.key_norm.scale"]))
    q, k = kept(f"{block}.q_rope", rotated(q, *rope)), kept(f"{block}.k_rope", rotated(k, *rope))
    attended = kept(f"{block}.attention", attention(q, k, v))
    out = linear(weights, f"{block}.linear2", np.concatenate([attended, gelu(mlp)], -1))
    return kept(block, x + gate * out)


def one_sequence(text, image):
    return np.concatenate([text, image], 1)  # B S hidden


def image_of(x, length):
    return x[:, length:]


def flux(weights, config, inputs):
    """`config` and `inputs` are the case's: img `[B, N, 64]`, txt `[B, L, W]`, y `[B, P]`, timesteps, guidance `[B]`, ids `[N, 3]`."""
    heads, dtype = config["num_heads"], inputs["img"].dtype
    vec = vector_mlp(weights, "time_in", kept("time.sinusoid", sinusoid(inputs["timesteps"]).astype(dtype)))
    if config["guidance_embed"]:
        told = kept("guidance.sinusoid", sinusoid(inputs["guidance"]).astype(dtype))
        vec = vec + vector_mlp(weights, "guidance_in", told)
    vec = kept("vec", vec + vector_mlp(weights, "vector_in", inputs["y"]))
    image, text = linear(weights, "img_in", inputs["img"]), linear(weights, "txt_in", inputs["txt"])
    ids = np.concatenate([np.zeros((text.shape[1], 3)), inputs["ids"]])
    rope = [table.astype(dtype) for table in rope_table(ids, config["axes_dim"], config["theta"])]
    kept("rope.cos", rope[0]), kept("rope.sin", rope[1])
    for b in range(config["depth"]):
        image, text = double_block(weights, f"double_blocks.{b}", image, text, vec, rope, heads)
    x = one_sequence(text, image)
    for b in range(config["depth_single_blocks"]):
        x = single_block(weights, f"single_blocks.{b}", x, vec, rope, heads)
    chunks = chunks_of(weights, "final_layer.adaLN_modulation.1", vec, 2)
    a = kept("final_layer.linear:0", final_modulated(image_of(x, text.shape[1]), chunks))
    return kept("out", linear(weights, "final_layer.linear", a))


if __name__ == "__main__":
    case, target = Path(sys.argv[1]), sys.argv[2]
    description = json.loads((case / "case.json").read_text())
    flux(load_file(case / "weights.safetensors"), description["config"], load_file(case / "inputs.safetensors"))
    np.savez(target, **TRACE)
