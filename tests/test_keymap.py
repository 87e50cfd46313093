"""The key maps account for every published tensor, both ways, and lose no bit; a mutated map fails."""

import copy
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eridiff.errors import CheckpointError
from eridiff.models.autoencoder import Autoencoder, AutoencoderConfig
from eridiff.models.flux import Flux, FluxConfig
from eridiff.models.mmdit import MMDiT, MMDiTConfig
from eridiff.models.unet import UNet, UNetConfig
from eridiff.text.encoders import empty
from eridiff.weights.detect import Component
from eridiff.weights.header import Checkpoint
from eridiff.weights.keymap import KeyMap, Layout, Rule, key_map
from tests.golden import run_case
from tests.manifest import read_manifest

CLIP_L = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
}  # fmt: skip
CLIP_G = {**CLIP_L, "hidden_size": 1280, "num_attention_heads": 20, "intermediate_size": 5120,
          "projection_dim": 1280, "num_hidden_layers": 32}  # fmt: skip
T5_XXL = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "relative_attention_num_buckets": 32,
}  # fmt: skip
GOLDENS = Path(__file__).parent / "goldens"
Shapes = dict[str, tuple[int, ...]]

CASES = [
    *(("flux", preset, "original", f"flux1-{preset}{'' if preset == 'schnell' else '-dev'}")
      for preset in ("schnell", "fill", "canny", "depth")),
    ("flux", "dev", "original", "flux1-dev"),
    *(("flux", preset, "diffusers", f"flux1-{preset}{'' if preset == 'schnell' else '-dev'}-diffusers-transformer")
      for preset in ("schnell", "fill", "canny", "depth")),
    ("flux", "dev", "diffusers", "flux1-dev-diffusers-transformer"),
    *(("mmdit", preset, "original", preset) for preset in ("sd3-medium", "sd3.5-medium", "sd3.5-large")),
    *(("mmdit", preset, "diffusers", f"{preset}-transformer-diffusers")
      for preset in ("sd3-medium", "sd3.5-medium", "sd3.5-large")),
    ("unet", "base", "original", "sd_xl_base_1.0"),
    ("unet", "refiner", "original", "sd_xl_refiner_1.0"),
    ("unet", "inpaint", "original", "sdxl-inpaint-unet-original"),
    *(("unet", preset, "diffusers", f"sdxl-{preset}-unet-diffusers") for preset in ("base", "refiner", "inpaint")),
    ("vae", "flux", "original", "ae"),
    ("vae", "flux", "diffusers", "flux1-diffusers-vae"),
    ("vae", "sdxl", "original", "sdxl-first-stage"),
    ("clip", "L", "huggingface", "clip_l"),
    ("clip", "G", "huggingface", "clip_g-hf"),
    ("clip", "G", "openclip", "clip_g-openclip"),
    ("t5", "XXL", "huggingface", "t5xxl"),
]  # fmt: skip


def component(network: str, preset: str) -> Component:
    config: Any = {
        "flux": lambda: FluxConfig.preset(preset),
        "mmdit": lambda: MMDiTConfig.preset(preset),
        "unet": lambda: UNetConfig.preset(preset),
        "vae": lambda: AutoencoderConfig.preset(preset),
        "clip": lambda: {"L": CLIP_L, "G": CLIP_G}[preset],
        "t5": lambda: T5_XXL,
    }[network]()
    layout = next(iter(KeyMap(network).layouts.values()))
    return Component(network, layout, "", Checkpoint("", {}, {}, {}), config)  # type: ignore[arg-type]


def native_of(network: str, preset: str) -> tuple[Shapes, dict[str, Any]]:
    found = component(network, preset)
    module = empty(found)
    shapes = {n: tuple(t.shape) for n, t in module.state_dict().items() if n != "encoder.embed_tokens.weight"}
    return shapes, found.sizes


def foreign_of(layout: Layout, native: Shapes, sizes: dict[str, Any]) -> Shapes:
    """Every foreign name with its shape; an assertion fails when two natives write the same rows."""
    found: Shapes = {}
    parts: set[tuple[str, int]] = set()
    for entry in layout.entries(native, sizes):
        shapes = entry.foreign_shapes(native[entry.native])
        if entry.operation != "squeeze":  # a matrix does not say that it was a 1x1 convolution
            assert entry.native_shape(shapes) == native[entry.native], entry
        for name, shape in zip(entry.foreign, shapes, strict=True):
            place = (name, entry.sizes[0] if entry.operation == "part" else 0)
            assert place not in parts, f"{name} is written twice"
            parts.add(place)
            found[name] = shape
    return found


def published(manifest: str, layout: Layout, preset: str) -> Shapes:
    shapes = {
        name.removeprefix("model.diffusion_model."): shape
        for name, (_, shape) in read_manifest(manifest).items()
        if name not in layout.carry and not name.startswith(("first_stage_model.", "conditioner."))
    }
    if manifest == "clip_l":
        shapes["text_projection.weight"] = (768, 768)  # in SD3's folders; the usual files have none
    return shapes


@pytest.mark.parametrize(("network", "preset", "layout", "manifest"), CASES)
def test_names_and_shapes_are_the_published_ones(network: str, preset: str, layout: str, manifest: str) -> None:
    native, sizes = native_of(network, preset)
    chosen = KeyMap(network).layouts[layout]
    assert foreign_of(chosen, native, sizes) == published(manifest, chosen, preset)


@pytest.mark.parametrize(("network", "preset", "layout"), [case[:3] for case in CASES[5:]])
def test_a_mutated_map_fails(network: str, preset: str, layout: str) -> None:
    """Each rule dropped, doubled, and given each neighbour's right side; seen at a few names that the two match."""
    native, sizes = native_of(network, preset)
    whole = KeyMap(network).layouts[layout]
    rules = list(whole.rules)
    matched = [[name for name in native if rule.entry(name, sizes)][:4] for rule in rules]
    mutants = []
    for i, rule in enumerate(rules):
        if matched[i]:
            other = copy.copy(rule)
            neighbour = rules[i - 1] if len(rules) > 1 else rule
            other.foreign, other.operation, other.sizes = neighbour.foreign, neighbour.operation, neighbour.sizes
            mutants.append(("dropped", i, rules[:i] + rules[i + 1 :]))
            mutants.append(("doubled", i, [*rules, rule]))
            if neighbour.foreign != rule.foreign and matched[i - 1]:
                mutants.append(("retargeted", i, [*rules[:i], other, *rules[i + 1 :]]))
    assert len(mutants) >= 6 or network == "t5"
    for what, i, changed in mutants:
        mutant = copy.copy(whole)
        mutant.rules = changed
        names = {name: native[name] for name in (*matched[i], *matched[i - 1])}
        right = foreign_of(whole, names, sizes)
        try:
            survived = foreign_of(mutant, names, sizes) == right
        except (CheckpointError, AssertionError, KeyError, TypeError, ValueError):
            survived = False
        assert not survived, f"the rule for {rules[i].native}, {what}, goes unseen"


def round_trip(layout: Layout, state: dict[str, Tensor], sizes: dict[str, Any]) -> None:
    foreign = layout.to_foreign(state, sizes)
    for entry in layout.entries(state, sizes):
        back = entry.read([foreign[name] for name in entry.foreign], tuple(state[entry.native].shape))
        assert back.shape == state[entry.native].shape
        assert torch.equal(back.view(torch.uint8), state[entry.native].view(torch.uint8)), entry.native


def random_bits(shapes: Shapes, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Arbitrary bit patterns, NaN among them: a round trip keeps them all."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8, generator=generator)
        .view(dtype)
        .reshape(shape)
        for name, shape in shapes.items()
    }


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 3), head=st.sampled_from([4, 8]), ratio=st.sampled_from([2.0, 4.0]), double=st.integers(1, 3),
    single=st.integers(1, 3), guidance=st.booleans(), dtype=DTYPES, seed=st.integers(0, 99),
    layout=st.sampled_from(["original", "diffusers"]),
)  # fmt: skip
def test_flux_keeps_every_bit(
    heads: int,
    head: int,
    ratio: float,
    double: int,
    single: int,
    guidance: bool,
    dtype: torch.dtype,
    seed: int,
    layout: str,
) -> None:
    config = FluxConfig(8, 8, 6, 10, heads * head, heads, ratio, double, single, (0, 0, head), guidance=guidance)
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in Flux(config).state_dict().items()}
    sizes = {"hidden": config.hidden, "mlp": config.mlp}
    round_trip(KeyMap("flux").layouts[layout], random_bits(shapes, dtype, seed), sizes)


@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 3), depth=st.integers(1, 3), qk_norm=st.booleans(), dual=st.sets(st.integers(0, 2)), dtype=DTYPES,
    seed=st.integers(0, 99), layout=st.sampled_from(["original", "diffusers"]),
)  # fmt: skip
def test_mmdit_keeps_every_bit(
    heads: int, depth: int, qk_norm: bool, dual: set[int], dtype: torch.dtype, seed: int, layout: str
) -> None:
    config = MMDiTConfig(4, 4, 6, 10, heads * 4, heads, 2.0, depth, 3, qk_norm, tuple(sorted(dual)))
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in MMDiT(config).state_dict().items()}
    round_trip(KeyMap("mmdit").layouts[layout], random_bits(shapes, dtype, seed), {})


@settings(max_examples=15, deadline=None)
@given(
    depths=st.lists(st.integers(0, 2), min_size=1, max_size=4), middle=st.integers(0, 2), guidance=st.booleans(), dtype=DTYPES,
    seed=st.integers(0, 99), layout=st.sampled_from(["original", "diffusers"]),
)  # fmt: skip
def test_the_unet_keeps_every_bit(
    depths: list[int], middle: int, guidance: bool, dtype: torch.dtype, seed: int, layout: str
) -> None:
    config = UNetConfig(4, 4, 32, (1,) * len(depths), tuple(depths), middle, 16, 6, 10, guidance)
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in UNet(config).state_dict().items()}
    round_trip(
        KeyMap("unet").layouts[layout],
        random_bits(shapes, dtype, seed),
        {"levels": config.levels, "attends": config.attends, "middle_attends": config.middle_attends},
    )


@settings(max_examples=15, deadline=None)
@given(
    levels=st.integers(1, 4), blocks=st.integers(1, 2), quant=st.booleans(), dtype=DTYPES, seed=st.integers(0, 99),
    layout=st.sampled_from(["original", "diffusers"]),
)  # fmt: skip
def test_the_autoencoder_keeps_every_bit(
    levels: int, blocks: int, quant: bool, dtype: torch.dtype, seed: int, layout: str
) -> None:
    config = AutoencoderConfig(32, (1, 2, 1, 1)[:levels], blocks, 4, quant_convolutions=quant)
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in Autoencoder(config).state_dict().items()}
    round_trip(KeyMap("vae").layouts[layout], random_bits(shapes, dtype, seed), {"levels": levels})


@settings(max_examples=10, deadline=None)
@given(layers=st.integers(1, 3), width=st.sampled_from([4, 8]), dtype=DTYPES, seed=st.integers(0, 99))
def test_the_text_encoders_keep_every_bit(layers: int, width: int, dtype: torch.dtype, seed: int) -> None:
    clip = {**CLIP_L, "vocab_size": 20, "hidden_size": width, "intermediate_size": 12, "projection_dim": 6,
            "num_hidden_layers": layers, "num_attention_heads": 2}  # fmt: skip
    t5 = {**T5_XXL, "vocab_size": 20, "d_model": width, "d_kv": 2, "d_ff": 6, "num_layers": layers, "num_heads": 2}
    for network, config in (("clip", clip), ("t5", t5)):
        for layout in KeyMap(network).layouts.values():
            module = empty(Component(network, layout, "", Checkpoint("", {}, {}, {}), config))  # type: ignore[arg-type]
            names = {n: tuple(t.shape) for n, t in module.state_dict().items() if n != "encoder.embed_tokens.weight"}
            round_trip(layout, random_bits(names, dtype, seed), config)


def golden_fails(name: str) -> bool:
    try:
        return not all(row.passed for row in run_case(GOLDENS / name, (torch.float64,)))
    except CheckpointError:
        return True


def exchange(first: Rule, second: Rule) -> None:
    first.foreign, second.foreign = second.foreign, first.foreign
    first.sizes, second.sizes = second.sizes, first.sizes


@pytest.mark.parametrize(
    ("network", "golden", "least"),
    [
        ("flux", "flux-dev-tiny", 10),
        pytest.param("mmdit", "sd35-medium-tiny", 10, marks=pytest.mark.slow),
        pytest.param("unet", "sdxl-base-tiny", 10, marks=pytest.mark.slow),
        ("vae", "ae-16-tiny", 3),
        ("clip", "text-clip-l-tiny", 0),
        ("clip", "text-clip-g-tiny", 3),
        ("t5", "text-t5-tiny", 0),
    ],
)
def test_two_rules_that_are_exchanged_are_caught_by_the_golden(network: str, golden: str, least: int) -> None:
    """Where names and shapes still fit, only the numbers can tell.

    But for the gains of queries and keys in an attention to itself without rope: only their product counts.
    """
    layout = key_map(network).layouts["openclip" if "clip-g" in golden else next(iter(key_map(network).layouts))]
    assert not golden_fails(golden)
    exchanged = 0
    for first, second in combinations(layout.rules, 2):
        if sorted(re.findall(r"\{\w+\}|\*", first.native)) != sorted(re.findall(r"\{\w+\}|\*", second.native)):
            continue
        if first.native.split(".")[0] != second.native.split(".")[0] or first.operation != second.operation:
            continue
        if first.foreign == second.foreign or {first.native.rsplit(".", 2)[1], second.native.rsplit(".", 2)[1]} == {
            "q_norm2",
            "k_norm2",
        }:
            continue
        exchange(first, second)
        try:
            assert golden_fails(golden), f"{first.native} and {second.native}"
        finally:
            exchange(first, second)
        exchanged += 1
    assert exchanged >= least
