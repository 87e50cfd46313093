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
    discrete_points,
    discrete_schedule,
    exploding,
    sigmas_at,
    timesteps_at,
    trailing_timesteps,
)
from eridiff.schedulers.flow_match import candle_sigmas, flow_points, flow_schedule, sd3_sigmas, shifted
from eridiff.schedulers.guidance import Guidance, SkipLayers, classifier_free, guided, rescaled
from eridiff.schedulers.samplers import (
    CHURNED,
    DISCRETE_ALONE,
    ETA,
    FLOW_ALONE,
    SAMPLERS,
    noises_of_a_step,
    sampler,
    with_inside,
)
from eridiff.schedulers.step import Draw, Past, Predict, clean_noise

DEVIATION = 0.5  # of the images: Gaussian, so that the best network is known


def velocity(x: Tensor, sigma: float) -> Tensor:
    """The exact velocity of rectified flow to images with mean 0.3 and DEVIATION: E[noise - clean | x]."""
    variance = (1 - sigma) ** 2 * DEVIATION**2 + sigma**2
    centred = x - (1 - sigma) * 0.3
    clean = 0.3 + (1 - sigma) * DEVIATION**2 / variance * centred
    noise = sigma / variance * centred
    return noise - clean


ALPHAS = alphas_cumprod()


def inside_flow(ratios: Tensor | None, times: Tensor | None) -> Schedule:
    assert ratios is not None
    return flow_points(ratios)


def inside_discrete(ratios: Tensor | None, times: Tensor | None) -> Schedule:
    return discrete_points(ratios, times, ALPHAS, "epsilon")


def walk(
    name: str, predict: Predict, schedule: Schedule, x: Tensor, draw: Draw | None = None, eta: float | None = None
) -> list[tuple[Tensor, Past]]:
    """The latents behind every step, and what the network saw in it."""
    found: list[tuple[Tensor, Past]] = []
    for i in range(schedule.steps):
        x, seen = sampler(name, eta)(predict, x, schedule, i, [past for _, past in found[-3:]], draw)
        found.append((x, seen))
    return found


def error(name: str, steps: int) -> float:
    """At sigma 0.2, where the equation is smooth; the solution keeps x's place within the distribution."""
    place = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    if name not in DISCRETE_ALONE:
        flow = flow_schedule(torch.linspace(0.9, 0.2, steps + 1, dtype=torch.float64))
        schedule = with_inside(name, flow, inside_flow, eta=0.0)
    else:
        times = torch.linspace(900, 132, steps + 1, dtype=torch.float64)  # of whole middles, up to 128 steps
        sigmas = sigmas_at(times, ALPHAS)
        discrete = discrete_schedule(times[:-1], sigmas[:-1], final_sigma=float(sigmas[-1]))
        schedule = with_inside(name, discrete, inside_discrete)

    def at(i: int) -> Tensor:
        alpha, sigma = float(schedule.alphas[i]), float(schedule.sigmas[i])
        return alpha * 0.3 + place * math.sqrt(alpha**2 * DEVIATION**2 + sigma**2)

    def predict(x: Tensor, i: int) -> Tensor:
        points, k = (schedule.inside, i - steps) if i >= steps and schedule.inside else (schedule, i)
        alpha, sigma = float(points.alphas[k]), float(points.sigmas[k])
        noise = sigma / (alpha**2 * DEVIATION**2 + sigma**2) * (x - alpha * 0.3)
        return velocity(x, sigma) if points.prediction == "velocity" else noise

    eta = 0.0 if noises_of_a_step(name) else None
    return float((walk(name, predict, schedule, at(0), eta=eta)[-1][0] - at(steps)).abs().max())


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("euler", 1), ("euler_ancestral_rf", 1), ("heun", 2), ("dpmpp_2m", 2), ("dpmpp_2m_rf", 2), ("dpm2", 2),
        ("dpmpp_2s", 2), ("dpmpp_2s_ancestral", 2), ("dpmpp_sde", 2), ("dpmpp_3m_sde", 2), ("lms", 2), ("unipc", 2),
        ("deis", 2), ("plms", 2), ("pndm", 2),
    ],
)  # fmt: skip
def test_twice_the_steps_divide_the_error_by_two_to_the_order(name: str, order: int) -> None:
    steps = 256 if name in ("dpmpp_2m_rf", "dpmpp_3m_sde") else 64  # where the first steps no longer matter
    assert math.isclose(math.log2(error(name, steps) / error(name, 2 * steps)), order, abs_tol=0.17)


@pytest.mark.parametrize(
    ("name", "plain"),
    [("dpm2_ancestral", "dpm2"), ("euler_ancestral", "euler"), ("euler_ancestral_rf", "euler"), ("ddim", "euler")],
)
def test_an_ancestral_sampler_with_eta_0_is_its_deterministic_form(name: str, plain: str) -> None:
    def end(sampler: str, eta: float | None) -> Tensor:
        schedule = with_inside(sampler, flow_schedule(sd3_sigmas(6, 3.0)), inside_flow, eta)
        draw = lambda: torch.full((3,), math.nan, dtype=torch.float64)  # noqa: E731
        places = [*schedule.asked.tolist()]
        start = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
        return walk(sampler, lambda x, i: velocity(x, places[i]), schedule, start, draw, eta)[-1][0]

    assert torch.allclose(end(name, 0.0), end(plain, None), atol=1e-12)


@settings(deadline=None)
@given(
    st.sampled_from(sorted(SAMPLERS.keys() - {"lcm", *DISCRETE_ALONE})),
    st.integers(1, 12),
    st.floats(0.5, 8),
    st.integers(0, 99),
)
def test_a_single_image_is_reached_exactly_whatever_the_sampler(name: str, steps: int, shift: float, seed: int) -> None:
    """Where all images are one, the path is a straight line and no sampler without noise of its own may leave it.

    (LCM's boundary condition keeps a share of the latents.)
    """
    g = torch.Generator().manual_seed(seed)
    picture, noise = torch.randn(2, 4, generator=g, dtype=torch.float64)
    schedule = with_inside(name, flow_schedule(sd3_sigmas(steps, shift)), inside_flow)
    predict = lambda x, i: (x - picture) / float(schedule.asked[i])  # noqa: E731
    run = walk(name, predict, schedule, noise, lambda: torch.randn(4, generator=g).double())
    for i, (x, seen) in enumerate(run):
        line = (1 - schedule.sigmas[i + 1]) * picture + schedule.sigmas[i + 1] * noise
        assert noises_of_a_step(name) or torch.allclose(x, line, atol=1e-9)
        assert torch.allclose(seen[0], picture, atol=1e-9)
    assert torch.allclose(run[-1][0], picture, atol=1e-6)


@given(st.floats(0.01, 1), st.integers(0, 9))
def test_clean_and_noise_mix_back_to_the_latents(sigma: float, seed: int) -> None:
    x, output = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    schedule = flow_schedule(torch.tensor([sigma, 0.0]))
    clean, noise = clean_noise(x, output, schedule, 0)
    mixed = schedule.alphas[0] * clean + schedule.sigmas[0] * noise
    assert torch.allclose(mixed, x) and torch.allclose(noise - clean, output)


@pytest.mark.parametrize(
    "name",
    ["euler_ancestral", "ddpm", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_sde", "dpm2_ancestral", "dpmpp_2s_ancestral"],
)
def test_stochastic_samplers_end_in_the_images_distribution(name: str) -> None:
    """With the exact network of Gaussian images and 500 steps, mean and deviation come out as they went in."""
    g = torch.Generator().manual_seed(5)
    alphas = alphas_cumprod()
    places = trailing_timesteps(500)
    schedule = with_inside(name, discrete_schedule(places, sigmas_at(places, alphas)), inside_discrete)
    x = torch.randn(20000, generator=g, dtype=torch.float64)

    def noise_of(x: Tensor, i: int) -> Tensor:
        points, k = (schedule.inside, i - 500) if i >= 500 and schedule.inside else (schedule, i)
        alpha, sigma = float(points.alphas[k]), float(points.sigmas[k])
        return sigma / (alpha**2 * DEVIATION**2 + sigma**2) * (x - alpha * 0.3)

    x = walk(name, noise_of, schedule, x, lambda: torch.randn(20000, generator=g, dtype=torch.float64))[-1][0]
    assert abs(float(x.mean()) - 0.3) < 0.02 and abs(float(x.std()) / DEVIATION - 1) < 0.03


@settings(deadline=None)
@given(
    st.sampled_from(["epsilon", "v", "sample"]),
    st.integers(0, 99),
    st.sampled_from(sorted(SAMPLERS.keys() - {"lcm", *FLOW_ALONE})),
)
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
        points = discrete_schedule(places, sigmas_at(places, ALPHAS), kind)
        preserving = with_inside(name, points, lambda r, t, kind=kind: discrete_points(r, t, ALPHAS, kind))
        schedule = exploding(preserving) if explodes else preserving
        x = start / (float(preserving.alphas[0]) if explodes else 1)

        def predict(x: Tensor, i: int, kind: str = kind, preserving: Schedule = preserving) -> Tensor:
            points, k = (preserving.inside, i - 7) if i >= 7 and preserving.inside else (preserving, i)
            alpha, sigma = float(points.alphas[k]), float(points.sigmas[k])
            clean = torch.tanh(weights @ x)
            noise = (x - alpha * clean) / sigma
            return {"epsilon": noise, "v": alpha * noise - sigma * clean, "sample": clean}[kind]

        ends.append(walk(name, predict, schedule, x)[-1][0])
    assert torch.allclose(ends[0], ends[1], atol=1e-9) and torch.allclose(ends[0], ends[2], atol=1e-9)


def test_zero_terminal_snr_is_a_point_like_any_other() -> None:
    alphas = alphas_cumprod(zero_terminal_snr=True)
    places = trailing_timesteps(4)
    schedule = discrete_schedule(places, sigmas_at(places, alphas), "v")
    assert alphas[-1] == 0 and schedule.alphas[0] == 0 and schedule.sigmas[0] == 1
    x, (clean, _) = SAMPLERS["euler"](lambda x, i: torch.full_like(x, -0.5), torch.ones(2), schedule, 0, [], None)
    assert torch.equal(clean, torch.full((2,), 0.5)) and bool(torch.isfinite(x).all())  # v is -clean where all is noise


@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - set(FLOW_ALONE)))
def test_it_is_known_how_often_a_step_asks_for_noise(name: str) -> None:
    """Parts of a run skip so much noise, and who needs none needs no seeds."""
    times = torch.tensor([900.0, 600, 300], dtype=torch.float64)
    points = discrete_schedule(times, sigmas_at(times, ALPHAS))
    for options in (
        {},
        *([{"eta": 0.0}, {"eta": 0.5}] if name in ETA else []),
        *([{"churn": 2.0}] if name in CHURNED else []),
    ):
        schedule, drawn = with_inside(name, points, inside_discrete, **options), [0]

        def draw(drawn: list[int] = drawn) -> Tensor:
            drawn[0] += 1
            return torch.zeros(2, dtype=torch.float64)

        sampler(name, **options)(lambda x, i: torch.tanh(x), torch.ones(2).double(), schedule, 0, [], draw)
        assert drawn[0] == noises_of_a_step(name, **options), options


@pytest.mark.parametrize(
    ("name", "inside", "from_noise"),
    [("euler_ancestral_rf", None, None), ("dpm2_ancestral", 0.4, 0.4), ("dpmpp_2s_ancestral", 0.5, 0.9999)],
)
def test_ancestral_steps_of_rectified_flow_are_comfyuis(
    name: str, inside: float | None, from_noise: float | None
) -> None:
    """By hand from its code, from sigma 0.8 to 0.4: down to 0.2, and noise of (0.16 - (0.2 * 0.6 / 0.8)^2)^0.5 for the rest."""
    schedule = with_inside(name, flow_schedule(torch.tensor([0.8, 0.4, 0.0])), inside_flow)
    assert inside is None or math.isclose(float(schedule.asked[2]), inside, rel_tol=1e-6)
    (x, _), *_ = walk(
        name, lambda x, i: (x - 0.5) / float(schedule.asked[i]), schedule, torch.ones(1), lambda: torch.ones(1)
    )
    expected = 0.75 * (0.25 * 1 + 0.75 * 0.5) + (0.16 - 0.15**2) ** 0.5
    assert math.isclose(float(x), expected, rel_tol=1e-6)
    whole = with_inside(name, flow_schedule(torch.tensor([1.0, 0.4, 0.0])), inside_flow)
    assert from_noise is None or math.isclose(float(whole.asked[2]), from_noise, rel_tol=1e-6)


@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - {"lcm", *FLOW_ALONE}))
@pytest.mark.parametrize("end", ["from an infinite sigma", "at the level of the last step"])
def test_a_single_image_is_reached_from_and_to_the_ends_of_the_table(name: str, end: str) -> None:
    """Zero terminal SNR begins where all is noise; a last step to its own noise level leaves the latents."""
    g = torch.Generator().manual_seed(4)
    image, noise = torch.randn(2, 4, generator=g, dtype=torch.float64)
    alphas = alphas_cumprod(zero_terminal_snr=end.startswith("from"))
    times = torch.tensor([999.0, 800, 600, 400, 200, 0], dtype=torch.float64)
    sigmas = sigmas_at(times, alphas)
    final = 0.0 if end.startswith("from") else float(sigmas[-1])
    points = discrete_schedule(times, sigmas, "v", final)
    schedule = with_inside(name, points, lambda r, t: discrete_points(r, t, alphas, "v"))

    def predict(x: Tensor, i: int) -> Tensor:
        points, k = (schedule.inside, i - 6) if i >= 6 and schedule.inside else (schedule, i)
        alpha, sigma = float(points.alphas[k]), float(points.sigmas[k])
        return alpha * (x - alpha * image) / sigma - sigma * image

    run = walk(name, predict, schedule, noise, lambda: torch.randn(4, generator=g, dtype=torch.float64))
    assert all(torch.allclose(seen[0], image, atol=1e-6) for _, seen in run)
    if not final:
        assert torch.allclose(run[-1][0], image, atol=1e-6)
    else:
        assert torch.allclose(run[-1][0], run[-2][0])


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


def test_a_point_inside_a_step_is_guided_as_the_step_is() -> None:
    guidance = Guidance(4.0, cfg_interval=(0.2, 0.5), skip_layers=SkipLayers((7,), 2.5, 0.1, 0.3))
    predict = guided(Network(), Rows(torch.tensor([5.0, 2.0])), guidance, batch=1, steps=10)
    of_steps, inside = ([float(predict(torch.ones(1, 1), first + i)) for i in range(10)] for first in (0, 10))
    assert of_steps == inside and len(set(of_steps)) > 2


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
