"""SDXL: one evaluation with every intermediate, the vector of sizes, the text of both encoders."""

import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from eridiff.inference.sdxl import joined
from eridiff.models.layers import sinusoid
from eridiff.models.unet import UNet, size_vector
from eridiff.text.encoders import ClipEncoder
from eridiff.trace.record import record
from tests.golden.case import Float32Sinusoid, Row, inputs_of, load_case, row
from tests.golden.text import Sized


def load_unet(case: Mapping[str, Any], dtype: torch.dtype) -> UNet:
    """Everything but the heads' width is read off names and shapes; here it is compared with the case's."""
    c = case["config"]
    (model,) = load_case(case, {"unet": {"head_width": c["num_head_channels"]}}, dtype)
    assert list(model.config.channel_multipliers) == c["channel_mult"]
    assert (model.config.text_width, model.config.vector_width) == (c["context_dim"], c["adm_in_channels"])
    return model


def run_unet(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    model, given = load_unet(case, dtype), inputs_of(case)
    x, text, vector = (given[name].to(dtype) for name in ("x", "context", "y"))
    times = given["timesteps"][None].to(dtype)
    with torch.no_grad(), record(model) as recording:
        recording["output"] = model(x, text, vector, times)
        recording["emb"] = model.conditioning_vector(vector, times)
    with torch.no_grad(), Float32Sinusoid():
        float32 = model(x, text, vector, given["timesteps"][None])
    rows = []
    for name, tensor in expected.items():
        if name == "output.float32":
            continue
        output = name.startswith("output") and not name.startswith("output_blocks")
        bound = case["tolerance"]["float32"] if dtype == torch.float32 else 1e-9 if output else 1e-6
        found = float32 if name == "output.sinusoid_float32" else recording[unet_place(name, model.config.levels)]
        rows.append(row(case, dtype, name, found.reshape(tensor.shape), tensor, bound))
    return rows


def unet_place(name: str, levels: int) -> str:
    """Where in a recording a golden's tensor is, which is named by the original's module path."""
    places = {
        "time_embed:in": "time_in:0", "time_embed": "time_in", "label_emb": "vector_in", "input_blocks.0": "conv_in",
        "out.0": "norm_out", "middle_block.0": "middle.residual.0", "middle_block.1": "middle.transformer.0",
        "middle_block.2": "middle.residual.1",
    }  # fmt: skip
    side, _, rest = name.partition("_blocks.")
    if name in places or not rest:
        return places.get(name, name)
    number, _, inner = rest.removesuffix(":in").partition(".")
    if side == "input":
        level, r = divmod(int(number) - 1, 3)
        stage, last, change = f"down.{level}", r == 2, "downsample"
    else:
        u, r = divmod(int(number), 3)
        level = levels - 1 - u
        stage, last, change = f"up.{level}", r == 2 and level > 0 and not inner, "upsample"
    if name.endswith(":in"):
        return f"{stage}.residual.{r}:0"
    if last:
        return f"{stage}.{change}"
    names = {
        "in_layers.0": "norm1", "emb_layers": "modulation", "skip_connection": "shortcut", "attn1": "self_attention",
        "attn2": "cross_attention", "ff.net.0": "mlp_out:0",
    }  # fmt: skip
    part, _, inner = inner.partition(".")
    path = f"{stage}.{'residual' if part == '0' else 'transformer'}.{r}"
    inner = inner.replace("transformer_blocks", "blocks")
    inner = re.sub("|".join(map(re.escape, names)), lambda m: names[m[0]], inner)
    return f"{path}.{inner}" if inner else path


def run_vector(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    given, rows = inputs_of(case), []
    for name, pooled, numbers in (("base", "pooled", "sizes.base"), ("refiner", "pooled.refiner", "sizes.refiner")):
        found = size_vector(given[pooled].to(dtype), given[numbers].to(dtype))
        if dtype == torch.float64:
            rows.append(row(case, dtype, f"{name}.vector", found, expected[f"{name}.vector"], 1e-12))
        else:
            rows.append(row(case, dtype, f"{name}.vector.float32", found, expected[f"{name}.vector.float32"], 2e-4))
    return rows


def run_sdxl_text(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    c, given = case["config"], {item["name"]: torch.tensor(item["values"]) for item in case["inputs"]}
    configs = {
        "clip": {"num_attention_heads": c["l_heads"], "hidden_act": c["l_act"]},
        "clip_g": {"num_attention_heads": c["g_heads"], "hidden_act": "gelu"},
    }
    modules = load_case(case, configs, dtype)
    tokenizer = Sized(SimpleNamespace(eos_token_id=63), c["vocab"])
    clip, clip_g = ClipEncoder(modules[0], tokenizer), ClipEncoder(modules[1], tokenizer, pad=0, name="CLIP-G")
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
    wide = dtype == torch.float64
    return [
        row(
            case,
            dtype,
            name,
            tensor,
            expected[name],
            2e-5 if not wide else 1e-9 if expected[name].dtype == dtype else 1e-6,
        )
        for name, tensor in tensors.items()
    ]
