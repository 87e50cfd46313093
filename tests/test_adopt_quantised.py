"""Quantised layers of a trainer compute by themselves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eridiff import load_lora
from eridiff.adopt import adopt
from eridiff.errors import ConfigError, TrainingError
from eridiff.lora import attach_lora
from eridiff.trace.record import relative_l2
from eridiff.training.restore import stored
from tests import adapters
from tests.trainers import BOUND, FAMILIES, Family, drawing, pictures


def float8(foreign: nn.Module) -> None:
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    quantize_(foreign, Float8WeightOnlyConfig(set_inductor_config=False))


def int8(foreign: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(foreign, Int8WeightOnlyConfig(set_inductor_config=False))


def quanto(foreign: nn.Module) -> None:
    from optimum.quanto import freeze, qint8, quantize

    quantize(foreign, weights=qint8)
    freeze(foreign)


def casting(foreign: Any) -> None:
    from diffusers.hooks import apply_layerwise_casting

    if hasattr(foreign, "enable_layerwise_casting"):
        foreign.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    else:  # a text encoder
        apply_layerwise_casting(
            foreign, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=("DenseReluDense.wo",)
        )


class Packed(nn.Linear):
    """As bitsandbytes' nf4: a subclass whose weight is one column of bytes, beside it what unpacks them."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.register_buffer("absmax", layer.weight.detach().abs().max())
        values = (layer.weight.detach() / self.absmax * 7 + 8).round().to(torch.uint8)
        self.weight = nn.Parameter(values.view(-1, 1), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight.view(self.out_features, self.in_features).to(x.dtype) - 8) / 7 * self.absmax
        return nn.functional.linear(x, weight, self.bias)


def packed(foreign: nn.Module) -> None:
    for name, layer in list(foreign.named_modules()):
        if isinstance(layer, nn.Linear) and not name.endswith("DenseReluDense.wo"):  # transformers keeps T5's as it is
            owner, _, last = name.rpartition(".")
            foreign.get_submodule(owner)._modules[last] = Packed(layer)


QUANTISERS = {
    "torchao float8": float8,
    "torchao int8": int8,
    "quanto int8": quanto,
    "layerwise casting": casting,
    "4 bits": packed,
}


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_quantised_layers_compute_by_themselves(family: Family, quantiser: str, tmp_path: Path) -> None:
    """With an adapter in training too, whose file gives the same beside a base that is quantised alike."""
    foreign = family.make()
    with torch.no_grad():
        base = family.ask(foreign)
    QUANTISERS[quantiser](foreign.requires_grad_(False))
    adopted = adopt(foreign, allow_copies=True)
    assert family.distance(adopted) < BOUND
    spared = (
        ("norm_out.linear", "2.norm1_context.linear") if quantiser == "layerwise casting" else ()
    )  # it leaves norms out
    assert adopted.copied_bytes == sum(
        p.nbytes for n, p in foreign.named_parameters() if n.rpartition(".")[0].endswith(spared)
    )
    with torch.no_grad():
        assert 1e-4 < relative_l2(adopted.network(*family.inputs), base) < 1
    network = adapters.kohya(foreign, family.targets).eval()
    adopted.refresh()
    assert family.distance(adopted) < BOUND and len(network.loras) > 5
    again = family.make()
    QUANTISERS[quantiser](again.requires_grad_(False))
    with torch.no_grad():
        before = adopted.network(*family.inputs)
        for p in network.parameters():
            p.mul_(1.5)
        after, ours = adopted.network(*family.inputs), adopt(again).network
        file = network.save(tmp_path / "lora.safetensors", adapters.renamed(family.prefix))
        attach_lora(ours, load_lora(file, ours))
        assert family.distance(adopted) < BOUND < 1e-3 < relative_l2(after, before)
        assert relative_l2(ours(*family.inputs), after) < 3e-6  # sums in another order; 1.3e-6 was measured


def test_a_quantised_tensor_that_no_layer_computes_with_is_named() -> None:
    foreign = FAMILIES["sd3"].make()
    foreign.pos_embed.pos_embed = foreign.pos_embed.pos_embed.to(torch.float8_e4m3fn)
    with pytest.raises(
        ConfigError, match=r"'pos_embed.pos_embed' is quantised by torch.float8_e4m3fn .* leave it unquantised"
    ):
        adopt(foreign)


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_a_quantised_network_generates_and_nothing_of_it_changes(quantiser: str, tmp_path: Path) -> None:
    family = FAMILIES["sd3"]
    foreign = family.make().requires_grad_(False)
    QUANTISERS[quantiser](foreign)
    network = adapters.kohya(foreign, family.targets, dropout=0.5).train()
    sampler = drawing(family, adopt(foreign), tmp_path, optimizer=torch.optim.SGD(network.parameters(), lr=0.1))
    first = pictures(sampler, 0)
    for p in network.parameters():
        p.data.mul_(2)
    assert pictures(sampler, 1) != first
    weight = next(m for m in foreign.modules() if isinstance(m, nn.Linear)).weight
    held = stored(weight)[0].detach()
    with torch.no_grad(), pytest.raises(TrainingError, match="changed the parameter adopted"):
        sampler.callbacks.append(lambda _: held.copy_(torch.zeros_like(held)))
        sampler.sample(2)
