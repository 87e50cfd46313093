"""When a field of a request would change nothing, and why: the end of the sentence "... has no effect ...", or None.

`request` is a `Request` and `model` the `DiffusionInference` that it is for, of which only what it says of itself is asked.
"""

from collections.abc import Callable
from typing import Any

from eridiff.schedulers import first_step
from eridiff.schedulers.samplers import CHURNED, DISCRETE_ALONE, ETA, FLOW_ALONE

Effect = Callable[[Any, Any], str | None]


def guided(request: Any, model: Any) -> str | None:
    scale = model.sampling.cfg_scale if request.cfg_scale is None else request.cfg_scale
    return "without classifier-free guidance (cfg_scale)" if scale == 1 else None


def strength_of(request: Any, model: Any) -> float | None:
    """What is asked, or by default the whole run with a mask and 0.75 without; None without an image."""
    if request.image is None:
        return None
    whole = request.mask is not None or model.inpaints
    return (1.0 if whole else 0.75) if request.strength is None else request.strength


def steps_of(request: Any, model: Any) -> tuple[range, int]:
    """The steps that are run from where an image lets it begin, and how many the schedule has."""
    given = request.schedule is not None and not isinstance(request.schedule, str)
    steps = len(request.schedule) - 1 if given else request.steps or model.sampling.steps
    strength = strength_of(request, model)
    first = 0 if strength is None else first_step(steps, strength, own(request, model, "strength_rounding"))
    return range(first, steps), steps


def skipped(request: Any, model: Any) -> str | None:
    skip: Any = getattr(model.sampling, "skip_layers", None) if request.skip_layers is True else request.skip_layers
    if "skip_layers" not in model.takes or skip is None:
        return taken("skip_layers")(request, model)
    blocks = model.network.config.depth
    if missing := [str(block) for block in skip.blocks if block >= blocks]:
        return f"on block{'s' * (len(missing) > 1)} {', '.join(missing)}: this network has {blocks}, from 0 on"
    if skip.scale == 0:
        return "at scale 0"
    run, steps = steps_of(request, model)
    if not run or any(skip.acts(step - run.start, steps) for step in run):
        return None
    return f"on a run of {len(run)} step{'s' * (len(run) != 1)}, none of which lies between its shares {skip.start:g} and {skip.end:g}"


def embedded(request: Any, model: Any) -> str | None:
    if model.guidance_embedding:
        return None
    return "as this network has no guidance embedding; cfg_scale asks for classifier-free guidance"


def suits(request: Any, model: Any) -> str | None:
    if request.sampler in DISCRETE_ALONE and model.flow:
        return f"on {model.called}: {request.sampler} is for discrete noise levels, not for rectified flow"
    if request.sampler in FLOW_ALONE and not model.flow:
        return f"on {model.called}: {request.sampler} is for rectified flow, not for discrete noise levels"
    return None


def sampler_of(request: Any, model: Any) -> str:
    return str(request.sampler or model.sampling.sampler)


def offset(request: Any, model: Any) -> str | None:
    table = (
        request.schedule
        or model.table_of(sampler_of(request, model))
        or getattr(model.sampling, "schedule", "original")
    )
    if not isinstance(table, str):
        return "on sigmas that are given"
    return None if table in model.offsets else f"on the schedule {table}"


def ending(request: Any, model: Any) -> str | None:
    if request.schedule is not None and not isinstance(request.schedule, str):
        return "on sigmas that are given"
    if "final_noise" in model.takes and sampler_of(request, model) == "lcm":
        return "on the sampler lcm, whose last step gives the clean image"
    return taken("final_noise")(request, model)


def renewed(request: Any, model: Any) -> str | None:
    name = sampler_of(request, model)
    return None if name in ETA else f"on the sampler {name}, whose share of new noise is fixed"


def churned(request: Any, model: Any) -> str | None:
    name = sampler_of(request, model)
    if model.flow:
        return f"on {model.called}: Karras' churn is for discrete noise levels, not for rectified flow"
    return None if name in CHURNED else f"on the sampler {name}; {' and '.join(CHURNED)} take it"


def scaled(request: Any, model: Any) -> str | None:
    if request.image is not None and not (model.inpaints and request.strength in (None, 1)):
        return "on a run that begins from an image"
    return taken("noise_scale")(request, model)


def shifted(request: Any, model: Any) -> str | None:
    if not model.shifts(request.schedule):
        return f"on the schedules of {model.called}"
    return None if request.schedule is None or isinstance(request.schedule, str) else "on sigmas that are given"


def counted(request: Any, model: Any) -> str | None:
    if request.schedule is None or isinstance(request.schedule, str) or request.steps == len(request.schedule) - 1:
        return None
    return f"beside {len(request.schedule)} sigmas, which are {len(request.schedule) - 1} steps"


def taken(name: str) -> Effect:
    def effect(request: Any, model: Any) -> str | None:
        return None if name in model.takes else f"on {model.called}"

    return effect


def followed(request: Any, model: Any) -> str | None:
    return None if "control" in model.takes else f"on {model.called}: Flux Canny and Depth follow a control image"


def referred(request: Any, model: Any) -> str | None:
    return None if "references" in model.takes else f"on {model.called}: Flux Kontext edits references"


def edited(request: Any, model: Any) -> str | None:
    if "references" not in model.takes or request.strength is not None:
        return None
    return "on kontext without a strength: what it edits are references"


def scored_negative(request: Any, model: Any) -> str | None:
    return taken("aesthetic_score")(request, model) or guided(request, model)


def handed_over(request: Any, model: Any) -> str | None:
    return None if getattr(model, "refiner", None) is not None else "without a refiner"


def begun(request: Any, model: Any) -> str | None:
    return "without the image that it is for" if request.image is None else None


def masked(request: Any, model: Any) -> str | None:
    return "without a mask" if request.mask is None else None


def in_one(request: Any, model: Any) -> str | None:
    return None if request.noise_generator in ("one", "run") else "without noise_generator: one"


def own(request: Any, model: Any, name: str) -> Any:
    """What a request says, else what the model is sampled with by default, else what all are."""
    told = (
        getattr(request, name),
        getattr(model.sampling, name, None),
        request.__dataclass_fields__[name].metadata["usual"],
    )
    return next((value for value in told if value is not None), None)


def lacks_t5(model: Any) -> bool:
    return bool(model.model.encoders) and "t5" not in model.model.encoders


def hidden(request: Any, model: Any) -> str | None:
    if "t5" not in model.encoders:
        return f"on {model.called}"
    return "without T5" if lacks_t5(model) else None


def rows_of_t5(request: Any, model: Any) -> str | None:
    if "t5" not in model.encoders:
        return f"on {model.called}"
    return "without T5 and its rows" if lacks_t5(model) and own(request, model, "without_t5") == "none" else None


def padded(request: Any, model: Any) -> str | None:
    return taken("t5_padding")(request, model) or rows_of_t5(request, model)


def replaced(request: Any, model: Any) -> str | None:
    beside = None if lacks_t5(model) or not model.model.encoders else "beside T5, which is loaded"
    return taken("without_t5")(request, model) or beside


def missing_negative(request: Any, model: Any) -> str | None:
    given = None if request.negative is None else "beside a negative prompt"
    return taken("empty_negative")(request, model) or given or guided(request, model)


def emphasised(request: Any, model: Any) -> str | None:
    if request.prompt_weights != "kohya" or model.family == "unet":
        return None
    return f"on {model.called}: kohya's scripts weigh the prompts of SDXL alone"


def cached(request: Any, model: Any) -> str | None:
    if model.family != "unet":
        return None
    return f"on {model.called}: the last blocks of a UNet read what the first ones gave, not only what came between"


def weighed(request: Any, model: Any) -> str | None:
    return (
        None if any(handle.scale is None for handle in model.loras) else "without a LoRA that has no scale of its own"
    )
