"""Laws of samplers, tables and guidance, on differential equations whose solution is known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eridiff.schedulers import Schedule
from eridiff.schedulers.flow_match import candle_sigmas, flow_schedule, sd3_sigmas, shifted
from eridiff.schedulers.guidance import Guidance, SkipLayers, classifier_free, guided, rescaled
from eridiff.schedulers.samplers import SAMPLERS, clean_noise

DEVIATION = 0.5  # of the pictures: Gaussian, so that the best network is known


def velocity(x: Tensor, sigma: float) -> Tensor:
    """The exact velocity of rectified flow to pictures with mean 0.3 and DEVIATION: E[noise - clean | x]."""
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
@given(st.sampled_from(sorted(SAMPLERS)), st.integers(1, 12), st.floats(0.5, 8), st.integers(0, 99))
def test_a_single_picture_is_reached_exactly_whatever_the_sampler(
    name: str, steps: int, shift: float, seed: int
) -> None:
    """Where all pictures are one, the path is a straight line and no sampler may leave it."""
    g = torch.Generator().manual_seed(seed)
    picture, noise = torch.randn(2, 4, generator=g, dtype=torch.float64)
    schedule = flow_schedule(sd3_sigmas(steps, shift))
    x, previous = noise, None
    for i in range(steps):
        x, previous = SAMPLERS[name](lambda x, i: (x - picture) / float(schedule.sigmas[i]), x, schedule, i, previous)
        line = (1 - schedule.sigmas[i + 1]) * picture + schedule.sigmas[i + 1] * noise
        assert torch.allclose(x, line, atol=1e-9) and torch.allclose(previous, picture, atol=1e-9)


@given(st.floats(0.01, 1), st.integers(0, 9))
def test_clean_and_noise_mix_back_to_the_latents(sigma: float, seed: int) -> None:
    x, output = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    schedule = flow_schedule(torch.tensor([sigma, 0.0]))
    clean, noise = clean_noise(x, output, schedule, 0)
    mixed = schedule.alphas[0] * clean + schedule.sigmas[0] * noise
    assert torch.allclose(mixed, x) and torch.allclose(noise - clean, output)


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
    """The published window 0.01 to 0.20; the steps that the original steers are named in its fact sheet."""
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
