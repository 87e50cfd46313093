"""The parts that several networks share.

Letters: B batch, L tokens, H heads, D features of one head, T steps of a run.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks as GLOBAL_HOOKS
from torch.nn.modules.module import _global_forward_pre_hooks as GLOBAL_PRE_HOOKS

from eridiff.errors import ConfigError


def check_shape(name: str, tensor: Tensor, hint: str = "", /, **sizes: int | None) -> None:
    """Raises ConfigError unless `tensor` has the dimensions `sizes`, in this order; None is any size."""
    pairs = zip(tensor.shape, sizes.values(), strict=False)
    if tensor.ndim != len(sizes) or any(size is not None and found != size for found, size in pairs):
        needed = ", ".join(letter if size is None else f"{letter}={size}" for letter, size in sizes.items())
        raise ConfigError(f"{name} has the shape {list(tensor.shape)}, not [{needed}]{hint}")


def forward_times(latents: Tensor, text: Tensor, times: Tensor) -> Tensor:
    """The times of `forward` as `prepare` takes them: `[B]`, `[1, B]` -> `[1, B]`; one for all rows, `[]`, `[1]` -> `[1, 1]`.

    Raises ConfigError for any other shape, and unless text has as many rows as latents.
    """
    rows = latents.shape[0]
    row = times[0] if times.ndim == 2 and times.shape[0] == 1 else times
    if text.shape[0] != rows or row.ndim > 1 or (row.numel() != 1 and row.numel() != rows):
        raise ConfigError(
            f"latents {list(latents.shape)}, text {list(text.shape)} and times {list(times.shape)} do not fit: "
            "text [B, L, D] must have as many rows as latents, and times [B] one number for each row"
        )
    return times.reshape(1, -1)


def prepare_times(times: Tensor, rows: int) -> Tensor:
    """The times of `prepare`, `[T]` or `[T, B]` -> `[1, T]` or `[B, T]`; raises ConfigError for any other shape."""
    if times.ndim == 1:
        return times[None]
    if times.ndim != 2 or times.shape[1] not in (1, rows):
        raise ConfigError(f"times has the shape {list(times.shape)}; prepare takes [T], or [T, {rows}] for {rows} rows")
    return times.T


def over_rows(x: Tensor, rows: int) -> Tensor:
    """`[1, ...]` of all rows stays; of a layer that was asked for each of r rows alone, `[r, ...]` becomes `[rows, ...]`.

    A LoRA may weigh the r images, and positive and negative rows of them are in one batch.
    """
    return x if x.shape[0] in (1, rows) else x.repeat(rows // x.shape[0], *[1] * (x.ndim - 1))


class Last:
    """Keeps what was made last, for tables that every step of a training run asks for again; nothing in compiled code."""

    def __init__(self) -> None:
        self.asked: Any = None
        self.made: Any = None

    def __call__(self, asked: Any, make: Callable[[], Any]) -> Any:
        """What `make()` gives, made anew when something else is asked for; `asked` must say all that it depends on."""
        if torch.compiler.is_compiling():  # which would compile anew for each state of this object
            return make()
        if asked != self.asked:
            with torch.inference_mode(False):  # whose tensors a training step could not save for its backward pass
                self.asked, self.made = asked, make()
        return self.made


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where `dtype` is float64: the precision of what the originals force to float32."""
    return torch.promote_types(dtype, torch.float32)


LAST_FREQUENCIES: dict[int, Last] = {}


def frequencies(values: Tensor, count: int) -> Tensor:
    """`10000 ** -(i / count)` for i below `count`, where the values are; those asked for last are kept.

    Made on the CPU, as in the originals: the last bit of a GPU's exponential is another one, and arguments of thousands
    make 3e-5 of it.
    """
    dtype = wide(values.dtype)

    def make() -> Tensor:
        numbers = torch.arange(count, dtype=dtype, device="cpu")
        return torch.exp(-math.log(10000) * numbers / count).to(values.device)  # in the originals' order of rounding

    if torch.compiler.is_compiling():
        return make()
    return LAST_FREQUENCIES.setdefault(count, Last())((values.device, dtype, type(values)), make)


def sinusoid(values: Tensor, width: int = 256) -> Tensor:
    """Sinusoidal embedding of any numbers `[...]` -> `[..., width]`: cosines first, then sines (Vaswani et al. 2017).

    float32, or float64 for float64 values: arguments reach 30,000 (1000 times a guidance of 30), where float32 moves the
    network's output by up to 3e-4 relative.
    """
    angles = values.to(wide(values.dtype))[..., None] * frequencies(values, width // 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def timestep_sinusoid(times: Tensor, width: int = 256) -> Tensor:
    """Embedding of times in [0, 1] (or of any scalar on the same scale, guidance too): the sinusoid of 1000 times them.

    As `timestep_embedding` of the Flux original.
    """
    return sinusoid(1000.0 * times, width)


Hook = TypeVar("Hook", bound=Callable[..., Any])


def keeps_nothing(hook: Hook) -> Hook:
    """Mark a hook of a module as one that keeps no tensor, for `spare`."""
    hook.keeps_nothing = True  # type: ignore[attr-defined]
    return hook


def spare(*modules: nn.Module) -> bool:
    """Whether what these modules are given and give may be written over: nobody else sees it.

    Not where a gradient may be asked for, not in compiled code, which plans its memory by itself, and not if anything that is
    unknown here acts on a module: a hook may keep a tensor, and an adapter's own layer may be given one that it has kept.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or GLOBAL_HOOKS or GLOBAL_PRE_HOOKS:
        return False
    for module in modules:
        kind = type(module)
        if not (kind in MAKERS or kind.__module__.startswith("eridiff.")) or "forward" in vars(module):
            return False
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            if hooks and not all(hasattr(hook, "keeps_nothing") for hook in hooks.values()):
                return False
    return True


# torch's modules that give a tensor of their own; nn.Identity, nn.Dropout, nn.Flatten and others may give what they are given
MAKERS = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)


def activated(x: Tensor, norm: nn.Module) -> Tensor:
    """SiLU of a norm."""
    h = norm(x)
    return F.silu(h, inplace=type(h) is Tensor and spare(norm))


def added(x: Tensor, h: Tensor, *makers: nn.Module) -> Tensor:
    """`x + h`, in the memory of h, which `makers` have given, if it is spare and the sum would lie in it the same way.

    x is as large as h, or has one number for each row and channel.
    """
    alike = (x.shape == h.shape and x.stride() == h.stride()) or x.shape == (*h.shape[:2], 1, 1)
    return h.add_(x) if alike and type(h) is Tensor and x.dtype == h.dtype and spare(*makers) else x + h


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps)` times a learned weight over the last dimension, computed in float32 (float64 stays)."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)  # of one dtype it is one kernel on a GPU
        plain = type(x) is Tensor and x.dtype in (torch.float32, torch.float64)
        if plain and x.is_cpu and spare():  # the same numbers in fewer passes over memory
            inverse = x.square().mean(-1, keepdim=True).add_(self.eps).rsqrt_()
            return torch.mul(x, inverse, out=x.new_empty(x.shape)).mul_(weight)
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)


FAR = 4 * 2**20  # bytes, more than a core's cache: the values of one row of the batch and what lies between them


def far_apart(v: Tensor) -> bool:
    """Whether a CPU's attention reads values `[B, H, L, D]` from among so much else that a copy of them is faster."""
    return v.dtype in (torch.float32, torch.float64) and v.shape[2] * v.stride(2) * v.element_size() > FAR


class Attention(nn.Module):
    """Softmax attention without parameters; a module, so that a recording shows what goes in and out of it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
        """`[B, H, L, D]` each -> `[B, L, H * D]`, scores scaled by `D ** -0.5`; `seen` `[B, 1, 1, L]`, None is all keys."""
        if v.is_cpu and far_apart(v) and spare():
            v = v.contiguous()
        return F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2)


def seen_keys(mask: Tensor | None, image_tokens: int, device: torch.device) -> Tensor | None:
    """Which text tokens are attended to, `[B, L]` bool, with all image tokens behind them -> `[B, 1, 1, L + N]`."""
    return None if mask is None else F.pad(mask.to(device), (0, image_tokens), value=True)[:, None, None]


LAST_ONES: dict[int, Last] = {}


def with_factors(modulation: Tensor, width: int) -> Tensor:
    """`[..., n * width]`, shift, scale and perhaps gate once or more -> the same with 1 + scale in place of each scale."""
    size = modulation.shape[-1]

    def make() -> Tensor:
        scales = torch.arange(size // width, device="cpu") % 3 == 1
        return scales.repeat_interleave(width).to(modulation.device, modulation.dtype)

    asked = (width, modulation.device, modulation.dtype, type(modulation))
    return modulation + (make() if torch.compiler.is_compiling() else LAST_ONES.setdefault(size, Last())(asked, make))


def modulated(x: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
    """Layer norm without affine (eps 1e-6), then `factor * x + shift`: `[B, L, D]` and `[B, 1, D]`; factor is 1 + scale."""
    if factor.shape[0] == 1:  # one modulation for all rows is the norm's own affine part, in one kernel
        return F.layer_norm(x, x.shape[-1:], factor.flatten(), shift.flatten(), eps=1e-6)
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    over = spare() and normed.dtype == shift.dtype == factor.dtype
    return torch.addcmul(shift, normed, factor, out=normed if over else None)


def gated(x: Tensor, gate: Tensor, y: Tensor, over: bool) -> Tensor:
    """`x + gate * y`: `[B, L, D]`, gate `[B, 1, D]`; with `over`, of `spare`, in y's memory."""
    over = over and type(y) is Tensor and x.shape == y.shape and x.dtype == y.dtype == gate.dtype
    return torch.addcmul(x, gate, y, out=y if over else None)


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, L, 3 * H * D]`, all of q, then k, then v -> three `[B, H, L, D]`."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


def normed(q: Tensor, k: Tensor, q_norm: nn.Module, k_norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Both `[B, H, L, D]` through their norms."""
    if q.device.type != "cpu" and isinstance(q_norm, RMSNorm):
        q, k = torch.stack([q, k])  # one copy: a GPU's norm takes what lies side by side, and would copy each
    return q_norm(q), k_norm(k)


class VectorMLP(nn.Module):
    """Linear, SiLU, Linear: how time, guidance and the pooled prompt enter."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(width, hidden)
        self.out_layer = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class GELU(nn.Module):
    """GELU in its tanh form."""

    def forward(self, x: Tensor, over: bool = False) -> Tensor:
        """With `over`, of `spare`, in x's memory."""
        return torch.ops.aten.gelu_(x, approximate="tanh") if over else F.gelu(x, approximate="tanh")


class MLP(nn.Sequential):
    """Linear, GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        first, act, second = self
        return second(act(first(x), spare(first, act)))


class StreamInput(nn.Module):
    """What one stream of tokens (image or text) brings to a joint attention: queries, keys and values."""

    def __init__(self, hidden: int, heads: int, qk_norm: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.q_norm = RMSNorm(hidden // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(hidden // heads) if qk_norm else nn.Identity()

    def attention_inputs(self, x: Tensor, shift: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, L, hidden]` -> q, k, v `[B, H, L, D]`."""
        q, k, v = split_heads(self.qkv(modulated(x, shift, factor)), self.heads)
        return *normed(q, k, self.q_norm, self.k_norm), v


class Stream(StreamInput):
    """One stream of a double block (Esser et al. 2024): its own weights and modulation around the joint attention.

    `chunks` vectors of modulation: shift, 1 + scale and gate of the attention, then of the MLP.
    """

    def __init__(self, hidden: int, heads: int, mlp: int, qk_norm: bool = True, chunks: int = 6) -> None:
        super().__init__(hidden, heads, qk_norm)
        self.modulation = nn.Linear(hidden, chunks * hidden)
        self.proj = nn.Linear(hidden, hidden)
        self.mlp = MLP(hidden, mlp)

    def modulate(self, vec: Tensor) -> Tensor:
        """SiLU of the conditioning vector `[B, T, hidden]` -> `[B, T, chunks * hidden]`."""
        return with_factors(self.modulation(vec), vec.shape[-1])

    def update(self, x: Tensor, attention: Tensor, modulation: Sequence[Tensor]) -> Tensor:
        """The stream `[B, L, hidden]` after its part of the joint attention `[B, L, hidden]` and its MLP."""
        _, _, gate1, shift2, factor2, gate2 = modulation
        # contiguous: a part of the tokens of several rows is not, and would be a product for each row
        x = gated(x, gate1, self.proj(attention.contiguous()), spare(self.proj))
        return gated(x, gate2, self.mlp(modulated(x, shift2, factor2)), spare(self.mlp, self.mlp[2]))


class FinalLayer(nn.Module):
    """Modulated norm and a projection to the output of each patch."""

    def __init__(self, hidden: int, out_channels: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(hidden, 2 * hidden)
        self.linear = nn.Linear(hidden, out_channels)

    def modulate(self, vec: Tensor) -> Tensor:
        """SiLU of the conditioning vector `[B, T, hidden]` -> shift, 1 + scale `[B, T, 2 * hidden]`."""
        # diffusers stores scale, shift: the key maps swap them
        return with_factors(self.modulation(vec), vec.shape[-1])

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        return self.linear(modulated(x, *modulation.chunk(2, dim=-1)))
