"""Words of a prompt that weigh more or less than the others, such as `(swan:1.3)`, as other programs read and apply them.

- kohya (samples of SDXL in sd-scripts 48d368f): library/strategy_base.py, line 82, and library/strategy_sdxl.py, line 195: the
  states of a token are multiplied by its weight, and no more (sdxl_lpw_stable_diffusion.py restores the mean and is not called).
- a1111 (Forge dfdcbab, emphasis "Original"): backend/text_processing/parsing.py, line 23, and emphasis.py, line 25: they are
  multiplied, and then all states of the window are scaled so that their mean is what it was.
- comfyui (ComfyUI 00728eb): comfy/sd1_clip.py, `token_weights` and `encode_token_weights`: the states go from those of the empty
  prompt at the same place (weight 0) through the prompt's own (1) and beyond.

Begin, end and padding weigh 1, and pooled vectors are not weighed.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import groupby

import torch
from torch import Tensor

from eridiff.errors import ConfigError
from eridiff.request import Text

Pieces = Sequence[tuple[str, float]]  # the parts of a text in their order, each with its weight
STEP = 1.1  # of a pair of brackets without a number
NUMBERS = {  # what ends a bracket with its weight
    "kohya": re.compile(r":([+-]?[.\d]+)\)"),
    "a1111": re.compile(r":\s*([+-]?[.\d]+)\s*\)"),  # blanks around the number are allowed
}


def pieces(text: str, program: str) -> Pieces:
    """The parts of a text that a program gives one weight each, without brackets; of "none" the text as it stands.

    Raises ConfigError for a weight that is not a number.
    """
    if program == "none":
        return [(text, 1.0)]
    return _interpolated(text) if program == "comfyui" else _multiplied(text, NUMBERS[program])


def unweighted(prompt: Text, program: str | None) -> Text:
    """A prompt without the brackets that are weights; None weighs nothing."""
    program = program or "none"
    if isinstance(prompt, str):
        return "".join(text for text, _ in pieces(prompt, program))
    return {name: "".join(text for text, _ in pieces(each, program)) for name, each in prompt.items()}


def emphasised(states: Tensor, weights: Tensor, program: str, window: int, empty: Tensor) -> Tensor:
    """States of an encoder `[B, T, D]` with the weights `[B, T]` of their tokens, in the states' dtype.

    - window: how many tokens the encoder reads at once.
    - empty: for comfyui the states `[B, T, D]` of the empty prompt.
    """
    factor = weights.to(states.device)[..., None]
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    if program == "comfyui":
        none = empty.to(wide)
        return torch.where(factor == 1, wide, none + factor * (wide - none)).to(states.dtype)
    found = wide * factor
    if program == "a1111":

        def mean(rows: Tensor) -> Tensor:  # one number for each window of each prompt
            return rows.unflatten(1, (-1, window)).mean(dim=(2, 3)).repeat_interleave(window, dim=1)[..., None]

        found = found * (mean(wide) / mean(found))
    return found.to(states.dtype)


def _multiplied(text: str, number: re.Pattern[str]) -> Pieces:
    """Round brackets multiply by their number or 1.1, square ones divide by 1.1, nested ones add up.

    A backslash makes a bracket text and is itself left out. What is not closed is closed by the end of the text; what was
    never opened is text. Neighbours of one weight are one piece.
    """
    found: list[tuple[str, float]] = []  # each character with its weight
    begun: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        start = begun[bracket].pop()
        found[start:] = [(character, weight * factor) for character, weight in found[start:]]

    i = 0
    while i < len(text):
        character, weight, i = text[i], number.match(text, i), i + 1
        if character == "\\":
            escaped = text[i : i + 1]
            if escaped and escaped in "()[]\\":
                found.append((escaped, 1.0))
                i += 1
        elif character in begun:
            begun[character].append(len(found))
        elif weight and begun["("]:
            close("(", _number(weight[1]))
            i = weight.end()
        elif character == ")" and begun["("]:
            close("(", STEP)
        elif character == "]" and begun["["]:
            close("[", 1 / STEP)
        else:
            found.append((character, 1.0))
    for bracket, factor in (("(", STEP), ("[", 1 / STEP)):
        while begun[bracket]:
            close(bracket, factor)
    joined = groupby(found, key=lambda each: each[1])
    return [("".join(c for c, _ in group), weight) for weight, group in joined] or [("", 1.0)]


def _interpolated(text: str) -> Pieces:
    """Round brackets alone: a number is the weight itself, whatever surrounds it; without one it is 1.1 times that around it.

    A backslash makes a bracket text. Where brackets do not match, those that remain are text.
    """
    signs = re.findall(r"\\[()]|.", text, re.DOTALL)
    found: list[tuple[str, float]] = []
    waiting = [(part, 1.0) for part in reversed(list(_outermost(signs)))]  # no recursion: brackets may be deep
    while waiting:
        part, around = waiting.pop()
        if len(part) < 2 or part[0] != "(" or part[-1] != ")":
            found.append(("".join(part).replace("\\(", "(").replace("\\)", ")"), around))
            continue
        inner, weight = part[1:-1], around * STEP
        colon = max((i for i, sign in enumerate(inner) if sign == ":"), default=0)
        if colon > 0:
            with suppress(ConfigError):  # without a number the colon is text
                inner, weight = inner[:colon], _number("".join(inner[colon + 1 :]))
        waiting += [(each, weight) for each in reversed(list(_outermost(inner)))]
    return found or [("", 1.0)]


def _outermost(signs: list[str]) -> Iterator[list[str]]:
    """Brackets that nothing surrounds, whole, and what lies between them."""
    start = depth = 0
    for i, sign in enumerate(signs):
        if sign == "(":
            if depth == 0 and i > start:
                yield signs[start:i]
                start = i
            depth += 1
        elif sign == ")":
            depth -= 1
            if depth == 0:
                yield signs[start : i + 1]
                start = i + 1
    if start < len(signs):
        yield signs[start:]


def _number(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ConfigError(f"the weight '{text}' in a prompt is not a number; with prompt_weights none it is text")
    return weight
