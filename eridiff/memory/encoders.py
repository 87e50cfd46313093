"""CLIP and T5 as the plan needs them: their weights by size and the tensors of one pass, without transformers.

Importing transformers' classes takes longer than a plan. Only sizes and shapes are right here: no weight has a published name,
and what is computed is for the meta device. `tests/test_placing.py` compares both with transformers' modules.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sizes_of_encoder(network: str, config: Mapping[str, Any]) -> nn.Module:
    """A module of a clip's, clip_g's or t5's sizes on the meta device; `config` as of its `Component`."""
    with torch.device("meta"):
        return T5Sizes(config) if network == "t5" else ClipSizes(config)


class ClipSizes(nn.Module):
    """The text model of CLIP with its projection."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.length, self.quick = (
            config.get("max_position_embeddings", 77),
            config.get("hidden_act", "quick_gelu") == "quick_gelu",
        )
        self.words = nn.Parameter(torch.empty(config["vocab_size"], width))
        self.positions = nn.Parameter(torch.empty(self.length, width))
        self.layers = nn.ModuleList(_ClipLayer(width, inner) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, config["projection_dim"], bias=False)

    def forward(self, rows: int, length: int) -> Tensor:
        """The tensors of encoding `rows` prompts in a window each, all layers' states kept as the families ask for them."""
        words = self.words.new_empty(rows, self.length, self.words.shape[1])
        states = [words + self.positions]
        for layer in self.layers:
            states.append(layer(states[-1], self.quick))
        return self.norm(states[-1])


class _ClipLayer(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.wide, self.narrow = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor, quick: bool) -> Tensor:
        h = self.norm1(x)
        h = x + self.out(_attended(self.q(h), self.k(h), self.v(h)))
        normed = self.norm2(h)
        inner = self.wide(normed)
        inner = inner * torch.sigmoid(1.702 * inner) if quick else F.gelu(inner)
        return h + self.narrow(inner)


class T5Sizes(nn.Module):
    """The encoder of T5."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, self.heads = config["d_model"], config["num_heads"]
        sizes = width, self.heads * config["d_kv"], config["d_ff"]
        self.words = nn.Parameter(torch.empty(config["vocab_size"], width))
        self.distances = nn.Parameter(torch.empty(config.get("relative_attention_num_buckets", 32), self.heads))
        self.layers = nn.ModuleList(_T5Layer(*sizes) for _ in range(config["num_layers"]))
        self.norm = _Scaled(width)

    def forward(self, rows: int, length: int) -> Tensor:
        """The tensors of encoding `rows` prompts of `length` tokens."""
        x = self.words.new_empty(rows, length, self.words.shape[1])
        bias = x.new_empty(1, self.heads, length, length) + x.new_empty(
            rows, 1, 1, 1
        )  # every pair of tokens, with the mask
        for layer in self.layers:
            x = layer(x, bias)
        return self.norm(x)


class _T5Layer(nn.Module):
    def __init__(self, width: int, attended: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _Scaled(width), _Scaled(width)
        self.q, self.k, self.v = (nn.Linear(width, attended, bias=False) for _ in range(3))
        self.out = nn.Linear(attended, width, bias=False)
        self.gate, self.wide = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.narrow = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        h = self.norm1(x)
        h = x + self.out(_attended(self.q(h), self.k(h), self.v(h)))
        normed = self.norm2(h)
        gate = self.gate(normed)
        # as transformers has it, unfused
        gate = 0.5 * gate * (1 + torch.tanh(0.7979 * (gate + 0.044715 * torch.pow(gate, 3))))
        return h + self.narrow(gate * self.wide(normed))


class _Scaled(nn.Module):
    """T5's norm: a weight, in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return (wide * torch.rsqrt(wide.square()[..., :1])).to(x.dtype)


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
