"""CLIP and T5, each alone."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eridiff.text.encoders import ClipEncoder, T5Encoder
from tests.golden.case import Row, load_case, row


class Tokenizer:
    """Of a case whose ids are given: only its size and its end token are asked."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.size, self.eos_token_id = config["vocab_size"], config.get("end_token")

    def __len__(self) -> int:
        return self.size


def told(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a CLIP what shapes do not tell."""
    return {name: config[name] for name in ("num_attention_heads", "hidden_act")}


def run_clip(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    c = case["config"]
    (module,) = load_case(case, {case["kind"]: told(c)}, dtype)
    found = ClipEncoder(module, Tokenizer(c))(torch.tensor(case["inputs"][0]["values"]))
    outputs = {"last": found.last, "pooled": found.pooled, "projected": found.projected}
    outputs |= {f"hidden.{i}": tensor for i, tensor in enumerate(found.hidden[:-1])}
    return [
        row(case, dtype, name, tensor, expected[name], 5e-6 if dtype == torch.float32 else _text_bound(expected[name]))
        for name, tensor in outputs.items()
        if name in expected
    ]


def run_t5(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    (module,) = load_case(case, {"t5": {}}, dtype)
    ids = torch.tensor(case["inputs"][0]["values"])
    encoder = T5Encoder(module, Tokenizer(case["config"]), ids.shape[1])
    rows = [row(case, dtype, "output", encoder(ids), expected["output"], 5e-6 if dtype == torch.float32 else 1e-6)]
    if dtype == torch.float64:
        name, bound = "output, wide mean square", 1e-10 if widened(module) else 1e-6
        rows.append(row(case, dtype, name, encoder(ids), expected["output"], bound))
    return rows


def widened(module: Any) -> bool:
    """T5's mean square in its own dtype, which transformers takes in float32 whatever the input; whether all is wide now."""
    for layer in module.modules():
        if type(layer).__name__ == "T5LayerNorm":
            layer.forward = partial(_wide_norm, layer)
    return module.config._attn_implementation == "sdpa"  # eager attention, before 5.15, has a float32 softmax


def _wide_norm(layer: Any, x: Tensor) -> Tensor:
    return layer.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + layer.variance_epsilon)


def _text_bound(expected: Tensor) -> float:
    """Outputs are stored in float64, intermediates in float32."""
    return 1e-10 if expected.dtype == torch.float64 else 1e-6
