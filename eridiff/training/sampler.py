"""Images inside a training loop: `Sampler` generates with the modules in training, and the run does not notice."""

import copy
import logging
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from eridiff.adopt import Adopted
from eridiff.blocks import unwrapped
from eridiff.config import RunConfig, parse_config
from eridiff.errors import ConfigError, TrainingError
from eridiff.images import described, first_text, html_of, save_png, slug
from eridiff.inference import DiffusionInference, Prompt, Result, Step
from eridiff.inference.encoding import check_words
from eridiff.inference.handed_in import bare, check_dtypes, check_sharding
from eridiff.inference.section import requests_of
from eridiff.precision import check_autocast
from eridiff.ranks import agreed, collected, everyones, ranks
from eridiff.request import ENCODING, Request, plain
from eridiff.text.emphasis import unweighted
from eridiff.training.cached import FOLLOWED, handed_in_prompts
from eridiff.training.distributed import sharded
from eridiff.training.embeddings import EmbeddingCache, on_cpu
from eridiff.training.fingerprint import changed, fingerprint
from eridiff.training.record import Entry, drift_of, read_entries, write_page
from eridiff.training.restore import averaged_weights, averages_of, places_of, undisturbed

log = logging.getLogger(__name__)
LIVE = "live"  # the weights as they are in training


class _TimedOut(Exception):
    """Ends an image between two steps."""


def _reason(failure: Exception, max_seconds: float | None) -> str:
    """What a failure says of itself."""
    if isinstance(failure, _TimedOut):
        return f"sample_max_seconds {max_seconds:g} had passed"
    return f"{type(failure).__name__}: {failure}"


@dataclass
class Samples:
    """What was generated at one step, as far as it came."""

    step: int
    paths: list[Path] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)  # one per image, as in its PNG
    seconds: float = 0.0
    failure: str | None = None  # why not everything was generated

    def __repr__(self) -> str:
        failed = f", failed: {self.failure}" if self.failure else ""
        return f"Samples(step {self.step}, {described(self.images)}, {self.seconds:.1f} s{failed})"

    def _repr_html_(self) -> str:
        """The images with their prompts, as notebooks show them."""
        return html_of(self.images, [f"{first_text(s['prompt'])}, step {self.step}" for s in self.settings])


class Sampler:
    """Samples the images of a `sample:` section from weights in training."""

    def __init__(
        self,
        inference: DiffusionInference,
        sample: RunConfig | Mapping[str, Any],
        *,
        optimizer: Any = None,
        ema: Any = None,
        weights: Mapping[str, Callable[[], AbstractContextManager[Any]]] | None = None,
        modules: Mapping[str, nn.Module] | None = None,
        adopted: Adopted | None = None,
        conditioning: Mapping[str, Any] | Sequence[Any] | None = None,
        embeddings: str | os.PathLike[str] | None = None,
        text_in_training: bool = False,
        autocast: torch.dtype | None = None,
        callbacks: Sequence[Callable[[Samples], object]] = (),
        on_demand: str | os.PathLike[str] | None = None,
        recipe: str | None = None,
        verify: bool = False,
        raise_errors: bool = False,
    ) -> None:
        """Prompts are encoded here, once; afterwards the text encoders can go.

        inference holds the modules in training as they are, wrapped (compiled, DDP, FSDP) or not; sample is a section's
        keys and values (prompts, sample_every, sample_start_step, skip_first_sample, sample_at_end, sample_max_seconds, and
        how to sample), or a whole file by `eridiff.run_files.load_config`, another trainer's too. optimizer is asked for its
        averaged weights if it is schedule-free, and is checked by `verify`. ema, a module, a mapping from the trained network's names
        to tensors, or an object with `shadow_params` in the order of its parameters (diffusers' EMAModel), is sampled beside the
        live weights; weights names further weights to sample, each a function that returns a context manager (an adapter switched
        off, for example); modules are further ones to restore. adopted is the trainer's network of other classes behind the
        inference's (`adopt`); it is followed anew within each kind of weights, and its copies are released after the images;
        None is that of `from_diffusers`. conditioning are embeddings that the trainer has cached, by prompt or in the prompts'
        order, so that no text encoders are needed: a `Prompt`, a `Conditioning`, or tensors in the layouts of diffusers'
        scripts, kohya's or ai-toolkit (docs/training.md). embeddings is a folder that keeps encoded prompts. text_in_training
        encodes anew at each step instead, for each kind of weights.
        autocast is the dtype of autocast while sampling, None samples in the weights' own dtype. Callbacks get `Samples`. Touching
        the file on_demand (None: `now` in the folder of the images) samples at the next step. verify hashes everything
        before and after and raises TrainingError, naming what changed. An error while sampling is logged, or raised
        with raise_errors. recipe is the program that all images are generated as ("kohya", ...), whatever the section says;
        None is the section's. Raises ConfigError for settings that cannot be.
        """
        if not isinstance(inference, DiffusionInference):
            raise ConfigError(
                f"Sampler needs an inference, and this is of class {type(bare(inference)).__name__}: "
                "Sampler(FluxInference.from_diffusers(pipe), section), or SD35Inference, or SDXLInference"
            )
        check_sharding(inference.network)
        if conditioning is not None and (embeddings is not None or text_in_training):
            raise ConfigError("conditioning replaces the text encoders: leave out embeddings and text_in_training")
        check_autocast(autocast)
        if autocast is None:
            check_dtypes(network=inference.network, autoencoder=inference.autoencoder)
        config = sample if isinstance(sample, RunConfig) else parse_config({"sample": plain(dict(sample))})
        if recipe is not None:
            first_sample = config.first_sample and config.first_sample.over({"recipe": recipe})
            config = replace(config, sample=config.sample.over({"recipe": recipe}), first_sample=first_sample)
        if not config.sample.entries:
            raise ConfigError("sample: no prompts are given")
        training = config.training
        if config.sample.lora:
            raise ConfigError(f"sample: lora has no meaning for {type(inference).__name__} in training")
        self.inference, self.optimizer, self.ema = inference, optimizer, ema
        self.modules, self.autocast, self.callbacks = dict(modules or {}), autocast, list(callbacks)
        if adopted is None:
            adopted = next((one for one in inference.adopted if one.network is inference.network), None)
        self.adopted = adopted
        if adopted is not None:
            self.modules["adopted"] = adopted.foreign
            adopted.release()
        self.verify, self.raise_errors, self.text_in_training = verify, raise_errors, text_in_training
        self.out = Path(config.sample.out)
        self.on_demand = os.fspath(self.out / "now" if on_demand is None else on_demand)
        self.every, self.max_seconds, self.at_end = training.sample_every, training.max_seconds, training.at_end
        self.first = self.first_step(self.every, training.start_step, training.skip_first)
        self.last: int | None = None  # the step that was sampled last
        self._look = 0.0  # when to look for the file on_demand
        self._entries: dict[str, Entry] | None = None  # of the folder's images
        self.weights: dict[str, Callable[[], AbstractContextManager[Any]]] = {LIVE: nullcontext, **(weights or {})}
        for name, enter in self.weights.items():
            if not callable(enter) or isinstance(enter, AbstractContextManager):
                raise ConfigError(
                    f"weights[{name!r}] must be a function that gives a context manager, as it is entered for each image anew: "
                    f"lambda: ..., not what it gave, of class {type(enter).__name__}"
                )
        if ema is not None:
            if isinstance(ema, nn.Module) and unwrapped(ema) in (unwrapped(inference.network), self._trained()):
                raise ConfigError(
                    "ema is the network that is trained, so its images would be the live ones: give its EMA weights"
                )
            averages = averages_of(self._trained(), ema)
            self.weights["ema"] = lambda: averaged_weights(self._trained(), averages())
            places_of(self._trained(), averages())  # names and shapes are checked before training begins
        drawer = self._drawer()
        self.requests, notices = requests_of(config.sample, drawer)
        self.prompts: list[Prompt] = []
        self._first = None  # requests and prompts of the first time alone
        first: list[Request] = []
        if config.first_sample is not None:
            first, more = requests_of(config.first_sample, drawer)
            notices += more
        if config.sample.use_lora is not None:
            notices.append("use_lora has no effect in training: the weights are sampled as they are")
        for notice in dict.fromkeys((*config.notices_in_training, *notices)):
            log.warning("%s", notice)
        every = [*self.requests, *first]
        check_words(inference, [unweighted(r.prompt, r.prompt_weights) for r in every])  # type: ignore[arg-type]  # each has one
        self._handed_in = conditioning is not None
        prompts: list[Prompt] = []
        if conditioning is not None:
            idle = [n for n in ENCODING if n not in FOLLOWED and any(request.says(n) for request in every)]
            if idle:
                log.warning("%s: without effect on embeddings that are passed", ", ".join(idle))
            prompts = [on_cpu(p) for p in handed_in_prompts(drawer, conditioning, every)]
        elif not text_in_training:
            with undisturbed(self._modules(), device=inference.device):
                cache = None if embeddings is None else EmbeddingCache(self._drawer(), embeddings)
                prompts = self._encoded(drawer.encode_prompt if cache is None else cache.encode, every)
        self.prompts = prompts[: len(self.requests)]
        if first:
            self._first = first, prompts[len(self.requests) :]

    @staticmethod
    def _encoded(encode: Callable[..., Prompt], requests: Sequence[Request]) -> list[Prompt]:
        """Every prompt with what it is guided away from, alone, as `generate` would."""
        return [on_cpu(encode(r.prompt, r.negative, r.cfg_scale, **r.text())) for r in requests]

    @staticmethod
    def first_step(every: int, start: int, skip_first: bool) -> int:
        """The first multiple of `every` from `start` on, or the one after it."""
        every = max(every, 1)
        return (-(-start // every) + skip_first) * every

    def due(self, step: int) -> bool:
        """Whether a step is one of the plan: a function of its number alone."""
        return self.every > 0 and step >= self.first and step % self.every == 0

    def maybe_sample(self, step: int) -> Samples | None:
        """Generate if the step is due or the file on_demand was touched; None otherwise, in microseconds.

        A step is sampled once, however often it is asked for.
        """
        if step != self.last and (self.due(step) or self._demanded()):
            return self.sample(step)
        return None

    def finish(self, step: int) -> Samples | None:
        """After the last step: sample, unless it was sampled or sample_at_end is false."""
        return self.sample(step) if self.at_end and step != self.last else None

    def _demanded(self) -> bool:
        """Whether the file was touched; looked for once a second, as a network's disk may be slow. It is removed.

        Not of several processes, which would not see it at the same step.
        """
        now = time.monotonic()
        if now < self._look:
            return False
        self._look = now + 1.0
        if ranks()[1] > 1:
            return False
        try:
            os.unlink(self.on_demand)
            return True
        except OSError:
            return False

    def sample(self, step: int) -> Samples:
        """Sample now. The run is afterwards as it was; what was generated before a failure is in the result.

        Raises TrainingError when verify finds a change; whatever went wrong while sampling only with raise_errors.
        """
        self.last, start = step, time.monotonic()
        samples = Samples(step)
        modules, device = self._modules(), self.inference.device
        before = fingerprint(modules, self.optimizer, device) if self.verify else {}
        try:
            with undisturbed(modules, self.optimizer, autocast=self.autocast, device=device):
                self._draw(samples, start)
                for callback in self.callbacks:
                    callback(samples)
        except _TimedOut:
            samples.failure = _reason(_TimedOut(), self.max_seconds)
            log.warning("sampling at step %d stopped: %s; training goes on", step, samples.failure)
            if self.raise_errors:
                raise TrainingError(f"sampling at step {step} stopped: {samples.failure}") from None
        except Exception as error:
            if self.raise_errors:
                raise
            samples.failure = _reason(error, self.max_seconds)
            log.warning("sampling at step %d failed, training goes on", step, exc_info=True)
            traceback.clear_frames(error.__traceback__)  # they hold tensors
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()  # blocks of an image's sizes are of no use to training
        samples.seconds = time.monotonic() - start
        found = changed(before, fingerprint(modules, self.optimizer, device)) if self.verify else []
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise TrainingError(f"sampling at step {step} changed the {found[0]}{more}: {', '.join(found[:8])}")
        return samples

    def draw(self, requests: Sequence[Request | Mapping[str, Any]]) -> list[Result]:
        """Generate these images now, with the live weights; the run is afterwards as it was, and nothing is written.

        - requests: each a `Request`, or the arguments of `generate`. Texts need the text encoders.

        Raises what `generate` raises. Of several processes each has its own; a sharded network they ask together.
        """
        with undisturbed(self._modules(), self.optimizer, autocast=self.autocast, device=self.inference.device):
            try:
                if self.adopted is not None:
                    self.adopted.refresh()
                return list(self._drawer().generate_each(requests))
            finally:
                if self.adopted is not None:
                    self.adopted.release()

    def _drawer(self) -> DiffusionInference:
        """The inference with its modules out of their wrappers."""
        drawer, model = copy.copy(self.inference), self.inference.model
        others = tuple(one for one in model.adopted if one is not self.adopted)  # which is refreshed here
        own = {name: unwrapped(getattr(model, name)) for name in ("network", "autoencoder")}
        drawer.model = replace(model, adopted=others, **own)
        return drawer

    def _trained(self) -> nn.Module:
        """The network whose names EMA weights have: the trainer's own where another class is adopted."""
        return self.adopted.foreign if self.adopted is not None else unwrapped(self.inference.network)

    def _modules(self) -> dict[str, nn.Module]:
        """Everything that sampling may touch, by name."""
        found: dict[str, nn.Module] = {"network": self.inference.network, "autoencoder": self.inference.autoencoder}
        found |= {name: encoder.module for name, encoder in self.inference.model.encoders.items()}
        if self.adopted is not None:  # its tensors are the adopted ones, or come and go
            del found["network"]
        found |= {"ema": self.ema} if isinstance(self.ema, nn.Module) else {}
        return {name: unwrapped(module) for name, module in {**found, **self.modules}.items()}

    def _draw(self, samples: Samples, start: float) -> None:
        """Every image by every kind of weights, one at a time; PNGs, then the page.

        Of several processes each samples its share of the prompts, and the first has all; a sharded network they ask together,
        by the first one's clock, and files are written when none of them needs another any more. What fails on one rank is
        raised on all.
        """
        drawer = self._drawer()
        requests, encoded = (self.requests, self.prompts) if self._first is None else self._first
        self._first = None
        entries = read_entries(self.out) if self._entries is None else self._entries
        self._entries = entries

        (rank, size), together = ranks(), sharded(drawer.network)

        def in_time(step: Step | None = None) -> None:
            late = self.max_seconds is not None and time.monotonic() - start > self.max_seconds
            if self.max_seconds is not None and (agreed(late) if together else late):
                raise _TimedOut

        own = [i for i in range(len(requests)) if together or i % size == rank]
        kept: list[tuple[int, str, Result]] = []  # not yet written
        failure: Exception | None = None

        def write() -> None:
            while kept:
                i, name, result = kept.pop(0)
                self._keep(samples, i, requests[i], name, result.images[0], result.settings[0], entries)

        try:
            for name, enter in self.weights.items():
                entered = enter()
                if not isinstance(entered, AbstractContextManager):
                    raise ConfigError(
                        f"weights[{name!r}] gave no context manager but {entered!r}, so nothing would be restored"
                    )
                with entered:
                    if self.adopted is not None:  # each kind has tensors and adapters of its own
                        self.adopted.refresh()
                    prompts = self._encoded(drawer.encode_prompt, requests) if self.text_in_training else encoded
                    told = [
                        {"prompt": requests[i].encoded(), "conditioning": prompts[i], "callback": in_time}
                        for i in own
                    ]  # fmt: skip
                    for i, result in zip(own, drawer.generate_each(told), strict=True):
                        kept.append((i, name, result))
                        if not together:
                            write()
        except _TimedOut as error:
            failure = error
        except Exception as error:
            if together:  # the others fail alike, or wait where nothing helps: nothing collective from here on
                raise
            failure = error
        finally:
            if self.adopted is not None:
                self.adopted.release()
        try:
            if rank == 0 or not together:
                write()
        except Exception as error:
            failure = error
        said = everyones(None if failure is None else _reason(failure, self.max_seconds))
        for other in [] if together else collected(samples)[1:]:
            samples.paths += other.paths
            samples.images += other.images
            samples.settings += other.settings
            entries |= {
                path.name: Entry(path.name, told) for path, told in zip(other.paths, other.settings, strict=True)
            }
        if samples.paths and rank == 0:
            write_page(self.out, entries)
        if failure is not None:
            raise failure
        elsewhere = next((f"rank {r}: {reason}" for r, reason in enumerate(said) if reason is not None), None)
        if elsewhere is not None:
            raise TrainingError(elsewhere)

    def _keep(
        self, samples: Samples, i: int, request: Request, weights: str, image: Image.Image, drawn: Mapping[str, Any],
        entries: dict[str, Entry],
    ) -> None:  # fmt: skip
        """An image's PNG, with its step and its drift."""
        suffix = "" if weights == LIVE else f"-{weights}"
        name = f"step-{samples.step:08d}-{i:02d}-{slug(request.prompt)}{suffix}.png"
        training: dict[str, Any] = {"step": samples.step, "weights": weights, "entry": i}
        if self.autocast is not None:
            training["autocast"] = str(self.autocast).removeprefix("torch.")
        if self._handed_in:
            training["conditioning"] = "the trainer's"
        # the conditioning is the prompt's own, so the prompt is all that is needed to generate it again
        handed_in = [thing for thing in drawn["handed_in"] if thing != "conditioning"]
        asked = {"prompt": request.prompt, "negative": request.negative, **request.text()}
        settings = {**drawn, **asked, "handed_in": handed_in, "training": training}
        training["drift"] = drift_of(image, Entry(name, settings), entries, self.out)
        path = save_png(image, self.out / name, settings)
        entries[name] = Entry(name, settings)
        samples.paths.append(path)
        samples.images.append(image)
        samples.settings.append(settings)
