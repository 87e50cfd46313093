"""What every network has: norms, activations, matrices, attention, the sinusoid of times."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eridiff.models.layers import split_heads

Wrong = Callable[..., Any]
right_gelu = F.gelu


def layer_norm_epsilon(eps: float) -> Callable[[Wrong], Wrong]:
    def make(right: Wrong) -> Wrong:
        return lambda x, shape, weight=None, bias=None, _=0.0, **__: right(x, shape, weight, bias, eps)

    return make


def rms_epsilon(eps: float) -> Callable[[Wrong], Wrong]:
    return lambda right: lambda x, shape, weight=None, *_, **__: right(x, shape, weight, eps)


def rms(gain: Callable[[Tensor], Tensor | float]) -> Callable[[Wrong], Wrong]:
    return lambda _: lambda self, x: F.rms_norm(x, (x.shape[-1],), eps=self.eps) * gain(self.weight)


def without_mean(_: Wrong) -> Wrong:
    def layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, *_: Any, **__: Any) -> Tensor:
        normed = F.rms_norm(x, shape, weight, 1e-6)
        return normed if bias is None else normed + bias

    return layer_norm


def over_all_heads(self: Any, x: Tensor) -> Tensor:
    normed: Tensor = F.rms_norm(x.transpose(1, 2).flatten(2), (x.shape[1] * x.shape[3],), eps=self.eps)
    return normed.unflatten(2, (x.shape[1], -1)).transpose(1, 2) * self.weight


def as_layer_norm(self: Any, x: Tensor) -> Tensor:
    normed: Tensor = F.layer_norm(x, (x.shape[-1],), eps=self.eps) * self.weight
    return normed


def plain(right: Wrong) -> Wrong:
    """A norm without gain and offset."""
    return lambda x, shape, weight=None, bias=None, eps=1e-5: right(x, shape, None, None, eps)


def grouped(groups: Callable[[int], int]) -> Callable[[Wrong], Wrong]:
    return lambda right: lambda x, count, *rest: right(x, groups(x.shape[1]), *rest)


def gelu(act: Callable[[Tensor], Tensor]) -> Callable[[Wrong], Wrong]:
    return lambda _: lambda x, **__: act(x)


def linear(change: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]) -> Callable[[Wrong], Wrong]:
    return lambda right: lambda x, weight, bias=None: right(x, *change(weight, bias))


def bfloat16(right: Wrong) -> Wrong:
    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = right(*args, **kwargs)
        return output.bfloat16().to(output.dtype)

    return wrong


def attention(**options: Any) -> Callable[[Wrong], Wrong]:
    """Other options, the mask as it was."""
    return lambda right: lambda q, k, v, *rest, **named: right(q, k, v, *rest, **named | options)


def attention_scaled_by_width(right: Wrong) -> Wrong:
    return lambda q, k, v, *rest, **named: right(
        q, k, v, *rest, **named | {"scale": (q.shape[1] * q.shape[-1]) ** -0.5}
    )


def unmasked(right: Wrong) -> Wrong:
    return lambda q, k, v, *_, scale=None, **__: right(q, k, v, scale=scale)


def regrouped(cut: Callable[[Tensor, int], Tensor]) -> Callable[[Wrong], Wrong]:
    """Attention whose heads are cut otherwise from `[B, L, H * D]`, `cut(joined, H)` -> `[B, L, H', D']`."""

    def make(right: Wrong) -> Wrong:
        def wrong(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> Tensor:
            heads = q.shape[1]
            q, k, v = (cut(x.transpose(1, 2).flatten(2), heads).transpose(1, 2) for x in (q, k, v))
            given = named | ({} if named.get("scale") == 1.0 else {"scale": None})  # T5 has no scale
            out: Tensor = right(q, k, v, *rest, **given)
            return out.transpose(1, 2).flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2)

        return wrong

    return make


def heads_of(count: int) -> Callable[[Tensor, int], Tensor]:
    return lambda x, heads: x.unflatten(-1, (count, -1))


def merged(right: Wrong) -> Wrong:
    def wrong(q: Tensor, *rest: Any, **named: Any) -> Tensor:
        out: Tensor = right(q, *rest, **named)  # B H L D
        return out.permute(0, 2, 3, 1).flatten(2).unflatten(-1, (out.shape[1], -1)).transpose(1, 2)

    return wrong


def qkv_as(sizes: Callable[[int], tuple[int, ...]], order: Sequence[int]) -> Callable[[Wrong], Wrong]:
    """The features of qkv in other parts, `sizes(heads)`; `order` makes them [q, k and v, B, heads, L, D]."""
    return lambda _: lambda qkv, heads: qkv.unflatten(-1, sizes(heads)).permute(order).unbind()


def parts_as(order: list[int]) -> Callable[[Wrong], Wrong]:
    def make(_: Wrong) -> Wrong:
        def wrong(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
            parts = split_heads(qkv, heads)
            return tuple(parts[i] for i in order)

        return wrong

    return make


def borrowed(whose: Mapping[str, str]) -> Callable[[Wrong], Wrong]:
    """Of a module's method: while it runs, parts of the module have the weights of others."""

    def make(right: Wrong) -> Wrong:
        def wrong(self: nn.Module, *args: Any, **named: Any) -> Any:
            parts = {part: self.get_submodule(part) for part in {*whose, *whose.values()}}
            own = {part: module._parameters for part, module in parts.items()}
            try:
                for part, other in whose.items():
                    parts[part]._parameters = own[other]
                return right(self, *args, **named)
            finally:
                for part, module in parts.items():
                    module._parameters = own[part]

        return wrong

    return make


def times(change: Callable[[Tensor], Tensor]) -> Callable[[Wrong], Wrong]:
    return lambda right: lambda times, *rest: right(change(times), *rest)


def sinusoid_of(dtype: torch.dtype = torch.float64, less: int = 0) -> Callable[[Wrong], Wrong]:
    """Frequencies `10000 ** -(i / (half - less))`, correctly rounded to `dtype`, as other libraries compute them and torch does not."""

    def make(_: Wrong) -> Wrong:
        def sinusoid(values: Tensor, width: int = 256) -> Tensor:
            exponents = torch.arange(width // 2, dtype=torch.float64, device=values.device) / (width // 2 - less)
            angles = values.to(dtype)[..., None] * (10000.0**-exponents).to(dtype)
            return torch.cat([angles.cos(), angles.sin()], dim=-1).double()

        return sinusoid

    return make


def sine_first(right: Wrong) -> Wrong:
    return lambda *args: torch.cat(right(*args).chunk(2, dim=-1)[::-1], dim=-1)
