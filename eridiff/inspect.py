"""What a file or folder is, to the last key, without filling anything."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from eridiff.errors import CheckpointError
from eridiff.text.encoders import empty
from eridiff.weights.detect import DESCRIPTIONS, Component
from eridiff.weights.load import plan
from eridiff.weights.locate import locate


def inspect(path: str | os.PathLike[str], *, values: bool = False) -> dict[str, Any]:
    """A report that JSON can hold: components with layout, configuration, dtypes and counts, metadata, and problems.

    `values` reads every weight and names those with values that are not finite. Raises CheckpointError for a file that
    no model could be read from; a model with missing or unknown keys is a problem in the report.
    """
    parts = locate(path)
    components, problems = [], []
    for component in parts.components.values():
        try:
            used = [name for entry in _plan(component) for name in entry.foreign if name in component.keys]
        except CheckpointError as error:
            used = []
            problems.append(str(error))
        components.append(_described(component, used))
        if values:
            problems += _not_finite(component)
    return {
        "path": os.fspath(path),
        "components": components,
        "tokenizers": {kind: str(folder) for kind, folder in parts.tokenizers.items()},
        "problems": problems,
    }


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
        lines.append(f"{Path(c['file']).name}: {c['what']}, {c['layout']} layout{prefix}")
        lines.append(
            f"  {c['parameters']:,} parameters, {c['bytes']:,} bytes, tensors: {dtypes}; {c['used']} of {c['tensors']} fill the network"
        )
        lines.append("  " + ", ".join(f"{key} {value}" for key, value in c["config"].items()))
        lines += [f"  note: {notice}" for notice in c["notices"]]
    lines += [f"tokenizer of {kind}: {folder}" for kind, folder in report["tokenizers"].items()]
    lines += [f"problem: {problem}" for problem in report["problems"]]
    return "\n".join(lines)
