"""Stable Diffusion 3: one evaluation with every intermediate, skipped blocks, trajectories, the text of three encoders."""

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from eridiff.inference.sd35 import joined
from eridiff.models.mmdit import MMDiT
from eridiff.schedulers.flow_match import flow_schedule
from eridiff.schedulers.guidance import Guidance, SkipLayers, guided
from eridiff.schedulers.samplers import SAMPLERS, Sampler
from eridiff.text.encoders import ClipEncoder, T5Encoder
from eridiff.trace.record import record
from eridiff.trace.shapes import fit
from tests.golden.case import Float32Sinusoid, Row, inputs_of, load_case, placed, row
from tests.golden.text import Sized, wide_norm


def load_mmdit(case: Mapping[str, Any], dtype: torch.dtype) -> MMDiT:
    """Everything of the configuration is read off names and shapes; here it is compared with the case's."""
    (model,) = load_case(case, {"mmdit": {}}, dtype)
    c, found = case["config"], model.config
    assert (found.depth, found.heads, found.table_side) == (c["depth"], c["num_heads"], c["pos_embed_max_size"])
    assert (found.qk_norm, list(found.dual_blocks)) == (c["qk_norm"] == "rms", c["dual_attention_layers"])
    return model


def evaluate(model: MMDiT, given: Mapping[str, Tensor], dtype: torch.dtype, kind: str = "", **options: Any) -> Tensor:
    x, text, pooled = (given[name].to(dtype) for name in ("x", f"context{kind}", f"y{kind}"))
    with torch.no_grad(), Float32Sinusoid():
        return model(x, text, pooled, given["t"][None] / 1000, **options)


def run_mmdit(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    model, given = load_mmdit(case, dtype), inputs_of(case)
    with record(model) as recording:
        evaluate(model, given, dtype)
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
    found = {"output": evaluate(model, given, dtype), "output.negative": evaluate(model, given, dtype, "_negative")}
    for name in expected:
        if name.startswith("output.skip_"):
            blocks = [int(index) for index in name.removeprefix("output.skip_").split("_")]
            with record(model) as recording:
                found[name] = evaluate(model, given, dtype, skip_blocks=blocks)
            found[name.replace("output", "final_layer.in", 1)] = recording["final.linear:0"]

    text, pooled = (torch.cat([given[n], given[f"{n}_negative"]]).to(dtype) for n in ("context", "y"))
    with torch.no_grad(), Float32Sinusoid():
        run = model.prepare(text, pooled, given["t"] / 1000, (2, 3))
        guidance = Guidance(case["cfg"], skip_layers=SkipLayers((1, 2), case["slg_scale"], -1.0, 1.0))
        found["guided"] = guided(model.step, run, guidance, batch=1, steps=1)(given["x"].to(dtype), 0)
    bound = 5e-6 if dtype == torch.float32 else 1e-9
    return [
        row(case, dtype, name, found[name], tensor, max(bound, 1e-6) if name.startswith("final_layer.in") else bound)
        for name, tensor in expected.items()
    ]


def run_sd3_trajectory(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    model, given = load_mmdit(case, dtype), inputs_of(case)
    return [found for run in case["runs"] for found in _trajectory(case, run, model, given, expected, dtype)]


def _trajectory(
    case: Mapping[str, Any], run: Mapping[str, Any], model: MMDiT, given: Mapping[str, Tensor],
    expected: Mapping[str, Tensor], dtype: torch.dtype,
) -> list[Row]:  # fmt: skip
    """One run on the reference's own float32 table; `denoise` begins from a picture with as much noise."""
    name = run["name"]
    schedule = flow_schedule(expected[f"{name}.sigmas"])
    sampler: Sampler = SAMPLERS[run["sampler"]]
    skip = run.get("slg") and SkipLayers(
        tuple(run["slg"]["layers"]), *(run["slg"][k] for k in ("scale", "start", "end"))
    )
    text, pooled = (torch.cat([given[n], given[f"{n}_negative"]]).to(dtype) for n in ("context", "y"))
    x = given["noise"].to(dtype)
    rows, previous = [], None
    if "denoise" in run:
        sigma = float(schedule.sigmas[0])
        x = sigma * x + (1 - sigma) * given["init_latent"].to(dtype)
        rows.append(row(case, dtype, f"{name}.x_start", x, expected[f"{name}.x_start"], 1e-8 if dtype == torch.float64 else 1e-5))  # fmt: skip
    grid = (x.shape[2] // 2, x.shape[3] // 2)
    with torch.no_grad(), Float32Sinusoid():
        prepared = model.prepare(text, pooled, schedule.times, grid)
        predict = guided(model.step, prepared, Guidance(run["cfg"], skip_layers=skip), batch=1, steps=run["steps"])
        if run["cfg"] == 1:
            predict = guided(model.step, prepared.rows(slice(0, 1)), Guidance(), batch=1, steps=run["steps"])
        for i in range(schedule.steps):
            x, previous = sampler(predict, x, schedule, i, previous)
            for kind, tensor in (("x", x), ("denoised", previous)):
                bound = 1e-5 if dtype == torch.float32 else 1e-8 if kind == "x" else 1e-6
                rows.append(row(case, dtype, f"{name}.{kind}.{i}", tensor, expected[f"{name}.{kind}.{i}"], bound))
    out = x / 1.5305 + 0.0609
    rows.append(row(case, dtype, f"{name}.latent_out", out, expected[f"{name}.latent_out"], rows[-2].bound))
    return rows


def run_sd3_text(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    c = case["config"]
    configs: dict[str, dict[str, Any]] = {"clip": {}, "clip_g": {}, "t5": {}}
    for network, key in (("clip", "clip_l"), ("clip_g", "clip_g")):
        configs[network] = {name: c[key][name] for name in ("hidden_act", "num_attention_heads")}
    modules = load_case(case, configs, dtype, stored=torch.float32)  # as this reference had them: it rounds the gains
    tokenizer = Sized(SimpleNamespace(eos_token_id=49407), 49408)
    clip, clip_g = ClipEncoder(modules[0], tokenizer), ClipEncoder(modules[1], tokenizer, pad=0, name="CLIP-G")
    t5 = T5Encoder(modules[2], Sized(SimpleNamespace(), c["t5xxl"]["vocab_size"]), 77)
    rows = []
    for wide in (False, True):
        if wide and dtype == torch.float32:
            continue
        if wide:  # transformers takes T5's mean square in float32 whatever the input; here it is not
            for layer in modules[2].modules():
                if type(layer).__name__ == "T5LayerNorm":
                    layer.forward = partial(wide_norm, layer)
        fused = modules[2].config._attn_implementation == "sdpa"  # eager T5 attention has a float32 softmax
        exact = 1e-9 if wide and fused else 1e-6
        for prompt, ids in case["token_ids"].items():
            first, second = clip(torch.tensor([ids["l"]])), clip_g(torch.tensor([ids["g"]]))
            features = t5(torch.tensor([ids["t5"]]))
            found = joined(first, second, features, features.shape[-1])
            mark = "" if prompt == "positive" else f"{prompt}."
            tensors = {f"{mark}context": found.text, f"{mark}pooled": found.pooled}
            if prompt == "positive":
                tensors |= {
                    "clip_l.penultimate": first.hidden[-2], "clip_l.pooled": first.pooled, "clip_g.pooled": second.projected,
                    "clip_l.last_hidden": first.last, "clip_g.penultimate": second.hidden[-2], "clip_g.last_hidden": second.last,
                    "clip_g.pooled_before_projection": second.pooled, "clip_l.embeddings": first.hidden[0],
                    "clip_l.layers.0": first.hidden[1], "clip_g.embeddings": second.hidden[0],
                    "clip_g.layers.0": second.hidden[1], "clip_g.layers.1": second.hidden[2],
                }  # fmt: skip
            for name, tensor in tensors.items():
                stored = expected[name].dtype == torch.float64
                bound = 1e-5 if dtype == torch.float32 else 1e-6 if not stored else exact if "context" in name else 1e-9
                rows.append(
                    row(case, dtype, name + (", wide mean square" if wide else ""), tensor, expected[name], bound)
                )
    return rows
