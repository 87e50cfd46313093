"""Errors in what a port is given: its values are right, and the network is asked something else."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ports import Bug

Change = Callable[[Any], Any]


def given(key: str, change: Change, first: str, says: str, written: str = "") -> Bug:
    """An input of the port that is another one; `written`: under which name the trace has it."""

    def wrong(port: Any, right: Any) -> Any:
        def inputs(right: dict[str, Any]) -> dict[str, Any]:
            changed = np.ascontiguousarray(change(right[key]))
            if written:
                port.modules[0].kept(written, changed)
            return right | {key: changed}

        return inputs

    return Bug("inputs", wrong, written or first, says)


def patches(*order: int) -> Change:
    return lambda x: x.reshape(*x.shape[:2], -1, 2, 2).transpose(0, 1, *order).reshape(x.shape)


def by_columns(x: Any) -> Any:
    rows = next(n for n in range(2, x.shape[1]) if x.shape[1] % n == 0)
    return x.reshape(len(x), rows, x.shape[1] // rows, -1).swapaxes(1, 2).reshape(x.shape)


def rolled(n: int, axis: int) -> Change:
    return lambda x: np.roll(x, -n, axis)


LATENTS: dict[str, tuple[Change, str]] = {
    "channels last": (patches(3, 4, 2), "packed as (row, column, channel)"),
    "columns first": (patches(2, 4, 3), "packed as (channel, column, row)"),
    "both": (patches(4, 3, 2), "packed as (column, row, channel)"),
    "by columns": (by_columns, "tokens run column by column"),
    "no scale and shift": (lambda x: x / 0.3611 + 0.1159, "scale and shift, flux's, are left out"),
    "no shift": (lambda x: x + 0.3611 * 0.1159, "shift, flux's, is left out"),
    "shift behind the scale": (lambda x: x + 0.3611 * 0.1159 - 0.1159, "shifted behind the scale, flux's"),
}
FLUX = {f"latents, {name}": given("img", change, "img_in", says) for name, (change, says) in LATENTS.items()} | {
    "latents, channels last, written": given("img", LATENTS["channels last"][0], "", "packed as (row", "forward:latents"),
    "latents, no shift, written": given("img", LATENTS["no shift"][0], "", "shift, flux's, is left out", "forward:latents"),
    "text order": given("txt", rolled(2, 1), "txt_in", "text's parts are in the other order, the first 2 tokens"),
    "text order, written": given("txt", rolled(2, 1), "", "text's parts are in the other order, the first 2 tokens", "forward:text"),
    "prompts exchanged": given("txt", lambda x: x[::-1], "txt_in", "prompts are in the other order"),
    "no pooled text": given("y", np.zeros_like, "vector_in.in_layer", "it is zero"),
    "times from the image": given("timesteps", lambda t: 1 - t, "time.sinusoid", "times run from the image to the noise"),
    "times from the image, written": given("timesteps", lambda t: 1 - t, "", "times run from the image to the noise", "forward:times"),
    "guidance of 1000": given("guidance", lambda g: 1000 * g, "guidance.sinusoid", "guidance is on the scale of 1000"),
    "guidance of 1000, written": given("guidance", lambda g: 1000 * g, "", "guidance is on the scale of 1000", "forward:guidance"),
}  # fmt: skip
SD35 = {
    "no scale and shift": given("x", lambda x: x / 1.5305 + 0.0609, "x_in", "scale and shift, sd3's, are left out"),
    "text order": given("context", rolled(2, 1), "context_embedder", "the first 2 tokens last"),
    "order of encoders": given("context", rolled(24, 2), "context_embedder", "the first 24 features last"),
    "order of encoders, written": given("context", rolled(24, 2), "", "the first 24 features last", "forward:text"),
    "order of pooled": given("y", rolled(12, 1), "y_embedder.mlp.0", "the first 12 numbers last"),
    "times of 1": given("t", lambda t: t / 1000, "t_embedder.freq", "scale of 1 in place of 1000"),
}  # fmt: skip
UNET = {
    "no scale": given("x", lambda x: x / 0.13025, "input_blocks.0.0", "scale and shift, sdxl's, are left out"),
    "order of encoders": given("context", rolled(8, 2), "input_blocks.4.1.transformer_blocks.0.attn2.to_k", "the first 8 features last"),
    "sizes in front": given("y", rolled(16, 1), "label_emb.0.0", "the first 16 numbers last"),
    "sizes in front, written": given("y", rolled(16, 1), "", "the first 16 numbers last", "forward:vector"),
    "times of 1, written": given("timesteps", lambda t: t / 1000, "", "scale of 1 in place of 1000", "forward:times"),
}  # fmt: skip
VAE = {
    "images from 0": given("image", lambda x: (x + 1) / 2, "encoder.conv_in", "images are in [0, 1]"),
    "images to 255": given("image", lambda x: (x + 1) * 127.5, "encoder.conv_in", "images are in [0, 255]"),
    "blue first": given("image", lambda x: x[:, ::-1], "encoder.conv_in", "colours are blue"),
    "blue first, written": given("image", lambda x: x[:, ::-1], "", "colours are blue", "encode:pictures"),
}  # fmt: skip
INPUTS = {"flux": FLUX, "mmdit": SD35, "unet": UNET, "vae": VAE, "clip": {}, "t5": {}}
