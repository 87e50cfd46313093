"""The errors that ports make, each as a change of our own network: where it makes a difference vanish, it is the cause.

A cause is a row of `CAUSES`: what is printed, and the function of ours that is exchanged for a wrong one while it is tried.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eridiff.models import autoencoder, flux, layers, mmdit, unet
from eridiff.models.layers import sinusoid, split_heads
from eridiff.trace.names import Source
from eridiff.trace.replay import Run, explained

MODULES: tuple[Any, ...] = (layers, flux, mmdit, unet, autoencoder)
Wrong = Callable[..., Any]


@dataclass(frozen=True)
class Cause:
    """`function` is one of torch.nn.functional (`F.gelu`), of our files wherever it is used, or a method (`RMSNorm.forward`).

    `make` takes the right function and gives the wrong one.
    """

    says: str
    function: str
    make: Callable[[Any], Any]

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Within the block our networks have this error."""
        owner, _, name = self.function.rpartition(".")
        if owner == "F":
            owners: list[Any] = [F]
        elif owner:
            owners = [next(vars(m)[owner] for m in MODULES if owner in vars(m))]
        else:
            owners = [m for m in MODULES if name in vars(m)]
        with ExitStack() as stack:
            keeps = layers.Last.__call__  # a table that was made before, or is made now, says nothing of the other
            stack.callback(setattr, layers.Last, "__call__", keeps)
            layers.Last.__call__ = _anew  # type: ignore[method-assign]
            for place in owners:
                right = vars(place)[name]
                stack.callback(setattr, place, name, right)
                setattr(place, name, self.make(right))
            yield


def causes_of(
    network: nn.Module,
    trace: Mapping[str, Tensor],
    sources: Mapping[str, Source],
    run: Run,
    local: Mapping[str, tuple[float, float]],
) -> dict[str, tuple[str, float]]:
    """The cause that fits best, and what difference it leaves, for each name of `local`.

    - local: the difference at each name, and what rounding may do there; causes are tried until all is explained to that.

    Where a cause leaves more than rounding, a second one is tried beside it: two errors in one stretch without a value of the
    trace between them. A name is absent where no cause takes away nine tenths of the difference.
    """
    best: dict[str, tuple[tuple[Cause, ...], float]] = {
        name: ((), difference) for name, (difference, _) in local.items()
    }

    def try_beside(known: tuple[Cause, ...]) -> None:
        """Every cause, with those planted that were found, at the names that they leave a rest of."""
        rest = {name: left for name, (causes, left) in best.items() if causes == known and left > local[name][1]}
        for cause in CAUSES:
            with ExitStack() as stack:
                for planted in dict.fromkeys((*known, cause)):
                    stack.enter_context(planted.planted())
                left = explained(network, trace, sources, run)
            for name, difference in rest.items():
                if left.get(name, difference) < min(0.1 * difference, best[name][1]):
                    best[name] = (*known, cause), left[name]
            if all(best[name][1] <= local[name][1] for name in rest):
                break

    try_beside(())
    for known in dict.fromkeys(causes for name, (causes, left) in best.items() if causes and left > local[name][1]):
        try_beside(known)
    return {
        name: ("; and ".join(cause.says for cause in causes), left) for name, (causes, left) in best.items() if causes
    }


def _anew(self: layers.Last, asked: Any, make: Callable[[], Any]) -> Any:
    return make()


# how functions go wrong -----------------------------------------------------------------------------------------------


def _layer_norm_epsilon(eps: float) -> Callable[[Wrong], Wrong]:
    def make(right: Wrong) -> Wrong:
        return lambda x, shape, weight=None, bias=None, _=0.0, **__: right(x, shape, weight, bias, eps)

    return make


def _rms_epsilon(eps: float) -> Callable[[Wrong], Wrong]:
    return lambda right: lambda x, shape, weight=None, **_: right(x, shape, weight, eps)


def _gelu(act: Callable[[Tensor], Tensor]) -> Callable[[Wrong], Wrong]:
    return lambda _: lambda x, **__: act(x)


_right_gelu = F.gelu


def _linear(change: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]) -> Callable[[Wrong], Wrong]:
    return lambda right: lambda x, weight, bias=None: right(x, *change(weight, bias))


def _attention(**options: Any) -> Callable[[Wrong], Wrong]:
    return lambda right: lambda q, k, v, *_, **__: right(q, k, v, **options)


def _attention_scaled_by_width(right: Wrong) -> Wrong:
    return lambda q, k, v, *_, **__: right(q, k, v, scale=(q.shape[1] * q.shape[-1]) ** -0.5)


def _chunks(order: Callable[[int], Sequence[int]], interleaved: bool = False) -> Callable[[Wrong], Wrong]:
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


def _mlp_first(count: int) -> list[int]:
    return [3, 4, 5, 0, 1, 2, *range(6, count)] if count >= 6 else list(range(count))


def _gate_first(count: int) -> list[int]:
    return [i + (1, 1, -2)[i % 3] for i in range(count)] if count % 3 == 0 else list(range(count))


def _update(gates: bool, late: bool) -> Callable[[Wrong], Wrong]:
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


def _in_halves(_: Wrong) -> Wrong:
    def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
        first, second = x.to(rope.dtype).chunk(2, dim=-1)
        cos, sin = rope
        return torch.cat([cos * first - sin * second, sin * first + cos * second], dim=-1).to(x.dtype)

    return apply_rope


def _axes(order: list[int]) -> Callable[[Wrong], Wrong]:
    return lambda right: lambda ids, axes, theta: right(ids[:, order], axes, theta)


def _table_in(dtype: torch.dtype) -> Callable[[Wrong], Wrong]:
    return lambda right: lambda *args: right(*args).to(dtype).double()


def _half_less_one(values: Tensor, width: int = 256) -> Tensor:
    half = width // 2
    frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=values.device) / (half - 1))
    angles = values.double()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _rounded_frequencies(values: Tensor, width: int = 256) -> Tensor:
    """In float32 from correctly rounded frequencies on, which torch's are not: other libraries compute so."""
    half = width // 2
    frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=values.device) / half)
    angles = values.float()[..., None] * frequencies.float()
    return torch.cat([angles.cos(), angles.sin()], dim=-1).double()


def _sine_first(right: Wrong) -> Wrong:
    return lambda *args: torch.cat(right(*args).chunk(2, dim=-1)[::-1], dim=-1)


def _times(change: Callable[[Tensor], Tensor]) -> Callable[[Wrong], Wrong]:
    return lambda right: lambda times, *rest: right(change(times), *rest)


def _conditioning(**left_out: bool) -> Callable[[Wrong], Wrong]:
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


def _guidance_divided(right: Wrong) -> Wrong:
    return lambda self, pooled, times, guidance=None: right(
        self, pooled, times, None if guidance is None else guidance / 1000
    )


def _heads_inside(_: Wrong) -> Wrong:
    def wrong(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unflatten(-1, (heads, 3, -1)).permute(3, 0, 2, 1, 4)
        return q, k, v

    return wrong


def _heads_last(_: Wrong) -> Wrong:
    def wrong(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unflatten(-1, (3, -1, heads)).permute(2, 0, 4, 1, 3)
        return q, k, v

    return wrong


def _parts_as(order: list[int]) -> Callable[[Wrong], Wrong]:
    def make(_: Wrong) -> Wrong:
        def wrong(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
            parts = split_heads(qkv, heads)
            return tuple(parts[i] for i in order)

        return wrong

    return make


def _merged(right: Wrong) -> Wrong:
    def forward(self: Any, q: Tensor, *rest: Any) -> Tensor:
        joined = right(self, q, *rest)
        return joined.unflatten(-1, (q.shape[1], -1)).transpose(-1, -2).flatten(-2)

    return forward


def _single(wrong_in: bool, wrong_out: bool, gate: bool = True) -> Callable[[Wrong], Wrong]:
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


class _ImageFirst:
    """torch, whose `cat` joins two in the other order: tokens of text and picture, a stream and its skip."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def cat(self, tensors: Any, dim: int = 0) -> Tensor:
        tokens = dim in (1, 2) and len(tensors) == 2
        return torch.cat(list(tensors)[::-1] if tokens else tensors, dim=dim)


def _gate_in_front(_: Wrong) -> Wrong:
    def forward(self: Any, x: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        normed = self.norm1(x)
        x = x + self.self_attention(normed, self.self_attention.keys_values(normed))
        x = x + self.cross_attention(self.norm2(x), keys_values)
        gate, value = self.mlp_in(self.norm3(x)).chunk(2, dim=-1)
        added: Tensor = self.mlp_out(value * F.gelu(gate))
        return x + added

    return forward


def _normed(change: Callable[[Any, Tensor], Tensor]) -> Callable[[Wrong], Wrong]:
    return lambda _: change


def _bfloat16(right: Wrong) -> Wrong:
    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = right(*args, **kwargs)
        return output.bfloat16().to(output.dtype)

    return wrong


def _padded(right: Wrong) -> Wrong:
    return lambda x, pad, *rest, **named: right(x, (1, 0, 1, 0) if pad == (0, 1, 0, 1) else pad, *rest, **named)


def _statistics(scale: bool, shift: bool) -> Callable[[Wrong], Wrong]:
    """Of the autoencoder's latents."""

    def make(right: Wrong) -> Wrong:
        def decode(self: Any, latents: Tensor) -> Tensor:
            config = self.config
            given = SimpleNamespace(
                config=SimpleNamespace(scale=config.scale if scale else 1.0, shift=config.shift if shift else 0.0)
            )
            inner = latents / given.config.scale + given.config.shift
            decoded: Tensor = right(self, (inner - config.shift) * config.scale)
            return decoded

        return decode

    return make


def _rms(gain: Callable[[Tensor], Tensor | float]) -> Callable[[Wrong], Wrong]:
    return _normed(lambda self, x: F.rms_norm(x, (x.shape[-1],), eps=self.eps) * gain(self.weight))


def _without_mean(_: Wrong) -> Wrong:
    return lambda x, shape, *rest, **named: F.rms_norm(x, shape, eps=1e-6)


BLOCKS = ("DoubleBlock.forward", "JointBlock.forward", "SingleBlock.forward", "FinalLayer.forward")
CAUSES: tuple[Cause, ...] = (
    Cause("the RMS norm's epsilon is 1e-5 in place of 1e-6", "F.rms_norm", _rms_epsilon(1e-5)),
    Cause("the RMS norm's epsilon is float32's 1.19e-7 in place of 1e-6", "F.rms_norm", _rms_epsilon(2.0**-23)),
    Cause("the RMS norm's epsilon is 1e-8 in place of 1e-6", "F.rms_norm", _rms_epsilon(1e-8)),
    Cause("the RMS norm has no epsilon", "F.rms_norm", _rms_epsilon(0.0)),
    Cause("the layer norm's epsilon is 1e-5", "F.layer_norm", _layer_norm_epsilon(1e-5)),
    Cause("the layer norm's epsilon is 1e-6", "F.layer_norm", _layer_norm_epsilon(1e-6)),
    Cause("the layer norm's epsilon is 1e-12", "F.layer_norm", _layer_norm_epsilon(1e-12)),
    Cause("the group norm's epsilon is 1e-5", "F.group_norm", _layer_norm_epsilon(1e-5)),
    Cause("the group norm's epsilon is 1e-6", "F.group_norm", _layer_norm_epsilon(1e-6)),
    Cause("an RMS norm in place of the layer norm", "F.layer_norm", _without_mean),
    Cause("the norm of q and k is left out", "RMSNorm.forward", _normed(lambda self, x: x)),
    Cause("the RMS norm's gain is left out", "RMSNorm.forward", _rms(lambda weight: 1.0)),
    Cause("the RMS norm's gain is taken as 1 + weight", "RMSNorm.forward", _rms(lambda weight: 1 + weight)),
    Cause("shift and scale are exchanged", "modulated", lambda right: lambda x, shift, scale: right(x, scale, shift)),
    Cause("scale in place of 1 + scale", "modulated", lambda right: lambda x, shift, scale: right(x, shift, scale - 1)),
    Cause("the shift is left out", "modulated", lambda right: lambda x, shift, scale: right(x, 0 * shift, scale)),
    Cause("the scale is left out", "modulated", lambda right: lambda x, shift, scale: right(x, shift, 0 * scale)),
    *(Cause("the modulation's chunks of MLP and attention are exchanged", f, _chunks(_mlp_first)) for f in BLOCKS[:2]),
    *(Cause("the modulation's chunks are gate, shift, scale in place of shift, scale, gate", f, _chunks(_gate_first)) for f in BLOCKS[:3]),
    *(Cause("the modulation is interleaved, [width, chunks] in place of [chunks, width]", f, _chunks(range, True)) for f in BLOCKS),
    Cause("SiLU is left out", "F.silu", lambda _: lambda x, *__, **___: x),
    Cause("GELU in place of SiLU", "F.silu", lambda _: lambda x, *__, **___: _right_gelu(x)),
    Cause("the erf form of GELU in place of tanh", "F.gelu", _gelu(lambda x: _right_gelu(x))),
    Cause("the tanh form of GELU in place of erf", "F.gelu", _gelu(lambda x: _right_gelu(x, approximate="tanh"))),
    Cause("quick GELU, x * sigmoid(1.702 x), in place of GELU", "F.gelu", _gelu(lambda x: x * torch.sigmoid(1.702 * x))),
    Cause("SiLU in place of GELU", "F.gelu", _gelu(lambda x: x * torch.sigmoid(x))),
    Cause("ReLU in place of GELU", "F.gelu", _gelu(lambda x: x.clamp_min(0))),
    Cause("the activation is left out", "F.gelu", _gelu(lambda x: x)),
    Cause("a square matrix is transposed", "F.linear", _linear(lambda w, b: (w.T if w.shape[0] == w.shape[-1] else w, b))),
    Cause("a matrix is read in the other order, [in, out] without transposing", "F.linear", _linear(lambda w, b: (w.reshape(w.shape[::-1]).T, b))),
    Cause("the bias is left out", "F.linear", _linear(lambda w, b: (w, None))),
    Cause("the bias is added twice", "F.linear", _linear(lambda w, b: (w, None if b is None else 2 * b))),
    Cause("the attention's scores are not scaled", "F.scaled_dot_product_attention", _attention(scale=1.0)),
    Cause("the attention's scores are scaled by the whole width in place of a head's", "F.scaled_dot_product_attention", _attention_scaled_by_width),
    Cause("a causal mask", "F.scaled_dot_product_attention", _attention(is_causal=True)),
    Cause("heads are joined as (features, heads) in place of (heads, features)", "Attention.forward", _merged),
    Cause("qkv is read as (heads, 3, features) in place of (3, heads, features)", "split_heads", _heads_inside),
    Cause("qkv is read as (3, features, heads) in place of (3, heads, features)", "split_heads", _heads_last),
    Cause("q and k are exchanged", "split_heads", _parts_as([1, 0, 2])),
    Cause("k and v are exchanged", "split_heads", _parts_as([0, 2, 1])),
    Cause("rotation of halves (i, i + D/2) in place of neighbours (2i, 2i + 1)", "apply_rope", _in_halves),
    Cause("rotation in the opposite direction", "apply_rope", lambda right: lambda x, rope: right(x, torch.stack([rope[0], -rope[1]]))),
    Cause("the rotation is left out", "apply_rope", lambda _: lambda x, rope: x),
    Cause("rows and columns are exchanged in the rotary table", "rope_table", _axes([0, 2, 1])),
    Cause("the rotary table is computed in bfloat16", "rope_table", _table_in(torch.bfloat16)),
    Cause("the rotary angle's base is not 10000 but 1000", "rope_table", lambda right: lambda ids, axes, _: right(ids, axes, 1000)),
    Cause("the rotary positions start at 1", "rope_table", lambda right: lambda ids, axes, theta: right(ids + 1, axes, theta)),
    Cause("what is joined stands in the other order: picture before text, or skip before stream", "torch", lambda _: _ImageFirst()),
    Cause("the gates are left out", "Stream.update", _update(gates=False, late=False)),
    Cause("the MLP reads the stream before the attention was added", "Stream.update", _update(gates=True, late=True)),
    Cause("the rows of linear1 are read as MLP, qkv in place of qkv, MLP", "SingleBlock.forward", _single(True, False)),
    Cause("linear2 is fed MLP, attention in place of attention, MLP", "SingleBlock.forward", _single(False, True)),
    Cause("the single block's gate is left out", "SingleBlock.forward", _single(False, False, gate=False)),
    Cause("times are on the scale of 1 in place of 1000", "sinusoid", _times(lambda t: t / 1000)),
    Cause("times are rounded to bfloat16", "timestep_sinusoid", _times(lambda t: t.bfloat16().to(t.dtype))),
    Cause("times are rounded to whole numbers", "sinusoid", _times(torch.round)),
    Cause("the sinusoid has sines first in place of cosines", "sinusoid", _sine_first),
    Cause("the sinusoid's frequencies are divided by half - 1 in place of half", "sinusoid", lambda _: _half_less_one),
    Cause("the sinusoid is computed in float32", "sinusoid", lambda _: lambda values, width=256: sinusoid(values.float(), width).double()),
    Cause("the sinusoid is computed in float32", "sinusoid", lambda _: _rounded_frequencies),
    Cause("the sinusoid is rounded to bfloat16", "sinusoid", _bfloat16),
    Cause("the guidance is on the scale of 1 in place of 1000", "Flux.conditioning_vector", _guidance_divided),
    Cause("the guidance embedding is left out", "Flux.conditioning_vector", _conditioning(guidance=True)),
    Cause("the pooled text is left out", "Flux.conditioning_vector", _conditioning(pooled=True)),
    Cause("the pooled text is left out", "MMDiT.conditioning_vector", _conditioning(pooled=True)),
    Cause("the gate is the first half of the gated MLP", "TransformerBlock.forward", _gate_in_front),
    Cause("padding at the left and top in place of right and bottom", "F.pad", _padded),
    Cause("bilinear in place of nearest neighbour", "F.interpolate", lambda right: lambda x, **_: right(x, scale_factor=2.0, mode="bilinear")),
    Cause("the latents' shift is left out", "Autoencoder.decode", _statistics(scale=True, shift=False)),
    Cause("the latents' scale is left out", "Autoencoder.decode", _statistics(scale=False, shift=True)),
    Cause("results are rounded to bfloat16", "F.linear", _bfloat16),
)  # fmt: skip
