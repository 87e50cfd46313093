"""Training sees what sampling sees: the same latents, the same times, targets that the samplers read back."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from eridiff import Prompt
from eridiff.errors import ConfigError
from eridiff.schedulers import Schedule
from eridiff.schedulers.discrete import legacy_timesteps
from eridiff.schedulers.flow_match import candle_sigmas, even_sigmas, flow_schedule, flux_schedule, flux_shift, shifted
from eridiff.schedulers.step import clean_noise, mixed
from eridiff.training import objective
from eridiff.training.objective import Levels, discrete_levels, flow_levels, noised, squared_error, target
from tests.families import FAMILIES, conditioning, inference, inputs, packed, rows

G = torch.Generator


def levels_of(schedule: Schedule, family: str) -> Levels:
    """The points of a sampler's schedule as a batch of training."""
    if family == "unet":
        return discrete_levels(schedule.times, schedule.prediction)
    return flow_levels(schedule.sigmas[:-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_in_training_is_given_what_a_sampler_gives_it(family: str) -> None:
    """A run from an image, at every place where it may begin: the latents and the time that reach the network."""
    model = inference(family)
    schedule = model.schedule(5, 32, 32)
    levels = levels_of(schedule, family)
    clean, noise = (rows(1, model.latent_channels, 4, 4, seed=s, dtype=torch.float32) for s in (2, 3))
    seen: dict[str, Tensor] = {}
    prepare, step = model.network.prepare, model.network.step

    def spy_prepare(text: Tensor, pooled: Tensor, times: Tensor, *rest: Any, **options: Any) -> Any:
        seen["times"] = times
        return prepare(text, pooled, times, *rest, **options)

    def spy_step(latents: Tensor, run: Any, i: int, *rest: Any) -> Tensor:
        seen["latents"], seen["time"] = latents, seen["times"][i]
        return step(latents, run, i, *rest)

    model.network.prepare, model.network.step = spy_prepare, spy_step
    prompt = Prompt(conditioning(model), conditioning(model))
    for i in range(5):
        model.denoise(
            noise, prompt, schedule, image=clean, strength=(5 - i) / 5, sampler="euler", callback=lambda step: True
        )
        x = noised(
            clean,
            noise,
            Levels(*(getattr(levels, n)[i : i + 1] for n in ("alphas", "sigmas", "times")), levels.prediction),
        )
        assert torch.equal(seen["latents"][:1], packed(family, x))
        assert torch.equal(seen["time"].double(), levels.times[i].float().double())


@settings(deadline=None)
@given(
    st.sampled_from(["velocity", "epsilon", "v", "sample"]), st.lists(st.floats(0.001, 0.999), min_size=1, max_size=5)
)
def test_targets_are_read_back_as_the_clean_image_and_the_noise(prediction: str, shares: list[float]) -> None:
    places = torch.tensor(shares, dtype=torch.float64)
    levels = flow_levels(places) if prediction == "velocity" else discrete_levels(1 + 998 * places, prediction)
    clean, noise = rows(len(shares), 2, 3), rows(len(shares), 2, 3, seed=1)
    x, wanted = noised(clean, noise, levels), target(clean, noise, levels)
    for b in range(len(shares)):
        point = Schedule(levels.alphas, levels.sigmas, levels.times, levels.times, prediction, levels.times)
        found = clean_noise(x[b], wanted[b], point, b)
        assert torch.allclose(found[0], clean[b], rtol=0, atol=1e-10)
        assert torch.allclose(found[1], noise[b], rtol=0, atol=1e-10)
        assert torch.equal(x[b], mixed(clean[b], noise[b], point, b))


@given(st.integers(1, 40), st.integers(1, 8192), st.floats(0.3, 8))
def test_even_times_that_are_shifted_are_the_samplers_schedules(steps: int, tokens: int, shift: float) -> None:
    evenly = even_sigmas(steps)
    flux, sd3 = flux_schedule(steps, tokens), flow_schedule(candle_sigmas(steps, shift))
    for sigmas, schedule in ((shifted(evenly, flux_shift(tokens)), flux), (shifted(evenly, shift), sd3)):
        levels = flow_levels(sigmas[:-1])
        for name in ("sigmas", "alphas"):
            assert torch.equal(getattr(levels, name), getattr(schedule, name)[:-1])
        assert torch.equal(levels.times, schedule.times)


def test_sdxl_is_trained_at_the_entries_that_its_samplers_read() -> None:
    drawn = objective.timesteps(20000, G().manual_seed(0))
    counts = torch.bincount(drawn.long(), minlength=1000)
    assert len(counts) == 1000 and bool((counts > 0).all())
    assert float((counts - 20.0).square().sum() / 20) < 1000 + 4 * math.sqrt(2000)
    model = inference("unet")
    schedule = model.schedule(20, 32, 32, "legacy")
    levels = discrete_levels(legacy_timesteps(20))
    for name in ("alphas", "sigmas", "times"):
        assert torch.equal(getattr(levels, name), getattr(schedule, name)[:20])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sdxls_latents_and_targets_are_diffusers_in_training(prediction: str) -> None:
    reference: Any = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    timesteps = torch.tensor([0, 1, 500, 999])
    levels = discrete_levels(timesteps, prediction.removesuffix("_prediction"))
    clean, noise = rows(4, 3, 2, 2, dtype=torch.float32), rows(4, 3, 2, 2, seed=1, dtype=torch.float32)
    wanted = noise if prediction == "epsilon" else reference.get_velocity(clean, noise, timesteps)
    assert torch.allclose(noised(clean, noise, levels), reference.add_noise(clean, noise, timesteps), atol=2e-6)
    assert torch.allclose(target(clean, noise, levels), wanted, atol=2e-6)


def test_latents_of_half_precision_are_noised_in_float32() -> None:
    clean, noise = (rows(1, 4, seed=s, dtype=torch.bfloat16) for s in (0, 1))
    found = noised(clean, noise, flow_levels(torch.tensor([0.3])))
    assert found.dtype == torch.float32
    assert torch.equal(found, noised(clean.float(), noise.float(), flow_levels(torch.tensor([0.3]))))


# distributions --------------------------------------------------------------------------------------------------------

COUNT = 20000
KOLMOGOROV = 1.63 / math.sqrt(COUNT)  # exceeded once in a hundred seeds


def distance(found: Tensor, share_below: Callable[[Tensor], Tensor]) -> float:
    """Kolmogorov and Smirnov's distance between random numbers and the distribution with that function."""
    expected = share_below(found.sort().values)
    places = torch.arange(COUNT + 1, dtype=torch.float64) / COUNT
    return float(torch.maximum((places[1:] - expected).abs(), (expected - places[:-1]).abs()).max())


def normal(mean: float, deviation: float) -> Callable[[Tensor], Tensor]:
    return lambda t: (1 + torch.erf((torch.logit(t) - mean) / (deviation * math.sqrt(2)))) / 2


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_uniform_and_logit_normal_times_have_their_distributions_shifted_or_not(shift: float) -> None:
    u = objective.uniform(COUNT, G().manual_seed(1))
    assert distance(shifted(u, shift), lambda t: shifted(t, 1 / shift)) < KOLMOGOROV
    for mean, deviation in ((0.0, 1.0), (0.5, 0.6), (-1.0, 2.0)):
        t = shifted(objective.logit_normal(COUNT, G().manual_seed(2), mean, deviation), shift)
        # a shift adds its logarithm to the logit
        assert distance(t, normal(mean + math.log(shift), deviation)) < KOLMOGOROV
        assert distance(t, normal(mean + math.log(shift) + 0.1, deviation)) > KOLMOGOROV


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.81, 1.29, 1.75])
def test_mode_times_have_the_papers_density(scale: float) -> None:
    """The share of times below f(u) is 1 - u; f falls, so the share is found by bisection."""

    def share_below(t: Tensor) -> Tensor:
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(60):
            u = (low + high) / 2
            above = 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u) > t
            low, high = torch.where(above, u, low), torch.where(above, high, u)
        return 1 - low

    t = objective.mode(COUNT, G().manual_seed(3), scale)
    assert distance(t, share_below) < KOLMOGOROV and bool(((t >= 0) & (t <= 1)).all())


def test_modes_scale_stays_where_the_map_is_monotonic() -> None:
    for scale in (-1.1, 1.8):
        with pytest.raises(ConfigError, match=r"from -1 to 2 / \(pi - 2\)"):
            objective.mode(1, G(), scale)


def test_times_are_spread_as_diffusers_spreads_them() -> None:
    ours = {
        "logit_normal": objective.logit_normal(COUNT, G().manual_seed(4), 0.3, 0.8), "none": objective.uniform(COUNT, G().manual_seed(4)),
        "mode": objective.mode(COUNT, G().manual_seed(4)),
    }  # fmt: skip
    for scheme, found in ours.items():
        theirs = compute_density_for_timestep_sampling(
            scheme, COUNT, 0.3, 0.8, 1.29, generator=G().manual_seed(5)
        ).double()
        both, _ = torch.cat([found, theirs]).sort()
        shares = [torch.searchsorted(t.sort().values, both, right=True).double() / COUNT for t in (found, theirs)]
        assert float((shares[0] - shares[1]).abs().max()) < KOLMOGOROV * math.sqrt(2)


def test_a_generators_state_decides_the_numbers_and_the_global_one_is_left_alone() -> None:
    before = torch.get_rng_state()
    for draw in (objective.uniform, objective.logit_normal, objective.mode, objective.timesteps):
        assert torch.equal(draw(7, G().manual_seed(6)), draw(7, G().manual_seed(6)))
        assert draw(7, G()).dtype == torch.float64
    assert torch.equal(torch.get_rng_state(), before)


# weights --------------------------------------------------------------------------------------------------------------


def test_weights_of_sdxl_are_the_papers_and_diffusers() -> None:
    reference: Any = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    timesteps = torch.tensor([0, 3, 100, 250, 700, 999])
    ratio = compute_snr(reference, timesteps).double()
    levels = {kind: discrete_levels(timesteps, kind) for kind in ("epsilon", "v", "sample")}
    near = {"rtol": 2e-3}  # at timestep 0 diffusers' float32 1 - a has lost three digits
    assert torch.allclose(objective.snr(levels["epsilon"]), ratio, **near)
    least = ratio.clamp(max=5)
    assert torch.allclose(objective.min_snr(levels["epsilon"]), least / ratio, **near)
    assert torch.allclose(objective.min_snr(levels["v"]), least / (ratio + 1), **near)
    assert torch.allclose(objective.min_snr(levels["sample"]), least, **near)
    assert torch.allclose(objective.min_snr(levels["epsilon"], 1), ratio.clamp(max=1) / ratio, **near)
    assert torch.allclose(objective.debiased(levels["epsilon"]), 1 / ratio.sqrt(), **near)


@given(st.floats(0.01, 0.99), st.sampled_from(["min_snr", "debiased"]), st.integers(0, 99))
def test_a_weight_makes_one_loss_of_all_predictions(share: float, name: str, seed: int) -> None:
    """The same mistake in the clean image costs the same, whatever the network calls its output."""
    clean, noise, wrong = (rows(1, 6, seed=3 * seed + k) for k in range(3))
    losses = []
    for kind in ("epsilon", "v", "sample"):
        levels = discrete_levels(torch.tensor([999 * share]), kind)
        x = noised(clean, noise, levels)
        mistaken = (x - float(levels.alphas) * wrong) / float(levels.sigmas)  # the noise that goes with the wrong image
        difference = target(wrong, mistaken, levels), target(clean, noise, levels)
        losses.append(squared_error(*difference, getattr(objective, name)(levels)))
    assert torch.allclose(losses[0], losses[1], rtol=1e-9) and torch.allclose(losses[0], losses[2], rtol=1e-9)


def test_weights_of_rectified_flow() -> None:
    sigmas = torch.tensor([0.02, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64)
    levels = flow_levels(sigmas)
    ratio = ((1 - sigmas) / sigmas) ** 2
    assert torch.equal(objective.cosmap(levels), compute_loss_weighting_for_sd3("cosmap", sigmas))
    assert torch.allclose(objective.min_snr(levels), ratio.clamp(max=5) * sigmas**2)
    assert torch.allclose(objective.debiased(levels), ratio.sqrt() * sigmas**2)
    every = torch.linspace(0, 1, 100001, dtype=torch.float64)
    assert math.isclose(float(torch.trapezoid(objective.cosmap(flow_levels(every)), every)), 1, rel_tol=1e-9)


def test_weights_are_finite_at_zero_terminal_snr_but_for_debiased_epsilon() -> None:
    last = {kind: discrete_levels(torch.tensor([999]), kind, zero_terminal_snr=True) for kind in ("epsilon", "v")}
    assert float(last["v"].alphas) == 0 and float(last["v"].sigmas) == 1
    assert [float(objective.min_snr(last[kind])) for kind in ("epsilon", "v")] == [1, 0]
    assert float(objective.debiased(last["v"])) == 0 and math.isinf(float(objective.debiased(last["epsilon"])))


def test_the_loss_is_each_images_mean_times_its_weight() -> None:
    output, wanted, weights = rows(3, 2, 4, dtype=torch.bfloat16), rows(3, 2, 4, seed=1), torch.tensor([1.0, 0.0, 4.0])
    each = torch.tensor([float((output[b].double() - wanted[b]).square().mean()) for b in range(3)])
    found = squared_error(output, wanted, weights)
    assert torch.allclose(found.double(), (each * weights).mean().double(), rtol=1e-6)
    assert torch.allclose(squared_error(output, wanted).double(), each.mean().double(), rtol=1e-6)


def test_an_unknown_prediction_is_named() -> None:
    with pytest.raises(ConfigError, match="not 'eps'"):
        discrete_levels(torch.tensor([1]), "eps")


# a step of training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "prediction"), [("flux", "velocity"), ("mmdit", "velocity"), ("unet", "epsilon"), ("unet", "v")]
)
def test_a_few_steps_of_training_lower_the_loss(family: str, prediction: str) -> None:
    model = inference(family)
    network: nn.Module = model.network.requires_grad_(True)
    clean, noise = (rows(4, model.latent_channels, 4, 4, seed=s, dtype=torch.float32) for s in (2, 3))
    g = G().manual_seed(4)
    if family == "unet":
        levels = discrete_levels(objective.timesteps(4, g), prediction)
        weights = objective.min_snr(levels)
    else:
        levels = flow_levels(shifted(objective.logit_normal(4, g), flux_shift(4) if family == "flux" else 3.0))
        weights = None
    told = inputs(model, levels)

    def loss() -> Tensor:
        output = network(packed(family, noised(clean, noise, levels)), *told)
        return squared_error(output, packed(family, target(clean, noise, levels)), weights)

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(loss())
        losses[-1].backward()
        optimizer.step()
    assert float(loss().detach()) < 0.9 * float(losses[0].detach())
