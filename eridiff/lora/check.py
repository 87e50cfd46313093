"""What a module of a LoRA file must consist of, and what its tensors must look like."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from eridiff.errors import LoraError
from eridiff.lora.deltas import Item, hadamard_shape, kronecker_shape
from eridiff.lora.formats import Source
from eridiff.lora.names import Target


class Misshapen(LoraError):
    """A module's tensors do not fit together, or not the network."""


class Incomplete(LoraError):
    """A module lacks a tensor."""


NEEDED = {  # kind -> tensors of which it has at least one of each group
    "lora": (("down",), ("up",)),
    "loha": (("hada_w1_a",), ("hada_w1_b",), ("hada_w2_a",), ("hada_w2_b",)),
    "lokr": (("lokr_w1", "lokr_w1_a"), ("lokr_w1", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a"), ("lokr_w2", "lokr_w2_b")),
    "full": (("diff", "diff_b"),),
    "norm": (("w_norm", "b_norm"),),
    "ia3": (("multiplier",), ("on_input",)),
    "set": (("set_weight",),),
}
EITHER = (  # of these only one may be there: whole, or a product
    ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}), ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
)  # fmt: skip
ALLOWED = {  # kind -> tensors that it may have besides
    "lora": {"mid", "alpha", "up_bias", "dora_scale", "magnitude", "diff_b"},
    "loha": {"hada_t1", "hada_t2", "alpha", "dora_scale", "diff_b"},
    "lokr": {"lokr_t2", "alpha", "dora_scale", "diff_b"},
    "set": {"reshape_weight"},
}


def kind_of(roles: set[str]) -> str:
    for kind, marks in (
        ("lora", {"down", "up", "mid", "up_bias", "magnitude"}), ("loha", {r for r in roles if r.startswith("hada_")}),
        ("lokr", {r for r in roles if r.startswith("lokr_")}), ("ia3", {"multiplier", "on_input"}),
        ("norm", {"w_norm", "b_norm"}), ("set", {"set_weight"}), ("full", {"diff", "diff_b"}),
    ):  # fmt: skip
        if roles & marks:
            return kind
    return ""


def check_shapes(source: Source, target: Target, kind: str, t: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    """Raises LoraError unless the tensors make a change of the target's shape."""

    def demand(good: bool, name: str, wanted: str) -> None:
        if not good:
            raise Misshapen(f"'{source.names[name]}' has the shape {list(t[name].shape)}, and {target} of shape {list(shape)} needs {wanted}")  # fmt: skip

    flat = (shape[0], *shape[1:2])
    area = 1
    for side in shape[2:]:
        area *= side
    if kind in ("lora", "loha", "lokr", "ia3") and len(shape) < 2:
        raise LoraError(f"{source} changes {target}, which has no matrix")
    if kind == "lora":
        down, up = t["down"], t["up"]
        if down.ndim < 2 or up.ndim < 2 or down.shape[0] != up.shape[1]:
            raise Misshapen(
                f"{source}: the ranks disagree, '{source.names['down']}' has the shape {list(down.shape)} and "
                f"'{source.names['up']}' {list(up.shape)}"
            )
        if "mid" in t and len(shape) != 4:
            raise LoraError(f"'{source.names['mid']}' is a Tucker core, and {target} is not a convolution")
        demand(up.shape[0] == flat[0] and up[0, 0].numel() == 1, "up", f"{flat[0]} rows")
        kernel = 1 if "mid" in t else area
        demand(down.shape[1] == flat[1] and down[0, 0].numel() == kernel, "down", f"{flat[1]} columns" + (f" and a kernel of {kernel}" if kernel > 1 else ""))  # fmt: skip
        if "mid" in t:
            demand(tuple(t["mid"].shape) == (down.shape[0], up.shape[1], *shape[2:]), "mid", "a core of its kernel")
        for name, tensor in t.items():
            if name == "magnitude":
                demand(tensor.numel() == shape[0], name, f"{shape[0]} lengths")
            if name == "up_bias":
                demand(tensor.numel() == shape[0], name, f"{shape[0]} values")
    if "dora_scale" in t:
        found = t["dora_scale"]
        good = found.ndim == len(shape) and found.numel() in (found.shape[0], found.shape[1])
        good = good and (found.numel() == shape[0] == found.shape[0] or found.numel() == shape[1] == found.shape[1])
        demand(good, "dora_scale", f"{shape[0]} rows' or {shape[1]} columns' lengths")
    if kind in ("loha", "lokr"):
        factors = {name: tensor.to("meta") for name, tensor in t.items()}
        try:
            rows, columns = (hadamard_shape if kind == "loha" else kronecker_shape)(factors)
        except (RuntimeError, IndexError, ValueError):
            rows = columns = 0
        if (rows, columns) != (shape[0], flat[1] * area):
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in t.items() if tensor.ndim)
            raise Misshapen(f"{source}: the shapes {shapes} do not make {target}'s {list(shape)}")
    if kind == "ia3":
        if t["on_input"].numel() != 1 or t["on_input"].item() not in (0, 1):
            raise LoraError(f"'{source.names['on_input']}' holds {t['on_input'].tolist()}, and it is either 0 or 1")
        count = shape[1] if bool(t["on_input"]) else shape[0]
        demand(t["multiplier"].numel() == count, "multiplier", f"{count} values")
    for name in ("diff", "w_norm", "set_weight"):
        if name in t:  # a 1x1 convolution's may be a matrix
            demand([d for d in t[name].shape if d > 1] == [d for d in shape if d > 1], name, "the same shape")
    if "reshape_weight" in t and t["reshape_weight"].tolist() != list(shape):
        raise Misshapen(f"'{source.names['reshape_weight']}' says {t['reshape_weight'].tolist()}, and {target} has the shape {list(shape)}")  # fmt: skip
    for name in ("diff_b", "b_norm"):
        if name in t:
            demand(t[name].numel() == shape[0], name, f"{shape[0]} values")


def check_overlaps(items: Sequence[Item]) -> None:
    """Raises LoraError for two modules that change the same rows of the same tensor: to add both would be a guess."""
    seen: dict[tuple[str, str], list[tuple[Item, range]]] = {}
    for item in items:
        for kind, changes in (("weight", item.changes_weight), ("bias", item.changes_bias)):
            if changes:
                place = (item.target.network, f"{item.target.name} {kind}")
                rows = range(*(item.target.rows or (0, 1 << 40)))
                for other, taken in seen.setdefault(place, []):
                    if max(rows.start, taken.start) < min(rows.stop, taken.stop):
                        raise LoraError(f"'{other.key}' and '{item.key}' both change {item.target.module}; keep one")
                seen[place].append((item, rows))
