"""What acts on a trainer's layers acts in the adopted network too, as it is at that moment.

Everywhere the trainer's own forward of diffusers' classes is the measure, in float32, and the network is not refreshed since
training went on.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules import FullModule, LoConModule, LohaModule, LokrModule
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from eridiff import SDXLInference, load_lora
from eridiff.adopt import adopt
from eridiff.adopt.layers import reads
from eridiff.lora import attach_lora
from eridiff.models.autoencoder import AutoencoderConfig
from eridiff.models.flux import FluxConfig
from eridiff.models.mmdit import MMDiTConfig
from eridiff.trace.record import relative_l2
from eridiff.training.restore import members
from eridiff.weights.detect import sizes_of
from eridiff.weights.keymap import key_map
from tests import adapters, tiny
from tests.test_diffusers import reference_autoencoder
from tests.test_handing_in import under_the_originals_names as bare_tensors
from tests.trainers import BOUND, FAMILIES, Family, differs_from_file, dropout_off, rows, train


@pytest.mark.parametrize("way", adapters.WAYS)
def test_an_adapter_in_training_acts_as_in_the_trainers_own_forward(family: Family, way: str, tmp_path: Path) -> None:
    foreign = family.make()
    early = adopt(foreign)
    with torch.no_grad():
        base = family.ask(foreign)
    network = adapters.WAYS[way](foreign, family.targets).train()
    early.refresh()  # it was put on after the adoption
    with dropout_off(network):
        for adopted in (early, adopt(foreign)):
            assert family.distance(adopted) < BOUND
            assert relative_l2(family.ask(foreign).detach(), base) > 1e-2
    train(family, foreign, network.parameters(), 2)
    with dropout_off(network):
        assert family.distance(early) < BOUND
        if way != "pre-hook":
            file = network.save(tmp_path / "lora.safetensors", adapters.renamed(family.prefix))
            network.double()
            assert differs_from_file(family, adopted, file) < 1e-9


LYCORIS: dict[str, tuple[Any, dict[str, Any]]] = {
    "locon": (LoConModule, {}),
    "locon, DoRA": (LoConModule, {"weight_decompose": True}),
    "loha": (LohaModule, {}),
    "lokr": (LokrModule, {"factor": 2}),
    "full": (FullModule, {}),  # takes the layer's own weight and bias away
}


@pytest.mark.parametrize("kind", LYCORIS)
def test_lycoris_own_classes_act(family: Family, kind: str, tmp_path: Path) -> None:
    foreign = family.make()
    module, options = LYCORIS[kind]
    found = dict(adapters.chosen(foreign, family.targets))
    loras = [module(name, layer, 1.0, 2, 3.0, 0.2, 0.2, 0.2, **options) for name, layer in found.items()]
    for lora in loras:
        lora.apply_to()
        for p in lora.parameters():
            nn.init.normal_(p, mean=float(p.ndim == 2 and 1 in p.shape), std=0.1)  # around 1 for lengths of DoRA
    network = nn.ModuleList(loras).eval()
    adopted = adopt(foreign)
    assert family.distance(adopted) < BOUND
    train(family, foreign, network.parameters())
    assert family.distance(adopted) < BOUND
    prefix = adapters.renamed("lycoris_")
    tensors = {
        f"{prefix(n)}.{key}": t.contiguous()
        for n, lora in zip(found, loras, strict=True)
        for key, t in lora.state_dict().items()
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    network.double()
    bound = BOUND if kind == "full" else 1e-9  # its file holds differences, which were rounded
    assert differs_from_file(family, adopted, tmp_path / "lora.safetensors") < bound
    for lora in loras:
        lora.restore()
    foreign.float()
    adopted.refresh()
    assert family.distance(adopted) < BOUND and all(reads(layer) for layer in found.values())


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_layers_of_peft_act_and_their_file_gives_the_same(family: Family, options: Any, tmp_path: Path) -> None:
    foreign = family.make()
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=family.targets, lora_dropout=0.3, init_lora_weights=False, **options
    )
    foreign.add_adapter(config)
    adopted = adopt(foreign.eval())
    assert family.distance(adopted) < BOUND
    train(family, foreign, [p for p in foreign.parameters() if p.requires_grad])
    assert family.distance(adopted) < BOUND
    prefix = "unet." if family.inference is SDXLInference else "transformer."
    tensors = {f"{prefix}{name}": t.contiguous() * 1 for name, t in get_peft_model_state_dict(foreign).items()}
    for name in list(tensors):
        if "lora_B" in name:
            tensors[name] = tensors[name] * 2  # alpha / rank: a file without metadata has none
    save_file(tensors, tmp_path / "lora.safetensors")
    with torch.no_grad():
        found = adopted.network(*family.inputs)
        foreign.disable_adapters()
        assert family.distance(adopted) < BOUND and relative_l2(adopted.network(*family.inputs), found) > 1e-2
        foreign.enable_adapters()
    assert differs_from_file(family, adopted, tmp_path / "lora.safetensors") < 1e-9


PEFT: dict[str, Any] = {
    "loha": lambda targets: LoHaConfig(r=2, target_modules=targets, init_weights=False),
    "lokr": lambda targets: LoKrConfig(r=2, target_modules=targets, init_weights=False),
    "oft": lambda targets: OFTConfig(r=0, oft_block_size=4, target_modules=targets, init_weights=False),
    "ia3": lambda targets: IA3Config(target_modules=targets, feedforward_modules=[], init_ia3_weights=False),
    "a whole layer": lambda targets: LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False, modules_to_save=["proj_out"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", PEFT)
def test_every_kind_of_peft_acts(family: Family, kind: str) -> None:
    foreign = family.make()
    with torch.no_grad():
        base = family.ask(foreign)
    targets = [name for name in family.targets if name.startswith(("to_", "add_")) and "out" not in name]
    model = get_peft_model(foreign, PEFT[kind](targets)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    adopted = adopt(model)
    assert family.distance(adopted) < BOUND
    with torch.no_grad():
        assert relative_l2(adopted.network(*family.inputs), base) > 1e-3


def test_layers_of_one_fused_matrix_may_differ(family: Family) -> None:
    """An adapter on q alone; k and v are plain, and copies of what is plain elsewhere stay copies."""
    foreign = family.make()
    whole = adopt(foreign, allow_copies=True).copied_bytes
    network = adapters.kohya(foreign, ["0.attn.to_q", "0.attn1.to_q"]).eval()
    adopted = adopt(foreign, allow_copies=True)
    assert len(network.loras) > 0 and family.distance(adopted) < BOUND
    assert (0 < adopted.copied_bytes < whole) if whole else adopted.copied_bytes == 0


class OriginalNorm(nn.Module):
    """As in the original's code: what a trainer wrote itself is called, for nobody knows what its class does."""

    def __init__(self, name: str, scale: Tensor) -> None:
        super().__init__()
        self.name = name
        self.register_parameter(name, nn.Parameter(scale))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * self._parameters[self.name]


def under_the_originals_names(own: Any, network: str) -> nn.Module:
    """A Flux or an SD 3 of a trainer's own classes, as kohya's scripts have; its layers alone, since its forward is not asked."""
    tensors = key_map(network).layouts["original"].to_foreign(own.state_dict(), sizes_of(own.config))
    whole = nn.Module()
    for name in [name for name in tensors if not name.endswith(".bias")]:
        path, _, last = name.rpartition(".")
        if not path:  # SD 3's table of positions
            whole.register_buffer(name, tensors[name])
            continue
        shape = tensors[name].shape
        layer: Any = OriginalNorm(last, tensors[name])
        if last == "weight" and len(shape) > 1:
            layer = nn.Conv2d(shape[1], shape[0], shape[2:], shape[2:]) if len(shape) == 4 else nn.Linear(*shape[::-1])
            layer.load_state_dict({part: tensors[f"{path}.{part}"] for part in ("weight", "bias")})
        *owners, short = path.split(".")
        owner = whole
        for part in owners:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]  # type: ignore[assignment]
        owner.add_module(short, layer)
    return whole


ORIGINALS: dict[str, tuple[Callable[[], Any], str, list[str]]] = {  # kohya's own classes
    "flux": (lambda: tiny.flux(FluxConfig(64, 64, 8, 12, 128, 1, 4.0, 1, 1)), "flux", ["img_attn.qkv", "linear1", "mod.lin", "adaLN_modulation.1"]),
    "sd3": (
        lambda: tiny.mmdit(MMDiTConfig(16, 16, 8, 12, 128, 2, 2.0, depth=2, table_side=6, dual_blocks=(0,))), "mmdit",
        ["attn.qkv", "attn2.proj", "mlp.fc1", "adaLN_modulation.1", "context_embedder", "x_embedder.proj"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ORIGINALS)
def test_kohyas_adapters_on_its_own_networks_act_as_their_file_does(name: str, tmp_path: Path) -> None:
    make, network, targets = ORIGINALS[name]
    family, own = FAMILIES[name], make()
    foreign = under_the_originals_names(own, network)
    vae = bare_tensors(tiny.autoencoder(), "vae")  # the statistics are in no tensor
    inference = family.inference.from_diffusers(transformer=foreign, vae=vae, progress=False)
    adopted = inference.adopted[0]
    with torch.no_grad():
        plain = own(*family.inputs)
        assert relative_l2(adopted.network(*family.inputs), plain) < BOUND
        loras = adapters.kohya(foreign, targets, dropout=0.3).eval()
        adopted.refresh()
        file = loras.save(tmp_path / "lora.safetensors", adapters.renamed("lora_unet_"))
        found = adopted.network(*family.inputs)
        attach_lora(own, load_lora(file, own))
        assert relative_l2(found, own(*family.inputs)) < BOUND < 1e-2 < relative_l2(found, plain)
    assert len(loras.loras) >= 5 and adopted.copied_bytes == 0
    usual = AutoencoderConfig.preset(name)
    assert (inference.autoencoder.config.scale, inference.autoencoder.config.shift) == (usual.scale, usual.shift)


def test_two_adapters_on_a_layer_and_their_strength_act(family: Family) -> None:
    foreign = family.make()
    first = adapters.kohya(foreign, family.targets).eval()
    second = adapters.ai_toolkit(foreign, family.targets).eval()
    adopted = adopt(foreign)
    found = []
    for multiplier, is_active in ((1.0, True), (0.5, True), (0.0, False)):
        first.set_multiplier(multiplier)
        second.is_active = is_active
        assert family.distance(adopted) < BOUND
        with torch.no_grad():
            found.append(adopted.network(*family.inputs))
    assert relative_l2(found[0], found[1]) > 1e-3 and relative_l2(found[1], found[2]) > 1e-3
    plain = adopt(family.make())
    with torch.no_grad():
        assert relative_l2(found[2], plain.network(*family.inputs)) < BOUND


def test_everything_that_acts_is_found_with_a_name_of_its_own(family: Family) -> None:
    """For evaluation mode, restoring and hashing: two adapters on a layer, functions, hooks, objects that hold modules."""

    class Holder:
        def __init__(self, *held: nn.Module) -> None:
            self.held = held

        def __call__(self, _: Any, __: Any, output: Tensor) -> Tensor:
            return output

        def hook(self, _: Any, __: Any, output: Tensor) -> Tensor:
            return output

    foreign = family.make()
    layer = next(m for m in foreign.modules() if isinstance(m, nn.Linear))
    networks = [
        adapters.kohya(foreign, family.targets),
        adapters.kohya(foreign, family.targets),
        adapters.ai_toolkit(foreign, family.targets),
    ]
    held = [nn.Dropout() for _ in range(6)]
    layer.register_forward_hook(Holder(held[0]))
    layer.register_forward_hook(Holder(held[1]).hook)
    layer.register_forward_pre_hook(lambda _, args, inner=held[2]: args)
    layer.register_forward_pre_hook(partial(lambda inner, _, args: args, held[3]))
    before, inside = layer.forward, {"a": [held[4]]}
    layer.forward = lambda x: held[5](before(x)) if inside else x
    found = members({"network": foreign}).values()
    wanted = [
        *foreign.modules(),
        *held,
        *(m for network in networks for m in network.loras.modules() if m is not network.loras),
    ]
    assert {id(m) for m in wanted} <= {id(m) for m in found}


def test_norms_are_called_too_where_something_acts_on_them(family: Family) -> None:
    foreign = family.make()
    acted = 0
    for module in foreign.modules():
        if module._parameters.get("weight") is not None and "norm" in type(module).__name__.lower():
            module.register_forward_hook(lambda _, __, out: 1.1 * out)
            acted += 1
    adopted = adopt(foreign)
    assert acted > 5 and family.distance(adopted) < BOUND
    assert relative_l2(adopted.network(*family.inputs).detach(), family.ask(family.make()).detach()) > 1e-3


def test_an_autoencoders_linear_attention_is_called_by_our_convolutions() -> None:
    torch.manual_seed(0)
    foreign = reference_autoencoder(True)
    network = adapters.kohya(foreign, ["to_q", "to_out.0", "conv1", "quant_conv"]).eval()
    adopted = adopt(foreign)
    x = rows(1, 3, 16, 24)
    with torch.no_grad():
        theirs = foreign.decode(foreign.encode(x).latent_dist.mean).sample
        assert len(network.loras) > 8 and relative_l2(adopted.network(x), theirs) < 1e-5
