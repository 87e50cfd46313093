"""Laws of samplers, tables and guidance, on differential equations whose solution is known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eridiff.schedulers import Schedule
from eridiff.schedulers.discrete import (
    alphas_cumprod,
    discrete_schedule,
    exploding,
    sigmas_at,
    timesteps_at,
    trailing_timesteps,
)
from eridiff.schedulers.flow_match import candle_sigmas, flow_schedule, sd3_sigmas, shifted
from eridiff.schedulers.guidance import Guidance, SkipLayers, classifier_free, guided, rescaled
from eridiff.schedulers.samplers import SAMPLERS, STOCHASTIC, clean_noise

DEVIATION = 0.5  # of the images: Gaussian, so that the best network is known


def velocity(x: Tensor, sigma: float) -> Tensor:
    """The exact velocity of rectified flow to images with mean 0.3 and DEVIATION: E[noise - clean | x]."""
    variance = (1 - sigma) ** 2 * DEVIATION**2 + sigma**2
    centred = x - (1 - sigma) * 0.3
    clean = 0.3 + (1 - sigma) * DEVIATION**2 / variance * centred
    noise = sigma / variance * centred
    return noise - clean


def run(name: str, schedule: Schedule, x: Tensor) -> Tensor:
    previous = None
    for i in range(schedule.steps):
        x, previous = SAMPLERS[name](lambda x, i: velocity(x, float(schedule.times[i])), x, schedule, i, previous)
    return x


def error(name: str, steps: int) -> float:
    """At sigma 0.2, where the equation is smooth; the solution keeps x's place within the distribution."""
    schedule = flow_schedule(torch.linspace(0.9, 0.2, steps + 1, dtype=torch.float64))
    place = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)

    def at(sigma: float) -> Tensor:
        return (1 - sigma) * 0.3 + place * math.sqrt((1 - sigma) ** 2 * DEVIATION**2 + sigma**2)

    return float((run(name, schedule, at(0.9)) - at(0.2)).abs().max())


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_twice_the_steps_divide_the_error_by_two_to_the_order(name: str, order: int) -> None:
    assert math.isclose(math.log2(error(name, 64) / error(name, 128)), order, abs_tol=0.15)


@settings(deadline=None)
@given(st.sampled_from(sorted(SAMPLERS.keys() - {"lcm"})), st.integers(1, 12), st.floats(0.5, 8), st.integers(0, 99))
def test_a_single_image_is_reached_exactly_whatever_the_sampler(name: str, steps: int, shift: float, seed: int) -> None:
    """Where all images are one, the path is a straight line and no sampler without noise of its own may leave it.

    (LCM's boundary condition keeps a share of the latents.)
    """
    g = torch.Generator().manual_seed(seed)
    picture, noise = torch.randn(2, 4, generator=g, dtype=torch.float64)
    schedule = flow_schedule(sd3_sigmas(steps, shift))
    x, previous = noise, None
    for i in range(steps):
        predict = lambda x, i: (x - picture) / float(schedule.sigmas[i])  # noqa: E731
        x, previous = SAMPLERS[name](predict, x, schedule, i, previous, lambda: torch.randn(4, generator=g).double())
        line = (1 - schedule.sigmas[i + 1]) * picture + schedule.sigmas[i + 1] * noise
        assert name in STOCHASTIC or torch.allclose(x, line, atol=1e-9)
        assert torch.allclose(previous, picture, atol=1e-9)
    assert torch.allclose(x, picture, atol=1e-6)


@given(st.floats(0.01, 1), st.integers(0, 9))
def test_clean_and_noise_mix_back_to_the_latents(sigma: float, seed: int) -> None:
    x, output = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    schedule = flow_schedule(torch.tensor([sigma, 0.0]))
    clean, noise = clean_noise(x, output, schedule, 0)
    mixed = schedule.alphas[0] * clean + schedule.sigmas[0] * noise
    assert torch.allclose(mixed, x) and torch.allclose(noise - clean, output)


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde"])
def test_stochastic_samplers_end_in_the_images_distribution(name: str) -> None:
    """With the exact network of Gaussian images and 500 steps, mean and deviation come out as they went in."""
    g = torch.Generator().manual_seed(5)
    alphas = alphas_cumprod()
    places = trailing_timesteps(500)
    schedule = discrete_schedule(places, sigmas_at(places, alphas))
    x, previous = torch.randn(20000, generator=g, dtype=torch.float64), None

    def noise_of(x: Tensor, i: int) -> Tensor:
        alpha, sigma = float(schedule.alphas[i]), float(schedule.sigmas[i])
        return sigma / (alpha**2 * DEVIATION**2 + sigma**2) * (x - alpha * 0.3)

    for i in range(500):
        draw = lambda: torch.randn(20000, generator=g, dtype=torch.float64)  # noqa: E731
        x, previous = SAMPLERS[name](noise_of, x, schedule, i, previous, draw)
    assert abs(float(x.mean()) - 0.3) < 0.02 and abs(float(x.std()) / DEVIATION - 1) < 0.03


@settings(deadline=None)
@given(st.sampled_from(["epsilon", "v", "sample"]), st.integers(0, 99), st.sampled_from(["euler", "heun", "dpmpp_2m"]))
def test_both_spaces_and_every_prediction_give_the_same_images(prediction: str, seed: int, name: str) -> None:
    """The same clean image, told as noise, v or itself, in variance-preserving and -exploding space."""
    g = torch.Generator().manual_seed(seed)
    weights, start = (
        torch.randn(4, 4, generator=g, dtype=torch.float64) / 3,
        torch.randn(4, generator=g, dtype=torch.float64),
    )
    places = trailing_timesteps(7)
    ends = []
    for kind, explodes in ((prediction, False), (prediction, True), ("epsilon", False)):
        preserving = discrete_schedule(places, sigmas_at(places, alphas_cumprod()), kind)
        schedule = exploding(preserving) if explodes else preserving
        x, previous = start / (float(preserving.alphas[0]) if explodes else 1), None

        def predict(x: Tensor, i: int, kind: str = kind, preserving: Schedule = preserving) -> Tensor:
            alpha, sigma = float(preserving.alphas[i]), float(preserving.sigmas[i])
            clean = torch.tanh(weights @ x)
            noise = (x - alpha * clean) / sigma
            return {"epsilon": noise, "v": alpha * noise - sigma * clean, "sample": clean}[kind]

        for i in range(7):
            x, previous = SAMPLERS[name](predict, x, schedule, i, previous)
        ends.append(x)
    assert torch.allclose(ends[0], ends[1], atol=1e-9) and torch.allclose(ends[0], ends[2], atol=1e-9)


def test_zero_terminal_snr_is_a_point_like_any_other() -> None:
    alphas = alphas_cumprod(zero_terminal_snr=True)
    places = trailing_timesteps(4)
    schedule = discrete_schedule(places, sigmas_at(places, alphas), "v")
    assert alphas[-1] == 0 and schedule.alphas[0] == 0 and schedule.sigmas[0] == 1
    x, clean = SAMPLERS["euler"](lambda x, i: torch.full_like(x, -0.5), torch.ones(2), schedule, 0, None)
    assert torch.equal(clean, torch.full((2,), 0.5)) and bool(torch.isfinite(x).all())  # v is -clean where all is noise


@given(st.floats(0.0292, 14.6))
def test_a_noise_levels_place_in_the_table_is_found_again(sigma: float) -> None:
    alphas = alphas_cumprod()
    place = timesteps_at(torch.tensor([sigma], dtype=torch.float64), alphas)
    table = ((1 - alphas) / alphas).sqrt().log()
    low = int(place.floor().clamp(max=998))
    found = table[low] + (place - low) * (table[low + 1] - table[low])
    assert math.isclose(float(found.exp()), sigma, rel_tol=1e-9)


@given(st.integers(1, 60), st.floats(0.2, 10))
def test_tables_fall_from_one_to_zero_and_a_shift_has_an_inverse(steps: int, shift: float) -> None:
    for table in (sd3_sigmas, candle_sigmas):
        sigmas = table(steps, shift)
        assert sigmas[0] == 1 and sigmas[-1] == 0 and len(sigmas) == steps + 1 and bool((sigmas.diff() < 0).all())
    sigmas = candle_sigmas(steps, shift)
    assert torch.allclose(shifted(sigmas, 1 / shift), torch.linspace(1, 0, steps + 1, dtype=torch.float64))


# guidance -------------------------------------------------------------------------------------------------------------


class Rows:
    """Stands for a network's run: a value for each row of the batch."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def rows(self, rows: slice) -> "Rows":
        return Rows(self.values[rows])


class Network:
    """Its output is the row's value, minus 1 for every skipped block; it counts the rows it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, x: Tensor, run: Rows, i: int, skip_blocks: object = ()) -> Tensor:
        assert len(x) == len(run.values)
        self.asked.append(len(x))
        return run.values[:, None] * x - len(skip_blocks)  # type: ignore[arg-type]


def outputs(guidance: Guidance, steps: int = 10, first: int = 0) -> tuple[list[float], list[int]]:
    network, run = Network(), Rows(torch.tensor([5.0, 2.0] if guidance.cfg_scale != 1 else [5.0]))
    predict = guided(network, run, guidance, batch=1, steps=steps, first=first)
    return [float(predict(torch.ones(1, 1), i)) for i in range(first, steps)], network.asked


def test_a_scale_of_one_asks_for_one_row() -> None:
    assert outputs(Guidance()) == ([5.0] * 10, [1] * 10)


def test_prompt_and_negative_prompt_are_one_batch() -> None:
    assert outputs(Guidance(4.0)) == ([2 + 4 * 3.0] * 10, [2] * 10)


def test_outside_the_interval_the_negative_prompt_is_not_asked() -> None:
    found, asked = outputs(Guidance(4.0, cfg_interval=(0.2, 0.5)))
    assert found == [5.0] * 2 + [14.0] * 3 + [5.0] * 5 and asked == [1] * 2 + [2] * 3 + [1] * 5


@pytest.mark.parametrize(
    ("steps", "first", "steered"),
    [(50, 0, range(1, 10)), (40, 0, range(1, 8)), (28, 0, range(1, 6)), (50, 20, range(21, 30))],
)
def test_skip_layers_act_strictly_inside_their_window_counted_from_the_first_step(
    steps: int, first: int, steered: range
) -> None:
    """The published window 0.01 to 0.20; the steps that the original guides are named in its fact sheet."""
    found, asked = outputs(Guidance(4.0, skip_layers=SkipLayers((7, 8, 9), 2.5, 0.01, 0.2)), steps, first)
    assert [i for i, value in enumerate(found, first) if value != 14.0] == list(steered)
    assert set(found) == {14.0, 14.0 + 2.5 * 3} and asked.count(1) == len(steered)


@given(st.integers(0, 99), st.floats(0, 1), st.floats(1.5, 9))
def test_rescaling_moves_the_deviation_and_nothing_else(seed: int, share: float, scale: float) -> None:
    positive, negative = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    steered = classifier_free(positive, negative, scale)
    found = rescaled(steered, positive, share)
    for row in range(2):
        wanted = share * positive[row].std() + (1 - share) * steered[row].std()
        assert torch.allclose(found[row].std(), wanted) and torch.allclose(
            found[row] / wanted, steered[row] / steered[row].std()
        )
