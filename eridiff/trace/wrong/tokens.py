"""Flux and MMDiT: blocks of two streams, their modulation, the rotary table, the table of positions."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eridiff.models import flux, layers
from eridiff.models.layers import split_heads
from eridiff.trace.wrong.parts import Wrong


def chunks(order: Callable[[int], Sequence[int]], interleaved: bool = False) -> Callable[[Wrong], Wrong]:
    """Of the modulations of a block, the last arguments before `seen`: each is cut and put together in another order."""

    def moved(modulation: Tensor, width: int) -> Tensor:
        count = modulation.shape[-1] // width
        ones = layers.with_factors(torch.zeros_like(modulation), width)  # which are there already
        modulation = modulation - ones
        if interleaved:
            return modulation.unflatten(-1, (width, count)).transpose(-1, -2).flatten(-2) + ones
        parts = modulation.split(width, dim=-1)
        return torch.cat([parts[i] for i in order(count)], dim=-1) + ones

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


def second_in_the_middle(count: int) -> list[int]:
    return [0, 1, 2, 6, 7, 8, 3, 4, 5] if count == 9 else list(range(count))


def update(
    attention_gate: bool = True, mlp_gate: bool = True, exchanged: bool = False, late: bool = False
) -> Callable[[Wrong], Wrong]:
    """Of a stream after its attention: gates left out or exchanged, or an MLP that reads what was there before."""

    def make(_: Wrong) -> Wrong:
        def update(self: Any, x: Tensor, attention: Tensor, modulation: Sequence[Tensor]) -> Tensor:
            _, _, gate1, shift2, factor2, gate2 = modulation
            if exchanged:
                gate1, gate2 = gate2, gate1
            added = self.proj(attention)
            after = x + (gate1 * added if attention_gate else added)
            added = self.mlp(layers.modulated(x if late else after, shift2, factor2))
            return after + (gate2 * added if mlp_gate else added)

        return update

    return make


def second_attention(
    left_out: bool = False, late: bool = False, chunks: tuple[int, int, int] = (6, 7, 8)
) -> Callable[[Wrong], Wrong]:
    """Of SD 3.5 medium's dual blocks: left out, reading what the first attention was added to, with other modulation."""

    def make(_: Wrong) -> Wrong:
        def update(self: Any, x: Tensor, attention: Tensor, modulation: Sequence[Tensor]) -> Tensor:
            after = x + modulation[2] * self.proj(attention)
            if not left_out:
                shift, factor, gate = (modulation[i] for i in chunks)
                q, k, v = split_heads(self.qkv2(layers.modulated(after if late else x, shift, factor)), self.heads)
                after = after + gate * self.proj2(self.attention2(self.q_norm2(q), self.k_norm2(k), v))
            return after + modulation[5] * self.mlp(layers.modulated(after, modulation[3], modulation[4]))

        return update

    return make


QK_NORMS = {"q_norm": "k_norm", "k_norm": "q_norm"}


NORMS_OF_IMAGE = {f"text.{norm}": f"image.{norm}" for norm in QK_NORMS}


def values_normed(right: Wrong) -> Wrong:
    def attention_inputs(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = right(*args)
        return q, k, F.rms_norm(v, v.shape[-1:], eps=1e-6)

    return attention_inputs


def text_unseen(right: Wrong) -> Wrong:
    def forward(self: nn.Module, image: Tensor, text: Tensor, *rest: Any) -> Any:
        seen = torch.ones(1, 1, 1, text.shape[1] + image.shape[1], dtype=torch.bool, device=text.device)
        seen[..., : text.shape[1]] = False
        return right(self, image, text, *rest[:-1], seen)

    return forward


def text_unchanged(right: Wrong) -> Wrong:
    return lambda self, image, text, *rest: (right(self, image, text, *rest)[0], text)


def single(
    mlp_first: bool = False,
    mlp_first_out: bool = False,
    gate: bool = True,
    late_norm: bool = False,
    residual: bool = True,
) -> Callable[[Wrong], Wrong]:
    """Of Flux's single block: which rows of linear1 and columns of linear2 are the MLP's, what is normed, gated and added to."""

    def make(_: Wrong) -> Wrong:
        def forward(self: Any, x: Tensor, rope: Tensor, modulation: Tensor, seen: Tensor | None = None) -> Tensor:
            shift, factor, by = modulation.chunk(3, dim=-1)
            normed = layers.modulated(x, shift, factor)
            whole = self.linear1(normed)
            qkv, mlp = whole.split(self.sizes, dim=-1)
            if mlp_first:
                mlp, qkv = whole.split(self.sizes[::-1], dim=-1)
            q, k, v = layers.split_heads(qkv, self.heads)
            if late_norm:
                q, k = self.q_norm(flux.apply_rope(q, rope)), self.k_norm(flux.apply_rope(k, rope))
            else:
                q, k = flux.apply_rope(self.q_norm(q), rope), flux.apply_rope(self.k_norm(k), rope)
            parts = [self.attention(q, k, v, seen), self.mlp_act(mlp)][:: -1 if mlp_first_out else 1]
            return (x if residual else normed) + (by if gate else 1) * self.linear2(torch.cat(parts, dim=-1))

        return forward

    return make


def single_sequence(image_first: bool) -> Callable[[Wrong], Wrong]:
    """Of Flux: the image is before the text in the single blocks, or only is taken from there behind them."""

    def make(_: Wrong) -> Wrong:
        def step(self: Any, latents: Tensor, run: Any, i: int) -> Tensor:
            image, text = self.image_in(latents), run.text
            for block, (image_mod, text_mod) in zip(self.double_blocks, run.double, strict=True):
                image, text = block(image, text, run.rope, image_mod[:, i : i + 1], text_mod[:, i : i + 1], run.seen)
            joint = torch.cat([image, text] if image_first else [text, image], dim=1)
            for block, modulation in zip(self.single_blocks, run.single, strict=True):
                joint = block(joint, run.rope, modulation[:, i : i + 1], run.seen)
            return self.final(joint[:, : image.shape[1]], run.final[:, i : i + 1])

        return step

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


def table_of_float32(_: Wrong) -> Wrong:
    def rope_table(ids: Tensor, axes: Sequence[int], theta: float) -> Tensor:
        frequencies = [float(theta) ** -(torch.arange(0, width, 2, dtype=torch.float64) / width) for width in axes]
        angles = torch.cat([ids[:, i, None].float() * f.float() for i, f in enumerate(frequencies)], dim=-1)
        return torch.stack([angles.cos(), angles.sin()]).double()

    return rope_table


def frequencies_of_the_head(right: Wrong) -> Wrong:
    """Each axis has the first frequencies of a table that spans the whole head."""

    def rope_table(ids: Tensor, axes: Sequence[int], theta: float) -> Tensor:
        whole = [right(ids[:, [i]], [sum(axes)], theta)[..., : width // 2] for i, width in enumerate(axes)]
        return torch.cat(whole, dim=-1)

    return rope_table


def positions_of_image(change: Callable[[Tensor], Tensor]) -> Callable[[Wrong], Wrong]:
    """Of Flux's rotary table: `change(ids)` of the image's tokens."""

    def make(right: Wrong) -> Wrong:
        def rotations(self: Any, grid: Any, ids: Tensor | None, text: Tensor) -> Tensor:
            return right(self, None, change(flux.position_ids(grid) if ids is None else ids), text)

        return rotations

    return make


def spread(ids: Tensor) -> Tensor:
    """Over 0 to 63, whatever the size."""
    return torch.cat([ids[:, :1], ids[:, 1:] * 63 / ids[:, 1:].amax(0).clamp_min(1)], dim=1)


def text_counted(right: Wrong) -> Wrong:
    def rotations(self: Any, grid: Any, ids: Tensor | None, text: Tensor) -> Tensor:
        table: Tensor = right(self, grid, ids, text)
        places = torch.zeros(text.shape[1], len(self.config.rope_axes), dtype=torch.float64)
        places[:, 1] = torch.arange(text.shape[1])
        counted = flux.rope_table(places, self.config.rope_axes, self.config.theta).to(table)
        return torch.cat([counted, table[:, text.shape[1] :]], dim=1)

    return rotations


def pooled_left_out(right: Wrong) -> Wrong:
    """Of the conditioning vector: the pooled text, with the sizes in SDXL."""

    def vector(self: Any, pooled: Tensor, *rest: Any) -> Tensor:
        pooled_in = self.pooled_in if hasattr(self, "pooled_in") else self.vector_in
        return right(self, pooled, *rest) - pooled_in(pooled)[:, None]

    return vector


def guidance_left_out(_: Wrong) -> Wrong:
    def vector(self: Any, pooled: Tensor, times: Tensor, guidance: Tensor | None = None) -> Tensor:
        dtype = self.time_in.in_layer.weight.dtype
        sinusoids = layers.timestep_sinusoid(layers.prepare_times(times, pooled.shape[0])).to(dtype)
        return self.time_in(sinusoids) + self.pooled_in(pooled)[:, None]

    return vector


def guidance_divided(right: Wrong) -> Wrong:
    return lambda self, pooled, times, guidance=None: right(
        self, pooled, times, None if guidance is None else guidance / 1000
    )


def columns_first(_: Wrong) -> Wrong:
    def unpatchify(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        patches = tokens.unflatten(1, grid).unflatten(-1, (2, 2, -1))  # B h w column row C
        return patches.permute(0, 5, 1, 4, 2, 3).flatten(4).flatten(2, 3)

    return unpatchify


def cropped(cut: Callable[[Tensor, int, int], Tensor]) -> Callable[[Wrong], Wrong]:
    """Of the table of positions: `cut(square, h, w)`, `[1, S, S, D]` -> `[1, h, w, D]`."""

    def make(_: Wrong) -> Wrong:
        def crop(self: Any, grid: tuple[int, int]) -> Tensor:
            return cut(self.table.unflatten(1, (self.side, self.side)), *grid).flatten(1, 2)

        return crop

    return make


def cut_from(top: Callable[[int, int], int]) -> Callable[[Tensor, int, int], Tensor]:
    """A part of the table that begins at `top(side, size)` along both axes."""

    def cut(square: Tensor, h: int, w: int) -> Tensor:
        row, column = (top(square.shape[1], size) for size in (h, w))
        return square[:, row : row + h, column : column + w]

    return cut


def resized(square: Tensor, h: int, w: int) -> Tensor:
    return F.interpolate(square.movedim(-1, 1), size=(h, w), mode="bilinear").movedim(1, -1)


class ImageFirst:
    """torch, whose `cat` joins two in the other order: tokens of text and image, a stream and its skip."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def cat(self, tensors: Any, dim: int = 0) -> Tensor:
        tokens = dim in (1, 2) and len(tensors) == 2
        return torch.cat(list(tensors)[::-1] if tokens else tensors, dim=dim)
