"""`python -m tests.golden FOLDER...`: run golden cases through the ordinary loader and print a table of errors.

Each case's weights are rebuilt by `hashfill`, written in the original layout, loaded by `eridiff.weights`, and run in
float64 and float32. Exit code 1 when a tolerance is exceeded, 2 when a folder is no case.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from eridiff.models import flux as flux_module
from eridiff.models.flux import Flux, fill_condition, patchify, position_ids, unpatchify
from eridiff.schedulers.flow_match import flux_schedule
from eridiff.schedulers.samplers import euler
from eridiff.text.encoders import ClipEncoder, T5Encoder, build_encoder
from eridiff.trace.record import record, relative_l2
from eridiff.weights.detect import component_of
from eridiff.weights.header import open_checkpoint
from eridiff.weights.load import build
from eridiff.weights.save import write_tensors
from tests.hashfill import parameter, value


@dataclass(frozen=True)
class Row:
    """One comparison: relative L2 distance and the bound it must keep."""

    case: str
    dtype: str
    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


def run_case(folder: Path, dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32)) -> list[Row]:
    """Every comparison of a case folder; raises ValueError for a folder that is no case this runner knows."""
    if not (folder / "case.json").is_file():
        raise ValueError(f"{folder} holds no case.json")
    case = json.loads((folder / "case.json").read_text())
    expected = load_file(folder / "expected.safetensors")
    name = case["case"]
    runner = next((r for start, r in RUNNERS.items() if name.startswith(start)), None)
    if runner is None:
        raise ValueError(f"{folder} is a case of a kind that this runner does not know: {name}")
    return [row for dtype in dtypes for row in runner(case, expected, dtype)]


def load_case(case: Mapping[str, Any], network: str, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The case's weights through a file in the original layout and the loader."""
    tensors = {
        name: torch.from_numpy(parameter(name, tuple(shape), case["salt"], case["overrides"]))
        for name, shape in case["parameters"]
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.safetensors"
        write_tensors(tensors, path, {"eridiff.config": json.dumps({network: config})})
        component = component_of(open_checkpoint(path), network)
        builder = build_encoder if network in ("clip", "t5") else build
        return builder(component, dtype=dtype)


def inputs_of(case: Mapping[str, Any]) -> dict[str, Tensor]:
    result = {}
    for item in case["inputs"]:
        given = item.get("values")
        array = given if given is not None else value(item["name"], tuple(item["shape"]), case["salt"], item["scale"])
        result[item["name"]] = torch.as_tensor(
            array, dtype=None if given and isinstance(given[0], list) else torch.float64
        )
    return result


def load_flux(case: Mapping[str, Any], dtype: torch.dtype) -> Flux:
    c = case["config"]
    return load_case(case, "flux", {"rope_axes": c["axes_dim"], "theta": c["theta"], "heads": c["num_heads"]}, dtype)


def float32_sinusoid(times: Tensor, width: int = 256) -> Tensor:
    """The originals' order: times 1000 in the times' dtype, then float32; float64 out."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2, dtype=torch.float32) / (width // 2))
    angles = (1000.0 * times).float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).double()


class Float32Sinusoid:
    """Within the block, Flux's sinusoid is computed in float32 whatever the network's dtype, as the originals do."""

    def __enter__(self) -> None:
        self.wide = flux_module.timestep_sinusoid
        flux_module.timestep_sinusoid = float32_sinusoid

    def __exit__(self, *_: object) -> None:
        flux_module.timestep_sinusoid = self.wide


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
        out = model(image, text, pooled, times, guidance=guidance, ids=ids)
        run = model.prepare(text, pooled, times, guidance=guidance, ids=ids)
        recording["vec"] = model.conditioning_vector(pooled, times, guidance)
    recording |= {"out": out, "packed": image, "rope.cos": run.rope[0], "rope.sin": run.rope[1]}
    large_guidance = guidance is not None and float(guidance.max()) > 10
    time_bound = 1e-3 if large_guidance else 1e-4
    static = ("image_in", "text_in", "pooled", "rope.cos", "rope.sin", "packed")
    rows = []
    for name in case["intermediates"]:
        wide = dtype == torch.float64
        bound = 1e-9 if wide and name == "out" else 1e-6 if wide or name in static else time_bound
        found = flux_intermediate(recording, name)
        found = found.expand_as(expected[name]) if name.startswith("rope.") else found
        rows.append(row(case, dtype, name, found.reshape(expected[name].shape), expected[name], bound))
    if "out.sinusoid_float32" in expected:
        with torch.no_grad(), Float32Sinusoid() if dtype == torch.float64 else torch.no_grad():
            out = model(image, text, pooled, times, guidance=guidance, ids=ids)
        bound = 1e-6 if dtype == torch.float64 else 1e-5
        rows.append(row(case, dtype, "out.sinusoid_float32", out, expected["out.sinusoid_float32"], bound))
    return rows


def flux_intermediate(recording: Mapping[str, Tensor], name: str) -> Tensor:
    """A golden's tensor among what was recorded: module outputs, else inputs of a module."""
    derived = {
        "time": "time_in", "guidance": "guidance_in", "pooled": "pooled_in",
        "time.sinusoid": "time_in:0", "guidance.sinusoid": "guidance_in:0", "final.modulated": "final.linear:0",
    }  # fmt: skip
    ends = {
        ".attention_in": ".qkv:0", ".mlp_in": ".mlp:0", ".q_rope": ".attention:0", ".k_rope": ".attention:1",
    }  # fmt: skip
    if name in derived:
        return recording[derived[name]]
    for end, place in ends.items():
        if name.endswith(end):
            return recording[name.removesuffix(end) + place]
    block = name.removesuffix(".image").removesuffix(".text")
    if name.startswith("double_blocks.") and name != block and name.count(".") == 2:
        return recording[f"{block}.{0 if name.endswith('.image') else 1}"]
    return recording[name]


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
                x = euler(x, velocity, schedule, i)
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


def run_autoencoder(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    config = {"scale": case["config"]["scale_factor"], "shift": case["config"]["shift_factor"]}
    model, given = load_case(case, "vae", config, dtype), inputs_of(case)
    picture, latents, noise = (given[n].to(dtype) for n in ("image", "latents", "noise"))
    with torch.no_grad(), record(model) as recording:
        mean, log_variance = model.moments(picture)
        recording |= {
            "moments": torch.cat([mean, log_variance], 1),
            "mode": mean,
            "latents.mode": model.encode(picture),
            "latents.sample": model.encode(picture, noise),
            "decoded": model.decode(latents),
        }
    rows = []
    for name, tensor in expected.items():
        if name.endswith(".float32"):
            continue
        found = recording[name.replace("nin_shortcut", "shortcut")]
        output = name in ("moments", "mode", "latents.mode", "latents.sample", "decoded")
        bound = 1e-5 if dtype == torch.float32 else 1e-9 if output else 1e-6
        rows.append(row(case, dtype, name, found, tensor, bound))
    return rows


def run_clip(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    c = case["config"]
    module = load_case(case, "clip", {"num_attention_heads": c["num_heads"], "hidden_act": c["hidden_act"]}, dtype)
    tokenizer = SimpleNamespace(eos_token_id=c["eos_token_id"])
    encoder = ClipEncoder(module, _Sized(tokenizer, c["vocab_size"]))
    found = encoder(torch.tensor(case["inputs"][0]["values"]))
    outputs = {"last": found.last, "pooled": found.pooled, "projected": found.projected}
    outputs |= {f"hidden.{i}": tensor for i, tensor in enumerate(found.hidden[:-1])}
    return [
        row(case, dtype, name, tensor, expected[name], 5e-6 if dtype == torch.float32 else _text_bound(expected[name]))
        for name, tensor in outputs.items()
        if name in expected
    ]


def run_t5(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    module = load_case(case, "t5", {}, dtype)
    encoder = T5Encoder(module, _Sized(SimpleNamespace(), case["config"]["vocab_size"]), 150)
    ids = torch.tensor(case["inputs"][0]["values"])
    rows = [row(case, dtype, "output", encoder(ids), expected["output"], 5e-6 if dtype == torch.float32 else 1e-6)]
    if dtype == torch.float64:  # transformers takes T5's mean square in float32 whatever the input; here it is not
        for layer in module.modules():
            if type(layer).__name__ == "T5LayerNorm":
                layer.forward = partial(_wide_norm, layer)
        fused = module.config._attn_implementation == "sdpa"  # eager attention, before 5.15, has a float32 softmax
        name, bound = "output, wide mean square", 1e-10 if fused else 1e-6
        rows.append(row(case, dtype, name, encoder(ids), expected["output"], bound))
    return rows


def _wide_norm(layer: Any, x: Tensor) -> Tensor:
    return layer.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + layer.variance_epsilon)


def _text_bound(expected: Tensor) -> float:
    """Outputs are stored in float64, intermediates in float32."""
    return 1e-10 if expected.dtype == torch.float64 else 1e-6


class _Sized:
    """A tokenizer of a case: its ids are given, only its size is asked."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        self.tokenizer, self.size = tokenizer, size

    def __len__(self) -> int:
        return self.size

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def row(case: Mapping[str, Any], dtype: torch.dtype, name: str, found: Tensor, expected: Tensor, bound: float) -> Row:
    return Row(case["case"], str(dtype).removeprefix("torch."), name, relative_l2(found, expected), bound)


RUNNERS = {
    "flux-": run_flux, "traj-flux": run_trajectory, "ae-": run_autoencoder, "text-clip-": run_clip, "text-t5-": run_t5,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.golden", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--all", action="store_true", help="print every row, not only the outputs and what failed")
    options = parser.parse_args(arguments)
    failed = False
    for folder in options.folders:
        try:
            rows = run_case(folder)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        failed |= not all(r.passed for r in rows)
        for r in rows:
            if options.all or not r.passed or r.name in ("out", "moments", "decoded", "last", "pooled", "output"):
                print(
                    f"{r.case:22} {r.dtype:8} {r.name:40} {r.error:9.1e} {r.bound:8.0e} {'ok' if r.passed else 'BAD'}"
                )
        print(f"{folder.name}: {sum(r.passed for r in rows)} of {len(rows)} within their bounds")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
