"""Published names and shapes, unfolded: a group `{a,b,c-d}` in a name stands for numbers and inclusive ranges."""

import json
import re
from itertools import product
from pathlib import Path

FOLDER = Path(__file__).parent / "manifests"
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def read_manifest(name: str) -> Tensors:
    """Name -> (dtype as a header spells it, shape)."""
    result: Tensors = {}
    for pattern, (dtype, shape) in json.loads((FOLDER / f"{name}.json").read_text())["tensors"].items():
        pieces = re.split(r"\{([^}]*)\}", pattern)
        for numbers in product(*(unfold(group) for group in pieces[1::2])):
            filled = [*numbers, ""]
            result["".join(text + number for text, number in zip(pieces[::2], filled, strict=True))] = (
                dtype,
                tuple(shape),
            )
    return result


def unfold(group: str) -> list[str]:
    """`0,2-4` -> 0, 2, 3, 4."""
    ranges = [part.split("-") for part in group.split(",")]
    return [str(n) for ends in ranges for n in range(int(ends[0]), int(ends[-1]) + 1)]
