"""Training a LoRA: nothing changes at first, gradients, presets, dropout, autocast, checkpointing, saving and going on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eridiff.blocks import checkpoint_blocks
from eridiff.errors import LoraError
from eridiff.lora import (
    Lora,
    LoraSet,
    attach_lora,
    inject_lora,
    load_lora,
    save_lora,
)
from eridiff.models.flux import Flux, FluxConfig
from eridiff.models.mmdit import MMDiT, MMDiTConfig
from eridiff.models.unet import UNet, UNetConfig
from tests import tiny
from tests.loras import (
    FAMILIES,
    arguments,
    ask,
    bits,
    every_kind_on_flux,
    features,
    filled,
    layers,
    same,
    some_lora,
    unchanged,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_lora_changes_nothing_bit_for_bit(family: str) -> None:
    network = FAMILIES[family]()
    with torch.no_grad():
        plain = ask(network)
    lora = inject_lora(network, 4, dropout=0.5)
    assert torch.equal(ask(network), plain)
    filled(lora)
    assert not same(ask(network), plain, 1e-3)


def test_gradients_reach_the_branches_and_on_request_the_base() -> None:
    network = tiny.flux()
    lora = filled(inject_lora(network, 2))
    ask(network).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in lora.parameters())
    assert all(p.grad is None for p in network.parameters())
    weight = network.double_blocks[0].image.qkv.weight.requires_grad_(True)
    ask(network).square().mean().backward()
    assert weight.grad is not None and bool(weight.grad.any())
    assert [n for n, p in network.named_parameters() if p.grad is not None] == ["double_blocks.0.image.qkv.weight"]


def test_gradients_of_every_kind_equal_differences_of_the_loss() -> None:
    g = torch.Generator().manual_seed(2)
    for network, layer, one in layers("flux"):
        lora, x = attach_lora(network, one, 0.7, trainable=True), features(layer)
        layer(x).sin().sum().backward()
        for name, p in lora.named_parameters():
            direction = torch.randn(p.shape, generator=g, dtype=torch.float64)
            values = []
            with torch.no_grad():
                for size in (1e-5, -1e-5):
                    p += size * direction
                    values.append(float(layer(x).sin().sum()))
                    p -= size * direction
            found, expected = float((p.grad * direction).sum()), (values[0] - values[1]) / 2e-5
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-4), name
        lora.detach()


# targets


@pytest.mark.parametrize(
    "make, targets, counted",
    [
        (lambda: Flux(FluxConfig.preset("dev")), None, "flux"),
        (lambda: MMDiT(MMDiTConfig.preset("sd3.5-medium")), None, "sd3.5-medium"),
        (lambda: MMDiT(MMDiTConfig.preset("sd3.5-large")), "joint-attention", "sd3.5-large"),
        (lambda: UNet(UNetConfig.preset("base")), None, "sdxl attention"),
        (lambda: UNet(UNetConfig.preset("base")), "cross-attention", "sdxl"),
        (lambda: UNet(UNetConfig.preset("base")), "transformers", "sdxl transformers"),
        (lambda: Flux(FluxConfig.preset("dev")), "all-linear", "flux all"),
        (lambda: MMDiT(MMDiTConfig.preset("sd3.5-medium")), "all-linear", "sd3.5-medium all"),
        (lambda: UNet(UNetConfig.preset("base")), "all-linear", "sdxl all"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_presets_choose_the_same_weights_as_in_diffusers_networks(
    make: Callable[[], Any], targets: str | None, counted: str
) -> None:
    with torch.device("meta"):
        network = make()
    lora = inject_lora(network, 1, targets=targets)
    own = sum(network.get_submodule(target.module).weight.numel() for target in lora.targets())
    assert (own, len(lora.targets())) == diffusers_weights(counted)


def diffusers_weights(which: str) -> tuple[int, int]:
    """Weights in the same layers of diffusers' class, and how many fused layers they make, by its own structure."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

    name = which.split()[0]
    with torch.device("meta"):
        if name == "flux":
            network: Any = FluxTransformer2DModel(guidance_embeds=True)
        elif name == "sdxl":
            network = UNet2DConditionModel(
                sample_size=128, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(320, 640, 1280),
                transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
                use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            )  # fmt: skip
        else:
            medium = name == "sd3.5-medium"
            layers = 24 if medium else 38
            network = SD3Transformer2DModel(
                num_layers=layers, num_attention_heads=layers, joint_attention_dim=4096, caption_projection_dim=64 * layers,
                pooled_projection_dim=2048, qk_norm="rms_norm", pos_embed_max_size=192,
                dual_attention_layers=tuple(range(13)) if medium else (),
            )  # fmt: skip
    linears = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear)}
    if not which.endswith("all"):
        inside = {
            "flux": "transformer_blocks", "sdxl": ".attn2.", "sdxl attention": ".attn", "sdxl transformers": ".attentions.",
        }.get(which, ".attn")  # fmt: skip
        linears = {n: m for n, m in linears.items() if inside in n and not ("norm" in n and name != "flux")}
    fused = {"to_q": 3, "add_q_proj": 3} if name != "sdxl" else {}
    count = 0
    for n in linears:
        part = n.rpartition(".")[2]
        if name != "sdxl" and part in ("to_k", "to_v", "add_k_proj", "add_v_proj", "proj_mlp"):
            continue
        count += 1
    assert fused or name == "sdxl"
    return sum(m.weight.numel() for m in linears.values()), count


def test_patterns_choose_layers_and_convolutions_that_they_name() -> None:
    network = tiny.unet()

    def chosen(targets: Any) -> list[str]:
        lora = inject_lora(network, 1, targets=targets)
        lora.detach()
        return [str(target) for target in lora.targets()]

    assert chosen("conv_in") == ["conv_in"]
    assert chosen(["*.conv2", "time_in.*"]) == [
        n for n, _ in network.named_modules() if n.endswith(".conv2") or (n.startswith("time_in.") and "layer" in n)
    ]
    assert set(chosen("all-linear")) == {n for n, m in network.named_modules() if isinstance(m, nn.Linear)}
    assert set(chosen("*")) == set(chosen("all-linear"))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"dropout": 1.0}, "dropout in [0, 1)"),
        ({"alpha": 0}, "alpha must be a number other than 0"),
        ({"alpha": float("nan")}, "alpha must be a number"),
        (
            {"targets": "cross-attn"},
            "no linear layer or convolution matches 'cross-attn'; presets are attention, cross-attention,",
        ),
        ({"targets": ["double_blocks.*", "single.*"]}, "matches 'single.*'"),
        ({"targets": "cross-attention"}, "Flux has no module for the targets *.cross_attention.*"),
        ({"targets": "double_blocks.0.image.q_norm"}, "matches 'double_blocks.0.image.q_norm'"),
    ],
)
def test_what_cannot_be_injected_is_refused_in_a_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(LoraError) as error:
        inject_lora(tiny.flux(), **{"rank": 2, **options})
    assert words in str(error.value)


# a module of another library


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.last = nn.Linear(4, 6), nn.Conv2d(1, 1, 3, padding=1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(self.first(x)[:, None])[:, 0].tanh())


def plain(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Plain().double().requires_grad_(False)


def test_steps_of_an_optimizer_lower_the_loss_and_leave_the_base() -> None:
    network = plain()
    before, x = bits(network), torch.randn(8, 5, 4, dtype=torch.float64)
    wanted = plain(1)(x)
    lora = inject_lora(network, 4, targets=["first", "conv", "last"], dtype=torch.float64)
    optimizer = torch.optim.AdamW(lora.parameters(), 0.02)
    losses = [step(network, optimizer, x, wanted) for _ in range(60)]
    assert losses[-1] < losses[0] / 3 and unchanged(network, before)


def step(network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, wanted: Tensor) -> float:
    optimizer.zero_grad()
    loss = (network(x) - wanted).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_dropout_acts_while_the_lora_trains_and_only_on_its_branches() -> None:
    network = plain()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    lora = filled(inject_lora(network, 4, dropout=0.5, targets="*", dtype=torch.float64))
    assert lora.training
    torch.manual_seed(0)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert not torch.equal(network(x), network(x))
    lora.eval()
    still = network(x)
    assert torch.equal(network.train()(x), still)
    lora.train()
    lora.set_scale(0.0)
    lora_free = network(x)
    lora.detach()
    assert torch.equal(network(x), lora_free)
    lora.set_scale(1.0)
    lora.attach()
    with torch.no_grad():  # on the average the branch is what it is without dropout
        mean = sum(network.first(x) for _ in range(2000)) / 2000
        lora.eval()
        assert same(mean, network.first(x), 0.05)
    assert not attach_lora(network, lora.lora()).training


# precision and memory


def test_under_autocast_outputs_and_gradients_are_finite_and_close() -> None:
    network = tiny.flux()
    items = tuple(i for i in every_kind_on_flux(network).items if i.kind != "norm")
    lora = attach_lora(network, Lora(items), 0.7, trainable=True)
    found, gradients = [], []
    for enabled in (False, True):
        lora.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = ask(network)
        output.float().square().mean().backward()
        found.append(output.detach().float())
        gradients.append(torch.cat([p.grad.flatten() for p in lora.parameters()]))
    assert same(found[1], found[0], 0.05) and not torch.equal(found[1], found[0])
    assert bool(gradients[1].isfinite().all()) and same(gradients[1], gradients[0], 0.2)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_gives_the_same_gradients_bit_for_bit(family: str) -> None:
    network = FAMILIES[family]()
    lora = filled(inject_lora(network, 2, dropout=0.3))
    gradients = []
    for nested in (0, 1, 2):
        lora.zero_grad()
        torch.manual_seed(0)
        latents, given = arguments(network)
        run = network.prepare(*given)
        if nested == 0:
            output = network.step(latents, run, 0)
        elif nested == 1:
            with checkpoint_blocks(network):
                output = network.step(latents, run, 0)
        else:
            with checkpoint_blocks(network), checkpoint_blocks(network):
                output = network.step(latents, run, 0)
        output.square().mean().backward()
        gradients.append([p.grad for p in lora.parameters()])
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other, strict=True))
    assert not any("forward" in vars(module) for module in network.modules())


def test_a_bfloat16_base_trains_branches_in_float32() -> None:
    network = tiny.flux().bfloat16()
    lora = inject_lora(network, 2)
    output = ask(network)
    assert output.dtype == torch.bfloat16 and {p.dtype for p in lora.parameters()} == {torch.float32}
    output.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in lora.parameters())


# saving and going on


@pytest.mark.parametrize("how", ["file", "state"])
def test_training_that_was_saved_goes_on_bit_for_bit(how: str, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(4, 5, 4, generator=g).double(), torch.randn(4, 5, 2, generator=g).double()) for _ in range(6)
    ]
    options = {"targets": ["last", "conv", "first"], "alpha": 3.0, "dtype": torch.float64}

    def new(network: nn.Module) -> LoraSet:
        return inject_lora(network, 7, generator=torch.Generator().manual_seed(3), **options)

    network = plain()
    lora = new(network)
    optimizer = torch.optim.AdamW(lora.parameters(), 0.05)
    for batch in batches:
        step(network, optimizer, *batch)

    first = plain()
    half = new(first)
    optimizer = torch.optim.AdamW(half.parameters(), 0.05)
    for batch in batches[:3]:
        step(first, optimizer, *batch)
    state = optimizer.state_dict()
    second = plain()
    if how == "file":
        save_lora(half, tmp_path / "half.safetensors")
        loaded = load_lora(tmp_path / "half.safetensors", second)
        other = attach_lora(second, loaded, trainable=True, dtype=torch.float64)
    else:
        other = inject_lora(second, 7, **options)
        other.load_state_dict(half.state_dict())
    optimizer = torch.optim.AdamW(other.parameters(), 0.05)
    optimizer.load_state_dict(state)
    for batch in batches[3:]:
        step(second, optimizer, *batch)
    for a, b in zip(lora.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(network(batches[0][0]), second(batches[0][0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_lora_of_a_network_comes_back_in_the_networks_order(family: str, tmp_path: Path) -> None:
    network = FAMILIES[family]()
    lora = filled(inject_lora(network, 2, alpha=0.3))
    names = [name for name, _ in lora.named_parameters()]
    found = ask(network)
    state = {name: tensor.clone() for name, tensor in lora.state_dict().items()}
    save_lora(lora, tmp_path / "lora.safetensors")
    lora.detach()
    again = attach_lora(network, load_lora(tmp_path / "lora.safetensors", network), trainable=True, dtype=torch.float32)
    assert [name for name, _ in again.named_parameters()] == names and torch.equal(ask(network), found)
    assert all(torch.equal(state[name], tensor) for name, tensor in again.state_dict().items())


def test_a_state_of_another_lora_is_refused() -> None:
    network = plain()
    lora = inject_lora(network, 2, targets="first")
    state = lora.state_dict()
    lora.detach()
    for other in ({"targets": "last"}, {"targets": "first", "rank": 3}):
        with pytest.raises(RuntimeError, match="Missing key|size mismatch"):
            inject_lora(network, **{"rank": 2, **other}).load_state_dict(state)  # type: ignore[arg-type]
    with pytest.raises(LoraError, match="the state is of a LoRA with other alphas"):
        inject_lora(network, 2, alpha=5, targets="first").load_state_dict(state)
    assert inject_lora(network, 2, targets="first").load_state_dict(state)


def test_every_kind_of_branch_comes_back_from_a_state() -> None:
    network = tiny.flux()
    branches = Lora(tuple(i for i in every_kind_on_flux(network).items if i.kind not in ("norm", "set")))
    lora = attach_lora(network, branches, trainable=True)
    found, state = ask(network), {name: tensor.clone() for name, tensor in lora.state_dict().items()}
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.mul_(1.5)
    assert not same(ask(network), found, 1e-3)
    lora.load_state_dict(state)
    assert torch.equal(ask(network), found)


def test_a_layer_that_is_called_by_keyword_has_its_branch() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(input=x)  # type: ignore[no-any-return]

    module, x = Named(), torch.ones(1, 4)
    lora = filled(inject_lora(module, 2))
    assert torch.equal(module(x), module.layer(x)) and not same(
        module(x), F.linear(x, *module.layer.parameters()), 1e-3
    )
    lora.detach()
    assert torch.equal(module(x), F.linear(x, *module.layer.parameters()))


def test_what_is_changed_in_place_cannot_be_trained() -> None:
    network = tiny.flux()
    norm = Lora(tuple(i for i in every_kind_on_flux(network).items if i.kind == "norm"))
    with pytest.raises(LoraError, match="q_norm is changed in place and cannot be trained"):
        attach_lora(network, norm, trainable=True)
    assert some_lora(network).items
