"""UNet and autoencoder: residual blocks, convolutions, the latents' scale and shift."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from eridiff.trace.wrong.parts import Wrong


def residual_block(norm_last: bool = False, late_shift: bool = False) -> Callable[[Wrong], Wrong]:
    """Of a residual block of UNet or autoencoder: SiLU before the norm, or time and vector added behind the second norm."""

    def make(_: Wrong) -> Wrong:
        def forward(self: Any, x: Tensor, *shifts: Tensor) -> Tensor:
            shift: Any = shifts[0][:, :, None, None] if shifts else 0.0
            h = self.conv1(self.norm1(F.silu(x)) if norm_last else F.silu(self.norm1(x)))
            if late_shift:
                h = F.silu(self.norm2(h) + shift)
            else:
                h = self.norm2(F.silu(h + shift)) if norm_last else F.silu(self.norm2(h + shift))
            added: Tensor = self.shortcut(x) + self.conv2(h)
            return added

        return forward

    return make


def less_its_input(right: Wrong) -> Wrong:
    """Of a block of an image's features: the input is not added."""
    return lambda self, x, *rest: right(self, x, *rest) - (self.shortcut(x) if hasattr(self, "shortcut") else x)


def unshifted(right: Wrong) -> Wrong:
    return lambda self, x, *shift: right(self, x, *(0 * s for s in shift))


def residual_of_the_norm(_: Wrong) -> Wrong:
    def forward(self: Any, x: Tensor, keys_values: Any) -> Tensor:
        normed = self.norm(x)
        h = self.proj_in(normed.flatten(2).transpose(1, 2))
        for block, pair in zip(self.blocks, keys_values, strict=True):
            h = block(h, pair)
        added: Tensor = self.proj_out(h).transpose(1, 2).reshape(x.shape)
        return normed + added

    return forward


def transformer_block(cross_first: bool = False, gate_in_front: bool = False) -> Callable[[Wrong], Wrong]:
    """Of a block of the UNet's transformer: cross- before self-attention, or the gate as the first half of the MLP."""

    def make(_: Wrong) -> Wrong:
        def forward(self: Any, x: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
            if cross_first:
                x = x + self.cross_attention(self.norm2(x), keys_values)
            normed = self.norm1(x)
            x = x + self.self_attention(normed, self.self_attention.keys_values(normed))
            if not cross_first:
                x = x + self.cross_attention(self.norm2(x), keys_values)
            value, gate = self.mlp_in(self.norm3(x)).chunk(2, dim=-1)[:: -1 if gate_in_front else 1]
            added: Tensor = self.mlp_out(value * F.gelu(gate))
            return x + added

        return forward

    return make


def kernel(change: Callable[[Tensor], Tensor]) -> Callable[[Wrong], Wrong]:
    return lambda right: lambda x, weight, *rest: right(x, change(weight), *rest)


def patches_channel_last(weight: Tensor) -> Tensor:
    """The kernel that multiplies 2 x 2 patches whose channels run fastest."""
    out, channels, *side = weight.shape
    if side != [2, 2]:
        return weight
    return weight.reshape(out, 2, 2, channels).permute(0, 3, 1, 2)


def without_bias(right: Wrong) -> Wrong:
    return lambda x, weight, bias=None, *rest: right(x, weight, None, *rest)


def padded(right: Wrong) -> Wrong:
    return lambda x, pad, *rest, **named: right(x, (1, 0, 1, 0) if pad == (0, 1, 0, 1) else pad, *rest, **named)


def padded_behind(right: Wrong) -> Wrong:
    """A convolution of stride 2 that is padded at the right and bottom alone."""

    def conv2d(x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, *rest: Any) -> Tensor:
        if tuple(stride) == (2, 2) and padding == (1, 1):
            x, padding = F.pad(x, (0, 1, 0, 1)), (0, 0)
        output: Tensor = right(x, weight, bias, stride, padding, *rest)
        return output

    return conv2d


def convolved_first(_: Wrong) -> Wrong:
    return lambda self, x: F.interpolate(self.conv(x), scale_factor=2.0, mode="nearest")


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
