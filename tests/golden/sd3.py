"""Stable Diffusion 3: one evaluation with every intermediate, skipped blocks, trajectories, the text of three encoders."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eridiff.inference.sd35 import joined
from eridiff.models.mmdit import MMDiT
from eridiff.schedulers.flow_match import flow_schedule
from eridiff.schedulers.guidance import Guidance, SkipLayers, guided
from eridiff.schedulers.samplers import SAMPLERS
from eridiff.schedulers.step import Past, Sampler
from eridiff.text.encoders import ClipEncoder, T5Encoder
from eridiff.trace.record import record
from eridiff.trace.shapes import fit
from tests.golden.case import Float32Sinusoid, Row, inputs_of, load_case, opened, placed, row
from tests.golden.text import Tokenizer, told, widened


def load_mmdit(case: Mapping[str, Any], dtype: torch.dtype) -> MMDiT:
    """Everything of the configuration is read off names and shapes; here it is compared with the case's."""
    model: MMDiT = opened(case).load(dtype)
    c, found = case["config"], model.config
    assert (found.depth, found.heads, found.table_side) == (c["depth"], c["num_heads"], c["pos_embed_max_size"])
    assert (found.qk_norm, list(found.dual_blocks)) == (c["qk_norm"] == "rms", c["dual_attention_layers"])
    return model


def evaluate(model: MMDiT, case: Mapping[str, Any], dtype: torch.dtype, **options: Any) -> Tensor:
    """`times` stay wide: the original takes their sinusoid in float32, and dividing by 1000 rounded before."""
    given = opened(case).arguments
    latents, text, pooled = (given[name].to(dtype) for name in ("latents", "text", "pooled"))
    with torch.no_grad(), Float32Sinusoid():
        return model(latents, text, pooled, given["times"], **options)


def run_mmdit(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    model = load_mmdit(case, dtype)
    with record(model) as recording:
        evaluate(model, case, dtype)
    rows = []
    for name, tensor in expected.items():
        if name.endswith(".float32"):
            continue
        bound = 5e-6 if dtype == torch.float32 else 1e-9 if name == "output" else 1e-6
        fitted = fit(placed(recording, name, model), tensor)
        assert fitted is not None
        rows.append(row(case, dtype, name, fitted.tensor, tensor, bound))
    return rows


def run_skip_layers(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    model, given = load_mmdit(case, dtype), inputs_of(case)
    text, pooled = both(given, dtype)
    x, times = given["x"].to(dtype), opened(case).arguments["times"]
    batch = len(x)
    with torch.no_grad(), Float32Sinusoid():
        run = model.prepare(text, pooled, times.repeat(2)[None], grid_of(x))
        positive, negative = run.rows(slice(0, batch)), run.rows(slice(batch, None))
        found = {"output": model.step(x, positive, 0), "output.negative": model.step(x, negative, 0)}
    for name in expected:
        if name.startswith("output.skip_"):
            blocks = [int(index) for index in name.removeprefix("output.skip_").split("_")]
            with record(model) as recording:
                found[name] = evaluate(model, case, dtype, skip_blocks=blocks)
            found[name.replace("output", "final_layer.in", 1)] = recording["final.linear:0"]
    skip = SkipLayers(tuple(case["skip_blocks"]), case["slg_scale"], -1.0, 1.0)
    with torch.no_grad():
        steered = guided(model.step, run, Guidance(case["cfg"], skip_layers=skip), batch, steps=1)
        found["guided"] = steered(x, 0)
    bound = 5e-6 if dtype == torch.float32 else 1e-9
    return [
        row(case, dtype, name, found[name], tensor, max(bound, 1e-6) if name.startswith("final_layer.in") else bound)
        for name, tensor in expected.items()
    ]


def both(given: Mapping[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Text and pooled vector of the positive prompts, then of the negative ones."""
    return [torch.cat([given[n], given[f"{n}_negative"]]).to(dtype) for n in ("context", "y")]


def grid_of(x: Tensor) -> tuple[int, int]:
    return x.shape[2] // 2, x.shape[3] // 2


def run_sd3_trajectory(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    model, given = load_mmdit(case, dtype), inputs_of(case)
    return [found for run in case["runs"] for found in _trajectory(case, run, model, given, expected, dtype)]


def _trajectory(
    case: Mapping[str, Any], run: Mapping[str, Any], model: MMDiT, given: Mapping[str, Tensor],
    expected: Mapping[str, Tensor], dtype: torch.dtype,
) -> list[Row]:  # fmt: skip
    """One run on the reference's own float32 table; `denoise` begins from an image with as much noise."""
    name = run["name"]
    schedule = flow_schedule(expected[f"{name}.sigmas"])
    sampler: Sampler = SAMPLERS[run["sampler"]]
    skip = run.get("slg") and SkipLayers(
        tuple(run["slg"]["layers"]), *(run["slg"][k] for k in ("scale", "start", "end"))
    )
    text, pooled = both(given, dtype)
    x = given["noise"].to(dtype)
    rows: list[Row] = []
    past: list[Past] = []
    if "denoise" in run:
        sigma = float(schedule.sigmas[0])
        x = sigma * x + (1 - sigma) * given["init_latent"].to(dtype)
        rows.append(row(case, dtype, f"{name}.x_start", x, expected[f"{name}.x_start"], 1e-8 if dtype == torch.float64 else 1e-5))  # fmt: skip
    with torch.no_grad(), Float32Sinusoid():
        prepared = model.prepare(text, pooled, schedule.times, grid_of(x))
        if run["cfg"] == 1:
            prepared = prepared.rows(slice(0, len(x)))
        predict = guided(model.step, prepared, Guidance(run["cfg"], skip_layers=skip), len(x), steps=run["steps"])
        for i in range(schedule.steps):
            x, seen = sampler(predict, x, schedule, i, past, None)
            past.append(seen)
            for kind, tensor in (("x", x), ("denoised", seen[0])):
                bound = 1e-5 if dtype == torch.float32 else 1e-8 if kind == "x" else 1e-6
                rows.append(row(case, dtype, f"{name}.{kind}.{i}", tensor, expected[f"{name}.{kind}.{i}"], bound))
    out = x / case["scale_factor"] + case["shift_factor"]
    rows.append(row(case, dtype, f"{name}.latent_out", out, expected[f"{name}.latent_out"], rows[-2].bound))
    return rows


def run_sd3_text(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    c = case["config"]
    configs = {"clip": told(c["clip_l"]), "clip_g": told(c["clip_g"]), "t5": {}}
    modules = load_case(case, configs, dtype, stored=torch.float32)  # as this reference had them: it rounds the gains
    clip, clip_g = (ClipEncoder(m, Tokenizer(c[n])) for m, n in zip(modules, ("clip_l", "clip_g"), strict=False))
    rows = []
    for wide in (False, True) if dtype == torch.float64 else (False,):
        exact = 1e-9 if wide and widened(modules[2]) else 1e-6
        for number, (prompt, ids) in enumerate(case["token_ids"].items()):
            first, second = clip(torch.tensor([ids["l"]])), clip_g(torch.tensor([ids["g"]]))
            features = T5Encoder(modules[2], Tokenizer(c["t5xxl"]), len(ids["t5"]))(torch.tensor([ids["t5"]]))
            found = joined(first, second, features, features.shape[-1])
            mark = f"{prompt}." if number else ""  # the first prompt's are stored without its name
            tensors = {f"{mark}context": found.text, f"{mark}pooled": found.pooled}
            if not number:
                tensors |= {
                    "clip_l.pooled": first.pooled, "clip_g.pooled": second.projected, "clip_g.pooled_before_projection": second.pooled,
                }  # fmt: skip
                for encoder, seen in (("clip_l", first), ("clip_g", second)):
                    tensors |= {f"{encoder}.layers.{i}": state for i, state in enumerate(seen.hidden[1:])}
                    tensors |= {
                        f"{encoder}.embeddings": seen.hidden[0], f"{encoder}.penultimate": seen.hidden[-2],
                        f"{encoder}.last_hidden": seen.last,
                    }  # fmt: skip
            for name in (n for n in tensors if n in expected):
                stored = expected[name].dtype == torch.float64
                bound = 1e-5 if dtype == torch.float32 else 1e-6 if not stored else exact if "context" in name else 1e-9
                label = name + (", wide mean square" if wide else "")
                rows.append(row(case, dtype, label, tensors[name], expected[name], bound))
    return rows
