"""What acts on a trainer's layers acts in the adopted network too, as it is at that moment: adapters, hooks, quantisation.

Everywhere the trainer's own forward of diffusers' classes is the measure, in float32, and the network has not been refreshed
since training went on.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from lycoris.modules import LoConModule, LohaModule, LokrModule
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from eridiff import FluxInference, Prompt, SD35Inference, SDXLInference, load_lora
from eridiff.blocks import checkpoint_blocks
from eridiff.errors import ConfigError, TrainingError
from eridiff.lora import attach_lora, inject_lora
from eridiff.models.flux import Flux, FluxConfig, position_ids
from eridiff.models.unet import size_vector
from eridiff.text import Conditioning
from eridiff.trace.record import relative_l2
from eridiff.training import Sampler, averaged_weights
from eridiff.training.adopt import Adopted, adopt
from eridiff.training.live import Elsewhere, reads
from eridiff.training.restore import members, stored
from eridiff.weights.keymap import key_map
from tests import adapters, tiny
from tests.test_diffusers import GRID, flux_inputs, reference_autoencoder, reference_flux, reference_sd3, scaled

BOUND = 1e-6


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_unet() -> Any:
    """With the embedding of sizes that SDXL has, so that it can draw."""
    return scaled(
        UNet2DConditionModel(
            block_out_channels=(32, 64, 128), down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
            up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"), layers_per_block=2, transformer_layers_per_block=(1, 1, 1),
            attention_head_dim=(1, 1, 2), cross_attention_dim=24, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=8 + 6 * 256, use_linear_projection=True,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Family:
    make: Callable[[], Any]
    inputs: tuple[Any, ...]  # of ours
    theirs: Callable[..., Any]  # diffusers' forward of the same
    targets: list[str]  # layers of all kinds: split here and joined there, with swapped halves, alone
    prefix: str  # of its LoRA files in kohya's format with diffusers' names
    inference: Any
    autoencoder: Any
    prompt: Any

    def ask(self, foreign: Any) -> Tensor:
        return self.theirs(foreign, *self.inputs).sample

    def distance(self, adopted: Adopted) -> float:
        """Between ours and the trainer's own forward; dropout is off, and back afterwards."""
        with torch.no_grad():
            return relative_l2(adopted.network(*self.inputs), self.ask(adopted.foreign))


def flux_forward(model: Any, x: Tensor, text: Tensor, pooled: Tensor, times: Tensor, grid: Any, scale: Tensor) -> Any:
    return model(
        hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=times[0], guidance=scale,
        img_ids=position_ids(grid), txt_ids=torch.zeros(text.shape[1], 3),
    )  # fmt: skip


def sd3_forward(model: Any, x: Tensor, text: Tensor, pooled: Tensor, times: Tensor) -> Any:
    return model(hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=1000 * times[0])


NUMBERS = torch.tensor([[64, 64, 0, 0, 64, 64]] * 2)


def unet_forward(model: Any, x: Tensor, text: Tensor, vector: Tensor, times: Tensor) -> Any:
    added = {"text_embeds": vector[:, :8], "time_ids": NUMBERS}
    return model(x, times[0], text, added_cond_kwargs=added)


def prompt(width: int) -> Prompt:
    return Prompt(Conditioning(torch.ones(1, 5, width), torch.ones(1, 8)))


FLUX = flux_inputs(torch.float32)
FAMILIES = {
    "flux": Family(
        reference_flux,
        (FLUX["latents"], FLUX["text"], FLUX["pooled"], torch.tensor([[0.25, 0.5]]), GRID, torch.tensor([2.0, 1.0])),
        flux_forward,
        ["to_q", "to_v", "add_k_proj", "proj_mlp", "proj_out", "norm.linear", "norm1.linear", "norm_out.linear", "x_embedder", "linear_1"],
        "lora_transformer_",
        FluxInference,
        tiny.autoencoder,
        prompt(12),
    ),
    "sd3": Family(
        reference_sd3,
        (rows(2, 16, 6, 8), rows(2, 5, 12), rows(2, 8), torch.tensor([[0.3, 0.9]])),
        sd3_forward,
        ["to_k", "to_out.0", "add_q_proj", "ff.net.0.proj", "norm1_context.linear", "norm_out.linear", "context_embedder"],
        "lora_transformer_",
        SD35Inference,
        tiny.autoencoder,
        prompt(12),
    ),
    "sdxl": Family(
        small_unet,
        (rows(2, 4, 8, 8), rows(2, 5, 24), size_vector(rows(2, 8), NUMBERS.float()), torch.tensor([[500.0, 20.0]])),
        unet_forward,
        ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "time_emb_proj", "ff.net.2", "conv1", "conv_shortcut", "samplers.0.conv"],
        "lora_unet_",
        SDXLInference,
        lambda: tiny.autoencoder(tiny.SDXL_AUTOENCODER),
        prompt(24),
    ),
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    torch.manual_seed(0)
    return FAMILIES[request.param]


@contextmanager
def dropout_off(*modules: nn.Module) -> Iterator[None]:
    before = [(m, m.training) for module in modules for m in module.modules()]
    for m, _ in before:
        m.training = False
    yield
    for m, training in before:
        m.training = training


def train(family: Family, foreign: nn.Module, parameters: Any, steps: int = 1) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        family.ask(foreign).square().mean().backward()
        optimizer.step()


def differs_from_file(family: Family, adopted: Adopted, path: Path) -> float:
    """Between the adopted network and ours with the LoRA's file beside the base's weights; in float64, without rounding."""
    network = adopt(family.make().double(), allow_copies=True).network
    attach_lora(network, load_lora(path, network), dtype=torch.float64)
    inputs = [x.double() if isinstance(x, Tensor) else x for x in family.inputs]
    adopted.foreign.double()
    adopted.refresh()
    with torch.no_grad():
        return relative_l2(adopted.network(*inputs), network(*inputs))


# adapters -------------------------------------------------------------------------------------------------------------


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
            assert relative_l2(adopted.network(*family.inputs), base) > 1e-2
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
    assert differs_from_file(family, adopted, tmp_path / "lora.safetensors") < 1e-9
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


def test_layers_of_one_matrix_of_ours_may_differ(family: Family) -> None:
    """An adapter on q alone; k and v are plain, and copies of what is plain elsewhere stay copies."""
    foreign = family.make()
    whole = adopt(foreign, allow_copies=True).copied_bytes
    network = adapters.kohya(foreign, ["0.attn.to_q", "0.attn1.to_q"]).eval()
    adopted = adopt(foreign, allow_copies=True)
    assert len(network.loras) > 0 and family.distance(adopted) < BOUND
    assert (0 < adopted.copied_bytes < whole) if whole else adopted.copied_bytes == 0


class OriginalNorm(nn.Module):
    """As in the original's code: what a trainer wrote itself is called, for nobody knows what its class does."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * self.scale


def under_the_originals_names(own: Flux) -> nn.Module:
    """A Flux of a trainer's own classes, as kohya's scripts have; its layers alone, since its forward is not asked."""
    tensors = key_map("flux").layouts["original"].to_foreign(own.state_dict(), {})
    whole = nn.Module()
    for name in [name for name in tensors if not name.endswith(".bias")]:
        path, _, last = name.rpartition(".")
        layer: Any = OriginalNorm(tensors[name])
        if last == "weight":
            layer = nn.Linear(*tensors[name].shape[::-1])
            layer.load_state_dict({part: tensors[f"{path}.{part}"] for part in ("weight", "bias")})
        *owners, short = path.split(".")
        owner = whole
        for part in owners:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]  # type: ignore[assignment]
        owner.add_module(short, layer)
    return whole


def test_kohyas_adapters_on_its_own_flux_act_as_their_file_does(tmp_path: Path) -> None:
    family, own = FAMILIES["flux"], tiny.flux(FluxConfig(64, 64, 8, 12, 128, 1, 4.0, 1, 1))
    foreign = under_the_originals_names(own)
    network = adapters.kohya(foreign, ["img_attn.qkv", "linear1", "mod.lin", "adaLN_modulation.1"], dropout=0.3).eval()
    adopted = adopt(foreign)
    file = network.save(tmp_path / "lora.safetensors", adapters.renamed("lora_unet_"))
    with torch.no_grad():
        plain, found = own(*family.inputs), adopted.network(*family.inputs)
        attach_lora(own, load_lora(file, own))
        assert relative_l2(found, own(*family.inputs)) < BOUND < 1e-2 < relative_l2(found, plain)
    assert len(network.loras) == 5 and adopted.copied_bytes == 0


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


# quantised ------------------------------------------------------------------------------------------------------------


def float8(foreign: nn.Module) -> None:
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    quantize_(foreign, Float8WeightOnlyConfig())


def int8(foreign: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(foreign, Int8WeightOnlyConfig())


def quanto(foreign: nn.Module) -> None:
    from optimum.quanto import freeze, qint8, quantize

    quantize(foreign, weights=qint8)
    freeze(foreign)


def casting(foreign: Any) -> None:
    foreign.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


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
        if isinstance(layer, nn.Linear):
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
def test_quantised_layers_compute_by_themselves(family: Family, quantiser: str) -> None:
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


def test_a_quantised_tensor_that_no_layer_computes_with_is_named() -> None:
    foreign = FAMILIES["sd3"].make()
    foreign.pos_embed.pos_embed = foreign.pos_embed.pos_embed.to(torch.float8_e4m3fn)
    with pytest.raises(
        ConfigError, match=r"'pos_embed.pos_embed' is quantised by torch.float8_e4m3fn .* leave it unquantised"
    ):
        adopt(foreign)


# what cannot be followed ----------------------------------------------------------------------------------------------


def test_what_acts_on_whole_blocks_is_refused_by_name(family: Family) -> None:
    foreign = family.make()
    block = next(m for m in foreign.modules() if isinstance(m, nn.ModuleList))[0]
    name, kind = next(n for n, m in foreign.named_modules() if m is block), type(block).__name__
    adopted = adopt(foreign)

    def louder(*args: Any, **options: Any) -> Any:
        raise AssertionError("never called")

    block.forward = louder
    for refused in (adopted.refresh, lambda: adopt(foreign)):
        with pytest.raises(
            ConfigError, match=rf"'{name}' \({kind}\) has a forward of its own, from tests.test_adopt_live, which"
        ):
            refused()
    del block.forward
    handles = [block.register_forward_hook(louder)]
    with pytest.raises(ConfigError, match=rf"'{name}' \({kind}\) has a forward hook, from tests.test_adopt_live"):
        adopt(foreign)
    handles.pop().remove()
    handles.append(foreign.register_forward_pre_hook(louder))
    with pytest.raises(ConfigError, match=rf"the whole network \({type(foreign).__name__}\) has a forward hook"):
        adopt(foreign)
    handles.pop().remove()
    assert family.distance(adopt(foreign)) < BOUND


def test_an_attention_processor_that_nobody_knows_is_refused(family: Family) -> None:
    class Louder:
        def __call__(self, *args: Any, **options: Any) -> Any:
            raise AssertionError("never called")

    foreign = family.make()
    attention = next(m for m in foreign.modules() if hasattr(m, "processor"))
    attention.processor = Louder()
    with pytest.raises(
        ConfigError, match=r"\(\w*Attention\) has an attention processor, from tests.test_adopt_live, which"
    ):
        adopt(foreign)


def test_bare_weights_that_are_one_matrix_here_have_to_be_copied() -> None:
    foreign = FAMILIES["flux"].make()
    attention = foreign.transformer_blocks[0].attn
    bare = nn.Module()
    bare.weight, bare.bias = attention.to_q.weight, attention.to_q.bias
    attention.to_q = bare
    with pytest.raises(
        ConfigError, match="'transformer_blocks.0.attn.to_q' has weights but no forward .* allow_copies=True"
    ):
        adopt(foreign)
    assert adopt(foreign, allow_copies=True).copied_bytes > 0


def test_what_changes_no_value_is_let_be(family: Family) -> None:
    """accelerate's mixed precision and placement, gradient checkpointing, compilation."""
    from accelerate import Accelerator
    from accelerate.hooks import CpuOffload, add_hook_to_module

    foreign = family.make()
    foreign.enable_gradient_checkpointing()
    block = next(m for m in foreign.modules() if isinstance(m, nn.ModuleList))[0]
    with checkpoint_blocks(foreign):
        adopt(foreign)
    block.forward = torch.compile(block.forward)
    adopt(foreign)
    del block.forward
    block.compile()
    add_hook_to_module(block, CpuOffload("cpu"))
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(foreign)
    assert "forward" in vars(foreign) and "forward" in vars(block)
    with torch.no_grad():
        found, plain = (adopt(module).network(*family.inputs) for module in (prepared, family.make()))
    assert torch.equal(found, plain)


def test_a_layer_that_does_not_take_our_dtype_is_named(family: Family) -> None:
    """A LoRA in float32 on a network in bfloat16, trained under autocast: it draws under autocast too."""
    foreign = family.make().bfloat16()
    adapters.kohya(foreign, family.targets).eval()
    adopted = adopt(foreign)
    inputs = [x.bfloat16() if isinstance(x, Tensor) and x.ndim > 2 else x for x in family.inputs]
    with (
        torch.no_grad(),
        pytest.raises(ConfigError, match=r"\(Linear\) does not take torch.bfloat16: .*autocast=torch.bfloat16"),
    ):
        adopted.network(*[x.bfloat16() if isinstance(x, Tensor) else x for x in inputs])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert relative_l2(adopted.network(*inputs), family.theirs(foreign, *inputs).sample) < 2e-2


def test_the_weight_of_a_layer_that_is_called_cannot_be_read(family: Family) -> None:
    foreign = family.make()
    adapters.kohya(foreign, family.targets)
    network = adopt(foreign).network
    called = [p for p in network.parameters() if isinstance(p.data, Elsewhere)]
    assert len(called) > 5 and all(p.device.type == "cpu" and p.dtype == torch.float32 for p in called)
    with pytest.raises(
        ConfigError, match="is called in the trainer's own module, so its weight can be neither read nor moved"
    ):
        called[0].sum()
    with pytest.raises(ConfigError, match="called in the trainer's own module"):
        network.double()


def test_a_lora_of_ours_beside_an_adopted_network_acts_or_is_refused(family: Family, tmp_path: Path) -> None:
    foreign = family.make()
    adopted = adopt(foreign)
    with torch.no_grad():
        plain = adopted.network(*family.inputs)
        ours = inject_lora(adopted.network, 2)
        for p in ours.parameters():
            nn.init.normal_(p, std=0.1)
        alone = adopted.network(*family.inputs)
        theirs = adapters.kohya(foreign, family.targets).eval()
        adopted.refresh()
        both = adopted.network(*family.inputs)
        theirs.set_multiplier(0)
        assert relative_l2(adopted.network(*family.inputs), alone) < BOUND
        assert relative_l2(alone, plain) > 1e-3 and relative_l2(both, alone) > 1e-3
        ours.detach()
    lokr = nn.ModuleDict(
        {
            "lora": LokrModule(
                "x",
                dict(adapters.chosen(foreign, family.targets))[theirs.names[0]],
                1.0,
                2,
                factor=2,
                weight_decompose=True,
            )
        }
    )
    name = adapters.renamed("lycoris_")(theirs.names[0])
    save_file(
        {f"{name}.{key}": t.contiguous() for key, t in lokr["lora"].state_dict().items()}, tmp_path / "dora.safetensors"
    )
    with torch.no_grad(), pytest.raises(ConfigError, match="called in the trainer's own module"):
        attach_lora(adopted.network, load_lora(tmp_path / "dora.safetensors", adopted.network))
        adopted.network(*family.inputs)


# in a Sampler ---------------------------------------------------------------------------------------------------------


def drawing(family: Family, adopted: Adopted, out: Path, **options: Any) -> Sampler:
    model = family.inference(adopted.network, family.autoencoder(), device="cpu", progress=False)
    model.encode_prompt = lambda *_: family.prompt
    section = {
        "prompts": ["a swan"],
        "sample_every": 2,
        "sample_steps": 2,
        "width": 64,
        "height": 64,
        "cfg_scale": 1,
        "seed": 1,
        "out": str(out),
    }
    return Sampler(model, section, adopted=adopted, raise_errors=True, verify=True, **options)


def pictures(sampler: Sampler, step: int) -> list[bytes]:
    return [image.tobytes() for image in sampler.sample(step).images]


def test_the_run_does_not_notice_and_the_images_follow_it(family: Family, tmp_path: Path) -> None:
    """Fifty steps with every kind of dropout of kohya's; each image is the trainer's network with dropout off."""
    curves, seen = [], set()
    for sampling in (False, True):
        torch.manual_seed(0)
        foreign = family.make()
        network = adapters.kohya(foreign, family.targets, dropout=0.3, rank_dropout=0.3, module_dropout=0.3).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
        sampler = drawing(family, adopt(foreign), tmp_path, optimizer=optimizer)
        curve = []
        for step in range(50):
            loss = family.ask(foreign).square().mean()
            loss.backward()
            if sampling and (samples := sampler.maybe_sample(step)):
                seen.add(samples.images[0].tobytes())
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(curve)
        assert all(module.training for module in network.modules())
    assert curves[0] == curves[1] and len(set(curves[0])) == 50 and len(seen) == 25
    last = pictures(sampler, 50)
    with dropout_off(network):
        assert last == pictures(sampler, 51)


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_a_quantised_network_is_drawn_and_nothing_of_it_changes(quantiser: str, tmp_path: Path) -> None:
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


def test_an_adopted_autoencoder_is_drawn_with(tmp_path: Path) -> None:
    family = FAMILIES["sdxl"]
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(32,) * 4,
        layers_per_block=1, latent_channels=4, use_quant_conv=True, use_post_quant_conv=True, scaling_factor=0.13,
    )  # fmt: skip
    foreign = family.make()
    sampler = drawing(family, adopt(foreign), tmp_path)
    adapted = adopt(vae.eval())
    sampler.inference.autoencoder = adapted.network
    before = pictures(sampler, 0)
    network = adapters.kohya(vae, ["conv1", "to_q"], dropout=0.9).train()
    adapted.refresh()
    first, second = pictures(sampler, 1), pictures(sampler, 2)
    assert first == second != before and network.training


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("kind", ["EMAModel", "EMAModel of a peft LoRA", "AveragedModel", "mapping"])
def test_averages_under_the_trainers_names_are_drawn_whole(
    family: Family, kind: str, copies: bool, tmp_path: Path
) -> None:
    """Not a mixture with the live weights, where those were copied."""
    foreign = family.make()
    lora = kind == "EMAModel of a peft LoRA"
    model: Any = (
        get_peft_model(foreign, LoraConfig(r=2, target_modules=family.targets, init_lora_weights=False))
        if lora
        else foreign.requires_grad_(True)
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    if kind.startswith("EMAModel"):
        ema: Any = EMAModel(trained, decay=0.9)
    else:
        ema = torch.optim.swa_utils.AveragedModel(model)
    adopted = adopt(model, allow_copies=copies)
    averages = {f"module.{n}": t for n, t in ema.module.named_parameters()} if kind == "mapping" else ema
    before = [p.detach().clone() for p in trained]
    train(family, foreign, trained, 2)
    sampler = drawing(family, adopted, tmp_path, ema=averages)
    live, averaged = pictures(sampler, 0)
    with torch.no_grad():
        for p, old in zip(trained, before, strict=True):
            p.copy_(old)
    assert pictures(sampler, 1)[0] == averaged != live
    held = [p for p in adopted.network.parameters() if type(p.data) is Tensor and not p.is_meta]
    theirs = {p.data_ptr() for p in foreign.parameters()} | {
        foreign_buffer.data_ptr() for foreign_buffer in foreign.buffers()
    }
    assert all(p.data_ptr() in theirs for p in held)  # no average is left behind


def test_averages_of_another_number_of_parameters_are_refused(tmp_path: Path) -> None:
    family = FAMILIES["flux"]
    foreign = family.make()
    network = adapters.kohya(foreign, family.targets)
    with pytest.raises(
        ConfigError, match=r"EMAModel keeps \d+ averages, FluxTransformer2DModel has \d+ parameters, 0 of them trained"
    ):
        drawing(family, adopt(foreign), tmp_path, ema=EMAModel(network.parameters()))


def test_an_adapters_averages_and_the_base_are_drawn_beside_it(family: Family, tmp_path: Path) -> None:
    foreign = family.make()
    plain = pictures(drawing(family, adopt(foreign), tmp_path), 0)[0]
    network = adapters.ai_toolkit(foreign, family.targets, dropout=0.5).train()
    averages = {name: 0.5 * p.detach() for name, p in network.named_parameters()}

    @contextmanager
    def switched_off() -> Iterator[None]:
        network.is_active = False
        yield
        network.is_active = True

    weights: Any = {"base": switched_off, "ema": lambda: averaged_weights(network, averages)}
    live, base, averaged = pictures(drawing(family, adopt(foreign), tmp_path, weights=weights), 1)
    assert base == plain and len({live, base, averaged}) == 3
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(0.5)
    assert pictures(drawing(family, adopt(foreign), tmp_path), 2)[0] == averaged


def recipes() -> dict[str, Any]:
    """The functions of docs/training.md that switch an adapter off."""
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    blocks = [part.partition("```")[0] for part in text.split("```python\n")[1:]]
    found: dict[str, Any] = {}
    exec(next(block for block in blocks if "def without_peft" in block), found)
    return found


def lycoris(foreign: nn.Module, targets: list[str]) -> nn.Module:
    """DoRA, which is not off at a multiplier of 0."""
    network = nn.Module()
    loras = [
        LoConModule(name, layer, 1.0, 2, 3.0, weight_decompose=True)
        for name, layer in adapters.chosen(foreign, targets)
    ]
    network.loras = nn.ModuleList(loras)
    for lora in loras:
        lora.apply_to()
        nn.init.normal_(lora.lora_up.weight, std=0.1)
    return network


@pytest.mark.parametrize("name", ["peft", "adapters", "kohya", "ai_toolkit", "lycoris", "hooks"])
def test_the_documents_ways_to_the_base_give_the_base(family: Family, name: str, tmp_path: Path) -> None:
    foreign = family.make()
    plain = pictures(drawing(family, adopt(foreign), tmp_path), 0)[0]
    config = LoraConfig(r=2, target_modules=family.targets, lora_dropout=0.3, init_lora_weights=False)
    if name == "peft":
        held: Any = get_peft_model(foreign, config)
    elif name == "adapters":
        foreign.add_adapter(config)
        held = foreign
    elif name == "hooks":
        network = adapters.hooks(foreign, family.targets)
        held = [foreign.get_submodule(layer) for layer in network.names]
    else:
        held = {"kohya": adapters.kohya, "ai_toolkit": adapters.ai_toolkit, "lycoris": lycoris}[name](
            foreign, family.targets
        )
    way = recipes()[f"without_{name}"]
    sampler = drawing(family, adopt(foreign), tmp_path, weights={"base": lambda: way(held)})
    live, base = pictures(sampler, 1)
    assert base == plain != live and pictures(sampler, 2) == [live, base]


def test_adapters_on_text_encoders_act_and_follow_the_kind_of_weights(tmp_path: Path) -> None:
    model = tiny.load(FluxInference, tiny.write_model(tmp_path / "model"))
    section = {"prompts": ["a swan on mars"], "sample_steps": 1, "seed": 5, "out": str(tmp_path / "samples")}
    plain = pictures(Sampler(model, section), 0)[0]
    networks = [
        adapters.kohya(encoder.module, targets, dropout=0.5, module_dropout=0.5).train()
        for encoder, targets in ((model.clip, ["q_proj", "fc1"]), (model.t5, ["SelfAttention.q", "wo"]))
    ]

    @contextmanager
    def base() -> Iterator[None]:
        for network in networks:
            network.set_multiplier(0)
        yield
        for network in networks:
            network.set_multiplier(1)

    sampler = Sampler(model, section, text_in_training=True, weights={"base": base}, verify=True, raise_errors=True)
    assert all(len(network.loras) > 2 for network in networks)
    live, without = pictures(sampler, 1)
    assert without == plain != live
    with dropout_off(*networks):
        drawn = model.generate("a swan on mars", steps=1, seed=5)
        assert drawn.images[0].tobytes() == live
    for network in networks:
        for p in network.parameters():
            p.data.mul_(2)
    assert pictures(sampler, 2) != [live, without] and pictures(sampler, 3)[1] == without
