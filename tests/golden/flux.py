"""Flux: one evaluation with every intermediate, and whole trajectories."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from eridiff.models.flux import patchify, unpatchify
from eridiff.schedulers.flow_match import flux_schedule
from eridiff.schedulers.samplers import euler
from eridiff.trace.record import record
from eridiff.trace.replay import arguments_run
from tests.golden.case import Float32Sinusoid, Row, inputs_of, opened, placed, row


def run_flux(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    model, arguments = opened(case).load(dtype), opened(case).arguments
    ask, wide = arguments_run(arguments, dtype), dtype == torch.float64
    with torch.no_grad(), record(model) as recording:
        ask(model)
    guidance = arguments["guidance"]
    time_bound = 1e-3 if guidance is not None and float(guidance.max()) > 10 else 1e-4
    static = ("image_in", "text_in", "pooled", "rope.cos", "rope.sin", "packed")
    rows = []
    for name in case["intermediates"]:
        bound = 1e-9 if wide and name == "out" else 1e-6 if wide or name in static else time_bound
        found = placed(recording, name, model)
        found = found.expand_as(expected[name]) if name.startswith("rope.") else found
        rows.append(row(case, dtype, name, found.reshape(expected[name].shape), expected[name], bound))
    if "out.sinusoid_float32" in expected:
        with torch.no_grad(), Float32Sinusoid() if wide else nullcontext():
            out = ask(model)
        bound = 1e-6 if wide else 1e-5
        rows.append(row(case, dtype, "out.sinusoid_float32", out, expected["out.sinusoid_float32"], bound))
    return rows


def run_trajectory(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    model, given = opened(case).load(dtype), inputs_of(case)
    batch, _, height, width = given["noise"].shape
    grid = (height // 2, width // 2)
    schedule = flux_schedule(case["steps"], grid[0] * grid[1], shift=case["shift"])
    guidance = torch.full((batch,), case["guidance"], dtype=dtype) if model.config.guidance else None
    rows = []
    with torch.no_grad():
        for narrow in (False, True):
            with Float32Sinusoid() if narrow and dtype == torch.float64 else nullcontext():
                text, pooled = given["txt"].to(dtype), given["y"].to(dtype)
                run = model.prepare(text, pooled, schedule.times.to(dtype), grid, guidance)
            x, mark = patchify(given["noise"]).to(dtype), "sinusoid_float32." if narrow else ""
            for i in range(schedule.steps):
                velocity = model.step(x, run, i)
                x, _ = euler(lambda *_, velocity=velocity: velocity, x, schedule, i)
                bound = (1e-6 if narrow else 1e-9) if dtype == torch.float64 else (3e-5 if narrow else 2e-4)
                name = f"{mark}latents.packed.{i + 1}"
                if name in expected:
                    rows.append(row(case, dtype, name, x, expected[name], bound))
                if f"velocity.{i}" in expected and not narrow:
                    rows.append(
                        row(case, dtype, f"velocity.{i}", velocity, expected[f"velocity.{i}"], max(bound, 1e-6))
                    )
            name = "out.sinusoid_float32" if narrow else "out"
            if name in expected:
                rows.append(row(case, dtype, name, unpatchify(x, grid), expected[name], bound))
    return rows
