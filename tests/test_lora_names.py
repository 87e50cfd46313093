"""The names that LoRA files of published models have: every one lands on a tensor of our network of that size."""

import gzip
import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn

from eridiff.errors import LoraError
from eridiff.lora import Lora, hints, load_lora
from eridiff.models.flux import Flux, FluxConfig
from eridiff.models.mmdit import MMDiT, MMDiTConfig
from eridiff.models.unet import UNet, UNetConfig
from eridiff.weights.header import open_checkpoint
from tests.lora_files import GOLDENS
from tests.manifest import read_manifest
from tests.sparse import write_sparse

ENCODERS = {"clip": "clip_l", "clip_g": "clip_g-hf", "t5": "t5xxl"}  # network -> manifest
LISTS = {  # list of lora-names -> model, and how many modules for each network
    "ai-toolkit-flux": ("flux", {"flux": 494}),
    "bfl-control-flux": ("flux", {"flux": 466}),
    "kohya-flux": ("flux", {"flux": 304, "clip": 72, "t5": 168}),
    "kohya-flux-in_dims": ("flux", {"flux": 8}),
    "kohya-sd3.5-large": ("sd3.5-large", {"mmdit": 385}),
    "kohya-sd3.5-medium": ("sd3.5-medium", {"mmdit": 271, "clip": 72, "clip_g": 192, "t5": 168}),
    "kohya-sdxl": ("sdxl", {"unet": 722, "clip": 72, "clip_g": 192}),
    "kohya-sdxl-c3lier": ("sdxl", {"unet": 66}),
    "onetrainer-flux": ("flux", {"flux": 504}),
    "peft-flux": ("flux", {"flux": 504}),
    "peft-sd3.5-large": ("sd3.5-large", {"mmdit": 537}),
    "peft-sd3.5-medium": ("sd3.5-medium", {"mmdit": 393}),
    "peft-sdxl": ("sdxl", {"unet": 794}),
    "xlabs-flux": ("flux", {"flux": 152}),
}


@cache
def published(model: str) -> dict[str, Any]:
    """A network of published size without memory, and the text encoders beside it as state dicts of published names."""
    with torch.device("meta"):
        made: dict[str, nn.Module] = {
            "flux": lambda: Flux(FluxConfig.preset("dev")), "sdxl": lambda: UNet(UNetConfig.preset("base")),
        }.get(model, lambda: MMDiT(MMDiTConfig.preset(model)))()  # fmt: skip
        beside = {"flux": ("clip", "t5"), "sdxl": ("clip", "clip_g")}.get(model, tuple(ENCODERS))
        encoders = {
            name: {key: torch.empty(shape) for key, (_, shape) in read_manifest(ENCODERS[name]).items()}
            for name in beside
        }
    return {{"sdxl": "unet", "flux": "flux"}.get(model, "mmdit"): made, **encoders}


def full_size_file(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A sparse file of these tensors in bfloat16: the first number of each is 1, the others are 0."""
    write_sparse(path, {name: ("BF16", shape) for name, shape in shapes.items()})
    entries = open_checkpoint(path).tensors.values()
    with open(path, "r+b") as file:
        for entry in entries:
            file.seek(entry.begin)
            file.write(b"\x80\x3f")
    return path


def listed(name: str) -> dict[str, tuple[int, ...]]:
    with gzip.open(GOLDENS / "lora-names" / f"{name}.json.gz") as file:
        return {key: tuple(shape) for key, shape in json.load(file)["tensors"]}


def with_rank(rank: int, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    ranks = {"lora_A.weight": 0, "lora_B.weight": 1}
    place = next((p for ending, p in ranks.items() if name.endswith(ending)), None)
    return shape if place is None else (*shape[:place], rank, *shape[place + 1 :])


def applied(lora: Lora) -> Counter[str]:
    assert {row.status for row in lora.ledger} <= {"applied", "applied to a slice"}
    return Counter(item.target.network for item in lora.items)


def test_the_table_holds_every_list() -> None:
    assert {path.name.removesuffix(".json.gz") for path in (GOLDENS / "lora-names").iterdir()} == LISTS.keys()


@pytest.mark.parametrize("name", LISTS)
def test_every_name_of_a_published_size_is_found_and_fits(name: str, tmp_path: Path) -> None:
    model, counts = LISTS[name]
    shapes = listed(name)
    if name == "bfl-control-flux":  # 2.4 GB at rank 128
        shapes = {n: with_rank(4, n, s) for n, s in shapes.items()}
    lora = load_lora(full_size_file(tmp_path / f"{name}.safetensors", shapes), published(model))
    assert applied(lora) == counts
    stored = sum(len(item.tensors) + (item.alpha is not None) for item in lora.items)
    assert stored == len(shapes), "each tensor of the file is in one item"


def live(model: str) -> nn.Module:
    """diffusers' own network of published size, on the meta device; its table of positions, no target, is cut."""
    with torch.device("meta"):
        if model == "flux":
            return FluxTransformer2DModel(guidance_embeds=True)
        if model == "sdxl":
            return UNet2DConditionModel(
                sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048, use_linear_projection=True,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=2,
                transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), addition_time_embed_dim=256,
                addition_embed_type="text_time", projection_class_embeddings_input_dim=2816,
            )  # fmt: skip
        large, positions = model == "sd3.5-large", 2
        return SD3Transformer2DModel(
            num_layers=38 if large else 24, num_attention_heads=38 if large else 24, out_channels=16,
            caption_projection_dim=2432 if large else 1536, pos_embed_max_size=positions, sample_size=2 * positions,
            dual_attention_layers=() if large else tuple(range(13)), qk_norm="rms_norm",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "network", "count"),
    [("flux", "flux", 504), ("sd3.5-medium", "mmdit", 393), ("sd3.5-large", "mmdit", 537), ("sdxl", "unet", 794)],
)
def test_every_name_that_peft_gives_diffusers_modules_is_found(
    model: str, network: str, count: int, tmp_path: Path
) -> None:
    """Rank 2 on every linear layer and convolution of diffusers' class, through a file and the loader."""
    theirs = live(model)
    targets = [name for name, module in theirs.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), theirs)
    prefix = "unet." if network == "unet" else "transformer."
    shapes = {prefix + name: tuple(t.shape) for name, t in get_peft_model_state_dict(theirs).items()}
    ours = {network: published(model)[network]}
    lora = load_lora(full_size_file(tmp_path / "peft.safetensors", shapes), ours)
    assert len(targets) == count and applied(lora) == {network: count} and 2 * count == len(shapes)


def test_a_large_file_for_another_family_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """986 modules of SDXL given to Flux: to look for each one's nearest name would take minutes."""
    searched: list[str] = []
    monkeypatch.setattr(hints, "get_close_matches", lambda name, *_, **__: searched.append(name) or [])
    path = full_size_file(tmp_path / "sdxl.safetensors", listed("kohya-sdxl"))
    with pytest.raises(LoraError, match="nothing in it fits Flux; its names look like SDXL") as raised:
        load_lora(path, {"flux": published("flux")["flux"]})
    assert len(searched) <= 5
    rows = Counter(row.status for row in raised.value.ledger)
    assert rows == {"unmatched": 722, "no text encoder here": 264}, "yet every module has its row"
