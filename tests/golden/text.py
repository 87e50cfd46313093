"""CLIP and T5, each alone."""

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from eridiff.text.encoders import ClipEncoder, T5Encoder
from tests.golden.case import Row, load_case, row


def run_clip(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    c = case["config"]
    network = "clip_g" if case["case"].startswith("text-clip-g") else "clip"
    (module,) = load_case(
        case, {network: {"num_attention_heads": c["num_heads"], "hidden_act": c["hidden_act"]}}, dtype
    )
    tokenizer = SimpleNamespace(eos_token_id=c["eos_token_id"])
    encoder = ClipEncoder(module, Sized(tokenizer, c["vocab_size"]))
    found = encoder(torch.tensor(case["inputs"][0]["values"]))
    outputs = {"last": found.last, "pooled": found.pooled, "projected": found.projected}
    outputs |= {f"hidden.{i}": tensor for i, tensor in enumerate(found.hidden[:-1])}
    return [
        row(case, dtype, name, tensor, expected[name], 5e-6 if dtype == torch.float32 else _text_bound(expected[name]))
        for name, tensor in outputs.items()
        if name in expected
    ]


def run_t5(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    (module,) = load_case(case, {"t5": {}}, dtype)
    encoder = T5Encoder(module, Sized(SimpleNamespace(), case["config"]["vocab_size"]), 150)
    ids = torch.tensor(case["inputs"][0]["values"])
    rows = [row(case, dtype, "output", encoder(ids), expected["output"], 5e-6 if dtype == torch.float32 else 1e-6)]
    if dtype == torch.float64:  # transformers takes T5's mean square in float32 whatever the input; here it is not
        for layer in module.modules():
            if type(layer).__name__ == "T5LayerNorm":
                layer.forward = partial(wide_norm, layer)
        fused = module.config._attn_implementation == "sdpa"  # eager attention, before 5.15, has a float32 softmax
        name, bound = "output, wide mean square", 1e-10 if fused else 1e-6
        rows.append(row(case, dtype, name, encoder(ids), expected["output"], bound))
    return rows


def wide_norm(layer: Any, x: Tensor) -> Tensor:
    return layer.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + layer.variance_epsilon)


def _text_bound(expected: Tensor) -> float:
    """Outputs are stored in float64, intermediates in float32."""
    return 1e-10 if expected.dtype == torch.float64 else 1e-6


class Sized:
    """A tokenizer of a case: its ids are given, only its size is asked."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        self.tokenizer, self.size = tokenizer, size

    def __len__(self) -> int:
        return self.size

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)
