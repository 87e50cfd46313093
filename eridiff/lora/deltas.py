"""What each kind of adapter makes of a weight W: `W' = W + scale * ratio * delta`, and the few kinds that are not of that form.

Sources: Hu et al. 2021 (LoRA); Hyeon-Woo et al. 2021 (LoHa) and Edalati et al. 2022 (LoKr) as in LyCORIS (Yeh et al.
2023); Liu et al. 2022 ((IA)3); Liu et al. 2024 (DoRA). Letters: o outputs, i inputs, r rank, h x w a kernel.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

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
    kind: str  # lora, loha, lokr, full, norm, ia3 or set
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
        idle = [
            zero.pop(name) for name in ("diff", "diff_b", "w_norm", "b_norm", "multiplier", "up_bias") if name in zero
        ]
        return all(idle) and (self.kind not in FACTORED or any(zero.values()))

    def change(self, base: Tensor, scale: float | Tensor = 1.0, dora: str = "peft") -> Tensor:
        """W' - W for rows of W in the file's order, in W's shape, dtype and device.

        DoRA has two rules for a scale s that is not 1: "peft" puts it inside the norm, so that s = 0 is not W;
        "interpolate" is s (W'(1) - W). A `set` replaces W, whatever the scale.
        """
        if self.kind == "set":
            return self.tensors["set_weight"].to(base).reshape(base.shape) - base
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
        t = {name: tensor.to(base) for name, tensor in self.tensors.items()}
        if self.kind == "ia3":
            per_input = bool(self.tensors["on_input"].item())
            shape = [-1 if d == int(per_input) else 1 for d in range(base.ndim)]
            return base * t["multiplier"].reshape(shape)
        if self.kind == "norm":
            return t["w_norm"].reshape(base.shape)
        if self.kind == "full" and "diff" in t:
            return _fitted(t["diff"], base)
        if self.kind == "lora":
            delta = low_rank(t["down"], t["up"], t.get("mid"))
        elif self.kind == "loha":
            delta = _hadamard_factor(t, "hada_w1", "hada_t1") * _hadamard_factor(t, "hada_w2", "hada_t2")
        elif self.kind == "lokr":
            first, second = kronecker_factors(t)
            delta = torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - first.ndim)), second.contiguous())
        else:
            return torch.zeros_like(base)
        return times(self.ratio, _fitted(delta, base))

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
    if "hada_w1_b" in t and "hada_t1" not in t:
        return t["hada_w1_b"].shape[1]
    if item.kind == "lokr":
        return kronecker_shape({name: tensor.to("meta") for name, tensor in t.items()})[1]
    return None


def widened(base: Tensor, item: Item) -> Tensor:
    """The first layer's weight with as many columns as a control LoRA has, the new ones zero; others stay."""
    down = item.tensors.get("down")
    if down is None or item.target.parameter != "weight" or down.ndim != 2 or base.ndim != 2:
        return base
    missing = down.shape[1] - base.shape[1]
    return torch.cat([base, base.new_zeros(base.shape[0], missing)], dim=1) if missing > 0 else base


def low_rank(down: Tensor, up: Tensor, mid: Tensor | None = None) -> Tensor:
    """up [o, r(, 1, 1)] and down [r, i(, h, w)] -> [o, i(, h, w)]; with a Tucker core mid [r, r, h, w] down is [r, i(, 1, 1)]."""
    if mid is not None:
        return torch.einsum("oa,abhw,bi->oihw", up.flatten(1), mid, down.flatten(1))
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _hadamard_factor(t: Mapping[str, Tensor], matrix: str, core: str) -> Tensor:
    a, b = t[f"{matrix}_a"], t[f"{matrix}_b"]
    return _tucker(t[core], a, b) if core in t else a @ b


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """core [r, r, h, w], a [r, o], b [r, i] -> [o, i, h, w]; einsum alone would spread a rank of 1."""
    if core.shape[:2] != (a.shape[0], b.shape[0]):
        raise ValueError("the ranks disagree")
    return torch.einsum("abhw,ao,bi->oihw", core, a, b)


def kronecker_factors(t: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The two factors of LoKr, [p, q] and [o / p, i / q(, h, w)], each whole or of low rank."""
    first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        return first, t["lokr_w2"]
    if "lokr_t2" in t:
        return first, _tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    return first, t["lokr_w2_a"] @ t["lokr_w2_b"]


def hadamard_shape(t: Mapping[str, Tensor]) -> tuple[int, int]:
    """Rows and columns that the two factors of LoHa have; (0, 0) when they differ."""
    first, second = (_hadamard_factor(t, f"hada_w{n}", f"hada_t{n}").flatten(1).shape for n in (1, 2))
    return (first[0], first[1]) if first == second else (0, 0)


def kronecker_shape(t: Mapping[str, Tensor]) -> tuple[int, int]:
    """Rows and columns of the product of LoKr's two factors."""
    (p, q), (rows, columns) = (factor.flatten(1).shape for factor in kronecker_factors(t))
    return p * rows, q * columns


def check_dora_rule(dora: str) -> None:
    """Raises LoraError for a rule that does not exist."""
    if dora not in DORA_RULES:
        raise LoraError(f"dora must be {' or '.join(DORA_RULES)}, not {dora!r}")
