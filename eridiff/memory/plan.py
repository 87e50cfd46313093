"""What each stage of an image needs on the device, from headers alone: the modules run on the meta device.

Counted is every tensor that is alive at once, weights included, and what a convolution takes while it runs: copies of its
input and its output in another arrangement. cuDNN has both at once (within 1 % of what was measured on an H200,
`benchmarks/gpu.py`), oneDNN one after the other (`benchmarks/decode_memory.py`). Not counted: what the device's runtime
takes for itself (on CUDA some 0.5 GiB) and scratch of the attention kernels.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from eridiff.errors import ConfigError
from eridiff.memory.stages import asked_once, block_parts, held_bytes
from eridiff.memory.stream import ring_size
from eridiff.memory.strips import decode_in_strips
from eridiff.models.autoencoder import Autoencoder
from eridiff.models.flux import Flux
from eridiff.models.mmdit import MMDiT
from eridiff.models.unet import UNet
from eridiff.text.encoders import empty
from eridiff.weights.detect import Component

STAGES = {  # component -> stage, in order
    "clip": "CLIP", "clip_g": "CLIP-G", "t5": "T5", "flux": "denoising", "mmdit": "denoising", "unet": "denoising", "vae": "decoding",
}  # fmt: skip


class LiveBytes(TorchDispatchMode):
    """Within the block, `peak` is the largest sum of bytes of tensors that were made in it and alive at once.

    While a convolution runs, copies of its input and its output in another arrangement are alive too: both, or on a CPU
    the larger.
    """

    def __init__(self, cpu: bool = False) -> None:
        super().__init__()
        self.rearranged = max if cpu else int.__add__
        self.alive: dict[int, int] = {}
        self.sum, self.peak = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        result = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, lambda t: self._count(t, given), result)
        if function is torch.ops.aten.convolution.default:
            self._peak(self.rearranged(args[0].nbytes, result.nbytes))
        return result

    def _count(self, tensor: Tensor, given: set[int]) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.alive and key not in given:  # else a view of something counted, or of a weight
            self.alive[key] = storage.nbytes()
            self.sum += self.alive[key]
            weakref.finalize(storage, self._forget, key)
            self._peak()
        return tensor

    def _forget(self, key: int) -> None:
        self.sum -= self.alive.pop(key)

    def _peak(self, scratch: int = 0) -> None:
        self.peak = max(self.peak, self.sum + scratch)


class Fused(TorchFunctionMode):
    """Attention and RMS norm allocate their output only, as the fused kernels do; meta tensors would get all between."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return self.attention(*args, **(kwargs or {}))
        if function is F.rms_norm:
            return self.norm(args[0])
        return function(*args, **(kwargs or {}))

    def attention(self, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    def norm(self, x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)


def peak_bytes(work: Callable[[], object], cpu: bool = False) -> int:
    """The peak of the tensors that `work` makes on meta tensors, were it run on a GPU, or on a CPU."""
    with torch.no_grad(), LiveBytes(cpu) as live, Fused():
        result = work()
    del result
    return live.peak


@dataclass(frozen=True)
class Stage:
    """What a stage needs on the device, in bytes: its component's weights, and the tensors of its work at their peak."""

    name: str
    component: str
    weights: int
    work: int
    visiting: int = 0  # of the weights, those that `on_device` brings for a call alone, but for the largest
    by_layer: int = 0  # the same where it brings every layer so
    passing: int = 0  # and where blocks pass through a ring, but for the ring

    def peak(self, offload: str | None) -> int:
        """With this stage's component on the device, whole (None), for its stage ("stages"), by "stream" or by "layers"."""
        absent = {"stages": self.visiting, "stream": self.passing, "layers": self.by_layer}
        return self.weights + self.work - absent.get(offload or "", 0)

    @property
    def total(self) -> int:
        """With `offload="stages"`."""
        return self.peak("stages")


def stages(
    components: Mapping[str, Component],
    width: int,
    height: int,
    *,
    steps: int = 28,
    text_length: int = 512,
    images: int = 1,
    guided: bool = False,
    dtype: torch.dtype | Mapping[str, torch.dtype] = torch.bfloat16,
    vae_rows: int | None = None,
) -> list[Stage]:
    """The stages of an image in order, from headers alone.

    - components: as `locate` finds them: any of flux, mmdit or unet, vae, clip, clip_g, t5.
    - width, height: of the image, in pixels.
    - steps: of the run, whose modulation is kept.
    - text_length: T5's tokens.
    - images: in one batch.
    - guided: whether negative prompts are encoded, and are in one batch with the others.
    - dtype: of all components, or by component.
    - vae_rows: the image is decoded in strips of so many rows.

    Raises ConfigError for sizes that are not multiples of 16.
    """
    if width % 16 or height % 16 or min(width, height) < 16:
        raise ConfigError(f"the size must be multiples of 16, not {width} x {height}")
    found = []
    for network, stage in STAGES.items():
        if network in components:
            own = dtype[network] if isinstance(dtype, Mapping) else dtype
            module = empty(components[network]).to(own)
            weights = sum(t.nbytes for t in [*module.parameters(), *module.buffers()])
            linears = [m for m in module.modules() if isinstance(m, nn.Linear)] if network != "vae" else []
            visiting, by_layer = (_but_the_largest(layers) for layers in (asked_once(module), linears))
            blocks = [held_bytes(parts) for parts in block_parts(module).values()] if network != "vae" else []
            passing = visiting + sum(blocks) - ring_size(blocks)
            rows = images if network == "vae" or not guided else 2 * images
            work = peak_bytes(partial(_run, module, width, height, steps, text_length, rows, own, vae_rows))
            found.append(Stage(stage, network, weights, work, visiting, by_layer, passing))
    return found


def _but_the_largest(layers: Sequence[nn.Module]) -> int:
    """Bytes of all layers' parameters but one's."""
    sizes = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
    return sum(sizes) - max(sizes, default=0)


def _run(
    module: Any, width: int, height: int, steps: int, text_length: int, batch: int, dtype: torch.dtype, vae_rows: int | None
) -> object:  # fmt: skip
    """The work of a stage once, on meta tensors."""
    with torch.device("meta"):
        if isinstance(module, Flux):
            c, grid = module.config, (height // 16, width // 16)
            guidance = torch.empty(batch) if c.guidance else None
            text, pooled = torch.empty(batch, text_length, c.text_width), torch.empty(batch, c.pooled_width)
            latents = torch.empty(batch, grid[0] * grid[1], c.in_channels, dtype=dtype)
            run = module.prepare(text.to(dtype), pooled.to(dtype), torch.empty(steps), grid, guidance)
            return module.step(latents, run, 0)
        if isinstance(module, MMDiT):
            m = module.config
            text, pooled = torch.empty(batch, 77 + text_length, m.text_width), torch.empty(batch, m.pooled_width)
            latents = torch.empty(batch, m.in_channels, height // 8, width // 8, dtype=dtype)
            grid = (height // 16, width // 16)
            return module.step(latents, module.prepare(text.to(dtype), pooled.to(dtype), torch.empty(steps), grid), 0)
        if isinstance(module, UNet):
            u = module.config
            text, vector = torch.empty(batch, 77, u.text_width), torch.empty(batch, u.vector_width)
            latents = torch.empty(batch, u.in_channels, height // 8, width // 8, dtype=dtype)
            return module.step(latents, module.prepare(text.to(dtype), vector.to(dtype), torch.empty(steps)), 0)
        if isinstance(module, Autoencoder):
            latents = torch.empty(batch, module.config.latent_channels, height // 8, width // 8, dtype=dtype)
            return decode_in_strips(module, latents, vae_rows) if vae_rows else module.decode(latents)
        length = getattr(module.config, "max_position_embeddings", None) or text_length
        return module(input_ids=torch.zeros(batch, length, dtype=torch.int64)).last_hidden_state
