"""UNet and autoencoder write over what nobody else sees, and over nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import tiny

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unet_step() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = tiny.unet()
    with torch.no_grad():
        run = model.prepare(numbers(2, 5, 16), numbers(2, tiny.UNET.vector_width), torch.tensor([500.0, 20.0]))
    x = numbers(2, 4, 8, 8)
    return model, lambda: model.step(x, run, 1)


def decoding() -> tuple[nn.Module, Callable[[], Tensor]]:
    model, x = tiny.autoencoder(), numbers(1, 16, 4, 3)
    return model, lambda: model.decode(x)


def encoding() -> tuple[nn.Module, Callable[[], Tensor]]:
    model, x = tiny.autoencoder(), numbers(1, 3, 32, 24)
    return model, lambda: model.encode(x)


WORKS = {"step": unet_step, "decode": decoding, "encode": encoding}
every_work = pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)


def seen(model: nn.Module, ask: Callable[[], Tensor], keep: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Every module's tensors of one call, inputs and output, as `keep` keeps them."""
    kept: list[Tensor] = []

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        kept.extend(keep(t) for t in (*inputs, output) if isinstance(t, Tensor))

    handles = [module.register_forward_hook(hook) for module in model.modules()]
    with torch.no_grad():
        kept.append(ask())
    for handle in handles:
        handle.remove()
    return kept


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@every_work
def test_what_a_hook_keeps_is_not_written_over(work: Any, layout: torch.memory_format) -> None:
    model, ask = work()
    model.to(memory_format=layout)
    kept, cloned = (seen(model, ask, keep) for keep in (lambda t: t, Tensor.clone))
    assert len(kept) > 50 and all(torch.equal(a, b) for a, b in zip(kept, cloned, strict=True))


@every_work
def test_a_hook_on_one_module_alone_keeps_its_tensor(work: Any) -> None:
    model, ask = work()
    one_of_each_kind = {path.split(".")[-1]: module for path, module in model.named_modules()}
    for name, module in one_of_each_kind.items():
        kept: list[tuple[Tensor, Tensor]] = []

        def keep(_: nn.Module, __: Any, made: Any, kept: Any = kept) -> None:
            kept.extend((t, t.clone()) for t in tree_leaves(made) if isinstance(t, Tensor))

        handle = module.register_forward_hook(keep)
        with torch.no_grad():
            ask()
        handle.remove()
        assert all(torch.equal(held, copy) for held, copy in kept), name


@every_work
def test_inputs_and_earlier_results_stay(work: Any) -> None:
    model, ask = work()
    with torch.no_grad():
        first = ask()
        before = first.clone()
        assert torch.equal(ask(), before) and torch.equal(first, before)


@every_work
def test_with_and_without_gradients_the_numbers_are_the_same(work: Any) -> None:
    _, ask = work()
    with torch.enable_grad():
        expected = ask()
    with torch.no_grad():
        assert torch.equal(ask(), expected)


@every_work
def test_without_hooks_less_memory_is_written_anew(work: Any) -> None:
    model, ask = work()
    plain = bytes_anew(ask)
    handles = [module.register_forward_hook(lambda *_: None) for module in model.modules()]
    assert bytes_anew(ask) > 1.2 * plain
    for handle in handles:
        handle.remove()


class Anew(TorchDispatchMode):
    """Counts the bytes of tensors that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operation(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        if isinstance(made, Tensor) and made.untyped_storage()._cdata not in given:
            self.bytes += made.nbytes
        return made


def bytes_anew(ask: Callable[[], Tensor]) -> int:
    with torch.no_grad(), Anew() as anew:
        ask()
    return anew.bytes
