"""The errors that ports make, each as a change of our own network: where it makes a difference vanish, it is the cause.

A cause is a row of `CAUSES`: what is printed, and eridiff's function that is exchanged for a wrong one (`wrong.py`) while it
is tried.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eridiff.models import autoencoder, flux, layers, mmdit, unet
from eridiff.models.flux import unpatchify as flux_unpatchify
from eridiff.models.layers import sinusoid
from eridiff.trace import text, wrong
from eridiff.trace.names import Source
from eridiff.trace.replay import Run, explained

MODULES: tuple[Any, ...] = (layers, flux, mmdit, unet, autoencoder, text)
LATER = "transformers.models.t5.modeling_t5"  # imported with the first T5


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
        modules = [*MODULES, *(m for m in (sys.modules.get(LATER),) if m)]
        if owner == "F":
            owners: list[Any] = [F]
        elif owner:
            owners = list({vars(m)[owner] for m in modules if owner in vars(m)})
        else:
            owners = [m for m in modules if name in vars(m)]
        with ExitStack() as stack:
            keeps = layers.Last.__call__  # a table that was made before, or is made now, does not show the other
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
    """The cause that fits best, and what difference it leaves, for each name at which an error was made.

    - local: of every name, the difference made there and what rounding may do there.

    A cause is tried everywhere at once; of those that fit, the one that spoils the fewest places without an error is taken.
    Where it leaves more than rounding, a second one is tried beside it: two errors in one stretch without a value of the
    trace between them. A name is absent where no cause takes away nine tenths of the difference.
    """
    made = {name: difference for name, (difference, bound) in local.items() if difference > bound}
    best = {name: Fit((), difference, 0, True) for name, difference in made.items()}
    causes_here = _of_called(network, run)

    def try_beside(known: tuple[Cause, ...]) -> None:
        """Every cause, with those planted that were found, at the names that they leave a rest of."""
        rest = {name: fit.left for name, fit in best.items() if fit.causes == known and fit.rest}
        for cause in causes_here:
            with ExitStack() as stack:
                for planted in dict.fromkeys((*known, cause)):
                    stack.enter_context(planted.planted())
                left = explained(network, trace, sources, run)
            spoiled = sum(left.get(name, 0.0) > bound for name, (_, bound) in local.items() if name not in made)
            for name, difference in rest.items():
                fit = Fit(
                    (*known, cause), left.get(name, difference), spoiled, left.get(name, difference) > local[name][1]
                )
                if fit.left < 0.1 * difference and fit.rank < best[name].rank:
                    best[name] = fit
            if not any(best[name].rest or best[name].spoiled for name in rest):
                break

    try_beside(())
    for known in dict.fromkeys(fit.causes for fit in best.values() if fit.causes and fit.rest):
        try_beside(known)
    return {
        name: ("; and ".join(cause.says for cause in fit.causes), fit.left) for name, fit in best.items() if fit.causes
    }


@dataclass(frozen=True)
class Fit:
    """Causes tried at one name: what they leave, how many other names they spoil, whether what is left is more than rounding."""

    causes: tuple[Cause, ...]
    left: float
    spoiled: int
    rest: bool

    @property
    def rank(self) -> tuple[bool, int, float]:
        return self.rest, 0 if self.rest else self.spoiled, self.left


def _of_called(network: nn.Module, run: Run) -> list["Cause"]:
    """The causes whose functions this network calls."""
    called = set()

    def noted(name: str) -> Callable[[Any], Any]:
        def make(right: Any) -> Any:
            def note(*args: Any, **kwargs: Any) -> Any:
                called.add(name)
                return right(*args, **kwargs)

            return staticmethod(note) if isinstance(right, staticmethod) else note

        return make

    functions = {cause.function for cause in CAUSES} - {"torch"}
    with ExitStack() as stack, torch.no_grad():
        for name in functions:
            stack.enter_context(Cause("", name, noted(name)).planted())
        run(network)
    return [cause for cause in CAUSES if cause.function in called or cause.function == "torch"]


def _anew(self: layers.Last, asked: Any, make: Callable[[], Any]) -> Any:
    return make()


BLOCKS = ("DoubleBlock.forward", "JointBlock.forward", "SingleBlock.forward", "FinalLayer.forward")
CAUSES: tuple[Cause, ...] = (
    Cause("the RMS norm's epsilon is 1e-5 in place of 1e-6", "F.rms_norm", wrong.rms_epsilon(1e-5)),
    Cause("the RMS norm's epsilon is float32's 1.19e-7 in place of 1e-6", "F.rms_norm", wrong.rms_epsilon(2.0**-23)),
    Cause("the RMS norm's epsilon is 1e-8 in place of 1e-6", "F.rms_norm", wrong.rms_epsilon(1e-8)),
    Cause("the RMS norm has no epsilon", "F.rms_norm", wrong.rms_epsilon(0.0)),
    Cause("the layer norm's epsilon is 1e-5", "F.layer_norm", wrong.layer_norm_epsilon(1e-5)),
    Cause("the layer norm's epsilon is 1e-6", "F.layer_norm", wrong.layer_norm_epsilon(1e-6)),
    Cause("the layer norm's epsilon is 1e-12", "F.layer_norm", wrong.layer_norm_epsilon(1e-12)),
    Cause("the group norm's epsilon is 1e-5", "F.group_norm", wrong.layer_norm_epsilon(1e-5)),
    Cause("the group norm's epsilon is 1e-6", "F.group_norm", wrong.layer_norm_epsilon(1e-6)),
    Cause("an RMS norm in place of the layer norm", "F.layer_norm", wrong.without_mean),
    Cause("the RMS norm is left out", "RMSNorm.forward", wrong.normed(lambda self, x: x)),
    Cause("a layer norm in place of the RMS norm", "RMSNorm.forward", wrong.normed(wrong.as_layer_norm)),
    Cause("the RMS norm's gain is left out", "RMSNorm.forward", wrong.rms(lambda weight: 1.0)),
    Cause("the RMS norm's gain is taken as 1 + weight", "RMSNorm.forward", wrong.rms(lambda weight: 1 + weight)),
    Cause("the layer norm is left out", "F.layer_norm", lambda _: lambda x, *__, **___: x),
    Cause("the layer norm's gain and offset are left out", "F.layer_norm", wrong.plain),
    Cause("the group norm's gain and offset are left out", "F.group_norm", wrong.plain),
    Cause("the group norm has one group for all channels", "F.group_norm", wrong.grouped(lambda channels: 1)),
    Cause("the group norm has a group for each channel", "F.group_norm", wrong.grouped(lambda channels: channels)),
    Cause("shift and scale are exchanged", "modulated", lambda right: lambda x, shift, scale: right(x, scale, shift)),
    Cause("scale in place of 1 + scale", "modulated", lambda right: lambda x, shift, scale: right(x, shift, scale - 1)),
    Cause("the shift is left out", "modulated", lambda right: lambda x, shift, scale: right(x, 0 * shift, scale)),
    Cause("the scale is left out", "modulated", lambda right: lambda x, shift, scale: right(x, shift, 0 * scale)),
    *(Cause("the modulation's chunks of MLP and attention are exchanged", f, wrong.chunks(wrong.mlp_first)) for f in BLOCKS[:2]),
    *(Cause("the modulation's chunks are gate, shift, scale in place of shift, scale, gate", f, wrong.chunks(wrong.gate_first)) for f in BLOCKS[:3]),
    *(Cause("the modulation is interleaved, [width, chunks] in place of [chunks, width]", f, wrong.chunks(range, True)) for f in BLOCKS),
    Cause("SiLU is left out", "F.silu", lambda _: lambda x, *__, **___: x),
    Cause("GELU in place of SiLU", "F.silu", lambda _: lambda x, *__, **___: wrong.right_gelu(x)),
    Cause("the erf form of GELU in place of tanh", "F.gelu", wrong.gelu(lambda x: wrong.right_gelu(x))),
    Cause("the tanh form of GELU in place of erf", "F.gelu", wrong.gelu(lambda x: wrong.right_gelu(x, approximate="tanh"))),
    Cause("quick GELU, x * sigmoid(1.702 x), in place of GELU", "F.gelu", wrong.gelu(lambda x: x * torch.sigmoid(1.702 * x))),
    Cause("SiLU in place of GELU", "F.gelu", wrong.gelu(lambda x: x * torch.sigmoid(x))),
    Cause("ReLU in place of GELU", "F.gelu", wrong.gelu(lambda x: x.clamp_min(0))),
    Cause("the activation is left out", "F.gelu", wrong.gelu(lambda x: x)),
    Cause("a square matrix is transposed", "F.linear", wrong.linear(lambda w, b: (w.T if w.shape[0] == w.shape[-1] else w, b))),
    Cause("a matrix is read in the other order, [in, out] without transposing", "F.linear", wrong.linear(lambda w, b: (w.reshape(w.shape[::-1]).T, b))),
    Cause("the bias is left out", "F.linear", wrong.linear(lambda w, b: (w, None))),
    Cause("the bias is added twice", "F.linear", wrong.linear(lambda w, b: (w, None if b is None else 2 * b))),
    Cause("the attention's scores are not scaled", "F.scaled_dot_product_attention", wrong.attention(scale=1.0)),
    Cause("the attention's scores are scaled by the whole width in place of a head's", "F.scaled_dot_product_attention", wrong.attention_scaled_by_width),
    Cause("the attention's scores are scaled by a head's width, which T5 does not do", "F.scaled_dot_product_attention", wrong.attention(scale=None)),
    Cause("the attention's mask is left out: CLIP's is causal, T5's its relative bias", "F.scaled_dot_product_attention", wrong.unmasked),
    Cause("heads are cut as (features, heads) in place of (heads, features)", "F.scaled_dot_product_attention", wrong.regrouped(lambda x, heads: x.unflatten(-1, (-1, heads)).transpose(-1, -2))),
    Cause("half as many heads, each twice as wide", "F.scaled_dot_product_attention", wrong.regrouped(lambda x, heads: x.unflatten(-1, (heads // 2, -1)))),
    Cause("twice as many heads, each half as wide", "F.scaled_dot_product_attention", wrong.regrouped(lambda x, heads: x.unflatten(-1, (2 * heads, -1)))),
    Cause("a causal mask", "F.scaled_dot_product_attention", wrong.attention(is_causal=True)),
    Cause("heads are joined as (features, heads) in place of (heads, features)", "F.scaled_dot_product_attention", wrong.merged),
    Cause("qkv is read as (heads, 3, features) in place of (3, heads, features)", "split_heads", wrong.heads_inside),
    Cause("qkv is read as (3, features, heads) in place of (3, heads, features)", "split_heads", wrong.heads_last),
    Cause("q and k are exchanged", "split_heads", wrong.parts_as([1, 0, 2])),
    Cause("k and v are exchanged", "split_heads", wrong.parts_as([0, 2, 1])),
    Cause("rotation of halves (i, i + D/2) in place of neighbours (2i, 2i + 1)", "apply_rope", wrong.in_halves),
    Cause("rotation in the opposite direction", "apply_rope", lambda right: lambda x, rope: right(x, torch.stack([rope[0], -rope[1]]))),
    Cause("the rotation is left out", "apply_rope", lambda _: lambda x, rope: x),
    Cause("rows and columns are exchanged in the rotary table", "rope_table", wrong.axes([0, 2, 1])),
    Cause("the rotary table is computed in bfloat16", "rope_table", wrong.table_in(torch.bfloat16)),
    Cause("the rotary angle's base is not 10000 but 1000", "rope_table", lambda right: lambda ids, axes, _: right(ids, axes, 1000)),
    Cause("the rotary positions start at 1", "rope_table", lambda right: lambda ids, axes, theta: right(ids + 1, axes, theta)),
    Cause("what is joined is in the other order: image before text, or skip before stream", "torch", lambda _: wrong.ImageFirst()),
    Cause("the gates are left out", "Stream.update", wrong.update(gates=False, late=False)),
    Cause("the MLP reads the stream before the attention was added", "Stream.update", wrong.update(gates=True, late=True)),
    Cause("the rows of linear1 are read as MLP, qkv in place of qkv, MLP", "SingleBlock.forward", wrong.single(True, False)),
    Cause("linear2 is fed MLP, attention in place of attention, MLP", "SingleBlock.forward", wrong.single(False, True)),
    Cause("the single block's gate is left out", "SingleBlock.forward", wrong.single(False, False, gate=False)),
    Cause("times are on the scale of 1 in place of 1000", "sinusoid", wrong.times(lambda t: t / 1000)),
    Cause("times are rounded to bfloat16", "timestep_sinusoid", wrong.times(lambda t: t.bfloat16().to(t.dtype))),
    Cause("times are rounded to whole numbers", "sinusoid", wrong.times(torch.round)),
    Cause("the sinusoid has sines first in place of cosines", "sinusoid", wrong.sine_first),
    Cause("the sinusoid's frequencies are divided by half - 1 in place of half", "sinusoid", lambda _: wrong.half_less_one),
    Cause("the sinusoid is computed in float32", "sinusoid", lambda _: lambda values, width=256: sinusoid(values.float(), width).double()),
    Cause("the sinusoid is computed in float32", "sinusoid", lambda _: wrong.rounded_frequencies),
    Cause("the sinusoid is rounded to bfloat16", "sinusoid", wrong.bfloat16),
    Cause("the guidance is on the scale of 1 in place of 1000", "Flux.conditioning_vector", wrong.guidance_divided),
    Cause("the guidance embedding is left out", "Flux.conditioning_vector", wrong.conditioning(guidance=True)),
    Cause("the pooled text is left out", "Flux.conditioning_vector", wrong.conditioning(pooled=True)),
    Cause("the pooled text is left out", "MMDiT.conditioning_vector", wrong.conditioning(pooled=True)),
    Cause("the gate is the first half of the gated MLP", "TransformerBlock.forward", wrong.gate_in_front),
    Cause("padding at the left and top in place of right and bottom", "F.pad", wrong.padded),
    Cause("bilinear in place of nearest neighbour", "F.interpolate", lambda right: lambda x, **_: right(x, scale_factor=2.0, mode="bilinear")),
    Cause("the latents' shift is left out", "Autoencoder.decode", wrong.decoded_from(lambda z, scale, shift: z / scale)),
    Cause("the latents' scale is left out", "Autoencoder.decode", wrong.decoded_from(lambda z, scale, shift: z + shift)),
    Cause("the latents are shifted before they are divided by the scale", "Autoencoder.decode", wrong.decoded_from(lambda z, scale, shift: (z + shift) / scale)),
    Cause("the latents are multiplied by the scale in place of divided", "Autoencoder.decode", wrong.decoded_from(lambda z, scale, shift: z * scale + shift)),
    Cause("the latents' shift is left out", "Autoencoder.encode", wrong.encoded_to(lambda z, scale, shift: z * scale)),
    Cause("the latents' scale is left out", "Autoencoder.encode", wrong.encoded_to(lambda z, scale, shift: z - shift)),
    Cause("the latents are shifted behind the scale", "Autoencoder.encode", wrong.encoded_to(lambda z, scale, shift: z * scale - shift)),
    Cause("the log-variance is taken in place of the mean", "Autoencoder.moments", wrong.log_variance),
    Cause("a convolution's kernel is flipped", "F.conv2d", wrong.kernel(lambda w: w.flip(2, 3))),
    Cause("a kernel's rows and columns are exchanged", "F.conv2d", wrong.kernel(lambda w: w.transpose(2, 3))),
    Cause("a kernel's inputs and outputs are exchanged", "F.conv2d", wrong.kernel(lambda w: w.transpose(0, 1) if w.shape[0] == w.shape[1] else w)),
    Cause("a convolution's bias is left out", "F.conv2d", wrong.without_bias),
    Cause("2 x 2 patches are read as (row, column, channel) in place of (channel, row, column)", "F.conv2d", wrong.kernel(wrong.patches_channel_last)),
    Cause("2 x 2 patches are written as (channel, row, column) in place of (row, column, channel)", "unpatchify", lambda _: flux_unpatchify),
    Cause("2 x 2 patches are written as (column, row, channel) in place of (row, column, channel)", "unpatchify", wrong.columns_first),
    *(Cause("the block's input is not added", f"{block}.forward", wrong.less_its_input) for block in ("ResidualBlock", "AttentionBlock", "SpatialTransformer")),
    Cause("time and vector are not added in the residual block", "ResidualBlock.forward", wrong.unshifted),
    Cause("the table of positions is cut at its upper left corner in place of its middle", "PositionTable._crop", wrong.corner),
    Cause("the erf form of GELU in place of quick GELU", "quick_gelu", lambda _: lambda x: wrong.right_gelu(x)),
    Cause("the tanh form of GELU in place of quick GELU", "quick_gelu", lambda _: lambda x: wrong.right_gelu(x, approximate="tanh")),
    Cause("SiLU in place of quick GELU", "quick_gelu", lambda _: lambda x: x * torch.sigmoid(x)),
    Cause("the positions start at 1", "F.embedding", wrong.positions(lambda ids, look_up: look_up(ids + 1))),
    Cause("the embedding of positions is left out", "F.embedding", wrong.positions(lambda ids, look_up: 0 * look_up(ids))),
    Cause("the embedding is multiplied by the square root of its width", "F.embedding", wrong.widened),
    Cause("the prompt is padded with 0 in place of its end token", "padded", wrong.padded_with(lambda end: 0)),
    Cause("the prompt is padded with its end token in place of 0", "padded", wrong.padded_with(lambda end: end)),
    Cause("the pooled state is taken at the last token in place of the first end token", "pool", wrong.at(lambda last, ids: last[:, -1])),
    Cause("the pooled state is taken at the first token in place of the first end token", "pool", wrong.at(lambda last, ids: last[:, 0])),
    Cause("the pooled state is taken at the largest id in place of the first end token", "pool", wrong.at(lambda last, ids: last[torch.arange(len(ids)), ids.argmax(1)])),
    Cause("the pooled state is the mean of all tokens", "pool", wrong.at(lambda last, ids: last.mean(1))),
    Cause("the last layer's state is taken in place of the last but one's", "taken", lambda _: lambda hidden, norm: hidden[-1]),
    Cause("the last but two layers' state is taken in place of the last but one's", "taken", lambda _: lambda hidden, norm: hidden[-3]),
    Cause("the final norm is applied to the last but one layer's state", "taken", lambda _: lambda hidden, norm: norm(hidden[-2])),
    Cause("a mask hides T5's padding, which is attended to", "unseen", lambda _: lambda ids: ids != 0),
    Cause("T5's relative positions are query minus key in place of key minus query", "T5Attention._relative_position_bucket", wrong.buckets(lambda right, d: right(-d))),
    Cause("T5's relative positions look back only, as a decoder's", "T5Attention._relative_position_bucket", wrong.buckets(lambda right, d: right(d, bidirectional=False))),
    Cause("T5's relative positions end at 64 in place of 128", "T5Attention._relative_position_bucket", wrong.buckets(lambda right, d: right(d, max_distance=64))),
    Cause("T5's relative positions have a bucket for each distance", "T5Attention._relative_position_bucket", wrong.buckets(lambda right, d: d.abs().clamp_max(15) + 16 * (d > 0))),
    Cause("T5's relative bias is added in the first block alone", "T5Attention.forward", wrong.bias_once),
    Cause("the gated MLP's activation is on wi_1 in place of wi_0", "T5DenseGatedActDense.forward", wrong.gate_behind),
    Cause("results are rounded to bfloat16", "F.linear", wrong.bfloat16),
)  # fmt: skip
