"""What PNGs of other programs say of how they were generated, as values of `Request` and the recipe of the program.

A1111, Forge and what writes alike: the text chunk "parameters", a prompt, a negative prompt and a last line of pairs
(`modules/infotext_utils.py` of AUTOMATIC1111/stable-diffusion-webui). ComfyUI: the chunk "prompt", its graph as JSON.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from eridiff.images import SAMPLER_NAMES, SCHEDULE_NAMES

# its keys have an end, so that a long line without a colon is read once and not anew from each of its letters
PAIR = re.compile(r'(\w[\w \-/]{1,60}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
NUMBERS = {  # key of A1111's line -> field, and how its text is read
    "Steps": ("steps", int), "CFG scale": ("cfg_scale", float), "Distilled CFG Scale": ("guidance_scale", float),
    "Seed": ("seed", int), "Denoising strength": ("strength", float),
}  # fmt: skip
SAMPLERS_BY_NAME = {name.lower(): ours for ours, name in SAMPLER_NAMES.items()}
SCHEDULES_BY_NAME = {name.lower(): ours for ours, name in SCHEDULE_NAMES.items()}
COMFY_SAMPLERS = {"dpm_2": "dpm2", "dpm_2_ancestral": "dpm2_ancestral", "uni_pc": "unipc", "uni_pc_bh2": "unipc"}
COMFY_TEXTS = ("text", "clip_l", "t5xxl", "text_g", "text_l")  # inputs of nodes that encode a prompt
SAMPLING_NODES = ("KSampler", "KSamplerAdvanced", "SamplerCustomAdvanced", "SamplerCustom")


def foreign_settings(info: Mapping[Any, Any]) -> tuple[dict[str, Any], list[str]] | None:
    """(values by field, what no field holds) of a PNG's text chunks; None where no known program wrote them."""
    if isinstance(info.get("parameters"), str):
        return _a1111(info["parameters"])
    if isinstance(info.get("prompt"), str):
        try:
            graph = json.loads(info["prompt"])
        except ValueError:
            return None
        return _comfyui(graph) if isinstance(graph, dict) else None
    return None


def _a1111(text: str) -> tuple[dict[str, Any], list[str]] | None:
    *lines, last = text.strip().split("\n")
    pairs = {key.strip(): _unquoted(value.strip()) for key, value in PAIR.findall(last)}
    if len(pairs) < 3:
        return None
    parts: dict[str, list[str]] = {"prompt": [], "negative": []}
    target = "prompt"
    for line in lines:
        if line.strip().startswith("Negative prompt:"):
            target, line = "negative", line.strip().removeprefix("Negative prompt:")
        parts[target].append(line.strip())
    values: dict[str, Any] = {"recipe": "forge", "prompt": "\n".join(parts["prompt"])}
    if parts["negative"]:
        values["negative"] = "\n".join(parts["negative"])
    rest = []
    for key, value in pairs.items():
        name, read = NUMBERS.get(key, (None, None))
        size = re.fullmatch(r"(\d+)x(\d+)", value) if key == "Size" else None
        sampler, schedule = _sampler(value) if key == "Sampler" else (None, None)
        if name is not None and read is not None:
            try:
                values[name] = read(value)
            except ValueError:
                rest.append(f"{key}: {value}")
        elif size:
            values |= {"width": int(size[1]), "height": int(size[2])}
        elif sampler is not None:
            values |= {"sampler": sampler, **({"schedule": schedule} if schedule else {})}
        elif key == "Schedule type" and value.lower() in SCHEDULES_BY_NAME:
            values["schedule"] = SCHEDULES_BY_NAME[value.lower()]
        elif key == "RNG" and value in ("CPU", "GPU"):
            values["noise_device"] = "cpu" if value == "CPU" else "model"
        elif (key, value) != ("Schedule type", "Automatic"):
            rest.append(f"{key}: {value}")
    if "RNG" not in pairs:
        values["noise_device"] = "model"  # as its own reader takes it
    return values, rest


def _unquoted(value: str) -> str:
    try:
        return str(json.loads(value)) if value.startswith('"') else value
    except ValueError:
        return value


def _sampler(name: str) -> tuple[str | None, str | None]:
    """(sampler, schedule) of a name such as "DPM++ 2M Karras", as versions before 1.9 wrote both."""
    text, schedule = name.lower(), None
    for word, ours in SCHEDULES_BY_NAME.items():
        if text.endswith(" " + word):
            text, schedule = text.removesuffix(" " + word), ours
    return SAMPLERS_BY_NAME.get(text), schedule


def _comfyui(graph: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]] | None:
    nodes = {
        name: node for name, node in graph.items() if isinstance(node, dict) and isinstance(node.get("inputs"), dict)
    }
    sampling = [node for node in nodes.values() if node.get("class_type") in SAMPLING_NODES]
    if not sampling:
        return None
    values: dict[str, Any] = {"recipe": "comfyui"}
    rest = [f"{len(sampling)} nodes that sample, of which the first is read"] if len(sampling) > 1 else []
    seen: dict[str, Any] = {}
    for node in _above(sampling[0], nodes):
        for key, value in node["inputs"].items():
            if not isinstance(value, list | dict):
                seen.setdefault(key, value)
    for key, name in (
        ("steps", "steps"), ("cfg", "cfg_scale"), ("guidance", "guidance_scale"), ("width", "width"), ("height", "height"),
        ("shift", "shift"),
    ):  # fmt: skip
        if isinstance(seen.get(key), int | float):
            values[name] = seen[key]
    seed = next((seen[key] for key in ("seed", "noise_seed") if isinstance(seen.get(key), int)), None)
    values |= {} if seed is None else {"seed": seed}
    if isinstance(seen.get("sampler_name"), str):
        values["sampler"] = COMFY_SAMPLERS.get(seen["sampler_name"], seen["sampler_name"])
    if isinstance(seen.get("scheduler"), str):
        values["schedule"] = seen["scheduler"]
    if isinstance(seen.get("denoise"), int | float) and seen["denoise"] != 1:
        values["strength"] = seen["denoise"]
    inputs = sampling[0]["inputs"]
    for name, link in (("prompt", inputs.get("positive", inputs.get("guider"))), ("negative", inputs.get("negative"))):
        text = next((text for node in _above_link(link, nodes) if (text := _text(node)) is not None), None)
        if text is not None:
            values[name] = text
    return values, rest


def _text(node: Mapping[str, Any]) -> str | None:
    return next((node["inputs"][key] for key in COMFY_TEXTS if isinstance(node["inputs"].get(key), str)), None)


def _above_link(link: Any, nodes: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if isinstance(link, list) and link and str(link[0]) in nodes:
        yield from _above(nodes[str(link[0])], nodes)


def _above(node: Mapping[str, Any], nodes: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A node and all that its inputs come from, the nearest first, each once."""
    queue, known = [node], {id(node)}
    while queue:
        current = queue.pop(0)
        yield current
        for value in current["inputs"].values():
            source = nodes.get(str(value[0])) if isinstance(value, list) and value else None
            if source is not None and id(source) not in known:
                known.add(id(source))
                queue.append(source)
