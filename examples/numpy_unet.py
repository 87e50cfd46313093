"""The UNet of SDXL in NumPy, beside `numpy_flux.py` and `numpy_autoencoder.py`, whose functions it shares; the original's names.

eridiff golden export sdxl-base-tiny --out case
python examples/numpy_unet.py case mine.npz
eridiff diff mine.npz case --explain
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from numpy_autoencoder import conv, larger
from numpy_flux import TRACE, attention, kept, linear, silu
from safetensors.numpy import load_file

erf = np.vectorize(math.erf, otypes=[np.float64])


def gelu(x):
    return (0.5 * x * (1 + erf(x / math.sqrt(2)))).astype(x.dtype)


def group_norm(x, eps):
    grouped = x.reshape(len(x), 32, -1)
    return ((grouped - grouped.mean(-1, keepdims=True)) / np.sqrt(grouped.var(-1, keepdims=True) + eps)).reshape(
        x.shape
    )


def of_block(weights, name, x):
    return kept(
        name, group_norm(x, 1e-5) * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]
    )


def of_transformer(weights, name, x):
    return kept(
        name, group_norm(x, 1e-6) * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]
    )


def layer_norm(weights, name, x):
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return kept(name, normed * weights[f"{name}.weight"] + weights[f"{name}.bias"])


def sinusoid(times, width):
    angles = times[:, None] * np.exp(-math.log(10000) * np.arange(width // 2) / (width // 2))
    return np.concatenate([np.cos(angles), np.sin(angles)], -1)


def two_layers(weights, first, second, x):
    return linear(weights, second, silu(linear(weights, first, x)))


def added(vec):
    return silu(vec)


def residual(weights, name, x, vec):
    h = conv(weights, f"{name}.in_layers.2", silu(of_block(weights, f"{name}.in_layers.0", x)))
    h = h + linear(weights, f"{name}.emb_layers.1", added(vec))[:, :, None, None]
    h = conv(weights, f"{name}.out_layers.3", silu(of_block(weights, f"{name}.out_layers.0", h)))
    skip = conv(weights, f"{name}.skip_connection", x) if f"{name}.skip_connection.weight" in weights else x
    return kept(name, skip + h)


def attended(weights, name, x, context, head):
    def split(part, tokens):
        made = kept(f"{name}.to_{part}", tokens @ weights[f"{name}.to_{part}.weight"].T)
        return made.reshape(*made.shape[:2], -1, head).swapaxes(1, 2)

    return kept(
        name, linear(weights, f"{name}.to_out.0", attention(split("q", x), split("k", context), split("v", context)))
    )


def gated(x):
    value, gate = np.split(x, 2, -1)
    return value * gelu(gate)


def transformer(weights, name, x, context, head):
    h = of_transformer(weights, f"{name}.norm", x).reshape(*x.shape[:2], -1).swapaxes(1, 2)  # B hw C
    h = linear(weights, f"{name}.proj_in", h)
    depth = 0
    while f"{name}.transformer_blocks.{depth}.norm1.weight" in weights:
        block = f"{name}.transformer_blocks.{depth}"
        normed = layer_norm(weights, f"{block}.norm1", h)
        h = h + attended(weights, f"{block}.attn1", normed, normed, head)
        h = h + attended(weights, f"{block}.attn2", layer_norm(weights, f"{block}.norm2", h), context, head)
        wide = linear(weights, f"{block}.ff.net.0.proj", layer_norm(weights, f"{block}.norm3", h))
        h = kept(block, h + linear(weights, f"{block}.ff.net.2", gated(wide)))
        depth += 1
    return kept(name, x + linear(weights, f"{name}.proj_out", h).swapaxes(1, 2).reshape(x.shape))


def joined(x, skip):
    return np.concatenate([x, skip], 1)


def unet(weights, config, inputs):
    """`inputs` are the case's: x `[B, 4, h, w]`, context `[B, L, W]`, y `[B, V]`, timesteps `[B]`."""
    head, context = config["num_head_channels"], inputs["context"]

    def stage(name, x):
        for part in range(3):
            place = f"{name}.{part}"
            if f"{place}.in_layers.0.weight" in weights:
                x = residual(weights, place, x, vec)
            elif f"{place}.proj_in.weight" in weights:
                x = transformer(weights, place, x, context, head)
            elif f"{place}.op.weight" in weights:
                x = conv(weights, f"{place}.op", x, 2)
            elif f"{place}.conv.weight" in weights:
                x = conv(weights, f"{place}.conv", larger(x))
            elif f"{place}.weight" in weights:
                x = conv(weights, place, x)
        return x

    told = kept("time_embed:0", sinusoid(inputs["timesteps"], config["model_channels"]).astype(inputs["x"].dtype))
    label = two_layers(weights, "label_emb.0.0", "label_emb.0.2", inputs["y"])
    vec = kept("emb", two_layers(weights, "time_embed.0", "time_embed.2", told) + label)
    blocks = 3 * len(config["channel_mult"])
    x, skips = inputs["x"], []
    for n in range(blocks):
        x = stage(f"input_blocks.{n}", x)
        skips.append(x)
    x = stage("middle_block", x)
    for n in range(blocks):
        x = stage(f"output_blocks.{n}", joined(x, skips.pop()))
    return kept("output", conv(weights, "out.2", silu(of_block(weights, "out.0", x))))


if __name__ == "__main__":
    case, target = Path(sys.argv[1]), sys.argv[2]
    config = json.loads((case / "case.json").read_text())["config"]
    unet(load_file(case / "weights.safetensors"), config, load_file(case / "inputs.safetensors"))
    np.savez(target, **TRACE)
