"""What `forward` and `prepare` of each family take: one time per row, and one sentence for a wrong shape."""

from typing import Any

import pytest
import torch
from torch import Tensor

from eridiff.errors import ConfigError
from eridiff.models.flux import position_ids
from eridiff.trace.record import relative_l2
from eridiff.training.objective import Levels, discrete_levels, flow_levels
from tests.families import FAMILIES, inference, inputs, packed, rows

SHARES = torch.tensor([0.9, 0.1, 0.5, 0.3], dtype=torch.float64)


def levels(family: str, shares: Tensor = SHARES) -> Levels:
    return discrete_levels(999 * shares) if family == "unet" else flow_levels(shares)


def call(family: str, dtype: torch.dtype = torch.float64) -> tuple[Any, list[Any]]:
    """A tiny network and the arguments of `forward` for four rows: latents, text, pooled or vector, times `[1, 4]`, ..."""
    model = inference(family)
    x = packed(family, rows(4, model.latent_channels, 4, 4, seed=5, dtype=dtype))
    return model.network.to(dtype), [x, *inputs(model, levels(family), dtype)]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_is_evaluated_at_its_own_time(family: str) -> None:
    network, (x, text, pooled, times, *rest) = call(family)
    both = network(x, text, pooled, times[0], *rest)
    for row in range(4):
        one = slice(row, row + 1)
        alone = [r[one] if isinstance(r, Tensor) else r for r in rest]
        assert relative_l2(both[one], network(x[one], text[one], pooled[one], times[0, one], *alone)) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_times_is_the_same_bit_for_bit(family: str) -> None:
    network, (x, text, pooled, times, *rest) = call(family)
    assert torch.equal(network(x, text, pooled, times[0], *rest), network(x, text, pooled, times, *rest))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_single_time_holds_for_all_rows(family: str, shape: tuple[int, ...]) -> None:
    network, (x, text, pooled, times, *rest) = call(family)
    each = network(x, text, pooled, times[0, 2].expand(4), *rest)
    assert relative_l2(network(x, text, pooled, times[0, 2].reshape(shape), *rest), each) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(2,), (3,), (5,), (4, 1), (2, 4), (1, 3), (1, 1, 4), (1, 4, 1), (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_of_another_shape_are_refused(family: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    network, (x, text, pooled, _, *rest) = call(family, dtype)
    with pytest.raises(ConfigError) as error:
        network(x, text, pooled, torch.full(shape, 0.5, dtype=dtype), *rest)
    assert f"times {list(shape)}" in str(error.value) and f"latents {list(x.shape)}" in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_prepare_takes_the_points_of_a_run(family: str) -> None:
    """`[T]` and `[T, 1]` are shared by the rows, `[T, B]` are the rows' own; nothing else is."""
    network, (x, text, pooled, times, *rest) = call(family)
    rest = [(2, 2)] if family == "mmdit" else rest
    both = torch.cat([times, times.flip(1)])
    last = rest[:1] if family == "mmdit" else rest
    run = network.prepare(text, pooled, both, *last)
    forward_rest = [] if family == "mmdit" else rest
    for i in range(2):
        assert relative_l2(network.step(x, run, i), network(x, text, pooled, both[i], *forward_rest)) < 1e-12
    shared = network.prepare(text, pooled, times[0, :2], *last)
    column = network.prepare(text, pooled, times[0, :2, None], *last)
    assert torch.equal(network.step(x, shared, 1), network.step(x, column, 1))
    for wrong in (times[0, 0], both[:, :3], both[None]):
        with pytest.raises(ConfigError, match=r"prepare takes \[T\], or \[T, 4\]"):
            network.prepare(text, pooled, wrong, *last)


WRONG = [  # family, which argument, its replacement, what the sentence says
    ("flux", 0, lambda x: torch.zeros(4, 16, 4, 4), r"latents has the shape \[4, 16, 4, 4\], not \[B=4, N=4, in_channels=64\].*patchify"),
    ("flux", 0, lambda x: x[:, :3], r"latents has the shape \[4, 3, 64\], not \[B=4, N=4, in_channels=64\].*grid"),
    ("flux", 0, lambda x: x[..., :16], r"latents has the shape \[4, 4, 16\]"),
    ("flux", 0, lambda x: x[0], r"latents has the shape \[4, 64\], not \[B=4, N=4, in_channels=64\]"),
    ("flux", 5, lambda g: g[:3], r"guidance has the shape \[3\], not \[B=4\]"),
    ("flux", 5, lambda g: g[:, None], r"guidance has the shape \[4, 1\], not \[B=4\]"),
    ("flux", 5, lambda g: g[0], r"guidance has the shape \[\], not \[B=4\]"),
    ("mmdit", 0, lambda x: torch.zeros(4, 4, 64), r"latents has the shape \[4, 4, 64\], not \[B, in_channels=16, height, width\]"),
    ("mmdit", 0, lambda x: x[:, :4], r"latents has the shape \[4, 4, 4, 4\], not \[B, in_channels=16, height, width\]"),
    ("unet", 0, lambda x: x[0], r"latents has the shape \[4, 4, 4\], not \[B, in_channels=4, height, width\]"),
    ("unet", 0, lambda x: x.repeat(1, 4, 1, 1), r"latents has the shape \[4, 16, 4, 4\], not \[B, in_channels=4, height, width\]"),
    *((family, 1, lambda t: t[0], r"text \[5, \d+\].*as many rows") for family in FAMILIES),
    *((family, 1, lambda t: t[:2], r"text \[2, 5, \d+\].*as many rows") for family in FAMILIES),
    *((family, 1, lambda t: t[:, 0], r"text has the shape \[4, (\d+)\], not \[B, L, text_width=\1\]") for family in FAMILIES),
    *((family, 1, lambda t: t[..., 1:], r"text has the shape \[4, 5, \d+\], not \[B, L, text_width=\d+\]") for family in FAMILIES),
    *((family, 2, lambda p: p[0], r"(pooled|vector) has the shape \[\d+\], not \[B=4, (pooled|vector)_width=\d+\]") for family in FAMILIES),
    *((family, 2, lambda p: p[:, None], r"has the shape \[4, 1, \d+\], not \[B=4, ") for family in FAMILIES),
    *((family, 2, lambda p: p[:, 1:], r"has the shape \[4, \d+\], not \[B=4, ") for family in FAMILIES),
    *((family, 2, lambda p: p[:1], r"has the shape \[1, \d+\], not \[B=4, ") for family in FAMILIES),
]  # fmt: skip


@pytest.mark.parametrize(("family", "place", "replaced", "says"), WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wrong_rank_or_width_is_one_sentence(
    family: str, place: int, replaced: Any, says: str, dtype: torch.dtype
) -> None:
    network, arguments = call(family, dtype)
    arguments[place] = replaced(arguments[place])
    with pytest.raises(ConfigError, match=says):
        network(*arguments)


def test_positions_and_a_mask_of_another_shape_are_refused() -> None:
    network, (x, text, pooled, times, grid, guidance) = call("flux")
    with pytest.raises(ConfigError, match=r"ids has the shape \[2, 2, 3\], not \[N, axes=3\]"):
        network(x, text, pooled, times, None, guidance, ids=position_ids(grid).reshape(2, 2, 3))
    with pytest.raises(ConfigError, match=r"latents has the shape \[4, 4, 64\], not \[B=4, N=2, "):
        network(x, text, pooled, times, None, guidance, ids=position_ids((1, 2)))
    for family in ("flux", "mmdit"):
        network, arguments = call(family)
        with pytest.raises(ConfigError, match=r"mask has the shape \[4, 4\], not \[B=4, L=5\]"):
            network(*arguments, mask=torch.ones(4, 4, dtype=torch.bool))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_forward_compiles_once_for_batches_of_any_size(family: str) -> None:
    network, arguments = call(family)
    graphs = 0

    def counted(module: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return module.forward

    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend=counted)
    for count in (4, 3, 2):
        few = [a[:, :count] if i == 3 else a[:count] if isinstance(a, Tensor) else a for i, a in enumerate(arguments)]
        few[3] = few[3][0]
        for tensor in few:
            if isinstance(tensor, Tensor):
                torch._dynamo.mark_dynamic(tensor, 0)
        assert relative_l2(compiled(*few), network(*few)) < 1e-12
    assert graphs == 1
