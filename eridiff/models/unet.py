"""The UNet of Stable Diffusion XL: base, refiner and inpainting, from top to bottom.

Sources: `openaimodel.py` and `attention.py` of Stability-AI/generative-models; Podell et al. 2023 (SDXL); Rombach et al.
2022 (the transformers); Ronneberger et al. 2015 (the U). Loads sd_xl_base_1.0, sd_xl_refiner_1.0, the inpainting variant
with 9 channels, Turbo, Lightning, lcm-sdxl, and the distilled SSD-1B and Vega, in float64 too.

Letters: B batch, C channels, h x w the latents' size at a stage, L text tokens, H heads, D features of one head, T steps of
a run. A stage is a resolution, the finest first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eridiff.errors import ConfigError
from eridiff.models.layers import (
    Attention,
    VectorMLP,
    activated,
    added,
    check_shape,
    forward_times,
    over_rows,
    prepare_times,
    sinusoid,
    spare,
)

RESIDUAL_BLOCKS = 2  # of a stage on the way down; one more on the way up


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet; the defaults are SDXL base's."""

    in_channels: int = 4  # inpainting: latents, mask, latents of the image without what must be painted
    out_channels: int = 4
    channels: int = 320
    channel_multipliers: tuple[int, ...] = (1, 2, 4)  # of each stage
    transformer_depths: tuple[int, ...] = (0, 2, 10)  # blocks of each transformer of a stage; 0: none there
    middle_depth: int = 10
    head_width: int = 64
    text_width: int = 2048
    vector_width: int = 2816
    guidance: bool = False  # lcm-sdxl's embedding of the guidance scale
    up_depths: tuple[tuple[int, ...], ...] | None = None  # of each stage's transformers on the way up; None: as down
    middle_blocks: int = 2  # residual blocks; distilled networks have one and no transformer there

    def __post_init__(self) -> None:
        if len(self.transformer_depths) != len(self.channel_multipliers):
            raise ConfigError(
                f"transformer_depths {self.transformer_depths} must have one entry per stage, of {self.channel_multipliers}"
            )
        if [len(depths) for depths in self.depths_up] != [RESIDUAL_BLOCKS + 1] * self.levels:
            raise ConfigError(
                f"up_depths {self.up_depths} must have {RESIDUAL_BLOCKS + 1} numbers for each of {self.levels} stages"
            )
        if self.middle_blocks not in (1, 2) or (self.middle_blocks == 1 and self.middle_depth):
            raise ConfigError(
                f"the middle has 1 block or 2, and a transformer only between 2, not {self.middle_blocks} with depth {self.middle_depth}"
            )

    @property
    def levels(self) -> int:
        return len(self.channel_multipliers)

    @property
    def widths(self) -> list[int]:
        """Channels of each stage."""
        return [self.channels * multiplier for multiplier in self.channel_multipliers]

    @property
    def depths_up(self) -> tuple[tuple[int, ...], ...]:
        """Blocks of each transformer of a stage on the way up."""
        return self.up_depths or tuple((depth,) * (RESIDUAL_BLOCKS + 1) for depth in self.transformer_depths)

    @property
    def attends(self) -> list[int]:
        """1 for each stage whose last block on the way up has a transformer, else 0."""
        return [min(depths[-1], 1) for depths in self.depths_up]

    @property
    def middle_attends(self) -> int:
        """1 if the middle has a transformer, else 0."""
        return min(self.middle_depth, 1)

    @classmethod
    def preset(cls, name: str) -> "UNetConfig":
        """The sizes of a published checkpoint: base, refiner, inpaint, lcm, ssd-1b or vega."""
        if name not in PRESETS:
            raise ConfigError(f"'{name}' is not a preset of the UNet; there are {', '.join(PRESETS)}")
        return PRESETS[name]


PRESETS = {
    "base": UNetConfig(),
    "refiner": UNetConfig(
        channels=384, channel_multipliers=(1, 2, 4, 4), transformer_depths=(0, 4, 4, 0), middle_depth=4, text_width=1280,
        vector_width=2560,
    ),
    "inpaint": replace(UNetConfig(), in_channels=9),
    "lcm": replace(UNetConfig(), guidance=True),
    "ssd-1b": UNetConfig(
        transformer_depths=(0, 2, 4), up_depths=((0, 0, 0), (2, 1, 1), (4, 4, 10)), middle_depth=0, middle_blocks=1
    ),
    "vega": UNetConfig(transformer_depths=(0, 1, 2), middle_depth=0, middle_blocks=1),
}  # fmt: skip
KeysValues = tuple[tuple[Tensor, Tensor], ...]  # of each block of a transformer: k and v [B, H, L, D]


def size_vector(pooled: Tensor, numbers: Tensor) -> Tensor:
    """What SDXL is given beside the text: pooled `[B, P]` and numbers `[B, n]` -> `[B, P + 256 n]`, of pooled's dtype.

    Numbers in pixels, height before width: of the original image, of the crop's upper left corner, of the target; the
    refiner has an aesthetic score (6.0, negative 2.5) in place of the target.
    """
    return torch.cat([pooled, sinusoid(numbers, 256).flatten(1).to(pooled.dtype)], dim=1)


def guidance_sinusoid(guidance: Tensor, width: int = 256) -> Tensor:
    """lcm-sdxl's embedding of guidance scales `[B]` -> `[B, width]` float64 on the CPU, as not every device has float64.

    Sines first; the last frequency is exactly 1 / 10000.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float64, device="cpu") / (half - 1)
    angles = 1000.0 * (guidance.to("cpu", torch.float64) - 1)[:, None] * 10000.0**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def group_norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=eps)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, with the conditioning vector added between; plus the input."""

    def __init__(self, channels_in: int, channels_out: int, vector: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.modulation = nn.Linear(vector, channels_out)
        self.norm2 = group_norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def modulate(self, vec: Tensor) -> Tensor:
        """SiLU of the conditioning vector `[B, T, 4 * channels]` -> what is added, `[B, T, channels_out]`."""
        return self.modulation(vec)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        """x `[B, C, h, w]`, shift `[B, channels_out]` -> `[B, channels_out, h, w]`."""
        h = added(shift[:, :, None, None], self.conv1(activated(x, self.norm1)), self.conv1)
        h = activated(h, self.norm2)
        h = self.conv2(h)
        return added(self.shortcut(x), h, self.conv2)


class HeadAttention(nn.Module):
    """Multi-head attention whose keys and values come from the image itself or from the text."""

    def __init__(self, width: int, context: int, head: int) -> None:
        super().__init__()
        self.heads = width // head
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(context, width, bias=False)
        self.v = nn.Linear(context, width, bias=False)
        self.proj = nn.Linear(width, width)
        self.attention = Attention()

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B H L D

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, L, context]` -> k and v, `[B, H, L, D]`."""
        return self.split(self.k(context)), self.split(self.v(context))

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        return self.proj(self.attention(self.split(self.q(x)), *keys_values))


class TransformerBlock(nn.Module):
    """Pixels attend to each other, then to the text, then a gated MLP; each added to its input."""

    def __init__(self, width: int, context: int, head: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.self_attention = HeadAttention(width, width, head)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attention = HeadAttention(width, context, head)
        self.norm3 = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 8 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, L, context]` -> k and v of the cross-attention, `[B, H, L, D]`."""
        return self.cross_attention.keys_values(text)

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        """x `[B, h * w, C]`."""
        normed = self.norm1(x)
        attention = self.self_attention(normed, self.self_attention.keys_values(normed))
        x = added(x, attention, self.self_attention, self.self_attention.proj)
        attention = self.cross_attention(self.norm2(x), keys_values)
        x = added(x, attention, self.cross_attention, self.cross_attention.proj)
        value, gate = self.mlp_in(self.norm3(x)).chunk(2, dim=-1)
        h = F.gelu(gate)
        h = h.mul_(value) if spare() else h * value
        return added(x, self.mlp_out(h), self.mlp_out)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a stage, plus the input."""

    def __init__(self, channels: int, depth: int, context: int, head: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(TransformerBlock(channels, context, head) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels)

    def keys_values(self, text: Tensor) -> KeysValues:
        """The text `[B, L, context]` as every block's cross-attention sees it."""
        return tuple(block.keys_values(text) for block in self.blocks)  # type: ignore[operator]

    def forward(self, x: Tensor, keys_values: KeysValues) -> Tensor:
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # B hw C
        for block, pair in zip(self.blocks, keys_values, strict=True):
            h = block(h, pair)
        return x + self.proj_out(h).transpose(1, 2).reshape(x.shape)


class NoTransformer(nn.Module):
    """In the place of a transformer, where a stage has none."""

    def keys_values(self, text: Tensor) -> KeysValues:
        return ()

    def forward(self, x: Tensor, keys_values: KeysValues) -> Tensor:
        return x


class Downsample(nn.Module):
    """Halve height and width; padded on all sides, unlike the autoencoder's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


@dataclass(frozen=True)
class StageRun:
    """What stays the same over the steps in one stage."""

    shifts: tuple[Tensor, ...]  # of each residual block, [B, T, C]
    keys_values: tuple[KeysValues, ...]  # of each transformer

    def rows(self, rows: slice | list[int]) -> "StageRun":
        pairs = tuple(tuple((k[rows], v[rows]) for k, v in kv) for kv in self.keys_values)
        return StageRun(tuple(shift[rows] for shift in self.shifts), pairs)


class Stage(nn.Module):
    """Residual blocks of one resolution, each followed by a transformer where the stage attends to the text."""

    def __init__(self, config: UNetConfig, inputs: list[int], width: int, depths: Sequence[int]) -> None:
        super().__init__()
        self.residual = nn.ModuleList(ResidualBlock(c, width, 4 * config.channels) for c in inputs)
        self.transformer = nn.ModuleList(
            SpatialTransformer(width, depth, config.text_width, config.head_width) if depth else NoTransformer()
            for depth in depths
        )

    def prepare(self, vec: Tensor, text: Tensor) -> StageRun:
        """vec `[B, T, 4 * channels]`, after SiLU; text `[B, L, text_width]`."""
        return StageRun(
            tuple(block.modulate(vec) for block in self.residual),  # type: ignore[operator]
            tuple(transformer.keys_values(text) for transformer in self.transformer),  # type: ignore[operator]
        )

    def parts(self, run: StageRun, i: int) -> Iterator[tuple[nn.Module, Tensor, nn.Module, KeysValues]]:
        """Residual block, what is added in it at step `i`, transformer, its keys and values; in pairs."""
        shifts = (shift[:, i] for shift in run.shifts)
        return zip(self.residual, shifts, self.transformer, run.keys_values, strict=True)


class DownStage(Stage):
    """On the way down every block's output is kept for the way up, the halved one too."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        width, before = config.widths[level], config.widths[max(level - 1, 0)]
        inputs = [before] + [width] * (RESIDUAL_BLOCKS - 1)
        super().__init__(config, inputs, width, [config.transformer_depths[level]] * RESIDUAL_BLOCKS)
        self.downsample = Downsample(width) if level < config.levels - 1 else None

    def forward(self, x: Tensor, run: StageRun, i: int) -> list[Tensor]:
        """All outputs of the stage; the last goes on."""
        kept = []
        for residual, shift, transformer, keys_values in self.parts(run, i):
            x = transformer(residual(x, shift), keys_values)
            kept.append(x)
        return kept if self.downsample is None else [*kept, self.downsample(x)]


class Middle(Stage):
    """Block, transformer, block at the lowest resolution; of a distilled network perhaps the first block alone."""

    def __init__(self, config: UNetConfig) -> None:
        width = config.widths[-1]
        depths = [config.middle_depth, 0][: config.middle_blocks]
        super().__init__(config, [width] * config.middle_blocks, width, depths)

    def forward(self, x: Tensor, run: StageRun, i: int) -> Tensor:
        for residual, shift, transformer, keys_values in self.parts(run, i):
            x = transformer(residual(x, shift), keys_values)
        return x


class UpStage(Stage):
    """On the way up every block first takes back what was kept on the way down, behind its own channels."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        widths = config.widths
        width, below = widths[level], widths[min(level + 1, config.levels - 1)]
        skips = [width] * RESIDUAL_BLOCKS + [widths[max(level - 1, 0)]]
        inputs = [c + skip for c, skip in zip([below, width, width], skips, strict=True)]
        super().__init__(config, inputs, width, config.depths_up[level])
        self.upsample = Upsample(width) if level > 0 else nn.Identity()

    def forward(self, x: Tensor, kept: Sequence[Tensor], run: StageRun, i: int) -> Tensor:
        """kept: as many outputs of the way down as there are blocks, the last first."""
        for skip, (residual, shift, transformer, keys_values) in zip(kept, self.parts(run, i), strict=True):
            x = transformer(residual(torch.cat([x, skip], dim=1), shift), keys_values)
        return self.upsample(x)


@dataclass(frozen=True)
class UNetRun:
    """What stays the same over the steps of an image, by `UNet.prepare`; valid while the weights are."""

    down: tuple[StageRun, ...]
    middle: StageRun
    up: tuple[StageRun, ...]  # the finest first, as the stages

    def rows(self, rows: slice | list[int]) -> "UNetRun":
        """The run of some rows of the batch; of a slice views, nothing is copied."""
        down, up = (tuple(stage.rows(rows) for stage in stages) for stages in (self.down, self.up))
        return UNetRun(down, self.middle.rows(rows), up)


class UNet(nn.Module):
    """The network of every SDXL: noised latents, a prompt and a time become the noise (or v, or the clean latents)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        vector = 4 * config.channels
        self.time_in = VectorMLP(config.channels, vector)
        self.guidance_in = nn.Linear(256, config.channels, bias=False) if config.guidance else None
        self.vector_in = VectorMLP(config.vector_width, vector)
        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1)
        self.down = nn.ModuleList(DownStage(config, level) for level in range(config.levels))
        self.middle = Middle(config)
        self.up = nn.ModuleList(UpStage(config, level) for level in range(config.levels))
        self.norm_out = group_norm(config.channels)
        self.conv_out = nn.Conv2d(config.channels, config.out_channels, 3, padding=1)

    def conditioning_vector(self, vector: Tensor, times: Tensor, guidance: Tensor | None = None) -> Tensor:
        """vector `[B, V]`, times `[T]` or `[T, B]` in [0, 999], guidance `[B]` -> `[B, T, 4 * channels]`."""
        dtype = self.conv_in.weight.dtype
        by_row = prepare_times(times, vector.shape[0])
        embedded = sinusoid(by_row, self.config.channels).to(vector.device, dtype)  # B T channels, B = 1 if shared
        if self.guidance_in is not None:
            if guidance is None:
                raise ConfigError("this UNet has a guidance embedding: give guidance [B], 8 for lcm-sdxl")
            check_shape("guidance", guidance, B=vector.shape[0])
            embedded = embedded + self.guidance_in(guidance_sinusoid(guidance).to(vector.device, dtype))[:, None]
        return over_rows(self.time_in(embedded), vector.shape[0]) + self.vector_in(vector)[:, None]

    def prepare(self, text: Tensor, vector: Tensor, times: Tensor, guidance: Tensor | None = None) -> UNetRun:
        """Compute once what no step changes.

        text `[B, L, text_width]`, vector `[B, vector_width]` (`size_vector`); times `[T]` or `[T, B]`, places in the
        training's table of 1000, which may be fractions; guidance `[B]`, only for networks with that embedding.
        """
        check_shape("text", text, B=None, L=None, text_width=self.config.text_width)
        check_shape("vector", vector, B=text.shape[0], vector_width=self.config.vector_width)
        vec = F.silu(self.conditioning_vector(vector, times, guidance))
        down, up = (tuple(stage.prepare(vec, text) for stage in stages) for stages in (self.down, self.up))  # type: ignore[operator]
        return UNetRun(down, self.middle.prepare(vec, text), up)

    def step(self, latents: Tensor, run: UNetRun, i: int) -> Tensor:
        """The raw output at evaluation point `i`: latents `[B, in_channels, h, w]` -> `[B, out_channels, h, w]`.

        h and w are multiples of 2 ** (stages - 1).
        """
        kept = [self.conv_in(latents)]
        for stage, stage_run in zip(self.down, run.down, strict=True):
            kept += stage(kept[-1], stage_run, i)
        x = self.middle(kept[-1], run.middle, i)
        for stage, stage_run in zip(reversed(self.up), reversed(run.up), strict=True):
            kept, skips = kept[: -RESIDUAL_BLOCKS - 1], kept[-RESIDUAL_BLOCKS - 1 :]
            x = stage(x, skips[::-1], stage_run, i)
        return self.conv_out(activated(x, self.norm_out))

    def forward(
        self, latents: Tensor, text: Tensor, vector: Tensor, times: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        """One evaluation, as in training; the rest as in `prepare` and `step`.

        times `[B]`, one per row (`[1, B]` is the same), or one for all rows: a scalar or `[1]`.
        """
        check_shape("latents", latents, B=None, in_channels=self.config.in_channels, height=None, width=None)
        return self.step(latents, self.prepare(text, vector, forward_times(latents, text, times), guidance), 0)
