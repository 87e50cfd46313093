"""`eridiff plan`: what a model needs on the device, before anything is loaded."""

import argparse
import json
from typing import Any

import torch

from eridiff.cli.common import DTYPES, dtype_of
from eridiff.errors import CheckpointError
from eridiff.inference import BUILT_IN, FAMILIES
from eridiff.inference.placing import MALLOC, RUNTIME, Plan, bytes_of, gib, plan_parts
from eridiff.inference.sdxl import refiner_parts
from eridiff.request import size_of
from eridiff.weights.locate import locate


def add_parser(commands: Any) -> None:
    """Put the command beside the others."""
    parser = commands.add_parser(
        "plan",
        help="say what a model needs on the device",
        description="Show what a model needs on the device, stage by stage, and with which options it fits; only headers are read.",
    )
    parser.set_defaults(run=_plan)
    parser.add_argument("model", nargs="?", metavar="PATH|ID", help="a checkpoint, a folder or a hub id")
    parser.add_argument("--refiner", metavar="PATH|ID", help="a refiner beside an SDXL base, loaded with it")
    parser.add_argument("--size", metavar="WxH", help="size of the images (the variant's)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images at once (1)")
    parser.add_argument("--steps", type=int, metavar="N", help="number of sampling steps (the variant's)")
    parser.add_argument("--cfg", type=float, metavar="X", help="scale of classifier-free guidance (the variant's)")
    parser.add_argument("--variant", help="whose defaults to use if several variants have these sizes")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the computation (the file's; float32 on a CPU with room for it)"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="where images would be computed (cuda)"
    )
    parser.add_argument(
        "--vram",
        metavar="SIZE",
        help="memory of the device, such as 24GiB: which options fit, and exit status 2 if none do",
    )
    parser.add_argument("--json", action="store_true", help="everything in bytes, as JSON")


def _plan(options: argparse.Namespace) -> int:
    if options.vram is not None:
        bytes_of(options.vram)
    parts = locate(options.model or BUILT_IN)
    kind = next((family for family in FAMILIES if family.family in parts.components), None)
    if kind is None:
        raise CheckpointError(f"'{options.model}' holds no network that generates images")
    refiner = None if options.refiner is None else refiner_parts(parts, options.refiner)
    height, width = size_of("--size", options.size) if options.size else (None, None)
    plan = plan_parts(
        kind, parts, width=width, height=height, steps=options.steps, images=options.batch, cfg_scale=options.cfg,
        variant=options.variant, dtype=dtype_of(options.dtype), device=torch.device(options.device), refiner=refiner,
    )  # fmt: skip
    if options.json:
        print(json.dumps(described(plan), indent=1))
    else:
        print("\n".join(lines(plan)))
    if options.vram is not None:
        placement = plan.placement(options.vram)
        if not options.json:
            print(f"{options.vram}: {placement.flags} fits")
    return 0


def described(plan: Plan) -> dict[str, Any]:
    """A plan as JSON holds it."""
    stages = [
        {"stage": s.name, "component": s.component, "weights": s.held, "mapped": s.mapped, "work": s.work, "kernels": s.code}
        for s in plan.stages
    ]  # fmt: skip
    placements = [
        {"offload": p.offload, "vae_rows": p.vae_rows, "peak": p.peak, "kept": p.kept, "needed": p.needed}
        for p in plan.placements
    ]
    size = {name: getattr(plan, name) for name in ("variant", "width", "height", "steps", "images", "guided")}
    return {**size, "device": plan.device, "runtime": RUNTIME[plan.device], "stages": stages, "placements": placements}


def lines(plan: Plan) -> list[str]:
    """A plan as text."""
    guided = ", guided" if plan.guided else ""
    cpu, wide = plan.device == "cpu", max(12, *(len(stage.name) + 2 for stage in plan.stages))
    found = [
        f"{plan.variant} ({plan.why}): {plan.images} of {plan.width}x{plan.height} in {plan.steps} steps{guided}",
        f"{'stage':{wide}}{'dtype':>10}{'weights':>12}{'mapped' if cpu else '':>{12 * cpu}}{'work':>12}",
    ]
    for stage in plan.stages:
        dtype = str(stage.dtype).removeprefix("torch.")
        mapped = f"{gib(stage.mapped):>12}" if cpu else ""
        found.append(f"{stage.name:{wide}}{dtype:>10}{gib(stage.held):>12}{mapped}{gib(stage.work):>12}")
    runtime = gib(RUNTIME[plan.device] + sum(stage.code for stage in plan.stages))
    if not cpu:
        found.append(f"on the device at once, with {runtime} for its runtime:")
        return [*found, *(f"  {gib(p.needed):>10}  {p.flags}" for p in plan.placements)]
    found.append(
        f"in memory at once, {runtime} of it for kernels, and some 0.3 GiB more for Python and its libraries; in brackets with "
        f"{'='.join(MALLOC)} set; {gib(plan.mapped)} stay in the mapped files:"
    )
    return [*found, *(f"  {gib(p.needed):>10} ({gib(p.needed - p.kept)})  {p.flags}" for p in plan.placements)]
