"""Laws of the networks: prepare and step are forward, gradients flow, patchify has an inverse, checkpointing is exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import eridiff
from eridiff.blocks import checkpoint_blocks
from eridiff.errors import ConfigError
from eridiff.models.autoencoder import AutoencoderConfig
from eridiff.models.flux import FluxConfig, patchify, position_ids, unpatchify
from eridiff.trace.record import first_difference, record
from tests import tiny


def inputs(batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return tuple(torch.randn(shape, generator=g).to(dtype) for shape in ((batch, 6, 64), (batch, 5, 12), (batch, 8)))  # type: ignore[return-value]


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


def test_reference_tokens_stand_at_their_own_positions() -> None:
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
        (lambda: FluxConfig.preset("pro"), "'pro' is no preset of Flux; there are dev"),
        (lambda: AutoencoderConfig.preset("x"), "'x' is no preset of the autoencoder"),
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
