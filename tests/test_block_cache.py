"""The first-block cache: exact at threshold 0, otherwise what is computed by hand, with a memory for each rows of each image."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import eridiff
from eridiff.adopt import adopt
from eridiff.block_cache import BlockCache
from eridiff.blocks import compile_blocks
from eridiff.errors import ConfigError
from eridiff.images import save_png
from eridiff.inference.again import generate_again, read_settings
from eridiff.schedulers.guidance import SkipLayers
from eridiff.trace import record
from tests import families, tiny
from tests.loras import some_lora
from tests.test_adopt import flux_case

EVERY = 100.0  # a threshold that every change is below
POINTS = 6


def network_of(family: str) -> Any:
    """With three blocks or more, in float64."""
    network: nn.Module = tiny.flux() if family == "flux" else tiny.mmdit()
    return network.double()


def run_of(network: Any, rows: int, seed: int = 0) -> Any:
    """A run of `POINTS` evaluations for the tokens of a 4 x 4 image."""
    config = network.config
    text, pooled = (
        families.rows(rows, *shape, seed=seed + i)
        for i, shape in enumerate([(5, config.text_width), (config.pooled_width,)])
    )
    times = torch.linspace(1, 0.999, POINTS, dtype=torch.float64)  # close, so that the latents decide
    if hasattr(config, "rope_axes"):
        return network.prepare(text, pooled, times, (2, 2), torch.full((rows,), 3.5, dtype=torch.float64))
    return network.prepare(text, pooled, times, (2, 2))


def walk(family: str, rows: int, seed: int = 3) -> list[Tensor]:
    """Latents at the points of a run, some far from those before and some close."""
    x, found = families.rows(rows, 16, 4, 4, seed=seed), []
    for i, size in enumerate([0.0, 0.3, 0.001, 0.002, 0.5, 0.001]):
        x = x + size * families.rows(rows, 16, 4, 4, seed=seed + 10 + i)
        found.append(families.packed(family, x))
    return found


def blocks_by_hand(
    network: Any, x: Tensor, run: Any, i: int
) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """The image's tokens before and behind the first block and behind the last, and the output that follows from the last."""
    if hasattr(network, "joint_blocks"):
        patches = network.image_in(x)
        image, text, middle = patches.flatten(2).transpose(1, 2) + run.positions, run.text, []
        for block, mods in zip(network.joint_blocks, run.joint, strict=True):
            middle.append(image)
            image, text = block(image, text, *(m[:, i : i + 1] for m in mods), run.seen)

        def output(tokens: Tensor) -> Tensor:
            squares = network.final(tokens, run.final[:, i : i + 1]).reshape(len(x), 2, 2, 2, 2, -1)
            return squares.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, 4, 4)

        return middle[0], middle[1], image, output
    image, text, middle = network.image_in(x), run.text, []
    for block, mods in zip(network.double_blocks, run.double, strict=True):
        middle.append(image)
        image, text = block(image, text, run.rope, *(m[:, i : i + 1] for m in mods), run.seen)
    joint = torch.cat([text, image], dim=1)
    for block, mod in zip(network.single_blocks, run.single, strict=True):
        joint = block(joint, run.rope, mod[:, i : i + 1], run.seen)
    return middle[0], middle[1], joint[:, 5:], lambda tokens: network.final(tokens, run.final[:, i : i + 1])


def by_hand(network: Any, xs: list[Tensor], run: Any, threshold: float) -> tuple[list[Tensor], list[int], list[float]]:
    """The outputs of a cache, at which points it is used, and how far it is off at the others."""
    kept, outputs, reused, errors = None, [], [], []
    for i, x in enumerate(xs):
        before, first, last, output = blocks_by_hand(network, x, run, i)
        added, true = first - before, output(last)
        if kept is not None:
            changes = [float((a - b).abs().mean() / b.abs().mean()) for a, b in zip(added, kept[0], strict=True)]
            guess = output(first + kept[1])
            if max(changes) < threshold:
                outputs.append(guess)
                reused.append(i)
                continue
            errors.append(max(float((g - t).norm() / t.norm()) for g, t in zip(guess, true, strict=True)))
        kept = added, last - first
        outputs.append(true)
    return outputs, reused, errors


def cached(cache: BlockCache, network: Any, xs: list[Tensor], run: Any) -> list[Tensor]:
    return [cache(lambda i=i, x=x: network.step(x, run, i), run) for i, x in enumerate(xs)]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", ["flux", "mmdit"])
def test_outputs_decisions_and_errors_are_those_computed_by_hand(family: str, rows: int) -> None:
    network = network_of(family)
    run, xs = run_of(network, rows), walk(family, rows)
    outputs, reused, errors = by_hand(network, xs, run, 0.1)
    assert 1 <= len(reused) <= 4 and len(errors) >= 1, "the points do not try both ways"
    cache = BlockCache(network, 0.1)
    found = cached(cache, network, xs, run)
    for one, other in zip(found, outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert (cache.reuse.evaluations, cache.reuse.reused) == (POINTS, len(reused))
    assert cache.reuse.errors == pytest.approx(errors, rel=1e-9)
    assert [name for name in vars(network) if name.endswith("blocks")] == []  # the network is as it was


@pytest.mark.parametrize("family", ["flux", "mmdit"])
def test_a_row_reuses_what_its_own_blocks_gave(family: str) -> None:
    network = network_of(family)
    run, xs = run_of(network, 2), walk(family, 2)
    together = cached(BlockCache(network, EVERY), network, xs, run)
    for row in (0, 1):
        alone, _, _ = by_hand(network, [x[row : row + 1] for x in xs], run.rows([row]), EVERY)
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one[row : row + 1], other, rtol=1e-9, atol=1e-9)


def test_the_row_that_changed_most_decides() -> None:
    network = network_of("flux")
    run, xs = run_of(network, 2), walk("flux", 2)
    xs[1][0] = xs[0][0]  # one row stays as it was
    rows = []
    for i in (0, 1):
        before, first, _, _ = blocks_by_hand(network, xs[i], run, 0)
        rows.append(first - before)
    still, moved = ((b - a).abs().mean() / a.abs().mean() for a, b in zip(*rows, strict=True))
    assert still == 0 < moved
    for threshold, reused in ((0.9 * float(moved), 0), (1.1 * float(moved), 1)):
        cache = BlockCache(network, threshold)
        for x in xs[:2]:
            cache(lambda x=x: network.step(x, run, 0), run)
        assert cache.reuse.reused == reused


@pytest.mark.parametrize("family", ["flux", "mmdit"])
def test_runs_in_turns_have_a_memory_each(family: str) -> None:
    """As the positive and the negative prompts of a guidance in two calls."""
    network = network_of(family)
    runs, xs = [run_of(network, 1, seed) for seed in (0, 7)], walk(family, 1)
    alone = [cached(BlockCache(network, 0.1), network, xs, run) for run in runs]
    cache = BlockCache(network, 0.1)
    for i, x in enumerate(xs):
        for run, expected in zip(runs, alone, strict=True):
            assert torch.equal(cache(lambda i=i, x=x, run=run: network.step(x, run, i), run), expected[i])


def test_skipped_blocks_have_a_memory_of_their_own() -> None:
    network = network_of("mmdit")
    run, xs = run_of(network, 1), walk("mmdit", 1)

    def step(x: Tensor, i: int, skipped: list[int]) -> Callable[[], Tensor]:
        return lambda: network.step(x, run, i, skipped)

    for skipped in ([0], [1], [2]):
        alone, cache = BlockCache(network, EVERY), BlockCache(network, EVERY)
        for i, x in enumerate(xs):
            cache(step(x, i, []), run)
            expected, found = (one(step(x, i, skipped), run, skipped) for one in (alone, cache))
            assert torch.equal(found, expected)
            assert i > 0 or torch.equal(found, step(x, i, skipped)())
        assert (alone.reuse.reused, cache.reuse.reused) == (POINTS - 1, 2 * (POINTS - 1))
    nothing = step(xs[0], 0, [0, 1, 2])
    assert torch.equal(BlockCache(network, EVERY)(nothing, run, [0, 1, 2]), nothing())


def test_blocks_that_were_left_out_are_not_called() -> None:
    network = network_of("flux")
    run, xs, called = run_of(network, 1), walk("flux", 1), []
    cache = BlockCache(network, EVERY)
    for place, block in enumerate([*network.double_blocks, *network.single_blocks]):
        block.register_forward_pre_hook(lambda *_, place=place: called.append(place))
    cached(cache, network, xs[:3], run)
    assert called == [0, 1, 2, 3, 0, 0]


def test_an_error_inside_leaves_the_network_as_it_was() -> None:
    network = network_of("flux")
    run, xs = run_of(network, 1), walk("flux", 1)
    with pytest.raises(RuntimeError):
        BlockCache(network, EVERY)(lambda: network.step(xs[0][..., :3], run, 0), run)
    assert isinstance(network.double_blocks, nn.ModuleList)


# images ---------------------------------------------------------------------------------------------------------------

PICTURE = Image.effect_noise((32, 32), 60).convert("RGB")
MASK = Image.new("L", (32, 32), 0)
MASK.paste(255, (0, 0, 16, 32))
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux": ("flux", {}),
    "flux with guidance": ("flux", {"cfg_scale": 2.0}),
    "flux from an image": ("flux", {"image": PICTURE, "strength": 0.5}),
    "a batch": ("flux", {"seed": [1, 2, 3]}),
    "negative first": ("mmdit", {"cfg_batch": "negative_first"}),
    "two calls": ("mmdit", {"cfg_batch": "apart", "cfg_interval": (0.2, 0.8)}),
    "skipped blocks": ("mmdit", {"cfg_scale": 1.0, "skip_layers": SkipLayers((1,), 2.5, 0.01, 0.7)}),
    "two evaluations per step": ("mmdit", {"sampler": "heun"}),
    "a mask": ("mmdit", {"image": PICTURE, "mask": MASK}),
}


def images(model: Any, **asked: Any) -> Any:
    prompt = eridiff.Prompt(families.conditioning(model), families.conditioning(model, seed=5))
    given = {"steps": 5, "seed": 1, "width": 32, "height": 32, **asked}
    return model.generate(conditioning=prompt, keep=("latents", "run"), **given)


@pytest.mark.parametrize("way", WAYS)
def test_threshold_0_is_exact_and_a_large_one_computes_the_first_evaluation_of_each_rows(way: str) -> None:
    family, asked = WAYS[way]
    model = families.inference(family)
    exact, zero, most = (images(model, **asked, block_cache=value) for value in (None, 0.0, EVERY))
    assert exact.run.reuse is None and torch.equal(zero.latents, exact.latents)
    memories = {"skipped blocks": 2, "two calls": 2}.get(way, 1)
    for found, reused in ((zero, 0), (most, most.run.reuse.evaluations - memories)):
        assert found.run.reuse.reused == reused
        assert len(found.run.reuse.errors) == found.run.reuse.evaluations - memories - reused
    assert not torch.equal(most.latents, exact.latents)


@pytest.mark.parametrize("family", ["flux", "mmdit"])
def test_the_next_image_remembers_nothing(family: str) -> None:
    model = families.inference(family)
    first = images(model, block_cache=EVERY)
    images(model, seed=9, block_cache=EVERY)
    again = images(model, block_cache=EVERY)
    assert torch.equal(first.latents, again.latents) and again.run.reuse.reused == again.run.reuse.evaluations - 1


def test_a_cached_step_is_the_unguided_one_by_hand() -> None:
    """From the request to the latents: Euler's steps with the outputs that are computed by hand."""
    model = families.inference("mmdit")
    found = images(model, cfg_scale=1.0, sampler="euler", block_cache=EVERY, noise=families.rows(1, 16, 4, 4).float())
    points = model.schedule(5, 32, 32)
    told = families.conditioning(model)
    run = model.network.prepare(told.text, told.pooled, points.times.float(), (2, 2))
    x, kept = families.rows(1, 16, 4, 4).float(), None
    with torch.no_grad():
        for i in range(5):
            _, first, last, output = blocks_by_hand(model.network, x, run, i)
            kept = last - first if kept is None else kept
            x = x + float(points.sigmas[i + 1] - points.sigmas[i]) * output(first + kept)
    torch.testing.assert_close(found.latents, x, rtol=1e-4, atol=1e-4)


def test_a_lora_acts_in_the_blocks_that_are_computed() -> None:
    model = families.inference("flux")
    plain = images(model, block_cache=EVERY)
    with model.apply_lora(some_lora(model.network)):
        assert torch.equal(images(model, block_cache=0.0).latents, images(model).latents)
        assert not torch.equal(images(model, block_cache=EVERY).latents, plain.latents)
    assert torch.equal(images(model, block_cache=EVERY).latents, plain.latents)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flux", "mmdit"])
def test_compiled_blocks_are_reused_alike(family: str) -> None:
    network = network_of(family)
    run, xs = run_of(network, 1), walk(family, 1)
    plain = cached(BlockCache(network, 0.1), network, xs, run)
    compile_blocks(network, backend="eager", fullgraph=True)
    cache = BlockCache(network, 0.1)
    for found, expected in zip(cached(cache, network, xs, run), plain, strict=True):
        torch.testing.assert_close(found, expected)
    assert 0 < cache.reuse.reused < POINTS - 1


def test_an_adopted_network_is_cached_as_its_own_is(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign, _, _ = flux_case(monkeypatch)
    copied: Any = adopt(foreign.float(), allow_copies=True).network
    own = tiny.flux(copied.config)
    own.load_state_dict(copied.state_dict())
    adopted: Any = adopt(foreign).network
    found = []
    for network in (adopted, own):
        model = eridiff.FluxInference(network, tiny.autoencoder(), device="cpu", progress=False)
        found.append(images(model, block_cache=EVERY))
    torch.testing.assert_close(found[0].latents, found[1].latents, rtol=1e-4, atol=1e-4)
    assert found[0].run.reuse.reused == found[1].run.reuse.reused == 4


def test_a_png_is_generated_again_with_its_cache(tmp_path: Path) -> None:
    model = eridiff.load(tiny.write_model(tmp_path), device="cpu", progress=False)
    asked = {"steps": 5, "seed": 1, "width": 32, "height": 32, "block_cache": EVERY}
    result = model.generate("a swan", **asked)
    path = save_png(result.images[0], tmp_path / "a.png", result.settings[0])
    settings = read_settings(path)
    assert settings["block_cache"] == EVERY
    assert generate_again(model, settings).images[0].tobytes() == result.images[0].tobytes()
    exact = generate_again(model, settings | {"block_cache": None})
    assert exact.images[0].tobytes() != result.images[0].tobytes()


def test_the_log_says_lossy_with_counts_and_the_measured_error(caplog: pytest.LogCaptureFixture) -> None:
    model = families.inference("flux")
    with caplog.at_level(logging.WARNING, "eridiff"):
        reuse = images(model, block_cache=0.0).run.reuse
        images(model, block_cache=EVERY)
    errors = sorted(reuse.errors)
    off = f"in 4 of the others it would have been off by {(errors[1] + errors[2]) / 2:.1%} (median), {errors[3]:.1%} at most"
    assert [r.message for r in caplog.records] == [
        f"block_cache 0, lossy: 0 of 5 evaluations are from the cache; {off}",
        "block_cache 100, lossy: 4 of 5 evaluations are from the cache; its error is unknown, as no two were computed",
    ]


def test_a_recording_a_unet_and_a_single_block_are_refused() -> None:
    model = families.inference("flux")
    with record(model), pytest.raises(ConfigError, match="double_blocks.0 has hooks that wait for each call"):
        images(model, block_cache=0.1)
    with pytest.raises(ConfigError, match="for Flux and SD 3, not for a UNet"):
        BlockCache(tiny.unet(), 0.1)
    with pytest.raises(ConfigError, match="at least two blocks"):
        BlockCache(tiny.mmdit(replace(tiny.MMDIT, depth=1)), 0.1)


@pytest.mark.parametrize("threshold", [float("nan"), float("inf"), -1, True, "x", None])
def test_a_threshold_is_a_number_from_zero_on(threshold: Any) -> None:
    with pytest.raises(ConfigError, match="threshold of a block cache must be a number from 0 on"):
        BlockCache(families.inference("flux").network, threshold)
