"""The autoencoder of Flux in NumPy, both ways; the original's names.

eridiff golden export ae-16-tiny --out case
python examples/numpy_autoencoder.py case mine.npz
eridiff diff mine.npz case --explain
"""

import json
import sys
from pathlib import Path

import numpy as np
from numpy_flux import TRACE, kept, silu
from safetensors.numpy import load_file


def conv(weights, name, x, stride=1, padding=((1, 1), (1, 1))):
    kernel, side = weights[f"{name}.weight"], weights[f"{name}.weight"].shape[-1]
    padded = np.pad(x, ((0, 0), (0, 0), *(padding if side > 1 else ((0, 0), (0, 0)))))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), (2, 3))[:, :, ::stride, ::stride]
    out = np.einsum("bchwij,ocij->bohw", windows, kernel, optimize=True)
    return kept(name, out + weights[f"{name}.bias"][:, None, None])


def group_norm(x, groups=32):
    grouped = x.reshape(len(x), groups, -1)
    centred = grouped - grouped.mean(-1, keepdims=True)
    return (centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)).reshape(x.shape)


def norm(weights, name, x):
    gain, offset = (weights[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
    return kept(name, group_norm(x) * gain + offset)


def residual(weights, name, x):
    h = conv(weights, f"{name}.conv1", silu(norm(weights, f"{name}.norm1", x)))
    h = conv(weights, f"{name}.conv2", silu(norm(weights, f"{name}.norm2", h)))
    skip = conv(weights, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in weights else x
    return kept(name, skip + h)


def attention_scale(channels):
    return channels**-0.5


def attended(weights, name, x):
    h = norm(weights, f"{name}.norm", x)
    q, k, v = (conv(weights, f"{name}.{part}", h).reshape(*x.shape[:2], -1) for part in "qkv")  # B C HW
    scores = q.swapaxes(1, 2) @ k * attention_scale(x.shape[1])
    share = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = v @ (share / share.sum(-1, keepdims=True)).swapaxes(1, 2)
    return kept(name, x + conv(weights, f"{name}.proj_out", mixed.reshape(x.shape)))


def middle(weights, name, x):
    return residual(
        weights, f"{name}.block_2", attended(weights, f"{name}.attn_1", residual(weights, f"{name}.block_1", x))
    )


def halved(weights, name, x):
    return kept(name, conv(weights, f"{name}.conv", x, 2, ((0, 1), (0, 1))))


def larger(x):
    return x.repeat(2, 2).repeat(2, 3)


def from_latents(latents, config):
    return latents / config["scale_factor"] + config["shift_factor"]


def mean_of(moments):
    return np.split(moments, 2, 1)[0]  # the other half is the log-variance


def to_latents(mean, config):
    return (mean - config["shift_factor"]) * config["scale_factor"]


def encoded(weights, config, x):
    h = conv(weights, "encoder.conv_in", x)
    for level in range(len(config["ch_mult"])):
        for block in range(config["num_res_blocks"]):
            h = residual(weights, f"encoder.down.{level}.block.{block}", h)
        if level < len(config["ch_mult"]) - 1:
            h = halved(weights, f"encoder.down.{level}.downsample", h)
    h = silu(norm(weights, "encoder.norm_out", middle(weights, "encoder.mid", h)))
    return kept("latents.mode", to_latents(mean_of(conv(weights, "encoder.conv_out", h)), config))


def decoded(weights, config, latents):
    h = middle(weights, "decoder.mid", conv(weights, "decoder.conv_in", from_latents(latents, config)))
    for level in reversed(range(len(config["ch_mult"]))):
        for block in range(config["num_res_blocks"] + 1):
            h = residual(weights, f"decoder.up.{level}.block.{block}", h)
        if level > 0:
            name = f"decoder.up.{level}.upsample"
            h = kept(name, conv(weights, f"{name}.conv", larger(h)))
    return kept("decoded", conv(weights, "decoder.conv_out", silu(norm(weights, "decoder.norm_out", h))))


if __name__ == "__main__":
    case, target = Path(sys.argv[1]), sys.argv[2]
    config = json.loads((case / "case.json").read_text())["config"]
    weights, inputs = load_file(case / "weights.safetensors"), load_file(case / "inputs.safetensors")
    encoded(weights, config, inputs["image"])
    decoded(weights, config, inputs["latents"])
    np.savez(target, **TRACE)
