"""Stable Diffusion 3 and 3.5: CLIP-L, CLIP-G and T5 side by side, classifier-free guidance, skip-layer guidance.

Source: `sd3_infer.py`, `sd3_impls.py` and `other_impls.py` of Stability-AI/sd3.5.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from eridiff.errors import ConfigError
from eridiff.inference.base import DiffusionInference, of_encoder
from eridiff.inference.family import Encoder
from eridiff.inference.latents import beside, dtype_of, finite_features
from eridiff.inference.options import Options
from eridiff.inference.settings import Defaults, spoken
from eridiff.memory.stages import Stages
from eridiff.models.autoencoder import Autoencoder
from eridiff.models.mmdit import MMDiT, MMDiTConfig, MMDiTRun
from eridiff.request import Checked, Text
from eridiff.schedulers import Schedule
from eridiff.schedulers.flow_match import candle_sigmas, diffusers_sigmas, flow_schedule, sd3_sigmas
from eridiff.schedulers.guidance import SkipLayers
from eridiff.schedulers.tables import FLOW_TABLES
from eridiff.text import Conditioning
from eridiff.text.encoders import ClipEncoder, ClipFeatures, T5Encoder

TABLES = {"original": sd3_sigmas, "script": sd3_sigmas, "diffusers": diffusers_sigmas, "candle": candle_sigmas}
TRAINED = 1000  # times of the training


@dataclass(frozen=True)
class SD35Defaults(Defaults):
    """How a published SD 3 is sampled by default: the numbers of the original's script."""

    steps: int = 50
    cfg_scale: float = 5.0
    sampler: str = "dpmpp_2m"
    shift: float = 3.0
    script_shift: float = 3.0  # of the schedule "script"
    skip_layers: SkipLayers | None = None  # published, used when asked for
    text_shortest: int = 77  # T5 tokens of a short prompt
    text_length: int = 256  # T5 tokens at most
    t5_mask: bool = False
    t5_padding: str = "original"
    without_t5: str = "zeros"
    clip_windows: str = "first"


class SD35Inference(DiffusionInference):
    """Generates with any SD 3: `SD35Inference().load_model("sd3.5_medium/")`, or with modules that are already there."""

    family = "mmdit"
    encoders = ("clip", "clip_g", "t5")
    variants: ClassVar[Mapping[str, SD35Defaults]] = {
        "sd3-medium": SD35Defaults(script_shift=1.0),
        "sd3.5-medium": SD35Defaults(skip_layers=SkipLayers((7, 8, 9), scale=2.5, start=0.01, end=0.2)),
        "sd3.5-large": SD35Defaults(steps=40, cfg_scale=4.5),
        "sd3.5-large-turbo": SD35Defaults(steps=4, cfg_scale=1.0, sampler="euler"),
    }
    takes = ("shift", "skip_layers", "t5_padding", "without_t5", "clip_windows")
    network: MMDiT
    clip: ClipEncoder | None = of_encoder("clip")
    clip_g: ClipEncoder | None = of_encoder("clip_g")
    t5: T5Encoder | None = of_encoder("t5")

    def __init__(
        self,
        network: MMDiT | None = None,
        autoencoder: Autoencoder | None = None,
        clip: ClipEncoder | None = None,
        clip_g: ClipEncoder | None = None,
        t5: T5Encoder | None = None,
        **options: Unpack[Options],
    ) -> None:
        """Use these modules as they are, or leave them out and call `load_model`.

        - network, autoencoder: eridiff's modules, those of a training run for example.
        - clip, clip_g, t5: the text encoders; not needed where conditionings are passed in.
        - variant: sd3-medium, sd3.5-medium, sd3.5-large or sd3.5-large-turbo.
        - device, dtype, offload, vae_rows, compile, progress, allow_unknown: as in `eridiff.inference.options.Options`.
        """
        super().__init__(network, autoencoder, {"clip": clip, "clip_g": clip_g, "t5": t5}, **options)

    @staticmethod
    def variants_of_inputs(config: MMDiTConfig) -> list[str]:
        return [*SD35Inference.variants]

    @staticmethod
    def possible_variants(config: MMDiTConfig) -> list[str]:
        if not config.qk_norm:
            return ["sd3-medium"]
        return ["sd3.5-medium"] if config.dual_blocks else ["sd3.5-large", "sd3.5-large-turbo"]

    @staticmethod
    def needed(config: MMDiTConfig) -> tuple[str, ...]:
        return ("clip", "clip_g")

    @staticmethod
    def text_widths(configs: Mapping[str, Mapping[str, Any]]) -> tuple[int | None, int]:
        clip, clip_g = configs["clip"], configs["clip_g"]
        width = configs["t5"]["d_model"] if "t5" in configs else None  # zeros of any width take its place
        return width, clip["hidden_size"] + clip_g["projection_dim"]

    def follow(self, config: Mapping[str, Any]) -> None:
        if isinstance(shift := config.get("shift"), int | float):
            self.model.follow(shift=float(shift))

    @staticmethod
    def text_encoders(
        modules: Mapping[str, nn.Module], tokenizers: Mapping[str, Any], sampling: SD35Defaults
    ) -> dict[str, Encoder]:
        found: dict[str, Encoder] = {
            "clip": ClipEncoder(modules["clip"], tokenizers["clip"]),
            "clip_g": ClipEncoder(modules["clip_g"], tokenizers["clip_g"], pad=0, name="CLIP-G"),
        }
        if "t5" in modules:
            found["t5"] = T5Encoder(modules["t5"], tokenizers["t5"], sampling.text_length)
        return found

    def encoding(self, prompts: Sequence[Text], asked: Checked) -> Stages[Conditioning]:
        """The rows of both CLIPs, then T5's: text `[B, 77 + T, text_width]`, pooled `[B, pooled_width]`.

        With all `clip_windows` 77 rows each. The published networks attend to T5's padding; `t5_mask` hides it, from T5 too.
        """
        if self.clip is None or self.clip_g is None:
            raise ConfigError("no text encoders are loaded: pass conditioning, or give clip and clip_g (and t5)")
        encoders = {"clip": self.clip, "clip_g": self.clip_g}
        names = (*encoders, "t5")
        texts = {name: spoken(prompts, name, names) for name in names}
        count, program = 1, asked.prompt_weights
        if asked.clip_windows == "all":
            count = max(encoder.windows_needed(texts[name], program) for name, encoder in encoders.items())
        features = []
        for name, encoder in encoders.items():
            ids, weights = encoder.weigh(texts[name], program, windows=count, whole_words=True)
            yield encoder.module
            features.append(encoder(ids, weights, program))
        t5, mask = yield from self._t5_rows(texts["t5"], asked)
        told = joined(features[0], features[1], t5, self.network.config.text_width)
        if mask is None:
            return told
        return replace(told, mask=F.pad(mask, (told.text.shape[1] - mask.shape[1], 0), value=True))  # CLIP's are seen

    def _t5_rows(self, texts: list[str], asked: Checked) -> Stages[tuple[Tensor | None, Tensor | None]]:
        """T5's features `[B, T, text_width]` and which rows are to be seen; without T5 zeros, or None for no rows."""
        if self.t5 is None and asked.without_t5 == "none":
            return None, None
        length, program = asked.t5_length, asked.prompt_weights
        shortest = length if asked.t5_padding == "diffusers" else min(self.sampling.text_shortest, length)
        if self.t5 is not None:
            ids, weights = self.t5.weigh(texts, program, shortest, length)
            mask = self.t5.real(ids) if asked.t5_mask else None
            yield self.t5.module
            return finite_features(self.t5(ids, mask, weights, program), "T5"), mask
        width = self.network.config.text_width
        return torch.zeros(len(texts), shortest, width, dtype=torch.float32, device="cpu"), None

    def named_schedule(self, steps: int, width: int, height: int, name: str | None, shift: float | None) -> Schedule:
        """The original's table; "script" with its script's shift (1 for sd3-medium), "diffusers" and "candle" their own.

        Others are as in `schedulers.tables.FLOW_TABLES`.
        """
        if name is not None and name not in {**TABLES, **FLOW_TABLES}:
            raise ConfigError(f"'{name}' is not a schedule of SD 3; there are {', '.join({**TABLES, **FLOW_TABLES})}")
        usual = self.sampling.script_shift if name == "script" else self.sampling.shift
        shift = usual if shift is None else shift
        if name in FLOW_TABLES:
            return flow_schedule(FLOW_TABLES[name](steps, shift, TRAINED))
        return flow_schedule(TABLES[name or "original"](steps, shift))

    def prepare(self, conditioning: Conditioning, negatives: int, times: Tensor, asked: Checked) -> MMDiTRun:
        grid = asked.height // 16, asked.width // 16
        return self.network.prepare(conditioning.text, conditioning.pooled, times, grid, conditioning.mask)

    def step(
        self, latents: Tensor, run: MMDiTRun, i: int, skip_blocks: Collection[int] = (), condition: Tensor | None = None
    ) -> Tensor:
        return self.network.step(latents.to(dtype_of(self.network)), run, i, skip_blocks).float()


def joined(clip: ClipFeatures, clip_g: ClipFeatures, t5: Tensor | None, width: int) -> Conditioning:
    """Both CLIPs' last but one states side by side, zeros up to `width`, then T5's rows; the pooled vectors side by side.

    The states are taken before the final norm. CLIP-L's pooled vector is not projected, but by a projection that its file
    holds (a diffusers folder).
    """
    pair = beside([finite_features(clip.hidden[-2], "CLIP-L"), finite_features(clip_g.hidden[-2], "CLIP-G")], dim=-1)
    rows = F.pad(pair, (0, width - pair.shape[-1]))
    text = rows if t5 is None else beside([rows, t5], dim=1)  # of the wider dtype, if the encoders differ
    return Conditioning(text, beside([clip.projected, clip_g.projected], dim=-1))
