"""Stable Diffusion XL: two CLIPs, sizes as conditioning, discrete noise levels; base, refiner, inpainting, Turbo, Lightning.

Sources: Stability-AI/generative-models; Podell et al. 2023; the schedulers that diffusers publishes with the checkpoints.
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from eridiff.errors import ConfigError
from eridiff.inference.base import DiffusionInference
from eridiff.inference.handed_in import check_encoders
from eridiff.inference.latents import beside, dtype_of, finite_features
from eridiff.inference.options import Options
from eridiff.inference.result import Prompt, Result
from eridiff.inference.settings import Defaults, Text, matched, spoken
from eridiff.memory.stages import Stages
from eridiff.models.autoencoder import Autoencoder
from eridiff.models.unet import UNet, UNetConfig, UNetRun, size_vector
from eridiff.schedulers import Schedule, discrete
from eridiff.text import Conditioning
from eridiff.text.encoders import ClipEncoder, ClipFeatures
from eridiff.weights.detect import Component
from eridiff.weights.load import prediction_told
from eridiff.weights.locate import Model, Parts, locate

log = logging.getLogger(__name__)
TIMESTEPS = {
    "leading": discrete.leading_timesteps, "trailing": discrete.trailing_timesteps, "legacy": discrete.legacy_timesteps,
    "linspace": discrete.linspace_timesteps, "ddim": discrete.leading_timesteps, "lcm": discrete.lcm_timesteps,
    "turbo": discrete.turbo_timesteps,
}  # fmt: skip
SIGMAS = {"karras": discrete.karras_sigmas, "exponential": discrete.exponential_sigmas}
PREDICTIONS = ("epsilon", "v", "sample")
PREDICTION_TYPES = {"v_prediction": "v", **{name: name for name in PREDICTIONS}}  # as configurations name them
HAND_OVER = 0.8  # the share of a run after which a refiner takes over
SIZES = 256  # features of each number beside the pooled vector


@dataclass(frozen=True)
class SDXLDefaults(Defaults):
    """How a published SDXL is sampled when nothing is said."""

    steps: int = 50
    cfg_scale: float = 5.0
    schedule: str = "leading"
    guidance_scale: float | None = None  # of lcm-sdxl's embedding


class SDXLInference(DiffusionInference):
    """Draws with any SDXL: `SDXLInference().load_model("sd_xl_base_1.0.safetensors")`, or with modules already there."""

    family = "unet"
    encoders = ("clip", "clip_g")
    recorded = (*DiffusionInference.recorded, "prediction", "zero_terminal_snr", "empty_negative", "clip_windows")
    variants: ClassVar[Mapping[str, SDXLDefaults]] = {
        "base": SDXLDefaults(),
        "refiner": SDXLDefaults(),
        "inpaint": SDXLDefaults(steps=20, cfg_scale=7.5),
        "turbo": SDXLDefaults(4, 1.0, "euler_ancestral", 512, 512, "turbo"),
        "lightning": SDXLDefaults(4, 1.0, schedule="trailing"),
        "lcm": SDXLDefaults(4, 1.0, "lcm", schedule="lcm", guidance_scale=8.0),
    }
    network: UNet

    def __init__(
        self,
        network: UNet | None = None,
        autoencoder: Autoencoder | None = None,
        clip: ClipEncoder | None = None,
        clip_g: ClipEncoder | None = None,
        *,
        prediction: str | None = None,
        zero_terminal_snr: bool | None = None,
        empty_negative: str = "zeros",
        clip_windows: str = "first",
        original_size: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        aesthetic_score: float = 6.0,
        negative_aesthetic_score: float = 2.5,
        **options: Unpack[Options],
    ) -> None:
        """Use these modules as they are, or leave them out and call `load_model`.

        - network, autoencoder: eridiff's modules, those of a training run for example.
        - clip, clip_g: the text encoders; not needed where conditionings are passed in.
        - prediction: epsilon, v or sample; None is what the file says, else epsilon.
        - zero_terminal_snr: whether the schedule ends in pure noise; None is what the file says, else not.
        - empty_negative: what a missing negative prompt is: "zeros", as in sgm and diffusers (the refiner always encodes the
          empty prompt), or "encoded", as in kohya's scripts and ComfyUI.
        - clip_windows: of a prompt longer than CLIP's 77 tokens the "first" window or "all", 77 rows each.
        - original_size, target_size: (height, width) in pixels, given to the network as conditioning; None is the image's size.
        - crop: (top, left) in pixels, given to the network as conditioning.
        - aesthetic_score, negative_aesthetic_score: 0 to 10, given to the refiner in place of the target size.
        - variant: base, refiner, inpaint, turbo, lightning or lcm.
        - device, dtype, offload, vae_rows, progress, allow_unknown: as in `eridiff.inference.options.Options`.
        """
        for name, value, known in (
            ("prediction", prediction, (None, *PREDICTIONS)), ("empty_negative", empty_negative, ("zeros", "encoded")),
            ("clip_windows", clip_windows, ("first", "all")),
        ):  # fmt: skip
            if value not in known:
                raise ConfigError(f"{name} must be {' or '.join(str(k) for k in known if k)}, not '{value}'")
        for name, pair, least in (
            ("original_size", original_size, 1),
            ("crop", crop, 0),
            ("target_size", target_size, 1),
        ):
            if pair is not None and (len(pair) != 2 or any(type(n) is not int or n < least for n in pair)):
                raise ConfigError(f"{name} must be two whole numbers of pixels, at least {least}, not {pair}")
        for name, score in (
            ("aesthetic_score", aesthetic_score),
            ("negative_aesthetic_score", negative_aesthetic_score),
        ):
            if not 0 <= score <= 10:
                raise ConfigError(f"{name} must be between 0 and 10, not {score}")
        super().__init__(network, autoencoder, **options)
        check_encoders(type(self), clip=clip, clip_g=clip_g)
        self.clip, self.clip_g = clip, clip_g
        self.asked_prediction, self.asked_zero_snr = prediction, zero_terminal_snr
        self.prediction, self.zero_terminal_snr = prediction or "epsilon", bool(zero_terminal_snr)
        self.empty_negative, self.clip_windows = empty_negative, clip_windows
        self.original_size, self.crop, self.target_size = original_size, crop, target_size
        self.aesthetic_score, self.negative_aesthetic_score = aesthetic_score, negative_aesthetic_score

    @staticmethod
    def possible_variants(config: UNetConfig) -> list[str]:
        if config.in_channels == 9:
            return ["inpaint"]
        if _is_refiner(config):
            return ["refiner"]
        return ["lcm"] if config.guidance else ["base", "turbo", "lightning"]

    @staticmethod
    def needed(config: UNetConfig) -> tuple[str, ...]:
        return ("clip_g",) if _is_refiner(config) else ("clip", "clip_g")

    @staticmethod
    def text_widths(configs: Mapping[str, Mapping[str, Any]]) -> tuple[int, int]:
        width = sum(configs[name]["hidden_size"] for name in ("clip", "clip_g") if name in configs)
        return width, configs["clip_g"]["projection_dim"]

    @staticmethod
    def told_widths(config: UNetConfig) -> tuple[int, int]:
        return config.text_width, config.vector_width - SIZES * (5 if _is_refiner(config) else 6)

    @property
    def multiple(self) -> int:  # type: ignore[override]
        """Every stage halves the latents' sides: 32 pixels, 64 for the refiner."""
        return int(8 * 2 ** (self.network.config.levels - 1))

    def load_model(self, model: Model | Parts) -> Self:
        """As DiffusionInference.load_model; what the file says of its prediction wins over the usual and forbids another."""
        parts = locate(model, self.allow_unknown)
        if self.family in parts.components:
            told, zero = _told(parts.components[self.family])
            asked = self.asked_prediction
            if told is not None and asked not in (None, told):
                path = parts.components[self.family].checkpoint.path
                raise ConfigError(f"{path} says that it predicts {told}, not {asked}")
            self.prediction = asked or told or "epsilon"
            self.zero_terminal_snr = zero if self.asked_zero_snr is None else self.asked_zero_snr
        return super().load_model(parts)

    def follow(self, config: Mapping[str, Any], given: Collection[str]) -> None:
        self.prediction = self.asked_prediction or PREDICTION_TYPES.get(str(config.get("prediction_type")), "epsilon")
        if self.asked_zero_snr is None:
            self.zero_terminal_snr = config.get("rescale_betas_zero_snr") is True
        if config.get("force_zeros_for_empty_prompt") is False and "empty_negative" not in given:
            self.empty_negative = "encoded"

    def generate(
        self, prompt: Text | Sequence[Text] = "", *, refiner: "SDXLInference | None" = None,
        hand_over: float | None = None,
        **options: Any,
    ) -> Result:  # fmt: skip
        """As DiffusionInference.generate; with a `refiner`, which takes over after the share `hand_over` of the run (0.8).

        The refiner gets the latents as they are and reads the prompts by its own encoder. Raises ConfigError for a refiner
        that is asked to begin from noise, and for a hand-over that leaves one of both nothing to do or has no refiner.
        """
        if refiner is None:
            if hand_over is not None:
                raise ConfigError("hand_over needs the refiner that takes over")
            return super().generate(prompt, **options)
        hand_over = HAND_OVER if hand_over is None else hand_over
        if refiner.variant != "refiner" or self.variant == "refiner":
            raise ConfigError(f"a base and a refiner draw together, not {self.variant} and {refiner.variant}")
        if options.get("conditioning") is not None or not 0 < hand_over < 1:
            raise ConfigError("with a refiner hand_over must be between 0 and 1, and prompts are given as text")
        options["seed"] = seeds = matched(prompt, options.get("seed"))[1]
        options["steps"] = self.sampling.steps if options.get("steps") is None else options["steps"]
        keep = options.pop("keep", ())
        first = super().generate(prompt, **options, part=(0.0, hand_over), keep=("latents",))
        options |= {"width": first.images[0].width, "height": first.images[0].height, "seed": seeds}
        options.pop("image", None), options.pop("strength", None), options.pop("mask", None)
        result = refiner.generate(prompt, **options, part=(hand_over, 1.0), noise=first.latents, keep=keep)
        own = {name: first.settings[0][name] for name in (*self.source, *self.recorded, "dtypes", "handed_in")}
        both = [{**settings, **self.told_sizes(settings["width"], settings["height"]), **own, "refiner": refiner.source.get("parts"), "hand_over": hand_over, "part": [0.0, 1.0]}
                for settings in result.settings]  # fmt: skip
        return replace(result, settings=both)

    def generate_each(self, requests: Sequence[Mapping[str, Any]]) -> Iterator[Result]:
        """As DiffusionInference.generate_each; where a refiner takes part, one after the other."""
        if any({"refiner", "hand_over"} & request.keys() for request in requests):
            yield from (self.generate(**request) for request in requests)
        else:
            yield from super().generate_each(requests)

    def _stages(self, asked: Any) -> Stages[Result]:
        if self.variant == "refiner" and asked.part[0] == 0 and asked.image is None:
            raise ConfigError(
                "the refiner finishes pictures: give it to a base as refiner, or an image with a strength"
            )
        return (yield from super()._stages(asked))

    def told_sizes(self, width: int, height: int) -> dict[str, Any]:
        """What the network is told of an image, as the `sample:` section and the command line write it."""
        size = height, width
        original, target = (f"{w}x{h}" for h, w in (self.original_size or size, self.target_size or size))
        scores = {n: getattr(self, n) for n in ("aesthetic_score", "negative_aesthetic_score")}
        rest = scores if self.variant == "refiner" else {"target_size": target}
        return {"original_size": original, "crop": list(self.crop), **rest}

    def set_encoders(self, modules: Mapping[str, nn.Module], tokenizers: Mapping[str, Any]) -> None:
        self.clip = ClipEncoder(modules["clip"], tokenizers["clip"]) if "clip" in modules else None
        self.clip_g = ClipEncoder(modules["clip_g"], tokenizers["clip_g"], pad=0, name="CLIP-G")

    def encoding(self, prompts: Sequence[Text]) -> Stages[Conditioning]:
        """Both CLIPs' rows side by side (the refiner has only CLIP-G): text `[B, 77, text_width]`, pooled `[B, P]`."""
        names = self.needed(self.network.config)
        encoders = {"clip": self.clip, "clip_g": self.clip_g}
        texts = {name: spoken(prompts, name, names) for name in names}
        features = []
        for name in names:
            encoder = encoders[name]
            if encoder is None:
                raise ConfigError(f"no text encoders are loaded: hand in conditioning, or give {' and '.join(names)}")
            count = 1
            if self.clip_windows == "all":
                count = max(encoder.windows_needed(text) for text in texts.values())
            ids = encoder.tokenize(texts[name], windows=count)
            yield encoder.module
            features.append(encoder(ids))
        return joined(*features)

    def default_negative(self, prompts: list[Text]) -> Stages[Prompt]:
        if self.empty_negative == "encoded" or self.variant == "refiner":
            return (yield from super().default_negative(prompts))
        positive = yield from self.encoding(prompts)
        return Prompt(positive, Conditioning(torch.zeros_like(positive.text), torch.zeros_like(positive.pooled)))

    def named_schedule(self, steps: int, width: int, height: int, name: str | None, shift: float | None) -> Schedule:
        """Noise levels at leading (published), trailing, linspace, legacy (sgm), ddim, lcm or turbo timesteps; or karras,
        exponential, between the ends of the training's table."""
        name = name or self.sampling.schedule
        if shift is not None or name not in {**TIMESTEPS, **SIGMAS}:
            what = f"'{name}' is no schedule of SDXL" if shift is None else "SDXL's schedules have no shift"
            raise ConfigError(f"{what}; there are {', '.join([*TIMESTEPS, *SIGMAS])}")
        alphas = discrete.alphas_cumprod(self.zero_terminal_snr)
        table = discrete.finite_sigma_table(alphas)
        if name in SIGMAS:
            return self.schedule_through(
                torch.cat([SIGMAS[name](steps, float(table[-1]), float(table[0])), table.new_zeros(1)])
            )
        timesteps = TIMESTEPS[name](steps).clamp(max=discrete.LEVELS - 1)
        sigmas = discrete.sigmas_at(timesteps, alphas)
        final = float(table[0]) if name == "ddim" and sigmas[-1] > table[0] else 0.0
        return discrete.discrete_schedule(timesteps, sigmas, self.prediction, final)

    def schedule_through(self, sigmas: Tensor) -> Schedule:
        """Sigmas as in variance-exploding space: from at most 14.6 down to 0."""
        falling = len(sigmas) > 1 and bool((sigmas.diff() < 0).all()) and bool(torch.isfinite(sigmas).all())
        if not falling or sigmas[-1] < 0:
            raise ConfigError(f"sigmas must be at least two numbers that fall to 0, not {sigmas.tolist()}")
        alphas = discrete.alphas_cumprod(self.zero_terminal_snr)
        timesteps = discrete.timesteps_at(sigmas[:-1], alphas)
        return discrete.discrete_schedule(timesteps, sigmas[:-1].double(), self.prediction, float(sigmas[-1]))

    def table_of(self, sampler: str) -> str | None:
        return sampler if sampler in ("ddim", "lcm") else None

    def place(self, schedule: Schedule, share: float) -> int:
        """By timestep, as diffusers hands over from the base to the refiner: those below the cut are the refiner's."""
        return int((schedule.times >= round(discrete.LEVELS * (1 - share))).sum()) if share < 1 else schedule.steps

    def guidance(self, guidance_scale: float | None) -> float | None:
        if not self.network.config.guidance:
            if guidance_scale is not None:
                log.warning("this SDXL has no guidance embedding: guidance_scale %g has no effect", guidance_scale)
            return None
        return self.sampling.guidance_scale if guidance_scale is None else guidance_scale

    def prepare(
        self, conditioning: Conditioning, negatives: int, times: Tensor, width: int, height: int,
        guidance_scale: float | None,
    ) -> UNetRun:  # fmt: skip
        rows = len(conditioning)
        size = height, width
        numbers = [*(self.original_size or size), *self.crop, *(self.target_size or size)]
        table = torch.tensor([numbers] * rows, dtype=torch.float32, device=self.device)
        if _is_refiner(self.network.config):
            scores = [self.aesthetic_score] * (rows - negatives) + [self.negative_aesthetic_score] * negatives
            table = torch.cat([table[:, :4], table.new_tensor(scores)[:, None]], dim=1)
        scale = self.guidance(guidance_scale) if self.network.config.guidance else None
        told = None if scale is None else torch.full((rows,), scale, dtype=torch.float32, device=self.device)
        return self.network.prepare(conditioning.text, size_vector(conditioning.pooled, table), times, told)

    def step(
        self, latents: Tensor, run: UNetRun, i: int, skip_blocks: Collection[int] = (), condition: Tensor | None = None
    ) -> Tensor:
        if condition is not None:
            latents = torch.cat([latents, condition.repeat(len(latents) // len(condition), 1, 1, 1)], dim=1)
        return self.network.step(latents.to(dtype_of(self.network)), run, i).float()

    def condition(self, image: Tensor | None, mask: Tensor | None, control: Tensor | None) -> Tensor | None:
        """The inpainting variant: the mask, and the latents of the picture without what shall be painted."""
        if self.variant != "inpaint":
            return super().condition(image, mask, control)
        if image is None or mask is None:
            raise ConfigError("SDXL inpainting needs an image and a mask (white is painted)")
        hard = (mask > 0.5).float()
        latents = self.encode_vae(image * (1 - hard))
        small = F.interpolate(hard, scale_factor=1 / 8, mode="nearest").to(latents.device)
        return torch.cat([small.expand(len(latents), -1, -1, -1), latents], dim=1)


def joined(*features: ClipFeatures) -> Conditioning:
    """The last but one states of CLIP-L and CLIP-G side by side, before the final norm; CLIP-G's pooled vector, projected."""
    names = ("CLIP-L", "CLIP-G")[-len(features) :]
    rows = [finite_features(found.hidden[-2], name) for found, name in zip(features, names, strict=True)]
    return Conditioning(beside(rows, dim=-1), features[-1].projected)


def _is_refiner(config: UNetConfig) -> bool:
    """Its text is CLIP-G alone, as wide as the pooled vector, and it is told five numbers."""
    return config.vector_width == config.text_width + 5 * SIZES


def _told(component: Component) -> tuple[str | None, bool]:
    """The prediction type that a checkpoint says, None where it says none that is known, and whether the end is all noise."""
    said, zero = prediction_told(component)
    return PREDICTION_TYPES.get(str(said)), zero
