"""First-block cache, lossy: where the first block does nearly what it did before, the others are not computed.

After Wave Speed's ParaAttention, as diffusers' `FirstBlockCacheConfig`: neighbouring steps of a run ask a transformer nearly the
same. The first block is always computed. If what it adds to the image's tokens changed less than a threshold since the last
whole evaluation, what all others added then is added again. The networks know nothing of it.
"""

import math
import statistics
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eridiff.errors import ConfigError
from eridiff.models.flux import Flux
from eridiff.models.layers import wide
from eridiff.models.mmdit import MMDiT
from eridiff.weights.keymap import unwrapped

STREAMS = {  # of each network its lists of blocks in order, and how many streams those blocks take and return
    Flux: {"double_blocks": 2, "single_blocks": 1},
    MMDiT: {"joint_blocks": 2},
}


@dataclass
class Reuse:
    """What a block cache did; all figures are of single calls of the network, of which guidance may make two per step."""

    threshold: float
    evaluations: int = 0
    reused: int = 0
    measured: list[Tensor] = field(default_factory=list)  # scalars, left on the device so that nothing waits for them

    @property
    def errors(self) -> list[float]:
        """How far the cache's output is from the network's, where both are known: `|cache - network| / |network|`, L2.

        That is in each whole evaluation that follows another one, so at changes of at least the threshold; of a batch the row
        that is farthest off.
        """
        return [float(error) for error in self.measured]

    def __str__(self) -> str:
        head = (
            f"block_cache {self.threshold:g}, lossy: {self.reused} of {self.evaluations} evaluations are from the cache"
        )
        if not self.measured:
            return f"{head}; its error is unknown, as no two were computed"
        median, largest = statistics.median(self.errors), max(self.errors)
        return f"{head}; in {len(self.measured)} of the others it would have been off by {median:.1%} (median), {largest:.1%} at most"


@dataclass(frozen=True)
class _Whole:
    """Of the last whole evaluation of some rows, each `[B, N, hidden]` of the image's tokens."""

    run: Any  # kept, so that its id stays its own
    first: Tensor  # what the first block added
    others: Tensor  # what all others added


class BlockCache:
    """The first-block cache of one run of a Flux or an MMDiT: `cache(lambda: network.step(latents, run, i), run)`.

    - threshold: relative change of what the first block adds, the mean of sizes per row and of the row that changed most,
      below which the others are not computed. 0 computes all. Each decision waits for the device once, so that a call cannot
      be captured in a CUDA graph.

    Rows are known by their run, an object of `network.prepare` or of its `rows`: each run, and each choice of skipped blocks,
    has a memory of its own. Use a cache for the rows of one image, or of one batch, alone. Raises ConfigError for a UNet, for a
    network with a single block, for blocks with hooks, and when it is called for a network whose steps are graphs.
    """

    def __init__(self, network: nn.Module, threshold: float) -> None:
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < math.inf:
            raise ConfigError(f"the threshold of a block cache must be a number from 0 on, not {threshold!r}")
        inner = unwrapped(network)
        streams = next((streams for kind, streams in STREAMS.items() if isinstance(inner, kind)), None)
        if streams is None:
            raise ConfigError(f"block_cache is for Flux and SD 3, not for a {type(inner).__name__}")
        self._network, self.reuse = inner, Reuse(threshold)
        self._blocks = [(name, i, block) for name in streams for i, block in enumerate(getattr(inner, name))]
        self._streams = streams
        self._memory: dict[tuple[int, tuple[int, ...]], _Whole] = {}
        if len(self._blocks) < 2:
            raise ConfigError("block_cache needs a network of at least two blocks")
        for name, i, block in self._blocks:
            if block._forward_hooks or block._forward_pre_hooks:
                raise ConfigError(
                    f"block_cache leaves out blocks, and {name}.{i} has hooks that wait for each call, as those of a recording or of "
                    "a sharded network do: use one or the other"
                )

    @torch.no_grad()
    def __call__(self, evaluate: Callable[[], Tensor], run: Any, skip_blocks: Collection[int] = ()) -> Tensor:
        """What `evaluate` returns, which calls the network's `step` once with this run and these skipped blocks: `[B, ...]`."""
        if "step" in vars(self._network):
            raise ConfigError(
                "block_cache decides anew in each step, and graph_steps replays one: remove the graphs before"
            )
        active = [place for place, _ in enumerate(self._blocks) if place not in skip_blocks]
        if len(active) < 2:
            return evaluate()
        key = id(run), tuple(sorted(skip_blocks))
        before = self._memory.get(key)
        one = _Evaluation(before, self.reuse.threshold, (active[0], active[-1]))
        output = self._evaluated(evaluate, one)
        self.reuse.evaluations += 1
        self.reuse.reused += one.reuses
        if one.others is None:
            return output
        self._memory[key] = _Whole(run, one.added, one.others)
        if before is not None:
            # once more with what is known of the first block: the output that the cache would have given
            one.reuses = True
            self.reuse.measured.append(_distance(self._evaluated(evaluate, one), output))
        return output

    def _evaluated(self, evaluate: Callable[[], Tensor], one: "_Evaluation") -> Tensor:
        """With functions in place of the blocks; the network's modules, their names and their parents stay as they are."""
        places = enumerate(self._blocks)
        acting = [(name, partial(one.block, block, self._streams[name], place)) for place, (name, _, block) in places]
        own = vars(self._network)
        try:
            for name in self._streams:  # an attribute of the object's own is found before the module of that name
                own[name] = [act for of, act in acting if of == name]
            return evaluate()
        finally:
            for name in self._streams:
                own.pop(name, None)


class _Evaluation:
    """What takes the blocks' places in one evaluation."""

    def __init__(self, before: _Whole | None, threshold: float, ends: tuple[int, int]) -> None:
        self.before, self.threshold, self.ends = before, threshold, ends
        self.reuses = False
        self.start: Any = None  # the first block's output
        self.added: Any = None  # what it added to the image's tokens
        self.others: Tensor | None = None  # what all others added, if they were computed

    def block(self, block: nn.Module, streams: int, place: int, *given: Any) -> Any:
        """A block's output, image first; one of text and image in one sequence ends with the image."""
        if place == self.ends[0]:
            return self._first(block, streams, *given)
        if not self.reuses:
            output = block(*given)
            if place == self.ends[1]:
                self.others = self._image(output if streams == 1 else output[0]) - self._first_image()
            return output
        if place == self.ends[1] and self.before is not None:
            image = self._image(given[0]) + self.before.others
            text = given[0][:, : given[0].shape[1] - image.shape[1]]
            given = (torch.cat([text, image], dim=1) if text.shape[1] else image, *given[1:])
        return given[0] if streams == 1 else given[:streams]

    def _first(self, block: nn.Module, streams: int, *given: Any) -> Any:
        if self.start is None:
            self.start = block(*given)
            self.added = self._first_image() - given[0]
            if self.before is not None:
                self.reuses = float(_change(self.added, self.before.first)) < self.threshold  # waits for the device
        return self.start

    def _first_image(self) -> Tensor:
        return self.start if isinstance(self.start, Tensor) else self.start[0]

    def _image(self, tokens: Tensor) -> Tensor:
        return tokens[:, tokens.shape[1] - self._first_image().shape[1] :]


def _change(new: Tensor, old: Tensor) -> Tensor:
    """The mean size of a row's change, relative to what it was; of the row with the largest. `[B, N, hidden]` -> scalar.

    Not a number, which is below no threshold, where nothing can be said.
    """
    sizes = [t.abs().mean(dim=(1, 2), dtype=wide(t.dtype)) for t in (new - old, old)]
    return (sizes[0] / sizes[1]).max()


def _distance(found: Tensor, expected: Tensor) -> Tensor:
    """Relative L2 distance of the row that is farthest off."""
    found, expected = (t.flatten(1).to(wide(t.dtype)) for t in (found, expected))
    return (torch.linalg.vector_norm(found - expected, dim=1) / torch.linalg.vector_norm(expected, dim=1)).max()
