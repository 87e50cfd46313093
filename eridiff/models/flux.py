"""Flux.1: the rectified-flow transformer of Black Forest Labs, from top to bottom.

Sources: `model.py`, `modules/layers.py`, `math.py` and `sampling.py` of black-forest-labs/flux; Esser et al. 2024
("Scaling Rectified Flow Transformers", the double blocks); Dehghani et al. 2023 (the parallel single blocks); Su et al.
2021 (rope). Loads flux1-dev, -schnell, -krea, -kontext, -fill, -canny and -depth, in float64 too.

Letters: B batch, N image tokens, L text tokens, S = L + N, H heads, D features of one head, T steps of a run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eridiff.errors import ConfigError
from eridiff.models.layers import (
    GELU,
    Attention,
    FinalLayer,
    Last,
    RMSNorm,
    Stream,
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
    wide,
    with_factors,
)


@dataclass(frozen=True)
class FluxConfig:
    """Sizes of a Flux; the defaults are flux1-dev's."""

    in_channels: int = 64  # 16 latent channels x 2 x 2 pixels of a patch, and what Fill, Canny and Depth append
    out_channels: int = 64
    pooled_width: int = 768
    text_width: int = 4096
    hidden: int = 3072
    heads: int = 24
    mlp_ratio: float = 4.0
    double_depth: int = 19
    single_depth: int = 38
    rope_axes: tuple[int, ...] = (16, 56, 56)  # features of a head for: reference image, row, column
    theta: int = 10000
    guidance: bool = True

    def __post_init__(self) -> None:
        if self.hidden % self.heads or sum(self.rope_axes) != self.hidden // self.heads:
            raise ConfigError(
                f"hidden {self.hidden} over {self.heads} heads must be the sum of rope_axes {self.rope_axes}"
            )

    @property
    def mlp(self) -> int:
        return int(self.hidden * self.mlp_ratio)

    @classmethod
    def preset(cls, name: str) -> "FluxConfig":
        """The sizes of a published checkpoint: dev, schnell, fill, canny or depth (krea and kontext equal dev)."""
        if name not in PRESETS:
            raise ConfigError(f"'{name}' is not a preset of Flux; there are {', '.join(PRESETS)}")
        return PRESETS[name]


PRESETS = {
    "dev": FluxConfig(),
    "krea": FluxConfig(),
    "kontext": FluxConfig(),
    "schnell": replace(FluxConfig(), guidance=False),
    "fill": replace(FluxConfig(), in_channels=64 + 64 + 256),
    "canny": replace(FluxConfig(), in_channels=64 + 64),
    "depth": replace(FluxConfig(), in_channels=64 + 64),
}


def patchify(latents: Tensor) -> Tensor:
    """`[B, C, 2h, 2w]` -> `[B, h * w, 4C]`: tokens row by row; channel, row, column inside a patch."""
    b, c, height, width = latents.shape
    patches = latents.reshape(b, c, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, (height // 2) * (width // 2), c * 4)


def unpatchify(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """`[B, h * w, 4C]` with `grid = (h, w)` -> `[B, C, 2h, 2w]`, the inverse of `patchify`."""
    b, _, features = tokens.shape
    h, w = grid
    patches = tokens.reshape(b, h, w, features // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, features // 4, 2 * h, 2 * w)


def fill_condition(masked_latents: Tensor, mask: Tensor) -> Tensor:
    """What Fill appends to its noise tokens: `[B, 16, 2h, 2w]` and mask `[B, 1, 16h, 16w]` -> `[B, h * w, 64 + 256]`.

    The latents are those of `picture * (1 - mask)`; the mask is 1 where Fill must paint.
    """
    return torch.cat([patchify(masked_latents), patchify(F.pixel_unshuffle(mask, 8))], dim=-1)


def position_ids(grid: tuple[int, int], index: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """`[h * w, 3]` float64: image index (0, or 1 for a Kontext reference), row and column of each token.

    On the CPU by default, where the rotary table is made: not every device has float64.
    """
    h, w = grid
    rows = torch.arange(h, dtype=torch.float64, device=device)[:, None].expand(h, w)
    columns = torch.arange(w, dtype=torch.float64, device=device)[None, :].expand(h, w)
    return torch.stack([torch.full_like(rows, index), rows, columns], dim=-1).reshape(h * w, 3)


def rope_table(ids: Tensor, axes: Sequence[int], theta: int) -> Tensor:
    """Cosines and sines of the rotary embedding: ids `[S, A]` -> `[2, S, sum(axes) / 2]` float64 on the CPU.

    float64 angles as in the original until January 2025 and in diffusers; the later original's float32 angles are off
    by 7e-6 at position 128.
    """
    ids, angles = ids.to("cpu", torch.float64), []
    for axis, width in enumerate(axes):
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width
        angles.append(ids[:, axis, None] * theta**-exponents)
    joined = torch.cat(angles, dim=-1)
    # cosine and sine of an angle side by side in memory, as a complex number
    return torch.stack([joined.cos(), joined.sin()], dim=-1).movedim(-1, 0)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate neighbouring features: x `[B, H, S, D]`, rope `[2, S, D / 2]` in float32 or float64."""
    x = x if x.stride(-1) == 1 else x.contiguous()  # neighbours side by side in memory
    pairs = x.to(rope.dtype).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which joins these products into one kernel, and complex ones it does not
        (even, odd), (cos, sin) = pairs.unbind(-1), rope
        rotated = torch.stack([cos * even - sin * odd, sin * even + cos * odd], dim=-1)
    else:
        turn, numbers = (torch.view_as_complex(t) for t in (rope.movedim(0, -1).contiguous(), pairs))
        # in the copy's own memory where the line above has made one
        rotated = torch.view_as_real(numbers * turn if x.dtype == rope.dtype else numbers.mul_(turn))
    return rotated.flatten(-2).to(x.dtype)


def rotated(q: Tensor, k: Tensor, rope: Tensor, over: bool) -> tuple[Tensor, Tensor]:
    """Both through `apply_rope`; with `over`, of `spare`, in their own memory."""
    if not over or q.stride(-1) != 1 or k.stride(-1) != 1:
        return apply_rope(q, rope), apply_rope(k, rope)
    turn = torch.view_as_complex(rope.movedim(0, -1).contiguous())
    work = None if q.dtype == rope.dtype else q.new_empty(q.shape, dtype=rope.dtype)
    for x in (q, k):
        numbers = x if work is None else work.copy_(x)
        torch.view_as_complex(numbers.unflatten(-1, (-1, 2))).mul_(turn)
        if work is not None:
            x.copy_(work)
    return q, k


class DoubleBlock(nn.Module):
    """Image and text attend together; each has its own projections, MLP and modulation."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.image = Stream(config.hidden, config.heads, config.mlp)
        self.text = Stream(config.hidden, config.heads, config.mlp)
        self.attention = Attention()

    def modulate(self, vec: Tensor) -> tuple[Tensor, Tensor]:
        """SiLU of the conditioning vector `[B, T, hidden]` -> modulation of image and text, `[B, T, 6 * hidden]`."""
        return self.image.modulate(vec), self.text.modulate(vec)

    def forward(
        self, image: Tensor, text: Tensor, rope: Tensor, image_modulation: Tensor, text_modulation: Tensor,
        seen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """image `[B, N, hidden]`, text `[B, L, hidden]`, rope `[2, S, D / 2]`, modulations `[B, 1, 6 * hidden]`, seen `[B, 1, 1, S]`."""
        image_mod, text_mod = image_modulation.chunk(6, dim=-1), text_modulation.chunk(6, dim=-1)
        image_qkv = self.image.attention_inputs(image, *image_mod[:2])
        text_qkv = self.text.attention_inputs(text, *text_mod[:2])
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(text_qkv, image_qkv, strict=True))  # B H S D
        joint = self.attention(*rotated(q, k, rope, spare()), v, seen)  # B S hidden
        text_attention, image_attention = joint.split([text.shape[1], image.shape[1]], dim=1)
        return self.image.update(image, image_attention, image_mod), self.text.update(text, text_attention, text_mod)


class SingleBlock(nn.Module):
    """Text and image in one sequence, attention and MLP side by side behind one matrix each way."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        hidden, head = config.hidden, config.hidden // config.heads
        self.heads = config.heads
        self.sizes = [3 * hidden, config.mlp]
        self.modulation = nn.Linear(hidden, 3 * hidden)
        self.linear1 = nn.Linear(hidden, 3 * hidden + config.mlp)
        self.q_norm = RMSNorm(head)
        self.k_norm = RMSNorm(head)
        self.linear2 = nn.Linear(hidden + config.mlp, hidden)
        self.mlp_act = GELU()
        self.attention = Attention()

    def modulate(self, vec: Tensor) -> Tensor:
        """SiLU of the conditioning vector `[B, T, hidden]` -> shift, 1 + scale, gate `[B, T, 3 * hidden]`."""
        return with_factors(self.modulation(vec), vec.shape[-1])

    def forward(self, x: Tensor, rope: Tensor, modulation: Tensor, seen: Tensor | None = None) -> Tensor:
        """x `[B, S, hidden]`, text first; rope `[2, S, D / 2]`, modulation `[B, 1, 3 * hidden]`, seen `[B, 1, 1, S]`."""
        over = spare(self.linear1, self.q_norm, self.k_norm, self.attention, self.mlp_act, self.linear2)
        shift, factor, gate = modulation.chunk(3, dim=-1)
        whole = self.linear1(modulated(x, shift, factor))
        qkv, mlp = whole.split(self.sizes, dim=-1)
        q, k, v = split_heads(qkv, self.heads)
        q, k = rotated(*normed(q, k, self.q_norm, self.k_norm), rope, over)
        attention, mlp = self.attention(q, k, v, seen), self.mlp_act(mlp, over)
        if over and len(x) == 1:  # attention goes where v was, beside the MLP: nothing is copied to join them
            inner = whole[0, :, 2 * x.shape[-1] :]
            inner[:, : x.shape[-1]] = attention[0]
            y = self.linear2(inner)[None]  # a matrix, whose rows need not be contiguous
        else:
            y = self.linear2(torch.cat([attention, mlp], dim=-1))
        return gated(x, gate, y, over)


@dataclass(frozen=True)
class FluxRun:
    """What stays the same over the steps of an image, by `Flux.prepare`; valid while the weights are."""

    text: Tensor  # [B, L, hidden]
    rope: Tensor  # [2, S, D / 2]
    double: tuple[tuple[Tensor, Tensor], ...]  # of each block: image and text modulation [B, T, 6 * hidden]
    single: tuple[Tensor, ...]  # [B, T, 3 * hidden]
    final: Tensor  # [B, T, 2 * hidden]
    seen: Tensor | None = None  # [B, 1, 1, S] bool, the tokens that are attended to; None is all

    def rows(self, rows: slice | list[int]) -> "FluxRun":
        """The run of some rows of the batch; of a slice views, nothing is copied."""
        double = tuple((image[rows], text[rows]) for image, text in self.double)
        single, seen = tuple(m[rows] for m in self.single), None if self.seen is None else self.seen[rows]
        return FluxRun(self.text[rows], self.rope, double, single, self.final[rows], seen)


class Flux(nn.Module):
    """The network of every Flux.1: noised latents, a prompt and a time become a velocity, noise - clean."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        self.image_in = nn.Linear(config.in_channels, config.hidden)
        self.text_in = nn.Linear(config.text_width, config.hidden)
        self.time_in = VectorMLP(256, config.hidden)
        self.guidance_in = VectorMLP(256, config.hidden) if config.guidance else None
        self.pooled_in = VectorMLP(config.pooled_width, config.hidden)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.double_depth))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.single_depth))
        self.final = FinalLayer(config.hidden, config.out_channels)
        self.last_rotations = Last()

    def conditioning_vector(self, pooled: Tensor, times: Tensor, guidance: Tensor | None) -> Tensor:
        """pooled `[B, P]`, times `[T]` or `[T, B]` in [0, 1], guidance `[B]` -> `[B, T, hidden]`."""
        dtype = self.time_in.in_layer.weight.dtype
        by_row = prepare_times(times, pooled.shape[0])
        sinusoid = timestep_sinusoid(by_row).to(pooled.device, dtype)
        vec = over_rows(self.time_in(sinusoid), pooled.shape[0])  # B T hidden, B = 1 if the times are shared
        if self.guidance_in is not None:
            if guidance is None:
                raise ConfigError("this Flux has a guidance embedding: give guidance [B], 3.5 for dev")
            check_shape("guidance", guidance, B=pooled.shape[0])
            vec = vec + self.guidance_in(timestep_sinusoid(guidance).to(pooled.device, dtype))[:, None]
        return vec + self.pooled_in(pooled)[:, None]

    def prepare(
        self,
        text: Tensor,
        pooled: Tensor,
        times: Tensor,
        grid: tuple[int, int] | None = None,
        guidance: Tensor | None = None,
        ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> FluxRun:
        """Compute once what no step changes.

        text `[B, L, text_width]`, pooled `[B, pooled_width]`; times `[T]` or `[T, B]` in [0, 1], every evaluation point
        of the run; guidance `[B]`, only for networks with that embedding; either the `grid = (h, w)` of the image's
        tokens or `ids` `[N, 3]`, the explicit positions (`position_ids`; Kontext appends its reference's). `mask` `[B, L]` bool
        hides text tokens; the published networks see all, padding too.
        """
        if ids is None and grid is None:
            raise ConfigError("Flux.prepare needs the grid of the image's tokens or their position ids")
        check_shape("text", text, B=None, L=None, text_width=self.config.text_width)
        check_shape("pooled", pooled, B=text.shape[0], pooled_width=self.config.pooled_width)
        if mask is not None:
            check_shape("mask", mask, B=text.shape[0], L=text.shape[1])
        rope = self.rotations(grid, ids, text)
        vec = F.silu(self.conditioning_vector(pooled, times, guidance))
        return FluxRun(
            text=self.text_in(text),
            rope=rope,
            double=tuple(block.modulate(vec) for block in self.double_blocks),  # type: ignore[operator]
            single=tuple(block.modulate(vec) for block in self.single_blocks),  # type: ignore[operator]
            final=self.final.modulate(vec),
            seen=seen_keys(mask, rope.shape[1] - text.shape[1], text.device),
        )

    def rotations(self, grid: tuple[int, int] | None, ids: Tensor | None, text: Tensor) -> Tensor:
        """The rotary table of text and image, `[2, S, D / 2]`, where the text is; that of the last grid is kept."""
        dtype, config = wide(text.dtype), self.config

        def table(ids: Tensor) -> Tensor:
            check_shape("ids", ids, N=None, axes=len(config.rope_axes))
            joint = torch.cat([ids.new_zeros(text.shape[1], ids.shape[1]), ids])  # text is at zero, unrotated
            return rope_table(joint, config.rope_axes, config.theta).to(text.device, dtype)

        if ids is not None:
            return table(ids)
        assert grid is not None
        asked = (grid, text.shape[1], text.device, dtype, type(text))
        return self.last_rotations(asked, lambda: table(position_ids(grid)))

    def step(self, latents: Tensor, run: FluxRun, i: int) -> Tensor:
        """Velocity at evaluation point `i`: latents `[B, N, in_channels]` -> `[B, N, out_channels]`."""
        image, text = self.image_in(latents), run.text
        for block, (image_mod, text_mod) in zip(self.double_blocks, run.double, strict=True):
            image, text = block(image, text, run.rope, image_mod[:, i : i + 1], text_mod[:, i : i + 1], run.seen)
        joint = torch.cat([text, image], dim=1)  # B S hidden
        for block, modulation in zip(self.single_blocks, run.single, strict=True):
            joint = block(joint, run.rope, modulation[:, i : i + 1], run.seen)
        return self.final(joint[:, text.shape[1] :], run.final[:, i : i + 1])

    def forward(
        self,
        latents: Tensor,
        text: Tensor,
        pooled: Tensor,
        times: Tensor,
        grid: tuple[int, int] | None = None,
        guidance: Tensor | None = None,
        ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """One evaluation, as in training; the rest as in `prepare` and `step`.

        times `[B]`, one per row (`[1, B]` is the same), or one for all rows: a scalar or `[1]`.
        """
        run = self.prepare(text, pooled, forward_times(latents, text, times), grid, guidance, ids, mask)
        tokens = run.rope.shape[1] - text.shape[1]  # of the grid or the ids
        hint = ": patchify the latents first, into the tokens that the grid or the ids name"
        check_shape("latents", latents, hint, B=text.shape[0], N=tokens, in_channels=self.config.in_channels)
        return self.step(latents, run, 0)
