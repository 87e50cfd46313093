"""MMDiT and MMDiT-X: the rectified-flow transformers of Stable Diffusion 3 and 3.5, from top to bottom.

Sources: `mmditx.py` of Stability-AI/sd3.5; Esser et al. 2024 ("Scaling Rectified Flow Transformers"). Loads sd3-medium,
sd3.5-medium, sd3.5-large and sd3.5-large-turbo, in float64 too.

Letters: B batch, N image tokens, L text tokens, S = L + N, H heads, D features of one head, T steps of a run.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eridiff.errors import ConfigError
from eridiff.models.layers import (
    Attention,
    FinalLayer,
    Last,
    RMSNorm,
    Stream,
    StreamInput,
    VectorMLP,
    check_shape,
    forward_times,
    gated,
    modulated,
    normed,
    over_rows,
    prepare_times,
    seen_keys,
    spare,
    split_heads,
    timestep_sinusoid,
    with_factors,
)


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes of an MMDiT; the defaults are sd3.5-large's."""

    in_channels: int = 16  # of the latents; a patch is 2 x 2 of them
    out_channels: int = 16
    pooled_width: int = 2048
    text_width: int = 4096
    hidden: int = 2432
    heads: int = 38
    mlp_ratio: float = 4.0
    depth: int = 38
    table_side: int = 192  # of the square table of positions, in patches
    qk_norm: bool = True
    dual_blocks: tuple[int, ...] = ()  # those whose image stream has a second attention, to itself (MMDiT-X)

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise ConfigError(f"hidden {self.hidden} must be a multiple of the {self.heads} heads")

    @property
    def mlp(self) -> int:
        return int(self.hidden * self.mlp_ratio)

    @classmethod
    def preset(cls, name: str) -> "MMDiTConfig":
        """The sizes of a published checkpoint: sd3-medium, sd3.5-medium, sd3.5-large or sd3.5-large-turbo."""
        if name not in PRESETS:
            raise ConfigError(f"'{name}' is not a preset of MMDiT; there are {', '.join(PRESETS)}")
        return PRESETS[name]


PRESETS = {
    "sd3-medium": MMDiTConfig(hidden=1536, heads=24, depth=24, qk_norm=False),
    "sd3.5-medium": MMDiTConfig(hidden=1536, heads=24, depth=24, table_side=384, dual_blocks=tuple(range(13))),
    "sd3.5-large": MMDiTConfig(),
    "sd3.5-large-turbo": MMDiTConfig(),
}


def unpatchify(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """`[B, h * w, 4C]` with `grid = (h, w)` -> `[B, C, 2h, 2w]`.

    Inside a token row, column, then channel: not the order of the patch convolution's input, and not Flux's.
    """
    b, _, features = tokens.shape
    h, w = grid
    patches = tokens.reshape(b, h, w, 2, 2, features // 4)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(b, features // 4, 2 * h, 2 * w)


class PositionTable(nn.Module):
    """One vector for each patch of the largest image; a smaller image takes the middle.

    The table is sd3.5-medium's tenth part, and an image needs little of it: so it is neither parameter nor buffer, stays
    where and in the dtype in which it was loaded when the network is moved, and only crops leave. The last crop is kept,
    since every step of a training run asks for the same.
    """

    def __init__(self, side: int, hidden: int) -> None:
        super().__init__()
        self.side = side
        self.table = torch.zeros(1, side * side, hidden)
        self.last = Last()

    def forward(self, grid: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
        """`grid = (h, w)` -> `[1, h * w, hidden]`; raises ConfigError if the table is smaller."""
        if torch.compiler.is_compiling():
            return self._crop(grid).to(device, dtype)
        version = None if self.table.is_inference() else self.table._version
        asked = (id(self.table), type(self.table), version, grid, device, dtype)
        # with the table itself, whose id then stays its own
        _, crop = self.last(asked, lambda: (self.table, self._crop(grid).to(device, dtype)))
        return crop

    def _crop(self, grid: tuple[int, int]) -> Tensor:
        h, w = grid
        if max(h, w) > self.side:
            raise ConfigError(
                f"an image of {16 * w} x {16 * h} pixels is larger than this network's table of positions: "
                f"at most {16 * self.side} a side"
            )
        top, left = (self.side - h) // 2, (self.side - w) // 2
        square = self.table.unflatten(1, (self.side, self.side))
        return square[:, top : top + h, left : left + w].flatten(1, 2)

    def _save_to_state_dict(self, destination, prefix, keep_vars):  # type: ignore[no-untyped-def]
        destination[prefix + "table"] = self.table

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        given = state_dict.get(prefix + "table")
        if given is None:
            missing_keys.append(prefix + "table")
        elif given.shape != self.table.shape:
            error_msgs.append(f"{prefix}table has the shape {list(given.shape)}, {list(self.table.shape)} is needed")
        else:
            self.table = given.detach()


class DualStream(Stream):
    """The image stream of a dual block (MMDiT-X): beside the joint attention one among image tokens alone.

    Nine chunks of modulation: the six of a stream, then shift, 1 + scale and gate of the second attention.
    """

    def __init__(self, hidden: int, heads: int, mlp: int, qk_norm: bool = True) -> None:
        super().__init__(hidden, heads, mlp, qk_norm, chunks=9)
        self.qkv2 = nn.Linear(hidden, 3 * hidden)
        self.q_norm2 = RMSNorm(hidden // heads) if qk_norm else nn.Identity()
        self.k_norm2 = RMSNorm(hidden // heads) if qk_norm else nn.Identity()
        self.proj2 = nn.Linear(hidden, hidden)
        self.attention2 = Attention()

    def update(self, x: Tensor, attention: Tensor, modulation: Sequence[Tensor]) -> Tensor:
        """Both attentions read the block's input `x`, neither the other's result."""
        *first, shift, factor, gate = modulation
        q, k, v = split_heads(self.qkv2(modulated(x, shift, factor)), self.heads)
        own = self.attention2(*normed(q, k, self.q_norm2, self.k_norm2), v)
        return super().update(gated(x, gate, self.proj2(own), spare(self.proj2)), attention, first)


class LastTextStream(StreamInput):
    """The text stream of the last block: it is attended to and ends there, so it has no output projection and no MLP.

    Two chunks of modulation: shift and 1 + scale. Its queries move nothing; the published files hold them all the same.
    """

    def __init__(self, hidden: int, heads: int, qk_norm: bool = True) -> None:
        super().__init__(hidden, heads, qk_norm)
        self.last_modulation = nn.Linear(hidden, 2 * hidden)

    def modulate(self, vec: Tensor) -> Tensor:
        """SiLU of the conditioning vector `[B, T, hidden]` -> `[B, T, 2 * hidden]`."""
        # diffusers stores scale, shift here and only here: its map swaps the halves
        return with_factors(self.last_modulation(vec), vec.shape[-1])

    def update(self, x: Tensor, attention: Tensor, modulation: Sequence[Tensor]) -> Tensor:
        return x


class JointBlock(nn.Module):
    """Image and text attend together; each has its own projections, MLP and modulation."""

    def __init__(self, config: MMDiTConfig, index: int) -> None:
        super().__init__()
        sizes = (config.hidden, config.heads)
        picture_stream = DualStream if index in config.dual_blocks else Stream
        self.image = picture_stream(*sizes, config.mlp, config.qk_norm)
        last = index == config.depth - 1
        self.text = LastTextStream(*sizes, config.qk_norm) if last else Stream(*sizes, config.mlp, config.qk_norm)
        self.attention = Attention()

    def modulate(self, vec: Tensor) -> tuple[Tensor, Tensor]:
        """SiLU of the conditioning vector `[B, T, hidden]` -> modulation of image and text, `[B, T, n * hidden]`."""
        return self.image.modulate(vec), self.text.modulate(vec)

    def forward(
        self, image: Tensor, text: Tensor, image_modulation: Tensor, text_modulation: Tensor, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """image `[B, N, hidden]`, text `[B, L, hidden]`, modulations `[B, 1, n * hidden]`, seen `[B, 1, 1, L + N]`."""
        image_mod, text_mod = (m.split(image.shape[-1], dim=-1) for m in (image_modulation, text_modulation))
        image_qkv = self.image.attention_inputs(image, *image_mod[:2])
        text_qkv = self.text.attention_inputs(text, *text_mod[:2])
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(text_qkv, image_qkv, strict=True))  # B H S D
        joint = self.attention(q, k, v, seen)  # B S hidden
        text_attention, image_attention = joint.split([text.shape[1], image.shape[1]], dim=1)
        return self.image.update(image, image_attention, image_mod), self.text.update(text, text_attention, text_mod)


@dataclass(frozen=True)
class MMDiTRun:
    """What stays the same over the steps of an image, by `MMDiT.prepare`; valid while the weights are."""

    text: Tensor  # [B, L, hidden]
    positions: Tensor  # [1, N, hidden]
    joint: tuple[tuple[Tensor, Tensor], ...]  # of each block: image and text modulation [B, T, n * hidden]
    final: Tensor  # [B, T, 2 * hidden]
    seen: Tensor | None = None  # [B, 1, 1, L + N] bool, the tokens that are attended to; None is all

    def rows(self, rows: slice | list[int]) -> "MMDiTRun":
        """The run of some rows of the batch; of a slice views, nothing is copied."""
        joint = tuple((image[rows], text[rows]) for image, text in self.joint)
        seen = None if self.seen is None else self.seen[rows]
        return MMDiTRun(self.text[rows], self.positions, joint, self.final[rows], seen)


class MMDiT(nn.Module):
    """The network of SD 3 and 3.5: noised latents, a prompt and a time become a velocity, noise - clean."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.image_in = nn.Conv2d(config.in_channels, config.hidden, kernel_size=2, stride=2)
        self.positions = PositionTable(config.table_side, config.hidden)
        self.text_in = nn.Linear(config.text_width, config.hidden)
        self.time_in = VectorMLP(256, config.hidden)
        self.pooled_in = VectorMLP(config.pooled_width, config.hidden)
        self.joint_blocks = nn.ModuleList(JointBlock(config, index) for index in range(config.depth))
        self.final = FinalLayer(config.hidden, 4 * config.out_channels)

    def conditioning_vector(self, pooled: Tensor, times: Tensor) -> Tensor:
        """pooled `[B, P]`, times `[T]` or `[T, B]` in [0, 1] -> `[B, T, hidden]`."""
        by_row, dtype = prepare_times(times, pooled.shape[0]), self.time_in.in_layer.weight.dtype
        sinusoid = timestep_sinusoid(by_row).to(pooled.device, dtype)  # B T 256, B = 1 if shared
        return over_rows(self.time_in(sinusoid), pooled.shape[0]) + self.pooled_in(pooled)[:, None]

    def prepare(
        self, text: Tensor, pooled: Tensor, times: Tensor, grid: tuple[int, int], mask: Tensor | None = None
    ) -> MMDiTRun:
        """Compute once what no step changes.

        text `[B, L, text_width]`, pooled `[B, pooled_width]`; times `[T]` or `[T, B]` in [0, 1], every evaluation point
        of the run; the `grid = (h, w)` of the image's patches. `mask` `[B, L]` bool hides text tokens; the published
        networks see all, padding too. Raises ConfigError for a grid beyond the table.
        """
        check_shape("text", text, B=None, L=None, text_width=self.config.text_width)
        check_shape("pooled", pooled, B=text.shape[0], pooled_width=self.config.pooled_width)
        if mask is not None:
            check_shape("mask", mask, B=text.shape[0], L=text.shape[1])
        vec = F.silu(self.conditioning_vector(pooled, times))
        return MMDiTRun(
            text=self.text_in(text),
            positions=self.positions(grid, text.device, text.dtype),
            joint=tuple(block.modulate(vec) for block in self.joint_blocks),  # type: ignore[operator]
            final=self.final.modulate(vec),
            seen=seen_keys(mask, grid[0] * grid[1], text.device),
        )

    def step(self, latents: Tensor, run: MMDiTRun, i: int, skip_blocks: Container[int] = ()) -> Tensor:
        """Velocity at evaluation point `i`: latents `[B, in_channels, 2h, 2w]` -> `[B, out_channels, 2h, 2w]`.

        Both streams pass the blocks of `skip_blocks` unchanged (for skip-layer guidance).
        """
        patches = self.image_in(latents)  # B hidden h w
        # contiguous: else every block's norms and sums would inherit the convolution's layout, and copy
        image, text = patches.flatten(2).transpose(1, 2).contiguous() + run.positions, run.text
        for index, (block, (image_mod, text_mod)) in enumerate(zip(self.joint_blocks, run.joint, strict=True)):
            if index not in skip_blocks:
                image, text = block(image, text, image_mod[:, i : i + 1], text_mod[:, i : i + 1], run.seen)
        return unpatchify(self.final(image, run.final[:, i : i + 1]), (patches.shape[2], patches.shape[3]))

    def forward(
        self, latents: Tensor, text: Tensor, pooled: Tensor, times: Tensor, skip_blocks: Container[int] = (),
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """One evaluation, as in training; the rest as in `prepare` and `step`.

        times `[B]`, one per row (`[1, B]` is the same), or one for all rows: a scalar or `[1]`.
        """
        check_shape("latents", latents, B=None, in_channels=self.config.in_channels, height=None, width=None)
        grid = (latents.shape[2] // 2, latents.shape[3] // 2)
        run = self.prepare(text, pooled, forward_times(latents, text, times), grid, mask)
        return self.step(latents, run, 0, skip_blocks)
