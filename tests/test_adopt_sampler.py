"""A Sampler generates with a trainer's network, its adapters, EMA weights and text encoders, and the run does not notice."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from lycoris.modules import LoConModule
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from eridiff import FluxInference, SDXLInference
from eridiff.adopt import adopt
from eridiff.errors import ConfigError
from eridiff.training import Sampler, averaged_weights
from tests import adapters, tiny
from tests.trainers import (
    BOUND,
    FAMILIES,
    Family,
    drawing,
    dropout_off,
    pictures,
    train,
)


@pytest.mark.parametrize("steps", [20, pytest.param(50, marks=pytest.mark.slow)])
def test_the_run_does_not_notice_and_the_images_follow_it(family: Family, steps: int, tmp_path: Path) -> None:
    """Steps with every kind of dropout of kohya's; each image is the trainer's network with dropout off."""
    curves, seen = [], set()
    for sampling in (False, True):
        torch.manual_seed(0)
        foreign = family.make()
        network = adapters.kohya(foreign, family.targets, dropout=0.3, rank_dropout=0.3, module_dropout=0.3).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
        sampler = drawing(family, adopt(foreign), tmp_path, optimizer=optimizer)
        curve = []
        for step in range(steps):
            loss = family.ask(foreign).square().mean()
            loss.backward()
            if sampling and (samples := sampler.maybe_sample(step)):
                seen.add(samples.images[0].tobytes())
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(curve)
        assert all(module.training for module in network.modules())
    assert curves[0] == curves[1] and len(set(curves[0])) == steps and len(seen) == steps // 5
    last = pictures(sampler, steps)
    with dropout_off(network):
        assert last == pictures(sampler, steps + 1)


@pytest.mark.parametrize("copies", [False, True])
def test_the_network_of_from_diffusers_may_be_asked_at_any_time(family: Family, copies: bool) -> None:
    """Between images too, and then it is the trainer's of that moment. Copies are made where the caller adopts with them."""
    foreign = family.make().requires_grad_(True)
    part = "unet" if family.inference is SDXLInference else "transformer"
    parts: dict[str, Any] = {
        part: adopt(foreign, allow_copies=True) if copies else foreign,
        "vae": family.autoencoder(),
    }
    inference = family.inference.from_diffusers(**parts, progress=False)
    (adopted, _), copied = inference.adopted, []
    assert adopted.copied_bytes == 0 and family.distance(adopted) < BOUND
    inference.generate(conditioning=family.prompt, width=64, height=64, steps=1, seed=1, cfg_scale=1,
                       callback=lambda _: copied.append(adopted.copied_bytes))  # fmt: skip
    assert (copied[0] > 0) == (copies and part == "transformer")
    train(family, foreign, foreign.parameters())
    assert adopted.copied_bytes == 0 and family.distance(adopted) < BOUND


def test_an_adopted_autoencoder_is_used(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("kind", ["EMAModel", "EMAModel of a peft LoRA", "AveragedModel", "mapping"])
def test_ema_weights_under_the_trainers_names_are_used_whole(family: Family, kind: str, tmp_path: Path) -> None:
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
    adopted = adopt(model, allow_copies=True)
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


def test_ema_weights_of_another_number_of_parameters_are_refused(tmp_path: Path) -> None:
    family = FAMILIES["flux"]
    foreign = family.make()
    network = adapters.kohya(foreign, family.targets)
    with pytest.raises(
        ConfigError,
        match=r"EMAModel keeps \d+ EMA weights, FluxTransformer2DModel has \d+ parameters, 0 of them trained",
    ):
        drawing(family, adopt(foreign), tmp_path, ema=EMAModel(network.parameters()))


def test_an_adapters_ema_weights_and_the_base_generate_beside_it(family: Family, tmp_path: Path) -> None:
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


def test_other_weights_must_be_functions_that_give_context_managers(tmp_path: Path) -> None:
    """One that is made at once can be entered once only; a switch puts nothing back."""
    family = FAMILIES["flux"]
    adopted = adopt(family.make())
    for wrong in (nullcontext(), contextmanager(lambda: iter([None]))(), "base", None):
        with pytest.raises(
            ConfigError, match=r"weights\['base'\] must be a function that gives a context manager, .* lambda: "
        ):
            drawing(family, adopted, tmp_path, weights={"base": wrong})
    sampler = drawing(family, adopted, tmp_path, weights={"base": lambda: None})
    with pytest.raises(
        ConfigError, match=r"weights\['base'\] gave no context manager but None, so nothing would be restored"
    ):
        sampler.sample(0)
    assert len(pictures(drawing(family, adopted, tmp_path, weights={"base": nullcontext}), 1)) == 2


def recipes() -> dict[str, Any]:
    """The functions of docs/embed.md that switch an adapter off."""
    text = (Path(__file__).parents[1] / "docs" / "embed.md").read_text(encoding="utf-8")
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
