"""What a branch computes beside its `nn.Linear` or `nn.Conv2d`, and the slot through which it is added.

A slot is one forward hook that reads a plain list, `module.lora_branches`. The module's class, parameters and names stay as
they are, and `torch.compile` guards the list: what is put into it or taken out after compiling takes effect, if the slot was
there before (a hook that is registered later is silently ignored by a compiled module).
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from eridiff.errors import LoraError
from eridiff.lora.deltas import Item, columns, kronecker_factors
from eridiff.lora.names import Target
from eridiff.models.layers import keeps_nothing


class Branches(list["Branch"]):
    """The branches beside a module. A copy of the module has none: nobody could take them away from it."""

    def __deepcopy__(self, memo: object) -> "Branches":
        return Branches()


def has_slot(module: nn.Module) -> bool:
    return "lora_branches" in vars(module)


def install_slots(network: nn.Module) -> None:
    """Prepare every `nn.Linear` and `nn.Conv2d` for branches; do this before compiling."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not has_slot(module):
            module.lora_branches = Branches()  # type: ignore[assignment]  # a list: no name of the network changes
            module.register_forward_hook(_add_branches, with_kwargs=True)


@keeps_nothing
def _add_branches(module: Any, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor:
    plain = output
    for branch in module.lora_branches:
        output = branch(module, *inputs, *named.values(), plain, output)
    return output


class Branch(nn.Module):
    """One item of a LoRA beside the module that it changes: `out + scale * ratio * up(down(x))`.

    LoRA proper is two thin products in the branch's dtype, whatever that of the base is. So are LoHa and LoKr beside an
    `nn.Linear`, and DoRA there needs beside them the lengths of the rows, from the weight as it is at the time. The other kinds
    compute their change of the weight in each call.
    """

    scale: Tensor  # float64 on the CPU: 0-dim, or one number for each row of the batch
    factor: Tensor  # the same times the ratio

    def __init__(self, item: Item, *, device: torch.device, dtype: torch.dtype, trainable: bool = False, dora: str = "peft", dropout: float = 0.0) -> None:  # fmt: skip
        """`dora` as in `Item.change`; dropout acts on the branch's input while the branch is in training mode."""
        super().__init__()
        self.told = replace(item, tensors={})
        self.target, self.dora, self.dropout = item.target, dora, dropout
        self.names = tuple(sorted(item.tensors))  # the order of the parameters, by which an optimizer's state is kept
        self.thin = is_thin(item)
        self.columns = columns(item)
        self.changes_weight, self.changes_bias, self.has_lengths = item.changes_weight, item.changes_bias, item.dora
        for name in self.names:
            if name == "on_input":  # a whole number
                self.register_buffer(name, item.tensors[name].to(device))
            else:
                copy = item.tensors[name].detach().to(device, dtype, copy=True)
                self.register_parameter(name, nn.Parameter(copy, requires_grad=trainable))
        self.weigh(torch.tensor(1.0, dtype=torch.float64, device="cpu"))

    @property
    def item(self) -> Item:
        """What the branch is, as a file would say it; the tensors are the branch's own."""
        return replace(self.told, tensors={name: getattr(self, name) for name in self.names})

    @property
    def is_product(self) -> bool:
        """Whether the change beside an `nn.Linear` is a product with the input alone, which reads no weight of the base."""
        return not self.has_lengths and (self.told.kind == "lora" or self.thin)

    @property
    def scales_rows_inside(self) -> bool:
        """Whether the scale stands inside DoRA's norm, where there is only one for all rows."""
        return self.has_lengths and self.dora == "peft"

    def weigh(self, scale: Tensor) -> None:
        """Give the branch a scale, float64 on the CPU: a number, or `[B]`, one for each row of the batch.

        Neither a parameter nor a buffer, so that 0.7 stays 0.7 whatever `.to()` and DDP do with those. A number needs no
        place on a GPU: torch passes it along with a kernel. The factors of rows lie where the branch is, or every call would
        wait for a copy. Of the same shape a scale changes in place, as compiled code has read the tensor, not its value.
        """
        factor = scale * self.told.ratio
        if factor.ndim:
            dtype = next(p.dtype for p in self._parameters.values() if p is not None)
            factor = factor.to(torch.promote_types(dtype, torch.float32)).to(self.device)
        for name, value in (("scale", scale), ("factor", factor)):
            held = getattr(self, name, None)
            if held is not None and held.shape == value.shape:
                held.copy_(value)
            else:
                setattr(self, name, value.clone())

    @property
    def device(self) -> torch.device:
        """Where the matrices are."""
        return next(p.device for p in self._parameters.values() if p is not None)

    def forward(self, base: Any, x: Tensor, plain: Tensor, out: Tensor) -> Tensor:
        """The module's input, its own output, and that with other branches -> the latter with the change, in its dtype."""
        if self.columns is not None and isinstance(base, nn.Linear) and x.shape[-1] > self.columns:
            x = x[..., : self.columns]  # a first layer that another LoRA, or a variant, has widened
        if self.device != x.device:  # the network was moved, and its branches, which are not part of it, were not
            self.to(x.device)
            self.weigh(self.scale)
        after = 2 if isinstance(base, nn.Conv2d) else 0  # dimensions behind the features
        parts = []
        if self.is_product and (self.told.kind == "lora" or isinstance(base, nn.Linear)):
            parts.append(weighed(self._product(base, x), self.factor))
        elif self.changes_weight:
            dropping = self.training and self.dropout > 0  # then the output is not W times what the branch is given
            thin = self.thin and isinstance(base, nn.Linear) and not dropping
            y = self._directed(base, x, plain) if thin else self._changed(base, x)
            parts.append(y if self.scales_rows_inside else weighed(y, self.scale))
        if self.changes_bias:
            bias = self.item.bias_delta(wide(self.target.take(base.bias))).reshape(-1, *[1] * after)
            parts.append(weighed(bias.expand(*[1] * (out.ndim - bias.ndim), *bias.shape), self.scale))
        change = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        features = change.ndim - 1 - after
        if self.target.swapped:
            change = change.roll(change.shape[features] // 2, features)
        if self.target.rows is None:
            return out + change.to(out.dtype)
        first, last = self.target.rows
        change = change.to(out.dtype)
        shape = (change.shape[0], *out.shape[1:])  # one row for all, which the scale of each may have made several
        if not torch.is_grad_enabled():  # the slices of a fused layer are added to one copy of its output
            out = out.expand(shape).clone() if out is plain or out.shape != shape else out
            out.narrow(features, first, last - first).add_(change)
            return out
        before, own, behind = out.expand(shape).split([first, last - first, out.shape[features] - last], features)
        return torch.cat([before, own + change, behind], features)

    def _product(self, base: Any, x: Tensor) -> Tensor:
        """The change of the weight, at ratio 1 and without DoRA, times x."""
        t: dict[str, Any] = self._parameters
        x = F.dropout(x.to(t[self.names[0]].dtype), self.dropout, self.training)
        if self.told.kind == "lokr":  # (A kron B) x = A X B^T, with x as a matrix X of A's columns by B's
            a, b = kronecker_factors(t)
            return (a @ F.linear(x.unflatten(-1, (a.shape[1], -1)), b)).flatten(-2)
        if self.told.kind == "loha":  # a product of two sums of r products is one sum of r * r
            down = (t["hada_w1_b"][:, None] * t["hada_w2_b"]).flatten(0, 1)
            up = (t["hada_w1_a"][:, :, None] * t["hada_w2_a"][:, None]).flatten(1)
            return F.linear(F.linear(x, down), up)
        down, up, mid = t["down"], t["up"], t.get("mid")
        if not isinstance(base, nn.Conv2d):
            return F.linear(F.linear(x, down.flatten(1)), up.flatten(1))
        where: dict[str, Any] = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation}
        if mid is not None:
            hidden = F.conv2d(F.conv2d(x, down.reshape(*down.shape[:2], 1, 1)), mid, **where)
        else:
            x = x[:, : down.shape[1]]  # a first layer may read more than the latents
            hidden = F.conv2d(x, down.reshape(*down.shape[:2], *base.kernel_size), **where)
        return F.conv2d(hidden, up.reshape(*up.shape[:2], 1, 1))

    def _directed(self, base: Any, x: Tensor, plain: Tensor) -> Tensor:
        """DoRA beside a linear layer: `(m / n) (W + D) x - W x`, where the rows of W + D have the lengths n and must have m.

        `n^2 = |W|^2 + 2 W D + |D|^2` row by row, with `D = up down`, needs no second matrix of W's size.
        """
        t: dict[str, Any] = self._parameters
        weight = self.target.take(base.weight)[:, : x.shape[-1]]
        weight = weight.to(t["up"].dtype) if weight.itemsize == 1 else weight
        down, up, lengths = wide(t["down"]), wide(t["up"]), wide(t["magnitude" if "magnitude" in t else "dora_scale"])
        ratio: Any = self.factor if self.scales_rows_inside else self.told.ratio
        square = row_squares(weight, up.dtype)
        square = square + 2 * ratio * ((weight @ down.T.to(weight.dtype)) * up).sum(1)
        square = square + ratio**2 * ((up @ (down @ down.T)) * up).sum(1)
        share = lengths.flatten() / square.clamp_min(0).sqrt()
        own = self.target.take(plain.movedim(-1, 0)).movedim(0, -1)
        # share is near 1, and of bfloat16's digits none would be left of share - 1 there
        further = (share - 1).to(own.dtype)
        bias = own.new_zeros(()) if base.bias is None else ((1 - share) * self.target.take(base.bias)).to(own.dtype)
        change = self._product(base, x)
        return torch.addcmul(torch.addcmul(bias, further, own), (share * ratio).to(change.dtype), change)

    def _changed(self, base: Any, x: Tensor) -> Tensor:
        scale: Any = self.scale if self.scales_rows_inside else 1.0
        weight = self.target.take(base.weight)
        weight = weight[:, : x.shape[-1]] if isinstance(base, nn.Linear) else weight
        change = self.item.change(wide(weight), scale, self.dora)
        x = F.dropout(x.to(change.dtype), self.dropout, self.training)
        if isinstance(base, nn.Conv2d):
            return F.conv2d(x, change, None, base.stride, base.padding, base.dilation)
        return F.linear(x, change)


def row_squares(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The squared length of each row, computed in `dtype`."""
    if weight.device.type != "cpu":
        return torch.linalg.vector_norm(weight, dim=1, dtype=dtype) ** 2
    # the CPU's kernel of the norm takes ten times as long as a sum of squares of what a cache holds
    return torch.cat([rows.to(dtype).square().sum(1) for rows in weight.split(max(1, min(256, len(weight) // 4)))])


def is_thin(item: Item) -> bool:
    """Whether a change is thin products beside an `nn.Linear`: LoRA, LoHa, LoKr, and LoRA with DoRA's lengths of rows."""
    t = item.tensors
    if item.dora:
        lengths = t.get("magnitude", t.get("dora_scale"))
        return item.kind == "lora" and lengths is not None and len(lengths) == len(t["up"]) and t["up"].ndim == 2
    if item.kind == "loha" and "hada_t1" not in t:  # with r * r products, which must be worth it
        sums = t["hada_w1_a"].shape[1] * t["hada_w2_a"].shape[1]
        return 4 * sums <= min(t["hada_w1_a"].shape[0], t["hada_w1_b"].shape[1])
    return (
        item.kind == "lora" or item.kind == "lokr" and all(t[name].ndim == 2 for name in t if name.startswith("lokr"))
    )


def weighed(y: Tensor, scale: Tensor) -> Tensor:
    """`[B, ...]` times a number, or times one number for each row; rounded once, to y's dtype."""
    if scale.ndim == 0:
        return y * scale
    rows = scale.to(torch.promote_types(y.dtype, torch.float32)).to(y.device)
    if y.shape[0] > 1:  # positive and negative prompts are in one batch; of one row for all, each gets its own
        if y.shape[0] % len(rows):
            raise LoraError(f"the LoRA has a scale for each of {len(rows)} rows, and the batch has {y.shape[0]}")
        rows = rows.repeat(y.shape[0] // len(rows))
    return (y * rows.reshape(-1, *[1] * (y.ndim - 1))).to(y.dtype)


def wide(tensor: Tensor) -> Tensor:
    """In float32, or in float64 as it is: where the change of a weight is computed."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def packed(module: Any) -> bool:
    """Whether a linear layer is quantised so that its weight has another shape, as bitsandbytes' 4 bits."""
    return isinstance(module, nn.Linear) and module.weight.shape[0] != module.out_features


def branch_place(network: nn.Module, target: Target) -> Any:
    """The module beside which a target's branch works; None if it has to be changed in place.

    Raises LoraError for a target that the network does not have, and for a layer beside which a branch would do nothing, or
    something else.
    """
    try:
        module: Any = network.get_submodule(target.module)
        getattr(module, target.parameter)
    except AttributeError:
        raise LoraError(f"{type(network).__name__} has no {target.name}, which the LoRA changes") from None
    if not isinstance(module, nn.Linear | nn.Conv2d) or target.parameter != "weight":
        return None
    if isinstance(module, NonDynamicallyQuantizableLinear):
        raise LoraError(f"{target.module} is never called (nn.MultiheadAttention reads its weight): leave it out")
    if isinstance(module, nn.Conv2d) and (module.groups != 1 or module.padding_mode != "zeros"):
        raise LoraError(
            f"{target.module} has groups or pads by {module.padding_mode}, which no branch does: leave it out"
        )
    return module
