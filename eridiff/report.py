"""What a file or folder is, every key checked, without filling anything."""

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from eridiff.errors import CheckpointError, LoraError
from eridiff.lora.deltas import kind_of
from eridiff.lora.formats import Source, sort_names
from eridiff.lora.hints import FAMILIES, WIDTHS
from eridiff.models import flux, mmdit, unet
from eridiff.text.encoders import empty
from eridiff.weights.detect import DESCRIPTIONS, Component
from eridiff.weights.header import open_checkpoint
from eridiff.weights.load import plan
from eridiff.weights.locate import locate

PRESETS: Mapping[str, Mapping[str, Any]] = {"flux": flux.PRESETS, "mmdit": mmdit.PRESETS, "unet": unet.PRESETS}
MODELS = {"flux": "flux-dev", "mmdit": "sd3.5-large", "unet": "sdxl-base"}  # what `eridiff lora check` may compare with
SPELLINGS = {  # what the names of a LoRA file look like -> whose they are
    "kohya": r"^lora_(unet|te\d?|transformer)_", "peft": r"\.lora_[AB]\b", "diffusers": r"\.lora\.(up|down)\.|_lora\.(up|down)\.",
    "LyCORIS": r"^lycoris_",
}  # fmt: skip


def inspect(path: str | os.PathLike[str], *, values: bool = False, keys: bool = False) -> dict[str, Any]:
    """A report that JSON can hold: components with layout, configuration, dtypes and counts, metadata, and problems.

    - values: read every weight and name those with values that are not finite.
    - keys: list every tensor of the file, with its dtype, its shape and eridiff's name.

    Raises CheckpointError for a file that no model could be read from; a model with missing or unknown keys is a problem in the
    report.
    """
    parts = locate(path)
    components, problems = [], []
    for component in parts.components.values():
        natives: dict[str, list[str]] = {}
        try:
            for entry in _plan(component):
                for name in entry.foreign:
                    if name in component.keys:
                        natives.setdefault(name, []).append(entry.native)
        except CheckpointError as error:
            natives = {}
            problems.append(str(error))
        components.append(_described(component, list(natives)))
        if keys:
            components[-1]["keys"] = _keys(component, natives)
        if values:
            problems += _not_finite(component)
    return {
        "path": os.fspath(path),
        "components": components,
        "tokenizers": {kind: str(folder) for kind, folder in parts.tokenizers.items()},
        "problems": problems,
    }


def inspect_lora(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """A report on a LoRA file that JSON can hold: family, spelling, kinds, ranks, modules; None for all other files.

    The network it is for is guessed from names and widths. Raises CheckpointError for a damaged file.
    """
    if not Path(path).is_file():
        return None
    checkpoint = open_checkpoint(Path(path))
    try:
        sources, _ = sort_names(list(checkpoint.tensors))
    except LoraError:
        return None
    factored = {
        key: source for key, source in sources.items() if kind_of(set(source.names)) in ("lora", "loha", "lokr", "ia3")
    }
    if not factored:
        return None
    keys = [key.replace(".", "_") for key in factored]
    network = next((n for pattern, _, n in FAMILIES if n in MODELS and any(re.search(pattern, k) for k in keys)), None)
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    widths = Counter(
        shapes[s.names["down"]][1] for s in factored.values() if len(shapes.get(s.names.get("down", ""), ())) > 1
    )
    made = (WIDTHS[network].get(width) for width, _ in widths.most_common()) if network else ()
    spelling = (name for name, pattern in SPELLINGS.items() if any(re.search(pattern, n) for n in checkpoint.tensors))
    return {
        "file": os.fspath(path),
        "network": network,
        "made_for": next(filter(None, made), None),
        "names": next(spelling, None),
        "kinds": dict(Counter(kind_of(set(source.names)) for source in sources.values())),
        "ranks": dict(Counter(rank for source in factored.values() if (rank := _rank(source, shapes)))),
        "modules": len(sources),
        "dtypes": dict(Counter(str(entry.dtype).removeprefix("torch.") for entry in checkpoint.tensors.values())),
        "metadata": dict(checkpoint.metadata),
    }


def _rank(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The inner size of a module's product."""
    name = next(
        (source.names[role] for role in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if role in source.names), None
    )
    return shapes[name][0] if name and shapes[name] else None


def lora_summary(report: Mapping[str, Any]) -> str:
    """The report on a LoRA for a person."""
    what = DESCRIPTIONS[report["network"]].split(" ", 1)[1] if report["network"] else "an unknown network"
    made = f" ({report['made_for']})" if report["made_for"] else ""
    names = f", with {report['names']} names" if report["names"] else ""
    kinds = ", ".join(f"{count} {kind}" for kind, count in report["kinds"].items())
    ranks = f"rank {', '.join(map(str, sorted(report['ranks'])))}" if report["ranks"] else "no rank"
    model = MODELS.get(report["network"], "MODEL")
    return (
        f"{Path(report['file']).name}: a LoRA for {what}{made}{names}\n"
        f"  {report['modules']} modules: {kinds}; {ranks}; {', '.join(report['dtypes'])}\n"
        f"  eridiff lora check {report['file']} --model {model} shows what becomes of each module"
    )


def _keys(component: Component, natives: Mapping[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Every tensor of a component as its file names it."""
    found = {}
    for name in sorted(component.keys):
        entry = component.checkpoint.tensors[component.prefix + name]
        dtype = str(entry.dtype).removeprefix("torch.")
        found[component.prefix + name] = {"dtype": dtype, "shape": list(entry.shape), "native": natives.get(name, [])}
    return found


def _plan(component: Component) -> Any:
    module = empty(component)
    shapes = {name: tuple(t.shape) for name, t in module.state_dict().items() if name != "encoder.embed_tokens.weight"}
    return plan(component, shapes)


def _described(component: Component, used: list[str]) -> dict[str, Any]:
    entries = {name: component.checkpoint.tensors[component.prefix + name] for name in sorted(component.keys)}
    config = component.config if isinstance(component.config, dict) else vars(component.config)
    metadata = {
        key: text if len(text) <= 200 else text[:200] + "..." for key, text in component.checkpoint.metadata.items()
    }
    return {
        "network": component.network,
        "what": DESCRIPTIONS[component.network],
        "file": str(component.checkpoint.path),
        "layout": component.layout.name,
        "prefix": component.prefix,
        "tensors": len(entries),
        "used": len(set(used)),
        "unused": sorted(component.keys - set(used)),
        "parameters": sum(torch.Size(e.shape).numel() for e in entries.values()),
        "bytes": sum(e.end - e.begin for e in entries.values()),
        "dtypes": dict(Counter(str(e.dtype).removeprefix("torch.") for e in entries.values())),
        "config": dict(config),
        "presets": [name for name, preset in PRESETS.get(component.network, {}).items() if preset == component.config],
        "metadata": metadata,
        "notices": list(component.notices),
    }


def _not_finite(component: Component) -> list[str]:
    found = []
    for name in sorted(component.keys):
        tensor = component.checkpoint.read(component.prefix + name)
        bad = int((~torch.isfinite(tensor.float())).sum()) if tensor.dtype.is_floating_point else 0
        if bad:
            found.append(
                f"{component.checkpoint.path}: '{component.prefix + name}' has {bad} values that are not finite"
            )
    return found


def summary(report: dict[str, Any]) -> str:
    """The report for a person: a line or two a component, then what is wrong."""
    lines = []
    for c in report["components"]:
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in c["dtypes"].items())
        prefix = f", prefix '{c['prefix']}'" if c["prefix"] else ""
        sizes = f" of the sizes of {', '.join(c['presets'])}" if c["presets"] else ""
        lines.append(f"{Path(c['file']).name}: {c['what']}{sizes}, {c['layout']} layout{prefix}")
        lines.append(
            f"  {c['parameters']:,} parameters, {c['bytes']:,} bytes, tensors: {dtypes}; {c['used']} of {c['tensors']} fill the network"
        )
        lines.append("  " + ", ".join(f"{key} {value}" for key, value in c["config"].items()))
        lines += [f"  note: {notice}" for notice in c["notices"]]
        for name, key in c.get("keys", {}).items():
            lines.append(f"  {name}  {key['dtype']} {key['shape']}  {', '.join(key['native']) or 'unused'}")
    lines += [f"tokenizer of {kind}: {folder}" for kind, folder in report["tokenizers"].items()]
    lines += [f"problem: {problem}" for problem in report["problems"]]
    return "\n".join(lines)
