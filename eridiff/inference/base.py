"""The way from a prompt to a picture that all families share: one loop, one guidance, one noise.

Letters: B pictures, C latent channels, H x W the picture's size in pixels.
"""

import inspect
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from typing_extensions import Self, Unpack

from eridiff.blocks import evaluation, unwrapped
from eridiff.errors import ConfigError
from eridiff.images import to_images, to_tensor, upright
from eridiff.inference.handed_in import check_dtypes, check_family, from_diffusers, own_autoencoder
from eridiff.inference.latents import (  # fmt: skip
    LATENT_SCALE,
    device_of,
    drawn,
    dtype_of,
    finite,
    first_step,
    latent_mask,
    noise_of_steps,
    same_device,
    seeded,
)
from eridiff.inference.loading import check_latents, fill
from eridiff.inference.lora import LoraHandle, apply
from eridiff.inference.options import Options, check_names
from eridiff.inference.provenance import provenance
from eridiff.inference.result import Prompt, Result, Step
from eridiff.inference.settings import Defaults, Table, Text, check_settings, listed, matched, plain, settle_size
from eridiff.inference.words import Words
from eridiff.lora.attach import Scale
from eridiff.lora.load import Lora
from eridiff.memory.stages import Stages, on_device, together
from eridiff.memory.strips import decode_in_strips, encode_in_strips
from eridiff.models.autoencoder import Autoencoder
from eridiff.precision import outside_autocast
from eridiff.schedulers import Schedule
from eridiff.schedulers.flow_match import flow_schedule
from eridiff.schedulers.guidance import Guidance, SkipLayers, guided
from eridiff.schedulers.samplers import SAMPLERS, STOCHASTIC, Predict, mixed
from eridiff.text import Conditioning
from eridiff.weights.detect import DESCRIPTIONS
from eridiff.weights.locate import Model, Parts, locate

log = logging.getLogger(__name__)
KEEP = ("conditioning", "noise", "latents")


Callback = Callable[[Step], object]
T = TypeVar("T")


class DiffusionInference(ABC):
    """Draws pictures with one model; families say how prompts are encoded and how the network is asked.

    The modules are public and may be anyone's: hand in those of a training run, or fill them by `load_model`.
    """

    family: ClassVar[str]  # of the network, as in weights/detect.py
    variants: ClassVar[Mapping[str, Defaults]]
    encoders: ClassVar[tuple[str, ...]]  # in the order of diffusers' text_encoder, text_encoder_2, text_encoder_3
    recorded: ClassVar[tuple[str, ...]] = ("variant", "vae_rows")  # attributes that a picture depends on, as options
    multiple: int = 16  # of which width and height must be multiples
    network: Any
    autoencoder: Autoencoder
    sampling: Any  # the variant's Defaults
    words: Words | None = None  # that the model knows, if its file lists them; set None to end the check of prompts

    def __init__(self, network: nn.Module | None, autoencoder: Autoencoder | None, **options: Unpack[Options]) -> None:
        """Modules are used as they are; None is for those that `load_model` fills.

        Raises ConfigError for an option that neither `Options` nor the family has, and for impossible values.
        """
        check_names(type(self).__name__, options, [*self.own_options(), *Options.__annotations__])
        variant, device, dtype = options.get("variant"), options.get("device"), options.get("dtype")
        offload, vae_rows, progress = options.get("offload"), options.get("vae_rows"), options.get("progress", True)
        if offload not in (None, "stages"):
            raise ConfigError(f"offload must be 'stages' or nothing, not {offload!r}")
        if vae_rows is not None and vae_rows < 1:
            raise ConfigError(f"vae_rows must be at least 1, not {vae_rows}")
        if variant is not None and variant not in self.variants:
            raise ConfigError(f"'{variant}' is no variant of {DESCRIPTIONS[self.family].split(' ', 1)[1]}; there are {', '.join(self.variants)}")  # fmt: skip
        self.asked_device = None if device is None else torch.device(device)
        self.asked_variant, self.dtype, self.offload, self.progress = variant, dtype, offload, progress
        self.vae_rows, self.allow_unknown = vae_rows, options.get("allow_unknown", False)
        self.source: dict[str, Any] = {}  # which files, for the record
        self.loras: list[LoraHandle] = []  # what apply_lora has put on it
        self.adopted: tuple[Any, ...] = ()  # `eridiff.training.adopt.Adopted` of the network and the autoencoder
        self._staged: nn.Module | None = None  # the component that is in use
        if autoencoder is not None:
            self.autoencoder = own_autoencoder(type(self), autoencoder)
        if network is not None:
            self.set_network(network)

    @classmethod
    def from_diffusers(
        cls, pipeline: Any = None, *, transformer: Any = None, unet: Any = None, vae: Any = None,
        text_encoder: Any = None, text_encoder_2: Any = None, text_encoder_3: Any = None, tokenizer: Any = None,
        tokenizer_2: Any = None, tokenizer_3: Any = None, scheduler: Any = None, **options: Any,
    ) -> Self:  # fmt: skip
        """Draw with the modules of a trainer: those of a diffusers pipeline, or single ones by diffusers' names.

        The network and the autoencoder are adopted (`eridiff.training.adopt`): of diffusers' classes or under the
        originals' names, wrapped or not, they share their parameters and nothing is copied; what `adopt` returned is
        taken as it is. Text encoders and tokenizers are those of transformers, slow or fast; without encoders
        conditioning is handed in. What the configurations of the modules, the scheduler and the pipeline say is
        followed; options are those of the constructor. Raises CheckpointError for a module that is not known, ConfigError
        for one that is missing or of another family.
        """
        given = {name: part for name, part in locals().items() if name not in ("cls", "pipeline", "options")}
        return from_diffusers(cls, pipeline, given, options)

    @classmethod
    def own_options(cls) -> list[str]:
        """What the family's constructor takes beside `Options`."""
        return [name for name in inspect.signature(cls).parameters if name != "options"]

    def follow(self, config: Mapping[str, Any], given: Collection[str]) -> None:  # noqa: B027  # nothing for most
        """Take over what the configurations of diffusers' pipeline and scheduler say, but for the options that are given."""

    @staticmethod
    @abstractmethod
    def possible_variants(config: Any) -> list[str]:
        """The published variants that have a network's sizes."""

    @staticmethod
    @abstractmethod
    def needed(config: Any) -> tuple[str, ...]:
        """The text encoders without which a network of these sizes cannot draw."""

    @abstractmethod
    def set_encoders(self, modules: Mapping[str, Any], tokenizers: Mapping[str, Any]) -> None:
        """Take the text encoders (transformers' modules) and tokenizers, by component."""

    @staticmethod
    @abstractmethod
    def text_widths(configs: Mapping[str, Mapping[str, Any]]) -> tuple[int, int]:
        """Widths of the text rows and of the pooled vector that encoders of these configurations give."""

    @staticmethod
    def told_widths(config: Any) -> tuple[int, int]:
        """Widths of the text rows and of the pooled vector that a network takes."""
        return config.text_width, config.pooled_width

    @staticmethod
    def channels_drawn(config: Any) -> int:
        """Of the latents that a network of these sizes draws."""
        return int(config.out_channels)

    @property
    def device(self) -> torch.device:
        """Where images are computed: the network's own device, with `offload` the one that components are moved to."""
        if not self.offload and hasattr(self, "network"):
            return device_of(self.network)
        return self.asked_device or torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def encode(self, prompts: Sequence[Text]) -> Conditioning:
        """One row of conditioning per prompt, on the devices of the encoders."""
        return self._finished(self.encoding(prompts))

    @abstractmethod
    def encoding(self, prompts: Sequence[Text]) -> Stages[Conditioning]:
        """As `encode`, in stages: yields each text encoder before it is used."""

    @abstractmethod
    def named_schedule(self, steps: int, width: int, height: int, name: str | None, shift: float | None) -> Schedule:
        """The points of a run; None is the published variant's."""

    @abstractmethod
    def prepare(
        self, conditioning: Conditioning, negatives: int, times: Tensor, width: int, height: int,
        guidance_scale: float | None,
    ) -> Any:  # fmt: skip
        """The network's run for all rows of a conditioning, on its device and of its dtype; the last `negatives` are that."""

    @abstractmethod
    def step(
        self, latents: Tensor, run: Any, i: int, skip_blocks: Collection[int] = (), condition: Tensor | None = None
    ) -> Tensor:
        """The network's raw output, float32: latents `[B, C, H / 8, W / 8]` -> the same shape."""

    def condition(self, image: Tensor | None, mask: Tensor | None, control: Tensor | None) -> Tensor | None:
        """What the network takes beside the latents, from pictures and a mask; None for most."""
        if control is not None:
            raise ConfigError(f"{self.variant} takes no control picture; Flux Canny and Depth do")
        return None

    def load_model(self, model: Model | Parts) -> Self:
        """Fill the network, the autoencoder, the text encoders and their tokenizers; every key is accounted for.

        Raises CheckpointError when a part is missing or damaged or does not fit, before any weight is read.
        """
        fill(self, locate(model, self.allow_unknown))
        return self

    def apply_lora(
        self, weights: str | os.PathLike[str] | Lora, scale: Scale | Mapping[str, Scale] = 1.0, *,
        allow_partial: bool = False, part: str | None = None, dora: str = "peft",
    ) -> LoraHandle:  # fmt: skip
        """Put a LoRA beside the network and the text encoders: a file of any format, a peft folder, a hub id, or a `Lora`.

        Several add up. `scale` is a number, `[B]` for the rows of a batch, or numbers by patterns of native module names.
        The handle weighs it anew and takes it away. Raises LoraError, having changed nothing, for a file of which anything
        does not fit; `allow_partial` leaves that out, and the handle's ledger says what. `part`, "network" or
        "text_encoders", leaves the other part of the file out.
        """
        return apply(self, weights, scale, allow_partial=allow_partial, part=part, dora=dora)

    def choose_variant(self, config: Any, name: str) -> str:
        """The published variant: what was asked for, if the sizes allow it, else by sizes, then by the file's name."""
        possible = self.possible_variants(config)
        if self.asked_variant is not None:
            if self.asked_variant not in possible:
                raise ConfigError(f"the network has the sizes of {' or '.join(possible)}, not of {self.asked_variant}")
            return self.asked_variant
        by_name = [v for v in possible if v.rsplit("-", 1)[-1] in name.lower()]
        if len(possible) > 1:
            log.info("%s have the same sizes; the name '%s' decides", " and ".join(possible), name)
        return (by_name or possible)[-1 if by_name else 0]

    def set_network(self, network: nn.Module, name: str = "") -> None:
        """Take a network, out of the wrappers of a trainer, and its variant's defaults."""
        check_family(type(self), network)
        self.network = unwrapped(network)
        if hasattr(self, "autoencoder"):
            check_latents(type(self), self.network.config, self.autoencoder.config)
        own, asked = device_of(self.network), self.asked_device
        if asked is not None and not self.offload and not same_device(own, asked):
            raise ConfigError(f"the network is on {own}, not on {asked}: move it there, or give no device")
        self.variant = self.choose_variant(self.network.config, name)
        self.sampling = self.variants[self.variant]
        self.words = None

    def defaults(self) -> Mapping[str, Any]:
        """width, height, steps and whatever else `generate` takes when it is not said."""
        return vars(self.sampling)

    def encode_prompt(
        self,
        prompt: Text | Sequence[Text],
        negative: Text | Sequence[Text] | None = None,
        cfg_scale: float | None = None,
    ) -> Prompt:
        """Encode one prompt or several, and the negative ones with them, so that both have as many rows.

        A prompt is a text, or a text for each encoder by name (`{"clip": ..., "t5": ...}`; an encoder that is not named
        reads the first). `""` is encoded as it stands; a negative of None is the family's default: the empty prompt where
        it is steered with classifier-free guidance (a cfg_scale other than 1; None is the variant's), else none. Words that
        do not fit are cut, with a warning.
        """
        steered = (self.sampling.cfg_scale if cfg_scale is None else cfg_scale) != 1
        return self._finished(self._encoding(listed(prompt), negative, steered))

    def check_words(self, prompts: Sequence[Text]) -> None:
        """If the model's file lists the words it knows, warn of others in prompts for images (`Words.check`).

        Raises ConfigError for a prompt without a known noun, unless new words may have been learned: by a LoRA on the model,
        or by a network in training.
        """
        if self.words is not None:
            taught = any(p.requires_grad for p in self.network.parameters()) or any(
                vars(module).get("lora_branches") for module in self.network.modules()
            )
            self.words.check(prompts, refuse=not taught)

    def default_negative(self, prompts: list[Text]) -> Stages[Prompt]:
        """Prompts with what they are steered away from when no negative prompt is given: the empty one."""
        return self._encoding(prompts, "", True)

    def _encoding(self, prompts: list[Text], negative: Text | Sequence[Text] | None, steered: bool) -> Stages[Prompt]:
        if negative is None and steered:
            return (yield from self.default_negative(prompts))
        negatives = None if negative is None else listed(negative)
        if negatives is not None and len(negatives) not in (1, len(prompts)):
            raise ConfigError(f"{len(negatives)} negative prompts for {len(prompts)} prompts: give as many, or one")
        both = yield from self.encoding([*prompts, *(negatives or [])])
        positive, other = (both.rows(part) for part in (slice(0, len(prompts)), slice(len(prompts), None)))
        if negatives is None:
            return Prompt(positive)
        return Prompt(positive, other if len(negatives) == len(prompts) else other.repeat(len(prompts)))

    @property
    def latent_channels(self) -> int:
        return self.autoencoder.config.latent_channels

    def schedule(
        self, steps: int, width: int, height: int, table: Table | None = None, shift: float | None = None
    ) -> Schedule:
        """The points of a run: the variant's own, another table by name, or through given sigmas (then steps is theirs)."""
        if table is None or isinstance(table, str):
            return self.named_schedule(steps, width, height, table, shift)
        return self.schedule_through(torch.as_tensor(table, dtype=torch.float64, device="cpu"))

    def schedule_through(self, sigmas: Tensor) -> Schedule:
        """The schedule through given sigmas `[steps + 1]`."""
        return flow_schedule(sigmas)

    def table_of(self, sampler: str) -> str | None:
        """The schedule, by name, that a sampler is made for, if it is another than the variant's."""
        return None

    def place(self, schedule: Schedule, share: float) -> int:
        """The step at which a share of a run is done."""
        return round(share * schedule.steps)

    @torch.no_grad()
    def denoise(
        self, latents: Tensor, prompt: Prompt, steps: int | Schedule, *, guidance: Guidance | None = None,
        guidance_scale: float | None = None, sampler: str | None = None, image: Tensor | None = None,
        strength: float = 1.0, mask: Tensor | None = None, condition: Tensor | None = None,
        part: tuple[float, float] = (0.0, 1.0), seeds: Sequence[int] | None = None, callback: Callback | None = None,
    ) -> Tensor:  # fmt: skip
        """Noise -> latents, both `[B, C, H / 8, W / 8]`; float32 between steps whatever the network's dtype.

        `guidance` and `sampler` None are the variant's. `image` (latents) with `strength` in [0, 1] starts from that picture
        with as much noise; with a `mask` `[B, 1, H / 8, W / 8]` only where the mask is 1 is painted, the rest follows the
        picture. `part`, shares of the run, begins with latents that another network has brought so far, or stops for one.
        `seeds`, one a picture, are needed by samplers that draw noise on the way. A callback that returns something true ends
        the run there. Raises EridiffError when the network gives values that are not finite.
        """
        height, width = (side * LATENT_SCALE for side in latents.shape[-2:])
        schedule = self.schedule(steps, width, height) if isinstance(steps, int) else steps
        guidance = Guidance(self.sampling.cfg_scale) if guidance is None else guidance
        sampler = sampler or self.sampling.sampler
        move = SAMPLERS[sampler]
        first, last = (self.place(schedule, share) for share in part)
        first = max(first, first_step(schedule.steps, 1.0 if image is None else strength))
        noise = latents.to(self.device, torch.float32)
        image, mask, condition = (None if t is None else t.to(self.device) for t in (image, mask, condition))
        if sampler in STOCHASTIC and seeds is None:
            raise ConfigError(f"{sampler} draws noise on the way: give seeds, one a picture")
        draw = noise_of_steps(seeds, noise) if seeds is not None else None
        x = noise if image is None else mixed(image, noise, schedule, first)
        clean: Tensor | None = None
        with self._stage(self.network):
            predict = self.predictor(prompt, schedule, width, height, guidance, guidance_scale, condition, first)
            for i in tqdm(range(first, last), desc="denoising", unit="step", **self._bar):
                x, clean = move(predict, x, schedule, i, clean, draw)
                if mask is not None and image is not None:
                    x = mask * x + (1 - mask) * mixed(image, noise, schedule, i + 1)
                if callback and callback(Step(i, schedule.steps, float(schedule.sigmas[i + 1]), x, clean)):
                    break
        return finite(x, "denoising")

    def predictor(
        self, prompt: Prompt, schedule: Schedule, width: int, height: int, guidance: Guidance,
        guidance_scale: float | None = None, condition: Tensor | None = None, first: int = 0,
    ) -> Predict:  # fmt: skip
        """A function from latents `[B, C, H / 8, W / 8]` and a step to the guided network's raw output of that shape."""
        rows = [prompt.positive]
        if guidance.cfg_scale != 1:
            if prompt.negative is None:
                raise ConfigError(f"cfg_scale {guidance.cfg_scale:g} needs a negative prompt; an empty one is ''")
            rows.append(prompt.negative)
        if not torch.is_autocast_enabled(self.device.type):
            check_dtypes(self)
        dtype = dtype_of(self.network)
        conditioning = Conditioning.joined([part.to(self.device, dtype) for part in rows])
        times = schedule.times.to(self.device, torch.promote_types(dtype, torch.float32))
        negatives = len(conditioning) - len(prompt.positive)
        run = self.prepare(conditioning, negatives, times, width, height, guidance_scale)

        def ask(x: Tensor, run: Any, i: int, skip_blocks: Collection[int]) -> Tensor:
            return self.step(x, run, i, skip_blocks, condition)

        return guided(ask, run, guidance, len(prompt.positive), schedule.steps, first)

    @torch.no_grad()
    def decode_vae(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, H / 8, W / 8]` -> pictures `[B, 3, H, W]` float32, in [-1, 1]."""
        z = latents.to(self._place(self.autoencoder), dtype_of(self.autoencoder))
        with self._stage(self.autoencoder):
            rows = self.vae_rows
            pictures = decode_in_strips(self.autoencoder, z, rows) if rows else self.autoencoder.decode(z)
        return finite(pictures.float(), "decoding").clamp(-1, 1)

    @torch.no_grad()
    def encode_vae(self, pictures: Tensor) -> Tensor:
        """Pictures `[B, 3, H, W]` in [-1, 1] -> latents `[B, C, H / 8, W / 8]` float32, the posterior's mean."""
        x = pictures.to(self._place(self.autoencoder), dtype_of(self.autoencoder))
        with self._stage(self.autoencoder):
            rows = self.vae_rows
            latents = encode_in_strips(self.autoencoder, x, rows) if rows else self.autoencoder.encode(x)
        return finite(latents.float(), "encoding the picture")

    def noise(self, seeds: Sequence[int], width: int, height: int) -> Tensor:
        """`[len(seeds), C, H / 8, W / 8]`: float32 on the CPU, each picture from its own seed.

        So a picture's noise depends neither on its neighbours nor on the device.
        """
        shape = (self.latent_channels, height // LATENT_SCALE, width // LATENT_SCALE)
        return torch.stack([drawn(shape, seeded(seed)) for seed in seeds])

    def generate(
        self,
        prompt: Text | Sequence[Text] = "",
        *,
        negative: Text | Sequence[Text] | None = None,
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        schedule: Table | None = None,
        shift: float | None = None,
        guidance_scale: float | None = None,
        cfg_scale: float | None = None,
        cfg_rescale: float = 0.0,
        cfg_interval: tuple[float, float] = (0.0, 1.0),
        skip_layers: bool | SkipLayers = False,
        part: tuple[float, float] = (0.0, 1.0),
        seed: int | Sequence[int] | None = None,
        image: Image.Image | Tensor | None = None,
        strength: float | None = None,
        mask: Image.Image | Tensor | None = None,
        control: Image.Image | Tensor | None = None,
        noise: Tensor | None = None,
        conditioning: Prompt | None = None,
        keep: Sequence[str] = (),
        callback: Callback | None = None,
    ) -> Result:
        """Draw one picture for each prompt and seed, all in one batch; one of either serves all of the other.

        What is None is the published variant's (`defaults`). sampler is a name of `SAMPLERS`; schedule a table's name or its
        sigmas, shift a number for it; part, shares of the run, stops early or goes on with another network's latents, given
        as noise. guidance_scale is what the network's guidance embedding is told; cfg_scale other
        than 1 asks the network for `negative` too and steers away from it (true classifier-free guidance), within
        cfg_interval, shares of the steps; cfg_rescale puts as much of the deviation back; skip_layers True is the published
        setting. seed None draws one. image with strength begins from a picture, with a mask (white is painted) it fills in;
        control is the picture that Canny and Depth follow. noise and conditioning replace what would be drawn and encoded;
        keep returns any of "conditioning", "noise", "latents". Pictures are PIL images or tensors `[B, 3, H, W]` in [-1, 1],
        masks `[B, 1, H, W]` in [0, 1]. Raises ConfigError for settings that are impossible, EridiffError for values that are
        not finite.
        """
        return self._finished(self._stages(SimpleNamespace(**{n: v for n, v in locals().items() if n != "self"})))

    def generate_each(self, requests: Sequence[Mapping[str, Any]]) -> Iterator[Result]:
        """What `generate(**request)` gives for each request, in their order and bit for bit.

        With `offload` each component is moved to the device once for all requests: all prompts are encoded, then all latents
        denoised, then all decoded. Raises what `generate` raises; the requests before the one that failed are finished first.
        """
        signature = inspect.signature(DiffusionInference.generate)
        runs = []
        for request in requests:
            bound = signature.bind(self, **request)
            bound.apply_defaults()
            bound.arguments.pop("self")
            runs.append(self._stages(SimpleNamespace(**bound.arguments)))
        for group in [runs] if self.offload else [[run] for run in runs]:
            yield from self._together(group)

    def _finished(self, run: Stages[T]) -> T:
        return next(self._together([run]))

    def _together(self, runs: Sequence[Stages[T]]) -> Iterator[T]:
        return together(runs, self._stage, last=self.network)

    def _stages(self, asked: SimpleNamespace) -> Stages[Result]:
        """`generate` in stages; `asked` has its arguments."""
        for name, value in vars(asked).items():
            setattr(asked, name, plain(value))
        if asked.conditioning is not None and not isinstance(asked.conditioning, Prompt):
            raise ConfigError(
                f"conditioning must be an eridiff.Prompt, not a {type(asked.conditioning).__name__}: "
                "Prompt(Conditioning(text, pooled)), with the negative one behind it if there is guidance"
            )
        prompts, seeds = matched(
            asked.prompt, asked.seed, len(asked.conditioning.positive) if asked.conditioning else 1
        )
        asked.image, asked.mask, asked.control = (
            upright(picture) for picture in (asked.image, asked.mask, asked.control)
        )
        handed_in = [n for n in ("image", "mask", "control", "noise", "conditioning") if getattr(asked, n) is not None]
        defaults, conditioning, noise, part = self.sampling, asked.conditioning, asked.noise, asked.part
        given = next((picture for picture in (asked.image, asked.control) if picture is not None), None)
        width, height = settle_size(asked.width, asked.height, given, self.defaults(), self.multiple)
        sampler = defaults.sampler if asked.sampler is None else asked.sampler
        cfg_scale = defaults.cfg_scale if asked.cfg_scale is None else asked.cfg_scale
        unknown = sorted(set(asked.keep) - set(KEEP))
        if unknown:
            raise ConfigError(f"'{unknown[0]}' cannot be kept; there are {', '.join(KEEP)}")
        check_settings(
            steps=asked.steps, cfg_scale=cfg_scale, guidance_scale=asked.guidance_scale, strength=asked.strength,
            cfg_rescale=asked.cfg_rescale, cfg_interval=asked.cfg_interval, sampler=sampler, shift=asked.shift,
        )  # fmt: skip
        if (asked.mask is not None or asked.strength is not None) and asked.image is None:
            raise ConfigError("a mask or a strength needs the image that it is for")
        if not 0 <= part[0] < part[1] <= 1:
            raise ConfigError(f"part must be two rising shares of the run such as 0 and 0.8, not {part}")
        table = self.table_of(sampler) if asked.schedule is None else asked.schedule
        points = self.schedule(
            defaults.steps if asked.steps is None else asked.steps, width, height, table, asked.shift
        )
        guidance = Guidance(cfg_scale, asked.cfg_rescale, asked.cfg_interval, self._skip_layers(asked.skip_layers))
        image, control = (None if p is None else to_tensor(p, width, height) for p in (asked.image, asked.control))
        mask = None if asked.mask is None else to_tensor(asked.mask, width, height, mask=True)
        for name, rows in (("noise", noise), ("image", image), ("control", control), ("mask", mask)):
            if rows is not None and len(rows) not in (len(seeds),) + ((1,) if name != "noise" else ()):
                raise ConfigError(f"{len(rows)} rows of {name} for {len(seeds)} prompts and seeds: give as many")

        if conditioning is None:
            self.check_words(prompts)
            steered = cfg_scale != 1
            same = all(p == prompts[0] for p in prompts) and (
                asked.negative is None or len(listed(asked.negative)) == 1
            )
            conditioning = yield from self._encoding(
                prompts[:1] if same else prompts, asked.negative if steered else None, steered
            )
        if len(conditioning.positive) == 1:
            repeated = conditioning.negative and conditioning.negative.repeat(len(seeds))
            conditioning = Prompt(conditioning.positive.repeat(len(seeds)), repeated)
        if image is not None or control is not None:
            yield self.autoencoder
        condition = self.condition(image, mask, control)
        start = self.encode_vae(image) if image is not None and condition is None else None
        noise = self.noise(seeds, width, height) if noise is None else noise
        strength = (1.0 if mask is not None else 0.75) if asked.strength is None else asked.strength
        yield self.network
        latents = self.denoise(
            noise, conditioning, points, guidance=guidance, guidance_scale=asked.guidance_scale, sampler=sampler,
            image=start, strength=strength, condition=condition, callback=asked.callback, part=part, seeds=seeds,
            mask=None if start is None or mask is None else latent_mask(mask),
        )  # fmt: skip
        yield self.autoencoder
        decoded = self.decode_vae(latents).cpu()
        if image is not None and mask is not None:
            decoded = mask * decoded + (1 - mask) * image
        table = table if table is None or isinstance(table, str) else points.sigmas.tolist()
        settings = {
            **provenance(self), "negative_prompt": asked.negative, "width": width, "height": height, "steps": points.steps,
            "sampler": sampler, "schedule": table, "shift": asked.shift, "guidance_scale": self.guidance(asked.guidance_scale),
            "cfg_scale": cfg_scale, "cfg_rescale": asked.cfg_rescale, "cfg_interval": list(asked.cfg_interval),
            "skip_layers": guidance.skip_layers and asdict(guidance.skip_layers), "part": list(part),
            "strength": None if start is None else strength, "batch": len(seeds),
            "loras": [handle.record() for handle in self.loras] or None, "handed_in": handed_in,
            **self.told_sizes(width, height),
        }  # fmt: skip
        each = [{"prompt": p, "seed": s, **settings} for p, s in zip(prompts, seeds, strict=True)]
        kept: dict[str, Any] = {"conditioning": conditioning, "noise": noise, "latents": latents}
        return Result(to_images(decoded), each, **{name: kept[name] for name in asked.keep})

    def _skip_layers(self, given: bool | SkipLayers) -> SkipLayers | None:
        """True is the variant's published setting; ConfigError where there is none."""
        published = getattr(self.sampling, "skip_layers", None)
        if given is not True:
            return given or None
        if published is None:
            raise ConfigError(f"there is no published skip-layer guidance for {self.variant}; sd3.5-medium has one")
        return published

    def guidance(self, guidance_scale: float | None) -> float | None:
        """What the guidance embedding is told; None where there is none."""
        return None

    def told_sizes(self, width: int, height: int) -> dict[str, Any]:
        """What the network is told of an image's size, for the record; SDXL is."""
        return {}

    @contextmanager
    def _stage(self, module: nn.Module) -> Iterator[None]:
        """The block computes with this component, in evaluation mode, LoRAs included; with `offload` it is on the device meanwhile.

        Only the network computes under the caller's autocast: autoencoders and T5 overflow in float16.
        """
        if self._staged is module:  # by `_together`, for several images
            yield
            return
        before, self._staged = self._staged, module
        adopted = [one for one in self.adopted if one.network is module]
        try:
            for one in adopted:
                one.refresh()
            with (
                on_device(module, self.device) if self.offload else nullcontext(),
                evaluation({"": module}),
                nullcontext() if module is self.network else outside_autocast(self.device),
            ):
                yield
        finally:
            self._staged = before
            for one in adopted:
                one.release()

    def _place(self, module: nn.Module) -> torch.device:
        """Where a component computes."""
        return self.device if self.offload else device_of(module)

    @property
    def _bar(self) -> dict[str, Any]:
        return {"disable": None if self.progress else True, "leave": False}
