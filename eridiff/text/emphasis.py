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

import numpy as np
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
    found: list[str] = []  # the characters that stay, and their weights
    weights = np.ones(len(text))
    begun: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        with np.errstate(all="ignore"):  # thousands of brackets are an infinite weight
            weights[begun[bracket].pop() : len(found)] *= factor

    i = 0
    while i < len(text):
        character, weight, i = text[i], number.match(text, i), i + 1
        if character == "\\":
            escaped = text[i : i + 1]
            if escaped and escaped in "()[]\\":
                found.append(escaped)
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
            found.append(character)
    for bracket, factor in (("(", STEP), ("[", 1 / STEP)):
        while begun[bracket]:
            close(bracket, factor)
    joined = groupby(zip(found, weights.tolist(), strict=False), key=lambda each: each[1])
    return [("".join(c for c, _ in group), weight) for weight, group in joined] or [("", 1.0)]


def _interpolated(text: str) -> Pieces:
    """Round brackets alone: a number is the weight itself, whatever surrounds it; without one it is 1.1 times that around it.

    A backslash makes a bracket text. Where brackets do not match, those that remain are text.
    """
    signs = re.findall(r"\\[()]|.", text, re.DOTALL)
    ends, open_ = {}, []
    for i, sign in enumerate(signs):
        if sign == "(":
            open_.append(i)
        elif sign == ")" and open_:
            ends[open_.pop()] = i
    found: list[tuple[str, float]] = []
    waiting = [(begin, end, 1.0) for begin, end in reversed(list(_outermost(signs, ends, 0, len(signs))))]
    while waiting:  # no recursion: brackets may be deep
        begin, end, weight = waiting.pop()
        if end - begin < 2 or signs[begin] != "(" or signs[end - 1] != ")":
            found.append(("".join(signs[begin:end]).replace("\\(", "(").replace("\\)", ")"), weight))
            continue
        begin, end, weight = begin + 1, end - 1, weight * STEP
        colon = end - 1
        while colon > begin and signs[colon] not in ("(", ")", ":"):  # a number has none of them
            colon -= 1
        if colon > begin and signs[colon] == ":":
            with suppress(ConfigError):  # without a number the colon is text
                weight = _number("".join(signs[colon + 1 : end]))
                end = colon
        waiting += [(*inner, weight) for inner in reversed(list(_outermost(signs, ends, begin, end)))]
    return found or [("", 1.0)]


def _outermost(signs: list[str], ends: dict[int, int], begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Where brackets lie that nothing between `begin` and `end` surrounds, whole, and what lies between them.

    `ends` has the place that closes each bracket, if one does.
    """
    i, depth = begin, 0
    while i < end:
        if signs[i] == "(" and depth == 0:
            if i > begin:
                yield begin, i
            begin = min(ends.get(i, end) + 1, end)
            yield i, begin
            i = begin
        else:
            depth += (signs[i] == "(") - (signs[i] == ")")
            i += 1
    if begin < end:
        yield begin, end


def _number(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ConfigError(f"the weight '{text}' in a prompt is not a number; with prompt_weights none it is text")
    return weight
