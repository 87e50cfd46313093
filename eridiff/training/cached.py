"""Embeddings that a trainer has cached, in the layouts of diffusers' scripts, kohya's and ai-toolkit, by prompt."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eridiff.effects import own
from eridiff.errors import ConfigError, quoted
from eridiff.inference import DiffusionInference, Prompt
from eridiff.memory.stages import Stages
from eridiff.request import Request
from eridiff.text import Conditioning

# what a list of so many tensors holds: diffusers' `encode_prompt` and its scripts, kohya's `encode_tokens`
PAIR = ("prompt_embeds", "pooled_prompt_embeds")
FOUR = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
LISTS: dict[str, dict[int, tuple[str, ...]]] = {
    "flux": {2: PAIR, 3: (*PAIR, "text_ids"), 4: ("l_pooled", "t5_out", "txt_ids", "t5_attn_mask")},
    "mmdit": {
        2: PAIR, 4: FOUR,
        6: ("lg_out", "t5_out", "lg_pooled", "clip_l_attn_mask", "clip_g_attn_mask", "t5_attn_mask"),
    },
    "unet": {2: PAIR, 3: ("hidden_state1", "hidden_state2", "pool2"), 4: FOUR},
}  # fmt: skip
AI_TOOLKIT = ("text_embeds", "pooled_embeds", "attention_mask")  # attributes of its PromptEmbeds
FOLLOWED = ("t5_mask", "empty_negative")  # of the fields of a request that say how a prompt is encoded
KOHYA_T5_ROWS = 77  # zeros in their place, where kohya's SD 3 has no T5


class _Missing(Exception):
    """Prompts that were not passed."""


def handed_in_prompts(
    inference: DiffusionInference, given: Mapping[str, Any] | Sequence[Any], requests: Sequence[Request]
) -> list[Prompt]:
    """What a trainer's embeddings give for each request of a section, negative prompts by the family's rules.

    Raises ConfigError for prompts that are not among them, and for embeddings that cannot be read or do not fit.
    """
    if not isinstance(given, Mapping):
        if not isinstance(given, list | tuple) or len(given) != len(requests):
            raise ConfigError(
                f"conditioning must be a mapping from prompts to embeddings, or a list of as many as there are prompts ({len(requests)})"
            )
        given = {str(request.prompt): value for request, value in zip(requests, given, strict=True)}
    masks = [bool(own(request, inference, "t5_mask")) for request in requests]
    tables = {hidden: {text: prompt_of(inference, text, value, hidden) for text, value in given.items()} for hidden in {*masks}}  # fmt: skip
    table: dict[str, Prompt] = {}

    def encoding(texts: Sequence[Any], asked: Request) -> Stages[Conditioning]:
        lacking = [text for text in texts if not isinstance(text, str) or text not in table]
        if lacking:
            raise _Missing(*map(repr, lacking))
        return _joined(texts, [table[text].positive for text in texts])
        yield  # no encoder is used

    reader = copy.copy(inference)
    reader.encoding = encoding  # type: ignore[method-assign, assignment]
    found: list[Prompt] = []
    missing: dict[str, None] = {}
    for request, hidden in zip(requests, masks, strict=True):
        table = tables[hidden]
        held = table.get(request.prompt) if isinstance(request.prompt, str) else None
        if held is not None and held.negative is not None and request.negative not in table:
            if own(request, inference, "cfg_scale") != 1:
                _joined([str(request.prompt)], [held.positive, held.negative])
            found.append(held)
            continue
        followed = {name: value for name, value in request.text().items() if name in FOLLOWED}
        try:
            found.append(reader.encode_prompt(request.prompt, request.negative, request.cfg_scale, **followed))
        except _Missing as error:
            missing |= dict.fromkeys(error.args)
    if missing:
        raise ConfigError(
            f"conditioning has no embeddings of {', '.join(missing)}: pass those of every prompt, and of negative ones"
        )
    return found


def prompt_of(inference: DiffusionInference, text: str, value: Any, hidden: bool = False) -> Prompt:
    """One prompt's embeddings, whichever layout they are in; with the negative ones where the layout holds them.

    `hidden` hides T5's padding by the mask that is with them.
    """
    if isinstance(value, Prompt):
        return _both(inference, text, value.positive, value.negative, hidden)
    if isinstance(value, Mapping) and "conditional" in value:  # ai-toolkit's cache of sample prompts
        return _both(inference, text, value["conditional"], value.get("unconditional"), hidden)
    if isinstance(value, Conditioning):
        told = _checked(inference, text, vars(value))
        if not {"text", "pooled"} <= told.keys():
            raise _unreadable(text, vars(value))
        if (mask := told.get("mask")) is not None:
            _check_rows(text, "mask", mask, "text", told["text"])
        return Prompt(Conditioning(told["text"], told["pooled"], None if mask is None else mask.bool()))
    names = LISTS[inference.family].get(len(value)) if isinstance(value, list | tuple) else None
    if names is not None:
        try:
            return prompt_of(inference, text, dict(zip(names, value, strict=True)), hidden)
        except ConfigError as error:
            raise ConfigError(f"{error}; a list of {len(names)} holds {', '.join(names)} in this order") from None
    if all(hasattr(value, name) for name in AI_TOOLKIT):
        value = {name: getattr(value, name) for name in AI_TOOLKIT}
    elif not hasattr(value, "keys"):  # a mapping, or NumPy's file of several arrays
        raise _unreadable(text, value)
    named = _checked(inference, text, {name: value[name] for name in value.keys()})  # noqa: SIM118
    negative = {name.removeprefix("negative_"): t for name, t in named.items() if name.startswith("negative_")}
    positive = _conditioning(inference, text, named, value, hidden)
    return Prompt(positive, _conditioning(inference, text, negative, value, hidden) if negative else None)


def _both(inference: DiffusionInference, text: str, positive: Any, negative: Any, hidden: bool) -> Prompt:
    other = None if negative is None else prompt_of(inference, text, negative, hidden).positive
    return Prompt(prompt_of(inference, text, positive, hidden).positive, other)


def _checked(inference: DiffusionInference, text: str, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that are known by name, with a first dimension of one prompt; ConfigError for one that is invalid.

    Widths are the network's. Those of kohya's parts follow from them, as CLIP-G gives a prompt as many features as a token.
    """
    width, pooled = inference.told_widths(inference.network.config)
    features: dict[str, tuple[int | None, ...]] = {  # None is any number of tokens
        **dict.fromkeys(("prompt_embeds", "text_embeds", "t5_out", "text"), (1, None, width)),
        **dict.fromkeys(("lg_out", "hidden_state2"), (1, None, pooled)), "hidden_state1": (1, None, width - pooled),
        **dict.fromkeys(("pooled_prompt_embeds", "pooled_embeds", "l_pooled", "lg_pooled", "pool2", "pooled"), (1, pooled)),
    }  # fmt: skip
    masks = dict.fromkeys(("t5_attn_mask", "attention_mask", "mask", "clip_l_attn_mask", "clip_g_attn_mask"), (1, None))
    shapes = {**features, **masks, **dict.fromkeys(("text_ids", "txt_ids"), (1, None, 3))}
    found: dict[str, Tensor] = {}
    for name, value in given.items():
        kind = name.removeprefix("negative_")
        if kind not in shapes or value is None:
            continue
        who = f"{name} of {quoted(text)}"
        try:
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise ConfigError(f"{who} is of class {type(value).__name__}, and a tensor is needed") from None
        shape = shapes[kind]
        whole = tensor[None] if tensor.ndim == len(shape) - 1 else tensor
        fits = whole.ndim == len(shape) and all(n in (s, None) for n, s in zip(shape, whole.shape, strict=True))
        if not fits or not whole.numel():
            wanted = ", ".join("T" if n is None else str(n) for n in shape)
            raise ConfigError(f"{who} is {list(tensor.shape)}, and this network takes [{wanted}]")
        if kind in features and not tensor.is_floating_point():
            raise ConfigError(f"{who} is {tensor.dtype}, and floating-point numbers are needed")
        if kind in features and not bool(torch.isfinite(tensor.float()).all()):
            raise ConfigError(f"{who} has values that are NaN or infinite")
        if kind in masks and not bool(((tensor == 0) | (tensor == 1)).all()):
            raise ConfigError(f"{who} has values other than 0 (hidden) and 1 (seen)")
        found[name] = whole
    return found


def _conditioning(
    inference: DiffusionInference, text: str, named: Mapping[str, Tensor], given: Any, hidden: bool
) -> Conditioning:
    mask, t5 = named.get("t5_attn_mask", named.get("attention_mask")), None
    pair = next((pair for pair in (PAIR, AI_TOOLKIT[:2], ("t5_out", "l_pooled")) if {*pair} <= named.keys()), None)
    if pair is not None:
        rows, pooled = (named[name] for name in pair)
        t5 = rows if inference.family == "flux" else None
    elif {"lg_out", "lg_pooled"} <= named.keys():
        width, _ = inference.told_widths(inference.network.config)
        clips, pooled = named["lg_out"], named["lg_pooled"]
        clips, t5 = F.pad(clips, (0, width - clips.shape[-1])), named.get("t5_out")
        rows = torch.cat([clips, clips.new_zeros(1, KOHYA_T5_ROWS, width) if t5 is None else t5], dim=1)
    elif {"hidden_state1", "hidden_state2", "pool2"} <= named.keys():
        both, pooled = (named["hidden_state1"], named["hidden_state2"]), named["pool2"]
        _check_rows(text, "hidden_state1", both[0], "hidden_state2", both[1])
        rows = torch.cat(both, dim=-1)
    else:
        raise _unreadable(text, given)
    if mask is not None and (t5 is not None or mask.shape[1] > rows.shape[1]):
        _check_rows(text, "the mask of T5's padding", mask, "T5's text", rows if t5 is None else t5)
    if hidden and mask is None:
        raise ConfigError(f"the embeddings of {quoted(text)} have no mask of T5's padding, which t5_mask hides")
    if not hidden or mask is None:
        return Conditioning(rows, pooled)
    seen = F.pad(mask, (rows.shape[1] - mask.shape[1], 0), value=1).bool()  # all of CLIP's, which stand first
    return Conditioning(rows, pooled, seen)


def _joined(texts: Sequence[str], parts: Sequence[Conditioning]) -> Conditioning:
    try:
        return Conditioning.joined(parts)
    except ConfigError as error:
        raise ConfigError(f"conditioning of {' and '.join(map(quoted, texts))}: {error}") from None


def _check_rows(text: str, name: str, one: Tensor, other_name: str, other: Tensor) -> None:
    if one.shape[1] != other.shape[1]:
        raise ConfigError(
            f"{name} of {quoted(text)} is of {one.shape[1]} tokens and {other_name} of {other.shape[1]}: give those of one call"
        )


def _unreadable(text: str, value: Any) -> ConfigError:
    held = ", ".join(map(str, value)) if hasattr(value, "keys") else type(value).__name__
    held += f" of {len(value)}" if isinstance(value, list | tuple) else ""
    return ConfigError(
        f"the embeddings of {quoted(text)} ({held}) are in no layout that is known: give {' and '.join(PAIR)} by name, or a Prompt"
    )
