"""How functions of networks go wrong: each takes the right function and gives the wrong one; `causes.py` has the table."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eridiff.models import flux, layers
from eridiff.models.layers import split_heads

Wrong = Callable[..., Any]
right_gelu = F.gelu


def layer_norm_epsilon(eps: float) -> Callable[[Wrong], Wrong]:
    def make(right: Wrong) -> Wrong:
        return lambda x, shape, weight=None, bias=None, _=0.0, **__: right(x, shape, weight, bias, eps)

    return make


def rms_epsilon(eps: float) -> Callable[[Wrong], Wrong]:
    return lambda right: lambda x, shape, weight=None, **_: right(x, shape, weight, eps)


def gelu(act: Callable[[Tensor], Tensor]) -> Callable[[Wrong], Wrong]:
    return lambda _: lambda x, **__: act(x)


def linear(change: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]) -> Callable[[Wrong], Wrong]:
    return lambda right: lambda x, weight, bias=None: right(x, *change(weight, bias))


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


def merged(right: Wrong) -> Wrong:
    def wrong(q: Tensor, *rest: Any, **named: Any) -> Tensor:
        out: Tensor = right(q, *rest, **named)  # B H L D
        return out.permute(0, 2, 3, 1).flatten(2).unflatten(-1, (out.shape[1], -1)).transpose(1, 2)

    return wrong


def chunks(order: Callable[[int], Sequence[int]], interleaved: bool = False) -> Callable[[Wrong], Wrong]:
    """Of the modulations of a block, the last arguments before `seen`: each is cut and put together in another order."""

    def moved(modulation: Tensor, width: int) -> Tensor:
        count = modulation.shape[-1] // width
        if interleaved:
            return modulation.unflatten(-1, (width, count)).transpose(-1, -2).flatten(-2)
        parts = modulation.split(width, dim=-1)
        return torch.cat([parts[i] for i in order(count)], dim=-1)

    def make(right: Wrong) -> Wrong:
        def forward(self: nn.Module, x: Tensor, *rest: Any, **named: Any) -> Any:
            width = x.shape[-1]
            new = [
                moved(t, width) if isinstance(t, Tensor) and t.ndim == 3 and t.shape[-1] % width == 0 and t.shape[-1] > width
                else t for t in rest
            ]  # fmt: skip
            return right(self, x, *new, **named)

        return forward

    return make


def mlp_first(count: int) -> list[int]:
    return [3, 4, 5, 0, 1, 2, *range(6, count)] if count >= 6 else list(range(count))


def gate_first(count: int) -> list[int]:
    return [i + (1, 1, -2)[i % 3] for i in range(count)] if count % 3 == 0 else list(range(count))


def update(gates: bool, late: bool) -> Callable[[Wrong], Wrong]:
    """Of a stream after its attention: gates left out, or an MLP that reads what was there before."""

    def make(_: Wrong) -> Wrong:
        def update(self: Any, x: Tensor, attention: Tensor, modulation: Sequence[Tensor]) -> Tensor:
            _, _, gate1, shift2, scale2, gate2 = modulation
            if not gates:
                gate1 = gate2 = torch.ones_like(gate1)
            after = x + gate1 * self.proj(attention)
            return after + gate2 * self.mlp(layers.modulated(x if late else after, shift2, scale2))

        return update

    return make


def in_halves(_: Wrong) -> Wrong:
    def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
        first, second = x.to(rope.dtype).chunk(2, dim=-1)
        cos, sin = rope
        return torch.cat([cos * first - sin * second, sin * first + cos * second], dim=-1).to(x.dtype)

    return apply_rope


def axes(order: list[int]) -> Callable[[Wrong], Wrong]:
    return lambda right: lambda ids, axes, theta: right(ids[:, order], axes, theta)


def table_in(dtype: torch.dtype) -> Callable[[Wrong], Wrong]:
    return lambda right: lambda *args: right(*args).to(dtype).double()


def half_less_one(values: Tensor, width: int = 256) -> Tensor:
    half = width // 2
    frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=values.device) / (half - 1))
    angles = values.double()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rounded_frequencies(values: Tensor, width: int = 256) -> Tensor:
    """In float32 from correctly rounded frequencies on, which torch's are not: other libraries compute so."""
    half = width // 2
    frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=values.device) / half)
    angles = values.float()[..., None] * frequencies.float()
    return torch.cat([angles.cos(), angles.sin()], dim=-1).double()


def sine_first(right: Wrong) -> Wrong:
    return lambda *args: torch.cat(right(*args).chunk(2, dim=-1)[::-1], dim=-1)


def times(change: Callable[[Tensor], Tensor]) -> Callable[[Wrong], Wrong]:
    return lambda right: lambda times, *rest: right(change(times), *rest)


def conditioning(**left_out: bool) -> Callable[[Wrong], Wrong]:
    """Of the conditioning vector: the guidance or the pooled text left out."""

    def make(right: Wrong) -> Wrong:
        def vector(self: Any, pooled: Tensor, times: Tensor, *rest: Any) -> Tensor:
            if left_out.get("pooled"):
                pooled_in = self.pooled_in if hasattr(self, "pooled_in") else self.vector_in
                return right(self, pooled, times, *rest) - pooled_in(pooled)[:, None]
            dtype = self.time_in.in_layer.weight.dtype
            sinusoids = layers.timestep_sinusoid(layers.prepare_times(times, pooled.shape[0])).to(dtype)
            return self.time_in(sinusoids) + self.pooled_in(pooled)[:, None]

        return vector

    return make


def guidance_divided(right: Wrong) -> Wrong:
    return lambda self, pooled, times, guidance=None: right(
        self, pooled, times, None if guidance is None else guidance / 1000
    )


def heads_inside(_: Wrong) -> Wrong:
    def wrong(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unflatten(-1, (heads, 3, -1)).permute(3, 0, 2, 1, 4)
        return q, k, v

    return wrong


def heads_last(_: Wrong) -> Wrong:
    def wrong(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unflatten(-1, (3, -1, heads)).permute(2, 0, 4, 1, 3)
        return q, k, v

    return wrong


def parts_as(order: list[int]) -> Callable[[Wrong], Wrong]:
    def make(_: Wrong) -> Wrong:
        def wrong(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
            parts = split_heads(qkv, heads)
            return tuple(parts[i] for i in order)

        return wrong

    return make


def single(wrong_in: bool, wrong_out: bool, gate: bool = True) -> Callable[[Wrong], Wrong]:
    """Of Flux's single block: which rows of linear1 and columns of linear2 are the MLP's."""

    def make(_: Wrong) -> Wrong:
        def forward(self: Any, x: Tensor, rope: Tensor, modulation: Tensor, seen: Tensor | None = None) -> Tensor:
            shift, scale, by = modulation.chunk(3, dim=-1)
            whole = self.linear1(layers.modulated(x, shift, scale))
            qkv, mlp = whole.split(self.sizes, dim=-1)
            if wrong_in:
                mlp, qkv = whole.split(self.sizes[::-1], dim=-1)
            q, k, v = layers.split_heads(qkv, self.heads)
            attention = self.attention(
                flux.apply_rope(self.q_norm(q), rope), flux.apply_rope(self.k_norm(k), rope), v, seen
            )
            parts = [attention, self.mlp_act(mlp)][:: -1 if wrong_out else 1]
            return x + (by if gate else 1) * self.linear2(torch.cat(parts, dim=-1))

        return forward

    return make


class ImageFirst:
    """torch, whose `cat` joins two in the other order: tokens of text and image, a stream and its skip."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def cat(self, tensors: Any, dim: int = 0) -> Tensor:
        tokens = dim in (1, 2) and len(tensors) == 2
        return torch.cat(list(tensors)[::-1] if tokens else tensors, dim=dim)


def gate_in_front(_: Wrong) -> Wrong:
    def forward(self: Any, x: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        normed = self.norm1(x)
        x = x + self.self_attention(normed, self.self_attention.keys_values(normed))
        x = x + self.cross_attention(self.norm2(x), keys_values)
        gate, value = self.mlp_in(self.norm3(x)).chunk(2, dim=-1)
        added: Tensor = self.mlp_out(value * F.gelu(gate))
        return x + added

    return forward


def normed(change: Callable[[Any, Tensor], Tensor]) -> Callable[[Wrong], Wrong]:
    return lambda _: change


def bfloat16(right: Wrong) -> Wrong:
    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = right(*args, **kwargs)
        return output.bfloat16().to(output.dtype)

    return wrong


def padded(right: Wrong) -> Wrong:
    return lambda x, pad, *rest, **named: right(x, (1, 0, 1, 0) if pad == (0, 1, 0, 1) else pad, *rest, **named)


def decoded_from(inner: Callable[[Tensor, float, float], Tensor]) -> Callable[[Wrong], Wrong]:
    """Of the autoencoder's latents: what the decoder is given, `inner(latents, scale, shift)`."""

    def make(right: Wrong) -> Wrong:
        def decode(self: Any, latents: Tensor) -> Tensor:
            scale, shift = self.config.scale, self.config.shift
            return right(self, (inner(latents, scale, shift) - shift) * scale)

        return decode

    return make


def encoded_to(outer: Callable[[Tensor, float, float], Tensor]) -> Callable[[Wrong], Wrong]:
    """Of the autoencoder's mean: what the network is given, `outer(mean, scale, shift)`."""

    def make(right: Wrong) -> Wrong:
        def encode(self: Any, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
            scale, shift = self.config.scale, self.config.shift
            return outer(right(self, pictures, noise) / scale + shift, scale, shift)

        return encode

    return make


def log_variance(right: Wrong) -> Wrong:
    return lambda self, pictures: right(self, pictures)[::-1]


def rms(gain: Callable[[Tensor], Tensor | float]) -> Callable[[Wrong], Wrong]:
    return normed(lambda self, x: F.rms_norm(x, (x.shape[-1],), eps=self.eps) * gain(self.weight))


def without_mean(_: Wrong) -> Wrong:
    return lambda x, shape, *rest, **named: F.rms_norm(x, shape, eps=1e-6)


def as_layer_norm(self: Any, x: Tensor) -> Tensor:
    normed: Tensor = F.layer_norm(x, (x.shape[-1],), eps=self.eps) * self.weight
    return normed


def plain(right: Wrong) -> Wrong:
    """A norm without gain and offset."""
    return lambda x, shape, weight=None, bias=None, eps=1e-5: right(x, shape, None, None, eps)


def grouped(groups: Callable[[int], int]) -> Callable[[Wrong], Wrong]:
    return lambda right: lambda x, count, *rest: right(x, groups(x.shape[1]), *rest)


def kernel(change: Callable[[Tensor], Tensor]) -> Callable[[Wrong], Wrong]:
    return lambda right: lambda x, weight, *rest: right(x, change(weight), *rest)


def patches_channel_last(weight: Tensor) -> Tensor:
    """The kernel that multiplies 2 x 2 patches whose channels run fastest."""
    out, channels, *side = weight.shape
    if side != [2, 2]:
        return weight
    return weight.reshape(out, 2, 2, channels).permute(0, 3, 1, 2)


def columns_first(_: Wrong) -> Wrong:
    def unpatchify(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        patches = tokens.unflatten(1, grid).unflatten(-1, (2, 2, -1))  # B h w column row C
        return patches.permute(0, 5, 1, 4, 2, 3).flatten(4).flatten(2, 3)

    return unpatchify


def without_bias(right: Wrong) -> Wrong:
    return lambda x, weight, bias=None, *rest: right(x, weight, None, *rest)


def less_its_input(right: Wrong) -> Wrong:
    """Of a block of an image's features: the input is not added."""
    return lambda self, x, *rest: right(self, x, *rest) - (self.shortcut(x) if hasattr(self, "shortcut") else x)


def unshifted(right: Wrong) -> Wrong:
    return lambda self, x, *shift: right(self, x, *(0 * s for s in shift))


def corner(right: Wrong) -> Wrong:
    def crop(self: Any, grid: tuple[int, int]) -> Tensor:
        cut: Tensor = self.table.unflatten(1, (self.side, self.side))[:, : grid[0], : grid[1]].flatten(1, 2)
        return cut

    return crop


# of text encoders --------------------------------------------------------------------------------------------------------


def positions(change: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]) -> Callable[[Wrong], Wrong]:
    """Of the embedding of positions alone: `change(positions, look_up)`."""

    def make(right: Wrong) -> Wrong:
        def wrong(ids: Tensor, table: Tensor, *rest: Any, **named: Any) -> Tensor:
            def look_up(places: Tensor) -> Tensor:
                return right(places.clamp_max(len(table) - 1), table, *rest, **named)

            counted = torch.arange(ids.shape[-1], device=ids.device)
            return change(ids, look_up) if ids.shape[0] == 1 and torch.equal(ids[0], counted) else look_up(ids)

        return wrong

    return make


def widened(right: Wrong) -> Wrong:
    return lambda ids, table, *rest, **named: right(ids, table, *rest, **named) * table.shape[-1] ** 0.5


def padded_with(value: Callable[[int], int]) -> Callable[[Wrong], Wrong]:
    def wrong(ids: Tensor, end: int) -> Tensor:
        ends = ids == end
        return ids.masked_fill(ends.cumsum(1) > ends.int(), value(end))

    return lambda _: wrong


def at(place: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Wrong], Wrong]:
    return lambda _: lambda last, ids, end: place(last, ids)


def buckets(change: Callable[[Wrong, Tensor], Tensor]) -> Callable[[Any], Any]:
    """Of T5's relative positions, key minus query."""
    return lambda right: staticmethod(lambda distance, *_, **__: change(right, distance))


def bias_once(right: Wrong) -> Wrong:
    """T5's relative bias in the first block alone."""

    def forward(self: Any, hidden: Tensor, *rest: Any, **named: Any) -> Any:
        return right(self, hidden, *rest, **named | {"position_bias": None})

    return forward


def gate_behind(right: Wrong) -> Wrong:
    """Of T5's gated MLP: the activation is on wi_1."""

    def forward(self: Any, x: Tensor) -> Any:
        return self.wo(self.wi_0(x) * self.act(self.wi_1(x)))

    return forward
