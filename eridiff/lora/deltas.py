"""What each kind of adapter makes of a weight W: `W' = W + scale * ratio * delta`, and the few kinds that are not of that form.

Sources: Hu et al. 2021 (LoRA); Hyeon-Woo et al. 2021 (LoHa) and Edalati et al. 2022 (LoKr) as in LyCORIS (Yeh et al.
2023); Liu et al. 2022 ((IA)3); Liu et al. 2024 (DoRA). Letters: o outputs, i inputs, r rank, h x w a kernel.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from eridiff.errors import LoraError
from eridiff.lora.names import Target

DORA_RULES = ("peft", "interpolate")
FACTORED = ("lora", "loha", "lokr")
NO_SCALE = ("magnitude", "dora_scale")  # tensors that are not part of the delta


@dataclass(frozen=True)
class Item:
    """What a file does to one module: tensors as stored, rows in the file's order."""

    key: str  # the module's name in the file
    target: Target
    kind: str  # of KINDS
    tensors: Mapping[str, Tensor] = field(repr=False)
    ratio: float = 1.0  # alpha / rank, or what the format has in its place
    alpha: float | None = None
    rank: int | None = None

    @property
    def changes_bias(self) -> bool:
        return not self.tensors.keys().isdisjoint({"up_bias", "diff_b", "b_norm"})

    @property
    def changes_weight(self) -> bool:
        return not self.tensors.keys() <= {"diff_b", "b_norm"}

    @property
    def dora(self) -> bool:
        return not self.tensors.keys().isdisjoint(NO_SCALE)

    @property
    def dead(self) -> bool:
        """Whether it changes nothing, since what it adds, or a factor of that, is zero."""
        if self.kind == "set" or self.dora:
            return False
        zero = {name: not bool(tensor.any()) for name, tensor in self.tensors.items()}
        added = {"diff", "diff_b", "w_norm", "b_norm", "multiplier", "up_bias"}
        factors = [idle for name, idle in zero.items() if name not in added]
        idle = all(zero[name] for name in added & zero.keys())
        return idle and (self.kind not in FACTORED or any(factors))

    def change(self, base: Tensor, scale: float | Tensor = 1.0, dora: str = "peft") -> Tensor:
        """W' - W for rows of W in the file's order, in W's shape, dtype and device.

        DoRA has two rules for a scale s that is not 1: "peft" puts it inside the norm, so that s = 0 is not W;
        "interpolate" is s (W'(1) - W). A `set` replaces W, whatever the scale.
        """
        if self.kind == "set":
            return self.delta(base)
        if not self.dora:
            return times(scale, self.delta(base))
        if dora == "peft":
            return self._directed(base, scale) - base
        return scale * (self._directed(base, 1.0) - base)

    def _directed(self, base: Tensor, scale: float | Tensor) -> Tensor:
        """With DoRA the rows, or the columns, of W + scale * delta get the lengths that the file says."""
        moved = base + scale * self.delta(base)
        axis, magnitude = 0, self.tensors.get("magnitude")
        if magnitude is None:  # dora_scale: [o, 1], or [1, i] in LyCORIS' older files and OneTrainer's
            magnitude = self.tensors["dora_scale"]
            axis = 0 if magnitude.shape[0] == base.shape[0] and magnitude.shape[1] == 1 else 1
        shape = [-1 if d == axis else 1 for d in range(base.ndim)]
        length = moved.transpose(0, axis).flatten(1).norm(dim=1)
        return moved * (magnitude.to(base).flatten() / length).reshape(shape)

    def delta(self, base: Tensor) -> Tensor:
        """What is added to W at scale 1, in W's shape, dtype and device; without DoRA's change of lengths."""
        tensors = {name: tensor.to(base) for name, tensor in self.tensors.items()}
        return times(self.ratio, _fitted(KINDS[self.kind].delta(tensors, base), base))

    def bias_delta(self, base: Tensor) -> Tensor:
        """What is added to the bias at scale 1."""
        delta = torch.zeros_like(base)
        for name, tensor in self.tensors.items():
            if name in ("up_bias", "diff_b", "b_norm"):
                delta = delta + (self.ratio if name == "up_bias" else 1.0) * tensor.to(base).reshape(base.shape)
        return delta


def times(factor: float | Tensor, tensor: Tensor) -> Tensor:
    """A product; of 1 no second tensor, as a weight may take hundreds of megabytes."""
    return tensor if isinstance(factor, float) and factor == 1 else factor * tensor


def _fitted(delta: Tensor, base: Tensor) -> Tensor:
    """A change in the shape of W, with zeros for the inputs behind those that it knows: a first layer may be wider."""
    if delta.numel() == base.numel():
        return delta.reshape(base.shape)
    delta = delta.reshape(base.shape[0], -1, *base.shape[2:])
    lacking = base.shape[1] - delta.shape[1]
    return torch.cat([delta, delta.new_zeros(delta.shape[0], lacking, *delta.shape[2:])], dim=1)


def columns(item: Item) -> int | None:
    """How many inputs of a linear layer a factored change knows; None for all that there are."""
    t = item.tensors
    if "down" in t:
        return t["down"].shape[1]
    return _product(item.kind, t)[1] if item.kind in FACTORED else None


def widened(base: Tensor, item: Item) -> Tensor:
    """The first layer's weight with as many columns as a control LoRA has, the new ones zero; others stay."""
    down = item.tensors.get("down")
    if down is None or item.target.parameter != "weight" or down.ndim != 2 or base.ndim != 2:
        return base
    missing = down.shape[1] - base.shape[1]
    return torch.cat([base, base.new_zeros(base.shape[0], missing)], dim=1) if missing > 0 else base


# the kinds: what a module consists of, what its tensors must look like, what they add to a weight -----------------------------

Tensors = Mapping[str, Tensor]  # by role: what a tensor is
# whether it is met, the role of the tensor that it is for ("": all together), what is needed
Demand = tuple[bool, str, str]


@dataclass(frozen=True)
class Kind:
    """One kind of adapter."""

    needed: tuple[tuple[str, ...], ...]  # roles of tensors, of each group at least one
    own: tuple[str, ...] = ()  # further roles that no other kind has
    shared: tuple[str, ...] = ()  # and those that others have too
    # in W's dtype, W -> what is added
    delta: Callable[[Tensors, Tensor], Tensor] = lambda t, base: torch.zeros_like(base)
    demands: Callable[[Tensors, tuple[int, ...]], Iterable[Demand]] = lambda t, shape: ()  # of W's shape

    @property
    def marks(self) -> set[str]:
        """The roles that tell the kind."""
        return {role for group in self.needed for role in group} | set(self.own)


def kind_of(roles: Set[str]) -> str:
    """The first kind that a module with these roles may be; "" if there is none."""
    return next((name for name, kind in KINDS.items() if kind.marks & roles), "")


def low_rank(down: Tensor, up: Tensor, mid: Tensor | None = None) -> Tensor:
    """up [o, r(, 1, 1)] and down [r, i(, h, w)] -> [o, i(, h, w)]; with a Tucker core mid [r, r, h, w] down is [r, i(, 1, 1)]."""
    if mid is not None:
        return torch.einsum("oa,abhw,bi->oihw", up.flatten(1), mid, down.flatten(1))
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _low_rank_demands(t: Tensors, shape: tuple[int, ...]) -> Iterator[Demand]:
    down, up, mid = t["down"], t["up"], t.get("mid")
    yield mid is None or len(shape) == 4, "mid", "no Tucker core, as it is not a convolution"
    same_rank = min(down.ndim, up.ndim) > 1 and down.shape[0] == up.shape[1]
    yield same_rank, "up", f"as many columns as the other matrix, {list(down.shape)}, has rows: the ranks disagree"
    yield up.shape[0] == shape[0] and up[0, 0].numel() == 1, "up", f"{shape[0]} rows"
    kernel = math.prod(shape[2:]) if mid is None else 1
    wanted = f"{shape[1]} columns" + (f" and a kernel of {kernel}" if kernel > 1 else "")
    yield down.shape[1] == shape[1] and down[0, 0].numel() == kernel, "down", wanted
    if mid is not None:
        yield tuple(mid.shape) == (down.shape[0], up.shape[1], *shape[2:]), "mid", "a core of its kernel"


def _hadamard(t: Tensors, base: Tensor) -> Tensor:
    first, second = (_factor(t, "hada", n) for n in (1, 2))
    if first.shape != second.shape:  # which a product would spread
        raise ValueError("the factors disagree")
    return first * second


def _factor(t: Tensors, family: str, n: int) -> Tensor:
    """A factor of LoHa or LoKr: whole, a product, or one with a Tucker core."""
    name, core = f"{family}_w{n}", t.get(f"{family}_t{n}")
    if name in t:
        return t[name]
    a, b = t[f"{name}_a"], t[f"{name}_b"]
    return a @ b if core is None else _tucker(core, a, b)


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """core [r, r, h, w], a [r, o], b [r, i] -> [o, i, h, w]; einsum alone would spread a rank of 1."""
    if core.shape[:2] != (a.shape[0], b.shape[0]):
        raise ValueError("the ranks disagree")
    return torch.einsum("abhw,ao,bi->oihw", core, a, b)


def kronecker_factors(t: Tensors) -> tuple[Tensor, Tensor]:
    """The two factors of LoKr, [p, q] and [o / p, i / q(, h, w)], each whole or of low rank."""
    return _factor(t, "lokr", 1), _factor(t, "lokr", 2)


def _kronecker(t: Tensors, base: Tensor) -> Tensor:
    first, second = kronecker_factors(t)
    return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - first.ndim)), second.contiguous())


def _product(kind: str, t: Tensors) -> tuple[int, int]:
    """Rows and columns of what LoHa or LoKr makes, told by its formula without numbers; (0, 0) for tensors that do not fit together."""
    try:
        made = KINDS[kind].delta({name: tensor.to("meta") for name, tensor in t.items()}, torch.empty(0, device="meta"))
        return made.shape[0], made.flatten(1).shape[1]
    except (RuntimeError, IndexError, ValueError):
        return 0, 0


def _product_demands(kind: str, t: Tensors, shape: tuple[int, ...]) -> Iterator[Demand]:
    yield _product(kind, t) == (shape[0], math.prod(shape[1:])), "", ""


def _scaled(t: Tensors, base: Tensor) -> Tensor:
    """(IA)3: W with its columns, or its rows, multiplied."""
    shape = [-1 if d == int(t["on_input"].item()) else 1 for d in range(base.ndim)]
    return base * t["multiplier"].reshape(shape)


def _scaled_demands(t: Tensors, shape: tuple[int, ...]) -> Iterator[Demand]:
    yield t["on_input"].numel() == 1 and t["on_input"].item() in (0, 1), "on_input", "one number, 0 or 1"
    count = shape[int(t["on_input"].item())]
    yield t["multiplier"].numel() == count, "multiplier", f"{count} values"


SHARED = ("alpha", "dora_scale", "diff_b")
KINDS = {
    "lora": Kind(
        (("down",), ("up",)), ("mid", "up_bias", "magnitude"), SHARED,
        lambda t, base: low_rank(t["down"], t["up"], t.get("mid")), _low_rank_demands,
    ),
    "loha": Kind(
        (("hada_w1_a",), ("hada_w1_b",), ("hada_w2_a",), ("hada_w2_b",)), ("hada_t1", "hada_t2"), SHARED,
        _hadamard, partial(_product_demands, "loha"),
    ),
    "lokr": Kind(
        (("lokr_w1", "lokr_w1_a"), ("lokr_w1", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a"), ("lokr_w2", "lokr_w2_b")), ("lokr_t2",),
        SHARED, _kronecker, partial(_product_demands, "lokr"),
    ),
    "ia3": Kind((("multiplier",), ("on_input",)), delta=_scaled, demands=_scaled_demands),
    "norm": Kind((("w_norm", "b_norm"),), delta=lambda t, base: t["w_norm"]),
    "set": Kind((("set_weight",),), ("reshape_weight",), delta=lambda t, base: t["set_weight"].reshape(base.shape) - base),
    "full": Kind((("diff", "diff_b"),), delta=lambda t, base: t["diff"] if "diff" in t else torch.zeros_like(base)),
}  # fmt: skip
EITHER = (  # of these only one may be there: whole, or a product
    ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}), ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
)  # fmt: skip


def demands(kind: str, t: Tensors, shape: tuple[int, ...]) -> Iterator[Demand]:
    """What the tensors of a module must look like to change a weight of this shape; ask no further after one that is not met."""
    yield from KINDS[kind].demands(t, shape)
    for role in ("magnitude", "up_bias", "diff_b", "b_norm"):
        if role in t:
            yield t[role].numel() == shape[0], role, f"{shape[0]} {'lengths' if role == 'magnitude' else 'values'}"
    for role in ("diff", "w_norm", "set_weight"):
        if role in t:  # a 1x1 convolution's may be a matrix
            yield [d for d in t[role].shape if d > 1] == [d for d in shape if d > 1], role, "the same shape"
    if "dora_scale" in t:
        lengths, count = t["dora_scale"].shape, t["dora_scale"].numel()
        good = len(lengths) == len(shape) and any(count == shape[axis] == lengths[axis] for axis in (0, 1))
        yield good, "dora_scale", f"{shape[0]} rows' or {shape[1]} columns' lengths"
    if "reshape_weight" in t:
        yield t["reshape_weight"].tolist() == list(shape), "reshape_weight", f"that it says this shape, not {t['reshape_weight'].tolist()}"  # fmt: skip


def check_dora_rule(dora: str) -> None:
    """Raises LoraError for a rule that does not exist."""
    if dora not in DORA_RULES:
        raise LoraError(f"dora must be {' or '.join(DORA_RULES)}, not {dora!r}")
