"""Where a model's components lie while images are generated: what each placement needs, from headers alone, and which fits."""

import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from eridiff.errors import ConfigError, MemoryPlanError
from eridiff.inference.family import Family
from eridiff.inference.loading import check_parts, dtypes_of, model_name, own_sampling, used
from eridiff.memory.plan import Stage, stages
from eridiff.memory.stages import OFFLOAD
from eridiff.request import LARGEST_SIDE
from eridiff.weights.locate import Parts

log = logging.getLogger(__name__)
UNITS = {None: 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
# Beside the tensors: what CUDA takes for itself and what its allocator cannot use; on a CPU what libraries take on first use
RUNTIME = {"cuda": 600 * 2**20, "cpu": 2 * 2**20}
# a variable and its value, with which glibc's malloc returns what is freed, from blocks of 64 KiB on
MALLOC = ("MALLOC_MMAP_THRESHOLD_", "65536")
LIMITS = {
    "width": LARGEST_SIDE,
    "height": LARGEST_SIDE,
    "images": 10_000,
    "steps": 100_000,
}  # above which nothing is counted
STRIPS = 64  # rows of a strip


@dataclass(frozen=True)
class Placement:
    """Options of `eridiff.load`, and the most bytes that are on the device at once with them."""

    offload: str | None
    vae_rows: int | None
    peak: int
    runtime: int
    kept: int = 0  # on a CPU, what glibc's malloc keeps of what was freed, by its own settings

    @property
    def needed(self) -> int:
        """Bytes in all."""
        return self.peak + self.runtime + self.kept

    @property
    def flags(self) -> str:
        """As the command line has them."""
        words = [*(["--offload", self.offload] if self.offload else []), *(["--vae-rows", str(self.vae_rows)] if self.vae_rows else [])]  # fmt: skip
        return " ".join(words) or "(no option)"


@dataclass(frozen=True)
class Plan:
    """What generating images of one size needs on the device, by stage and by placement."""

    variant: str
    why: str
    width: int
    height: int
    steps: int
    images: int
    guided: bool
    stages: tuple[Stage, ...]
    in_strips: Stage  # the autoencoder's, decoding in strips
    device: str  # cuda or cpu

    @property
    def mapped(self) -> int:
        """Bytes of weights that stay in the mapped file and are not counted: on a CPU those of the file's dtype."""
        return sum(stage.mapped for stage in self.stages)

    @property
    def placements(self) -> list[Placement]:
        """The fastest first. On a CPU components lie where they are computed with."""
        found = []
        for offload in (None, *OFFLOAD) if self.device == "cuda" else (None,):
            for rows in (None, STRIPS):
                own = [self.in_strips if rows and s.component == "vae" else s for s in self.stages]
                work, kept = max(s.work for s in own), 0
                resident = sum(s.held + s.code for s in own) + work
                peak = max(s.peak(offload) for s in own) if offload else resident
                if self.device == "cpu":  # what malloc keeps of one stage is there in the next
                    kept = max(s.heap for s in own) + max(s.large for s in own) - work
                found.append(Placement(offload, rows, peak, RUNTIME[self.device], kept))
        return found

    def placement(self, vram: int | str) -> Placement:
        """The fastest that fits a device with so much memory (bytes, or a text such as "24GiB").

        Raises MemoryPlanError, with what the smallest needs, where none does.
        """
        room = bytes_of(vram)
        for placement in self.placements:
            if placement.needed <= room:
                return placement
        least = min(self.placements, key=lambda p: p.peak)
        largest = max(self.stages, key=lambda s: s.peak(least.offload))
        way = f" with {least.flags}" if least.offload or least.vae_rows else ""
        raise MemoryPlanError(
            f"{self.variant} at {self.width}x{self.height} needs {gib(least.needed)}{way}, most of it for "
            f"{largest.name}, and there are {gib(room)}: ask for a smaller image or a narrower dtype"
        )


class Room:
    """The memory of a device, and the placement of a model that was chosen for it and for the images so far."""

    def __init__(self, vram: int | str, planned: Callable[..., Plan]) -> None:
        """`planned` gives the plan of images of a size; without arguments that of the variant's own size."""
        self.vram, self._planned = vram, cache(planned)
        self.placement = self._planned().placement(vram)
        log.info("with %s of memory: %s", gib(bytes_of(vram)), self.placement.flags)
        self._work: dict[str, int] = {}  # of each component, the most that an image so far needed beside its weights
        self._count(self._planned())

    def place(self, **asked: Any) -> Placement:
        """Where images have room: as the model is placed, or slower; arguments as of `plan_parts`.

        A model that lies on the device stays there, and one that comes to it in parts may come in smaller ones. Raises
        MemoryPlanError for images that do not fit.
        """
        plan, now, room = self._planned(**asked), self.placement, bytes_of(self.vram)
        slower = plan.placements[
            [(p.offload, p.vae_rows) for p in plan.placements].index((now.offload, now.vae_rows)) :
        ]
        able = [p for p in slower if bool(p.offload) == bool(now.offload)]
        fitting = next((p for p in able if p.needed <= room), None)
        if fitting is None:
            least = min(able, key=lambda p: p.needed)
            other = next((f"; loaded with {p.flags} they fit" for p in plan.placements if p.needed <= room), "")
            raise MemoryPlanError(
                f"{plan.images} of {plan.width}x{plan.height} would need {gib(least.needed)} as the model is placed, with "
                f"{least.flags}, and there are {gib(room)}: ask for smaller images or fewer at once{other}"
            )
        if (fitting.offload, fitting.vae_rows) != (now.offload, now.vae_rows):
            log.warning("with %s of memory, from now on: %s", gib(room), fitting.flags)
        self.placement = fitting
        self._count(plan)
        return fitting

    def _count(self, plan: Plan) -> None:
        for stage in plan.stages:
            self._work[stage.component] = max(stage.work, self._work.get(stage.component, 0))

    def weights(self, component: str) -> int:
        """Bytes that a component's weights may take on the device, beside the largest image so far."""
        return bytes_of(self.vram) - self.placement.runtime - self._work[component]


def plan_parts(
    kind: type[Family], parts: Parts, *, width: int | None = None, height: int | None = None, steps: int | None = None,
    images: int = 1, cfg_scale: float | None = None, t5_length: int | None = None, variant: str | None = None,
    dtype: torch.dtype | Mapping[str, torch.dtype] | None = None, device: torch.device | None = None,
    refiner: Parts | None = None,
) -> Plan:  # fmt: skip
    """The plan of a model whose headers were read; what is None is the variant's.

    - images: in one batch.
    - device: where images would be computed, which decides the dtypes and what is counted; None is a GPU.
    - refiner: of an SDXL base, loaded with it; its text encoder and its network are stages too, and the base decodes.

    Raises as `eridiff.load`, and ConfigError for impossible numbers.
    """
    for name, number in (("images", images), ("steps", steps)):
        if number is not None and number < 1:
            raise ConfigError(f"{name} must be a whole number, at least 1, not {number}")
    asked = {"width": width, "height": height, "images": images, "steps": steps}
    for name, high in LIMITS.items():
        if (asked[name] or 0) > high:
            raise ConfigError(f"a plan counts {name} up to {high}, not {asked[name]}")
    if cfg_scale is not None and not math.isfinite(cfg_scale):
        raise ConfigError(f"cfg_scale must be a finite number, not {cfg_scale}")
    check_parts(kind, parts.components)
    own = parts.components[kind.family]
    chosen, why = kind.choose_variant(own.config, model_name(own, parts), variant)
    sampling = own_sampling(own, chosen, kind.variants)
    device = device or torch.device("cuda")
    size: dict[str, Any] = {
        "width": sampling.width if width is None else width, "height": sampling.height if height is None else height,
        "steps": sampling.steps if steps is None else steps, "images": images,
        "guided": (sampling.cfg_scale if cfg_scale is None else cfg_scale) != 1,
    }  # fmt: skip
    where = "cpu" if device.type == "cpu" else "cuda"
    told = {
        **size,
        "cpu": where == "cpu",
        "text_length": t5_length or getattr(sampling, "text_length", 77),
    }
    found = stages(used(kind, parts.components), **told, dtype=dtypes_of(kind, parts.components, device, dtype))
    if refiner is not None:
        components = {n: c for n, c in used(kind, refiner.components).items() if n != "vae"}
        its = stages(components, **told, dtype=dtypes_of(kind, refiner.components, device, dtype))
        found = [*found[:-1], *(replace(stage, name=f"refiner {stage.name}") for stage in its), found[-1]]
    (strip,) = stages({"vae": parts.components["vae"]}, **told, dtype=found[-1].dtype, vae_rows=STRIPS)
    return Plan(chosen, why, **size, stages=tuple(found), in_strips=strip, device=where)


def bytes_of(size: int | str) -> int:
    """Bytes of a size: a number of them, or a text such as "24GiB", "12 GB", "8192MiB". Raises ConfigError."""
    whole = str(size) if type(size) is int else size
    found = (
        re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]+)?)\s*([kmg]i?b)?\s*", whole.lower())
        if isinstance(whole, str)
        else None
    )
    count = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if count < 2**20:  # 24 means 24GiB, which a guess may get wrong
        raise ConfigError(
            f"a size of memory is a text such as 24GiB or 12GB, or bytes, at least 1 MiB, not {size!r}; units are KiB, MiB, GiB, kB, MB, GB"
        )
    return count


def gib(size: int) -> str:
    """Bytes as text, in GiB, or in MiB where there is less than one."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
