"""The errors that ports make, each as a change of our own network: where it makes a difference vanish, it is the cause.

A cause is a row of `CAUSES`: what is printed, and eridiff's function that is exchanged for a wrong one (`wrong/`) while it
is tried. `explain.py` tries them.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from eridiff.models import autoencoder, flux, layers, mmdit, unet
from eridiff.models.flux import unpatchify as flux_unpatchify
from eridiff.models.layers import sinusoid
from eridiff.trace import text
from eridiff.trace.wrong import images, parts, prompts, tokens

MODULES: tuple[Any, ...] = (layers, flux, mmdit, unet, autoencoder, text)
LATER = (
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
)  # imported with the first encoder


@dataclass(frozen=True)
class Cause:
    """`function` is one of torch.nn.functional (`F.gelu`), of our files wherever it is used, or a method (`RMSNorm.forward`).

    `make` takes the right function and gives the wrong one; `argument` is the one that is wrong, of an input's causes.
    """

    says: str
    function: str
    make: Callable[[Any], Any]
    argument: str = ""

    @property
    def place(self) -> str:
        return f"{self.function}:{self.argument}" if self.argument else self.function

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Within the block our networks have this error."""
        owner, _, name = self.function.rpartition(".")
        modules = [*MODULES, *(sys.modules[m] for m in LATER if m in sys.modules)]
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
            replaced = [(place, name, self.make) for place in owners]
            # what works in place would pass the wrong function by
            replaced += [(module, "spare", lambda _: lambda *_: False) for module in modules if "spare" in vars(module)]
            for place, function, make in replaced:
                right = vars(place)[function]
                stack.callback(setattr, place, function, right)
                setattr(place, function, make(right))
            yield


def _anew(self: layers.Last, asked: Any, make: Callable[[], Any]) -> Any:
    return make()


BLOCKS = ("DoubleBlock.forward", "JointBlock.forward", "SingleBlock.forward", "FinalLayer.forward")
CAUSES: tuple[Cause, ...] = (
    Cause("the RMS norm's epsilon is 1e-5 in place of 1e-6", "F.rms_norm", parts.rms_epsilon(1e-5)),
    Cause("the RMS norm's epsilon is float32's 1.19e-7 in place of 1e-6", "F.rms_norm", parts.rms_epsilon(2.0**-23)),
    Cause("the RMS norm's epsilon is 1e-8 in place of 1e-6", "F.rms_norm", parts.rms_epsilon(1e-8)),
    Cause("the RMS norm has no epsilon", "F.rms_norm", parts.rms_epsilon(0.0)),
    Cause("the layer norm's epsilon is 1e-5", "F.layer_norm", parts.layer_norm_epsilon(1e-5)),
    Cause("the layer norm's epsilon is 1e-6", "F.layer_norm", parts.layer_norm_epsilon(1e-6)),
    Cause("the layer norm's epsilon is 1e-12", "F.layer_norm", parts.layer_norm_epsilon(1e-12)),
    Cause("the group norm's epsilon is 1e-5", "F.group_norm", parts.layer_norm_epsilon(1e-5)),
    Cause("the group norm's epsilon is 1e-6", "F.group_norm", parts.layer_norm_epsilon(1e-6)),
    Cause("an RMS norm in place of the layer norm", "F.layer_norm", parts.without_mean),
    Cause("the RMS norm is left out", "RMSNorm.forward", lambda _: lambda self, x: x),
    Cause("a layer norm in place of the RMS norm", "RMSNorm.forward", lambda _: parts.as_layer_norm),
    Cause("the RMS norm's gain is left out", "RMSNorm.forward", parts.rms(lambda weight: 1.0)),
    Cause("the RMS norm's gain is taken as 1 + weight", "RMSNorm.forward", parts.rms(lambda weight: 1 + weight)),
    Cause("the RMS norm spans all heads in place of each", "RMSNorm.forward", lambda _: parts.over_all_heads),
    Cause("the norms of q and k are exchanged", "StreamInput.attention_inputs", parts.borrowed(tokens.QK_NORMS)),
    Cause("the norms of q and k are exchanged", "SingleBlock.forward", parts.borrowed(tokens.QK_NORMS)),
    *(Cause("the image's norms of q and k are the text's, too", f, parts.borrowed(tokens.NORMS_OF_IMAGE)) for f in BLOCKS[:2]),
    Cause("v is normed as q and k are", "StreamInput.attention_inputs", tokens.values_normed),
    Cause("the layer norm is left out", "F.layer_norm", lambda _: lambda x, *__, **___: x),
    Cause("the layer norm's gain and offset are left out", "F.layer_norm", parts.plain),
    Cause("the group norm's gain and offset are left out", "F.group_norm", parts.plain),
    Cause("the group norm has one group for all channels", "F.group_norm", parts.grouped(lambda channels: 1)),
    Cause("the group norm has a group for each channel", "F.group_norm", parts.grouped(lambda channels: channels)),
    Cause("shift and scale are exchanged", "modulated", lambda right: lambda x, shift, factor: right(x, factor - 1, 1 + shift)),
    Cause("scale in place of 1 + scale", "modulated", lambda right: lambda x, shift, factor: right(x, shift, factor - 1)),
    Cause("the shift is left out", "modulated", lambda right: lambda x, shift, factor: right(x, 0 * shift, factor)),
    Cause("the scale is left out", "modulated", lambda right: lambda x, shift, factor: right(x, shift, torch.ones_like(factor))),
    *(Cause("the modulation's chunks of MLP and attention are exchanged", f, tokens.chunks(tokens.mlp_first)) for f in BLOCKS[:2]),
    *(Cause("the modulation's chunks are gate, shift, scale in place of shift, scale, gate", f, tokens.chunks(tokens.gate_first)) for f in BLOCKS[:3]),
    Cause("the second attention's chunks of the modulation stand before the MLP's", "JointBlock.forward", tokens.chunks(tokens.second_in_the_middle)),
    *(Cause("the modulation is interleaved, [width, chunks] in place of [chunks, width]", f, tokens.chunks(range, True)) for f in BLOCKS),
    Cause("SiLU is left out", "F.silu", lambda _: lambda x, *__, **___: x),
    Cause("GELU in place of SiLU", "F.silu", lambda _: lambda x, *__, **___: parts.right_gelu(x)),
    Cause("the erf form of GELU in place of tanh", "F.gelu", parts.gelu(lambda x: parts.right_gelu(x))),
    Cause("the tanh form of GELU in place of erf", "F.gelu", parts.gelu(lambda x: parts.right_gelu(x, approximate="tanh"))),
    Cause("quick GELU, x * sigmoid(1.702 x), in place of GELU", "F.gelu", parts.gelu(lambda x: x * torch.sigmoid(1.702 * x))),
    Cause("SiLU in place of GELU", "F.gelu", parts.gelu(lambda x: x * torch.sigmoid(x))),
    Cause("ReLU in place of GELU", "F.gelu", parts.gelu(lambda x: x.clamp_min(0))),
    Cause("the activation is left out", "F.gelu", parts.gelu(lambda x: x)),
    Cause("a square matrix is transposed", "F.linear", parts.linear(lambda w, b: (w.T if w.shape[0] == w.shape[-1] else w, b))),
    Cause("a matrix is read in the other order, [in, out] without transposing", "F.linear", parts.linear(lambda w, b: (w.reshape(w.shape[::-1]).T, b))),
    Cause("the bias is left out", "F.linear", parts.linear(lambda w, b: (w, None))),
    Cause("the bias is added twice", "F.linear", parts.linear(lambda w, b: (w, None if b is None else 2 * b))),
    Cause("the attention's scores are not scaled", "F.scaled_dot_product_attention", parts.attention(scale=1.0)),
    Cause("the attention's scores are scaled by the whole width in place of a head's", "F.scaled_dot_product_attention", parts.attention_scaled_by_width),
    Cause("the attention's scores are scaled by a head's width, which T5 does not do", "F.scaled_dot_product_attention", parts.attention(scale=None)),
    Cause("the attention's mask is left out: CLIP's is causal, T5's its relative bias", "F.scaled_dot_product_attention", parts.unmasked),
    Cause("heads are cut as (features, heads) in place of (heads, features)", "F.scaled_dot_product_attention", parts.regrouped(lambda x, heads: x.unflatten(-1, (-1, heads)).transpose(-1, -2))),
    Cause("half as many heads, each twice as wide", "F.scaled_dot_product_attention", parts.regrouped(lambda x, heads: x.unflatten(-1, (heads // 2, -1)))),
    Cause("twice as many heads, each half as wide", "F.scaled_dot_product_attention", parts.regrouped(lambda x, heads: x.unflatten(-1, (2 * heads, -1)))),
    Cause("a single head", "F.scaled_dot_product_attention", parts.regrouped(parts.heads_of(1))),
    *(
        Cause(f"{count} heads, whatever the width", "F.scaled_dot_product_attention", parts.regrouped(parts.heads_of(count)))
        for count in (4, 8)
    ),
    Cause("a causal mask", "F.scaled_dot_product_attention", parts.attention(is_causal=True)),
    Cause("heads are joined as (features, heads) in place of (heads, features)", "F.scaled_dot_product_attention", parts.merged),
    Cause("qkv is read as (heads, 3, features) in place of (3, heads, features)", "split_heads", parts.qkv_as(lambda heads: (heads, 3, -1), (3, 0, 2, 1, 4))),
    Cause("qkv is read as (3, features, heads) in place of (3, heads, features)", "split_heads", parts.qkv_as(lambda heads: (3, -1, heads), (2, 0, 4, 1, 3))),
    Cause("q and k are exchanged", "split_heads", parts.parts_as([1, 0, 2])),
    Cause("q and k are exchanged", "CLIPAttention.forward", parts.borrowed({"q_proj": "k_proj", "k_proj": "q_proj"})),
    Cause("q and k are exchanged", "T5Attention.forward", parts.borrowed({"q": "k", "k": "q"})),
    Cause("k and v are exchanged", "split_heads", parts.parts_as([0, 2, 1])),
    Cause("rotation of halves (i, i + D/2) in place of neighbours (2i, 2i + 1)", "apply_rope", tokens.in_halves),
    Cause("rotation in the opposite direction", "apply_rope", lambda right: lambda x, rope: right(x, torch.stack([rope[0], -rope[1]]))),
    Cause("the rotation is left out", "apply_rope", lambda _: lambda x, rope: x),
    Cause("rows and columns are exchanged in the rotary table", "rope_table", tokens.axes([0, 2, 1])),
    Cause("the rotary table is computed in bfloat16", "rope_table", tokens.table_in(torch.bfloat16)),
    Cause("the rotary angle's base is not 10000 but 1000", "rope_table", lambda right: lambda ids, axes, _: right(ids, axes, 1000)),
    Cause("the rotary positions start at 1", "rope_table", lambda right: lambda ids, axes, theta: right(ids + 1, axes, theta)),
    Cause("the image's rotary positions start at 1", "Flux.rotations", tokens.positions_of_image(lambda ids: ids + torch.tensor([0, 1, 1]))),
    Cause("the image's rotary positions are spread over 0 to 63", "Flux.rotations", tokens.positions_of_image(tokens.spread)),
    Cause("the text's rotary positions are counted in place of 0", "Flux.rotations", tokens.text_counted),
    Cause("the rotary frequencies span the whole head in place of each axis", "rope_table", tokens.frequencies_of_the_head),
    Cause("the rotary table is computed in float32", "rope_table", tokens.table_of_float32),
    Cause("what is joined is in the other order: image before text, or skip before stream", "torch", lambda _: tokens.ImageFirst()),
    Cause("the gates are left out", "Stream.update", tokens.update(attention_gate=False, mlp_gate=False)),
    Cause("the gates of attention and MLP are exchanged", "Stream.update", tokens.update(exchanged=True)),
    Cause("the attention's gate is left out", "Stream.update", tokens.update(attention_gate=False)),
    Cause("the MLP's gate is left out", "Stream.update", tokens.update(mlp_gate=False)),
    Cause("the MLP reads the stream before the attention was added", "Stream.update", tokens.update(late=True)),
    Cause("the second attention is left out", "DualStream.update", tokens.second_attention(left_out=True)),
    Cause("the second attention reads what the first was added to", "DualStream.update", tokens.second_attention(late=True)),
    Cause("the second attention has the first one's shift and scale", "DualStream.update", tokens.second_attention(chunks=(0, 1, 8))),
    Cause("the second attention has the first one's gate", "DualStream.update", tokens.second_attention(chunks=(6, 7, 2))),
    *(Cause("the text is not attended to", f, tokens.text_unseen) for f in BLOCKS[:2]),
    *(Cause("the block leaves the text as it was", f, tokens.text_unchanged) for f in BLOCKS[:2]),
    Cause("the rows of linear1 are read as MLP, qkv in place of qkv, MLP", "SingleBlock.forward", tokens.single(mlp_first=True)),
    Cause("linear2 is fed MLP, attention in place of attention, MLP", "SingleBlock.forward", tokens.single(mlp_first_out=True)),
    Cause("the single block's gate is left out", "SingleBlock.forward", tokens.single(gate=False)),
    Cause("the single block norms q and k behind the rotation", "SingleBlock.forward", tokens.single(late_norm=True)),
    Cause("the single block adds to what was normed in place of its input", "SingleBlock.forward", tokens.single(residual=False)),
    Cause("the image stands before the text in the single blocks", "Flux.step", tokens.single_sequence(image_first=True)),
    Cause("the first tokens are taken behind the single blocks in place of the last", "Flux.step", tokens.single_sequence(image_first=False)),
    Cause("times are on the scale of 1 in place of 1000", "sinusoid", parts.times(lambda t: t / 1000)),
    Cause("times are rounded to bfloat16", "timestep_sinusoid", parts.times(lambda t: t.bfloat16().to(t.dtype))),
    Cause("times are rounded to whole numbers", "sinusoid", parts.times(torch.round)),
    Cause("times are rounded to bfloat16 behind the factor of 1000", "sinusoid", parts.times(lambda t: t.bfloat16().to(t.dtype))),
    Cause("times are rounded to float16", "sinusoid", parts.times(lambda t: t.half().to(t.dtype))),
    Cause("times are one of 1000 too late", "sinusoid", parts.times(lambda t: t + 1)),
    Cause("the sinusoid has sines first in place of cosines", "sinusoid", parts.sine_first),
    Cause("the sinusoid's frequencies are divided by half - 1 in place of half", "sinusoid", parts.sinusoid_of(less=1)),
    Cause("the sinusoid is computed in float32", "sinusoid", lambda _: lambda values, width=256: sinusoid(values.float(), width).double()),
    Cause("the sinusoid is computed in float32", "sinusoid", parts.sinusoid_of(torch.float32)),
    Cause("the sinusoid is rounded to bfloat16", "sinusoid", parts.bfloat16),
    Cause("the guidance is on the scale of 1 in place of 1000", "Flux.conditioning_vector", tokens.guidance_divided),
    Cause("the guidance embedding is left out", "Flux.conditioning_vector", tokens.guidance_left_out),
    Cause("the pooled text is left out", "Flux.conditioning_vector", tokens.pooled_left_out),
    Cause("the pooled text is left out", "MMDiT.conditioning_vector", tokens.pooled_left_out),
    Cause("the vector of text and sizes is left out", "UNet.conditioning_vector", tokens.pooled_left_out),
    Cause("the gate is the first half of the gated MLP", "TransformerBlock.forward", images.transformer_block(gate_in_front=True)),
    Cause("the cross-attention comes before the self-attention", "TransformerBlock.forward", images.transformer_block(cross_first=True)),
    Cause("the transformer adds to what was normed in place of its input", "SpatialTransformer.forward", images.residual_of_the_norm),
    Cause("the residual block norms behind SiLU in place of before it", "ResidualBlock.forward", images.residual_block(norm_last=True)),
    Cause("time and vector are added behind the second norm", "ResidualBlock.forward", images.residual_block(late_shift=True)),
    Cause("the attention is left out", "AttentionBlock.forward", lambda _: lambda self, x: x),
    Cause("padding at the left and top, or on all sides, in place of right and bottom", "F.pad", images.padded),
    Cause("padding at the right and bottom in place of all sides", "F.conv2d", images.padded_behind),
    Cause("the convolution comes before the upsampling", "Upsample.forward", images.convolved_first),
    Cause("bilinear in place of nearest neighbour", "F.interpolate", lambda right: lambda x, **_: right(x, scale_factor=2.0, mode="bilinear")),
    Cause("the latents' shift is left out", "Autoencoder.decode", images.decoded_from(lambda z, scale, shift: z / scale)),
    Cause("the latents' scale is left out", "Autoencoder.decode", images.decoded_from(lambda z, scale, shift: z + shift)),
    Cause("the latents are shifted before they are divided by the scale", "Autoencoder.decode", images.decoded_from(lambda z, scale, shift: (z + shift) / scale)),
    Cause("the latents are multiplied by the scale in place of divided", "Autoencoder.decode", images.decoded_from(lambda z, scale, shift: z * scale + shift)),
    *(
        Cause(f"the latents' scale and shift are those of {name}", "Autoencoder.decode", images.decoded_from(lambda z, *_, c=c: z / c.scale + c.shift))
        for name, c in autoencoder.PRESETS.items()
    ),
    Cause("the latents' shift is left out", "Autoencoder.encode", images.encoded_to(lambda z, scale, shift: z * scale)),
    Cause("the latents' scale is left out", "Autoencoder.encode", images.encoded_to(lambda z, scale, shift: z - shift)),
    Cause("the latents are shifted behind the scale", "Autoencoder.encode", images.encoded_to(lambda z, scale, shift: z * scale - shift)),
    *(
        Cause(f"the latents' scale and shift are those of {name}", "Autoencoder.encode", images.encoded_to(lambda z, *_, c=c: (z - c.shift) * c.scale))
        for name, c in autoencoder.PRESETS.items()
    ),
    Cause("the log-variance is taken in place of the mean", "Autoencoder.moments", images.log_variance),
    Cause("a convolution's kernel is flipped", "F.conv2d", images.kernel(lambda w: w.flip(2, 3))),
    Cause("a kernel's rows and columns are exchanged", "F.conv2d", images.kernel(lambda w: w.transpose(2, 3))),
    Cause("a kernel's inputs and outputs are exchanged", "F.conv2d", images.kernel(lambda w: w.transpose(0, 1) if w.shape[0] == w.shape[1] else w)),
    Cause("a convolution's bias is left out", "F.conv2d", images.without_bias),
    Cause("2 x 2 patches are read as (row, column, channel) in place of (channel, row, column)", "F.conv2d", images.kernel(images.patches_channel_last)),
    Cause("2 x 2 patches are written as (channel, row, column) in place of (row, column, channel)", "unpatchify", lambda _: flux_unpatchify),
    Cause("2 x 2 patches are written as (column, row, channel) in place of (row, column, channel)", "unpatchify", tokens.columns_first),
    *(Cause("the block's input is not added", f"{block}.forward", images.less_its_input) for block in ("ResidualBlock", "AttentionBlock", "SpatialTransformer")),
    Cause("time and vector are not added in the residual block", "ResidualBlock.forward", images.unshifted),
    Cause("the table of positions is cut at its upper left corner in place of its middle", "PositionTable._crop", tokens.cropped(tokens.cut_from(lambda side, size: 0))),
    Cause("the table's crop is rounded up in place of down", "PositionTable._crop", tokens.cropped(tokens.cut_from(lambda side, size: -((size - side) // 2)))),
    Cause("the table's crop begins where one of latents in place of patches would", "PositionTable._crop", tokens.cropped(tokens.cut_from(lambda side, size: max(side - 2 * size, 0) // 2))),
    Cause("the table's rows and columns are exchanged", "PositionTable._crop", tokens.cropped(lambda square, h, w: tokens.cut_from(lambda side, size: (side - size) // 2)(square.transpose(1, 2), h, w))),
    Cause("the table of positions is resized in place of cropped", "PositionTable._crop", tokens.cropped(tokens.resized)),
    Cause("the erf form of GELU in place of quick GELU", "quick_gelu", lambda _: lambda x: parts.right_gelu(x)),
    Cause("the tanh form of GELU in place of quick GELU", "quick_gelu", lambda _: lambda x: parts.right_gelu(x, approximate="tanh")),
    Cause("SiLU in place of quick GELU", "quick_gelu", lambda _: lambda x: x * torch.sigmoid(x)),
    Cause("the positions start at 1", "F.embedding", prompts.positions(lambda ids, look_up: look_up(ids + 1))),
    Cause("the embedding of positions is left out", "F.embedding", prompts.positions(lambda ids, look_up: 0 * look_up(ids))),
    Cause("the embedding is multiplied by the square root of its width", "F.embedding", prompts.widened),
    Cause("the prompt is padded with 0 in place of its end token", "padded", prompts.padded_with(lambda end: 0)),
    Cause("the prompt is padded with its end token in place of 0", "padded", prompts.padded_with(lambda end: end)),
    Cause("the pooled state is taken at the last token in place of the first end token", "pool", prompts.pooled_of(at=lambda last, ids: last[:, -1])),
    Cause("the pooled state is taken at the first token in place of the first end token", "pool", prompts.pooled_of(at=lambda last, ids: last[:, 0])),
    Cause("the pooled state is taken at the largest id in place of the first end token", "pool", prompts.pooled_of(at=lambda last, ids: last[torch.arange(len(ids)), ids.argmax(1)])),
    Cause("the pooled state is the mean of all tokens", "pool", prompts.pooled_of(at=lambda last, ids: last.mean(1))),
    Cause("the pooled state is taken before the final norm", "pool", prompts.pooled_of(lambda hidden: hidden[-1])),
    Cause("the pooled state is taken from the last but one layer", "pool", prompts.pooled_of(lambda hidden: hidden[-2])),
    Cause("the projection of the pooled state is left out", "projected", prompts.unprojected),
    Cause("the last layer's state is taken in place of the last but one's", "taken", lambda _: lambda hidden, norm: hidden[-1]),
    Cause("the last layer's state with the final norm is taken in place of the last but one's", "taken", lambda _: lambda hidden, norm: norm(hidden[-1])),
    Cause("the last but two layers' state is taken in place of the last but one's", "taken", lambda _: lambda hidden, norm: hidden[-3]),
    Cause("the final norm is applied to the last but one layer's state", "taken", lambda _: lambda hidden, norm: norm(hidden[-2])),
    Cause("a mask hides the padding, which is attended to", "unseen", prompts.padding_hidden),
    Cause("T5's relative positions are query minus key in place of key minus query", "T5Attention._relative_position_bucket", prompts.buckets(lambda right, d: right(-d))),
    Cause("T5's relative positions look back only, as a decoder's", "T5Attention._relative_position_bucket", prompts.buckets(lambda right, d: right(d, bidirectional=False))),
    Cause("T5's relative positions end at 64 in place of 128", "T5Attention._relative_position_bucket", prompts.buckets(lambda right, d: right(d, max_distance=64))),
    Cause("T5's relative positions have a bucket for each distance", "T5Attention._relative_position_bucket", prompts.buckets(lambda right, d: d.abs().clamp_max(15) + 16 * (d > 0))),
    Cause("T5's relative bias is added in the first block alone", "T5Attention.forward", prompts.bias_once),
    Cause("the gated MLP's activation is on wi_1 in place of wi_0", "T5DenseGatedActDense.forward", prompts.gate_behind),
    Cause("results are rounded to bfloat16", "F.linear", parts.bfloat16),
)  # fmt: skip
