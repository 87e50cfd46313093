"""Flux: CLIP-L's pooled state and T5's features, the guidance embedding, and the extra channels of Fill, Canny, Depth."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from eridiff.errors import CheckpointError, ConfigError
from eridiff.inference.base import DiffusionInference, Predict, Prompt, _dtype
from eridiff.models.autoencoder import Autoencoder
from eridiff.models.flux import Flux, FluxConfig, fill_condition, patchify, unpatchify
from eridiff.schedulers import Schedule
from eridiff.schedulers.flow_match import flux_schedule
from eridiff.schedulers.guidance import classifier_free
from eridiff.text import Conditioning
from eridiff.text.encoders import ClipEncoder, T5Encoder, build_encoder
from eridiff.text.tokenizers import clip_tokenizer, t5_tokenizer
from eridiff.weights.detect import DESCRIPTIONS, Component
from eridiff.weights.load import build, default_dtype
from eridiff.weights.locate import PART_NAMES, Model, locate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FluxDefaults:
    """How a published variant is sampled when nothing is said."""

    steps: int = 28
    guidance_scale: float | None = 3.5
    text_length: int = 512  # T5 tokens
    shift: bool = True  # of the schedule, by the number of tokens
    width: int = 1024
    height: int = 1024


VARIANTS = {
    "dev": FluxDefaults(),
    "schnell": FluxDefaults(steps=4, guidance_scale=None, text_length=256, shift=False),
    "fill": FluxDefaults(steps=50, guidance_scale=30.0),
    "canny": FluxDefaults(steps=50, guidance_scale=30.0),
    "depth": FluxDefaults(steps=50, guidance_scale=10.0),
}


def variant_of(config: FluxConfig, name: str = "") -> str:
    """Which published Flux has these sizes; Canny and Depth are equal, so the file's name decides between them."""
    if config.in_channels == config.out_channels * 6:
        return "fill"
    if config.in_channels == config.out_channels * 2:
        return "depth" if "depth" in name.lower() else "canny"
    return "dev" if config.guidance else "schnell"


class FluxInference(DiffusionInference):
    """Draws with any Flux.1: `FluxInference().load_model("flux1-dev/")`, or with modules that are already there."""

    network: Flux

    def __init__(
        self,
        network: Flux | None = None,
        autoencoder: Autoencoder | None = None,
        clip: ClipEncoder | None = None,
        t5: T5Encoder | None = None,
        *,
        variant: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        offload: str | None = None,
        progress: bool = True,
    ) -> None:
        """Modules are used as they are; clip and t5 may be absent when conditionings are handed in.

        variant (dev, schnell, fill, canny, depth) None is told from the network's sizes. dtype None is the file's on a
        GPU and float32 on a CPU with room for it.
        """
        super().__init__(device=device, offload=offload, progress=progress)
        self.dtype, self.clip, self.t5 = dtype, clip, t5
        if network is not None:
            self.network = network
            self._set_variant(variant)
        if autoencoder is not None:
            self.autoencoder = autoencoder

    def _set_variant(self, variant: str | None, name: str = "") -> None:
        self.variant = variant or variant_of(self.network.config, name)
        if self.variant not in VARIANTS:
            raise ConfigError(f"'{self.variant}' is no variant of Flux; there are {', '.join(VARIANTS)}")
        self.sampling = VARIANTS[self.variant]

    def load_model(self, model: Model) -> Self:
        """Fill the network, the autoencoder, both text encoders and their tokenizers; every key is accounted for.

        Raises CheckpointError when a part is missing or damaged, before any weight is read.
        """
        parts = locate(model)
        missing = [network for network in PART_NAMES.values() if network not in parts.components]
        if missing:
            options = [name for name, network in PART_NAMES.items() if network in missing]
            raise CheckpointError(
                f"{' and '.join(DESCRIPTIONS[network] for network in missing)} {'is' if len(missing) == 1 else 'are'} missing: "
                f"the model holds {' and '.join(DESCRIPTIONS[n] for n in parts.components) or 'nothing'}; "
                f"give the rest as {', '.join(options)}"
            )
        flux = parts.components["flux"]
        sampling = _own_sampling(flux)
        tokenizers = (clip_tokenizer(parts.tokenizers.get("clip")), t5_tokenizer(parts.tokenizers.get("t5")))
        home = torch.device("cpu") if self.offload else self.device
        dtypes = {n: self.dtype or default_dtype(c, self.device) for n, c in parts.components.items()}
        network, autoencoder = (
            build(parts.components[n], dtype=dtypes[n], device=home, progress=self.progress) for n in ("flux", "vae")
        )
        assert isinstance(network, Flux) and isinstance(autoencoder, Autoencoder)
        self.network, self.autoencoder = network, autoencoder  #
        self._set_variant(None, str(flux.checkpoint.path))
        self.sampling = replace(self.sampling, **sampling)
        clip, t5 = (
            build_encoder(parts.components[n], dtype=dtypes[n], device=home, progress=self.progress)
            for n in ("clip", "t5")
        )
        self.clip = ClipEncoder(clip, tokenizers[0])
        self.t5 = T5Encoder(t5, tokenizers[1], self.sampling.text_length)
        self.source = {"model": str(flux.checkpoint.path), "family": "flux", "variant": self.variant}
        return self

    def defaults(self) -> Mapping[str, Any]:
        return vars(self.sampling)

    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str], negative: str | Sequence[str] | None = None) -> Prompt:
        """T5's features `[B, T, text_width]` and CLIP-L's pooled state `[B, pooled_width]`; a negative of None is none.

        T is 512, for schnell 256. Words that do not fit are cut, with a warning that names them.
        """
        if self.clip is None or self.t5 is None:
            raise ConfigError("no text encoders are loaded: hand in conditioning, or give clip and t5")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if negative is None:
            return Prompt(self._encode(prompts))
        negatives = [negative] if isinstance(negative, str) else list(negative)
        if len(negatives) not in (1, len(prompts)):
            raise ConfigError(f"{len(negatives)} negative prompts for {len(prompts)} prompts: give as many, or one")
        return Prompt(self._encode(prompts), self._encode(negatives * (len(prompts) // len(negatives))))

    def _encode(self, prompts: list[str]) -> Conditioning:
        assert self.clip is not None and self.t5 is not None
        with self._stage(self.clip.module):
            pooled = self.clip(self.clip.tokenize(prompts)).pooled
        with self._stage(self.t5.module):
            text = self.t5(self.t5.tokenize(prompts))
        return Conditioning(_checked(text, "T5"), _checked(pooled, "CLIP"))

    def schedule(self, steps: int, width: int, height: int) -> Schedule:
        """The original's points, shifted by the number of tokens for all variants but schnell."""
        return flux_schedule(steps, (width // 16) * (height // 16), self.sampling.shift)

    def guidance(self, guidance_scale: float | None) -> float | None:
        if not self.network.config.guidance:
            if guidance_scale is not None:
                log.warning("this Flux has no guidance embedding: guidance_scale %g has no effect", guidance_scale)
            return None
        return self.sampling.guidance_scale if guidance_scale is None else guidance_scale

    def predictor(
        self, prompt: Prompt, schedule: Schedule, width: int, height: int, guidance_scale: float | None,
        cfg_scale: float, condition: Tensor | None,
    ) -> Predict:  # fmt: skip
        """One network call a step; with true CFG, prompt and negative prompt are one batch of twice the size."""
        texts = [prompt.positive]
        if cfg_scale != 1:
            if prompt.negative is None:
                raise ConfigError(f"cfg_scale {cfg_scale:g} needs a negative prompt; an empty one is ''")
            texts.append(prompt.negative)
        dtype, grid, copies = _dtype(self.network), (height // 16, width // 16), len(texts)
        text, pooled = (
            torch.cat(t).to(self.device, dtype) for t in zip(*((c.text, c.pooled) for c in texts), strict=True)
        )
        guidance = self.guidance(guidance_scale) if self.network.config.guidance else None
        strength = None if guidance is None else torch.full((len(text),), guidance, device=self.device)
        times = schedule.times.to(self.device, torch.promote_types(dtype, torch.float32))
        run = self.network.prepare(text, pooled, times, grid, strength)

        def predict(x: Tensor, i: int) -> Tensor:
            tokens = patchify(x)
            if condition is not None:
                tokens = torch.cat([tokens, condition.expand(len(tokens), -1, -1)], dim=-1)
            velocity = self.network.step(tokens.repeat(copies, 1, 1).to(dtype), run, i)
            if copies == 2:
                positive, negative = velocity.float().chunk(2)
                velocity = classifier_free(positive, negative, cfg_scale)
            return unpatchify(velocity, grid)

        return predict

    def condition(self, image: Tensor | None, mask: Tensor | None, control: Tensor | None) -> Tensor | None:
        """Fill: the picture without what shall be painted, and the mask; Canny and Depth: the control picture's latents."""
        if self.variant == "fill":
            if image is None or mask is None:
                raise ConfigError("Flux Fill needs an image and a mask (white is painted)")
            hard = (mask > 0.5).float()
            return fill_condition(self.encode_vae(image * (1 - hard)), hard.to(self.device))
        if self.variant in ("canny", "depth"):
            if control is None:
                raise ConfigError(f"Flux {self.variant.title()} needs a control picture")
            return patchify(self.encode_vae(control))
        if control is not None:
            raise ConfigError(f"Flux {self.variant} takes no control picture; Canny and Depth do")
        return None


def _own_sampling(component: Component) -> dict[str, Any]:
    """What a small file says in its metadata `eridiff.sampling`, in place of the published variant's numbers."""
    try:
        given = json.loads(component.checkpoint.metadata.get("eridiff.sampling", "{}"))
        replace(VARIANTS["dev"], **given)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{component.checkpoint.path}: the metadata eridiff.sampling cannot be used: {error}"
        ) from None
    return given


def _checked(x: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(x).all()):
        raise CheckpointError(
            f"{name} gave values that are not finite; its weights may be damaged or float16, try bfloat16"
        )
    return x
