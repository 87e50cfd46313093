"""The way from a prompt to a picture that all families share: one loop, one guidance, one noise.

Letters: B pictures, C latent channels, H x W the picture's size in pixels.
"""

import math
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import eridiff
from eridiff.errors import ConfigError, EridiffError
from eridiff.images import to_images, to_tensor
from eridiff.memory.stages import on_device
from eridiff.models.autoencoder import Autoencoder
from eridiff.schedulers import Schedule
from eridiff.schedulers.samplers import euler
from eridiff.text import Conditioning
from eridiff.weights.locate import Model

LATENT_SCALE = 8  # pixels a latent's side, in every autoencoder of the three families
KEEP = ("conditioning", "noise", "latents")


@dataclass(frozen=True)
class Prompt:
    """A prompt, encoded; `negative` None stands for the family's default."""

    positive: Conditioning
    negative: Conditioning | None = None


@dataclass(frozen=True)
class Step:
    """What a callback sees after each step."""

    index: int  # from 0
    count: int  # of the whole schedule; image to image begins later than 0
    sigma: float  # the noise that is left
    latents: Tensor  # [B, C, H / 8, W / 8] float32, not a copy


@dataclass(frozen=True)
class Result:
    """The pictures of one call, and what was asked to be kept of the way to them."""

    images: list[Image.Image]
    settings: list[dict[str, Any]]  # one a picture: everything needed to draw it again
    conditioning: Prompt | None = None
    noise: Tensor | None = None  # [B, C, H / 8, W / 8], as drawn
    latents: Tensor | None = None  # [B, C, H / 8, W / 8], as decoded


Callback = Callable[[Step], object]
Predict = Callable[[Tensor, int], Tensor]


class DiffusionInference(ABC):
    """Draws pictures with one model; families say how prompts are encoded and how the network is asked.

    The modules are public and may be anyone's: hand in those of a training run, or fill them by `load_model`.
    """

    network: nn.Module
    autoencoder: Autoencoder

    def __init__(
        self, *, device: torch.device | str | None = None, offload: str | None = None, progress: bool = True
    ) -> None:
        """`offload="stages"` keeps every component on the CPU and moves it to `device` for its stage alone."""
        if offload not in (None, "stages"):
            raise ConfigError(f"offload must be 'stages' or nothing, not {offload!r}")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.offload, self.progress = offload, progress
        self.source: dict[str, Any] = {}  # which files, for the record

    @abstractmethod
    def load_model(self, model: Model) -> Self:
        """Fill every component from a path, a hub id or the parts by name; returns self."""

    @abstractmethod
    def encode_prompt(self, prompt: str | Sequence[str], negative: str | Sequence[str] | None = None) -> Prompt:
        """Encode one prompt or several; `""` is encoded as it stands, a negative of None is the family's default."""

    @abstractmethod
    def defaults(self) -> Mapping[str, Any]:
        """width, height, steps and whatever else `generate` takes when it is not said."""

    @abstractmethod
    def schedule(self, steps: int, width: int, height: int) -> Schedule:
        """The points of a run."""

    @abstractmethod
    def predictor(
        self, prompt: Prompt, schedule: Schedule, width: int, height: int, guidance_scale: float | None,
        cfg_scale: float, condition: Tensor | None,
    ) -> Predict:  # fmt: skip
        """A function from latents `[B, C, H / 8, W / 8]` and a step to the network's raw output of that shape."""

    def condition(self, image: Tensor | None, mask: Tensor | None, control: Tensor | None) -> Tensor | None:
        """What the network takes beside the latents, from pictures and a mask; None for most."""
        return None

    @property
    def latent_channels(self) -> int:
        return self.autoencoder.config.latent_channels

    @torch.no_grad()
    def denoise(
        self, latents: Tensor, prompt: Prompt, steps: int, *, guidance_scale: float | None = None, cfg_scale: float = 1.0,
        image: Tensor | None = None, strength: float = 1.0, mask: Tensor | None = None, condition: Tensor | None = None,
        callback: Callback | None = None,
    ) -> Tensor:  # fmt: skip
        """Noise -> latents, both `[B, C, H / 8, W / 8]`; float32 between steps whatever the network's dtype.

        `image` (latents) with `strength` in [0, 1] starts from that picture with as much noise; with a `mask`
        `[B, 1, H / 8, W / 8]` only where the mask is 1 is painted, the rest follows the picture. A callback that returns
        something true ends the run there. Raises EridiffError when the network gives values that are not finite.
        """
        height, width = (side * LATENT_SCALE for side in latents.shape[-2:])
        schedule = self.schedule(steps, width, height)
        first = _first_step(schedule.steps, 1.0 if image is None else strength)
        noise = latents.to(self.device, torch.float32)
        x = noise if image is None else _noised(image, noise, schedule, first)
        with self._stage(self.network):
            predict = self.predictor(prompt, schedule, width, height, guidance_scale, cfg_scale, condition)
            for i in tqdm(range(first, schedule.steps), desc="denoising", unit="step", **self._bar):
                output = predict(float(schedule.input_scale[i]) * x, i)
                x = euler(x, output.float(), schedule, i)
                if mask is not None and image is not None:
                    x = mask * x + (1 - mask) * _noised(image, noise, schedule, i + 1)
                if callback and callback(Step(i, schedule.steps, float(schedule.sigmas[i + 1]), x)):
                    break
        return _finite(x, "denoising")

    @torch.no_grad()
    def decode_vae(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, H / 8, W / 8]` -> pictures `[B, 3, H, W]` float32, in [-1, 1]."""
        with self._stage(self.autoencoder):
            pictures = self.autoencoder.decode(latents.to(self.device, _dtype(self.autoencoder)))
        return _finite(pictures.float(), "decoding").clamp(-1, 1)

    @torch.no_grad()
    def encode_vae(self, pictures: Tensor) -> Tensor:
        """Pictures `[B, 3, H, W]` in [-1, 1] -> latents `[B, C, H / 8, W / 8]` float32, the posterior's mean."""
        with self._stage(self.autoencoder):
            latents = self.autoencoder.encode(pictures.to(self.device, _dtype(self.autoencoder)))
        return _finite(latents.float(), "encoding the picture")

    def noise(self, seeds: Sequence[int], width: int, height: int) -> Tensor:
        """`[len(seeds), C, H / 8, W / 8]`: float32 on the CPU, each picture from its own seed.

        So a picture's noise depends neither on its neighbours nor on the device.
        """
        shape = (self.latent_channels, height // LATENT_SCALE, width // LATENT_SCALE)
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def generate(
        self,
        prompt: str | Sequence[str] = "",
        *,
        negative: str | Sequence[str] | None = None,
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        cfg_scale: float = 1.0,
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

        guidance_scale is what the network's guidance embedding is told; cfg_scale other than 1 asks the network twice a
        step and steers away from `negative` (true classifier-free guidance). seed None draws one. image with strength
        begins from a picture, with a mask (white is painted) it fills in; control is the picture that Canny and Depth
        follow. noise and conditioning replace what would be drawn and encoded; keep returns any of "conditioning",
        "noise", "latents". Pictures are PIL images or tensors `[B, 3, H, W]` in [-1, 1], masks `[B, 1, H, W]` in [0, 1].
        Raises ConfigError for settings that are impossible, EridiffError for values that are not finite.
        """
        prompts, seeds = _matched(prompt, seed, conditioning)
        defaults = self.defaults()
        given = next((picture for picture in (image, control) if picture is not None), None)
        width, height = _size(width, height, given, defaults)
        steps = defaults["steps"] if steps is None else steps
        unknown = sorted(set(keep) - set(KEEP))
        if unknown:
            raise ConfigError(f"'{unknown[0]}' cannot be kept; there are {', '.join(KEEP)}")
        check_settings(steps=steps, cfg_scale=cfg_scale, guidance_scale=guidance_scale, strength=strength)
        if (mask is not None or strength is not None) and image is None:
            raise ConfigError("a mask or a strength needs the image that it is for")
        pictures = [None if p is None else to_tensor(p, width, height) for p in (image, control)]
        whole_mask = None if mask is None else to_tensor(mask, width, height, mask=True)

        if conditioning is None:
            conditioning = self.encode_prompt(prompts, "" if negative is None and cfg_scale != 1 else negative)
        if len(conditioning.positive) == 1:
            negatives = conditioning.negative and conditioning.negative.repeat(len(seeds))
            conditioning = Prompt(conditioning.positive.repeat(len(seeds)), negatives)
        condition = self.condition(pictures[0], whole_mask, pictures[1])
        starts_from_image = pictures[0] is not None and condition is None
        noise = self.noise(seeds, width, height) if noise is None else noise
        used_strength = (1.0 if whole_mask is not None else 0.75) if strength is None else strength
        latents = self.denoise(
            noise, conditioning, steps, guidance_scale=guidance_scale, cfg_scale=cfg_scale,
            image=self.encode_vae(pictures[0]) if starts_from_image and pictures[0] is not None else None,
            strength=used_strength, condition=condition, callback=callback,
            mask=_latent_mask(whole_mask, self.device) if starts_from_image else None,
        )  # fmt: skip
        decoded = self.decode_vae(latents).cpu()
        if pictures[0] is not None and whole_mask is not None:
            decoded = whole_mask * decoded + (1 - whole_mask) * pictures[0]
        settings = {
            **self.source, "negative_prompt": negative, "width": width, "height": height, "steps": steps,
            "sampler": "Euler", "guidance_scale": self.guidance(guidance_scale), "cfg_scale": cfg_scale,
            "strength": used_strength if starts_from_image else None, "dtype": str(_dtype(self.network)).removeprefix("torch."),
            "device": self.device.type, "version": eridiff.__version__, "torch": torch.__version__,
        }  # fmt: skip
        each = [{"prompt": p, "seed": s, **settings} for p, s in zip(prompts, seeds, strict=True)]
        kept = {"conditioning": conditioning, "noise": noise, "latents": latents}
        return Result(to_images(decoded), each, **{name: kept[name] for name in keep})  # type: ignore[arg-type]

    def guidance(self, guidance_scale: float | None) -> float | None:
        """What the guidance embedding is told; None where there is none."""
        return None

    def _stage(self, module: nn.Module) -> Any:
        return on_device(module, self.device) if self.offload else nullcontext()

    @property
    def _bar(self) -> dict[str, Any]:
        return {"disable": None if self.progress else True, "leave": False}


def check_settings(*, steps: int, cfg_scale: float, guidance_scale: float | None, strength: float | None) -> None:
    """Raises ConfigError for numbers that no run can have."""
    if steps < 1:
        raise ConfigError(f"a run needs at least one step, not {steps}")
    for name, value, low, high in [
        ("cfg_scale", cfg_scale, 0, 1000), ("guidance_scale", guidance_scale, 0, 1000), ("strength", strength, 0, 1),
    ]:  # fmt: skip
        if value is not None and not low <= value <= high:
            raise ConfigError(f"{name} must be between {low} and {high}, not {value}")


def check_size(width: int, height: int, multiple: int = 16) -> None:
    """Raises ConfigError unless both sides are positive multiples."""
    for name, side in (("width", width), ("height", height)):
        if side < multiple or side % multiple:
            near = max(multiple, round(side / multiple) * multiple)
            raise ConfigError(f"the {name} must be a multiple of {multiple}, not {side}; the nearest is {near}")


def _size(width: int | None, height: int | None, given: Any, defaults: Mapping[str, Any]) -> tuple[int, int]:
    """Said, else the given picture's rounded down to 16, else the default."""
    if given is not None:
        found = (given.shape[-1], given.shape[-2]) if isinstance(given, Tensor) else given.size
        defaults = {"width": max(16, found[0] // 16 * 16), "height": max(16, found[1] // 16 * 16)}
    width = defaults["width"] if width is None else width
    height = defaults["height"] if height is None else height
    check_size(width, height)
    return width, height


def _matched(
    prompt: str | Sequence[str], seed: int | Sequence[int] | None, conditioning: Prompt | None
) -> tuple[list[str], list[int]]:
    """Prompts and seeds of equal number, one of either repeated."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if seed is None:
        seed = secrets.randbits(32)
    seeds = [seed] if isinstance(seed, int) else list(seed)
    wrong = next((s for s in seeds if isinstance(s, bool) or not isinstance(s, int) or not 0 <= s < 2**63), None)
    if not prompts or not seeds or wrong is not None:
        what = (
            "no prompt was given"
            if not prompts
            else "no seed was given"
            if not seeds
            else f"the seed {wrong!r} is no whole number from 0 to 2^63 - 1"
        )
        raise ConfigError(what)
    count = max(len(prompts), len(seeds), len(conditioning.positive) if conditioning else 1)
    if any(n not in (1, count) for n in (len(prompts), len(seeds), len(conditioning.positive) if conditioning else 1)):
        raise ConfigError(f"{len(prompts)} prompts and {len(seeds)} seeds do not match; give as many, or one of either")
    return prompts * (count // len(prompts)), seeds * (count // len(seeds))


def _first_step(steps: int, strength: float) -> int:
    """Where image to image begins: the share `strength` of the steps is run, at least one unless it is 0."""
    return steps - math.ceil(steps * strength)


def _noised(image: Tensor, noise: Tensor, schedule: Schedule, i: int) -> Tensor:
    return float(schedule.alphas[i]) * image + float(schedule.sigmas[i]) * noise


def _latent_mask(mask: Tensor | None, device: torch.device) -> Tensor | None:
    return None if mask is None else F.interpolate(mask, scale_factor=1 / LATENT_SCALE, mode="area").to(device)


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _finite(x: Tensor, stage: str) -> Tensor:
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise EridiffError(
            f"{stage} gave {bad} of {x.numel()} values that are not finite; float16 weights may overflow, try bfloat16 or float32"
        )
    return x
