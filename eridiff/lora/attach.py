"""A LoRA beside a network: attached, weighed, detached; or made new, to be trained."""

import copy
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from eridiff.errors import LoraError
from eridiff.lora.branches import Branch, branch_place, has_slot, install_slots, packed
from eridiff.lora.deltas import Item, check_dora_rule
from eridiff.lora.inplace import Part, change_in_place, original, originals, parts_of, restore
from eridiff.lora.load import Lora
from eridiff.lora.names import Target, network_of

log = logging.getLogger(__name__)
Scale = float | Tensor
TARGETS: dict[str, tuple[str, ...]] = {  # preset -> patterns of native module names
    "attention": ("*.self_attention.*", "*.cross_attention.*"),  # SDXL, as diffusers' scripts: 560 of the base
    "cross-attention": ("*.cross_attention.*",),  # SDXL
    "transformers": ("*.transformer.*",),  # SDXL, as kohya's sd-scripts: 722 of the base
    "joint-attention": ("joint_blocks.*.qkv", "joint_blocks.*.qkv2", "joint_blocks.*.proj", "joint_blocks.*.proj2"),  # SD 3
    "blocks": ("double_blocks.*", "single_blocks.*"),  # Flux
    "all-linear": ("*",),
}  # fmt: skip
USUAL = {"unet": "attention", "mmdit": "joint-attention", "flux": "blocks"}


class LoraSet(nn.Module):
    """The branches of one LoRA on one network, whose names and classes stay as they are.

    The set is not a part of the network: give its parameters to the optimizer, save its `state_dict`, move it by `.to()`. What
    is not a matrix of an `nn.Linear` or `nn.Conv2d` (a norm's scale, an enlarged first layer) is changed in place while the set
    is attached; the network's own tensors are kept, and come back when it is detached.
    """

    def __init__(
        self, network: nn.Module, items: Sequence[Item], *, dtype: torch.dtype | None = None, trainable: bool = False,
        dora: str = "peft", dropout: float = 0.0,
    ) -> None:  # fmt: skip
        """Arguments as for `attach_lora`."""
        super().__init__()
        check_dora_rule(dora)
        self._network = [network]  # in a list, so that it does not become a part of the set
        self.dora, self.attached = dora, False
        self.branches = nn.ModuleDict()
        self.patches: list[tuple[Item, float]] = []  # what is changed in place, each at its scale
        order = {name: place for place, (name, _) in enumerate(network.named_modules())}
        # the network's order, whatever the file's: an optimizer knows parameters by their number
        for item in sorted(items, key=lambda item: (order.get(item.target.module, -1), item.target.rows or (0, 0))):
            base = branch_place(network, item.target)
            name = str(item.target).replace(".", "/")
            if base is None or item.kind == "set":
                self.patches.append((item, 1.0))
            elif name in self.branches:
                raise LoraError(f"two modules of the LoRA change {item.target}; attach them as two LoRAs")
            else:
                own = base.weight.dtype if base.weight.dtype.itemsize > 1 else torch.bfloat16
                own = torch.promote_types(own, torch.float32) if trainable else own  # small steps vanish in bfloat16
                branch = Branch(
                    item, device=base.weight.device, dtype=dtype or own, trainable=trainable, dora=dora, dropout=dropout
                )
                if packed(base) and not branch.is_product:
                    raise LoraError(
                        f"{item.target} is quantised and keeps no matrix that can be read, which a {item.kind}"
                        f"{' with DoRA' * item.dora} needs: load the base unquantised"
                    )
                self.branches[name] = branch
        if trainable and self.patches:
            raise LoraError(f"{self.patches[0][0].target} is changed in place and cannot be trained as a branch")
        self.train(trainable)
        self.attach()

    def __deepcopy__(self, memo: dict[int, Any]) -> "LoraSet":
        """A copy is not attached: a copied network has no branches."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo) | {"attached": False}
        return new

    def get_extra_state(self) -> Tensor:
        """alpha / rank of each branch, float64, for `state_dict`: what else the matrices mean."""
        return torch.tensor([branch.told.ratio for branch in self.all_branches()], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Raises LoraError for the state of a set with other alphas, whose matrices would mean something else here."""
        own = self.get_extra_state()
        if state.shape != own.shape or not torch.equal(state.cpu(), own):
            raise LoraError("the state is of a LoRA with other alphas or modules than this one")

    @property
    def network(self) -> nn.Module:
        return self._network[0]

    def lora(self) -> Lora:
        """The set as a file would hold it, with the tensors as they are now."""
        return Lora((*(branch.item for branch in self.all_branches()), *(item for item, _ in self.patches)))

    @property
    def originals(self) -> dict[str, Tensor]:
        """The network's own tensors of what the set changes in place while it is attached."""
        return originals(self.network, self)

    def all_branches(self) -> list[Branch]:
        return [branch for branch in self.branches.values() if isinstance(branch, Branch)]

    def _places(self) -> list[tuple[Branch, Any]]:
        """The branches, each with its module of the network."""
        return [(branch, branch_place(self.network, branch.target)) for branch in self.all_branches()]

    def attach(self) -> "LoraSet":
        """Put the branches beside the network again; does nothing when they are.

        A network without slots that may have been compiled makes the compiler forget everything, which is logged.
        """
        if self.attached:
            return self
        places = self._places()
        if not all(has_slot(place) for _, place in places):
            install_slots(self.network)
            if "torch._dynamo" in sys.modules:
                compiled = bool(torch._dynamo.utils.counters["frames"])
                torch.compiler.reset()
                log.log(logging.WARNING if compiled else logging.DEBUG, "the network had no slots for LoRAs, so whatever is compiled is compiled again; compile by eridiff.blocks.compile_blocks, or call install_slots before")  # fmt: skip
        self._patch()
        for branch, place in places:
            place.lora_branches.append(branch)
        self.attached = True
        return self

    def detach(self) -> "LoraSet":
        """Take the branches away: the network gives, bit for bit, what it gave before."""
        if self.attached:
            restore(self.network, self)
            for branch, place in self._places():
                place.lora_branches[:] = [other for other in place.lora_branches if other is not branch]
            self.attached = False
        return self

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Within the block the network is without this LoRA; afterwards it is back in its place among others."""
        if not self.attached:
            yield
            return
        places = [(branch, place.lora_branches) for branch, place in self._places()]
        indices = [branches.index(branch) for branch, branches in places]
        self.detach()
        try:
            yield
        finally:
            self._patch()
            for (branch, branches), index in zip(places, indices, strict=True):
                branches.insert(index, branch)
            self.attached = True

    def set_scale(self, scale: Scale | Mapping[str, Scale]) -> "LoraSet":
        """The weight of all branches, in place: a number, or `[B]`, one for each row of the batch.

        A mapping gives weights to the modules that a pattern of native names matches (`"double_blocks.*": 0.5`), the first
        that does; the others keep their own. Raises LoraError for a pattern that matches nothing, and for weights of rows
        where there is only one: inside DoRA's norm and for what is changed in place.
        """
        patterns = dict(scale) if isinstance(scale, Mapping) else {"*": scale}
        try:
            values = {pattern: torch.as_tensor(v, dtype=torch.float64, device="cpu") for pattern, v in patterns.items()}
        except (TypeError, ValueError, RuntimeError):
            raise LoraError(f"a scale is a finite number, or one for each row of the batch, not {scale!r}") from None
        targets = self.targets()
        for pattern, value in values.items():
            if not any(matches(target, pattern) for target in targets):
                names = list(dict.fromkeys(target.module for target in targets))
                others = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise LoraError(f"no module of the LoRA matches '{pattern}'; there are {', '.join(names[:3])}{others}")
            if value.ndim > 1 or not bool(torch.isfinite(value).all()):
                raise LoraError(f"a scale is a finite number, or one for each row of the batch, not {value.tolist()}")
        # of several patterns the first counts
        given = {t: value for pattern, value in reversed(values.items()) for t in targets if matches(t, pattern)}
        if any(b.scales_rows_inside and b.target in given and given[b.target].ndim for b in self.all_branches()):
            raise LoraError('DoRA has one scale for all rows inside its norm; attach it with dora="interpolate"')
        for item, _ in self.patches:
            if item.target in given and given[item.target].ndim:
                raise LoraError(f"{item.target} is changed in place, for all rows alike; give one scale")
        for branch in self.all_branches():
            if branch.target in given:
                branch.weigh(given[branch.target])
        new = [(item, float(given.get(item.target, old))) for item, old in self.patches]
        changed, self.patches = new != self.patches, new
        if self.attached and changed:
            self._patch()
        return self

    def targets(self) -> list[Target]:
        """What the LoRA changes."""
        return [*(branch.target for branch in self.all_branches()), *(item.target for item, _ in self.patches)]

    def wrap(self, network: nn.Module | None = None) -> "Wrapped":
        """One module that holds the network and the set, for DistributedDataParallel, which averages what it holds.

        `network` is the set's own, or a compiled wrapper of it.
        """
        return Wrapped(self.network if network is None else network, self)

    @torch.no_grad()
    def _patch(self) -> None:
        parts = parts_of(self.patches, self.dora)
        for branch, place in self._places():  # the first layer of a control LoRA takes twice as many channels
            name = branch.target.name
            if packed(place) or not isinstance(place, nn.Linear):  # the former reads as many features as it says
                continue
            if branch.columns and branch.columns > original(self.network, name).shape[1]:
                parts.setdefault(name, []).append(Part(branch.item, None, False, self.dora))
        for name, own in parts.items():
            change_in_place(self.network, name, self, own)


def matches(target: Target, pattern: str) -> bool:
    """Whether a pattern of native names means a module, or the rows of one that a file names for themselves (`...qkv[0:64]`)."""
    return fnmatchcase(target.module, pattern) or str(target) == pattern


class Wrapped(nn.Module):
    """A network and the LoRA that is trained on it, as one module; called like the network."""

    def __init__(self, network: nn.Module, lora: LoraSet) -> None:
        super().__init__()
        self.network, self.lora = network, lora

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.network(*args, **options)


def attach_lora(
    network: nn.Module, lora: Lora, scale: Scale | Mapping[str, Scale] = 1.0, *, dtype: torch.dtype | None = None,
    trainable: bool = False, dropout: float = 0.0, dora: str = "peft",
) -> LoraSet:  # fmt: skip
    """Put a LoRA, read by `load_lora`, beside a network; several at once add up, each computed on the base's own weights.

    `scale` as in `LoraSet.set_scale`; dtype None is that of each base weight, bfloat16 beside float8, and
    float32 where it is trained; `trainable` and dropout go on with its training. `dora` is the rule for a scale that is not 1 (`Item.change`). Raises LoraError when the LoRA has
    parts for other networks: choose by `lora.of(...)`.
    """
    networks = lora.networks
    if len(networks) != 1:
        raise LoraError(f"the LoRA has parts for {' and '.join(networks) or 'nothing'}; choose one by lora.of(network)")
    own = network_of(network)
    if own and own != networks[0]:
        raise LoraError(f"the LoRA is for {networks[0]}, and this network is {own}")
    found = LoraSet(network, lora.items, dtype=dtype, trainable=trainable, dropout=dropout, dora=dora)
    try:
        return found.set_scale(scale)
    except LoraError:
        found.detach()
        raise


def inject_lora(
    network: nn.Module, rank: int, alpha: float | None = None, targets: str | Sequence[str] | None = None,
    *, dropout: float = 0.0, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None,
) -> LoraSet:  # fmt: skip
    """A new LoRA to be trained, on any module: down random (Kaiming, as in Hu et al. 2021's code), up zero, so nothing changes yet.

    alpha None is the rank, so that the scale alpha / rank is 1. `targets` is a preset of `TARGETS` or patterns of native
    module names (`"double_blocks.*.qkv"`); they choose `nn.Linear`s, and `nn.Conv2d`s that a pattern other than "*" names.
    None is both attentions for SDXL, joint attention for SD 3, the blocks for Flux, else all linears. Raises LoraError for
    a pattern that chooses nothing.
    """
    if rank < 1 or not 0 <= dropout < 1:
        raise LoraError(f"rank must be at least 1 and dropout in [0, 1), not {rank} and {dropout}")
    if alpha is not None and not (math.isfinite(alpha) and alpha):
        raise LoraError(f"alpha must be a number other than 0, not {alpha}: with {alpha} the LoRA would do nothing")
    kind = network_of(network)
    chosen = USUAL.get(kind, "all-linear") if targets is None else targets
    preset = isinstance(chosen, str) and chosen in TARGETS
    patterns = TARGETS.get(chosen, (chosen,)) if isinstance(chosen, str) else chosen
    found: dict[str, Any] = {}
    for pattern in patterns:
        kinds = nn.Linear if pattern == "*" else (nn.Linear, nn.Conv2d)
        matching = {n: m for n, m in network.named_modules() if isinstance(m, kinds) and fnmatchcase(n, pattern)}
        if not matching and not preset:
            raise LoraError(f"no linear layer or convolution matches '{pattern}'; presets are {', '.join(TARGETS)}")
        found |= matching
    if not found:
        raise LoraError(f"{type(network).__name__} has no module for the targets {', '.join(patterns)}")
    items = []
    for name, module in found.items():
        weight = module.weight
        place = generator.device if generator else torch.device("cpu")
        down = torch.empty(rank, *weight.shape[1:], dtype=torch.float32, device=place)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        up = torch.zeros(weight.shape[0], rank, *[1] * (weight.ndim - 2), dtype=torch.float32, device=place)
        strength = float(rank if alpha is None else alpha)
        items.append(Item(name, Target(kind, name), "lora", {"down": down, "up": up}, strength / rank, strength, rank))
    return LoraSet(network, items, dtype=dtype, trainable=True, dropout=dropout)


def all_reduce_gradients(lora: LoraSet) -> None:
    """The mean of the gradients over all processes: for a set beside a network that FSDP2 shards, after `backward`."""
    size = torch.distributed.get_world_size()
    for parameter in lora.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:  # this process has not used the branch
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= size
