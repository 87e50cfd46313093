"""LoRAs on everything that an inference draws with: the network and its text encoders, by one mechanism."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from eridiff.errors import LoraError
from eridiff.files import tensors_hash
from eridiff.lora.attach import LoraSet, Scale, attach_lora, matches
from eridiff.lora.ledger import Row
from eridiff.lora.load import PARTS, Lora, load_lora
from eridiff.weights.locate import TEXT_ENCODERS

if TYPE_CHECKING:
    from eridiff.inference.base import DiffusionInference


class LoraHandle:
    """A LoRA on an inference: weigh it anew, take it away; as a context it is taken away at the end."""

    def __init__(self, drawer: "DiffusionInference", lora: Lora, sets: tuple[LoraSet, ...]) -> None:
        self._drawer, self.path, self.sets = drawer, lora.path, sets
        self.ledger: tuple[Row, ...] = lora.ledger
        self.scale: Scale | Mapping[str, Scale] | None = None  # None: each request's `lora_scale`
        self._hash: str | None = None
        self._weight: Scale | Mapping[str, Scale] = 1.0
        self._variant: tuple[Any, Any] | None = None  # what the inference was before this LoRA widened the network

    def set_scale(self, scale: Scale | Mapping[str, Scale]) -> "LoraHandle":
        """The weight of all that the LoRA changes, text encoders too: as `LoraSet.set_scale`."""
        self.weigh(scale)
        self.scale = scale
        return self

    def weigh(self, scale: Scale | Mapping[str, Scale]) -> None:
        """As `set_scale`, for the time of a request."""
        if not isinstance(scale, Mapping):
            for lora in self.sets:
                lora.set_scale(scale)
        else:
            rest = dict(scale)
            for lora in self.sets:
                own = {p: value for p, value in scale.items() if any(matches(target, p) for target in lora.targets())}
                if own:
                    lora.set_scale(own)
                rest = {pattern: value for pattern, value in rest.items() if pattern not in own}
            if rest:
                raise LoraError(f"no module of the LoRA matches '{next(iter(rest))}'")
        self._weight = scale

    def detach(self) -> None:
        """Take the LoRA away; the model draws, bit for bit, as before it."""
        drawer = self._drawer
        config = drawer.network.config
        for lora in self.sets:
            lora.detach()
        if self in drawer.loras:
            drawer.loras.remove(self)
            if self._variant is not None and drawer.network.config != config:
                drawer.sample_as(*self._variant)
            for other in drawer.loras:  # another control LoRA keeps the network wide, and will bring it back
                other._variant = other._variant or (self._variant if drawer.network.config == config else None)

    def record(self) -> dict[str, Any]:
        """For a picture's settings."""
        scale = self._weight
        told = {p: _plain(s) for p, s in scale.items()} if isinstance(scale, Mapping) else _plain(scale)
        return {"file": str(self.path) if self.path else None, "scale": told}

    @property
    def hash(self) -> str | None:
        """What the file's tensors are known by, read once; None for a LoRA that is not of one file."""
        if self._hash is None and self.path is not None and os.path.isfile(self.path):
            self._hash = tensors_hash(self.path)
        return self._hash

    def __enter__(self) -> "LoraHandle":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def apply(
    drawer: "DiffusionInference", weights: str | os.PathLike[str] | Lora, scale: Scale | Mapping[str, Scale] | None, *,
    allow_partial: bool = False, part: str | None = None, dora: str = "peft",
) -> LoraHandle:  # fmt: skip
    """Attach a LoRA to an inference's network and text encoders: `DiffusionInference.apply_lora`."""
    modules = modules_of(drawer)
    lora = weights if isinstance(weights, Lora) else load_lora(weights, modules, part=part, allow_partial=allow_partial)
    if part is not None and isinstance(weights, Lora):
        lora = lora.of(*PARTS[part])
    lacking = [name for name in lora.networks if name not in modules]
    if lacking:
        raise LoraError(f"the LoRA changes {lacking[0]}, which is not loaded; choose the rest by lora.of(...)")
    sets: list[LoraSet] = []
    config = drawer.network.config
    try:
        for network in lora.networks:
            sets.append(attach_lora(modules[network], lora.of(network), dora=dora))
        handle = LoraHandle(drawer, lora, tuple(sets))
        if scale is None:
            handle.weigh(1.0)
        else:
            handle.set_scale(scale)
    except LoraError:
        for attached in sets:
            attached.detach()
        raise
    if drawer.network.config != config:  # a control LoRA: the network takes a picture more
        handle._variant = drawer.variant, drawer.sampling
        asked, drawer.asked_variant = drawer.asked_variant, None
        drawer.set_network(drawer.network, Path(lora.path or "").stem)
        drawer.asked_variant = asked
    drawer.loras.append(handle)
    return handle


@contextmanager
def weighed(handles: Sequence[LoraHandle], scale: float | None) -> Iterator[None]:
    """Within the block the LoRAs that have no scale of their own have this one; None leaves them as they are."""
    changed = [] if scale is None else [handle for handle in handles if handle.scale is None]
    try:
        for handle in changed:
            handle.weigh(float(scale or 0))
        yield
    finally:
        for handle in changed:
            handle.weigh(1.0)


def modules_of(drawer: "DiffusionInference") -> dict[str, nn.Module]:
    """The network and the text encoders that are loaded, by kind."""
    encoders = {name: getattr(drawer, name, None) for name in TEXT_ENCODERS}
    return {drawer.family: drawer.network} | {name: e.module for name, e in encoders.items() if e is not None}


def _plain(scale: Scale) -> Any:
    return scale.tolist() if isinstance(scale, Tensor) else scale
