"""What each stage of an image needs on the device, from headers alone: the modules run on the meta device.

Counted is every tensor that is alive at once, weights included, and what a convolution takes while it runs: copies of its
input and its output in another arrangement. cuDNN has both at once (within 1 % of what was measured on an H200,
`benchmarks/gpu.py`), oneDNN one after the other, and the weights; on a CPU also the kernels that oneDNN makes and what
attention copies (`benchmarks/plan_memory.py`). Not counted: what the device's runtime takes for itself (on CUDA some 0.5
GiB) and scratch of a GPU's attention kernels.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from eridiff.errors import ConfigError
from eridiff.memory.encoders import ClipSizes, T5Sizes, sizes_of_encoder
from eridiff.memory.stages import asked_once, block_parts, held_bytes
from eridiff.memory.stream import ring_size
from eridiff.memory.strips import decode_in_strips
from eridiff.models.autoencoder import Autoencoder
from eridiff.models.flux import Flux
from eridiff.models.layers import far_apart
from eridiff.models.mmdit import MMDiT
from eridiff.models.unet import UNet
from eridiff.weights.detect import Component
from eridiff.weights.load import NETWORKS, empty_network, mapped_bytes

STAGES = {  # component -> stage, in order
    "clip": "CLIP", "clip_g": "CLIP-G", "t5": "T5", "flux": "denoising", "mmdit": "denoising", "unet": "denoising", "vae": "decoding",
}  # fmt: skip


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


class LiveBytes(Fused):
    """Within the block, `peak` is the largest sum of bytes of tensors that were made in it and alive at once.

    While a convolution runs, copies of its input and its output in another arrangement are alive too: both, or on a CPU
    the larger and the weights; of channels-last tensors none. An RMS norm, which a CPU has no kernel for, takes its squares there,
    and attention of two-byte numbers copies its keys and values.
    """

    def __init__(self, cpu: bool = False) -> None:
        super().__init__()
        self.cpu = cpu
        self.alive: dict[int, int] = {}
        self.sum, self.peak = 0, 0
        self.small, self.heap = 0, 0  # of blocks below HEAP_BLOCK, alive and at most
        self.large = 0  # of the others, at most
        self.shapes: set[tuple[str, int, torch.Size, torch.Size]] = set()  # on a CPU, of convolutions and linear layers

    @property
    def code(self) -> int:
        """Bytes of the kernels that oneDNN makes for these shapes, and keeps."""
        return sum(KERNELS.get(shape[:2], 0) for shape in self.shapes)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = _without_computing(function, args, kwargs)
        if result is None:
            result = super().__torch_function__(function, types, args, kwargs)
        found = [t for t in (result if isinstance(result, tuple | list) else [result]) if isinstance(t, Tensor)]
        if found:
            given = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
            for tensor in found:
                self._count(tensor, given)
            self._peak(self._scratch(function, args, result))
            if self.cpu and function in (F.conv2d, F.linear):
                self.shapes.add((function.__name__, result.itemsize, result.shape, args[1].shape))
        return result

    def _scratch(self, function: Any, args: Any, result: Any) -> list[int]:
        """Blocks that a function takes for itself while it runs."""
        if function is F.conv2d and not _channels_last(args[0]):
            x, made = args[0].nbytes, result.nbytes
            if not self.cpu:
                return [x, made]
            return [*max([x], [made] * CONV_COPIES[result.itemsize], key=sum), args[1].nbytes]
        if self.cpu and function is F.rms_norm:
            return [result.nbytes] * NORM_SCRATCH[result.itemsize]
        if self.cpu and function is F.scaled_dot_product_attention:
            if result.itemsize == 2:  # keys and values in the arrangement of its products
                return [args[1].nbytes, args[2].nbytes]
            return [args[2].nbytes] if far_apart(args[2]) else []
        return []

    def norm(self, x: Tensor) -> Tensor:
        return _contiguous(x)  # which torch does not compute in Python

    def _count(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.alive and key not in given:  # else a view of something counted, or of a weight
            self.alive[key] = storage.nbytes()
            self.sum += self.alive[key]
            self.small += self.alive[key] if self.alive[key] < HEAP_BLOCK else 0
            weakref.finalize(storage, self._forget, key)
            self._peak()

    def _forget(self, key: int) -> None:
        size = self.alive.pop(key)
        self.sum -= size
        self.small -= size if size < HEAP_BLOCK else 0

    def _peak(self, scratch: Sequence[int] = ()) -> None:
        """With blocks that are taken for this moment alone."""
        self.peak = max(self.peak, self.sum + sum(scratch))
        small = sum(size for size in scratch if size < HEAP_BLOCK)
        self.heap = max(self.heap, self.small + small)
        self.large = max(self.large, self.sum - self.small + sum(scratch) - small)


def _without_computing(function: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """The result of a function of `SHAPES`, or None: also for tensors with numbers, such as tables that a network keeps."""
    name = getattr(function, "__name__", "")
    made = SHAPES.get(name.removesuffix("_"))
    if made is None or not any(
        t.is_meta for t in (args[0] if name in ("cat", "stack") else args) if isinstance(t, Tensor)
    ):
        return None
    if kwargs.get("out") is not None:
        return kwargs["out"]
    return args[0] if name.endswith("_") or kwargs.get("inplace") else made(*args, **kwargs)


def _elementwise(*args: Any, **_: object) -> Tensor:
    """A tensor of the shape and dtype that the arguments give together, arranged as the first of that shape is."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    shape = [max(sizes) for sizes in zip_longest(*(t.shape[::-1] for t in tensors), fillvalue=1)][::-1]
    dtype = reduce(torch.promote_types, [t.dtype for t in tensors if t.dim()] or [tensors[0].dtype])
    like = next((t for t in tensors if [*t.shape] == shape), None)
    return tensors[0].new_empty(shape, dtype=dtype) if like is None else _like(like, dtype)


def _same(x: Tensor, *_: object, **__: object) -> Tensor:
    return _like(x, x.dtype)


def _contiguous(x: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty(x.shape)


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor with its dimensions in the order that those of `x` have in memory."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    made = x.new_empty([x.shape[i] for i in order], dtype=dtype)
    return made.permute(sorted(range(x.dim()), key=order.__getitem__))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _conv2d(x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, *_: object) -> Tensor:
    pairs = [n if isinstance(n, tuple) else (n, n) for n in (stride, padding)]
    sizes = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(x.shape[2:], weight.shape[2:], *pairs, strict=True)]
    return _image(x, weight.shape[0], sizes)


def _interpolate(x: Tensor, *, scale_factor: float, **_: object) -> Tensor:
    return _image(x, x.shape[1], [int(size * scale_factor) for size in x.shape[2:]])


def _image(x: Tensor, channels: int, sizes: Sequence[int]) -> Tensor:
    """Channels-last where `x` is."""
    if _channels_last(x):
        return x.new_empty(len(x), *sizes, channels).movedim(-1, 1)
    return x.new_empty(len(x), channels, *sizes)


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return tensors[0].new_empty(shape, dtype=reduce(torch.promote_types, [t.dtype for t in tensors]))


def _stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    shape.insert(dim if dim >= 0 else dim + len(shape) + 1, len(tensors))
    return tensors[0].new_empty(shape)


def _var_mean(x: Tensor, dim: Sequence[int], **_: object) -> tuple[Tensor, Tensor]:
    shape = [size for i, size in enumerate(x.shape) if i not in dim]
    return x.new_empty(shape), x.new_empty(shape)


def _sum(x: Tensor, dim: int | None = None) -> Tensor:
    return x.new_empty([size for i, size in enumerate(x.shape) if dim is not None and i != dim % x.dim()])


# What torch computes on meta tensors in Python, a millisecond each and a second for the first of all, by the name of the function.
SHAPES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("add", "sub", "rsub", "mul", "div", "addcmul"), _elementwise),
    **dict.fromkeys(("silu", "gelu", "sigmoid", "tanh", "square", "pow", "rsqrt", "cos", "sin"), _same),
    **dict.fromkeys(("layer_norm", "group_norm"), _contiguous),
    "linear": _linear, "conv2d": _conv2d, "interpolate": _interpolate, "cat": _cat, "stack": _stack, "sum": _sum, "var_mean": _var_mean,
}  # fmt: skip
HEAP_BLOCK = 32 * 2**20  # glibc's malloc maps larger blocks apart and returns them; of smaller ones it keeps the memory
# bytes of an element -> of the output, what a CPU takes for its RMS norm meanwhile: measured
NORM_SCRATCH = {8: 0, 4: 0, 2: 5}
# and how many copies of the output its convolution has in other arrangements at once, if the input's is not larger
CONV_COPIES = {8: 1, 4: 1, 2: 2}
# oneDNN compiles a kernel for each shape, and the process keeps it: bytes, measured (torch 2.13, AMX); MKL's take none
KERNELS = {("conv2d", 4): 80_000, ("conv2d", 2): 200_000, ("linear", 2): 500_000}


def peak_bytes(work: Callable[[], object], cpu: bool = False) -> int:
    """The peak of the tensors that `work` makes on meta tensors, were it run on a GPU, or on a CPU."""
    return _watched(work, cpu).peak


def _watched(work: Callable[[], object], cpu: bool) -> LiveBytes:
    with torch.no_grad(), LiveBytes(cpu) as live:
        result = work()
    del result
    return live


@dataclass(frozen=True)
class Stage:
    """What a stage needs on the device, in bytes: its component's weights, and the tensors of its work at their peak."""

    name: str
    component: str
    dtype: torch.dtype
    weights: int
    work: int
    visiting: int = 0  # of the weights, those that `on_device` brings for a call alone, but for the largest
    by_layer: int = 0  # the same where it brings every layer so
    passing: int = 0  # and where blocks pass through a ring, but for the ring
    mapped: int = 0  # on a CPU, of the weights those in the mapped file, of which the system keeps what it has room for
    heap: int = 0  # of the work, the peak of blocks below HEAP_BLOCK, which a CPU's malloc keeps
    large: int = 0  # the peak of the others
    code: int = 0  # on a CPU, kernels that are made for the shapes of this stage and kept

    @property
    def held(self) -> int:
        """Weights in memory of the program's own, or of the device."""
        return self.weights - self.mapped

    def peak(self, offload: str | None) -> int:
        """With this stage's component on the device, whole (None), for its stage ("stages"), by "stream" or by "layers"."""
        absent = {"stages": self.visiting, "stream": self.passing, "layers": self.by_layer}
        return self.held + self.work - absent.get(offload or "", 0)

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
    cpu: bool = False,
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
    - cpu: images are computed on a CPU, where weights of the file's dtype stay in the mapped file.

    Raises ConfigError for sizes that are not multiples of 16.
    """
    if width % 16 or height % 16 or min(width, height) < 16:
        raise ConfigError(f"the size must be multiples of 16, not {width} x {height}")
    found = []
    for network, stage in STAGES.items():
        if network in components:
            own = dtype[network] if isinstance(dtype, Mapping) else dtype
            component = components[network]
            networks = network in NETWORKS
            module = (empty_network(component) if networks else sizes_of_encoder(network, component.config)).to(own)
            weights = sum(t.nbytes for t in [*module.parameters(), *module.buffers()])
            linears = [m for m in module.modules() if isinstance(m, nn.Linear)] if network != "vae" else []
            visiting, by_layer = (_but_the_largest(layers) for layers in (asked_once(module), linears))
            blocks = [held_bytes(parts) for parts in block_parts(module).values()] if network != "vae" else []
            passing = visiting + sum(blocks) - ring_size(blocks)
            rows = images if network == "vae" or not guided else 2 * images
            live = _watched(partial(_run, module, width, height, steps, text_length, rows, own, vae_rows), cpu)
            mapped = min(mapped_bytes(component, own), weights) if cpu else 0
            absent = (visiting, by_layer, passing)
            counted = (mapped, live.heap, live.large, live.code)
            found.append(Stage(stage, network, own, weights, live.peak, *absent, *counted))
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
        assert isinstance(module, ClipSizes | T5Sizes)
        return module(batch, text_length)
