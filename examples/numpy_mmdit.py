"""Stable Diffusion 3.5 in NumPy, beside `numpy_flux.py`, whose functions it shares; the original's names.

eridiff golden export sd35-medium-tiny --out case
python examples/numpy_mmdit.py case mine.npz
eridiff diff mine.npz case --explain
"""

import json
import sys
from pathlib import Path

import numpy as np
import numpy_flux as parts
from numpy_flux import kept, linear
from safetensors.numpy import load_file


def patches(weights, x):
    b, c, height, width = x.shape
    cut = x.reshape(b, c, height // 2, 2, width // 2, 2).transpose(0, 2, 4, 1, 3, 5).reshape(b, -1, c * 4)
    kernel = weights["x_embedder.proj.weight"]
    return cut @ kernel.reshape(len(kernel), -1).T + weights["x_embedder.proj.bias"]


def unpatched(tokens, h, w):
    b, _, features = tokens.shape
    cut = tokens.reshape(b, h, w, 2, 2, features // 4)
    return cut.transpose(0, 5, 1, 3, 2, 4).reshape(b, features // 4, 2 * h, 2 * w)


def middle(table, side, h, w):
    top, left = (side - h) // 2, (side - w) // 2
    return table.reshape(side, side, -1)[top : top + h, left : left + w].reshape(1, h * w, -1)


def embedded(weights, name, x):
    return kept(name, linear(weights, f"{name}.mlp.2", parts.silu(linear(weights, f"{name}.mlp.0", x))))


def head_inputs(weights, name, x, shift, scale, heads):
    a = kept(f"{name}.qkv:0", parts.modulated(x, shift, scale))
    q, k, v = parts.heads_of(linear(weights, f"{name}.qkv", a), heads)
    if f"{name}.ln_q.weight" in weights:
        q = kept(f"{name}.ln_q", parts.rms_norm(q, weights[f"{name}.ln_q.weight"]))
        k = kept(f"{name}.ln_k", parts.rms_norm(k, weights[f"{name}.ln_k.weight"]))
    return q, k, v


def updated(weights, name, x, attended, chunks):
    x = x + chunks[2] * linear(weights, f"{name}.attn.proj", attended)
    a = kept(f"{name}.mlp:0", parts.modulated(x, chunks[3], chunks[4]))
    return x + chunks[5] * linear(weights, f"{name}.mlp.fc2", parts.gelu(linear(weights, f"{name}.mlp.fc1", a)))


def second_attention(weights, name, x, chunks, heads):
    """Of SD 3.5 medium's first blocks: among the image's tokens alone, of the same input."""
    if len(chunks) < 9:
        return x
    own = head_inputs(weights, f"{name}.attn2", x, *chunks[6:8], heads)
    return x + chunks[8] * linear(weights, f"{name}.attn2.proj", parts.attention(*own))


def joint_block(weights, block, x, context, vec, heads):
    count = len(weights[f"{block}.x_block.adaLN_modulation.1.bias"]) // x.shape[-1]
    chunks = parts.chunks_of(weights, f"{block}.x_block.adaLN_modulation.1", vec, count)
    last = f"{block}.context_block.mlp.fc1.weight" not in weights
    told = parts.chunks_of(weights, f"{block}.context_block.adaLN_modulation.1", vec, 2 if last else 6)
    of_image = head_inputs(weights, f"{block}.x_block.attn", x, *chunks[:2], heads)
    of_text = head_inputs(weights, f"{block}.context_block.attn", context, *told[:2], heads)
    q, k, v = (parts.joined_streams(t, i) for t, i in zip(of_text, of_image, strict=True))
    attended = kept(f"{block}.attention", parts.attention(q, k, v))
    length = context.shape[1]
    after = second_attention(weights, f"{block}.x_block", x, chunks, heads)
    after = updated(weights, f"{block}.x_block", after, attended[:, length:], chunks)
    if not last:
        context = updated(weights, f"{block}.context_block", context, attended[:, :length], told)
    return kept(f"{block}.x", after), kept(f"{block}.context", context)


def mmdit(weights, config, inputs):
    """`inputs` are the case's: x `[B, 16, 2h, 2w]`, context `[B, L, W]`, y `[B, P]`, t `[B]` in [0, 1000]."""
    h, w = inputs["x"].shape[2] // 2, inputs["x"].shape[3] // 2
    crop = kept("pos_embed.crop", middle(weights["pos_embed"][0], config["pos_embed_max_size"], h, w))
    x = kept("x_in", patches(weights, inputs["x"]) + crop)
    told = kept("t_embedder.freq", parts.sinusoid(inputs["t"] / 1000).astype(x.dtype))
    vec = kept("c", embedded(weights, "t_embedder", told) + embedded(weights, "y_embedder", inputs["y"]))
    context = linear(weights, "context_embedder", inputs["context"])
    for b in range(config["depth"]):
        x, context = joint_block(weights, f"joint_blocks.{b}", x, context, vec, config["num_heads"])
    a = parts.final_modulated(x, parts.chunks_of(weights, "final_layer.adaLN_modulation.1", vec, 2))
    return kept("output", unpatched(linear(weights, "final_layer.linear", kept("final_layer.linear:0", a)), h, w))


if __name__ == "__main__":
    case, target = Path(sys.argv[1]), sys.argv[2]
    description = json.loads((case / "case.json").read_text())
    mmdit(load_file(case / "weights.safetensors"), description["config"], load_file(case / "inputs.safetensors"))
    np.savez(target, **parts.TRACE)
