"""Laws of the networks: prepare and step are forward, gradients flow, patchify has an inverse, checkpointing is exact."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import eridiff
from eridiff.blocks import checkpoint_blocks
from eridiff.errors import ConfigError
from eridiff.models import mmdit
from eridiff.models.autoencoder import AutoencoderConfig
from eridiff.models.flux import FluxConfig, patchify, position_ids, unpatchify
from eridiff.trace.record import first_difference, record, relative_l2
from tests import tiny


def inputs(batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return tuple(torch.randn(shape, generator=g).to(dtype) for shape in ((batch, 6, 64), (batch, 5, 12), (batch, 8)))  # type: ignore[return-value]


CPU = torch.device("cpu"), torch.float32
GUIDANCE = torch.tensor([3.5, 2.0], dtype=torch.float64)


def test_a_run_of_steps_equals_single_forward_calls() -> None:
    model = tiny.flux().double()
    x, text, pooled = inputs()
    times = torch.tensor([1.0, 0.6, 0.2], dtype=torch.float64)
    run = model.prepare(text, pooled, times, (2, 3), GUIDANCE)
    for i, time in enumerate(times):
        alone = model(x, text, pooled, time.expand(1, 2), (2, 3), GUIDANCE)
        assert torch.allclose(model.step(x, run, i), alone, rtol=1e-12, atol=1e-12)


def test_rows_have_their_own_times() -> None:
    model = tiny.flux().double()
    x, text, pooled = inputs()
    both = model(x, text, pooled, torch.tensor([[0.9, 0.1]], dtype=torch.float64), (2, 3), GUIDANCE)
    for row, time in enumerate((0.9, 0.1)):
        one = slice(row, row + 1)
        alone = model(
            x[one], text[one], pooled[one], torch.tensor([[time]], dtype=torch.float64), (2, 3), GUIDANCE[one]
        )
        assert torch.allclose(both[one], alone, rtol=1e-12, atol=1e-12)


def test_reference_tokens_are_at_their_own_positions() -> None:
    model = tiny.flux().double()
    x, text, pooled = inputs()
    ids = torch.cat([position_ids((1, 3)), position_ids((1, 3), index=1)])
    times = torch.tensor([[0.5]], dtype=torch.float64)
    found = model(x, text, pooled, times, guidance=GUIDANCE, ids=ids)
    order = torch.tensor([3, 4, 5, 0, 1, 2])
    swapped = model(x[:, order], text, pooled, times, guidance=GUIDANCE, ids=ids[order])
    assert torch.allclose(found[:, order], swapped)
    assert not torch.allclose(found, model(x, text, pooled, times, (2, 3), GUIDANCE))


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_unpatchify_is_the_inverse_of_patchify(batch: int, h: int, w: int, channels: int) -> None:
    x = torch.arange(batch * channels * 4 * h * w).reshape(batch, channels, 2 * h, 2 * w)
    tokens = patchify(x)
    assert tokens.shape == (batch, h * w, 4 * channels)
    assert torch.equal(unpatchify(tokens, (h, w)), x)
    assert torch.equal(tokens[0, 0, :4].reshape(2, 2), x[0, 0, :2, :2])


def test_gradients_reach_every_parameter_and_input() -> None:
    model = tiny.flux().double().requires_grad_(True)
    x, text, pooled = (t.requires_grad_(True) for t in inputs())
    model(x, text, pooled, torch.tensor([[0.5]], dtype=torch.float64), (2, 3), GUIDANCE).square().sum().backward()
    for name, tensor in [*model.named_parameters(), ("x", x), ("text", text), ("pooled", pooled)]:
        assert tensor.grad is not None and bool(tensor.grad.abs().sum() > 0), name


def test_autoencoder_gradients_reach_every_parameter_but_the_deviation() -> None:
    model = tiny.autoencoder().double().requires_grad_(True)
    model(torch.randn(1, 3, 16, 16, dtype=torch.float64)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)] in (
        [],
        ["encoder.middle.attention.k.bias"],
    )


@pytest.mark.parametrize("kind", ["flux", "autoencoder"])
def test_checkpointed_blocks_give_the_same_outputs_and_gradients(kind: str) -> None:
    model = (tiny.flux() if kind == "flux" else tiny.autoencoder()).double().requires_grad_(True)
    x, text, pooled = inputs()
    times = torch.tensor([[0.5]], dtype=torch.float64)
    picture = torch.randn(1, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        out = model(x, text, pooled, times, (2, 3), GUIDANCE) if kind == "flux" else model(picture)
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    plain = gradients()
    calls: list[str] = []
    block = model.single_blocks[0] if kind == "flux" else model.decoder.up[0]
    handle = (block.linear1 if kind == "flux" else block.block[0].conv1).register_forward_hook(
        lambda *_: calls.append("ran")
    )
    with checkpoint_blocks(model):
        checkpointed = gradients()
    handle.remove()
    assert calls == ["ran", "ran"]  # forward, and again in the backward pass
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    assert "forward" not in vars(block) and all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


def test_a_model_without_blocks_cannot_be_checkpointed() -> None:
    with pytest.raises(ConfigError, match="no repeated blocks"), checkpoint_blocks(nn.Linear(2, 2)):
        pass


def test_the_first_module_that_differs_is_named() -> None:
    model = tiny.flux().double()
    x, text, pooled = inputs()
    times = torch.tensor([[0.5]], dtype=torch.float64)
    with torch.no_grad():
        with record(model) as expected:
            model(x, text, pooled, times, (2, 3), GUIDANCE)
        model.double_blocks[1].text.proj.bias[3] += 1e-3
        with record(model) as found:
            model(x, text, pooled, times, (2, 3), GUIDANCE)
    difference = first_difference(found, expected, 1e-9)
    assert difference is not None and difference.name == "double_blocks.1.text.proj"
    assert first_difference(expected, expected, 0.0) is None
    assert not model._forward_hooks


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: FluxConfig.preset("pro"), "'pro' is not a preset of Flux; there are dev"),
        (lambda: AutoencoderConfig.preset("x"), "'x' is not a preset of the autoencoder"),
        (lambda: FluxConfig(hidden=30, heads=4), "must be the sum of rope_axes"),
        (lambda: tiny.flux()(*inputs(dtype=torch.float32), torch.tensor([[0.5]]), (2, 3)), "guidance embedding: give guidance"),
        (lambda: tiny.flux().prepare(*inputs(dtype=torch.float32)[1:], torch.tensor([0.5]), guidance=GUIDANCE), "needs the grid"),
    ],
)  # fmt: skip
def test_wrong_configurations_are_refused(make: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()  # type: ignore[operator]


def test_importing_a_network_imports_no_text_encoder() -> None:
    import subprocess
    import sys

    code = "import sys, eridiff, eridiff.models.flux; eridiff.Flux; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'Fluks'"):
        eridiff.Fluks  # noqa: B018


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_noise_of_a_seed_is_torchs_own_stream(seed: int) -> None:
    from eridiff import FluxInference

    model = FluxInference(tiny.flux(), tiny.autoencoder(), device="cpu")
    expected = torch.randn(16, 4, 6, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(model.noise([seed], 48, 32)[0], expected)


# MMDiT ----------------------------------------------------------------------------------------------------------------


def mmdit_inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    shapes = ((batch, 16, 4, 6), (batch, 5, 20), (batch, 16))
    return tuple(torch.randn(shape, generator=g).double() for shape in shapes)  # type: ignore[return-value]


def test_an_mmdit_run_of_steps_equals_single_forward_calls() -> None:
    model = tiny.mmdit().double()
    x, text, pooled = mmdit_inputs()
    times = torch.tensor([1.0, 0.6, 0.2], dtype=torch.float64)
    run = model.prepare(text, pooled, times, (2, 3))
    for i, time in enumerate(times):
        alone = model(x, text, pooled, time.expand(1, 2))
        assert torch.allclose(model.step(x, run, i), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["flux", "mmdit"])
def test_rows_of_a_run_are_runs_of_rows(family: str) -> None:
    """Each row with its own time: what guidance selects is what a smaller batch would have prepared."""
    times = torch.tensor([[0.9, 0.1]], dtype=torch.float64)
    if family == "flux":
        model, (x, text, pooled) = tiny.flux().double(), inputs()
        run = model.prepare(text, pooled, times, (2, 3), GUIDANCE)
    else:
        model, (x, text, pooled) = tiny.mmdit().double(), mmdit_inputs()
        run = model.prepare(text, pooled, times, (2, 3))
    both = model.step(x, run, 0)
    for row in range(2):
        one = slice(row, row + 1)
        assert torch.allclose(model.step(x[one], run.rows(one), 0), both[one], rtol=1e-12, atol=1e-12)
        extra = (GUIDANCE[one],) if family == "flux" else ()
        again = model.prepare(text[one], pooled[one], times[:, one], (2, 3), *extra)
        assert torch.allclose(model.step(x[one], again, 0), both[one], rtol=1e-12, atol=1e-12)


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_mmdits_tokens_hold_row_column_then_channel(batch: int, h: int, w: int, channels: int) -> None:
    picture = torch.arange(batch * channels * 4 * h * w).reshape(batch, channels, 2 * h, 2 * w)
    tokens = torch.stack([
        picture[:, c, row::2, column::2].flatten(1) for row in (0, 1) for column in (0, 1) for c in range(channels)
    ], dim=-1)  # fmt: skip
    assert torch.equal(mmdit.unpatchify(tokens, (h, w)), picture)


def test_mmdit_gradients_reach_every_parameter_that_can_move_the_image() -> None:
    """The queries of the last block's text end nowhere: their rows and their norm have no gradient, all else has."""
    model = tiny.mmdit().double().requires_grad_(True)
    x, text, pooled = (t.requires_grad_(True) for t in mmdit_inputs())
    model(x, text, pooled, torch.tensor([[0.5]], dtype=torch.float64)).square().sum().backward()
    last = "joint_blocks.2.text."
    still = [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert still == [f"{last}q_norm.weight"]
    queries, keys_values = dict(model.named_parameters())[f"{last}qkv.weight"].grad.split([128, 256])
    assert not bool(queries.any()) and bool((keys_values != 0).any())
    assert all(bool(t.grad.abs().sum() > 0) for t in (x, text, pooled))


def test_skipped_blocks_are_passed_by_both_streams() -> None:
    model = tiny.mmdit().double()
    x, text, pooled = mmdit_inputs()
    times = torch.tensor([[0.5]], dtype=torch.float64)
    with record(model) as whole:
        model(x, text, pooled, times, skip_blocks=(1,))
    assert not any(name.startswith("joint_blocks.1.") and "modulation" not in name for name in whole)
    assert torch.equal(whole["joint_blocks.2:0"], whole["joint_blocks.0.0"])
    assert torch.equal(whole["joint_blocks.2:1"], whole["joint_blocks.0.1"])


@given(st.integers(1, 9), st.integers(1, 9))
def test_an_image_takes_the_middle_of_the_table(h: int, w: int) -> None:
    table = mmdit.PositionTable(9, 2)
    rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="ij")
    table.table = torch.stack([rows, columns], dim=-1).reshape(1, 81, 2)
    crop = table((h, w), *CPU).reshape(h, w, 2)
    top, left = (9 - h) // 2, (9 - w) // 2
    assert crop[0, 0].tolist() == [top, left] and crop[-1, -1].tolist() == [top + h - 1, left + w - 1]
    with pytest.raises(ConfigError, match="of 160 x 16 pixels is larger .* at most 144 a side"):
        table((1, 10), *CPU)


def test_the_table_of_positions_stays_where_it_is_while_the_network_moves() -> None:
    """Only its crops leave; it is saved and loaded with the rest all the same."""
    model = tiny.mmdit()
    table = model.positions.table
    assert "positions.table" not in dict([*model.named_parameters(), *model.named_buffers()])
    assert model.to(torch.bfloat16).to("meta").positions.table is table
    x, text, pooled = (t.to("meta", torch.bfloat16) for t in mmdit_inputs())
    run = model.prepare(text, pooled, torch.empty(3, device="meta"), (2, 3))
    assert run.positions.shape == (1, 6, 128) and (run.positions.device.type, run.positions.dtype) == (
        "meta",
        torch.bfloat16,
    )
    assert model.step(x, run, 1).shape == x.shape

    source, target = tiny.mmdit(), mmdit.MMDiT(tiny.MMDIT)
    assert target.load_state_dict(source.state_dict()).missing_keys == []
    assert torch.equal(target.positions.table, source.positions.table)
    state = source.state_dict() | {"positions.table": torch.zeros(1, 4, 128)}
    with pytest.raises(RuntimeError, match=r"positions.table has the shape \[1, 4, 128\]"):
        target.load_state_dict(state)
    del state["positions.table"]
    with pytest.raises(RuntimeError, match="Missing key.*positions.table"):
        target.load_state_dict(state)


def test_checkpointed_mmdit_blocks_give_the_same_gradients() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = tiny.mmdit().double().requires_grad_(True)
        x, text, pooled = mmdit_inputs()
        times = torch.tensor([[0.5, 0.7]], dtype=torch.float64)
        with checkpoint_blocks(model) if checkpointed else nullcontext():
            model(x, text, pooled, times).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


# UNet -----------------------------------------------------------------------------------------------------------------


def unet_inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    shapes = ((batch, 4, 8, 4), (batch, 5, 16), (batch, tiny.UNET.vector_width))
    return tuple(torch.randn(shape, generator=g).double() for shape in shapes)  # type: ignore[return-value]


def test_a_unet_run_of_steps_equals_single_forward_calls_and_rows_are_runs() -> None:
    model = tiny.unet().double()
    x, text, vector = unet_inputs()
    times = torch.tensor([[999.0, 500.0], [61.375, 1.0]], dtype=torch.float64)
    run = model.prepare(text, vector, times)
    for i, pair in enumerate(times):
        both = model.step(x, run, i)
        assert torch.allclose(both, model(x, text, vector, pair[None]), rtol=1e-11, atol=1e-11)
        for row in range(2):
            one = slice(row, row + 1)
            assert torch.allclose(model.step(x[one], run.rows(one), i), both[one], rtol=1e-11, atol=1e-11)


def test_unet_gradients_reach_every_parameter_and_input() -> None:
    model = tiny.unet().double().requires_grad_(True)
    x, text, vector = (t.requires_grad_(True) for t in unet_inputs())
    model(x, text, vector, torch.tensor([[500.0]], dtype=torch.float64)).square().sum().backward()
    for name, tensor in [*model.named_parameters(), ("x", x), ("text", text), ("vector", vector)]:
        assert tensor.grad is not None and bool(tensor.grad.abs().sum() > 0), name


def test_checkpointed_unet_blocks_give_the_same_gradients() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = tiny.unet().double().requires_grad_(True)
        x, text, vector = unet_inputs()
        with checkpoint_blocks(model) if checkpointed else nullcontext():
            model(x, text, vector, torch.tensor([[500.0, 20.0]], dtype=torch.float64)).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert all(torch.allclose(gradients[0][n], gradients[1][n], rtol=1e-9, atol=1e-12) for n in gradients[0])


@pytest.mark.parametrize("network", ["flux", "mmdit"])
def test_hidden_text_tokens_are_as_if_they_were_not_there(network: str) -> None:
    """A row of the batch with two tokens less, whatever those hold; all of them seen is not a mask."""
    model = (tiny.flux if network == "flux" else tiny.mmdit)().double()
    c, g = model.config, torch.Generator().manual_seed(1)
    text, pooled = (torch.randn(2, *shape, generator=g).double() for shape in ((5, c.text_width), (c.pooled_width,)))
    times = torch.tensor([[0.7, 0.2]]).double()
    if network == "flux":
        x, rest = torch.randn(2, 6, c.in_channels, generator=g).double(), ((2, 3), torch.tensor([3.5, 2.0]).double())
    else:
        x, rest = torch.randn(2, c.in_channels, 4, 6, generator=g).double(), ()
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    found = model(x, text, pooled, times, *rest, mask=mask)
    assert relative_l2(found[:1], model(x, text, pooled, times, *rest)[:1]) < 1e-12
    row, fewer = slice(1, 2), text[1:, mask[1]]
    alone = [r[row] if isinstance(r, torch.Tensor) else r for r in rest]
    assert relative_l2(found[row], model(x[row], fewer, pooled[row], times[:, row], *alone)) < 1e-12
    assert relative_l2(found[row], model(x, text, pooled, times, *rest)[row]) > 1e-3
