"""Flux: CLIP-L's pooled state and T5's features, the guidance embedding, and the extra channels of Fill, Canny, Depth."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from eridiff.errors import ConfigError
from eridiff.images import to_tensor
from eridiff.inference.base import DiffusionInference, of_encoder
from eridiff.inference.family import Encoder
from eridiff.inference.latents import as_told, dtype_of, finite_features
from eridiff.inference.options import Options
from eridiff.inference.settings import Defaults, spoken
from eridiff.memory.stages import Stages
from eridiff.models.autoencoder import Autoencoder
from eridiff.models.flux import Flux, FluxConfig, FluxRun, fill_condition, patchify, position_ids, unpatchify
from eridiff.request import Checked, Table, Text, check_side
from eridiff.schedulers import Schedule
from eridiff.schedulers.flow_match import flow_schedule, flux_schedule, flux_scheduler_schedule
from eridiff.schedulers.tables import FLOW_TABLES
from eridiff.text import Conditioning
from eridiff.text.encoders import ClipEncoder, T5Encoder

# width and height that Kontext was trained with (black-forest-labs/flux, src/flux/util.py)
WIDE = [(1568, 672), (1504, 688), (1456, 720), (1392, 752), (1328, 800), (1248, 832), (1184, 880), (1104, 944)]
KONTEXT_SIZES = [*WIDE, (1024, 1024), *((height, width) for width, height in WIDE)]
SHIFTED = {  # schedules, and whether the size shifts them; None is as for the variant
    "original": None, "dev": True, "schnell": False, "diffusers": None,
}  # fmt: skip
COMFY_SHIFT, COMFY_TIMES = math.exp(1.15), 10000  # of ComfyUI's ModelSamplingFlux, at every size


@dataclass(frozen=True)
class FluxDefaults(Defaults):
    """How a published Flux is sampled by default."""

    guidance_scale: float | None = 3.5
    text_length: int = 512  # T5 tokens
    t5_mask: bool = False
    shift: bool = True  # of the schedule, by the number of tokens


class FluxInference(DiffusionInference):
    """Generates with any Flux.1: `FluxInference().load_model("flux1-dev/")`, or with modules that are already there."""

    family = "flux"
    encoders = ("clip", "t5")
    variants: ClassVar[Mapping[str, FluxDefaults]] = {
        "dev": FluxDefaults(),
        "schnell": FluxDefaults(steps=4, guidance_scale=None, text_length=256, shift=False),
        "fill": FluxDefaults(steps=50, guidance_scale=30.0),
        "canny": FluxDefaults(steps=50, guidance_scale=30.0),
        "depth": FluxDefaults(steps=50, guidance_scale=10.0),
        "kontext": FluxDefaults(guidance_scale=2.5),
    }
    network: Flux
    clip: ClipEncoder | None = of_encoder("clip")
    t5: T5Encoder | None = of_encoder("t5")

    def __init__(
        self,
        network: Flux | None = None,
        autoencoder: Autoencoder | None = None,
        clip: ClipEncoder | None = None,
        t5: T5Encoder | None = None,
        **options: Unpack[Options],
    ) -> None:
        """Use these modules as they are, or leave them out and call `load_model`.

        - network, autoencoder: eridiff's modules, those of a training run for example.
        - clip, t5: the text encoders; not needed where conditionings are passed in.
        - variant: dev, schnell, fill, canny or depth.
        - device, dtype, offload, vae_rows, compile, progress, allow_unknown: as in `eridiff.inference.options.Options`.
        """
        super().__init__(network, autoencoder, {"clip": clip, "t5": t5}, **options)

    @property
    def takes(self) -> Collection[str]:  # type: ignore[override]
        follows = "canny" in self.variants_of_inputs(self.network.config)
        own = ("noise_layout", "guidance_dtype") if self.guidance_embedding else ("noise_layout",)
        return (*own, *(["control"] if follows else ["references"] if self.variant == "kontext" else []))

    def shifts(self, table: Table | None) -> bool:
        return isinstance(table, str) and table in FLOW_TABLES

    @property
    def inpaints(self) -> bool:  # type: ignore[override]
        return self.variants_of_inputs(self.network.config) == ["fill"]

    @staticmethod
    def variants_of_inputs(config: FluxConfig) -> list[str]:
        found = {6: ["fill"], 2: ["canny", "depth"]}
        return found.get(config.in_channels // config.out_channels, ["dev", "kontext", "schnell"])

    @staticmethod
    def possible_variants(config: FluxConfig) -> list[str]:
        found = FluxInference.variants_of_inputs(config)
        return found if "dev" not in found else ["dev", "kontext"] if config.guidance else ["schnell"]

    @staticmethod
    def channels_drawn(config: FluxConfig) -> int:
        """A token holds 2 x 2 latents."""
        return config.out_channels // 4

    @staticmethod
    def needed(config: FluxConfig) -> tuple[str, ...]:
        return ("clip", "t5")

    @staticmethod
    def text_widths(configs: Mapping[str, Mapping[str, Any]]) -> tuple[int, int]:
        return configs["t5"]["d_model"], configs["clip"]["hidden_size"]

    @staticmethod
    def text_encoders(
        modules: Mapping[str, nn.Module], tokenizers: Mapping[str, Any], sampling: FluxDefaults
    ) -> dict[str, Encoder]:
        clip = ClipEncoder(modules["clip"], tokenizers["clip"])
        return {"clip": clip, "t5": T5Encoder(modules["t5"], tokenizers["t5"], sampling.text_length)}

    def encoding(self, prompts: Sequence[Text], asked: Checked) -> Stages[Conditioning]:
        """T5's features `[B, t5_length, text_width]` and CLIP-L's pooled state `[B, pooled_width]`.

        The published networks attend to T5's padding; `t5_mask` hides it, from T5 itself too.
        """
        if self.clip is None or self.t5 is None:
            raise ConfigError("no text encoders are loaded: pass conditioning, or give clip and t5")
        program = asked.prompt_weights
        clip_ids, _ = self.clip.weigh(spoken(prompts, "clip", ("clip", "t5")), program)
        ids, weights = self.t5.weigh(spoken(prompts, "t5", ("clip", "t5")), program, length=asked.t5_length)
        mask = self.t5.real(ids) if asked.t5_mask else None
        yield self.clip.module
        pooled = self.clip(clip_ids).pooled
        yield self.t5.module
        text = self.t5(ids, mask, weights, program)
        return Conditioning(finite_features(text, "T5"), finite_features(pooled, "CLIP"), mask)

    def named_schedule(self, steps: int, width: int, height: int, name: str | None, shift: float | None) -> Schedule:
        """The original's points, shifted by the number of tokens for all variants but schnell; "dev" and "schnell" for any.

        "diffusers" are the points that diffusers' scheduler makes of a number of steps by itself, as OneTrainer asks it.

        Others are as in `schedulers.tables.FLOW_TABLES`, with a shift that does not follow the size.
        """
        if name in FLOW_TABLES:
            sigmas = FLOW_TABLES[name](steps, COMFY_SHIFT if shift is None else shift, COMFY_TIMES)
            return flow_schedule(sigmas)
        if name not in (None, *SHIFTED) or shift is not None:
            wrong = f"'{name}' is not a schedule of Flux" if name not in (None, *SHIFTED) else "Flux takes no shift"
            raise ConfigError(
                f"{wrong}: it has {', '.join(SHIFTED)}, whose shift follows from the size, and {', '.join(FLOW_TABLES)}; or pass sigmas"
            )
        by_size = SHIFTED[name or "original"]
        points = flux_scheduler_schedule if name == "diffusers" else flux_schedule
        return points(steps, (width // 16) * (height // 16), self.sampling.shift if by_size is None else by_size)

    def prepare(self, conditioning: Conditioning, negatives: int, times: Tensor, asked: Checked) -> FluxRun:
        scale = asked.guidance_scale
        told = None
        if scale is not None:
            scales = torch.full((len(conditioning),), scale, dtype=torch.float32, device=self.device)
            told = as_told(scales, asked.guidance_dtype)
        grids = [(asked.height // 16, asked.width // 16)]
        grids += [(picture.shape[2] // 16, picture.shape[3] // 16) for picture in asked.references or ()]
        ids = torch.cat([position_ids(grid, index) for index, grid in enumerate(grids)]) if asked.references else None
        return self.network.prepare(
            conditioning.text, conditioning.pooled, times, grids[0], told, ids=ids, mask=conditioning.mask
        )

    def step(
        self, latents: Tensor, run: FluxRun, i: int, skip_blocks: Collection[int] = (), condition: Tensor | None = None
    ) -> Tensor:
        tokens = patchify(latents)
        count = tokens.shape[1]
        if condition is not None:  # channels beside each token, or further tokens
            further = "references" in self.takes
            tokens = torch.cat([tokens, condition.repeat(len(tokens) // len(condition), 1, 1)], dim=1 if further else 2)
        velocity = self.network.step(tokens.to(dtype_of(self.network)), run, i)[:, :count]
        return unpatchify(velocity.float(), (latents.shape[2] // 2, latents.shape[3] // 2))

    def referred(self, references: Sequence[Any]) -> list[Tensor]:
        """Images resized to the nearest of Kontext's sizes by their aspect; tensors as they are."""
        found = []
        for picture in references:
            size = (picture.shape[-1], picture.shape[-2]) if isinstance(picture, Tensor) else picture.size
            nearest = min(KONTEXT_SIZES, key=lambda s: (abs(size[0] / size[1] - s[0] / s[1]), s))
            width, height = size if isinstance(picture, Tensor) else nearest
            check_side("width of a reference", width, 16)
            check_side("height of a reference", height, 16)
            found.append(to_tensor(picture, width, height))
        return found

    def condition(
        self, image: Tensor | None, mask: Tensor | None, control: Tensor | None, references: Sequence[Tensor] = ()
    ) -> Tensor | None:
        """Fill: the image without what must be painted, and the mask; Canny and Depth: the control image's latents.

        Kontext: the tokens of its references, `[B, M, 64]`, behind each other.
        """
        if references:
            return torch.cat([patchify(self.encode_vae(picture)) for picture in references], dim=1)
        if self.inpaints:
            if image is None or mask is None:
                raise ConfigError("Flux Fill needs an image and a mask (white is painted)")
            hard = (mask > 0.5).float()
            latents = self.encode_vae(image * (1 - hard))
            return fill_condition(latents, hard.to(latents.device))
        if "control" in self.takes:
            if control is None:
                raise ConfigError(f"Flux {self.variant.title()} needs a control image")
            return patchify(self.encode_vae(control))
        return None
