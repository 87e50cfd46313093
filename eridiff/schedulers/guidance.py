"""Guidance: functions on raw network outputs, and when they are used."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eridiff.schedulers.step import Predict

Ask = Callable[[Tensor, Any, int, Collection[int]], Tensor]  # latents, run, point, blocks to skip -> raw output


@dataclass(frozen=True)
class SkipLayers:
    """Skip-layer guidance: away from the network's prediction without some of its blocks.

    It acts after the share `start` and before the share `end` of the steps, both excluded, counted from the first that is
    run (`SkipLayerCFGDenoiser` of Stability-AI/sd3.5).
    """

    blocks: tuple[int, ...]
    scale: float
    start: float
    end: float

    def acts(self, step: int, steps: int) -> bool:
        """At a step that is counted from the first that is run; `steps` is how many the schedule has."""
        return self.start * steps < step < self.end * steps


@dataclass(frozen=True)
class Guidance:
    """How much a run is guided, and when; the defaults do not guide."""

    cfg_scale: float = 1.0
    cfg_rescale: float = 0.0  # share of the result whose deviation is restored to the positive output's
    cfg_interval: tuple[float, float] = (0.0, 1.0)  # shares of the schedule: the first step that is guided, the end
    skip_layers: SkipLayers | None = None
    batch: str = "positive_first"  # or "negative_first", or "apart" for two calls
    dtype: torch.dtype | None = None  # in which the outputs are mixed; None is their own


def within(interval: tuple[float, float], step: int, steps: int) -> bool:
    """Whether a step is in an interval of shares of the schedule, its end excluded."""
    return interval[0] <= step / steps < interval[1]


def classifier_free(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """`negative + scale * (positive - negative)` (Ho and Salimans 2022); all of one shape, scale 1 is `positive`."""
    return negative + scale * (positive - negative)


def rescaled(guided: Tensor, positive: Tensor, share: float) -> Tensor:
    """`guided` with its deviation moved towards `positive`'s, row by row (Lin et al. 2023, section 3.4); share in [0, 1]."""
    dimensions = tuple(range(1, guided.ndim))
    ratio = positive.std(dimensions, keepdim=True) / guided.std(dimensions, keepdim=True)
    return guided * (share * ratio + 1 - share)


def guided(ask: Ask, run: Any, guidance: Guidance, batch: int, steps: int, first: int = 0) -> Predict:
    """The network as a sampler asks it: one batch of positive and negative prompts where it is guided, else half of it.

    `run` holds the rows of the positive prompts, `batch` of them, then, if `guidance.cfg_scale` is not 1, the negative
    ones. The interval restricts guidance to a part of the `steps` of the schedule (Kynkäänniemi et al. 2024); a run that
    begins later, at `first`, counts skip-layer guidance from there. `Guidance.batch` turns the batch round or asks twice.
    """
    steered, skip = guidance.cfg_scale != 1, guidance.skip_layers
    if not (steered or skip):
        return lambda x, i: ask(x, run, i, ())
    positive_run = run.rows(slice(0, batch)) if steered else run
    negative_run = run.rows(slice(batch, None)) if guidance.batch == "apart" and steered else None
    if guidance.batch == "negative_first" and steered:
        run = run.rows([*range(batch, 2 * batch), *range(batch)])

    def both(x: Tensor, i: int) -> tuple[Tensor, ...]:
        """The outputs for the positive and the negative prompts."""
        if negative_run is not None:
            return ask(x, positive_run, i, ()), ask(x, negative_run, i, ())
        first, second = ask(torch.cat([x, x]), run, i, ()).chunk(2)
        return (second, first) if guidance.batch == "negative_first" else (first, second)

    def predict(x: Tensor, i: int) -> Tensor:
        place = i % steps  # points inside the steps follow behind those of the steps
        if steered and within(guidance.cfg_interval, place, steps):
            positive, negative = (out if guidance.dtype is None else out.to(guidance.dtype) for out in both(x, i))
            output = classifier_free(positive, negative, guidance.cfg_scale)
            if guidance.cfg_rescale:
                output = rescaled(output, positive, guidance.cfg_rescale)
        else:
            output = positive = ask(x, positive_run, i, ())
        if skip and skip.acts(place - first, steps):
            without = ask(x, positive_run, i, skip.blocks).to(positive.dtype)
            output = output + skip.scale * (positive - without)
        return output

    return predict
