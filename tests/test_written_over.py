"""Inference without gradients writes over memory that nobody else sees; everybody else sees what they saw before."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eridiff import inject_lora
from eridiff.models import layers
from eridiff.models.layers import Attention, RMSNorm, activated, added, far_apart, keeps_nothing, spare, split_heads
from tests import tiny
from tests.families import rows

NETWORKS = ("flux", "mmdit", "mmdit of SD 3", "unet")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def network_and_inputs(name: str, dtype: torch.dtype, count: int = 2) -> tuple[nn.Module, tuple[Any, ...], Tensor]:
    """A network, what `prepare` takes for three times, and latents."""
    family = name.partition(" ")[0]
    network: Any = {"flux": tiny.flux, "mmdit": tiny.mmdit, "unet": tiny.unet}[family]()
    if name.endswith("SD 3"):
        network = tiny.mmdit(replace(network.config, qk_norm=False, dual_blocks=()))
    config = network.to(dtype).config
    text = rows(count, 5, config.text_width, seed=1, dtype=dtype)
    pooled = rows(count, config.vector_width if family == "unet" else config.pooled_width, seed=2, dtype=dtype)
    times = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64) * (999 if family == "unet" else 1)
    if family == "flux":
        latents = rows(count, 12, config.in_channels, seed=3, dtype=dtype)
        return network, (text, pooled, times, (3, 4), torch.full((count,), 3.5, dtype=dtype)), latents
    latents = rows(count, config.in_channels, 8, 8, seed=3, dtype=dtype)
    return network, (text, pooled, times, *([(4, 4)] if family == "mmdit" else [])), latents


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_a_step_without_gradients_is_the_step_with_them(name: str, dtype: torch.dtype, count: int) -> None:
    network, inputs, latents = network_and_inputs(name, dtype, count)
    with_gradients = network.step(latents, network.prepare(*inputs), 1).detach()
    with torch.no_grad():
        run = network.prepare(*inputs)
        first, again = (network.step(latents, run, 1) for _ in range(2))
    assert torch.equal(first, again)  # neither the run nor the latents were written over
    torch.testing.assert_close(
        first, with_gradients, rtol=0, atol=float(32 * torch.finfo(dtype).eps * first.abs().max())
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_of_heads_is_torchs_own_bit_for_bit(dtype: torch.dtype) -> None:
    norm = RMSNorm(32)
    norm.weight = nn.Parameter(rows(32, seed=1, dtype=torch.float32) + 1)
    for q in (split_heads(rows(2, 50, 3 * 4 * 32, seed=2, dtype=dtype), 4)[0], rows(7, 32, seed=3, dtype=dtype)):
        expected, before = F.rms_norm(q, (32,), norm.weight.to(dtype), 1e-6), q.clone()
        assert torch.equal(norm(q), expected)
        with torch.no_grad():
            found = norm(q)
        assert torch.equal(found, expected) and found.is_contiguous() and torch.equal(q, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_to_values_that_lie_far_apart_is_the_same_bit_for_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv = split_heads(rows(2, 50, 3 * 4 * 32, seed=2, dtype=dtype), 4)
    with torch.no_grad():
        first = Attention()(*qkv)
        assert not far_apart(qkv[2])  # 77 KB in float32
        monkeypatch.setattr(layers, "FAR", 50_000)
        assert far_apart(qkv[2]) == (dtype != torch.bfloat16)
        assert torch.equal(Attention()(*qkv), first)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_a_hook_keeps_without_a_copy_stays_as_it_was(name: str) -> None:
    network, inputs, latents = network_and_inputs(name, torch.float32)
    kept: list[tuple[str, Tensor, Tensor]] = []

    def keep(path: str, value: Any) -> None:
        kept.extend((path, t, t.clone()) for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor))

    with torch.no_grad():
        plain = network.step(latents, network.prepare(*inputs), 0)
        for path, module in network.named_modules():
            module.register_forward_pre_hook(lambda _, given, path=path: keep(f"into {path}", given))
            module.register_forward_hook(lambda _, __, made, path=path: keep(f"out of {path}", made))
        seen = network.step(latents, network.prepare(*inputs), 0)
    assert not [path for path, held, copy in kept if not torch.equal(held, copy)]
    assert len(kept) > 100 and torch.equal(seen, plain)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_hook_on_one_module_alone_keeps_what_it_saw(name: str) -> None:
    network, inputs, latents = network_and_inputs(name, torch.float32)
    paths = {
        re.sub(r"\d+", "#", path): path  # one of each kind
        for path, module in network.named_modules() if type(module).forward is not nn.Module.forward
    }  # fmt: skip
    with torch.no_grad():
        run = network.prepare(*inputs)
        for path in paths.values():
            kept: list[tuple[Tensor, Tensor]] = []

            def keep(value: Any, kept: Any = kept) -> None:
                kept.extend((t, t.clone()) for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor))

            module = network.get_submodule(path)
            before = module.register_forward_pre_hook(lambda _, given, keep=keep: keep(given))
            after = module.register_forward_hook(lambda _, __, made, keep=keep: keep(made))
            network.step(latents, run, 0)
            before.remove()
            after.remove()
            assert all(torch.equal(held, copy) for held, copy in kept), path


@pytest.mark.parametrize("name", NETWORKS)
def test_an_adapters_layer_may_give_a_tensor_that_it_keeps(name: str) -> None:
    """As a layer that remembers its last output, behind a forward of its own or as another class."""
    network, inputs, latents = network_and_inputs(name, torch.float32)
    kept: list[tuple[str, Tensor, Tensor]] = []

    def remembering(path: str, layer: nn.Module) -> Any:
        inner = layer.forward

        def forward(x: Tensor) -> Tensor:
            kept.append((path, made := inner(x), made.clone()))
            return made

        return forward

    for path, module in network.named_modules():
        if isinstance(module, nn.Linear):
            module.forward = remembering(path, module)  # type: ignore[method-assign]
    with torch.no_grad():
        network.step(latents, network.prepare(*inputs), 0)
    assert kept and not [path for path, held, copy in kept if not torch.equal(held, copy)]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("count", [1, 2])
def test_a_lora_counts_the_same_without_gradients(name: str, count: int) -> None:
    network, inputs, latents = network_and_inputs(name, torch.float64, count)
    lora = inject_lora(network.requires_grad_(False), 2, targets="*", dtype=torch.float64)
    with torch.no_grad():
        for seed, parameter in enumerate(lora.parameters()):
            parameter.copy_(0.3 * rows(*parameter.shape, seed=seed))
    found = {}
    for scale in (1.0, [0.0, 0.5][:count]):
        lora.set_scale(scale)
        with torch.no_grad():
            found[str(scale)] = network.step(latents, network.prepare(*inputs), 0)
        with_gradients = network.step(latents, network.prepare(*inputs), 0).detach()
        torch.testing.assert_close(found[str(scale)], with_gradients, rtol=1e-12, atol=1e-12)
    first, second = found.values()
    assert not torch.allclose(first, second)


@torch.no_grad()
@pytest.mark.parametrize(
    "module",
    [nn.Identity(), nn.Dropout(0.5).eval(), nn.Dropout(0.0), nn.Flatten(2), nn.Unflatten(1, (4,)), nn.Sequential()],
    ids=str,
)
def test_a_module_that_gives_what_it_is_given_leaves_it_as_it_was(module: nn.Module) -> None:
    x = rows(2, 4, 6, seed=1)
    before = x.clone()
    h = module(x)
    assert h.data_ptr() == x.data_ptr()
    activated(x, module)
    added(rows(*h.shape, seed=2), h, module)
    assert torch.equal(x, before)


class Other(nn.Linear):
    """A layer of another package."""


def test_memory_is_spare_only_without_gradients_and_with_nobody_looking() -> None:
    layer, replaced = nn.Linear(2, 2), nn.Linear(2, 2)
    assert not spare(layer)
    with torch.no_grad():
        assert spare() and spare(layer) and not spare(Other(2, 2)) and not spare(layer, Other(2, 2))
        replaced.forward = lambda y: y  # type: ignore[method-assign]
        assert not spare(replaced)

        def hook(*_: object) -> None: ...

        for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
            handle = register(hook)
            assert not spare(layer)
            handle.remove()
            handle = register(keeps_nothing(lambda *_: None))
            assert spare(layer)
            handle.remove()
        everywhere = nn.modules.module
        for register in (everywhere.register_module_forward_hook, everywhere.register_module_forward_pre_hook):
            handle = register(hook)
            assert not spare(layer)
            handle.remove()
        assert spare(layer)
