"""A GPU for machines without one: tensors that say they are on `cuda:0`, compute on the CPU, and refuse what a GPU refuses.

Within `pretend_gpu()` torch behaves as if one CUDA device were there. A tensor on it is a wrapper around a CPU tensor. Python
reads the device `cuda:0`; torch's C++ reads `meta:0`, since every build has that device's dispatch keys and autograd queue.
Refused are:

- operations that mix a tensor on the GPU with one on the CPU, other than copies and 0-dim CPU tensors (as CUDA does);
- float64 on the GPU (CUDA would take it, slowly; MPS has none, and eridiff promises to make none);
- noise from the GPU, which would make an image depend on the device.

Copies between the two are counted: `gpu.to_device`, `gpu.to_host`, the latter being what makes a real GPU wait.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

CUDA, META, CPU = (
    torch.device("cuda", 0),
    torch.device("meta", 0),
    torch.device("cpu"),
)  # the meta device itself has no index
aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default)
BY_INDEX = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)  # which take indices on the CPU
RANDOM = ("rand", "normal", "uniform")  # dropout may
FACTORIES = {
    torch.zeros, torch.ones, torch.empty, torch.full, torch.tensor, torch.as_tensor, torch.arange, torch.linspace, torch.randn, torch.rand, torch.randint, torch.eye,
}  # fmt: skip


class OnGPU(Tensor):
    """A tensor on the pretended GPU; `inner` is the CPU tensor that holds its values."""

    inner: Tensor
    float64 = False  # whether it may be made, for code of others

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnGPU":
        if inner.dtype in (torch.float64, torch.complex128) and not OnGPU.float64:
            raise TypeError(f"{inner.dtype} was made on the GPU, of the shape {list(inner.shape)}")
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=META
        )  # fmt: skip
        made.inner = inner
        return made

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    @property
    def data(self) -> "OnGPU":  # type: ignore[override]
        return OnGPU(self.inner.detach())

    @data.setter
    def data(self, value: "OnGPU") -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner = value.inner

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGPU({self.inner!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnGPU":
        copied = OnGPU(self.inner.detach().clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied.detach(), self.requires_grad)  # type: ignore[assignment]
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _on_cpu(function, args, kwargs or {}, None)


def leaves(holder: Any) -> Iterator[Any]:
    """What a list, tuple or dictionary holds at any depth; torch's pytree knows more and took half of the tests' time."""
    for each in holder.values() if isinstance(holder, dict) else holder:
        if isinstance(each, (list, tuple, dict)):
            yield from leaves(each)
        else:
            yield each


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    kind = type(value)
    if kind is list or kind is tuple:
        return kind([_mapped(change, each) for each in value])
    return {key: _mapped(change, each) for key, each in value.items()} if kind is dict else change(value)


@cache
def returns_an_alias(function: Any) -> bool:
    return any(returned.alias_info is not None for returned in function._schema.returns)


@cache
def _of(function: Any) -> tuple[str, bool, bool, bool]:
    """An operation's name; whether it joins tensors, makes random numbers, writes to its first argument."""
    name = str(function)
    return name, "cat" in name or "stack" in name, any(word in name for word in RANDOM), function._schema.is_mutable


def _on_cpu(function: Any, args: Any, kwargs: dict[str, Any], gpu: "PretendedGPU | None") -> Any:
    """Run an operation on the CPU and put its result where the operation would have put it."""
    given = [t for t in leaves((args, kwargs)) if isinstance(t, Tensor)]
    on_gpu = [t for t in given if isinstance(t, OnGPU)]
    name, joined, random, writes = _of(function)
    if on_gpu and function not in COPIES:
        # indices may lie on the CPU, and numbers; not what is written to, and not what is joined
        where = [args[0], *args[2:]] if function in BY_INDEX else given
        mixed = [t for t in leaves(where) if isinstance(t, Tensor) and not isinstance(t, OnGPU) and t.device == CPU]
        written = [args[0]] if writes and isinstance(args[0], Tensor) else []
        other = next((t for t in mixed if t.ndim or joined or any(t is w for w in written)), None)
        if other is not None:
            raise RuntimeError(f"{name} mixes cuda:0 and a CPU tensor of the shape {list(other.shape)}")
    if function is aten._fused_sdp_choice.default:
        return 0  # plain products, which every device has
    wanted = kwargs.get("device")
    stays = bool(on_gpu) if wanted is None else torch.device(wanted) == META
    if stays and random:
        raise RuntimeError(f"{name} draws random numbers on the GPU")
    if gpu is not None and function in COPIES:
        source = args[1] if function is aten.copy_.default else args[0]
        target = isinstance(args[0], OnGPU) if function is aten.copy_.default else stays
        if isinstance(source, OnGPU) != target:
            gpu.to_device += target
            gpu.to_host += not target
    if gpu is not None and function is aten._local_scalar_dense.default and on_gpu:
        gpu.to_host += 1
    inner_args, inner_kwargs = _mapped(lambda t: t.inner if isinstance(t, OnGPU) else t, (args, kwargs))
    if stays and wanted is not None:
        inner_kwargs = {**inner_kwargs, "device": CPU}
    if inner_kwargs.get("pin_memory"):
        inner_kwargs = {**inner_kwargs, "pin_memory": False}
    out = function(*inner_args, **inner_kwargs)
    if not stays:
        return out
    out = _mapped(lambda t: OnGPU(t) if isinstance(t, Tensor) else t, out)
    return return_and_correct_aliasing(function, args, kwargs, out) if on_gpu and returns_an_alias(function) else out


class _Devices(TorchFunctionMode):
    """`cuda` in any call of torch becomes `meta` before C++ sees it, which on this build has no CUDA."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.device:
            return function(*args, **kwargs)
        if function in FACTORIES and kwargs.get("device") is None and torch.get_default_device().type == "cuda":
            kwargs["device"] = CUDA
        if function in (torch.as_tensor, torch.tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return function(*args, **kwargs, device=CPU).to(_as_meta(device))
        if function is Tensor.pin_memory:
            return args[0].clone()
        if function is Tensor.cuda:
            return args[0].to(META)
        if function is Tensor.new_tensor and isinstance(args[0], OnGPU):
            return torch.tensor(args[1], **{"dtype": args[0].dtype, **kwargs, "device": CPU}).to(META)
        if not kwargs and all(isinstance(each, Tensor) for each in args):
            return function(*args)
        args, kwargs = _mapped(_as_meta, (args, kwargs))
        return function(*args, **kwargs)


def _as_meta(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return META
    return META if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")) else value


class PretendedGPU(TorchDispatchMode):
    """Every operation of torch within the block, and how often data crossed between the CPU and the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.to_device = self.to_host = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _on_cpu(function, args, kwargs or {}, self)


@contextmanager
def pretend_gpu() -> Iterator[PretendedGPU]:
    """Within the block torch has a GPU, on which new models are loaded by default."""
    available, count = torch.cuda.is_available, torch.cuda.device_count
    _forget_devices()
    # so that parameters that are moved stay the same objects, as on a real GPU
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
    try:
        with _Devices(), PretendedGPU() as gpu:
            yield gpu
    finally:
        torch.cuda.is_available, torch.cuda.device_count = available, count
        torch.__future__.set_swap_module_params_on_conversion(False)
        _forget_devices()


def _forget_devices() -> None:
    """accelerate chooses a device once per process."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
