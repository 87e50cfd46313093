"""float32 linear layers on the CPU by oneDNN, where it is faster than what torch asks by itself.

For a product in float32 torch asks MKL, which does not use all that some processors have; oneDNN does, and its operator takes
the weight as it is. A weight that is packed for it beforehand gains as much again, but is a second copy, which knows nothing
of a merge or an optimizer's step.
"""

import logging
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from eridiff.weights.keymap import unwrapped

log = logging.getLogger(__name__)
OPERATOR = "_linear_pointwise"  # of torch.ops.mkldnn; private, so that another torch may not have it
ROWS = (1024, 128)  # with which a layer is measured: an image's tokens, and the fewest of which some layer is faster
MARGIN = 1.05  # how much faster it must be; two measurements of the same differ by up to 0.04
OWN = F.linear
OUTPUTS = 1024  # of a wider layer so many are measured: few of them, or an odd number, have another ratio


class OneDNNLinear(nn.Linear):
    """`nn.Linear`, by oneDNN for float32 on the CPU without gradients, from `onednn_rows` rows on.

    Weight and bias are read as they are at the time.
    """

    onednn_rows: int

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` -> `[..., out_features]`."""
        # the operator knows nothing of graphs, of gradients in either direction, and of who replaces F.linear
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or forward_ad._current_level >= 0
            or F.linear is not OWN
        ):
            return super().forward(input)
        weight, bias = self.weight, self.bias
        enough = input.ndim > 1 and input.numel() >= self.onednn_rows * input.shape[-1] > 0
        # of rows that lie apart, as in Flux's single blocks, the operator makes a copy, which torch's own product needs not
        fits = (
            enough
            and input.is_contiguous()
            and input.shape[-1] == weight.shape[-1]
            and not torch.is_autocast_enabled("cpu")
        )
        if not fits or not _plain(input) or not _plain(weight) or not (bias is None or _plain(bias)):
            return super().forward(input)
        return getattr(torch.ops.mkldnn, OPERATOR)(input, weight, bias, "none", [], "")


def _plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
    )


def is_onednn(network: nn.Module) -> bool:
    """Whether oneDNN computes layers of a network."""
    return any(isinstance(module, OneDNNLinear) for module in network.modules())


@torch.no_grad()
def use_onednn(network: nn.Module, seconds: float = 1.0) -> int:
    """Let oneDNN compute a network's float32 linear layers on the CPU, where it is faster here; returns how many layers.

    Each shape of weight is measured with torch's present number of threads, all in about `seconds` (wide layers take
    longer, FLUX.1-dev's 5 seconds), and one line of the log says what came of it; another call decides anew. Outputs change
    in their last bits: each layer by less than a relative 1e-6. Weights, names and `state_dict` stay as they are, and no
    second copy is made: a merged LoRA, an optimizer's step or `load_state_dict` takes effect at once. With gradients, in
    another dtype, on another device, under autocast, in compiled code and for few rows a layer is torch's own, so that a
    network in training trains as before. Raises ConfigError for what is not a module.
    """
    layers: dict[tuple[int, ...], list[nn.Linear]] = {}
    for layer in unwrapped(network).modules():
        if type(layer) in (nn.Linear, OneDNNLinear) and isinstance(layer, nn.Linear) and _plain(layer.weight):
            layers.setdefault(tuple(layer.weight.shape), []).append(layer)
    total = sum(map(len, layers.values()))
    if not hasattr(torch.ops.mkldnn, OPERATOR):
        log.warning("torch %s has no torch.ops.mkldnn.%s: linear layers stay torch's own", torch.__version__, OPERATOR)
        layers = {}
    changed, lowest, work, before, after = 0, max(ROWS), 0.0, 0.0, 0.0
    for same in layers.values():
        fewest = None
        for rows in ROWS:
            flops, own, other = _measured(same[0].weight, rows, seconds / len(ROWS) / len(layers))
            if own < MARGIN * other:
                break
            fewest = rows
            work, before, after = work + flops, before + own, after + other
        for layer in same:
            layer.__class__ = nn.Linear if fewest is None else OneDNNLinear
            if isinstance(layer, OneDNNLinear) and fewest is not None:
                layer.onednn_rows = fewest
                changed, lowest = changed + 1, min(lowest, fewest)
    if changed:
        log.info("oneDNN computes %d of %d float32 linear layers on the CPU, of at least %d rows: %.0f GFLOP/s in place of %.0f", changed, total, lowest, work / after / 1e9, work / before / 1e9)  # fmt: skip
    elif not total:
        log.info("the %s has no float32 linear layer on a CPU, so oneDNN computes none", type(network).__name__)
    elif layers:
        log.info(
            "oneDNN is not faster for any of the %d float32 linear layers on the CPU: they stay torch's own", total
        )
    return changed


def _measured(weight: Tensor, rows: int, seconds: float) -> tuple[float, float, float]:
    """FLOPs of a layer with so many rows, or of its first outputs; the least seconds by torch and by oneDNN."""
    layer = OneDNNLinear(1, 1, bias=False, device="meta")
    layer.weight = nn.Parameter(weight[:OUTPUTS], requires_grad=False)
    layer.onednn_rows = rows
    x = torch.ones(rows, weight.shape[1])
    ways: list[Callable[[OneDNNLinear, Tensor], Tensor]] = [nn.Linear.forward, OneDNNLinear.forward]
    best, end, rounds = [float("inf")] * 2, time.perf_counter() + seconds, 0
    while rounds < 2 or time.perf_counter() < end:
        for way in (0, 1, 1, 0):
            begun = time.perf_counter()
            ways[way](layer, x)
            best[way] = min(best[way], time.perf_counter() - begun)
        rounds += 1
    return 2 * rows * layer.weight.numel(), best[0], best[1]
