"""A port in NumPy finds its errors by `eridiff diff` alone: the first, each of several, and what causes them."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from eridiff.trace.cases import Case, inputs_of, weights_of
from tests.ports import (
    BUGS,
    HIDDEN,
    IN,
    ONLY_IN_FLOAT64,
    Q_NORM,
    Arrays,
    Bug,
    case,
    compared,
    fresh_port,
    loaded,
    of_linear,
    ported,
)


@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", ["flux-dev-tiny", "flux-eps", "flux-schnell-tiny"])
def test_a_right_port_is_equal(name: str, dtype: type) -> None:
    report = compared(case(name), ported(case(name), dtype=dtype))
    assert report.equal and report.groups() == [] and report.unknown == ()
    compared_rows = [row for row in report.rows if row.other]
    assert len(compared_rows) + len(report.missing) == len(case(name).expected) and len(report.missing) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_one_error_is_one_line_and_its_cause_is_named(name: str) -> None:
    bug = BUGS[name]
    (group,) = compared(case(), ported(case(), (bug,)), explain=True).groups()
    assert group[0].name == bug.first and bug.says in group[0].cause


@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", BUGS)
def test_one_error_is_found_where_it_is_made(name: str, dtype: type) -> None:
    if dtype is np.float32 and name in ONLY_IN_FLOAT64:
        return
    golden = case("flux-eps") if "eps" in name else case()
    report = compared(golden, ported(golden, (BUGS[name],), dtype))
    assert report.made[0].name == BUGS[name].first


# functions of the port whose errors stand in one stretch between two values of its trace, where one hides the other
STRETCHES = (
    ("rms_norm", "heads_of", "attention", "joined_streams"), ("modulated", "layer_norm", "chunks_of", "updated", "final_modulated"),
    ("rotated",), ("rope_table",), ("sinusoid",), ("silu",), ("gelu",), ("linear",),
)  # fmt: skip


def triples() -> list[tuple[str, ...]]:
    """Every error once, in threes of which none hides another."""
    ordered = [name for functions in STRETCHES for name, bug in BUGS.items() if bug.function in functions]
    assert len(ordered) == len(BUGS)
    count = -(-len(ordered) // 3)
    return [tuple(ordered[i::count]) for i in range(count)]


@pytest.mark.parametrize("names", triples(), ids=" + ".join)
def test_three_errors_are_three_lines_with_their_causes(names: tuple[str, ...]) -> None:
    bugs = tuple(BUGS[name] for name in names)
    report = compared(case(), ported(case(), bugs), explain=True)
    groups = report.groups()
    order = [row.name for row in report.rows]
    assert groups[0][0].name == min((bug.first for bug in bugs), key=order.index)
    for bug in bugs:
        assert [g for g in groups if bug.says in g[0].cause and bug.first in [row.name for row in g]], (
            bug.says,
            groups,
        )
    assert len(groups) == 3


def test_two_errors_between_two_values_of_a_sparse_trace_are_both_named() -> None:
    """Only what blocks give is written down, so rotation and GELU stand in one stretch."""
    trace = ported(case(), (BUGS["rope halves"], BUGS["gelu erf"]), np.float32)
    sparse = {
        n: trace[n]
        for n in trace
        if n.endswith((".image", ".text", "out", "vec")) or n.startswith("single_blocks") and n.count(".") == 1
    }
    report = compared(case(), sparse, explain=True)
    assert report.made[0].name == "double_blocks.0.image" and len(report.rows) < 12
    assert all("rotation of halves" in row.cause and "erf form of GELU" in row.cause for row in report.made)


# Stable Diffusion 3.5 --------------------------------------------------------------------------------------------------


def ported_sd35(golden: Case, bugs: tuple[Bug, ...] = (), dtype: type = np.float64) -> Arrays:
    """The same errors in functions that both ports share, or in this one's own."""
    parts = fresh_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "numpy_flux", parts)
        port = loaded("numpy_mmdit")
    for bug in bugs:
        owner = port if bug.function in vars(port) and bug.function not in ("kept", "linear") else parts
        setattr(owner, bug.function, bug.wrong(parts, getattr(owner, bug.function)))
        if bug.function == "linear":
            port.linear = parts.linear
    given = {n: t.numpy().astype(dtype) for n, t in inputs_of(golden.description).items()}
    weights = {name: tensor.numpy().astype(dtype) for name, tensor in weights_of(golden.description).items()}
    port.mmdit(weights, golden.description["config"], given)
    return {name: np.array(value) for name, value in parts.TRACE.items()}


def late_mlp(port: Any, right: Any) -> Any:
    def updated(weights: Any, name: str, x: Any, attended: Any, chunks: Any) -> Any:
        after = x + chunks[2] * port.linear(weights, f"{name}.attn.proj", attended)
        hidden = port.gelu(
            port.linear(weights, f"{name}.mlp.fc1", port.kept(f"{name}.mlp:0", port.modulated(x, chunks[3], chunks[4])))
        )
        return after + chunks[5] * port.linear(weights, f"{name}.mlp.fc2", hidden)

    return updated


X_IN = "joint_blocks.0.x_block.attn.qkv:0"
LN_Q = "joint_blocks.0.x_block.attn.ln_q"
PLACES = {IN: X_IN, Q_NORM: LN_Q, HIDDEN: "joint_blocks.0.x_block.mlp.fc2", "time.sinusoid": "t_embedder.freq",
    "double_blocks.0.attention": "joint_blocks.0.attention", "double_blocks.0.img_attn.norm.key_norm": "joint_blocks.0.x_block.attn.ln_k",
    "time_in.out_layer": "t_embedder.mlp.2", "final_layer.linear:0": "final_layer.linear:0",
}  # fmt: skip
SD35 = {  # those of Flux that this network can have, at their places here
    name: replace(bug, first=PLACES[bug.first]) for name, bug in BUGS.items() if bug.first in PLACES and bug.function not in ("linear", "chunks_of")
} | {
    "mlp of the input": Bug("updated", late_mlp, "joint_blocks.0.x_block.mlp:0", "reads the stream before"),
    "no bias": Bug("linear", of_linear(lambda x, w, b: x @ w.T, "attn.proj"), "joint_blocks.0.x_block.attn.proj", "bias is left out"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", ["sd35-medium-tiny", "sd35-large-tiny", "sd3-eps"])
def test_a_right_port_of_sd35_is_equal(name: str, dtype: type) -> None:
    report = compared(case(name), ported_sd35(case(name), dtype=dtype))
    assert report.equal and report.unknown == () and len([row for row in report.rows if row.other]) >= 25


@pytest.mark.parametrize(
    "dtype", [np.float64, pytest.param(np.float32, marks=pytest.mark.slow)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("name", SD35)
def test_one_error_in_sd35_is_found_where_it_is_made(name: str, dtype: type) -> None:
    if dtype is np.float32 and name in ONLY_IN_FLOAT64:
        return
    golden = case("sd3-eps") if "eps" in name else case("sd35-large-tiny")
    report = compared(golden, ported_sd35(golden, (SD35[name],), dtype))
    assert report.made[0].name == SD35[name].first


@pytest.mark.slow
@pytest.mark.parametrize("name", SD35)
def test_the_cause_of_one_error_in_sd35_is_named(name: str) -> None:
    golden = case("sd35-large-tiny")
    (group,) = compared(golden, ported_sd35(golden, (SD35[name],)), explain=True).groups()
    assert group[0].name == SD35[name].first and SD35[name].says in group[0].cause


# the autoencoder --------------------------------------------------------------------------------------------------------


def ported_autoencoder(golden: Case, bug: Bug | None = None, dtype: type = np.float64) -> Arrays:
    parts = fresh_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "numpy_flux", parts)
        port = loaded("numpy_autoencoder")
    if bug is not None:
        setattr(port, bug.function, bug.wrong(port, getattr(port, bug.function)))
    weights = {name: tensor.numpy().astype(dtype) for name, tensor in weights_of(golden.description).items()}
    given = {n: t.numpy().astype(dtype) for n, t in inputs_of(golden.description).items()}
    port.encoded(weights, golden.description["config"], given["image"])
    port.decoded(weights, golden.description["config"], given["latents"])
    return {name: np.array(value) for name, value in parts.TRACE.items()}


def group_norm_with(eps: float) -> Callable[..., Any]:
    def norm(x: Any, groups: int = 32) -> Any:
        grouped = x.reshape(len(x), groups, -1)
        return ((grouped - grouped.mean(-1, keepdims=True)) / np.sqrt(grouped.var(-1, keepdims=True) + eps)).reshape(
            x.shape
        )

    return lambda port, right: norm


def padded_first(port: Any, right: Any) -> Any:
    return lambda weights, name, x: port.kept(name, port.conv(weights, f"{name}.conv", x, 2, ((1, 0), (1, 0))))


def bilinear(port: Any, right: Any) -> Any:
    return lambda x: torch.nn.functional.interpolate(torch.from_numpy(x), scale_factor=2.0, mode="bilinear").numpy()


VAE = {
    "group norm eps 1e-5": Bug("group_norm", group_norm_with(1e-5), "encoder.down.0.block.0.norm1", "group norm's epsilon is 1e-5"),
    "gelu": Bug("silu", lambda p, r: lambda x: torch.nn.functional.gelu(torch.from_numpy(x)).numpy(), "encoder.down.0.block.0.conv1", "GELU in place of SiLU"),
    "no silu": Bug("silu", lambda p, r: lambda x: x, "encoder.down.0.block.0.conv1", "SiLU is left out"),
    "padding": Bug("halved", padded_first, "encoder.down.0.downsample.conv", "padding at the left and top"),
    "bilinear": Bug("larger", bilinear, "decoder.up.1.upsample.conv", "bilinear in place of nearest"),
    "scores": Bug("attention_scale", lambda p, r: lambda channels: 1.0, "encoder.mid.attn_1.proj_out", "scores are not scaled"),
    "no shift": Bug("from_latents", lambda p, r: lambda z, c: z / c["scale_factor"], "decoder.conv_in", "latents' shift is left out"),
    "no scale": Bug("from_latents", lambda p, r: lambda z, c: z + c["shift_factor"], "decoder.conv_in", "latents' scale is left out"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", ["ae-16-tiny", "ae-eps"])
def test_a_right_port_of_the_autoencoder_is_equal(name: str, dtype: type) -> None:
    report = compared(case(name), ported_autoencoder(case(name), dtype=dtype))
    assert report.equal and report.unknown == () and len([row for row in report.rows if row.other]) >= 30


@pytest.mark.parametrize("name", VAE)
def test_one_error_in_the_autoencoder_is_found_and_its_cause_named(name: str) -> None:
    bug, golden = VAE[name], case("ae-eps")
    narrow = compared(golden, ported_autoencoder(golden, bug, np.float32))
    (group,) = compared(golden, ported_autoencoder(golden, bug), explain=True).groups()
    assert narrow.made[0].name == group[0].name == bug.first and bug.says in group[0].cause


# the UNet --------------------------------------------------------------------------------------------------------------


def ported_unet(golden: Case, bug: Bug | None = None, dtype: type = np.float64) -> Arrays:
    parts = fresh_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "numpy_flux", parts)
        patch.setitem(sys.modules, "numpy_autoencoder", loaded("numpy_autoencoder"))
        port = loaded("numpy_unet")
    if bug is not None:
        setattr(port, bug.function, bug.wrong(port, getattr(port, bug.function)))
    weights = {name: tensor.numpy().astype(dtype) for name, tensor in weights_of(golden.description).items()}
    given = {n: t.numpy().astype(dtype) for n, t in inputs_of(golden.description).items()}
    port.unet(weights, golden.description["config"], given)
    return {name: np.array(value) for name, value in parts.TRACE.items()}


def group_norm_of(eps: float) -> Callable[..., Any]:
    def wrong(port: Any, right: Any) -> Any:
        return lambda weights, name, x: port.kept(
            name,
            port.group_norm(x, eps) * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None],
        )

    return wrong


def layer_norm_of(eps: float) -> Callable[..., Any]:
    def wrong(port: Any, right: Any) -> Any:
        return lambda weights, name, x: port.kept(
            name,
            (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * weights[f"{name}.weight"]
            + weights[f"{name}.bias"],
        )

    return wrong


def torch_gelu(approximate: str) -> Callable[..., Any]:
    return lambda port, right: lambda x: torch.nn.functional.gelu(torch.from_numpy(x), approximate=approximate).numpy()


def gate_in_front(port: Any, right: Any) -> Any:
    return lambda x: right(np.concatenate(np.split(x, 2, -1)[::-1], -1))


UNET = {
    "block's eps": Bug("of_block", group_norm_of(1e-6), "input_blocks.1.0.in_layers.0", "group norm's epsilon is 1e-6"),
    "transformer's eps": Bug("of_transformer", group_norm_of(1e-5), "input_blocks.4.1.norm", "group norm's epsilon is 1e-5"),
    "layer norm's eps": Bug("layer_norm", layer_norm_of(1e-6), "input_blocks.4.1.transformer_blocks.0.norm1", "layer norm's epsilon is 1e-6"),
    "tanh gelu": Bug("gelu", torch_gelu("tanh"), "input_blocks.4.1.transformer_blocks.0.ff.net.2", "tanh form of GELU"),
    "gate in front": Bug("gated", gate_in_front, "input_blocks.4.1.transformer_blocks.0.ff.net.2", "gate is the first half"),
    "skip in front": Bug("joined", lambda p, r: lambda x, skip: r(skip, x), "output_blocks.0.0.in_layers.0", "skip before stream"),
    "time / 1000": Bug("sinusoid", lambda p, r: lambda t, width: r(t / 1000, width), "time_embed:0", "scale of 1 in place of 1000"),
    "sine first": Bug("sinusoid", lambda p, r: lambda t, width: np.roll(r(t, width), width // 2, -1), "time_embed:0", "sines first"),
    "no silu before the embedding": Bug("added", lambda p, r: lambda vec: vec, "input_blocks.1.0.emb_layers.1", "SiLU is left out"),
    "scores": Bug(
        "attention", lambda p, r: lambda q, k, v: r(q * q.shape[-1] ** 0.5, k, v), "input_blocks.4.1.transformer_blocks.0.attn1.to_out.0",
        "scores are not scaled",
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
def test_a_right_port_of_the_unet_is_equal(dtype: type) -> None:
    report = compared(case("sdxl-eps"), ported_unet(case("sdxl-eps"), dtype=dtype))
    assert report.equal and report.unknown == () and len([row for row in report.rows if row.other]) >= 17


@pytest.mark.parametrize("name", UNET)
def test_one_error_in_the_unet_is_found_where_it_is_made(name: str) -> None:
    report = compared(case("sdxl-eps"), ported_unet(case("sdxl-eps"), UNET[name]))
    assert report.made[0].name == UNET[name].first


@pytest.mark.slow
@pytest.mark.parametrize("name", UNET)
def test_the_cause_of_one_error_in_the_unet_is_named(name: str) -> None:
    report = compared(case("sdxl-eps"), ported_unet(case("sdxl-eps"), UNET[name]), explain=True)
    assert UNET[name].says in report.made[0].cause
    narrow = compared(case("sdxl-eps"), ported_unet(case("sdxl-eps"), UNET[name], np.float32))
    assert narrow.made[0].name == UNET[name].first
