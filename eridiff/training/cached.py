"""Embeddings that a trainer has cached, in the layouts of diffusers' scripts, kohya's and ai-toolkit, by prompt."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eridiff.errors import ConfigError
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
KOHYA_T5_ROWS = 77  # zeros in their place, where kohya's SD 3 has no T5


class _Missing(Exception):
    """Prompts that were not handed in."""


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
    table = {text: prompt_of(inference, text, value) for text, value in given.items()}

    def encoding(texts: Sequence[Any]) -> Stages[Conditioning]:
        lacking = [text for text in texts if not isinstance(text, str) or text not in table]
        if lacking:
            raise _Missing(*map(repr, lacking))
        return Conditioning.joined([table[text].positive for text in texts])
        yield  # no encoder is used

    reader = copy.copy(inference)
    reader.encoding = encoding  # type: ignore[method-assign, assignment]
    found: list[Prompt] = []
    missing: dict[str, None] = {}
    for request in requests:
        own = table.get(request.prompt) if isinstance(request.prompt, str) else None
        if own is not None and own.negative is not None and request.negative not in table:
            found.append(own)
            continue
        try:
            found.append(reader.encode_prompt(request.prompt, request.negative, request.cfg_scale))
        except _Missing as error:
            missing |= dict.fromkeys(error.args)
    if missing:
        raise ConfigError(
            f"conditioning has no embeddings of {', '.join(missing)}: hand in those of every prompt, and of negative ones"
        )
    return found


def prompt_of(inference: DiffusionInference, text: str, value: Any) -> Prompt:
    """One prompt's embeddings, whichever layout they are in; with the negative ones where the layout holds them."""
    if isinstance(value, Prompt):
        found = value
    elif isinstance(value, Conditioning):
        found = Prompt(value)
    elif isinstance(value, Mapping) and "conditional" in value:  # ai-toolkit's cache of sample prompts
        both = [prompt_of(inference, text, value[name]).positive for name in ("conditional", "unconditional")]
        found = Prompt(*both)
    else:
        named = _named(inference.family, text, value)
        negative = {
            name.removeprefix("negative_"): tensor for name, tensor in named.items() if name.startswith("negative_")
        }
        found = Prompt(
            _conditioning(inference, text, named), _conditioning(inference, text, negative) if negative else None
        )
    for conditioning in (found.positive, found.negative):
        if conditioning is None:
            continue
        given = conditioning.text.shape[-1], conditioning.pooled.shape[-1]
        wanted = inference.told_widths(inference.network.config)
        if given != wanted:
            raise ConfigError(
                f"the embeddings of {text!r} have {given[0]} features a token and {given[1]} pooled, and the network takes "
                f"{wanted[0]} and {wanted[1]}: they belong to another model"
            )
    return found


def _named(family: str, text: str, value: Any) -> dict[str, Tensor]:
    """Tensors with a first dimension of prompts, by the names of their layout."""
    if all(hasattr(value, name) for name in AI_TOOLKIT):
        value = dict(zip((*PAIR, "t5_attn_mask"), (getattr(value, name) for name in AI_TOOLKIT), strict=True))
    elif hasattr(value, "keys"):  # a mapping, or NumPy's file of several arrays
        value = {name: value[name] for name in value.keys()}  # noqa: SIM118
    elif isinstance(value, list | tuple) and len(value) in LISTS[family]:
        value = dict(zip(LISTS[family][len(value)], value, strict=True))
    else:
        raise _unreadable(text, value)
    tensors = {n: torch.as_tensor(t) for n, t in value.items() if t is not None and not isinstance(t, bool | str)}
    pooled = ("pool", "attn_mask")
    return {n: t[None] if t.ndim == (1 if any(p in n for p in pooled) else 2) else t for n, t in tensors.items()}


def _conditioning(inference: DiffusionInference, text: str, named: Mapping[str, Tensor]) -> Conditioning:
    mask = named.get("t5_attn_mask")
    if {*PAIR} <= named.keys():
        rows, pooled = (named[name] for name in PAIR)
    elif {"t5_out", "l_pooled"} <= named.keys():
        rows, pooled = named["t5_out"], named["l_pooled"]
    elif {"lg_out", "lg_pooled"} <= named.keys():
        width, _ = inference.told_widths(inference.network.config)
        clips, pooled = named["lg_out"], named["lg_pooled"]
        clips = F.pad(clips, (0, width - clips.shape[-1]))
        t5 = named.get("t5_out", clips.new_zeros(len(clips), KOHYA_T5_ROWS, width))
        rows = torch.cat([clips, t5], dim=1)
    elif {"hidden_state1", "hidden_state2", "pool2"} <= named.keys():
        rows, pooled = torch.cat([named["hidden_state1"], named["hidden_state2"]], dim=-1), named["pool2"]
    else:
        raise _unreadable(text, named)
    hidden = getattr(inference, "t5_mask", False)
    if hidden and mask is None:
        raise ConfigError(f"the embeddings of {text!r} have no mask of T5's padding, which t5_mask=True hides")
    if not hidden or mask is None:
        return Conditioning(rows, pooled)
    return Conditioning(
        rows, pooled, F.pad(mask, (rows.shape[1] - mask.shape[1], 0), value=1).bool()
    )  # CLIP's are seen


def _unreadable(text: str, value: Any) -> ConfigError:
    held = ", ".join(map(str, value)) if hasattr(value, "keys") else type(value).__name__
    held += f" of {len(value)}" if isinstance(value, list | tuple) else ""
    return ConfigError(
        f"the embeddings of {text!r} ({held}) are in no layout that is known: give {' and '.join(PAIR)} by name, or a Prompt"
    )
