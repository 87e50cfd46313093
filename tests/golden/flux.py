"""Flux: one evaluation with every intermediate, and whole trajectories."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eridiff.models.flux import Flux, fill_condition, patchify, position_ids, unpatchify
from eridiff.schedulers.flow_match import flux_schedule
from eridiff.schedulers.samplers import euler
from eridiff.trace.record import record
from tests.golden.case import Float32Sinusoid, Row, inputs_of, load_case, placed, row


def load_flux(case: Mapping[str, Any], dtype: torch.dtype) -> Flux:
    c = case["config"]
    config = {"rope_axes": c["axes_dim"], "theta": c["theta"], "heads": c["num_heads"]}
    (model,) = load_case(case, {"flux": config}, dtype)
    return model


def run_flux(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    model, given = load_flux(case, dtype), inputs_of(case)
    ids = position_ids(tuple(case["grid"]))
    if "reference_grid" in case:
        ids = torch.cat([ids, position_ids(tuple(case["reference_grid"]), index=1)])
    guidance = given.get("guidance") if model.config.guidance else None
    if "mask" in given:
        condition = fill_condition(given["masked_image"], (given["mask"] > 0).double())
        given["img"] = torch.cat([patchify(given["latents"]), condition], dim=-1)
    image, text, pooled = (given[n].to(dtype) for n in ("img", "txt", "y"))
    times = given["timesteps"][None].to(dtype)
    guidance = None if guidance is None else guidance.to(dtype)
    with torch.no_grad(), record(model) as recording:
        model(image, text, pooled, times, guidance=guidance, ids=ids)
    large_guidance = guidance is not None and float(guidance.max()) > 10
    time_bound = 1e-3 if large_guidance else 1e-4
    static = ("image_in", "text_in", "pooled", "rope.cos", "rope.sin", "packed")
    rows = []
    for name in case["intermediates"]:
        wide = dtype == torch.float64
        bound = 1e-9 if wide and name == "out" else 1e-6 if wide or name in static else time_bound
        found = placed(recording, name, model)
        found = found.expand_as(expected[name]) if name.startswith("rope.") else found
        rows.append(row(case, dtype, name, found.reshape(expected[name].shape), expected[name], bound))
    if "out.sinusoid_float32" in expected:
        with torch.no_grad(), Float32Sinusoid() if dtype == torch.float64 else torch.no_grad():
            out = model(image, text, pooled, times, guidance=guidance, ids=ids)
        bound = 1e-6 if dtype == torch.float64 else 1e-5
        rows.append(row(case, dtype, "out.sinusoid_float32", out, expected["out.sinusoid_float32"], bound))
    return rows


def run_trajectory(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    model, given = load_flux(case, dtype), inputs_of(case)
    height, width = case["image_size"]
    grid = (-(-height // 16), -(-width // 16))
    schedule = flux_schedule(case["steps"], grid[0] * grid[1], shift=case["shift"])
    guidance = torch.full((1,), case["guidance"], dtype=dtype) if model.config.guidance else None
    rows = []
    with torch.no_grad():
        for narrow in (False, True):
            context = Float32Sinusoid() if narrow and dtype == torch.float64 else torch.no_grad()
            with context:
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
