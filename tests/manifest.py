"""Published names and shapes, unfolded: one `{a-b}` in a name stands for every number from a to b."""

import json
import re
from pathlib import Path

FOLDER = Path(__file__).parent / "manifests"
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def read_manifest(name: str) -> Tensors:
    """Name -> (dtype as a header spells it, shape)."""
    result: Tensors = {}
    for pattern, (dtype, shape) in json.loads((FOLDER / f"{name}.json").read_text())["tensors"].items():
        match = re.search(r"\{(\d+)-(\d+)\}", pattern)
        numbers = range(int(match[1]), int(match[2]) + 1) if match else [0]
        for number in numbers:
            expanded = pattern.replace(match[0], str(number)) if match else pattern
            result[expanded] = (dtype, tuple(shape))
    return result
