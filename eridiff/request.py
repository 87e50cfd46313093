"""Everything that can be asked of an image, in one place.

The keywords of `generate`, the keys of a `sample:` section, the flags of the command line, the checks, the JSON in a PNG and
generating again are all derived from the fields of `Request`. A new option is one field, its use and its test.
"""

import logging
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from numbers import Real
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from eridiff import effects
from eridiff.errors import ConfigError
from eridiff.images import read_image, transparency, upright
from eridiff.recipe import recipe, recipes
from eridiff.schedulers.guidance import SkipLayers, within
from eridiff.schedulers.samplers import SAMPLERS, noises_of_a_step
from eridiff.schedulers.tables import ROUNDINGS

log = logging.getLogger(__name__)
Text = str | Mapping[str, str]  # a prompt, or one for each text encoder by name: clip, clip_g, t5
Table = str | Sequence[float] | Tensor  # a schedule by name, or its sigmas
Picture = (
    str | os.PathLike[str] | Image.Image | Tensor
)  # a file, an image, or `[B, 3, H, W]` in [-1, 1]; masks in [0, 1]
Checked = Any  # a `Request` as `checked` gives it: all that the model decides is settled, so that types are narrower
ENCODERS = ("clip", "clip_g", "t5")
SEEDS = 2**63
LARGEST_SIDE = 2**14  # pixels
GUIDANCE = frozenset({"guidance_scale", "cfg_scale", "true_cfg_scale"})  # words for how strongly a prompt is followed
NUMBERS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class Kind:
    """How the values of a field are read and written."""

    read: Callable[[str, Any], Any]  # (name for messages, value in a file) -> the field's value; raises ConfigError
    flag: Mapping[str, Any]  # how argparse takes it
    example: str  # as YAML
    write: Callable[[Any], Any] = lambda value: value  # the field's value -> JSON


def scalar(name: str, value: Any, kind: type) -> Any:
    """A value of the type wanted; whole numbers serve as floats. Raises ConfigError."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{name} is too large a number") from None
    if type(value) is kind:
        return value
    digits = isinstance(value, str) and re.fullmatch(r"[\d_, ]+", value)
    hint = f"; write {re.sub('[^0-9]', '', value)}" if digits else ""
    hint = "; write true or false" if kind is bool else hint
    raise ConfigError(f"{name} must be {NUMBERS[kind]}, not {value!r}{hint}")


def size_of(name: str, text: Any) -> tuple[int, int]:
    """(height, width) of a size written as WIDTHxHEIGHT."""
    found = re.fullmatch(r"(\d+)[xX](\d+)", text) if isinstance(text, str) else None
    if not found:
        raise ConfigError(f"{name} must be WIDTHxHEIGHT such as 1024x768, not {text!r}")
    return int(found[2]), int(found[1])


def _pair(kind: type, what: str, such_as: str) -> Callable[[str, Any], Any]:
    def read(name: str, value: Any) -> Any:
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise ConfigError(f"{name} must be {what}, such as {such_as}, not {value!r}")
        return tuple(scalar(name, number, kind) for number in value)

    return read


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(n, Real) for n in value)


def _schedule(name: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(scalar(name, number, float) for number in value)
    return scalar(name, value, str)


def _skip_layers(name: str, value: Any) -> Any:
    if not isinstance(value, dict):
        return scalar(name, value, bool)
    known_names(value, ("blocks", "scale", "start", "end"), "skip_layers")
    blocks = value.get("blocks")
    if not isinstance(blocks, list | tuple) or not all(type(block) is int and block >= 0 for block in blocks):
        raise ConfigError(f"{name} needs blocks, a list of numbers such as [7, 8, 9], not {blocks!r}")
    numbers = {"scale": 2.5, "start": 0.01, "end": 0.2} | {k: v for k, v in value.items() if k != "blocks"}
    return SkipLayers(tuple(blocks), **{k: scalar(f"skip_layers: {k}", v, float) for k, v in numbers.items()})


def _files(name: str, value: Any) -> Any:
    return tuple(scalar(name, file, str) for file in (value if isinstance(value, list | tuple) else [value]))


def listed_pictures(value: Any) -> list[Any]:
    """An image, or several, as a list."""
    return list(value) if isinstance(value, list | tuple) else [value]


def _path(value: Any) -> str | None:
    return os.fspath(value) if is_file(value) else None


def _reads(kind: type) -> Callable[[str, Any], Any]:
    return lambda name, value: scalar(name, value, kind)


TEXT = Kind(_reads(str), {"metavar": "TEXT"}, "blurry")
WHOLE = Kind(_reads(int), {"type": int, "metavar": "N"}, "64")
NUMBER = Kind(_reads(float), {"type": float, "metavar": "X"}, "0.5")
METHOD = Kind(_reads(str), {"choices": SAMPLERS}, "heun")
PROGRAM = Kind(_reads(str), {"choices": recipes()}, "diffusers")
SKIPPED = Kind(
    _skip_layers, {"action": "store_true"}, "true", lambda v: asdict(v) if isinstance(v, SkipLayers) else v or None
)
SWITCH = Kind(_reads(bool), {"action": "store_true"}, "true")
NAME = Kind(_schedule, {"metavar": "NAME"}, "karras", lambda v: v.tolist() if isinstance(v, Tensor) else v)
SIZE = Kind(size_of, {"metavar": "WxH"}, "1024x768", lambda value: value and f"{value[1]}x{value[0]}")
CORNER = Kind(
    _pair(int, "two numbers, top and left", "[0, 64]"), {"type": int, "nargs": 2, "metavar": ("TOP", "LEFT")}, "[0, 64]",
    lambda v: v and list(v),
)  # fmt: skip
SHARES = Kind(
    _pair(float, "two rising shares of the steps", "[0, 0.8]"), {"type": float, "nargs": 2, "metavar": ("START", "END")},
    "[0.0, 0.8]", list,
)  # fmt: skip
ROW = Kind(
    _pair(int, "two numbers, the image's and the batch's", "[1, 4]"), {"type": int, "nargs": 2, "metavar": ("ROW", "ROWS")},
    "[1, 4]", lambda v: v and list(v),
)  # fmt: skip
FILE = Kind(_reads(str), {"metavar": "FILE"}, "in.png", _path)
FILES = Kind(_files, {"metavar": "FILE", "action": "append"}, "[in.png, other.png]", lambda v: None if v is None else [_path(p) for p in listed_pictures(v)])  # fmt: skip


def one_of(*names: str) -> Kind:
    """One of some names; the last is the example."""
    return Kind(_reads(str), {"choices": names}, names[-1])


ROUNDED = ("float32", "float16", "bfloat16", "weights")  # weights: as the network's are
TIMESTEPS = ("float16_timestep", "bfloat16_timestep", "weights_timestep")


def option(
    default: Any, kind: Kind, help: str, *, low: float | None = None, high: float | None = None,
    words: Sequence[str] = (), flags: Sequence[str] = (), effect: Any = None, usual: Any = None, python: bool = False,
) -> Any:  # fmt: skip
    """A field of `Request`.

    - low, high: what numbers must lie between.
    - words: other tools' names for the key of a file.
    - flags: shorter names on the command line.
    - effect: a function of request and model: why the value has no effect, or None where it has one.
    - usual: what None is for every model; None where the model, or nothing, decides.
    - python: whether only a program can give it, because it goes with tensors.
    """
    told = {"kind": kind, "help": help, "low": low, "high": high, "words": words, "flags": flags}
    return field(default=default, metadata={**told, "effect": effect, "usual": usual, "python": python})


@dataclass(frozen=True)
class Request:
    """What is asked of an image, or of several in one batch; None is the model's own.

    Sizes are (height, width), corners (top, left), in pixels.
    """

    prompt: Text | Sequence[Text] = option("", TEXT, "what to generate; repeatable", words=("prompts",))
    negative: Text | Sequence[Text] | None = option(
        None, TEXT, "negative prompt", words=("negative_prompt", "neg"), effect=effects.guided
    )
    width: int | None = option(None, WHOLE, "in pixels, a multiple of 16", low=16, high=LARGEST_SIDE)
    height: int | None = option(None, WHOLE, "in pixels, a multiple of 16", low=16, high=LARGEST_SIDE)
    steps: int | None = option(
        None,
        WHOLE,
        "number of sampling steps",
        low=1,
        words=("sample_steps", "num_inference_steps"),
        effect=effects.counted,
    )
    seed: int | Sequence[int] | None = option(None, WHOLE, "seed of the noise (42)")
    sampler: str | None = option(None, METHOD, "sampler", effect=effects.suits)
    schedule: Table | None = option(
        None, NAME, "noise levels. SD 3: original, script, diffusers, candle, ...; SDXL: leading, karras, ..."
    )
    shift: float | None = option(
        None,
        NUMBER,
        "shift of the schedule: of SD 3 (3), of those of Flux that are not its own",
        low=0.01,
        high=100,
        effect=effects.shifted,
    )
    guidance_scale: float | None = option(
        None, NUMBER, "Flux: value of the guidance embedding (dev: 3.5)", low=0, high=1000, flags=("guidance",),
        effect=effects.embedded,
    )  # fmt: skip
    cfg_scale: float | None = option(
        None, NUMBER, "scale of classifier-free guidance; two network calls per step", low=0, high=1000,
        words=("true_cfg_scale",), flags=("cfg",),
    )  # fmt: skip
    cfg_rescale: float | None = option(
        None, NUMBER, "share of the standard deviation that is restored after guidance", low=0, high=1,
        words=("guidance_rescale",), effect=effects.guided, usual=0.0,
    )  # fmt: skip
    cfg_interval: tuple[float, float] = option(
        (0.0, 1.0), SHARES, "first and last share of the steps with guidance", effect=effects.guided
    )
    skip_layers: bool | SkipLayers = option(
        False, SKIPPED, "skip-layer guidance, as published for sd3.5-medium", effect=effects.skipped
    )
    part: tuple[float, float] = option(
        (0.0, 1.0), SHARES, "shares of the run; the `run` of the first part is the noise of the second", python=True
    )
    hand_over: float | None = option(
        None, NUMBER, "share of the run after which the refiner continues (0.8)", low=0, high=1,
        words=("refiner_start_at",), effect=effects.handed_over,
    )  # fmt: skip
    original_size: tuple[int, int] | None = option(
        None, SIZE, "SDXL's conditioning: size before scaling and cropping", low=1,
        effect=effects.taken("original_size"),
    )  # fmt: skip
    crop: tuple[int, int] | None = option(
        None, CORNER, "SDXL's conditioning: crop (0 0)", low=0, effect=effects.taken("crop")
    )
    target_size: tuple[int, int] | None = option(
        None, SIZE, "SDXL's conditioning: target size (the image's)", low=1,
        effect=effects.taken("target_size"),
    )  # fmt: skip
    aesthetic_score: float | None = option(
        None, NUMBER, "conditioning of SDXL's refiner (6)", low=0, high=10, effect=effects.taken("aesthetic_score")
    )
    negative_aesthetic_score: float | None = option(
        None, NUMBER, "the same for the negative prompt (2.5)", low=0, high=10,
        effect=effects.scored_negative,
    )  # fmt: skip
    image: Picture | None = option(None, FILE, "start from this image", effect=effects.edited)
    strength: float | None = option(
        None, NUMBER, "0 keeps the image, 1 keeps nothing of it (0.75)", low=0, high=1, effect=effects.begun
    )
    mask: Picture | None = option(None, FILE, "repaint only where this image is white", effect=effects.begun)
    mask_alpha: bool = option(
        False, SWITCH, "repaint where the mask is transparent, whatever its colours", effect=effects.masked
    )
    control: Picture | None = option(None, FILE, "the edges or depth map for Canny or Depth", effect=effects.followed)
    references: Picture | Sequence[Picture] | None = option(
        None, FILES, "an image that Kontext edits; repeatable", words=("ctrl_img",),
        flags=("reference",), effect=effects.referred,
    )  # fmt: skip
    lora_scale: float | None = option(
        None, NUMBER, "scale of the LoRAs that have none of their own (1)", low=-1000, high=1000,
        words=("network_multiplier",), effect=effects.weighed,
    )  # fmt: skip
    block_cache: float | None = option(
        None, NUMBER, "lossy, Flux and SD 3: blocks behind the first are not computed while it changes by less than this (0.1)",
        low=0, high=100, effect=effects.cached,
    )  # fmt: skip
    recipe: str | None = option(None, PROGRAM, "generate as another program does, where nothing else is asked")
    # schedules and samplers, where programs differ
    timestep_offset: int | None = option(
        None, WHOLE, "SDXL: added to leading timesteps (1)", low=0, high=999, effect=effects.offset
    )
    timestep_rounding: str | None = option(
        None, one_of(*ROUNDINGS), "whole timesteps for the network, of 1000 (none)", usual="none"
    )
    final_noise: str | None = option(
        None, one_of("zero", "lowest"), "SDXL: where the last step ends, no noise or the training's lowest (ddim)", effect=effects.ending
    )  # fmt: skip
    clip_clean: float | None = option(
        None, NUMBER, "the clean latents that a step sees are clipped to this size", low=0.01, high=1000
    )
    eta: float | None = option(
        None, NUMBER, "share of new noise in the steps of a sampler that adds noise (1; ddim 0)", low=0, high=1, effect=effects.renewed,
    )  # fmt: skip
    churn: float | None = option(
        None, NUMBER, "SDXL, euler and heun: noise that is added over the run before the steps (0)", low=0, high=1000,
        effect=effects.churned, usual=0.0,
    )  # fmt: skip
    # noise, rounding and the order of a batch, where programs differ
    noise_scale: str | None = option(
        None, one_of("one", "sigma"), "SDXL: the seed's noise is multiplied with one or the first point's share of noise (one)",
        effect=effects.scaled, usual="one",
    )  # fmt: skip
    noise_layout: str | None = option(
        None, one_of("latents", "packed"), "Flux: the noise is made as latents, or as tokens (latents)",
        effect=effects.taken("noise_layout"), usual="latents",
    )  # fmt: skip
    noise_dtype: str | None = option(
        None, one_of(*ROUNDED, "float64"), "the noise is made in this dtype (float32); float64 is other noise", usual="float32"
    )  # fmt: skip
    noise_device: str | None = option(
        None, one_of("cpu", "model"), "where the noise is made (cpu); the model's device has other noise", usual="cpu"
    )
    noise_generator: str | None = option(
        None, one_of("each", "one", "run"),
        "each image has a generator of its own seed, or one serves a batch, or goes on over the images of a section (each)",
        usual="each",
    )  # fmt: skip
    noise_skip: int | None = option(
        None, WHOLE, "how often the generator has made noise of one image before (0)", low=0, high=10**6, usual=0
    )
    noise_row: tuple[int, int] | None = option(
        None, ROW, "this image is such a row, from 0, of a batch whose noise one generator makes", effect=effects.in_one
    )
    latents_dtype: str | None = option(
        None, one_of(*ROUNDED), "latents are rounded to this dtype after each step (float32)", usual="float32"
    )
    time_dtype: str | None = option(
        None, one_of(*ROUNDED, *TIMESTEPS),
        "the network is given 1000 times the time as this dtype computes it (float32); of `_timestep` the product is rounded first",
        usual="float32",
    )  # fmt: skip
    guidance_dtype: str | None = option(
        None, one_of(*ROUNDED), "the same for the guidance embedding (float32): 3.5 becomes 3.504 in bfloat16",
        effect=effects.taken("guidance_dtype"), usual="float32",
    )  # fmt: skip
    cfg_dtype: str | None = option(
        None,
        one_of(*ROUNDED),
        "classifier-free guidance is computed in this dtype (float32)",
        effect=effects.guided,
        usual="float32",
    )
    cfg_batch: str | None = option(
        None, one_of("positive_first", "negative_first", "apart"),
        "order of the prompts in a guided call, or two calls (positive_first)", effect=effects.guided, usual="positive_first",
    )  # fmt: skip
    strength_rounding: str | None = option(
        None, one_of("up", "down", "float_up"),
        "to how many steps a strength is rounded (up); float_up: as floats have it, 25 x 0.56 is 15", effect=effects.begun, usual="up",
    )  # fmt: skip
    pixels: str | None = option(
        None, one_of("round", "truncate"), "to which of its two neighbours a level of 255 goes (round)", usual="round"
    )

    # how prompts are encoded: the names of ENCODING
    t5_length: int | None = option(
        None, WHOLE, "rows of T5, of SD 3 at most (Flux 512, schnell and SD 3 256)", low=1, high=512,
        words=("max_sequence_length", "t5xxl_max_token_length"), effect=effects.rows_of_t5,
    )  # fmt: skip
    t5_mask: bool | None = option(
        None, SWITCH, "Flux, SD 3: mask T5's padding, for a network that was trained with a mask",
        words=("apply_t5_attn_mask",), effect=effects.hidden,
    )  # fmt: skip
    t5_padding: str | None = option(
        None, one_of("original", "diffusers"),
        "SD 3: pad T5 to what the prompt needs, as the original does, or always to t5_length, as diffusers does",
        effect=effects.padded,
    )  # fmt: skip
    without_t5: str | None = option(
        None,
        one_of("zeros", "none"),
        "SD 3: if no T5 is loaded, zeros in place of its rows, or no rows",
        effect=effects.replaced,
    )
    clip_windows: str | None = option(
        None, one_of("first", "all"),
        "SD 3, SDXL: of a prompt longer than CLIP's 77 tokens the first 77, or all in windows of 77",
        effect=effects.taken("clip_windows"),
    )  # fmt: skip
    empty_negative: str | None = option(
        None,
        one_of("zeros", "encoded"),
        "SDXL: what a missing negative prompt is (zeros)",
        effect=effects.missing_negative,
    )
    prompt_weights: str | None = option(
        None, one_of("none", "kohya", "a1111", "comfyui"),
        "the program whose weights such as (swan:1.3) are read (none); without one brackets are text", effect=effects.emphasised,
        usual="none",
    )  # fmt: skip

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Request":
        """Of values by field. Raises ConfigError, with the nearest name, for one that is not a field."""
        known_names(values, FIELDS, "a request", "is not a setting of")
        return cls(**values)

    def check(self, multiple: int | None = None) -> None:
        """What no model can do: numbers and names that are impossible. Raises ConfigError.

        - multiple: of which the sides must be; None leaves them to the model.
        """
        for name, told in FIELDS.items():
            value, low, high = getattr(self, name), told.metadata["low"], told.metadata["high"]
            kind = told.metadata["kind"]
            words = kind.flag.get("choices")
            if value is not None and words and kind not in (METHOD, PROGRAM) and value not in words:
                raise ConfigError(f"{name} must be {', '.join(words[:-1])} or {words[-1]}, not {value!r}")
            if value is not None and kind is SWITCH:
                scalar(name, value, bool)
            if value is None or low is None:
                continue
            if told.metadata["kind"] in (WHOLE, NUMBER):
                scalar(name, value, int if told.metadata["kind"] is WHOLE else float)
            if name == "steps" and value < 1:
                raise ConfigError(f"a run needs at least one step, not {value}")
            if told.metadata["kind"] in (SIZE, CORNER):
                if not _is_pair(value) or any(type(n) is not int or n < low for n in value):
                    raise ConfigError(f"{name} must be two whole numbers of pixels, at least {low}, not {value}")
            elif high is not None and not low <= value <= high:
                raise ConfigError(f"{name} must be between {low} and {high}, not {value}")
        for name, what in (("cfg_interval", "shares of the steps"), ("part", "shares of the run")):
            pair = getattr(self, name)
            if not _is_pair(pair) or not 0 <= pair[0] < pair[1] <= 1:
                raise ConfigError(f"{name} must be two rising {what} such as 0 and 0.8, not {pair}")
        skip = self.skip_layers
        if isinstance(skip, SkipLayers):
            if not skip.blocks or any(type(block) is not int or block < 0 for block in skip.blocks):
                raise ConfigError(f"skip_layers needs blocks, numbers such as 7, 8, 9, not {list(skip.blocks)}")
            if not (0 <= skip.start < skip.end <= 1 and -1000 <= skip.scale <= 1000):
                raise ConfigError(
                    f"skip_layers must have a scale between -1000 and 1000 and rising shares of the steps, not {skip.scale:g}, "
                    f"{skip.start:g} and {skip.end:g}"
                )
        elif not isinstance(skip, bool):
            raise ConfigError(
                f"skip_layers must be True, False or an eridiff.schedulers.guidance.SkipLayers, not {skip!r}"
            )
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise ConfigError(f"'{self.sampler}' is not a sampler; there are {', '.join(SAMPLERS)}")
        if self.hand_over is not None and self.hand_over in (0, 1):
            raise ConfigError(
                f"hand_over must be above 0 and below 1, not {self.hand_over}: base and refiner both work"
            )
        for seed in seeds_of(self):
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < SEEDS:
                raise ConfigError(f"the seed must be a whole number from 0 to 2^63 - 1, not {seed!r}")
        if self.noise_generator in ("one", "run") and len({*seeds_of(self)}) > 1:
            raise ConfigError(
                f"noise_generator {self.noise_generator} begins with one seed, not with {len({*seeds_of(self)})}"
            )
        row = self.noise_row
        if row is not None and not (_is_pair(row) and all(type(n) is int for n in row) and 0 <= row[0] < row[1]):
            raise ConfigError(f"noise_row must be a row and the number of rows, such as 1 and 4, not {row}")
        if multiple is not None:
            for name in ("width", "height"):
                if (side := getattr(self, name)) is not None:
                    check_side(name, side, multiple)

    def says(self, name: str) -> bool:
        """Whether a field is set to something that is not its default."""
        value, default = getattr(self, name), FIELDS[name].default
        return value is not default and not (isinstance(value, str | int | float | tuple) and value in ("", default))

    def filled(self, model: Any) -> "Request":
        """The request with what its recipe chooses wherever nothing is asked and the choice has an effect on the model.

        Raises ConfigError for a recipe that is not there or is not for the model's family.
        """
        if self.recipe is None:
            return self
        chosen = {field: choice.value for field, choice in recipe(self.recipe, model.family).of(self.sampler).items()}
        said = {name for name in chosen if getattr(self, name) is not None}  # an empty negative prompt too
        read = {
            name: FIELDS[name].metadata["kind"].read(name, value)
            for name, value in chosen.items()
            if value not in (None, "")
        }
        if not isinstance(self.schedule, str | None):
            read.pop("steps", None)  # the sigmas say it
        if any(getattr(self, name) is not None for name in ("image", "control", "references")):
            read = {name: value for name, value in read.items() if name not in ("width", "height")}  # they have a size
        full = replace(self, **{name: value for name, value in read.items() if name not in said})
        idle = [name for name in full.without_effect(model) if name in read and name not in said]
        usual: dict[str, Any] = {name: FIELDS[name].default for name in idle}
        return replace(full, **usual)

    def text(self) -> dict[str, Any]:
        """How the prompts are to be encoded, as `encode_prompt` takes it: what is set of it."""
        return {name: getattr(self, name) for name in ENCODING if self.says(name)}

    def check_beside(self, noise: Any, checked: Checked) -> None:
        """Raises ConfigError for what says how noise is made where it was passed and the sampler makes none on the way, and
        for a part that begins within the run where there is nothing to go on with.

        One seed, which such an image records, is only warned of; several are as many images. `checked` is this request as
        `checked` gives it. A part that goes on with a run is asked what the run was.
        """
        if noise is None and checked.part[0] > 0 and checked.image is None:
            raise ConfigError(
                f"a part from {checked.part[0]:g} on continues a run: pass the run of the part before as noise, kept with keep=('run',)"
            )
        if noise is None or checked.part[0] > 0 or noises_of_a_step(checked.sampler, checked.eta, checked.churn):
            return
        why = f"has no effect beside noise, as {checked.sampler} makes none on the way"
        for name in NOISE:
            if self.says(name) and getattr(self, name) != FIELDS[name].metadata["usual"]:
                raise ConfigError(f"{name} {why}")
        if len(seeds_of(self)) == 1:
            log.warning("seed %s", why)

    def encoded(self) -> "Request":
        """What is left to ask when the prompts are encoded."""
        usual: dict[str, Any] = {name: FIELDS[name].default for name in ENCODING}
        return replace(self, prompt="", negative=None, **usual)

    def without_effect(self, model: Any) -> dict[str, str]:
        """Of the fields that are set, those that would change nothing on the way that this model takes, and why."""
        found = {}
        for name, told in FIELDS.items():
            effect = told.metadata["effect"]
            same = told.metadata["usual"] is not None and getattr(self, name) == told.metadata["usual"]
            if effect is not None and self.says(name) and not same and (reason := effect(self, model)):
                found[name] = reason
        return found

    def checked(self, model: Any, rows: int = 1) -> Checked:
        """The request with everything settled that the model decides: no None but where there is nothing.

        Prompts and seeds become lists of equal length, images are opened. `rows` is how many rows of conditioning are
        passed. Raises ConfigError for what is impossible, and for a value without effect on this model.
        """
        asked = replace(self, **{name: plain(getattr(self, name)) for name in FIELDS}).filled(model)
        asked.check()
        for name, reason in asked.without_effect(model).items():
            raise ConfigError(f"{name} has no effect {reason}")
        run, count = effects.steps_of(asked, model)
        if asked.says("cfg_interval") and run and not any(within(asked.cfg_interval, step, count) for step in run):
            low, high = asked.cfg_interval
            raise ConfigError(
                f"no step would be guided: of {len(run)} step{'s' * (len(run) != 1)} none lies in the cfg_interval from {low:g} to {high:g}; "
                "widen it, or ask for a cfg_scale of 1"
            )
        prompts, seeds = matched(asked, rows)
        opened: dict[str, Any] = {name: _opened(getattr(asked, name)) for name in ("image", "mask", "control")}
        if asked.mask_alpha:
            opened["mask"] = transparency(opened["mask"])
        if asked.references is not None:
            opened["references"] = model.referred([_opened(p) for p in listed_pictures(asked.references)])
        begun = [opened[name] for name in ("image", "control") if opened[name] is not None]
        given = next(iter([*begun, *opened.get("references", ())]), None)
        width, height = settle_size(asked.width, asked.height, given, model.defaults(), model.multiple)
        sampler = model.sampling.sampler if asked.sampler is None else asked.sampler
        schedule = model.table_of(sampler) if asked.schedule is None else asked.schedule
        steps = model.sampling.steps if asked.steps is None else asked.steps
        if schedule is not None and not isinstance(schedule, str):
            schedule = tuple(float(sigma) for sigma in schedule)
            steps = len(schedule) - 1
        skip: Any = asked.skip_layers
        if skip is True:
            skip = getattr(model.sampling, "skip_layers", None)
            if skip is None:
                raise ConfigError(f"there is no published skip-layer guidance for {model.called}; sd3.5-medium has one")
        usual: dict[str, Any] = {
            name: told.metadata["usual"] if getattr(asked, name) is None else narrowed(getattr(asked, name), model.weights_dtype)
            for name, told in FIELDS.items() if told.metadata["usual"] is not None
        }  # fmt: skip
        settled = replace(
            asked, **usual, prompt=prompts, seed=seeds, width=width, height=height, sampler=sampler, schedule=schedule,
            steps=steps, strength=effects.strength_of(asked, model), skip_layers=skip, guidance_scale=model.guidance(asked.guidance_scale),
            cfg_scale=model.sampling.cfg_scale if asked.cfg_scale is None else asked.cfg_scale,
            negative=None if asked.negative is None else listed(asked.negative), **opened,
        )  # fmt: skip
        return replace(settled, **model.told(settled))

    def to_json(self) -> dict[str, Any]:
        """For a PNG: of images their files, None where they were no files."""
        return {name: told.metadata["kind"].write(getattr(self, name)) for name, told in FIELDS.items()}

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> "Request":
        """What a PNG says, older ones too; raises ConfigError where it cannot be read."""
        values = {}
        for name, told in FIELDS.items():
            key = next((word for word in (name, *told.metadata["words"]) if settings.get(word) is not None), None)
            if key is not None:
                text = name in ("prompt", "negative")
                values[name] = settings[key] if text else told.metadata["kind"].read(key, settings[key])
        return cls(**values)


FIELDS = {told.name: told for told in fields(Request)}
NOISE = ("noise_layout", "noise_dtype", "noise_device", "noise_generator", "noise_skip", "noise_row")
ENCODING = ("t5_length", "t5_mask", "t5_padding", "without_t5", "clip_windows", "empty_negative", "prompt_weights")
WORDS = {
    word: name for name, told in FIELDS.items() for word in told.metadata["words"]
}  # other tools' names -> eridiff's


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Values by field or word of guidance, weakest layer first.

    A layer that says one of several settings that exclude each other removes the others from the weaker ones: words of
    guidance, and the number of steps beside a list of sigmas.
    """
    result: dict[str, Any] = {}
    for layer in layers:
        if GUIDANCE & layer.keys():
            result = {name: value for name, value in result.items() if name not in GUIDANCE}
        if "steps" in layer and not isinstance(result.get("schedule"), str):
            result.pop("schedule", None)
        if "schedule" in layer and not isinstance(layer["schedule"], str):
            result.pop("steps", None)
        result |= layer
    return result


ELSEWHERE = {  # names that other programs have, and what does the same here
    "size": "pass width and height",
    "resolution": "pass width and height",
    **dict.fromkeys(
        ("n_iter", "batch_size", "num_images_per_prompt"), "repeat the prompt, each time with its own seed"
    ),
    **dict.fromkeys(("generator", "seeds"), "pass seed, one per prompt"),
    "denoising_strength": "it is called strength",
    "init_image": "it is called image",
    "scheduler": "it is called sampler, and the noise levels schedule",
}


def known_names(given: Mapping[str, Any], known: Any, where: str, what: str = "is not a key of") -> None:
    """Raises ConfigError, with the nearest known name, unless all names are known."""
    for name in given:
        if name in ELSEWHERE and name not in known:
            raise ConfigError(f"'{name}' {what} {where}; {ELSEWHERE[name]}")
        if name not in known:
            near = get_close_matches(str(name).lower(), list(known), 1, 0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"'{name}' {what} {where}; {hint}")


def check_side(name: str, side: int, multiple: int) -> None:
    """Raises ConfigError unless a side of an image is a positive multiple."""
    if side < multiple or side % multiple:
        near = max(multiple, round(side / multiple) * multiple)
        raise ConfigError(f"the {name} must be a multiple of {multiple}, not {side}; the nearest is {near}")


def settle_size(
    width: int | None, height: int | None, given: Any, defaults: Mapping[str, Any], multiple: int = 16
) -> tuple[int, int]:
    """Said, else the given image's rounded down to the multiple, else the default."""
    if given is not None:
        found = (given.shape[-1], given.shape[-2]) if isinstance(given, Tensor) else given.size
        sides = (max(multiple, side // multiple * multiple) for side in found)
        defaults = dict(zip(("width", "height"), sides, strict=True))
    width = defaults["width"] if width is None else width
    height = defaults["height"] if height is None else height
    check_side("width", width, multiple)
    check_side("height", height, multiple)
    return width, height


def plain(value: Any) -> Any:
    """Numbers of NumPy as Python's, also in lists; everything else as it is."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def listed(prompt: Text | Sequence[Text]) -> list[Text]:
    """A prompt, or several, as a list. Raises ConfigError for what is not text."""
    found = list(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes) else [prompt]
    for text in (text for each in found for text in (each.values() if isinstance(each, Mapping) else [each])):
        if not isinstance(text, str):
            raise ConfigError(f"a prompt is a text, or a text for each text encoder by name, not {text!r}")
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise ConfigError(f"the prompt {text!r} has half a character (a lone surrogate), which is not text")
    return found


def seeds_of(request: "Request") -> list[Any]:
    """One seed, or several, as a list."""
    seed = request.seed
    return [] if seed is None else list(seed) if isinstance(seed, list | tuple) else [seed]


def is_file(picture: Any) -> bool:
    """Whether an image is given by its file."""
    return isinstance(picture, str | os.PathLike)


def matched(request: Request, rows: int = 1) -> tuple[list[Text], list[int]]:
    """Prompts and seeds of equal number, as many as there are `rows` of conditioning; one of either is repeated."""
    prompts = listed(request.prompt)
    seeds = [secrets.randbits(32)] if request.seed is None else seeds_of(request)
    if not prompts or not seeds:
        raise ConfigError(f"no {'seed' if prompts else 'prompt'} was given")
    count = max(len(prompts), len(seeds), rows)
    if any(n not in (1, count) for n in (len(prompts), len(seeds), rows)):
        raise ConfigError(f"{len(prompts)} prompts and {len(seeds)} seeds do not match; give as many, or one of either")
    return prompts * (count // len(prompts)), seeds * (count // len(seeds))


def narrowed(value: Any, dtype: str) -> Any:
    """A setting, where it is the dtype of the weights by that dtype's name."""
    if not isinstance(value, str) or value not in ("weights", "weights_timestep"):
        return value
    return value.replace("weights", dtype) if dtype in ("float16", "bfloat16") else "float32"


def _opened(picture: Any) -> Any:
    return read_image(picture) if is_file(picture) else upright(picture)
