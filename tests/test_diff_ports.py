"""A port in NumPy finds its errors by `eridiff diff` alone: the first, each of several, and what causes them."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eridiff.models.unet import size_vector
from eridiff.schedulers.flow_match import even_sigmas, flux_schedule, sd3_sigmas
from eridiff.trace import explain
from eridiff.trace.compare import compare
from eridiff.trace.inputs import cause_of
from eridiff.trace.record import record
from tests import tiny
from tests.bugs import BUGS, FLUX, alone, case_of, triples
from tests.bugs.flux import sinusoid
from tests.planted import layouts, score
from tests.ports import Bug, beside_reference, case, compared, ported

DTYPES = {"float64": np.float64, "float32": np.float32}
RIGHT = {  # cases, and how many of their tensors a port gives at least
    "flux-dev-tiny": 49, "flux-eps": 27, "flux-schnell-tiny": 17, "sd35-medium-tiny": 28, "sd35-large-tiny": 25, "sd3-eps": 26,
    "ae-16-tiny": 44, "ae-eps": 36, "sdxl-eps": 17, "text-clip-l-tiny": 7, "text-clip-g-tiny": 7, "text-t5-tiny": 4,
}  # fmt: skip
ERRORS = [(family, name) for family in BUGS for name in BUGS[family]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_port_is_equal(name: str, dtype: str) -> None:
    report = compared(case(name), ported(case(name), dtype=DTYPES[dtype]))
    assert report.equal and report.groups() == [] and report.unknown == ()
    assert len([row for row in report.rows if row.other]) >= RIGHT[name]


@pytest.mark.parametrize("family", BUGS)
def test_a_right_port_is_equal_beside_a_reference_in_every_naming(family: str) -> None:
    golden = case(case_of(family, []))
    for layout in layouts(family):
        report, _ = beside_reference(golden, ported(golden, dtype=np.float32), layout)
        assert report.equal and len([row for row in report.rows if row.other]) > 30, layout


@pytest.mark.parametrize(
    ("family", "names"),
    [(family, names) for family in BUGS for names in triples(family)]
    + [(family, (name,)) for family, name in ERRORS if not any(name in names for names in triples(family))],
    ids=lambda value: value if isinstance(value, str) else " + ".join(value),
)
def test_each_of_several_errors_is_found_where_it_is_made(family: str, names: tuple[str, ...]) -> None:
    golden = case(case_of(family, names))
    report = compared(golden, ported(golden, [BUGS[family][name] for name in names]))
    order = [row.name for row in report.rows]
    firsts = sorted((BUGS[family][name].first for name in names), key=order.index)
    assert report.made[0].name == firsts[0] and {row.name for row in report.made} >= set(firsts)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "name"), ERRORS)
def test_one_error_is_found_where_it_is_made(family: str, name: str, dtype: str) -> None:
    if name not in alone(family, DTYPES[dtype]):
        return
    golden = case(case_of(family, [name]))
    report = compared(golden, ported(golden, [BUGS[family][name]], DTYPES[dtype]))
    assert report.made[0].name == BUGS[family][name].first


@pytest.mark.parametrize(
    ("family", "names"),
    [(family, names) for family in ("clip", "t5") for names in triples(family)[:1]]
    + [pytest.param(family, names, marks=pytest.mark.slow) for family in BUGS for names in triples(family)],
    ids=lambda value: value if isinstance(value, str) else " + ".join(value),
)
def test_three_errors_are_three_places_with_their_causes(family: str, names: tuple[str, ...]) -> None:
    found, report = score(family, names, np.float64, "native")
    assert found.first and found.unnamed == () and len(report.groups()) == len(names)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), ERRORS)
def test_one_error_is_one_place_and_its_cause_is_named(family: str, name: str) -> None:
    found, report = score(
        family,
        [name],
        np.float32 if name in alone(family, np.float32) else np.float64,
        "original" if "original" in layouts(family) else "huggingface",
    )
    assert found.first and found.unnamed == () and len(report.groups()) == 1


@pytest.mark.parametrize(
    ("family", "name"), [("flux", "rope halves"), ("flux", "norms of q and k"), ("clip", "no mask")]
)
def test_causes_that_cannot_reach_are_left_out_and_no_other(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden, tried = case(case_of(family, [name])), []
    trace, planted = ported(golden, [BUGS[family][name]]), explain._planted
    monkeypatch.setattr(
        explain, "_planted", lambda causes, *rest: tried.append(causes[-1].says) or planted(causes, *rest)
    )
    near = compared(golden, trace, explain=True)
    count, within = len(tried), explain._within_reach

    def everywhere(*given: Any) -> Any:
        causes, reached = within(*given)
        return causes, {name: {cause.place for cause in causes} for name in reached}

    monkeypatch.setattr(explain, "_within_reach", everywhere)
    assert compared(golden, trace, explain=True) == near and BUGS[family][name].says in near.made[0].cause
    assert count < 0.8 * (len(tried) - count)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_of_a_sinusoid_of_millions_is_not_an_error_and_another_sinusoid_is(dtype: str) -> None:
    """A guidance of 1000 times the right one: the port's rounding is 1e-12 of the sinusoid in float64, 3e-2 in float32."""
    written = BUGS["flux"]["guidance of 1000, written"]
    for sinusoid_of, places in (
        (Bug("sinusoid", sinusoid(dtype=DTYPES[dtype]), "", ""), ["forward:guidance"]),
        (FLUX["half - 1"], ["forward:guidance", "time.sinusoid", "guidance.sinusoid"]),
    ):
        report = compared(case(), ported(case(), [written, sinusoid_of], DTYPES[dtype]))
        assert [row.name for row in report.made] == places


def test_two_errors_between_two_values_of_a_sparse_trace_are_both_named() -> None:
    """Only what blocks give is written down, so rotation and GELU are in one stretch."""
    trace = ported(case(), [FLUX["rope halves"], FLUX["gelu erf"]], np.float32)
    sparse = {
        n: trace[n]
        for n in trace
        if n.endswith((".image", ".text", "out", "vec")) or n.startswith("single_blocks") and n.count(".") == 1
    }
    report = compared(case(), sparse, explain=True)
    assert report.made[0].name == "double_blocks.0.image" and len(report.rows) < 12
    assert all("rotation of halves" in row.cause and "erf form of GELU" in row.cause for row in report.made)


# what a network is given ------------------------------------------------------------------------------------------------

EIGHT = flux_schedule(8, 1024).sigmas[:-1]
SD3 = sd3_sigmas(8, 3.0)[:-1]
DRAWN = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))


def packed(latents: Tensor, order: tuple[int, ...]) -> Tensor:
    return latents.reshape(2, 16, 16, 2, 2).permute(0, 1, *order).reshape(2, 16, 64)


POOLED = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
NUMBERS = torch.tensor([[765.0, 1347.0, 0.0, 16.0, 1024.0, 1213.0], [1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]])
VECTOR = size_vector(POOLED, NUMBERS)
REFINER = size_vector(POOLED, torch.cat([NUMBERS[:, :4], torch.full((2, 1), 6.0)], dim=1))
SD3_TEXT = torch.cat([torch.cat([DRAWN[:, :6, :24], 0 * DRAWN[:, :6, 24:]], dim=2), DRAWN[:, 6:10]], dim=1)
INPAINT = torch.randn(2, 9, 4, 4, generator=torch.Generator().manual_seed(2))
INPUTS: dict[str, tuple[str, Tensor, Tensor]] = {
    "the schedule ends at 0:": ("prepare:times", flux_schedule(7, 1024).sigmas, EIGHT),
    "the schedule is not shifted": ("prepare:times", even_sigmas(8)[:-1], EIGHT),
    "the schedule is shifted twice": ("prepare:times", 1 / (1 + (1 / EIGHT - 1) * (1 / EIGHT[4] - 1)), EIGHT),
    "each step has the next one's time": ("prepare:times", flux_schedule(8, 1024).sigmas[1:], EIGHT),
    "the schedule ends at 1/steps, as Flux's": ("prepare:times", 3 * even_sigmas(8)[:-1] / (1 + 2 * even_sigmas(8)[:-1]), SD3),
    "times are on the scale of 1000": ("prepare:times", 1000 * EIGHT, EIGHT),
    "1 - t in place of t": ("prepare:times", 1 - SD3, SD3),
    "packed as (row, column, channel)": ("forward:latents", packed(DRAWN, (3, 4, 2)), DRAWN),
    "packed as (channel, column, row)": ("forward:latents", packed(DRAWN, (2, 4, 3)), DRAWN),
    "column by column": ("step:latents", DRAWN.reshape(2, 4, 4, 64).transpose(1, 2).reshape(2, 16, 64), DRAWN),
    "scale and shift, flux's, are left out": ("decode:latents", DRAWN / 0.3611 + 0.1159, DRAWN),
    "the latents' shift, sd3's, is left out": ("forward:latents", DRAWN + 1.5305 * 0.0609, DRAWN),
    "the first 4 tokens last": ("prepare:text", torch.cat([DRAWN[:, 4:], DRAWN[:, :4]], 1), DRAWN),
    "the first 24 features last": ("prepare:text", torch.cat([DRAWN[..., 24:], DRAWN[..., :24]], -1), DRAWN),
    "the guidance is on the scale of 1000": ("forward:guidance", torch.tensor([3500.0]), torch.tensor([3.5])),
    "(width, height) in place of": ("forward:vector", size_vector(POOLED, NUMBERS[:, [1, 0, 3, 2, 5, 4]]), VECTOR),
    "the crop comes after": ("prepare:vector", size_vector(POOLED, NUMBERS[:, [0, 1, 4, 5, 2, 3]]), VECTOR),
    "units of latents": ("forward:vector", size_vector(POOLED, NUMBERS / 8), VECTOR),
    "the sizes are rounded to bfloat16": ("forward:vector", size_vector(POOLED, NUMBERS.bfloat16().float()), VECTOR),
    "sizes' sinusoids have sines first": ("forward:vector", torch.cat([POOLED, VECTOR[:, 8:].reshape(2, 6, 2, 128).flip(2).flatten(1)], 1), VECTOR),
    "the sizes come before": ("forward:vector", VECTOR.roll(6 * 256, 1), VECTOR),
    "the pooled text is zero": ("forward:vector", size_vector(0 * POOLED, NUMBERS), VECTOR),
    "the sizes are zero": ("forward:vector", size_vector(POOLED, 0 * NUMBERS), VECTOR),
    "the aesthetic score is 2.5": ("forward:vector", size_vector(POOLED, torch.cat([NUMBERS[:, :4], torch.full((2, 1), 2.5)], 1)), REFINER),
    "the first 8 features last": ("forward:text", torch.cat([torch.cat([SD3_TEXT[:, :6, 8:24], SD3_TEXT[:, :6, :8], SD3_TEXT[:, :6, 24:]], 2), SD3_TEXT[:, 6:]], 1), SD3_TEXT),
    "prompts are in the other order": ("prepare:text", DRAWN.flip(0), DRAWN),
    "latents, masked image, mask": ("forward:latents", torch.cat([INPAINT[:, :4], INPAINT[:, 5:], INPAINT[:, 4:5]], 1), INPAINT),
    "the mask is inverted": ("forward:latents", torch.cat([INPAINT[:, :4], 1 - INPAINT[:, 4:5], INPAINT[:, 5:]], 1), INPAINT),
    "it is 0.9931 times as large": ("step:latents", 0.9931 * DRAWN, DRAWN),
    "times are rounded to float16": ("prepare:times", EIGHT.half().float(), EIGHT),
    "rounded to whole numbers of 1000": ("prepare:times", (1000 * EIGHT).round() / 1000, EIGHT),
    "times are one of 1000 too late": ("prepare:times", 999 * EIGHT + 1, 999 * EIGHT),
    "images are in [0, 1]": ("encode:pictures", DRAWN / 2 + 0.5, DRAWN),
    "rounded to bfloat16": ("forward:pooled", DRAWN.bfloat16().float(), DRAWN),
}  # fmt: skip


@pytest.mark.parametrize("says", INPUTS)
def test_the_cause_of_another_input_is_named(says: str) -> None:
    name, found, expected = INPUTS[says]
    cause = cause_of(name, found, expected, 1e-5)
    assert cause is not None and says in cause[0]
    report = compare({name: found}, {name: expected}, explain=True)
    assert report.made[0].name == name and says in report.made[0].cause


def test_a_run_on_another_schedule_differs_in_its_times_alone() -> None:
    """Beside the network: nothing that follows from the times is an error made there."""
    flux = tiny.flux()
    traces = []
    for times in (flux_schedule(7, 1024).sigmas, EIGHT):
        with record(flux, calls="all") as recording, torch.no_grad():
            run = flux.prepare(DRAWN[:1, :5, :12], DRAWN[:1, 0, :8], times.float(), (4, 4), torch.tensor([3.5]))
            for i in range(len(times)):
                flux.step(DRAWN[:1], run, i)
        traces.append(dict(recording))
    report = compare(*traces, network=flux.double(), explain=True)
    (group,) = report.groups()
    assert [row.name for row in group] == [
        "prepare:times",
        "conditioning_vector:times",
    ] and "the schedule ends at 0:" in group[0].cause


def test_another_input_without_a_known_cause_has_none() -> None:
    for a, b in pairwise([DRAWN, DRAWN + 0.1, DRAWN * DRAWN]):
        assert all(cause_of(f"forward:{name}", a, b, 1e-5) is None for name in ("latents", "text", "times", "pictures"))
    assert cause_of("prepare:times", EIGHT, EIGHT[1:], 1e-5) is None
