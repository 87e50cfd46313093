"""Stable Diffusion XL: two CLIPs, sizes as conditioning, discrete noise levels; base, refiner, inpainting, Turbo, Lightning.

Sources: Stability-AI/generative-models; Podell et al. 2023; the schedulers that diffusers publishes with the checkpoints.
"""

import copy
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from eridiff.errors import ConfigError
from eridiff.inference.base import DiffusionInference, of_encoder
from eridiff.inference.encoding import encoded
from eridiff.inference.family import Encoder
from eridiff.inference.latents import beside, dtype_of, finite_features
from eridiff.inference.loading import check_parts
from eridiff.inference.options import Options
from eridiff.inference.placing import Placement, Plan
from eridiff.inference.result import Callback, Prompt, Result, Run
from eridiff.inference.settings import Defaults, spoken
from eridiff.memory.stages import Stages
from eridiff.models.autoencoder import Autoencoder
from eridiff.models.unet import UNet, UNetConfig, UNetRun, size_vector
from eridiff.request import Checked, Request, Text
from eridiff.schedulers import Schedule, discrete, tables
from eridiff.schedulers.flow_match import even_sigmas
from eridiff.schedulers.samplers import FLOW_ALONE, SAMPLERS
from eridiff.text import Conditioning
from eridiff.text.encoders import ClipEncoder, ClipFeatures
from eridiff.weights.detect import Component
from eridiff.weights.load import prediction_told
from eridiff.weights.locate import ModelPath, Parts, locate

log = logging.getLogger(__name__)
TIMESTEPS = {
    "leading": discrete.leading_timesteps, "trailing": discrete.trailing_timesteps, "legacy": discrete.legacy_timesteps,
    "linspace": discrete.linspace_timesteps, "ddim": discrete.leading_timesteps, "lcm": discrete.lcm_timesteps,
    "turbo": discrete.turbo_timesteps, "dpm_leading": discrete.dpm_leading_timesteps,
    "dpm_linspace": discrete.dpm_linspace_timesteps,
}  # fmt: skip
UNIFORM = ("normal", "sgm_uniform")  # even in timesteps, with levels between entries as k-diffusion has them
SPREADS = {"karras": discrete.karras_sigmas, "exponential": discrete.exponential_sigmas, "beta": tables.beta_between}
BETWEEN = {  # diffusers' karras, exponential and beta: between the ends of a spacing
    f"{spacing}_{spread}": (spacing, spread) for spacing in ("leading", "trailing", "linspace") for spread in SPREADS
}
OFFSETS = ("leading", "ddim", "dpm_leading", *(f"leading_{spread}" for spread in SPREADS))
SCHEDULES = (*TIMESTEPS, *tables.SPACINGS, *UNIFORM, *BETWEEN)
PREDICTIONS = ("epsilon", "v", "sample")
PREDICTION_TYPES = {"v_prediction": "v", **{name: name for name in PREDICTIONS}}  # as configurations name them
HAND_OVER = 0.8  # the share of a run after which a refiner takes over
SIZES = 256  # features of each number beside the pooled vector


@dataclass(frozen=True)
class SDXLDefaults(Defaults):
    """How a published SDXL is sampled by default."""

    words: ClassVar[Mapping[str, Collection[str]]] = {
        "sampler": [name for name in SAMPLERS if name not in FLOW_ALONE], "schedule": SCHEDULES,
    }  # fmt: skip
    steps: int = 50
    cfg_scale: float = 5.0
    schedule: str = "leading"
    guidance_scale: float | None = None  # of lcm-sdxl's embedding
    clip_windows: str = "first"
    empty_negative: str = "zeros"


class SDXLInference(DiffusionInference):
    """Generates with any SDXL: `SDXLInference().load_model("sd_xl_base_1.0.safetensors")`, or with modules already there."""

    family = "unet"
    encoders = ("clip", "clip_g")
    recorded = (*DiffusionInference.recorded, "prediction", "zero_terminal_snr")
    flow = False
    offsets = OFFSETS
    variants: ClassVar[Mapping[str, SDXLDefaults]] = {
        "base": SDXLDefaults(),
        "refiner": SDXLDefaults(),
        "inpaint": SDXLDefaults(steps=20, cfg_scale=7.5),
        "turbo": SDXLDefaults(4, 1.0, "euler_ancestral", 512, 512, "turbo"),
        "lightning": SDXLDefaults(4, 1.0, schedule="trailing"),
        "lcm": SDXLDefaults(4, 1.0, "lcm", schedule="lcm", guidance_scale=8.0),
    }
    network: UNet
    clip: ClipEncoder | None = of_encoder("clip")
    clip_g: ClipEncoder | None = of_encoder("clip_g")

    def __init__(
        self,
        network: UNet | None = None,
        autoencoder: Autoencoder | None = None,
        clip: ClipEncoder | None = None,
        clip_g: ClipEncoder | None = None,
        *,
        prediction: str | None = None,
        zero_terminal_snr: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        """Use these modules as they are, or leave them out and call `load_model`.

        - network, autoencoder: eridiff's modules, those of a training run for example.
        - clip, clip_g: the text encoders; not needed where conditionings are passed in.
        - prediction: epsilon, v or sample; None is what the file says, else epsilon.
        - zero_terminal_snr: whether the schedule ends in pure noise; None is what the file says, else not.
        - variant: base, refiner, inpaint, turbo, lightning or lcm.
        - device, dtype, offload, vae_rows, compile, progress, allow_unknown: as in `eridiff.inference.options.Options`.
        """
        if prediction not in (None, *PREDICTIONS):
            raise ConfigError(f"prediction must be {' or '.join(PREDICTIONS)}, not '{prediction}'")
        super().__init__(network, autoencoder, {"clip": clip, "clip_g": clip_g}, **options)
        self.asked_prediction, self.asked_zero_snr = prediction, zero_terminal_snr
        self.prediction, self.zero_terminal_snr = prediction or "epsilon", bool(zero_terminal_snr)
        self.refiner: SDXLInference | None = None  # which finishes the images of this one
        self._refiner_parts: Parts | None = None  # of one that is loaded with it

    @staticmethod
    def variants_of_inputs(config: UNetConfig) -> list[str]:
        if config.in_channels == 9:
            return ["inpaint"]
        return ["refiner"] if _is_refiner(config) else ["base", "turbo", "lightning", "lcm"]

    @staticmethod
    def possible_variants(config: UNetConfig) -> list[str]:
        if config.vector_width <= 5 * SIZES:
            raise ConfigError(
                f"the UNet is given {config.vector_width} features beside the text, which have no room for a pooled vector and "
                f"the numbers of an image's size, {SIZES} features each: it is of another kind than SDXL"
            )
        found = SDXLInference.variants_of_inputs(config)
        return found if "base" not in found else ["lcm"] if config.guidance else ["base", "turbo", "lightning"]

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
        own = int(8 * 2 ** (self.network.config.levels - 1))
        return own if self.refiner is None else max(own, self.refiner.multiple)

    def load_model(self, model: ModelPath | Parts, refiner: ModelPath | Parts | None = None) -> Self:
        """As DiffusionInference.load_model; what the file says of its prediction wins over the usual and forbids another.

        A `refiner`, which finishes the images, is loaded with the same options; it decodes by this model's autoencoder.
        """
        parts = locate(model, self.allow_unknown)
        self.refiner = None
        self._refiner_parts = None if refiner is None else refiner_parts(parts, refiner, self.allow_unknown)
        if self.family in parts.components:
            told, zero = _told(parts.components[self.family])
            asked = self.asked_prediction
            if told is not None and asked not in (None, told):
                path = parts.components[self.family].checkpoint.path
                raise ConfigError(f"{path} says that it predicts {told}, not {asked}")
            self.prediction = asked or told or "epsilon"
            self.zero_terminal_snr = zero if self.asked_zero_snr is None else self.asked_zero_snr
        super().load_model(parts)
        if self._refiner_parts is not None:
            own = SDXLInference(
                device=self.asked_device, dtype=self.dtype, offload=self.offload, vae_rows=self.vae_rows,
                compile=self.compile, progress=self.progress, allow_unknown=self.allow_unknown,
            ).load_model(self._refiner_parts)  # fmt: skip
            own.model.autoencoder, own._room = self.autoencoder, self._room
            self.refiner = own
        return self

    def _planned(self, parts: Parts, device: torch.device) -> Callable[..., Plan]:
        return partial(super()._planned(parts, device), refiner=self._refiner_parts)

    def _placed(self, placement: Placement) -> None:
        super()._placed(placement)
        if self.refiner is not None and self.refiner._room is self._room:  # planned together
            self.refiner._placed(placement)

    @contextmanager
    def _stage(self, module: nn.Module) -> Iterator[None]:
        """A refiner's component is the refiner's to bring."""
        if self.refiner is not None and module in self.refiner.model.modules().values():
            with self.refiner._stage(module):
                yield
        else:
            with super()._stage(module):
                yield

    def follow(self, config: Mapping[str, Any]) -> None:
        self.prediction = self.asked_prediction or PREDICTION_TYPES.get(str(config.get("prediction_type")), "epsilon")
        if self.asked_zero_snr is None:
            self.zero_terminal_snr = config.get("rescale_betas_zero_snr") is True
        if config.get("force_zeros_for_empty_prompt") is False:
            self.model.follow(empty_negative="encoded")

    @property
    def refines(self) -> bool:
        """Whether this is a refiner, which goes on with what a base has begun."""
        return _is_refiner(self.network.config)

    @property
    def takes(self) -> Collection[str]:  # type: ignore[override]
        if self.refines:
            return ("original_size", "crop", "aesthetic_score", "final_noise", "noise_scale", "clip_windows")
        scored = ["aesthetic_score"] if self.refiner else []
        return (
            "original_size",
            "crop",
            "target_size",
            "final_noise",
            "noise_scale",
            "clip_windows",
            "empty_negative",
            *scored,
        )

    @property
    def inpaints(self) -> bool:  # type: ignore[override]
        return self.variants_of_inputs(self.network.config) == ["inpaint"]

    def generate(
        self, prompt: Request | Text | Sequence[Text] = "", *, refiner: "SDXLInference | None" = None, **given: Any
    ) -> Result:
        """As DiffusionInference.generate; with a `refiner`, which takes over after the share `hand_over` of the run (0.8).

        The refiner gets the latents as they are and reads the prompts by its own encoder. It stays with the model as its
        attribute `refiner` where it is set there. Raises ConfigError for a refiner that is asked to begin from noise.
        """
        if refiner is None:
            return super().generate(prompt, **given)
        return self.with_refiner(refiner).generate(prompt, **given)

    def with_refiner(self, refiner: "SDXLInference") -> Self:
        """The same model, whose images a refiner finishes that is loaded already. Raises ConfigError unless they are a base and a refiner.

        It lies where it is; one on the host comes to the device as this model's components do, with its `offload`.
        """
        if not refiner.refines or self.refines:
            raise ConfigError(f"a base and a refiner work together, not {self.variant} and {refiner.variant}")
        if refiner._room is not self._room:
            log.warning(
                "a refiner that was loaded by itself is not counted by vram; eridiff.load(..., refiner=...) counts both"
            )
        if self.offload and not refiner.offload and refiner.device.type == "cpu":
            refiner = copy.copy(refiner)
            refiner.offload, refiner.asked_device = self.offload, self.device
            refiner._check_compile()
        both = copy.copy(self)
        both.refiner = refiner
        return both

    def _denoised(
        self, noise: Tensor | Run, prompt: Prompt, points: Schedule, asked: Checked, image: Tensor | None,
        mask: Tensor | None, condition: Tensor | None, callback: Callback | None,
    ) -> Stages[Run]:  # fmt: skip
        """The base as far as it goes, then the refiner, which takes over latents, noise and memory of the sampler."""
        if self.refines and image is None and self.place(points, asked.part[0]) == 0:
            raise ConfigError("the refiner finishes images: give it to a base as refiner, or an image with a strength")
        if self.refiner is None:
            return (yield from super()._denoised(noise, prompt, points, asked, image, mask, condition, callback))
        refiner = self.refiner
        first, last = self.ends(points, asked, image, mask)
        own = yield from encoded(refiner, asked.prompt, asked.negative, asked)
        cut = min(max(first, self.place(points, asked.hand_over)), last)
        if cut in (first, last) and first < last and asked.part == (0.0, 1.0):
            idle = "the base" if cut == first else "the refiner"
            log.warning("a hand_over of %g leaves %s none of the steps", asked.hand_over, idle)
        run = self.begun(noise, points, first, image, asked, asked.seed)
        yield self.network
        self.walk(run, prompt, points, asked, first, cut, image, mask, condition, callback)
        yield refiner.network
        if not run.stopped:
            table = refiner.points(asked)
            refiner.walk(run, own, table, asked, cut, last, image, mask, None, callback)
        return run

    def told(self, asked: Checked) -> dict[str, Any]:
        """What the network is given of an image's size, and the refiner of its beauty."""
        size = asked.height, asked.width
        found = super().told(asked) | {"original_size": asked.original_size or size, "crop": asked.crop or (0, 0)}
        if not self.refines:
            found["target_size"] = asked.target_size or size
        if "aesthetic_score" in self.takes:
            for name, usual in (("aesthetic_score", 6.0), ("negative_aesthetic_score", 2.5)):
                score = getattr(asked, name)
                found[name] = usual if score is None else score
        if self.refiner is not None:
            found["hand_over"] = HAND_OVER if asked.hand_over is None else asked.hand_over
        return found

    def circumstances(self) -> dict[str, Any]:
        refined = {} if self.refiner is None else {"refiner": self.refiner.source.get("parts")}
        return {**super().circumstances(), **refined}

    @staticmethod
    def text_encoders(
        modules: Mapping[str, nn.Module], tokenizers: Mapping[str, Any], sampling: SDXLDefaults
    ) -> dict[str, Encoder]:
        found: dict[str, Encoder] = {}
        if "clip" in modules:
            found["clip"] = ClipEncoder(modules["clip"], tokenizers["clip"])
        return found | {"clip_g": ClipEncoder(modules["clip_g"], tokenizers["clip_g"], pad=0, name="CLIP-G")}

    def encoding(self, prompts: Sequence[Text], asked: Checked) -> Stages[Conditioning]:
        """Both CLIPs' rows side by side (the refiner has only CLIP-G): text `[B, 77, text_width]`, pooled `[B, P]`.

        With all `clip_windows` 77 rows each.
        """
        names = self.needed(self.network.config)
        encoders = {"clip": self.clip, "clip_g": self.clip_g}
        texts = {name: spoken(prompts, name, names) for name in names}
        features, program = [], asked.prompt_weights
        for name in names:
            encoder = encoders[name]
            if encoder is None:
                raise ConfigError(f"no text encoders are loaded: pass conditioning, or give {' and '.join(names)}")
            count = 1
            if asked.clip_windows == "all":
                count = max(encoder.windows_needed(text, program) for text in texts.values())
            ids, weights = encoder.weigh(texts[name], program, windows=count)
            yield encoder.module
            features.append(encoder(ids, weights, program))
        return joined(*features)

    def default_negative(self, prompts: list[Text], asked: Checked) -> Stages[Prompt]:
        """Zeros, as in sgm and diffusers; the refiner encodes the empty prompt, and so do kohya's scripts and ComfyUI."""
        if asked.empty_negative == "encoded" or self.refines:
            return (yield from super().default_negative(prompts, asked))
        positive = yield from self.encoding(prompts, asked)
        return Prompt(positive, Conditioning(torch.zeros_like(positive.text), torch.zeros_like(positive.pooled)))

    def named_schedule(
        self, steps: int, width: int, height: int, name: str | None, shift: float | None, timestep_offset: int | None = None,
        final_noise: str | None = None,
    ) -> Schedule:  # fmt: skip
        """Noise levels at leading (published), trailing, linspace, legacy (sgm), ddim, lcm or turbo timesteps, or others.

        - others: dpm_leading and dpm_linspace (diffusers' DPM-Solvers); karras, exponential, simple, ... of the training's
          levels (`schedulers.tables`); normal and sgm_uniform; leading_karras and the like, between the ends of a spacing.
        - timestep_offset: what is added to leading timesteps, 1 by default.
        - final_noise: "zero", or "lowest", the lowest level of the training, as of ddim.
        """
        name = name or self.sampling.schedule
        if shift is not None or name not in SCHEDULES:
            what = f"'{name}' is not a schedule of SDXL" if shift is None else "SDXL's schedules have no shift"
            raise ConfigError(f"{what}; there are {', '.join(SCHEDULES)}")
        alphas = discrete.alphas_cumprod(self.zero_terminal_snr)
        levels = discrete.finite_sigma_table(alphas)
        spacing, spread = BETWEEN.get(name, (name, None))
        if name in tables.SPACINGS:
            sigmas = tables.SPACINGS[name](levels, steps)[:-1]
        elif name in UNIFORM:
            even_sigmas(steps)
            count = steps + (name == "sgm_uniform")
            places = torch.linspace(discrete.LEVELS - 1, 0, count, dtype=torch.float64, device="cpu")[:steps]
            sigmas = discrete.levels_at(places, alphas)
        else:
            offset = {} if timestep_offset is None else {"offset": timestep_offset}
            timesteps = TIMESTEPS[spacing](steps, **offset).clamp(max=discrete.LEVELS - 1)
            sigmas = discrete.sigmas_at(timesteps, alphas)
        if spread is not None:
            sigmas = SPREADS[spread](steps, float(min(sigmas[0], levels[-1])), float(sigmas[-1]))
        if spread is not None or name not in TIMESTEPS:
            timesteps = discrete.timesteps_at(sigmas, alphas)
        lowest = final_noise == "lowest" or (final_noise is None and name == "ddim")
        final = float(levels[0]) if lowest and sigmas[-1] >= levels[0] else 0.0
        return discrete.discrete_schedule(timesteps, sigmas, self.prediction, final)

    def inside(self, ratios: Tensor | None, times: Tensor | None) -> Schedule:
        return discrete.discrete_points(ratios, times, discrete.alphas_cumprod(self.zero_terminal_snr), self.prediction)

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
        """By timestep, as diffusers switches from the base to the refiner: those below the cut are the refiner's."""
        return int((schedule.times >= round(discrete.LEVELS * (1 - share))).sum()) if share < 1 else schedule.steps

    def prepare(self, conditioning: Conditioning, negatives: int, times: Tensor, asked: Checked) -> UNetRun:
        rows, scale = len(conditioning), asked.guidance_scale
        numbers = [
            *asked.original_size,
            *asked.crop,
            *(() if self.refines else asked.target_size),
        ]
        table = torch.tensor([numbers] * rows, dtype=torch.float32, device=self.device)
        if self.refines:
            scores = [asked.aesthetic_score] * (rows - negatives) + [asked.negative_aesthetic_score] * negatives
            table = torch.cat([table, table.new_tensor(scores)[:, None]], dim=1)
        told = None if scale is None else torch.full((rows,), scale, dtype=torch.float32, device=self.device)
        return self.network.prepare(conditioning.text, size_vector(conditioning.pooled, table), times, told)

    def step(
        self, latents: Tensor, run: UNetRun, i: int, skip_blocks: Collection[int] = (), condition: Tensor | None = None
    ) -> Tensor:
        if condition is not None:
            latents = torch.cat([latents, condition.repeat(len(latents) // len(condition), 1, 1, 1)], dim=1)
        return self.network.step(latents.to(dtype_of(self.network)), run, i).float()

    def condition(
        self, image: Tensor | None, mask: Tensor | None, control: Tensor | None, references: Sequence[Tensor] = ()
    ) -> Tensor | None:
        """The inpainting variant: the mask, and the latents of the image without what must be painted."""
        if not self.inpaints:
            return None
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


def refiner_parts(base: Parts, refiner: ModelPath | Parts, allow_unknown: bool = False) -> Parts:
    """The parts of a refiner for a base. Raises ConfigError unless they are that, CheckpointError as `locate`."""
    if isinstance(refiner, SDXLInference):
        raise ConfigError("refiner is a path, a hub id or the parts by name; one that is loaded goes to with_refiner")
    if SDXLInference.family not in base.components:
        raise ConfigError("a refiner works with an SDXL base alone")
    parts = locate(refiner, allow_unknown)
    check_parts(SDXLInference, parts.components)
    kinds = [SDXLInference.variants_of_inputs(p.components[SDXLInference.family].config)[0] for p in (base, parts)]
    if kinds[0] == "refiner" or kinds[1] != "refiner":
        raise ConfigError(f"a base and a refiner work together, not {' and '.join(kinds)}")
    return parts


def _is_refiner(config: UNetConfig) -> bool:
    """Its text is CLIP-G alone, as wide as the pooled vector, and it is given five numbers."""
    return config.vector_width == config.text_width + 5 * SIZES


def _told(component: Component) -> tuple[str | None, bool]:
    """The prediction type that a checkpoint says, None where it says none that is known, and whether the end is all noise."""
    said, zero = prediction_told(component)
    return PREDICTION_TYPES.get(str(said)), zero
