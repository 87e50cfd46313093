"""Prompts become conditioning: how they are encoded, positive and negative ones at once, and one row for each image.

`model` is the `DiffusionInference` whose prompts they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from eridiff.effects import own
from eridiff.errors import ConfigError
from eridiff.inference.result import Prompt
from eridiff.inference.settings import NAMED
from eridiff.memory.stages import Stages
from eridiff.request import ENCODING, FIELDS, Checked, Request, Text, known_names, listed
from eridiff.text.emphasis import unweighted


def check_conditioning(model: Any, request: Request, given: object) -> None:
    """Raises ConfigError for what cannot stand for a prompt, for a prompt beside it, and for a refiner, which needs text."""
    if not isinstance(given, Prompt):
        raise ConfigError(
            f"conditioning must be an eridiff.Prompt, not a {type(given).__name__}: "
            "Prompt(Conditioning(text, pooled)), with the negative one behind it if there is guidance"
        )
    for name in ("prompt", "negative", *ENCODING):
        if request.says(name):
            raise ConfigError(f"{name} has no effect beside conditioning, which is what was encoded of it")
    if getattr(model, "refiner", None) is not None:
        raise ConfigError("the refiner reads prompts by its own encoder: give them as text, not as conditioning")


def check_words(model: Any, prompts: Sequence[Text]) -> None:
    """If the model's file lists the words it knows, warn of others in prompts for images (`Words.check`).

    Raises ConfigError for a prompt without a known noun, unless new words may have been learned: by a LoRA on the model,
    or by a network in training.
    """
    if model.words is not None:
        taught = any(p.requires_grad for p in model.network.parameters()) or any(
            vars(module).get("lora_branches") for module in model.network.modules()
        )
        model.words.check(prompts, refuse=not taught)


def text_asked(model: Any, asked: Mapping[str, Any]) -> Checked:
    """A request of which all is settled that the encoding of a prompt asks for, of `asked` as of `encode_prompt`."""
    known_names(asked, ("negative", "cfg_scale", *ENCODING), "the encoding of a prompt", "is not a setting of")
    request = Request.of(asked)
    request.check()
    for name, reason in request.without_effect(model).items():
        if name in ENCODING:
            raise ConfigError(f"{name} has no effect {reason}")
    return replace(request, cfg_scale=own(request, model, "cfg_scale"), **text_told(model, request))


def text_told(model: Any, asked: Request) -> dict[str, Any]:
    """How a prompt is encoded where a request does not say it; None where it would have no effect."""
    found: dict[str, Any] = {}
    for name in ENCODING:
        effect = FIELDS[name].metadata["effect"]
        if getattr(asked, name) is None and effect(asked, model) is None:
            t5 = model.model.encoders.get("t5") if name == "t5_length" else None
            usual = FIELDS[name].metadata["usual"]
            found[name] = t5.length if t5 else usual or getattr(model.sampling, NAMED.get(name, name))
    return found


def encoded(model: Any, prompts: list[Text], negative: Text | Sequence[Text] | None, asked: Checked) -> Stages[Prompt]:
    """Prompts and their negative ones, in stages; a negative of None is the family's default where there is guidance."""
    if negative is None and asked.cfg_scale != 1:
        return (yield from model.default_negative(prompts, asked))
    negatives = None if negative is None else listed(negative)
    if negatives is not None and len(negatives) not in (1, len(prompts)):
        raise ConfigError(f"{len(negatives)} negative prompts for {len(prompts)} prompts: give as many, or one")
    if negatives is not None and _weighs_rows(model):  # then equal texts are not encoded alike
        negatives *= len(prompts) // len(negatives)
    both = yield from model.encoding([*prompts, *(negatives or [])], asked)
    positive, other = (both.rows(part) for part in (slice(0, len(prompts)), slice(len(prompts), None)))
    if negatives is None:
        return Prompt(positive)
    return Prompt(positive, other if len(negatives) == len(prompts) else other.repeat(len(prompts)))


def conditioned(model: Any, asked: Checked, given: Prompt | None) -> Stages[Prompt]:
    """The prompts of a batch, in stages, or what was passed in their place; one of its rows serves all."""
    prompts, count = asked.prompt, len(asked.prompt)
    found = given
    if found is None:
        check_words(model, [unweighted(prompt, asked.prompt_weights) for prompt in prompts])
        negative = asked.negative
        same = all(p == prompts[0] for p in prompts) and (negative is None or len(negative) == 1)
        found = yield from encoded(
            model,
            prompts[:1] if same and not _weighs_rows(model) else prompts,
            negative if asked.cfg_scale != 1 else None,
            asked,
        )
    if len(found.positive) == 1:
        found = Prompt(found.positive.repeat(count), found.negative and found.negative.repeat(count))
    return found


def _weighs_rows(model: Any) -> bool:
    return any(handle.weighs_rows for handle in model.loras)
