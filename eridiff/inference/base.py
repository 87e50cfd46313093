"""The way from a prompt to an image that all families share: one loop, one guidance, one noise.

Letters: B images, C latent channels, H x W the image's size in pixels.
"""

import inspect
import logging
import os
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from typing_extensions import Self, Unpack

from eridiff.adopt import Adopted
from eridiff.block_cache import BlockCache
from eridiff.blocks import evaluation
from eridiff.errors import ConfigError, quoted
from eridiff.images import to_images, to_tensor
from eridiff.inference.compiled import cache_folder, check_compiler, compile_network
from eridiff.inference.encoding import check_conditioning, conditioned, encoded, text_asked, text_told
from eridiff.inference.family import Encoder, Family
from eridiff.inference.from_diffusers import model_of
from eridiff.inference.handed_in import check_dtypes
from eridiff.inference.latents import (  # fmt: skip
    LATENT_SCALE,
    as_told,
    device_of,
    dtype_of,
    finite,
    latent_mask,
    noises,
    rounded,
    same_device,
)
from eridiff.inference.loading import read
from eridiff.inference.lora import LoraHandle, weighed
from eridiff.inference.model import Model
from eridiff.inference.options import Options, check_names
from eridiff.inference.placing import Placement, Plan, Room, plan_parts
from eridiff.inference.provenance import records
from eridiff.inference.result import Callback, HandedIn, Prompt, Result, Run, Step
from eridiff.lora.attach import Scale
from eridiff.lora.load import Lora
from eridiff.memory.stages import OFFLOAD, Stages, on_device, together
from eridiff.memory.strips import decode_in_strips, encode_in_strips
from eridiff.precision import check_dtype, outside_autocast
from eridiff.request import ENCODING, FIELDS, Checked, Request, Table, Text, known_names, listed
from eridiff.schedulers import Schedule, first_step
from eridiff.schedulers.flow_match import flow_points, flow_schedule
from eridiff.schedulers.guidance import Guidance, guided
from eridiff.schedulers.samplers import noises_of_a_step, sampler, with_inside
from eridiff.schedulers.step import REMEMBERED, Predict, mixed
from eridiff.schedulers.tables import rounded_times
from eridiff.text import Conditioning
from eridiff.weights.locate import ModelPath, Parts, locate

log = logging.getLogger(__name__)
USUAL: Checked = Request(
    **{name: told.metadata["usual"] for name, told in FIELDS.items() if told.metadata["usual"] is not None}
)
KEEP = ("conditioning", "noise", "latents", "run")
T = TypeVar("T")


def of_model(name: str) -> Any:
    """An attribute of an inference that is its model's."""
    return property(lambda self: getattr(self.model, name), lambda self, value: setattr(self.model, name, value))


def of_encoder(name: str) -> Any:
    """A text encoder of an inference's model by its component; None where none is loaded, and to forget it."""

    def put(self: "DiffusionInference", encoder: Encoder | None) -> None:
        self.model.encoders = {n: e for n, e in {**self.model.encoders, name: encoder}.items() if e is not None}

    return property(lambda self: self.model.encoders.get(name), put)


class DiffusionInference(Family):
    """Generates images with one model; families say how prompts are encoded and how the network is asked.

    The modules are public and may be anyone's: pass those of a training run, or read files by `load_model`.
    """

    recorded: ClassVar[tuple[str, ...]] = ("vae_rows", "compile")  # options that an image depends on
    multiple: int = 16  # of which width and height must be multiples
    takes: Collection[str] = ()  # fields of Request that have an effect on some networks alone
    inpaints: bool = False  # whether the network itself is given the mask and the image around it
    flow: ClassVar[bool] = True  # whether the network learned rectified flow
    offsets: Collection[str] = ()  # schedules that take a timestep_offset
    network: Any = of_model("network")
    autoencoder: Any = of_model("autoencoder")
    variant: str = of_model("variant")
    why: str = of_model("why")  # it is this variant
    sampling: Any = of_model("sampling")  # the variant's Defaults
    source: dict[str, Any] = of_model("source")  # which files, for the record
    adopted: tuple[Adopted, ...] = of_model("adopted")
    loras: list[LoraHandle] = of_model("loras")
    words: Any = of_model("words")  # that the model knows, if its file lists them; set None to end the check of prompts

    def __init__(
        self, network: nn.Module | None, autoencoder: nn.Module | None, encoders: Mapping[str, Any], **options: Unpack[Options]
    ) -> None:  # fmt: skip
        """Modules are used as they are; without a network they come from `load_model`.

        Raises ConfigError for an option that neither `Options` nor the family has, for impossible values, and for modules
        that do not fit.
        """
        check_names(type(self).__name__, options, [*self.own_options(), *Options.__annotations__])
        variant, device, dtype = options.get("variant"), options.get("device"), options.get("dtype")
        for one in dtype.values() if isinstance(dtype, Mapping) else [dtype]:
            check_dtype(one)
        offload, vae_rows, progress = options.get("offload"), options.get("vae_rows"), options.get("progress", True)
        if offload not in (None, *OFFLOAD):
            raise ConfigError(f"offload must be {' or '.join(map(repr, OFFLOAD))} or nothing, not {offload!r}")
        if vae_rows is not None and (type(vae_rows) is not int or vae_rows < 1):
            raise ConfigError(f"vae_rows must be a whole number, at least 1, not {vae_rows!r}")
        if variant is not None and variant not in self.variants:
            raise ConfigError(f"'{variant}' is not a variant of {self.title()}; there are {', '.join(self.variants)}")
        try:
            self.asked_device = None if device is None else torch.device(device)
        except RuntimeError:
            raise ConfigError(f"{quoted(device)} is not a device: cpu, cuda or cuda:1, say") from None
        self.asked_variant, self.dtype, self.offload, self.progress = variant, dtype, offload, progress
        self.vae_rows, self.allow_unknown = vae_rows, options.get("allow_unknown", False)
        self.vram = options.get("vram")
        if self.vram is not None and (offload is not None or vae_rows is not None):
            raise ConfigError("vram chooses offload and vae_rows: leave them out, or it")
        self.compile = options.get("compile", False)
        if not isinstance(self.compile, bool):
            raise ConfigError(f"compile must be True or False, not {self.compile!r}")
        if network is not None:
            self._check_passed()
        self._check_compile()
        self._room: Room | None = None  # with a vram
        self._staged: nn.Module | None = None  # the component that is in use
        self._model: Model | None = None
        if network is not None:
            self.model = Model.of(type(self), network, autoencoder, encoders, variant=variant)
            self._check_device()
        elif autoencoder is not None or any(encoder is not None for encoder in encoders.values()):
            raise ConfigError(
                f"{type(self).__name__} was given modules without a network: give it too, or none and load_model"
            )

    @property
    def model(self) -> Model:
        """What is loaded. Raises ConfigError where nothing is."""
        if self._model is None:
            raise ConfigError(f"no model is loaded: give {type(self).__name__} its modules, or call load_model")
        return self._model

    @model.setter
    def model(self, model: Model) -> None:
        self._model = model
        for name, module in (("network", model.network), ("autoencoder", model.autoencoder)):
            if self.device.type == "cpu" and dtype_of(module) == torch.float16:
                log.warning(
                    "the %s is float16 on a CPU, where convolutions take a hundred times as long as in float32 or bfloat16",
                    name,
                )
        if self.offload is not None and self.device.type == "cpu":
            log.warning(
                "offload=%r has no effect on the CPU, where a file's weights are mapped and read as they are needed",
                self.offload,
            )

    def _check_device(self) -> Self:
        """This inference; raises ConfigError for modules on another device than the one that is asked for."""
        own, asked = self.model.device, self.asked_device
        if asked is not None and not self.offload and not same_device(own, asked):
            raise ConfigError(f"the network is on {own}, not on {asked}: move it there, or give no device")
        return self

    def _check_passed(self) -> None:
        """Raises ConfigError for an option that has no effect on modules that are passed."""
        if self.vram is not None:
            raise ConfigError("vram has no effect on modules that are passed, which lie where they are")
        if self.compile:
            raise ConfigError(
                "compile has no effect on modules that are passed: eridiff.blocks.compile_blocks compiles them"
            )

    def _check_compile(self) -> None:
        """Raises ConfigError for layers that come and go while compiled code runs, which does not see it."""
        if self.compile and self.offload not in (None, "stages"):
            raise ConfigError(
                f"compiled code keeps its layers on one device, and offload={self.offload!r} moves them meanwhile: leave compile out"
                + (f", or give more memory than {self.vram}" if self.vram is not None else ", or take offload='stages'")
            )

    @classmethod
    def from_diffusers(
        cls, pipeline: Any = None, *, transformer: Any = None, unet: Any = None, vae: Any = None,
        text_encoder: Any = None, text_encoder_2: Any = None, text_encoder_3: Any = None, tokenizer: Any = None,
        tokenizer_2: Any = None, tokenizer_3: Any = None, scheduler: Any = None, **options: Any,
    ) -> Self:  # fmt: skip
        """Generate with the modules of a trainer: those of a diffusers pipeline, or single ones by diffusers' names.

        The network and the autoencoder are adopted (`eridiff.adopt`): of diffusers' classes or under the
        originals' names, wrapped or not, they share their parameters and nothing is copied; what `adopt` returned is
        taken as it is. Text encoders and tokenizers are those of transformers, slow or fast; without encoders
        conditioning is passed. What the configurations of the modules, the scheduler and the pipeline say is
        followed; options are those of the constructor. Raises CheckpointError for a module that is not known, ConfigError
        for one that is missing or of another family.
        """
        given = {name: part for name, part in locals().items() if name not in ("cls", "pipeline", "options")}
        known = [*given, *Options.__annotations__, *cls.own_options()]
        check_names(f"{cls.__name__}.from_diffusers", options, known)
        inference = cls(None, None, **options)
        inference._check_passed()
        inference.model, said = model_of(cls, pipeline, given, inference.asked_variant)
        inference.follow(said)
        return inference._check_device()

    @classmethod
    def own_options(cls) -> list[str]:
        """What the family's constructor takes beside `Options`."""
        return [name for name in inspect.signature(cls).parameters if name != "options"]

    def follow(self, config: Mapping[str, Any]) -> None:  # nothing for most
        """Take over what the configurations of diffusers' pipeline and scheduler say, but for the options that are given."""

    @property
    def device(self) -> torch.device:
        """Where images are computed: the network's own device, with `offload` the one that components are moved to."""
        if not self.offload and self._model is not None:
            return self.model.device
        return self.asked_device or torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def encode(self, prompts: Sequence[Text], **asked: Any) -> Conditioning:
        """One row of conditioning per prompt, on the devices of the encoders; `asked` as of `encode_prompt`."""
        return self._finished(self.encoding(prompts, text_asked(self, asked)))

    @abstractmethod
    def encoding(self, prompts: Sequence[Text], asked: Checked) -> Stages[Conditioning]:
        """As `encode`, in stages: yields each text encoder before it is used."""

    @abstractmethod
    def named_schedule(self, steps: int, width: int, height: int, name: str | None, shift: float | None) -> Schedule:
        """The points of a run; None is the published variant's."""

    @abstractmethod
    def prepare(self, conditioning: Conditioning, negatives: int, times: Tensor, asked: Checked) -> Any:
        """The network's run for all rows of a conditioning, on its device and of its dtype; the last `negatives` are that."""

    @abstractmethod
    def step(
        self, latents: Tensor, run: Any, i: int, skip_blocks: Collection[int] = (), condition: Tensor | None = None
    ) -> Tensor:
        """The network's raw output, float32: latents `[B, C, H / 8, W / 8]` -> the same shape."""

    def condition(
        self, image: Tensor | None, mask: Tensor | None, control: Tensor | None, references: Sequence[Tensor] = ()
    ) -> Tensor | None:
        """What the network takes beside the latents, from images and a mask; None for most."""
        return None

    def referred(self, references: Sequence[Any]) -> list[Tensor]:
        """References `[1, 3, H, W]` in [-1, 1], of the sizes that the network was trained with."""
        return []

    def load_model(self, model: ModelPath | Parts) -> Self:
        """Read the network, the autoencoder, the text encoders and their tokenizers; every key is accounted for.

        Raises CheckpointError when a part is missing or damaged or does not fit, before any weight is read.
        """
        device = self.asked_device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        parts = locate(model, self.allow_unknown)
        if self.vram is not None:
            self._room = Room(self.vram, self._planned(parts, device))
            self._placed(self._room.placement)
        if self.compile:
            cache_folder()  # before the compiler is asked, which takes its own
            check_compiler(device)
        self.model = read(
            type(self), parts, device=device, dtype=self.dtype, variant=self.asked_variant,
            offload=self.offload is not None, progress=self.progress,
        )  # fmt: skip
        if self.compile:
            compile_network(self.network)
        return self

    def _planned(self, parts: Parts, device: torch.device) -> Callable[..., Plan]:
        """The plan of images of a size, for `Room`."""
        return partial(plan_parts, type(self), parts, variant=self.asked_variant, dtype=self.dtype, device=device)

    def _placed(self, placement: Placement) -> None:
        """Take a placement that was chosen for the memory there is. Raises ConfigError for one that cannot be compiled."""
        self.offload, self.vae_rows = placement.offload, placement.vae_rows
        self._check_compile()

    def apply_lora(
        self, weights: str | os.PathLike[str] | Lora, scale: Scale | Mapping[str, Scale] | None = None, *,
        allow_partial: bool = False, part: str | None = None, dora: str = "peft",
    ) -> LoraHandle:  # fmt: skip
        """Put a LoRA beside the network and the text encoders: a file of any format, a peft folder, a hub id, or a `Lora`.

        Several add up. `scale` is a number, `[B]` for the rows of a batch, or numbers by patterns of native module names;
        None is the `lora_scale` of each request, 1 by default.
        The handle weighs it anew and takes it away. Raises LoraError, having changed nothing, for a file of which anything
        does not fit; `allow_partial` leaves that out, and the handle's ledger says what. `part`, "network" or
        "text_encoders", leaves the other part of the file out.
        """
        return self.model.apply_lora(weights, scale, allow_partial=allow_partial, part=part, dora=dora)

    def set_variant(self, variant: str) -> None:
        """Sample with the defaults of this published variant. Raises ConfigError for one that takes other inputs."""
        chosen, why = self.choose_variant(self.network.config, "", variant)
        self.model.sample_as(chosen, why=why)

    def defaults(self) -> Mapping[str, Any]:
        """width, height, steps and whatever else `generate` takes by default."""
        return vars(self.sampling)

    def encode_prompt(
        self,
        prompt: Text | Sequence[Text],
        negative: Text | Sequence[Text] | None = None,
        cfg_scale: float | None = None,
        **asked: Any,
    ) -> Prompt:
        """Encode one prompt or several, and the negative ones with them, so that both have as many rows.

        A prompt is a text, or a text for each encoder by name (`{"clip": ..., "t5": ...}`; an encoder that is not named
        reads the first). `""` is encoded as it stands; a negative of None is the family's default: the empty prompt where
        it is guided with classifier-free guidance (a cfg_scale other than 1; None is the variant's), else none. Words that
        do not fit are cut, with a warning.

        - asked: fields of `Request` that say how: t5_length, t5_mask, t5_padding, without_t5, clip_windows,
          empty_negative, prompt_weights.

        Raises ConfigError for another field, and for values that are impossible or would have no effect.
        """
        told = text_asked(self, {**asked, "negative": negative, "cfg_scale": cfg_scale})
        return self._finished(encoded(self, listed(prompt), negative, told))

    def default_negative(self, prompts: list[Text], asked: Checked) -> Stages[Prompt]:
        """Prompts with what they are guided away from when no negative prompt is given: the empty one."""
        return encoded(self, prompts, "", asked)

    @property
    def called(self) -> str:
        """The variant in a sentence, with its family unless its name has it: SDXL base, Flux dev, sd3.5-medium."""
        return self.variant if self.family == "mmdit" else f"{self.title()} {self.variant}"

    @property
    def latent_channels(self) -> int:
        return self.autoencoder.config.latent_channels

    def schedule(
        self, steps: int, width: int, height: int, table: Table | None = None, shift: float | None = None, *,
        timestep_offset: int | None = None, timestep_rounding: str = "none", final_noise: str | None = None,
    ) -> Schedule:  # fmt: skip
        """The points of a run: the variant's own, another table by name, or through given sigmas (which then set steps).

        The rest is as in `Request`.
        """
        if table is None or isinstance(table, str):
            spacing = {"timestep_offset": timestep_offset, "final_noise": final_noise}
            spacing = {name: value for name, value in spacing.items() if value is not None}
            found = self.named_schedule(steps, width, height, table, shift, **spacing)
        else:
            found = self.schedule_through(torch.as_tensor(table, dtype=torch.float64, device="cpu"))
        return rounded_times(found, timestep_rounding)

    def points(self, asked: Checked) -> Schedule:
        """The points of the run that a request of `Request.checked` asks for."""
        return self.schedule(
            asked.steps, asked.width, asked.height, asked.schedule, asked.shift, timestep_offset=asked.timestep_offset,
            timestep_rounding=asked.timestep_rounding, final_noise=asked.final_noise,
        )  # fmt: skip

    def inside(self, ratios: Tensor | None, times: Tensor | None) -> Schedule:
        """The points inside the steps of a run, for `samplers.with_inside`."""
        assert ratios is not None
        return flow_points(ratios)

    def sampled(self, schedule: Schedule, asked: Checked) -> Schedule:
        """The schedule as a request's sampler walks it: with the points inside the steps that it asks at, and the clipping."""
        if asked.clip_clean is not None:
            schedule = replace(schedule, clip=asked.clip_clean)

        def make(ratios: Tensor | None, times: Tensor | None) -> Schedule:
            return rounded_times(self.inside(ratios, times), asked.timestep_rounding)

        return with_inside(asked.sampler, schedule, make, asked.eta, asked.churn)

    def shifts(self, table: Table | None) -> bool:
        """Whether a schedule, by name, takes a shift."""
        return "shift" in self.takes

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
        self, latents: Tensor | Run, prompt: Prompt, steps: int | Schedule, *, image: Tensor | None = None,
        strength: float = 1.0, mask: Tensor | None = None, condition: Tensor | None = None,
        seeds: Sequence[int] | None = None, callback: Callback | None = None, **asked: Any,
    ) -> Tensor:  # fmt: skip
        """Noise -> latents, both `[B, C, H / 8, W / 8]`; float32 between steps whatever the network's dtype.

        - latents: the noise, or the `Run` of the part before.
        - steps: how many, or the schedule itself.
        - image, strength: latents to begin from, with the noise of the share `strength` of the run, 0 to 1.
        - mask: `[B, 1, H / 8, W / 8]`; only where it is 1 is painted, the rest follows the image.
        - condition: what the network takes beside the latents, of `condition`.
        - seeds: one per image, for samplers that draw noise on the way.
        - callback: is called with a `Step` after each; the run ends where it returns something true.
        - asked: further fields of `Request`, such as sampler, cfg_scale and part.

        Raises ConfigError for settings that are impossible, EridiffError when the network gives values that are not finite.
        """
        rows = (latents.x if isinstance(latents, Run) else latents).shape
        height, width = (side * LATENT_SCALE for side in rows[-2:])
        count = steps if isinstance(steps, int) else steps.steps
        request = Request.of({**asked, "width": width, "height": height, "steps": count})
        settled = request.checked(self, rows[0])
        request.check_beside(latents, settled)
        schedule = self.points(replace(settled, schedule=request.schedule)) if isinstance(steps, int) else steps
        if noises_of_a_step(settled.sampler, settled.eta, settled.churn) and seeds is None:
            raise ConfigError(f"{settled.sampler} draws noise on the way: give seeds, one per image")
        first, last = self.ends(schedule, replace(settled, strength=strength), image, mask)
        run = self.begun(latents, schedule, first, image, settled, seeds)
        self.walk(run, prompt, schedule, settled, first, last, image, mask, condition, callback)
        return finite(run.x, "denoising")

    def ends(self, schedule: Schedule, asked: Checked, image: Tensor | None, mask: Tensor | None) -> tuple[int, int]:
        """The first step of a run and the one behind its last; says in the log where there is nothing to do, or all."""
        first, last = (self.place(schedule, share) for share in asked.part)
        if image is not None:
            start = first_step(schedule.steps, asked.strength, asked.strength_rounding)
            if start == schedule.steps:
                log.warning("a strength of %g denoises nothing: the image is only encoded and decoded", asked.strength)
                return start, last
            if start == 0 and schedule.alphas[0] == 0 and mask is None and not self.inpaints:
                what = "a strength of %g of %d steps keeps nothing of the image: the run begins from noise alone"
                log.warning(what, asked.strength, schedule.steps)
            first = max(first, start)
        if first >= last:
            log.warning("the part %g to %g of the run holds none of its %d steps", *asked.part, schedule.steps)
        return first, last

    def begun(
        self, noise: Tensor | Run, schedule: Schedule, first: int, image: Tensor | None, asked: Checked,
        seeds: Sequence[int] | None,
    ) -> Run:  # fmt: skip
        """A run before its step `first`: of an image's latents, or of noise, which may be the run of a part before or its
        latents, of which multi-step samplers remember nothing."""
        before = noise if isinstance(noise, Run) else None
        own = (noise.noise if isinstance(noise, Run) else noise).to(self.device, torch.float32)
        start = before.start if before is not None else 0 if image is None else first
        draw = None
        if seeds is not None:
            made = noises(seeds, own.shape[1:], asked, self.device)
            steps = (first - start) * noises_of_a_step(asked.sampler, asked.eta, asked.churn)  # of the parts before
            for _ in range(1 + steps):  # that of the start too
                made()
            draw = lambda: made().to(self.device)  # noqa: E731
        if before is not None:
            past = [(clean.to(self.device), noise.to(self.device)) for clean, noise in before.past]
            return Run(before.x.to(self.device), own, draw, start, past)
        x = own if asked.noise_scale == "one" or first > 0 else float(schedule.sigmas[0]) * own
        return Run(x if image is None else mixed(image.to(self.device), own, schedule, first), own, draw, start)

    @torch.no_grad()
    def walk(
        self, run: Run, prompt: Prompt, schedule: Schedule, asked: Checked, first: int, last: int, image: Tensor | None = None,
        mask: Tensor | None = None, condition: Tensor | None = None, callback: Callback | None = None,
    ) -> None:  # fmt: skip
        """Take a run from step `first` to before `last`; arguments as in `denoise`, `asked` as of `Request.checked`."""
        move, schedule = sampler(asked.sampler, asked.eta, asked.churn), self.sampled(schedule, asked)
        image, mask, condition = (None if t is None else t.to(self.device) for t in (image, mask, condition))
        with self._stage(self.network):
            cache = None if asked.block_cache is None else BlockCache(self.network, asked.block_cache)
            predict = self.predictor(prompt, schedule, asked, condition, first, cache)
            run.x = rounded(run.x, asked.latents_dtype, schedule, first, asked.sampler)
            for i in tqdm(range(first, last), desc="denoising", unit="step", **self._bar):
                run.x, seen = move(predict, run.x, schedule, i, run.past, run.draw)
                run.past = [*run.past, seen][-REMEMBERED:]
                if mask is not None and image is not None:
                    run.x = mask * run.x + (1 - mask) * mixed(image, run.noise, schedule, i + 1)
                run.x = rounded(run.x, asked.latents_dtype, schedule, i + 1, asked.sampler)
                if callback and callback(Step(i, schedule.steps, float(schedule.sigmas[i + 1]), run.x, seen[0])):
                    run.stopped = True
                    break
        if cache is not None:
            run.reuse = cache.reuse
            if run.reuse.evaluations:
                log.warning("%s", run.reuse)

    def predictor(
        self, prompt: Prompt, schedule: Schedule, asked: Checked, condition: Tensor | None = None, first: int = 0,
        cache: BlockCache | None = None,
    ) -> Predict:  # fmt: skip
        """A function from latents `[B, C, H / 8, W / 8]` and a step to the guided network's raw output of that shape."""
        rows = [prompt.positive]
        guidance = Guidance(
            asked.cfg_scale, asked.cfg_rescale, asked.cfg_interval, asked.skip_layers or None, asked.cfg_batch,
            None if asked.cfg_dtype == "float32" else getattr(torch, asked.cfg_dtype),
        )  # fmt: skip
        if guidance.cfg_scale != 1:
            if prompt.negative is None:
                raise ConfigError(f"cfg_scale {guidance.cfg_scale:g} needs a negative prompt; an empty one is ''")
            rows.append(prompt.negative)
        if not torch.is_autocast_enabled(self.device.type):
            check_dtypes(network=self.network, autoencoder=self.autoencoder)
        dtype = dtype_of(self.network)
        conditioning = Conditioning.joined([part.to(self.device, dtype) for part in rows])
        told = as_told(schedule.asked, asked.time_dtype, 1000 if schedule.prediction == "velocity" else 1)
        times = told.to(self.device, torch.promote_types(dtype, torch.float32))
        run = self.prepare(conditioning, len(conditioning) - len(prompt.positive), times, asked)

        def ask(x: Tensor, run: Any, i: int, skip_blocks: Collection[int]) -> Tensor:
            if cache is None:
                return self.step(x, run, i, skip_blocks, condition)
            return cache(lambda: self.step(x, run, i, skip_blocks, condition), run, skip_blocks)

        return guided(ask, run, guidance, len(prompt.positive), schedule.steps, first)

    @torch.no_grad()
    def decode_vae(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, H / 8, W / 8]` -> images `[B, 3, H, W]` float32, in [-1, 1]."""
        z = latents.to(self._place(self.autoencoder), dtype_of(self.autoencoder))
        with self._stage(self.autoencoder):
            rows = self.vae_rows
            images = decode_in_strips(self.autoencoder, z, rows) if rows else self.autoencoder.decode(z)
        return finite(images.float(), "decoding").clamp(-1, 1)

    @torch.no_grad()
    def encode_vae(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> latents `[B, C, H / 8, W / 8]` float32, the posterior's mean."""
        x = images.to(self._place(self.autoencoder), dtype_of(self.autoencoder))
        with self._stage(self.autoencoder):
            rows = self.vae_rows
            latents = encode_in_strips(self.autoencoder, x, rows) if rows else self.autoencoder.encode(x)
        return finite(latents.float(), "encoding the image")

    def noise(self, seeds: Sequence[int], width: int, height: int) -> Tensor:
        """`[len(seeds), C, H / 8, W / 8]`: float32 on the CPU, each image from its own seed.

        So an image's noise depends neither on its neighbours nor on the device.
        """
        return self._start_noise(seeds, width, height, USUAL)

    def _start_noise(self, seeds: Sequence[int], width: int, height: int, asked: Checked) -> Tensor:
        shape = (self.latent_channels, height // LATENT_SCALE, width // LATENT_SCALE)
        return noises(seeds, shape, asked, self.device)()

    def generate(
        self, prompt: Request | Text | Sequence[Text] = "", *, conditioning: Prompt | None = None,
        noise: Tensor | Run | None = None, keep: Sequence[str] = (), callback: Callback | None = None, **asked: Any,
    ) -> Result:  # fmt: skip
        """Generate one image for each prompt and seed, all in one batch; one of either serves all of the other.

        - prompt: a text, one for each text encoder by name, several of either, or a whole `Request`.
        - conditioning: an encoded prompt in place of a text.
        - noise: `[B, C, H / 8, W / 8]` in place of the seeds', or the `run` of the result of the part before.
        - keep: which of "conditioning", "noise", "latents", "run" the result must hold.
        - callback: is called with a `Step` after each step; the run ends where it returns something true.
        - asked: the fields of `Request`: negative, width, height, steps, seed, sampler, guidance_scale, cfg_scale, image, ...
          The defaults are the published variant's (`defaults`), and a random seed.

        Raises ConfigError for settings that are impossible or would have no effect, EridiffError for values that are not
        finite.
        """
        handed_in = HandedIn(conditioning, noise, keep, callback)
        return next(self._generated([(self._request(prompt, asked), handed_in)]))

    def generate_each(self, requests: Sequence[Request | Mapping[str, Any]]) -> Iterator[Result]:
        """What `generate` gives for each request, or for each set of its arguments, in their order and bit for bit.

        With `offload` each component is moved to the device once for all requests: all prompts are encoded, then all latents
        denoised, then all decoded. Raises what `generate` raises; the requests before the one that failed are finished first.
        """
        own = inspect.signature(HandedIn).parameters
        pairs = []
        for request in requests:
            given: dict[str, Any] = {"prompt": request} if isinstance(request, Request) else dict(request)
            handed_in = HandedIn(**{name: given.pop(name) for name in list(given) if name in own})
            pairs.append((self._request(given.pop("prompt", ""), given), handed_in))
        yield from self._generated(pairs)

    @staticmethod
    def _request(prompt: Request | Text | Sequence[Text], asked: Mapping[str, Any]) -> Request:
        if not isinstance(prompt, Request):
            return Request.of({**asked, "prompt": prompt})
        known_names(asked, FIELDS, "a request", "is not a setting of")
        return replace(prompt, **asked)

    def _generated(self, pairs: Sequence[tuple[Request, HandedIn]]) -> Iterator[Result]:
        """Those with the same weights of LoRAs in one go, so that `offload` moves each component once."""
        for scale, group in groupby(pairs, key=lambda pair: pair[0].lora_scale):
            runs = [self._stages(*pair) for pair in group]
            with weighed(self.loras, scale):
                for some in [runs] if self.offload else [[run] for run in runs]:
                    yield from self._together(some)

    def _finished(self, run: Stages[T]) -> T:
        return next(self._together([run]))

    def _together(self, runs: Sequence[Stages[T]]) -> Iterator[T]:
        return together(runs, self._stage, last=self.network)

    def _stages(self, request: Request, given: HandedIn) -> Stages[Result]:
        """`generate` in stages."""
        if given.conditioning is not None:
            check_conditioning(self, request, given.conditioning)
        unknown = sorted(set(given.keep) - set(KEEP))
        if unknown:
            raise ConfigError(f"'{unknown[0]}' cannot be kept; there are {', '.join(KEEP)}")
        asked = request.checked(self, len(given.conditioning.positive) if given.conditioning else 1)
        request.check_beside(given.noise, asked)
        if given.conditioning is not None:
            asked = replace(asked, **{name: FIELDS[name].default for name in ENCODING})
        width, height, count = asked.width, asked.height, len(asked.prompt)
        if self._room is not None:
            size = {"width": width, "height": height, "steps": asked.steps, "images": count}
            self._placed(self._room.place(**size, cfg_scale=asked.cfg_scale, t5_length=asked.t5_length))
        points = self.points(asked)
        image, control = (None if p is None else to_tensor(p, width, height) for p in (asked.image, asked.control))
        mask = None if asked.mask is None else to_tensor(asked.mask, width, height, mask=True)
        for name, rows in (("image", image), ("control", control), ("mask", mask)):
            if rows is not None and len(rows) not in (1, count):
                raise ConfigError(f"{len(rows)} rows of {name} for {count} prompts and seeds: give as many")
        conditioning = yield from conditioned(self, asked, given.conditioning)
        if image is not None or control is not None or asked.references:
            yield self.autoencoder
        condition = self.condition(image, mask, control, asked.references or ())
        start = None  # a network that is given the image begins from noise alone, if nothing of the image must stay
        if image is not None and not (self.inpaints and asked.strength == 1):
            start = self.encode_vae(image)
        noise = self._noise(asked, given.noise)
        blended = None if start is None or mask is None or self.inpaints else latent_mask(mask)
        run = yield from self._denoised(noise, conditioning, points, asked, start, blended, condition, given.callback)
        latents = finite(run.x, "denoising")
        yield self.autoencoder
        decoded = self.decode_vae(latents).cpu()
        if image is not None and mask is not None:
            decoded = mask * decoded + (1 - mask) * image
        kept: dict[str, Any] = {"conditioning": conditioning, "noise": run.noise, "latents": latents, "run": run}
        settings = records(self.model, request, asked, given, self.circumstances())
        return Result(
            to_images(decoded, truncate=asked.pixels == "truncate"),
            settings,
            **{name: kept[name] for name in given.keep},
        )

    def _noise(self, asked: Checked, given: Tensor | Run | None) -> Tensor | Run:
        """Of the seeds, or what was passed; raises ConfigError for noise of another shape."""
        seeds, height, width = asked.seed, asked.height, asked.width
        shape = [len(seeds), self.latent_channels, height // LATENT_SCALE, width // LATENT_SCALE]
        rows = given.x if isinstance(given, Run) else given
        if rows is not None and list(rows.shape) != shape:
            raise ConfigError(
                f"the noise has the shape {list(rows.shape)}, and an image of {width}x{height} needs {shape}"
            )
        return self._start_noise(seeds, width, height, asked) if given is None else given

    def _denoised(
        self, noise: Tensor | Run, prompt: Prompt, points: Schedule, asked: Checked, image: Tensor | None,
        mask: Tensor | None, condition: Tensor | None, callback: Callback | None,
    ) -> Stages[Run]:  # fmt: skip
        """As `denoise`, in stages; the run at its end."""
        first, last = self.ends(points, asked, image, mask)
        run = self.begun(noise, points, first, image, asked, asked.seed)
        yield self.network
        self.walk(run, prompt, points, asked, first, last, image, mask, condition, callback)
        return run

    @property
    def weights_dtype(self) -> str:
        """The dtype of the network's weights by name."""
        return str(dtype_of(self.network)).removeprefix("torch.")

    @property
    def guidance_embedding(self) -> bool:
        """Whether the network is given a guidance scale."""
        return bool(getattr(self.network.config, "guidance", False))

    def guidance(self, guidance_scale: float | None) -> float | None:
        """What the guidance embedding is given; None where there is none."""
        if not self.guidance_embedding:
            return None
        return self.sampling.guidance_scale if guidance_scale is None else guidance_scale

    def circumstances(self) -> dict[str, Any]:
        """For the record: the options of this inference that an image depends on, as `load` takes them."""
        return {**{name: getattr(self, name) for name in self.recorded}, "device": self.device.type}

    def told(self, asked: Checked) -> dict[str, Any]:
        """Fields of a request that only this family settles."""
        return text_told(self, asked)

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
                on_device(module, self.device, *self._how(module)) if self.offload else nullcontext(),
                evaluation({"": module}),
                nullcontext() if module is self.network else outside_autocast(self.device),
            ):
                yield
        finally:
            self._staged = before
            for one in adopted:
                one.release()

    def _how(self, module: nn.Module) -> tuple[str, int | None]:
        """How a component comes to the device, and how many bytes its weights may take there if that is known."""
        assert self.offload is not None
        name = next((name for name, component in self.model.modules().items() if component is module), None)
        if name is None:  # the autoencoder is small, and has layers whose weights are read without a call
            return "stages", None
        return self.offload, None if self._room is None else self._room.weights(name)

    def _place(self, module: nn.Module) -> torch.device:
        """Where a component computes."""
        return self.device if self.offload else device_of(module)

    @property
    def _bar(self) -> dict[str, Any]:
        return {"disable": None if self.progress else True, "leave": False}
