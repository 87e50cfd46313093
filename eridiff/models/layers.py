"""The parts that several networks share.

Letters: B batch, L tokens, H heads, D features of one head, C channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where `dtype` is float64: the precision of what the originals force to float32."""
    return torch.promote_types(dtype, torch.float32)


def timestep_sinusoid(times: Tensor, width: int = 256) -> Tensor:
    """Sinusoidal embedding of times in [0, 1] (or of any scalar on the same scale, guidance too).

    Vaswani et al. 2017 with the cosines first and a factor of 1000, as `timestep_embedding` of the Flux original.
    `times` has any shape `[...]`; the result is `[..., width]`, float32, or float64 for float64 times: arguments reach
    30,000 (guidance 30), where float32 moves the network's output by up to 3e-4 relative.
    """
    half = width // 2
    dtype = wide(times.dtype)
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=dtype, device=times.device) / half)
    angles = (1000.0 * times).to(dtype)[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps)` over the last dimension in float32 (float64 stays), then times a learned weight."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.to(wide(x.dtype)), (x.shape[-1],), eps=self.eps)
        return normed.to(x.dtype) * self.weight


class Attention(nn.Module):
    """Softmax attention without parameters; a module, so that a recording shows what goes in and out of it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[B, H, L, D]` each -> `[B, L, H * D]`, scores scaled by `D ** -0.5`, no mask."""
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
