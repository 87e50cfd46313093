"""SDXL: one evaluation with every intermediate, the vector of sizes, the text of both encoders."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from eridiff.inference.sdxl import joined
from eridiff.models.layers import sinusoid
from eridiff.models.unet import UNet, size_vector
from eridiff.text.encoders import ClipEncoder
from eridiff.trace.record import record
from eridiff.trace.replay import arguments_run
from tests.golden.case import Float32Sinusoid, Row, inputs_of, load_case, opened, placed, row
from tests.golden.text import Tokenizer, told


def load_unet(case: Mapping[str, Any], dtype: torch.dtype) -> UNet:
    """Everything but the heads' width is read off names and shapes; here it is compared with the case's."""
    model: UNet = opened(case).load(dtype)
    c = case["config"]
    assert list(model.config.channel_multipliers) == c["channel_mult"]
    assert (model.config.text_width, model.config.vector_width) == (c["context_dim"], c["adm_in_channels"])
    return model


def run_unet(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    model = load_unet(case, dtype)
    arguments, ask = opened(case).arguments, arguments_run(opened(case).arguments, dtype)
    with torch.no_grad(), record(model) as recording:
        recording["output"] = ask(model)
        recording["emb"] = model.conditioning_vector(arguments["vector"].to(dtype), arguments["times"][None].to(dtype))
    with torch.no_grad(), Float32Sinusoid():
        float32 = ask(model)
    rows = []
    for name, tensor in expected.items():
        if name == "output.float32":
            continue
        output = name.startswith("output") and not name.startswith("output_blocks")
        bound = case["tolerance"]["float32"] if dtype == torch.float32 else 1e-9 if output else 1e-6
        found = float32 if name == "output.sinusoid_float32" else unet_tensor(recording, name, model)
        rows.append(row(case, dtype, name, found.reshape(tensor.shape), tensor, bound))
    return rows


def unet_tensor(recording: Mapping[str, Tensor], name: str, model: UNet) -> Tensor:
    """A golden's tensor by the original's module path; a numbered block there is a list, and its last module's output."""
    if name in recording:
        return recording[name]
    for last in ("", ".2.conv", ".1.conv", ".1", ".0.op"):
        with suppress(KeyError):
            return placed(recording, name.replace("ff.net.0", "ff.net.2:0") + last, model)
    raise KeyError(name)


def run_vector(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    given, rows = inputs_of(case), []
    for name, (pooled, numbers) in case["vectors"].items():
        found = size_vector(given[pooled].to(dtype), given[numbers].to(dtype))
        if dtype == torch.float64:
            rows.append(row(case, dtype, f"{name}.vector", found, expected[f"{name}.vector"], 1e-12))
        else:
            rows.append(row(case, dtype, f"{name}.vector.float32", found, expected[f"{name}.vector.float32"], 2e-4))
    return rows


def run_sdxl_text(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    c, given = case["config"], inputs_of(case)
    modules = load_case(case, {"clip": told(c["clip_l"]), "clip_g": told(c["clip_g"])}, dtype)
    clip, clip_g = (ClipEncoder(m, Tokenizer(c[n])) for m, n in zip(modules, ("clip_l", "clip_g"), strict=True))
    first, second = clip(given["ids.clip_l"]), clip_g(given["ids.open_clip"])
    found = joined(first, second)
    sizes = sinusoid(given["sizes"].to(dtype), c["size_embed_dim"]).flatten(1)
    tensors = {
        "context": found.text, "pooled": found.pooled, "vector": torch.cat([found.pooled, sizes], dim=1),
        "size_embedding": sizes, "clip_l.last_hidden_state": first.last, "open_clip.embedding": second.hidden[0],
        "open_clip.ln_final": second.last, "open_clip.penultimate": second.hidden[-2],
        **{f"clip_l.hidden.{i}": state for i, state in enumerate(first.hidden)},
        **{f"open_clip.block.{i}": state for i, state in enumerate(second.hidden[1:])},
    }  # fmt: skip
    rows = []
    for name, tensor in tensors.items():
        bound = 2e-5 if dtype == torch.float32 else 1e-9 if expected[name].dtype == dtype else 1e-6
        rows.append(row(case, dtype, name, tensor, expected[name], bound))
    return rows
