"""The autoencoder in little memory, exactly: layer by layer, each layer in horizontal strips.

Tiles of an image decoded for themselves show seams, because a group norm looks at the whole image. Here every layer sees
all of it: a norm's mean and variance are taken over the whole map first, then norm, SiLU and convolution run strip by strip
with the rows above and below that a convolution needs; the attention runs over chunks of its queries. Beside a layer's
input only its output is alive, and a residual block writes its result over its input, or over the first channels of it
where it has fewer. The autoencoder knows nothing of it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eridiff.models.autoencoder import AttentionBlock, Autoencoder, Downsample, Middle, ResidualBlock, Upsample

Strip = Callable[[Tensor], Tensor]
QUERIES = 4096  # of the attention, at once


@torch.no_grad()
def decode_in_strips(autoencoder: Autoencoder, latents: Tensor, rows: int = 64) -> Tensor:
    """`autoencoder.decode(latents)`: `[B, Z, h, w]` -> `[B, 3, 8h, 8w]`, in strips of `rows` rows of each map."""
    decoder, config = autoencoder.decoder, autoencoder.config
    x = autoencoder.post_quant_conv(latents / config.scale + config.shift)
    x = _module(decoder.middle, _convolved(x, decoder.conv_in, rows), rows)
    for level in reversed(decoder.up):
        x = _module(level, x, rows)
    return _convolved(x, decoder.conv_out, rows, _normed(x, decoder.norm_out, rows))


@torch.no_grad()
def encode_in_strips(autoencoder: Autoencoder, pictures: Tensor, rows: int = 64) -> Tensor:
    """`autoencoder.encode(pictures)` (the mean): `[B, 3, H, W]` -> `[B, Z, H / 8, W / 8]`."""
    encoder, config = autoencoder.encoder, autoencoder.config
    x = _convolved(pictures, encoder.conv_in, rows)
    for level in encoder.down:
        x = _module(level, x, rows)
    x = _module(encoder.middle, x, rows)
    moments = autoencoder.quant_conv(_convolved(x, encoder.conv_out, rows, _normed(x, encoder.norm_out, rows)))
    return (moments.chunk(2, dim=1)[0] - config.shift) * config.scale


def _module(module: nn.Module, x: Tensor, rows: int) -> Tensor:
    """Any part of the autoencoder between its outer convolutions; `x` may be written over."""
    if isinstance(module, ResidualBlock):
        return _residual(module, x, rows)
    if isinstance(module, AttentionBlock):
        return _attention(module, x)
    if isinstance(module, Upsample):
        return _upsampled(x, module.conv, rows)
    if isinstance(module, Downsample):
        return _downsampled(x, module.conv, rows)
    assert isinstance(module, nn.Sequential | Middle)
    for child in module.children():  # in the order in which they run
        x = _module(child, x, rows)
    return x


def _residual(block: ResidualBlock, x: Tensor, rows: int) -> Tensor:
    h = _convolved(x, block.conv1, rows, _normed(x, block.norm1, rows))
    channels = block.conv2.out_channels
    out = x[:, :channels] if channels <= x.shape[1] else x.new_empty(len(x), channels, *x.shape[2:])
    prepare = _normed(h, block.norm2, rows)
    for top in range(0, x.shape[2], rows):
        part = slice(top, top + rows)
        out[:, :, part] = _strip(h, block.conv2, top, rows, prepare).add_(block.shortcut(x[:, :, part]))
    return out


def _attention(block: AttentionBlock, x: Tensor) -> Tensor:
    h = block.norm(x)
    # contiguous as in the block itself: else a CPU too forms the score matrix
    q, k, v = (project(h).flatten(2).mT.contiguous()[:, None] for project in (block.q, block.k, block.v))  # B 1 HW C
    found = torch.cat([block.attention(chunk, k, v) for chunk in q.split(QUERIES, dim=2)], dim=1)
    return x + block.proj_out(found.transpose(1, 2).reshape(x.shape))


def _normed(x: Tensor, norm: nn.GroupNorm, rows: int) -> Strip:
    """Norm and SiLU with the statistics of the whole map, as a function on strips.

    Means and variances of the strips are joined by Chan et al. 1979: where a map hardly varies, a difference of two large sums
    of squares would lose the variance. In float32, or float64 for such a map: not every device has float64.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    strips = x.unflatten(1, (norm.num_groups, -1)).split(rows, dim=3)  # B G C/G h W
    variances, means = zip(*(torch.var_mean(s.to(dtype), (2, 3, 4), correction=0) for s in strips), strict=True)
    weights = x.new_tensor([strip.shape[3] / x.shape[2] for strip in strips], dtype=dtype)[:, None, None]
    mean = (weights * torch.stack(means)).sum(0)  # B G
    variance = (weights * (torch.stack(variances) + (torch.stack(means) - mean).square())).sum(0)
    scale = (variance + norm.eps).rsqrt()
    each = norm.num_channels // norm.num_groups
    factor = scale.repeat_interleave(each, 1).to(dtype) * norm.weight  # B C
    offset = norm.bias - mean.repeat_interleave(each, 1).to(dtype) * factor

    def apply(strip: Tensor) -> Tensor:
        h = (strip * factor[:, :, None, None]).add_(offset[:, :, None, None])
        return F.silu(h.to(strip.dtype), inplace=True)

    return apply


def _convolved(x: Tensor, conv: nn.Conv2d, rows: int, prepare: Strip = lambda strip: strip) -> Tensor:
    """A 3x3 convolution over the whole map."""
    out = x.new_empty(len(x), conv.out_channels, *x.shape[2:])
    for top in range(0, x.shape[2], rows):
        out[:, :, top : top + rows] = _strip(x, conv, top, rows, prepare)
    return out


def _strip(x: Tensor, conv: nn.Conv2d, top: int, rows: int, prepare: Strip) -> Tensor:
    """Rows `top` to `top + rows` of the convolution; the zeros around a map are added after norm and SiLU."""
    height = x.shape[2]
    bottom = min(top + rows, height)
    strip = prepare(x[:, :, max(top - 1, 0) : min(bottom + 1, height)])
    strip = F.pad(strip, (1, 1, int(top == 0), int(bottom == height)))  # under the same name: that before is let go
    return F.conv2d(strip, conv.weight, conv.bias)


def _upsampled(x: Tensor, conv: nn.Conv2d, rows: int) -> Tensor:
    """Nearest neighbour, then the convolution: of `rows` rows of the result half as many of `x` and one around."""
    height, half = x.shape[2], max(rows // 2, 1)
    out = x.new_empty(len(x), conv.out_channels, 2 * height, 2 * x.shape[3])
    for top in range(0, height, half):
        bottom = min(top + half, height)
        strip = F.interpolate(x[:, :, max(top - 1, 0) : bottom + 1], scale_factor=2.0, mode="nearest")
        strip = strip[:, :, int(top > 0) : strip.shape[2] - int(bottom < height)]
        strip = F.pad(strip, (1, 1, int(top == 0), int(bottom == height)))
        out[:, :, 2 * top : 2 * bottom] = F.conv2d(strip, conv.weight, conv.bias)
    return out


def _downsampled(x: Tensor, conv: nn.Conv2d, rows: int) -> Tensor:
    """The stride of 2; zeros are added on the right and at the bottom only."""
    height = x.shape[2] // 2
    out = x.new_empty(len(x), conv.out_channels, height, x.shape[3] // 2)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strip = F.pad(x[:, :, 2 * top : 2 * bottom + 1], (0, 1, 0, int(bottom == height)))
        out[:, :, top:bottom] = F.conv2d(strip, conv.weight, conv.bias, stride=2)
    return out
