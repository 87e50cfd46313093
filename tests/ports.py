"""Ports in NumPy with planted errors, and their traces beside a golden case."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eridiff.trace.cases import Case, open_case, weights_of
from eridiff.trace.compare import Report, compare

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
