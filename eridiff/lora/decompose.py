"""LoRAs from the difference of two networks, and of another rank: the nearest matrices of a rank, by singular values.

Source: Eckart and Young 1936; the kept energy is the share of the squared singular values that the chosen ones have.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from eridiff.errors import LoraError
from eridiff.lora.deltas import Item
from eridiff.lora.load import Lora
from eridiff.lora.names import Target, network_of
from eridiff.precision import full_float32

EXACT_UP_TO = 1024  # rows or columns; larger ones are found by random projection (Halko et al. 2011)


@dataclass(frozen=True)
class Kept:
    """How much of one module's change a rank holds."""

    module: str
    rank: int
    energy: float  # kept share, 0 to 1
    total: float  # squared Frobenius norm of the whole change


def energy(kept: Sequence[Kept]) -> float:
    """The kept share of all changes together."""
    total = sum(entry.total for entry in kept)
    return sum(entry.energy * entry.total for entry in kept) / total if total else 1.0


def nearest(change: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """A change `[o, i(, h, w)]` -> down `[r, i(, h, w)]`, up `[o, r(, 1, 1)]` and the kept energy; r at most `rank`.

    Each gets the root of the singular values, so that neither outgrows a half-precision file.
    """
    matrix = change.flatten(1).float()
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= EXACT_UP_TO:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, vh = _leading(matrix, min(rank + 16, *matrix.shape))
    total = float(matrix.square().sum())
    root = s[:rank].sqrt()
    kernel = change.shape[2:]
    up = (u[:, :rank] * root).reshape(-1, rank, *[1] * len(kernel))
    down = (root[:, None] * vh[:rank]).reshape(rank, change.shape[1], *kernel)
    return down, up, float(s[:rank].square().sum()) / total if total else 1.0


def _leading(matrix: Tensor, rank: int, rounds: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """About the largest `rank` singular values and their vectors (Halko et al. 2011, algorithms 4.4 and 5.1).

    The random start has its own generator on the CPU, so that no generator of the process is touched.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(matrix.shape[1], rank, generator=generator, device="cpu", dtype=torch.float32)
    basis = torch.linalg.qr(matrix @ start.to(matrix.device))[0]
    for _ in range(rounds):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, vh


@torch.no_grad()
def extract_lora(
    tuned: nn.Module, base: nn.Module, rank: int, targets: Sequence[str] = ("*",)
) -> tuple[Lora, list[Kept]]:
    """The LoRA of a rank that is nearest to `tuned - base`, of the linear layers and convolutions that differ.

    `targets` are patterns of native names. Raises LoraError for networks of different sizes or without a difference, and
    when something else differs too (norms, biases, what no target names), which a LoRA would drop.
    """
    if rank < 1:
        raise LoraError(f"rank must be at least 1, not {rank}")
    own, other = base.state_dict(), tuned.state_dict()
    if own.keys() != other.keys() or any(own[n].shape != other[n].shape for n in own):
        raise LoraError("the two networks have different sizes: not one the other's fine-tune")
    layers = {f"{n}.weight": n for n, m in base.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    network, items, kept, dropped = network_of(base), [], [], []
    for name, weight in own.items():
        if torch.equal(weight, other[name]):
            continue
        if name not in layers or not any(fnmatchcase(layers[name], pattern) for pattern in targets):
            dropped.append(name)
            continue
        change = other[name].float() - weight.float()
        with full_float32(change.device):
            down, up, share = nearest(change, rank)
        found = down.shape[0]
        items.append(
            Item(
                layers[name], Target(network, layers[name]), "lora", {"down": down, "up": up}, 1.0, float(found), found
            )
        )
        kept.append(Kept(layers[name], found, share, float(change.square().sum())))
    if dropped and targets == ("*",):
        raise LoraError(
            f"'{dropped[0]}' and {len(dropped) - 1} more differ and no LoRA can hold them; name targets to leave them out"
        )
    if not items:
        raise LoraError("the two networks are equal where a LoRA could change them")
    return Lora(tuple(items)), kept


@torch.no_grad()
def resize_lora(
    lora: Lora, rank: int, shapes: Mapping[str, Mapping[str, tuple[int, ...]]] | None = None
) -> tuple[Lora, list[Kept]]:
    """The same LoRA with at most this rank a module; the scale stays, biases and what is no matrix stay as they are.

    LoRA proper alone; `shapes` (network -> native tensor -> shape) let LoHa and LoKr become one. Raises LoraError for DoRA,
    whose lengths belong to its own directions.
    """
    if rank < 1:
        raise LoraError(f"rank must be at least 1, not {rank}")
    items, kept = [], []
    for item in lora.items:
        if item.dora:
            raise LoraError(
                f"{item.target} is a DoRA, whose lengths fit its own matrices alone; merge and extract instead"
            )
        if item.kind not in ("lora", "loha", "lokr"):
            items.append(item)
            continue
        change = item.delta(torch.zeros(_shape(item, shapes)))
        down, up, share = nearest(change, rank)
        found = down.shape[0]
        rest = {name: item.tensors[name] for name in ("diff_b", "up_bias") if name in item.tensors}
        if "up_bias" in rest:
            rest["up_bias"] = item.ratio * rest["up_bias"].float()  # the new ratio is 1
        dtype = next(t.dtype for t in item.tensors.values())
        matrices = {"down": down.to(dtype), "up": up.to(dtype)}
        items.append(replace(item, kind="lora", tensors=matrices | rest, ratio=1.0, alpha=float(found), rank=found))
        kept.append(Kept(str(item.target), found, share, float(change.square().sum())))
    return replace(lora, items=tuple(items)), kept


def _shape(item: Item, shapes: Mapping[str, Mapping[str, tuple[int, ...]]] | None) -> tuple[int, ...]:
    if shapes is not None and item.target.network in shapes:
        whole = shapes[item.target.network][item.target.name]
        rows = item.target.rows
        return (rows[1] - rows[0], *whole[1:]) if rows else whole
    if item.kind != "lora":
        raise LoraError(f"{item.target} is a {item.kind}: say for which network it is")
    kernel = item.tensors["mid"].shape[2:] if "mid" in item.tensors else item.tensors["down"].shape[2:]
    return (item.tensors["up"].shape[0], item.tensors["down"].shape[1], *kernel)


def table(kept: Sequence[Kept]) -> Iterator[str]:
    """A line a module, the worst first, and the whole."""
    width = max((len(entry.module) for entry in kept), default=0)
    for entry in sorted(kept, key=lambda entry: entry.energy):
        yield f"{entry.module.ljust(width)}  rank {entry.rank:4}  energy {entry.energy:.4f}"
    yield f"{len(kept)} modules, {energy(kept):.2%} of the energy kept"
