"""The convolutional autoencoder between images and latents: one class for Flux, SD 3 and SDXL.

Sources: `modules/autoencoder.py` of black-forest-labs/flux and `diffusionmodules/model.py` of
Stability-AI/generative-models; Rombach et al. 2022. Loads ae.safetensors (16 channels) and SDXL's (4 channels) with its
1x1 convolutions around the latents.

Letters: B batch, C channels, Z latent channels; an image is `[B, 3, H, W]` in [-1, 1], 8 pixels a latent by default.
"""

from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eridiff.errors import ConfigError
from eridiff.models.layers import Attention, activated, added


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes and latent statistics of an autoencoder; the defaults are Flux's."""

    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)  # of each resolution, the finest first
    residual_blocks: int = 2  # of a level of the encoder; the decoder has one more
    latent_channels: int = 16
    scale: float = 0.3611  # network latents = (encoder's mean - shift) * scale; measured on the training images
    shift: float = 0.1159
    quant_convolutions: bool = False
    stated: bool = True  # False: nothing says scale and shift, so that the family which decodes with it does

    @property
    def levels(self) -> int:
        return len(self.channel_multipliers)

    def of_family(self, name: str) -> "AutoencoderConfig":
        """With the latents' statistics of flux, sd3 or sdxl, unless its own are stated or it has other latents."""
        usual = PRESETS[name]
        if self.stated or usual.latent_channels != self.latent_channels:
            return self
        return replace(self, scale=usual.scale, shift=usual.shift)

    @classmethod
    def preset(cls, name: str) -> "AutoencoderConfig":
        """The autoencoder of flux, sd3 or sdxl."""
        if name not in PRESETS:
            raise ConfigError(f"'{name}' is not a preset of the autoencoder; there are {', '.join(PRESETS)}")
        return PRESETS[name]


PRESETS = {
    "flux": AutoencoderConfig(),
    "sd3": AutoencoderConfig(scale=1.5305, shift=0.0609),
    "sdxl": AutoencoderConfig(latent_channels=4, scale=0.13025, shift=0.0, quant_convolutions=True),
}


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Norm, swish, convolution, twice, plus the input (through a 1x1 convolution where the channels change)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = group_norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(activated(x, self.norm1))
        h = activated(h, self.norm2)  # under the same name: the map before it is of no more use, and is large
        h = self.conv2(h)
        return added(self.shortcut(x), h, self.conv2)


class AttentionBlock(nn.Module):
    """Self-attention over all pixels with a single head, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # contiguous: GPUs have no kernel for a head whose features are not side by side, and form the whole score matrix
        q, k, v = (project(h).flatten(2).mT.contiguous()[:, None] for project in (self.q, self.k, self.v))  # B 1 HW C
        return added(x, self.proj_out(self.attention(q, k, v).transpose(1, 2).reshape(x.shape)), self.proj_out)


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attention = AttentionBlock(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attention(self.block_1(x)))


class Downsample(nn.Module):
    """Halve height and width; the padding is on the right and at the bottom only, as in the original."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def level(channels_in: int, channels_out: int, blocks: int, **resample: nn.Module) -> nn.Sequential:
    """The residual blocks of one resolution and, by name, the step to the next."""
    residual = (ResidualBlock(channels_in if j == 0 else channels_out, channels_out) for j in range(blocks))
    return nn.Sequential(OrderedDict(block=nn.Sequential(*residual), **resample))


class Encoder(nn.Module):
    """Image `[B, 3, H, W]` -> moments `[B, 2Z, H / 8, W / 8]`: mean, then log-variance."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        inputs = [config.channels, *widths[:-1]]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList(
            level(
                inputs[i],
                widths[i],
                config.residual_blocks,
                **({"downsample": Downsample(widths[i])} if i < config.levels - 1 else {}),
            )
            for i in range(config.levels)
        )
        self.middle = Middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, pictures: Tensor) -> Tensor:
        h = self.conv_in(pictures)
        for down in self.down:
            h = down(h)
        return self.conv_out(activated(self.middle(h), self.norm_out))


class Decoder(nn.Module):
    """Latents `[B, Z, h, w]` -> image `[B, 3, 8h, 8w]`, not clamped."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        inputs = [*widths[1:], widths[-1]]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.middle = Middle(widths[-1])
        # indexed by resolution as in the original: up.3 is the lowest and runs first
        self.up = nn.ModuleList(
            level(
                inputs[i],
                widths[i],
                config.residual_blocks + 1,
                **({"upsample": Upsample(widths[i])} if i > 0 else {}),
            )
            for i in range(config.levels)
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        h = self.middle(self.conv_in(latents))
        for up in reversed(self.up):
            h = up(h)
        return self.conv_out(activated(h, self.norm_out))


class Autoencoder(nn.Module):
    """Images to the latents in which the networks work, and back."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        z = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1) if config.quant_convolutions else nn.Identity()
        self.post_quant_conv = nn.Conv2d(z, z, 1) if config.quant_convolutions else nn.Identity()

    def moments(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, 3, H, W]` in [-1, 1] -> mean and log-variance of the posterior, `[B, Z, H / 8, W / 8]`, unscaled.

        The log-variance is not clamped (Flux's original; the latent-diffusion one clamps it to [-30, 20]).
        """
        mean, log_variance = self.quant_conv(self.encoder(pictures)).chunk(2, dim=1)
        return mean, log_variance

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """`[B, 3, H, W]` in [-1, 1] -> network latents `[B, Z, H / 8, W / 8]`: the mean, or a sample with `noise`."""
        mean, log_variance = self.moments(pictures)
        if noise is not None:
            mean = mean + torch.exp(log_variance / 2) * noise
        return (mean - self.config.shift) * self.config.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Network latents `[B, Z, h, w]` -> images `[B, 3, 8h, 8w]`, about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(latents / self.config.scale + self.config.shift))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.decode(self.encode(pictures))
