"""LoRAs from the difference of two networks, and of another rank: the nearest matrices of a rank, by singular values.

Source: Eckart and Young 1936; the kept energy is the share of the squared singular values that the chosen ones have.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from eridiff.errors import LoraError
from eridiff.lora.deltas import FACTORED, Item
from eridiff.lora.load import Lora
from eridiff.lora.names import Target, network_of
from eridiff.precision import full_float32

EXACT_UP_TO = 1024  # rows or columns; larger ones are found by random projection (Halko et al. 2011)


@dataclass(frozen=True)
class Kept:
    """How much of one module's change is held."""

    module: str
    rank: int | None  # None: all of it, as it is; 0: it is left out
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
    tuned: nn.Module | Mapping[str, nn.Module], base: nn.Module | Mapping[str, nn.Module], rank: int,
    targets: Sequence[str] = ("*",),
) -> tuple[Lora, list[Kept]]:  # fmt: skip
    """The LoRA of a rank that is nearest to `tuned - base`; beside the matrices of layers it holds whole what else differs.

    - tuned, base: two networks, or several by kind (`{"unet": ..., "clip": ...}`).
    - targets: patterns of native module names. What differs and no pattern chooses is in the list, with the energy 0.

    Biases and norms are kept as `diff_b` and `diff`. Raises LoraError for networks of different sizes or without a difference.
    """
    if rank < 1:
        raise LoraError(f"rank must be at least 1, not {rank}")
    name = network_of(base) if isinstance(base, nn.Module) else ""
    ones = {name: base} if isinstance(base, nn.Module) else base
    others = {name: tuned} if isinstance(tuned, nn.Module) else tuned
    items: list[Item] = []
    kept: list[Kept] = []
    for network, one in ones.items():
        own = dict(one.named_parameters())
        new = dict(others[network].named_parameters()) if network in others else {}
        if own.keys() != new.keys() or any(own[n].shape != new[n].shape for n in own):
            raise LoraError("the two networks have different sizes: not one the other's fine-tune")
        changes: dict[str, dict[str, Tensor]] = {}  # module -> parameter -> change
        for name, parameter in own.items():
            if not torch.equal(parameter, new[name]):
                module, _, short = name.rpartition(".")
                changes.setdefault(module, {})[short] = new[name].float() - parameter.float()
        for module, found in changes.items():
            total = sum(float(change.square().sum()) for change in found.values())
            if not any(fnmatchcase(module, pattern) for pattern in targets):
                kept.append(Kept(module, 0, 0.0, total))
                continue
            made, share = _extracted(network, module, one.get_submodule(module), found, rank)
            items += made
            kept.append(Kept(module, made[0].rank, share, total))
    if not items:
        raise LoraError("the two networks are equal where a LoRA could change them")
    return Lora(tuple(items)), kept


def _extracted(
    network: str, name: str, module: nn.Module, changes: dict[str, Tensor], rank: int
) -> tuple[list[Item], float]:
    """The items of one module, and the share of its changes that they hold."""
    total = sum(float(change.square().sum()) for change in changes.values())
    weight, bias = changes.pop("weight", None), changes.pop("bias", None)
    tensors: dict[str, Tensor] = {} if bias is None else {"diff_b": bias}
    whole = [Item(f"{name}.{p}", Target(network, name, p), "full", {"diff": d}) for p, d in changes.items()]
    if weight is None or not isinstance(module, nn.Linear | nn.Conv2d):
        tensors |= {} if weight is None else {"diff": weight}
        return [*([Item(name, Target(network, name), "full", tensors)] if tensors else []), *whole], 1.0
    with full_float32(weight.device):
        down, up, share = nearest(weight, rank)
    found = down.shape[0]
    lost = (1 - share) * float(weight.square().sum())
    item = Item(name, Target(network, name), "lora", {"down": down, "up": up, **tensors}, 1.0, float(found), found)
    return [item, *whole], 1 - lost / total


@torch.no_grad()
def resize_lora(
    lora: Lora, rank: int, shapes: Mapping[str, Mapping[str, tuple[int, ...]]] | None = None
) -> tuple[Lora, list[Kept]]:
    """The same LoRA with at most this rank a module; the scale stays, and what is small enough stays as it is, bit for bit.

    LoRA proper alone; `shapes` (network -> native tensor -> shape) let LoHa, LoKr and Tucker cores become one where that takes
    fewer numbers. Raises LoraError for DoRA, whose lengths belong to its own directions.
    """
    if rank < 1:
        raise LoraError(f"rank must be at least 1, not {rank}")
    items, kept = [], []
    for item in lora.items:
        if item.dora:
            raise LoraError(
                f"{item.target} is a DoRA, whose lengths fit its own matrices alone; merge and extract instead"
            )
        new, share, total = item, 1.0, 0.0
        if item.kind == "lora" and "mid" not in item.tensors:
            left, small, right = _gram(item)
            total = float(small.square().sum())
            if (item.rank or 0) > rank:
                down, up, share = nearest(small, rank)
                down = (down @ right).reshape(-1, *item.tensors["down"].shape[1:])
                up = (left @ up).reshape(-1, down.shape[0], *item.tensors["up"].shape[2:])
                new = _resized(item, down, up)
        elif item.kind in FACTORED:
            change = item.delta(torch.zeros(_shape(item, shapes)))
            total = float(change.square().sum())
            down, up, found = nearest(change, rank)
            smaller = _resized(item, down, up)
            if _numbers(smaller) < _numbers(item):
                new, share = smaller, found
        items.append(new)
        if item.kind in FACTORED:
            whole = new is item and (item.kind != "lora" or "mid" in item.tensors)
            kept.append(Kept(str(item.target), None if whole else new.rank, share, total))
    return replace(lora, items=tuple(items)), kept


def _numbers(item: Item) -> int:
    return sum(tensor.numel() for tensor in item.tensors.values())


def _gram(item: Item) -> tuple[Tensor, Tensor, Tensor]:
    """`ratio * up @ down` as a product of an orthonormal `[o, r]`, a small `[r, r]` and an orthonormal `[r, i]`."""
    up, down = item.tensors["up"].flatten(1).float(), item.tensors["down"].flatten(1).float()
    left, a = torch.linalg.qr(up)
    right, b = torch.linalg.qr(down.T)
    return left, item.ratio * (a @ b.T), right.T


def _resized(item: Item, down: Tensor, up: Tensor) -> Item:
    """An item with other matrices, whose ratio is 1."""
    found = down.shape[0]
    rest = {name: item.tensors[name] for name in ("diff_b", "up_bias") if name in item.tensors}
    if "up_bias" in rest:
        rest["up_bias"] = item.ratio * rest["up_bias"].float()
    dtype = next(t.dtype for t in item.tensors.values())
    matrices = {"down": down.contiguous().to(dtype), "up": up.contiguous().to(dtype)}
    return replace(item, kind="lora", tensors={**matrices, **rest}, ratio=1.0, alpha=float(found), rank=found)


def _shape(item: Item, shapes: Mapping[str, Mapping[str, tuple[int, ...]]] | None) -> tuple[int, ...]:
    if shapes is not None and item.target.network in shapes:
        whole = shapes[item.target.network][item.target.name]
        rows = item.target.rows
        return (rows[1] - rows[0], *whole[1:]) if rows else whole
    if item.kind != "lora":
        raise LoraError(f"{item.target} is a {item.kind}: say for which network it is")
    kernel = item.tensors["mid"].shape[2:] if "mid" in item.tensors else item.tensors["down"].shape[2:]
    return (item.tensors["up"].shape[0], item.tensors["down"].shape[1], *kernel)


def energy_table(kept: Sequence[Kept]) -> Iterator[str]:
    """A line a module, the worst first, and the whole."""
    width = max((len(entry.module) for entry in kept), default=0)
    for entry in sorted(kept, key=lambda entry: entry.energy):
        rank = f"rank {entry.rank:4}" if entry.rank else "left out " if entry.rank == 0 else "whole    "
        yield f"{entry.module.ljust(width)}  {rank}  energy {entry.energy:.4f}"
    left = sum(entry.rank == 0 for entry in kept)
    yield f"{len(kept) - left} modules, {left} more are left out, {energy(kept):.2%} of the energy kept"
