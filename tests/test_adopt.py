"""eridiff's networks beside diffusers' classes in training: the same parameters, followed through steps, adapters and moves."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers import transformer_flux
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from eridiff import FluxInference, Prompt
from eridiff.adopt import COPIED, Adopted, adopt
from eridiff.adopt.layers import Elsewhere
from eridiff.errors import CheckpointError, ConfigError
from eridiff.models.flux import FluxConfig, position_ids
from eridiff.text import Conditioning
from eridiff.trace.record import relative_l2
from eridiff.training import Sampler, shard
from eridiff.weights.keymap import key_map
from tests import tiny
from tests.golden.case import Float32Sinusoid, float32_sinusoid
from tests.test_diffusers import (
    GRID,
    WideRotary,
    flux_inputs,
    reference_autoencoder,
    reference_flux,
    reference_sd3,
    reference_unet,
    wide_rotation,
)

Ask = Callable[[Any], Tensor]


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def flux_case(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Ask, Ask]:
    """diffusers' Flux without its casts to float32, and how it and eridiff's are called."""
    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", wide_rotation)
    foreign = reference_flux().double()
    foreign.pos_embed = WideRotary()
    x = flux_inputs(torch.float64)
    times, scale = torch.tensor([0.3, 0.9]).double(), torch.tensor([3.5, 2.0]).double()
    return (
        foreign,
        lambda m: m(
            hidden_states=x["latents"], encoder_hidden_states=x["text"], pooled_projections=x["pooled"], timestep=times,
            guidance=scale, img_ids=position_ids(GRID), txt_ids=torch.zeros(5, 3),
        ).sample,
        lambda m: m(x["latents"], x["text"], x["pooled"], times[None], GRID, scale),
    )  # fmt: skip


def sd3_case(_: pytest.MonkeyPatch) -> tuple[Any, Ask, Ask]:
    """Without its q/k norm, which diffusers computes in float32."""
    x, text, pooled, times = rows(2, 16, 6, 8), rows(2, 5, 12), rows(2, 8), torch.tensor([0.3, 0.9]).double()
    return (
        reference_sd3(None, (0, 1)).double(),
        lambda m: m(hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=1000 * times).sample,
        lambda m: m(x, text, pooled, times[None]),
    )  # fmt: skip


def unet_case(_: pytest.MonkeyPatch) -> tuple[Any, Ask, Ask]:
    x, text, pooled, times = rows(2, 4, 16, 8), rows(2, 5, 24), rows(2, 8), torch.tensor([999.0, 61.375])
    numbers = torch.tensor([[1024, 768, 0, 64, 832, 1216]] * 2)
    vector = torch.cat([pooled, float32_sinusoid(numbers, 16).flatten(1)], dim=1)
    added = {"text_embeds": pooled, "time_ids": numbers}
    return (
        reference_unet().double(),
        lambda m: m(x, times, text, added_cond_kwargs=added).sample,
        lambda m: m(x, text, vector, times[None]),
    )


def autoencoder_case(_: pytest.MonkeyPatch) -> tuple[Any, Ask, Ask]:
    x = rows(1, 3, 16, 24)
    return (
        reference_autoencoder(True).double(),
        lambda m: m.decode(m.encode(x).latent_dist.mean).sample,
        lambda m: m(x),
    )


CASES = {"flux": flux_case, "sd3": sd3_case, "unet": unet_case, "autoencoder": autoencoder_case}
Case = tuple[Any, Ask, Ask]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    return CASES[request.param](monkeypatch)


@torch.no_grad()
def distance(adopted: Adopted, case: Case) -> float:
    """Between eridiff's and diffusers' forward."""
    with Float32Sinusoid():
        return relative_l2(case[2](adopted.network), case[1](adopted.foreign))


def train(foreign: nn.Module, ask: Ask, steps: int = 1) -> None:
    """Steps of an optimizer on the foreign module's own output."""
    wanted = [p for p in foreign.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        ask(foreign).square().mean().backward()
        optimizer.step()


def test_an_optimizers_step_on_the_foreign_module_is_seen_by_the_adopted_network(case: Case) -> None:
    foreign, ask, ask_ours = case
    adopted = adopt(foreign.requires_grad_(True), allow_copies=True)
    with torch.no_grad(), Float32Sinusoid():
        before = ask_ours(adopted.network)
    assert distance(adopted, case) < 1e-9
    train(foreign, ask, steps=2)
    adopted.refresh()
    assert distance(adopted, case) < 1e-9
    with torch.no_grad(), Float32Sinusoid():
        assert relative_l2(ask_ours(adopted.network), before) > 1e-3


def test_every_tensor_that_is_only_renamed_is_the_trainers_own(case: Case) -> None:
    foreign = case[0]
    adopted = adopt(foreign, allow_copies=True)
    theirs, ours = foreign.state_dict(keep_vars=True), adopted.network.state_dict(keep_vars=True)
    copies = 0
    every = [entry for entries in adopted._layers.values() for entry in entries]
    for entry in every:
        if entry.operation in COPIED:
            copies += sum(theirs[name].numel() * 8 for name in entry.foreign)
        else:
            assert ours[entry.native].data_ptr() == theirs[entry.foreign[0]].data_ptr(), entry
            assert entry.operation == "squeeze" or ours[entry.native] is theirs[entry.foreign[0]], entry
    assert {entry.native for entry in every} == ours.keys()
    assert adopted.copied_bytes == copies


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_what_is_one_matrix_here_and_several_there_is_called_unless_copies_are_allowed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So without copies a step of the trainer needs no refresh."""
    case = CASES[name](monkeypatch)
    foreign = case[0].requires_grad_(True)
    fused = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "proj_mlp", "norm_out.linear")
    size = sum(8 * p.numel() for n, p in foreign.named_parameters() if any(f".{f}." in f".{n}" for f in fused))
    if name == "sd3":  # its last block's text modulation has its halves swapped
        size += sum(8 * p.numel() for n, p in foreign.named_parameters() if "blocks.2.norm1_context" in n)
    adopted, copying = adopt(foreign), adopt(foreign, allow_copies=True)
    assert (adopted.copied_bytes, copying.copied_bytes) == (0, size)
    train(foreign, case[1])
    assert distance(adopted, case) < 1e-9 < 1e-6 < distance(copying, case)


def test_sdxl_and_the_autoencoder_need_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """So their steps are seen without a refresh."""
    for name in ("unet", "autoencoder"):
        case = CASES[name](monkeypatch)
        adopted = adopt(case[0].requires_grad_(True))
        assert adopted.copied_bytes == 0
        train(case[0], case[1])
        assert distance(adopted, case) < 1e-9


def test_copies_are_made_in_place_and_can_be_released(monkeypatch: pytest.MonkeyPatch) -> None:
    case = flux_case(monkeypatch)
    adopted = adopt(case[0].requires_grad_(True), allow_copies=True)
    fused = adopted.network.double_blocks[0].image.qkv  # type: ignore[union-attr,index]
    place = fused.weight.data_ptr()
    train(case[0], case[1])
    assert distance(adopted, case) > 1e-6
    adopted.refresh()
    assert fused.weight.data_ptr() == place and distance(adopted, case) < 1e-9
    adopted.release()
    assert adopted.copied_bytes == 0 and {type(p.data) for p in fused.parameters()} == {Elsewhere}
    train(case[0], case[1])
    assert distance(adopted, case) < 1e-9  # by the trainer's own layers, so it is never old
    adopted.refresh()
    assert distance(adopted, case) < 1e-9 and not fused.weight.requires_grad and type(fused.weight.data) is Tensor


def test_the_trainers_flags_gradients_and_modes_are_left_alone(case: Case) -> None:
    foreign = case[0].requires_grad_(True).train()
    case[1](foreign).square().mean().backward()
    first = next(iter(foreign.parameters())).requires_grad_(False)
    flags = [(p.requires_grad, p.grad is None, id(p)) for p in foreign.parameters()]
    adopted = adopt(foreign, allow_copies=True)
    adopted.refresh()
    assert [(p.requires_grad, p.grad is None, id(p)) for p in foreign.parameters()] == flags and not first.requires_grad
    assert foreign.training and not adopted.network.training


def test_a_module_that_is_moved_or_filled_anew_is_followed(case: Case) -> None:
    foreign = case[0]
    adopted = adopt(foreign.float(), allow_copies=True)
    foreign.double()
    foreign.load_state_dict({n: 1.01 * t for n, t in foreign.state_dict().items()}, assign=True)
    adopted.refresh()
    assert distance(adopted, case) < 1e-9


TARGETS = {
    "flux": ["to_q", "to_v", "add_k_proj", "proj_mlp", "proj_out", "norm.linear", "norm1.linear", "norm_out.linear", "x_embedder"],
    "sd3": ["to_k", "to_out.0", "add_q_proj", "ff.net.0.proj", "norm1_context.linear", "norm_out.linear", "context_embedder"],
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "conv_shortcut", "time_emb_proj", "ff.net.2"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "wrapper"), [("flux", True), ("flux", False), ("sd3", True), ("unet", False)])
def test_loras_of_peft_in_training_are_followed(name: str, wrapper: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a peft model, and as diffusers adds an adapter to its own class; also one that is added after the adoption."""
    foreign, ask, ask_ours = CASES[name](monkeypatch)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS[name], lora_dropout=0.1, init_lora_weights=False)
    adopted = adopt(foreign, allow_copies=True)
    model = get_peft_model(foreign, config) if wrapper else foreign
    if not wrapper:
        foreign.add_adapter(config)
    model.double().eval()
    adopted.refresh()
    case = (foreign, ask, ask_ours)
    assert distance(adopted, case) < 1e-9 and distance(adopt(model, allow_copies=True), case) < 1e-9
    train(foreign, ask)
    adopted.refresh()
    assert distance(adopted, case) < 1e-9
    with torch.no_grad(), Float32Sinusoid():
        with_lora = ask_ours(adopted.network)
        for layer in foreign.modules():
            if hasattr(layer, "lora_A"):
                layer.enable_adapters(False)
        assert distance(adopted, case) < 1e-9 and relative_l2(ask_ours(adopted.network), with_lora) > 1e-4


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_parameters_that_are_sharded_are_refused_whenever_that_was_done(case: Case) -> None:
    """Before the adoption, after it by the trainer (accelerate's prepare), and of eridiff's network, which has the trainer's parameters."""
    foreign = case[0]
    adopted, name = adopt(foreign), type(foreign).__name__
    with pytest.raises(
        ConfigError, match=f"was adopted and has the parameters of the trainer's {name}, so it cannot be sh"
    ):
        shard(adopted.network)
    assert distance(adopted, case) < 1e-9
    fully_shard(foreign)
    for ask in (lambda: adopt(foreign), adopted.refresh, adopted.release):
        with pytest.raises(
            ConfigError, match=f"this FSDP{name} are sharded, .* train eridiff's own network by `shard`"
        ):
            ask()


def test_fsdp1_and_zero_3_are_refused_too(case: Case) -> None:
    """Neither runs on a CPU, so these are their traces alone: the wrapper, and what marks a parameter."""
    wrapper: Any = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper._modules["_fsdp_wrapped_module"] = case[0]
    with pytest.raises(ConfigError, match="are sharded"):
        adopt(wrapper)
    adopted = adopt(case[0])
    next(case[0].parameters()).ds_id = 0
    with pytest.raises(ConfigError, match="are sharded"):
        adopted.refresh()


def test_blocks_that_are_elsewhere_are_named(case: Case) -> None:
    """As kohya's scripts swap them and accelerate offloads them; on a CPU the only other place is the meta device."""
    foreign = case[0]
    adopted = adopt(foreign)
    name, block = next(
        (n, m) for n, m in foreign.named_children() if isinstance(m, nn.ModuleList | nn.Linear | nn.Conv2d)
    )
    block.to("meta")
    for ask in (lambda: adopt(foreign), adopted.refresh):
        with pytest.raises(
            ConfigError, match=rf"has .*'{name}\.\S+' on meta.*: eridiff's network computes in one place, so put blocks"
        ):
            ask()


def test_what_is_not_a_network_that_is_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="'Linear' is not a model that eridiff knows"):
        adopt(nn.Linear(2, 3))
    foreign = unet_case(monkeypatch)[0]
    foreign.conv_in = nn.Conv2d(4, 32, 3, padding=1)
    with pytest.raises(CheckpointError, match="UNet2DConditionModel"):
        adopt(foreign)


def test_our_own_networks_and_wrapped_ones_are_adopted_too() -> None:
    own = tiny.flux()
    assert adopt(own).network is own
    foreign = reference_autoencoder(True)
    assert adopt(nn.DataParallel(foreign)).foreign is foreign


def test_a_flux_under_the_originals_names_needs_no_copy() -> None:
    """As trainers hold it that took the original's code: parameters under its names, no configuration beside them."""
    own = tiny.flux(FluxConfig(64, 64, 8, 12, 128, 1, 4.0, 1, 1))
    theirs = nn.Module()
    for name, tensor in key_map("flux").layouts["original"].to_foreign(own.state_dict(), {}).items():
        *path, last = name.split(".")
        owner = theirs
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(last, nn.Parameter(tensor))
    x, times = flux_inputs(torch.float32), torch.tensor([[0.3, 0.9]])
    told = x["latents"], x["text"], x["pooled"], times, GRID, torch.full((2,), 3.5)
    with torch.no_grad():
        assert (
            relative_l2(adopt(theirs).network(*told), own(*told)) < 1e-5
        )  # matmul looks at requires_grad: other last bits


def test_an_image_follows_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a step of diffusers' Flux the adopted one generates what a Flux that was filled from its file generates."""
    foreign, ask, _ = flux_case(monkeypatch)
    adopted = adopt(foreign.float().requires_grad_(True), allow_copies=True)
    model = FluxInference(adopted.network, tiny.autoencoder(), device="cpu", progress=False)  # type: ignore[arg-type]
    prompt = Prompt(Conditioning(rows(1, 5, 12).float(), rows(1, 8).float()))

    def draw(model: FluxInference) -> Tensor:
        kept = model.generate(conditioning=prompt, seed=3, width=32, height=32, steps=3, keep=("latents",)).latents
        assert kept is not None
        return kept

    before = draw(model)
    foreign.double()
    train(foreign, ask)
    foreign.float()
    adopted.refresh()
    after = draw(model)
    again = adopt(foreign, allow_copies=True).network
    fresh = tiny.flux(again.config)  # type: ignore[arg-type]
    fresh.load_state_dict(again.state_dict())
    assert torch.equal(after, draw(FluxInference(fresh, model.autoencoder, device="cpu", progress=False)))
    assert relative_l2(after, before) > 1e-3


def test_a_sampler_generates_what_a_trainer_of_diffusers_classes_trains(tmp_path: Path) -> None:
    """Through the optimizer's steps on the foreign module; its copies are there for an image alone."""
    foreign = reference_flux().requires_grad_(True).train()
    adopted = adopt(foreign, allow_copies=True)
    model = FluxInference(adopted.network, tiny.autoencoder(), device="cpu", progress=False)
    told = Prompt(Conditioning(torch.ones(1, 5, 12), torch.ones(1, 8)))
    model.encode_prompt = lambda *_: told  # type: ignore[method-assign, assignment]
    section = {"prompts": ["a swan"], "sample_steps": 2, "width": 32, "height": 32, "seed": 1, "out": str(tmp_path)}
    optimizer = torch.optim.SGD(foreign.parameters(), lr=0.05)
    sampler = Sampler(model, section, adopted=adopted, optimizer=optimizer, verify=True, raise_errors=True)
    assert adopted.copied_bytes == 0
    pictures = [sampler.sample(0).images[0].tobytes()]
    for p in foreign.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    pictures.append(sampler.sample(1).images[0].tobytes())
    assert pictures[0] != pictures[1] and foreign.training
    assert adopted.copied_bytes == 0
    again = adopt(foreign, allow_copies=True).network
    plain = FluxInference(again, model.autoencoder, device="cpu", progress=False)
    drawn = plain.generate(conditioning=told, steps=2, width=32, height=32, seed=1)
    assert drawn.images[0].tobytes() == pictures[1]
