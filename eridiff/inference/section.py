"""What a file says of its images becomes the requests that a model can fulfil, with a notice of all that is not as it says."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from eridiff.config import SampleSettings, Words
from eridiff.errors import ConfigError
from eridiff.inference.base import DiffusionInference
from eridiff.request import GUIDANCE, Request
from eridiff.schedulers.samplers import noises_of_a_step


def requests_of(
    settings: SampleSettings, model: DiffusionInference, explicit: Collection[str] = ()
) -> tuple[list[Request], list[str]]:
    """A request for each image of a section, and notices of what has no effect on this model or is changed for it.

    - explicit: fields that must have an effect, as they were asked for by hand.

    Raises ConfigError for what is impossible, and for an explicit field without effect.
    """
    found: list[Request] = []
    notices: list[str] = []
    sizes, used = set(), 0  # of the images before, and how often their generator has made noise
    for words in settings.each():
        request, told = _request(words, model, settings, explicit)
        if request.noise_generator == "run" and request.noise_skip is None:
            request = replace(request, noise_skip=used)
        asked = request.checked(model)
        schedule = model.points(asked)  # which may not be there
        used += 1 + schedule.steps * noises_of_a_step(asked.sampler, asked.eta, asked.churn)
        sizes.add((asked.width, asked.height))
        if asked.noise_generator == "run" and len(sizes) > 1:
            raise ConfigError("images whose noise one generator makes (noise_generator run) must be of one size")
        found.append(request)
        notices += told
    return found, list(dict.fromkeys(notices))


def _request(
    words: Words, model: DiffusionInference, settings: SampleSettings, explicit: Collection[str]
) -> tuple[Request, list[str]]:
    values, notices = settle_guidance(words, model)
    if settings.euler_elsewhere and model.family != "unet" and "sampler" not in explicit:
        if (said := values.get("sampler")) not in (None, "euler"):
            notices.append(f"the sampler {said} has no effect: the file's program samples {model.called} by euler")
        values["sampler"] = "euler"
    if settings.lenient:
        for name in ("width", "height"):
            side = values.get(name)
            if side is not None and (fitting := max(64, side // model.multiple * model.multiple)) != side:
                notices.append(f"the {name} {side} becomes {fitting}, a multiple of {model.multiple}")
                values[name] = fitting
        if values.get("schedule") == "karras" and model.family != "unet":
            notices.append(f"Karras' noise levels have no effect: {model.called} has its own")
            del values["schedule"]
    request = Request.of(values).filled(model)  # what a recipe chooses decides, too, what has an effect
    request.check()
    for name, reason in request.without_effect(model).items():
        if name in explicit:
            raise ConfigError(f"{name} has no effect {reason}")
        notices.append(f"{name} has no effect {reason}")
        del values[name]
    return Request.of(values).filled(model), notices


def settle_guidance(words: Mapping[str, Any], model: DiffusionInference) -> tuple[Words, list[str]]:
    """What the words of guidance mean for a network, as fields of `Request`, and notices that say so.

    `true_cfg_scale` is classifier-free guidance everywhere. `guidance_scale` is what a guidance embedding is given, and
    `cfg_scale` classifier-free guidance, but trainers write either for the one way in which a network is guided: alone,
    `guidance_scale` is classifier-free guidance for a network without the embedding whose variants have such guidance, and
    `cfg_scale` goes to the embedding of a network that has one.
    """
    values = {name: value for name, value in words.items() if name not in GUIDANCE}
    told, cfg, true = (words.get(name) for name in ("guidance_scale", "cfg_scale", "true_cfg_scale"))
    embedding, by_cfg = model.guidance_embedding, model.family != "flux"
    notices = []
    if cfg is not None and embedding and told is None:
        notices.append(f"cfg_scale {cfg:g} is taken as guidance_scale, the guidance embedding (true_cfg_scale asks for true guidance)")  # fmt: skip
        cfg, told = None, cfg
    elif cfg is not None and not embedding and not by_cfg:
        notices.append(f"cfg_scale {cfg:g} has no effect: this Flux has no guidance embedding (true_cfg_scale asks for true guidance)")  # fmt: skip
        cfg = None
    true = cfg if true is None else true
    if told is not None and not embedding and by_cfg:
        meaning = f"is taken as cfg_scale {told:g}" if true is None else f"has no effect beside cfg_scale {true:g}"
        notices.append(f"guidance_scale {told:g} {meaning}: this model has no guidance embedding")
        true, told = told if true is None else true, None
    given = {"guidance_scale": told, "cfg_scale": true}
    return values | {name: value for name, value in given.items() if value is not None}, notices


def early(words: Words) -> Request:
    """What can be known of an image before a model is loaded, to be checked."""
    values = {name: value for name, value in words.items() if name not in GUIDANCE}
    true = words.get("true_cfg_scale", words.get("cfg_scale"))
    return Request.of(values | {"guidance_scale": words.get("guidance_scale"), "cfg_scale": true})
