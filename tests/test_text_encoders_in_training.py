"""Adapters in training on text encoders, which the trainer's modules themselves compute: {family} x {adapter} x {weights}."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn

from eridiff.errors import LoraError
from eridiff.trace.record import relative_l2
from eridiff.training import Sampler, adopt
from tests import adapters, tiny
from tests.test_adopt_quantised import QUANTISERS
from tests.test_from_diffusers import PIPELINES, SECTION, small_clip
from tests.test_handing_in import without_projection
from tests.trainers import BOUND, dropout_off

PROMPT = "a photo of a cat"
TARGETS = ["q_proj", "fc1", "out_proj", "SelfAttention.q", "DenseReluDense.wi_0"]  # of CLIP and of T5
KOHYA = {"clip": "lora_te1_", "clip_g": "lora_te2_", "t5": "lora_te3_"}  # how kohya's scripts begin their names
WAYS = ("peft", "kohya", "ai-toolkit", "hook", "parametrization")


class Peft:
    """A LoRA of peft inside an encoder, and its file in diffusers' format."""

    def __init__(self, module: Any) -> None:
        config = LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS, lora_dropout=0.5, init_lora_weights=False)
        inject_adapter_in_model(config, module)
        self.module = module

    def save(self, path: Path, place: str) -> dict[str, Any]:
        return {f"{place}.{name}": t.contiguous() for name, t in get_peft_model_state_dict(self.module).items()}


ENCODERS: dict[str, Callable[[], list[Any]]] = {
    "flux": lambda: [without_projection(), tiny.t5_module()],
    "sd3": lambda: [tiny.randomised(small_clip(), seed=i) for i in range(2)] + [tiny.t5_module()],
    "sdxl": lambda: [without_projection(), tiny.clip_module()],
}


@cache
def the_rest(family: str) -> dict[str, Any]:
    """What no test here changes, adopted once."""
    pipe = PIPELINES[family][1]()
    parts = {name: getattr(pipe, name) for name in ("tokenizer", "tokenizer_2", "tokenizer_3") if hasattr(pipe, name)}
    part = "unet" if family == "sdxl" else "transformer"
    return {**parts, part: adopt(getattr(pipe, part)), "vae": adopt(pipe.vae)}


def handed_in(family: str, quantiser: str | None) -> Any:
    """An inference whose text encoders are new modules, as a trainer holds them."""
    modules = ENCODERS[family]()
    for module in modules if quantiser is not None else []:
        QUANTISERS[quantiser](module)
    parts = dict(zip(("text_encoder", "text_encoder_2", "text_encoder_3"), modules, strict=False))
    return PIPELINES[family][0].from_diffusers(**the_rest(family), **parts, progress=False)


def encoders(inference: Any) -> dict[str, Any]:
    return {name: getattr(inference, name).module for name in KOHYA if getattr(inference, name, None) is not None}


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize(("way", "quantiser"), [*((way, None) for way in WAYS), *(("kohya", q) for q in QUANTISERS)])
def test_adapters_on_text_encoders_act_and_their_file_gives_the_same(
    family: str, way: str, quantiser: str | None, tmp_path: Path
) -> None:
    inference = handed_in(family, quantiser)
    section = {**SECTION, "true_cfg_scale": 1.0, "out": str(tmp_path)}
    asked: dict[str, Any] = {"seed": 1, "steps": 2, "width": 32, "height": 32, "cfg_scale": 1.0}
    sampler = Sampler(inference, section, text_in_training=True, verify=True, raise_errors=True)
    plain = sampler.sample(0).images[0]
    held = encoders(inference)
    networks = {n: Peft(m) if way == "peft" else adapters.WAYS[way](m, TARGETS).train() for n, m in held.items()}
    if way == "peft":
        for module in held.values():
            module.train()
    live = sampler.sample(1).images[0]
    trained = [
        p for m in (held if way == "peft" else networks).values() for n, p in m.named_parameters() if "lora_" in n
    ]
    with torch.no_grad():
        for p in trained:
            p.mul_(1.5)
    after = sampler.sample(2).images[0]
    assert len({image.tobytes() for image in (plain, live, after)}) == 3 and len(trained) >= 2 * 2 * len(held)

    file: dict[str, Any] = {}
    for i, (name, network) in enumerate(networks.items()):
        if isinstance(network, Peft):
            file |= network.save(tmp_path, "text_encoder" + (f"_{i + 1}" if i else ""))
        else:
            file |= load_file(network.save(tmp_path / f"{name}.safetensors", adapters.renamed(KOHYA[name])))
    save_file(file, tmp_path / "lora.safetensors")
    fresh = handed_in(family, quantiser)
    fresh.apply_lora(tmp_path / "lora.safetensors")
    with dropout_off(*held.values(), *(n for n in networks.values() if isinstance(n, nn.Module))):
        assert inference.generate(PROMPT, **asked).images[0].tobytes() == after.tobytes()
        expected, found = inference.encode_prompt(PROMPT).positive, fresh.encode_prompt(PROMPT).positive
    # beside weights of a byte, whose dtype is not that of the computation, eridiff keeps a LoRA in bfloat16
    bound = 1e-2 if quantiser in ("4 bits", "layerwise casting") else BOUND
    assert relative_l2(found.text, expected.text) < bound and relative_l2(found.pooled, expected.pooled) < bound
    drawn = fresh.generate(PROMPT, **asked).images[0]
    assert np.abs(np.asarray(drawn, dtype=int) - np.asarray(after, dtype=int)).max() <= (3 if bound > BOUND else 1)


def test_a_lora_that_needs_the_weights_of_packed_layers_is_refused_by_name(tmp_path: Path) -> None:
    inference = handed_in("flux", "4 bits")
    name = "lora_te1_encoder_layers_0_mlp_fc1"
    tensors = {
        "lora_down.weight": torch.ones(2, 8),
        "lora_up.weight": torch.ones(16, 2),
        "dora_scale": torch.ones(16, 1),
    }
    save_file({f"{name}.{key}": t for key, t in tensors.items()}, tmp_path / "dora.safetensors")
    with pytest.raises(
        LoraError, match=r"encoder.layers.0.mlp.fc1 is quantised .* which a lora with DoRA needs: load the"
    ):
        inference.apply_lora(tmp_path / "dora.safetensors")
