"""A port in NumPy finds its errors by `eridiff diff` alone: the first, each of several, and what causes them."""

import importlib.util
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import eridiff
from eridiff.cli import main
from eridiff.lora.names import network_of
from eridiff.trace.cases import Case, inputs_of, open_case, weights_of
from eridiff.trace.causes import CAUSES
from eridiff.trace.compare import Report, compare
from eridiff.trace.format import read_trace, write_trace
from eridiff.trace.names import Names, align
from eridiff.trace.record import record, relative_l2
from eridiff.trace.shapes import distances, fit
from eridiff.weights.detect import sizes_of
from eridiff.weights.keymap import key_map
from tests import tiny
from tests.test_traces import arguments

ROOT = Path(__file__).parents[1]
GOLDENS = ROOT / "tests" / "goldens"
CASES: dict[str, Case] = {}
Arrays = dict[str, np.ndarray]


def case(name: str = "flux-dev-tiny") -> Case:
    return CASES.setdefault(name, open_case(GOLDENS / name))


def fresh_port() -> Any:
    return loaded("numpy_flux")


def loaded(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ported(golden: Case, bugs: tuple["Bug", ...] = (), dtype: type = np.float64) -> Arrays:
    """What the port computes on a case, with errors planted into it."""
    port, arguments = fresh_port(), golden.arguments
    names = {"img": "latents", "txt": "text", "y": "pooled", "timesteps": "times", "ids": "ids", "guidance": "guidance"}
    for bug in bugs:
        setattr(port, bug.function, bug.wrong(port, getattr(port, bug.function)))
    port.flux(
        {name: tensor.numpy().astype(dtype) for name, tensor in weights_of(golden.description).items()},
        golden.description["config"],
        {n: arguments[a].numpy().astype(dtype) for n, a in names.items() if arguments[a] is not None},
    )
    return {name: np.array(value) for name, value in port.TRACE.items()}


def compared(golden: Case, trace: Any, **options: Any) -> Report:
    found = {name: torch.as_tensor(value) for name, value in trace.items()}
    return compare(found, golden.expected, network=golden.network, run=golden.run, **options)


@dataclass(frozen=True)
class Bug:
    """An error of the port: the function that is wrong, how, the first tensor that shows it, and what it is called."""

    function: str
    wrong: Callable[[Any, Any], Any]
    first: str
    says: str


def split_last(x: Any, parts: int) -> list[Any]:
    return np.split(x, parts, -1)


def halves_rotated(x: Any, cos: Any, sin: Any) -> Any:
    a, b = split_last(x, 2)
    return np.concatenate([cos * a - sin * b, sin * a + cos * b], -1)


def rms(eps: float, gain: Callable[[Any], Any] = lambda scale: scale) -> Callable[..., Any]:
    return lambda port, right: lambda x, scale: x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain(scale)


def of_linear(change: Callable[[Any, Any, Any], Any], where: str) -> Callable[..., Any]:
    def wrong(port: Any, right: Any) -> Any:
        def linear(weights: Any, name: str, x: Any) -> Any:
            if where not in name:
                return right(weights, name, x)
            return port.kept(name, change(x, weights[f"{name}.weight"], weights[f"{name}.bias"]))

        return linear

    return wrong


def of_chunks(order: list[int], where: str) -> Callable[..., Any]:
    def wrong(port: Any, right: Any) -> Any:
        def chunks_of(weights: Any, name: str, vec: Any, count: int) -> Any:
            chunks = right(weights, name, vec, count)
            return [chunks[i] for i in order] if where in name else chunks

        return chunks_of

    return wrong


def of_attention(port: Any, right: Any, scale: Callable[[Any], float], causal: bool = False) -> Any:
    def attention(q: Any, k: Any, v: Any) -> Any:
        scores = q @ k.swapaxes(-1, -2) * scale(q)
        if causal:
            scores = np.where(np.tri(q.shape[2], dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        joined = (weights / weights.sum(-1, keepdims=True)) @ v
        return joined.transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], -1)

    return attention


def heads_as(shape: tuple[str, ...], order: tuple[int, ...]) -> Callable[..., Any]:
    def wrong(port: Any, right: Any) -> Any:
        def heads_of(qkv: Any, heads: int) -> Any:
            b, tokens, _ = qkv.shape
            sizes = {"3": 3, "h": heads, "d": -1}
            return qkv.reshape(b, tokens, *(sizes[s] for s in shape)).transpose(order)

        return heads_of

    return wrong


def mlp_of_the_input(port: Any, right: Any) -> Any:
    def updated(weights: Any, block: str, stream: str, x: Any, attended: Any, chunks: Any) -> Any:
        after = x + chunks[2] * port.linear(weights, f"{block}.{stream}_attn.proj", attended)
        a = port.kept(f"{block}.{stream}_mlp:0", port.modulated(x, chunks[3], chunks[4]))
        return after + chunks[5] * port.linear(
            weights, f"{block}.{stream}_mlp.2", port.gelu(port.linear(weights, f"{block}.{stream}_mlp.0", a))
        )

    return updated


def without_gates(port: Any, right: Any) -> Any:
    def updated(weights: Any, block: str, stream: str, x: Any, attended: Any, chunks: Any) -> Any:
        return right(weights, block, stream, x, attended, [*chunks[:2], 1.0, *chunks[3:5], 1.0])

    return updated


def sinusoid(factor: float = 1000.0, divisor: int = 128, sine_first: bool = False, dtype: Any = np.float64) -> Any:
    def wrong(port: Any, right: Any) -> Any:
        def made(times: Any) -> Any:
            frequencies = np.exp(-np.log(10000) * np.arange(128) / divisor).astype(dtype)
            angles = (factor * times).astype(dtype)[:, None] * frequencies
            parts = [np.cos(angles), np.sin(angles)]
            return np.concatenate(parts[::-1] if sine_first else parts, -1)

        return made

    return wrong


Q_NORM = "double_blocks.0.img_attn.norm.query_norm"
IN = "double_blocks.0.img_attn.qkv:0"
MOD = "double_blocks.0.img_mod.lin"
HIDDEN = "double_blocks.0.img_mlp.2"
BUGS = {
    "rms eps 1e-5": Bug("rms_norm", rms(1e-5), Q_NORM, "RMS norm's epsilon is 1e-5"),
    "rms eps of float32": Bug("rms_norm", rms(2.0**-23), Q_NORM, "RMS norm's epsilon is float32's"),
    "rms without gain": Bug("rms_norm", rms(1e-6, lambda s: 1.0), Q_NORM, "gain is left out"),
    "rms gain 1 + w": Bug("rms_norm", rms(1e-6, lambda s: 1 + s), Q_NORM, "gain is taken as 1 + weight"),
    "no q, k norm": Bug("rms_norm", lambda p, r: lambda x, s: x, Q_NORM, "norm of q and k is left out"),
    "layer norm eps 1e-5": Bug(
        "layer_norm", lambda p, r: lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5),
        IN, "layer norm's epsilon is 1e-5",
    ),
    "layer norm without mean": Bug(
        "layer_norm", lambda p, r: lambda x: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6), IN, "an RMS norm in place",
    ),
    "shift and scale": Bug("modulated", lambda p, r: lambda x, shift, scale: r(x, scale, shift), IN, "shift and scale are exchanged"),
    "scale for 1 + scale": Bug("modulated", lambda p, r: lambda x, shift, scale: r(x, shift, scale - 1), IN, "scale in place of 1 + scale"),
    "no shift": Bug("modulated", lambda p, r: lambda x, shift, scale: r(x, 0, scale), IN, "the shift is left out"),
    "final shift and scale": Bug(
        "final_modulated", lambda p, r: lambda x, c: r(x, c[::-1]), "final_layer.linear:0", "shift and scale are exchanged",
    ),
    "mlp's chunks first": Bug("chunks_of", of_chunks([3, 4, 5, 0, 1, 2], "_mod."), IN, "chunks of MLP and attention"),
    "gate first": Bug("chunks_of", of_chunks([1, 2, 0], "single"), "single_blocks.0.linear1:0", "gate, shift, scale"),
    "no silu": Bug("silu", lambda p, r: lambda x: x, "time_in.out_layer", "SiLU is left out"),
    "gelu erf": Bug(
        "gelu", lambda p, r: lambda x: torch.nn.functional.gelu(torch.from_numpy(x)).numpy(), HIDDEN, "erf form of GELU",
    ),
    "quick gelu": Bug("gelu", lambda p, r: lambda x: x / (1 + np.exp(-1.702 * x)), HIDDEN, "quick GELU"),
    "silu for gelu": Bug("gelu", lambda p, r: lambda x: x / (1 + np.exp(-x)), HIDDEN, "SiLU in place of GELU"),
    "relu for gelu": Bug("gelu", lambda p, r: lambda x: np.maximum(x, 0), HIDDEN, "ReLU in place of GELU"),
    "square transposed": Bug(
        "linear", of_linear(lambda x, w, b: x @ w + b, "attn.proj"), "double_blocks.0.img_attn.proj", "square matrix is transposed",
    ),
    "matrix reshaped": Bug(
        "linear", of_linear(lambda x, w, b: x @ w.reshape(w.shape[::-1]) + b, "qkv"), "double_blocks.0.img_attn.qkv", "other order",
    ),
    "no bias": Bug("linear", of_linear(lambda x, w, b: x @ w.T, "linear2"), "single_blocks.0.linear2", "bias is left out"),
    "scores not scaled": Bug("attention", lambda p, r: of_attention(p, r, lambda q: 1.0), "double_blocks.0.attention", "not scaled"),
    "scores by width": Bug(
        "attention", lambda p, r: of_attention(p, r, lambda q: (q.shape[1] * q.shape[3]) ** -0.5), "double_blocks.0.attention",
        "scaled by the whole width",
    ),
    "causal": Bug("attention", lambda p, r: of_attention(p, r, lambda q: q.shape[3] ** -0.5, True), "double_blocks.0.attention", "causal"),
    "heads merged": Bug(
        "attention", lambda p, r: lambda q, k, v: (
            r(q, k, v).reshape(q.shape[0], q.shape[2], q.shape[1], -1).swapaxes(-1, -2).reshape(q.shape[0], q.shape[2], -1)
        ), "double_blocks.0.attention", "heads are joined as (features, heads)",
    ),
    "qkv by head": Bug("heads_of", heads_as(("h", "3", "d"), (3, 0, 2, 1, 4)), Q_NORM, "(heads, 3, features)"),
    "qkv head last": Bug("heads_of", heads_as(("3", "d", "h"), (2, 0, 4, 1, 3)), Q_NORM, "(3, features, heads)"),
    "q and k": Bug("heads_of", lambda p, r: lambda qkv, h: r(qkv, h)[[1, 0, 2]], Q_NORM, "q and k are exchanged"),
    "k and v": Bug(
        "heads_of", lambda p, r: lambda qkv, h: r(qkv, h)[[0, 2, 1]], "double_blocks.0.img_attn.norm.key_norm", "k and v are exchanged",
    ),
    "rope halves": Bug("rotated", lambda p, r: halves_rotated, "double_blocks.0.q_rope", "rotation of halves"),
    "rope backwards": Bug("rotated", lambda p, r: lambda x, c, s: r(x, c, -s), "double_blocks.0.q_rope", "opposite direction"),
    "no rope": Bug("rotated", lambda p, r: lambda x, c, s: x, "double_blocks.0.q_rope", "rotation is left out"),
    "rope rows, columns": Bug("rope_table", lambda p, r: lambda i, a, t: r(i[:, [0, 2, 1]], a, t), "rope.cos", "rows and columns"),
    "rope theta": Bug("rope_table", lambda p, r: lambda i, a, t: r(i, a, 1000), "rope.cos", "not 10000 but 1000"),
    "rope from 1": Bug("rope_table", lambda p, r: lambda i, a, t: r(i + 1, a, t), "rope.cos", "start at 1"),
    "image first": Bug("joined_streams", lambda p, r: lambda t, i: r(i, t), "double_blocks.0.q_rope", "joined stands in the other order"),
    "no gates": Bug("updated", without_gates, "double_blocks.0.img_mlp:0", "gates are left out"),
    "mlp of the input": Bug("updated", mlp_of_the_input, "double_blocks.0.img_mlp:0", "reads the stream before"),
    "time scale": Bug("sinusoid", sinusoid(factor=1.0), "time.sinusoid", "scale of 1 in place of 1000"),
    "sine first": Bug("sinusoid", sinusoid(sine_first=True), "time.sinusoid", "sines first"),
    "half - 1": Bug("sinusoid", sinusoid(divisor=127), "time.sinusoid", "half - 1"),
    "sinusoid in float32": Bug("sinusoid", sinusoid(dtype=np.float32), "time.sinusoid", "computed in float32"),
}  # fmt: skip
# what two functions make the same of, or what float32 hides: these are looked for in float64 alone
ONLY_IN_FLOAT64 = ("sinusoid in float32", "rms eps of float32")


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


# names and arrangements -----------------------------------------------------------------------------------------------


def exported(recording: dict[str, Tensor], network: Any, layout: str, prefix: str = "") -> dict[str, Tensor]:
    """The outputs of modules with parameters as another implementation of `layout` would name and cut them."""
    names: dict[str, Tensor] = {}
    rules, sizes = key_map(network_of(network)).layouts[layout], sizes_of(network.config)
    for path, module in network.named_modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        if not own or path not in recording:
            continue
        entry = rules.entry(f"{path}.{own[0]}", sizes)
        axis = 1 if isinstance(module, torch.nn.Conv2d | torch.nn.GroupNorm) else -1
        value = recording[path].movedim(axis, 0)
        values = entry.write(value) if entry.operation in ("rows", "swap_halves") else [value] * len(entry.foreign)
        for foreign, part in zip(entry.foreign, values, strict=True):
            names[prefix + foreign.rpartition(".")[0]] = part.movedim(0, axis)
    for name in ("forward", "step"):
        names |= {n: t for n, t in recording.items() if n == name or n.startswith(f"{name}:")}
    return names


def recorded(network: Any, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    given = [
        value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in arguments(network)
    ]
    with record(network) as recording, torch.no_grad():
        network(*given)
    return dict(recording)


FAMILIES: dict[str, Callable[[], Any]] = {
    "flux": tiny.flux, "mmdit": tiny.mmdit, "unet": tiny.unet, "vae": tiny.autoencoder,
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "transformer.", "model.diffusion_model."])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("family", ["flux", "mmdit", "unet", "vae"])
def test_a_trace_with_published_names_is_aligned_with_ours(family: str, layout: str, prefix: str) -> None:
    network = FAMILIES[family]().double()
    if prefix not in key_map(family).layouts[layout].prefixes:
        prefix = ""
    native = recorded(network)
    foreign = exported(native, network, layout, prefix)
    report = compare(foreign, native, layout=(family, layout), network=network)
    assert report.equal and report.unknown == () and len([r for r in report.rows if r.other]) > 0.3 * len(foreign)
    with_parameters = [
        p for p, m in network.named_modules() if any(True for _ in m.parameters(recurse=False)) and p in native
    ]
    assert {s for s in align(list(foreign), {family: network.config}, layout, family).sources} >= set(with_parameters)


def test_blocks_have_the_common_name_of_what_is_in_them() -> None:
    config = tiny.flux().config
    original, diffusers = (Names("flux", layout, config) for layout in ("original", "diffusers"))
    found = {name: diffusers.native(name) for name in (
        "transformer_blocks.1.ff", "transformer_blocks.1.0", "single_transformer_blocks.0", "time_text_embed.timestep_embedder:0",
        "transformer_blocks.0.attn.norm_q@3", "transformer_blocks.0.attn", "nothing", "norm_out.linear",
    )}  # fmt: skip
    assert {name: None if place is None else place[0] for name, place in found.items()} == {
        "transformer_blocks.1.ff": "double_blocks.1.image.mlp", "transformer_blocks.1.0": "double_blocks.1.0",
        "single_transformer_blocks.0": "single_blocks.0", "time_text_embed.timestep_embedder:0": "time_in:0",
        "transformer_blocks.0.attn.norm_q@3": "double_blocks.0.image.q_norm@3", "transformer_blocks.0.attn": None,
        "nothing": None, "norm_out.linear": "final.modulation",
    }  # fmt: skip
    place = original.native("double_blocks.0.img_mlp:0")
    assert place is not None and place[0] == "double_blocks.0.image.mlp:0"


ARRANGEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.permute(0, 2, 3, 1), "tokens": lambda x: x.flatten(2).transpose(1, 2),
    "flat": lambda x: x.flatten(2), "heads last": lambda x: x.transpose(1, 2).flatten(2), "a leading one": lambda x: x[None],
    "batch second": lambda x: x.transpose(0, 1), "no batch": lambda x: x[0] if len(x) == 1 else x,
}  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(ARRANGEMENTS)), st.lists(st.integers(1, 5), min_size=4, max_size=4), st.integers(0, 9),
    st.sampled_from([0.0, 1e-4, 0.1]),
)  # fmt: skip
def test_another_arrangement_of_the_same_values_is_found_both_ways(
    how: str, shape: list[int], seed: int, noise: float
) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=rng, dtype=torch.float64)
    noisy = x + noise * torch.randn(shape, generator=rng, dtype=torch.float64)
    there = ARRANGEMENTS[how](noisy)
    for found, wanted in ((there, x), (noisy, ARRANGEMENTS[how](x))):
        fitted = fit(found, wanted)
        assert fitted is not None and fitted.tensor.shape == wanted.shape
        if found.shape != wanted.shape:  # a square is ambiguous only where shapes are equal
            assert relative_l2(fitted.tensor, wanted) <= relative_l2(noisy, x) + 1e-12


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda t: t[None].expand(2, 5, 8), "equal for each row"),
        (lambda t: t.repeat_interleave(2, -1), "each value twice"),
        (lambda t: torch.cat([t, t], -1), "its halves equal"),
    ],
)
def test_a_table_that_is_repeated_is_taken_once(make: Callable[[Tensor], Tensor], says: str) -> None:
    table = torch.randn(5, 8)
    fitted = fit(make(table), table)
    assert fitted is not None and says in fitted.how and torch.equal(fitted.tensor, table)
    repeated = fit(table, table[None].expand(2, 5, 8))
    assert repeated is not None and repeated.how == "[5, 8] against [2, 5, 8]: the same for each row"
    assert fit(torch.zeros(3, 4), torch.zeros(5, 4)) is None


def test_distances_are_what_numpy_computes() -> None:
    a, b = (torch.randn(3, 700_001, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    a = torch.where(torch.arange(700_001) < 9, b, a)
    found, x, y = distances(a, b), a.double().numpy(), b.double().numpy()
    assert found["relative"] == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(y), rel=1e-12)
    assert found["max_abs"] == pytest.approx(np.abs(x - y).max())
    assert found["cosine"] == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    assert found["first"] == [0, 9] and distances(b, b)["first"] == []


# errors of any kind in any module of ours ------------------------------------------------------------------------------


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda t: t * 1.001, "shifted": lambda t: t + 1e-3 * t.abs().mean(), "one value": lambda t: t + 0.1 * (torch.arange(t.numel()) == 3).view(t.shape),
    "negated": lambda t: -t, "zero": lambda t: 0 * t, "rolled": lambda t: t.roll(1, -1), "flipped": lambda t: t.flip(-1),
    "rounded": lambda t: t.bfloat16().to(t.dtype), "clamped": lambda t: t.clamp(-0.1, 0.1), "relu": lambda t: t.relu(),
}  # fmt: skip


def injected(family: str, seed: int) -> None:
    """A random module goes wrong in a random way, in a trace of a random layout and dtype; it is named first."""
    rng = random.Random(seed)
    network = FAMILIES[family]().double()
    layout = rng.choice(["native", "original", "diffusers"])
    dtype = rng.choice([torch.float64, torch.float32])
    clean = recorded(network)
    names = [
        path
        for path, module in network.named_modules()
        if path in clean and any(True for _ in module.parameters(recurse=False))
    ]
    path, kind = rng.choice(names), rng.choice(list(KINDS))
    narrow = FAMILIES[family]().to(dtype)
    handle = narrow.get_submodule(path).register_forward_hook(lambda module, given, output: KINDS[kind](output))
    found = recorded(narrow, dtype)
    handle.remove()
    trace = found if layout == "native" else exported(found, network, layout)
    run = lambda dtype: lambda network: recorded_run(network, dtype)  # noqa: E731
    report = compare(trace, clean, network=network, run=run, layout=(family, layout))
    if torch.equal(KINDS[kind](clean[path]), clean[path]):
        return
    native = align(list(trace), {family: network.config}, layout, family).sources
    assert report.made and report.made[0].name == native[path].name, (seed, path, kind, layout, dtype, report.made[:2])
    assert len(report.groups()) == 1, (seed, [g[0].name for g in report.groups()])


def recorded_run(network: Any, dtype: torch.dtype) -> None:
    network(*[v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in arguments(network)])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_in_any_module_is_the_first_divergence(family: str) -> None:
    for seed in range(2 if family == "unet" else 6):
        injected(family, seed)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_fifty_errors_a_family_are_each_the_first_divergence(family: str) -> None:
    for seed in range(100, 150):
        injected(family, seed)


# the command ----------------------------------------------------------------------------------------------------------


def saved(trace: Any, path: Path) -> str:
    if path.suffix == ".npz":
        np.savez(path, **trace)
    elif path.suffix:
        write_trace({name: torch.as_tensor(value) for name, value in trace.items()}, path)
    else:
        path.mkdir()
        for name, value in trace.items():
            np.save(path / f"{name}.npy", value)
    return str(path)


def said(capsys: pytest.CaptureFixture[str], *command: str) -> tuple[int, str]:
    code = main(["diff", *command])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


THREE = ("rms eps 1e-5", "rope halves", "final shift and scale")
GOLDEN = str(GOLDENS / "flux-dev-tiny")


@pytest.mark.parametrize("form", ["mine.npz", "mine.safetensors", "mine"])
def test_the_terminal_names_three_errors_with_their_causes(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = saved(ported(case(), tuple(BUGS[name] for name in THREE)), tmp_path / form)
    code, text = said(capsys, mine, GOLDEN, "--explain")
    lines = text.splitlines()
    assert code == 1 and lines[0] == (
        "49 of 52 tensors compared (3 missing in yours: double_blocks.0.image.mlp, double_blocks.0.text.mlp, single_blocks.0.mlp_act); "
        "noise floor of float64 here 2e-16"
    )
    assert "rope.cos: [22, 8] against [2, 22, 8]: the same for each row (and 1 more)" in lines
    made = [line.split()[:2] + [" ".join(line.split()[2:])] for line in lines if "FIRST" in line or "ALSO" in line]
    assert made == [
        ["double_blocks.0.img_attn.norm.query_norm", "3.3e-06", "FIRST"], ["double_blocks.0.q_rope", "7.4e-01", "ALSO MADE HERE"],
        ["final_layer.linear:0", "1.0e+00", "ALSO MADE HERE"],
    ]  # fmt: skip
    causes = [line.partition("looks like: ")[2] for line in lines if "looks like" in line]
    assert [cause.partition(" (fits")[0] for cause in causes] == [
        "the RMS norm's epsilon is 1e-5 in place of 1e-6", "rotation of halves (i, i + D/2) in place of neighbours (2i, 2i + 1)",
        "shift and scale are exchanged",
    ]  # fmt: skip
    assert lines[-1].startswith("3 errors; ") and lines[-1].endswith(
        " tensors behind them differ by what is carried on alone"
    )


def test_equal_traces_end_with_0_and_a_word_on_epsilons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = saved(ported(case()), tmp_path / "mine.npz")
    code, text = said(capsys, mine, GOLDEN)
    assert code == 0 and text.endswith(
        "equal\na wrong epsilon may not show in flux-dev-tiny: compare with flux-eps too\n"
    )
    code, text = said(capsys, mine, GOLDEN, "--tolerance", "1e-20")
    assert code == 1
    code, text = said(capsys, mine, GOLDEN, "--json")
    found = json.loads(text)
    assert code == 0 and found["equal"] and found["errors"] == [] and len(found["rows"]) > 49
    code, text = said(capsys, mine, GOLDEN, "--all")
    assert code == 0 and "relative  max abs" in text and "vec " in text


def test_the_page_shows_errors_curve_heat_maps_and_every_tensor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = saved(ported(case(), tuple(BUGS[name] for name in THREE)), tmp_path / "<mine>.npz")
    code, _ = said(capsys, mine, GOLDEN, "--explain", "--html", str(tmp_path / "new" / "page.html"))
    text = (tmp_path / "new" / "page.html").read_text()
    tree = ElementTree.fromstring(text.replace("<!doctype html>", "").replace('<meta charset="utf-8">', "").replace(
        '<meta name="viewport" content="width=device-width">', ""))  # fmt: skip
    assert code == 1 and "http" not in text and "<script" not in text and "&lt;mine&gt;" in text
    svgs = tree.findall(".//svg")
    assert len(svgs) == 4 and len(svgs[0].findall("circle")) > 120 and len(svgs[1].findall("rect")) == 16 * 16
    rows = tree.findall(".//tbody/tr")
    made = {row.find("td").text for row in rows if row.get("class") == "here"}  # type: ignore[union-attr]
    assert len(rows) > 80 and {Q_NORM, "double_blocks.0.q_rope", "final_layer.linear:0"} <= made
    first = [p.find("b").text for p in tree.findall(".//p") if p.find("b") is not None]  # type: ignore[union-attr]
    assert first == [Q_NORM, "double_blocks.0.q_rope", "final_layer.linear:0"]


def test_a_float32_epsilon_that_passes_one_case_is_seen_in_the_other() -> None:
    golden = case("flux-eps")
    report = compared(golden, ported(golden, (BUGS["rms eps of float32"],), np.float32), explain=True)
    assert (
        report.made[0].name == Q_NORM
        and "float32's 1.19e-7" in report.made[0].cause
        and (report.made[0].local or 0) > 1e-2
    )


def test_what_is_not_finite_is_named_first_of_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = ported(case(), (BUGS["rope halves"],))
    trace["double_blocks.1.img_mlp.2"][1, 3, 5] = np.nan
    code, text = said(capsys, saved(trace, tmp_path / "mine.npz"), GOLDEN)
    first = next(line for line in text.splitlines() if "FIRST" in line)
    assert code == 1 and first.split()[:2] == ["double_blocks.1.img_mlp.2", "nan"]
    assert "1 of 1440 values are not finite, the first at [1, 3, 5]" in first and "ALSO MADE HERE" in text


def test_missing_and_unknown_names_are_listed_with_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = ported(case())
    trace["double_blocks.0.img_attn.projj"] = trace.pop("double_blocks.0.img_attn.proj")
    code, text = said(capsys, saved(trace, tmp_path / "mine.npz"), GOLDEN)
    assert (
        code == 0
        and "1 names in yours are unknown: double_blocks.0.img_attn.projj (nearest: double_blocks.0.image.proj)" in text
    )
    assert "double_blocks.0.image.proj" in text.splitlines()[0]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("absent.npz", GOLDEN), "absent.npz' does not exist"),
        (("other.npz", GOLDEN), "no tensor of the two traces has the same name: 'x' "),
        (("mine.npz", GOLDEN, "--map", "flix"), "there is no map 'flix'; there are flux, mmdit, unet, vae"),
        (("mine.npz", GOLDEN, "--map", "flux:bfl"), "has no layout 'bfl'; it has native, original, diffusers"),
        (("mine.npz", "mine.npz", "--explain"), "to explain a difference needs the weights: give --weights FILE"),
        (("mine.npz", str(GOLDENS / "text-t5-tiny")), "is a golden of another kind; give one of ae-, flux-"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence_and_2(
    command: tuple[str, ...],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("mine.npz", out=np.zeros((2, 15, 64)))
    np.savez("other.npz", x=np.zeros(3))
    code, text = said(capsys, *command)
    assert code == 2 and says in text and text.count("\n") == 1


def test_without_weights_the_first_difference_and_those_with_equal_inputs_are_made_there() -> None:
    network = tiny.flux()
    clean = recorded(network, torch.float32)
    hooks = [
        network.get_submodule(path).register_forward_hook(lambda m, i, o: 1.01 * o)
        for path in ("double_blocks.1.image.qkv", "time_in.in_layer")
    ]
    found = recorded(network, torch.float32)
    for hook in hooks:
        hook.remove()
    report = compare(found, clean)
    assert [g[0].name for g in report.groups()][0] == "time_in.in_layer" and not report.replayed
    assert any(row.verdict == "carried" for row in report.rows)
    assert compare(clean, clean).equal


def test_a_recorded_picture_is_replayed_step_by_step_with_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trace of a whole generation, every call; one wrong velocity in the second step is found there and nowhere else."""
    flux = eridiff.load(device="cpu", dtype=torch.float32, progress=False)
    weights = str(eridiff.save_network(flux.network, tmp_path / "flux.safetensors"))
    with record(flux.network, calls="all", to=tmp_path / "right.safetensors"):
        flux.generate("a fox at night", seed=1, steps=3)
    right = read_trace(tmp_path / "right.safetensors")
    wrong = {**right, "single_blocks.0.linear2@1": right["single_blocks.0.linear2@1"] * 1.01}
    write_trace(wrong, tmp_path / "wrong.safetensors")
    both = str(tmp_path / "wrong.safetensors"), str(tmp_path / "right.safetensors")
    code, text = said(capsys, both[1], both[1], "--weights", weights)
    assert code == 0 and "equal" in text
    code, text = said(capsys, *both, "--weights", weights)
    made = [line for line in text.splitlines() if "FIRST" in line or "ALSO" in line]
    assert code == 1 and made[0].split()[0] == "single_blocks.0.linear2@1" and len(made) <= 2


def test_probes_are_compared_with_a_whole_trace(tmp_path: Path) -> None:
    network = tiny.flux()
    with record(network, probes=True, to=tmp_path / "t.safetensors"):
        network(*arguments(network))
    whole = recorded(network, torch.float32)
    assert compare(read_trace(tmp_path / "t.safetensors"), whole).equal
    whole["final.linear"] += 1
    assert not compare(read_trace(tmp_path / "t.safetensors"), whole).equal


@cache
def right(family: str) -> tuple[Any, Tensor]:
    network = FAMILIES[family]().double()
    return network, outcome(network)


def outcome(network: Any) -> Tensor:
    with torch.no_grad():
        given = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in arguments(network)]
        output: Tensor = network(*given)
    return output


@pytest.mark.parametrize("number", range(len(CAUSES)), ids=[f"{c.says} ({c.function})" for c in CAUSES])
def test_every_cause_changes_a_network_and_leaves_it_as_it_was(number: int) -> None:
    effects = []
    for family in FAMILIES:
        network, expected = right(family)
        with CAUSES[number].planted():
            try:
                effects.append(not torch.equal(outcome(network), expected))
            except RuntimeError:  # an error that these shapes do not allow
                effects.append(False)
        assert torch.equal(outcome(network), expected)
    assert any(effects)
