"""LoRAs on everything that an image is generated with: the network and its text encoders, by one mechanism."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from eridiff.errors import LoraError
from eridiff.files import tensors_hash
from eridiff.lora.attach import LoraSet, Scale, attach_lora, matches
from eridiff.lora.ledger import Row
from eridiff.lora.load import PARTS, Lora, load_lora
from eridiff.lora.merge import MergedModule, merge_into


class LoraHandle:
    """A LoRA on a model: weigh it anew, take it away; as a context it is taken away at the end."""

    def __init__(
        self, lora: Lora, sets: tuple[LoraSet, ...], taken_away: Callable[["LoraHandle"], None] | None = None
    ) -> None:
        """`taken_away` is called when the LoRA is taken away."""
        self.path, self.sets, self._taken_away = lora.path, sets, taken_away
        self.ledger: tuple[Row, ...] = lora.ledger
        self.scale: Scale | Mapping[str, Scale] | None = None  # None: each request's `lora_scale`
        self._hash: str | None = None
        self._merged: list[MergedModule] = []
        self._weight: Scale | Mapping[str, Scale] = 1.0

    def set_scale(self, scale: Scale | Mapping[str, Scale]) -> "LoraHandle":
        """The weight of all that the LoRA changes, text encoders too: as `LoraSet.set_scale`."""
        self.weigh(scale)
        self.scale = scale
        return self

    def weigh(self, scale: Scale | Mapping[str, Scale]) -> None:
        """As `set_scale`, for the time of a request."""
        if self._merged:
            raise LoraError("the LoRA is merged at one scale: detach it, and apply it again")
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

    def merge(self) -> "LoraHandle":
        """Put the LoRA into the weights at its scale, so that it takes no time; `detach` brings the weights back, bit for bit.

        Computed in float32, rounded once to the weights' dtype. Raises LoraError, having changed nothing, for a scale of rows or
        by module and for a LoRA that enlarges a layer.
        """
        if isinstance(self._weight, Mapping) or self.weighs_rows:
            raise LoraError("a LoRA is merged at one scale for all that it changes: give it one by set_scale")
        try:
            for lora in self.sets:
                lora.detach()
                self._merged.append(merge_into(lora.network, lora.lora(), float(self._weight), dora=lora.dora))
        except LoraError:
            self._restore()
            for lora in self.sets:
                lora.attach()
            raise
        self.scale = self._weight
        return self

    def _restore(self) -> None:
        while self._merged:
            self._merged[-1].restore()
            self._merged.pop()

    def detach(self) -> None:
        """Take the LoRA away; the model generates, bit for bit, as before it."""
        self._restore()
        for lora in self.sets:
            lora.detach()
        if self._taken_away is not None:
            self._taken_away(self)

    @property
    def weighs_rows(self) -> bool:
        """Whether rows of a batch have scales of their own."""
        scales = self._weight.values() if isinstance(self._weight, Mapping) else [self._weight]
        return any(isinstance(scale, Tensor) and scale.ndim > 0 for scale in scales)

    def record(self) -> dict[str, Any]:
        """For an image's settings."""
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


def attached(
    modules: Mapping[str, nn.Module], weights: str | os.PathLike[str] | Lora, scale: Scale | Mapping[str, Scale] | None, *,
    allow_partial: bool = False, part: str | None = None, dora: str = "peft",
    taken_away: Callable[[LoraHandle], None] | None = None,
) -> LoraHandle:  # fmt: skip
    """A LoRA on a network and its text encoders, by component; arguments as of `DiffusionInference.apply_lora`."""
    lora = weights if isinstance(weights, Lora) else load_lora(weights, modules, part=part, allow_partial=allow_partial)
    if part is not None and isinstance(weights, Lora):
        lora = lora.of(*PARTS[part])
    lacking = [name for name in lora.networks if name not in modules]
    if lacking:
        raise LoraError(f"the LoRA changes {lacking[0]}, which is not loaded; choose the rest by lora.of(...)")
    sets: list[LoraSet] = []
    try:
        for network in lora.networks:
            sets.append(attach_lora(modules[network], lora.of(network), dora=dora))
        handle = LoraHandle(lora, tuple(sets), taken_away)
        if scale is None:
            handle.weigh(1.0)
        else:
            handle.set_scale(scale)
    except LoraError:
        for one in sets:
            one.detach()
        raise
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


def _plain(scale: Scale) -> Any:
    return scale.tolist() if isinstance(scale, Tensor) else scale
