"""Recording changes nothing and leaves nothing out; a trace is read from every form that docs/traces.md names."""

import io
import json
import math
import statistics
import subprocess
import sys
import zipfile
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import eridiff
from eridiff.errors import TraceError
from eridiff.models.autoencoder import Autoencoder
from eridiff.models.flux import Flux
from eridiff.models.mmdit import MMDiT
from eridiff.trace import probe, read_trace, record, write_trace
from tests import tiny


def arguments(network: nn.Module) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    if isinstance(network, Flux):
        return drawn(2, 6, 64), drawn(2, 5, 12), drawn(2, 8), torch.tensor([0.7, 0.2]), (2, 3), torch.tensor([3.5, 1.0])  # type: ignore[return-value]
    if isinstance(network, MMDiT):
        return drawn(2, 16, 4, 6), drawn(2, 5, 20), drawn(2, 16), torch.tensor([0.7, 0.2])
    if isinstance(network, Autoencoder):
        return (drawn(1, 3, 16, 16),)
    return drawn(2, 4, 8, 8), drawn(2, 5, 16), drawn(2, 8 + 6 * 256), torch.tensor([700.0, 20.0])


NETWORKS: dict[str, Callable[[], Any]] = {
    "flux": tiny.flux, "mmdit": tiny.mmdit, "unet": tiny.unet, "autoencoder": tiny.autoencoder,
}  # fmt: skip


@pytest.mark.parametrize("kind", NETWORKS)
def test_recording_changes_no_bit_and_leaves_no_trace_in_the_network(kind: str, tmp_path: Path) -> None:
    network = NETWORKS[kind]()
    given = arguments(network)
    plain = network(*given)
    before = {name: sorted(vars(module)) for name, module in network.named_modules()}
    with record(network, calls="all") as inside, record(network, to=tmp_path / "t.safetensors"):
        assert torch.equal(network(*given), plain)
    assert before == {name: sorted(vars(module)) for name, module in network.named_modules()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert torch.equal(inside["forward"], plain)
    with pytest.raises(ZeroDivisionError), record(network):
        _ = 1 / 0
    assert not network._forward_hooks and torch.equal(network(*given), plain)


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_module_that_runs_is_recorded_and_the_others_are_listed(kind: str) -> None:
    network = NETWORKS[kind]()
    ran: set[str] = set()
    handles = [
        m.register_forward_hook(lambda *_, name=name: ran.add(name))  # type: ignore[misc]
        for name, m in network.named_modules()
        if name
    ]
    with record(network) as recording:
        network(*arguments(network))
    for handle in handles:
        handle.remove()
    missing = {name for name in ran if not any(n == name or n.startswith((f"{name}.", f"{name}:")) for n in recording)}
    assert missing == set() and not ran & set(recording.unrecorded)
    never = {name for name, said in recording.unrecorded.items() if said == "never ran"}
    assert never | ran >= {n for n, m in network.named_modules() if n and type(m).forward is not nn.Module.forward}


def test_what_a_porter_needs_is_in_the_trace_of_an_image() -> None:
    """Rope table, q and k behind norm and rope, attention, modulated inputs; latents and velocity of every step."""
    model = eridiff.load(device="cpu", progress=False)
    with record(model, calls="all") as recording:
        model.generate("a fox at night", seed=1, steps=2)
    for name in (
        "prepare.rope", "conditioning_vector", "double_blocks.0.attention:0", "double_blocks.0.attention:1",
        "double_blocks.0.attention", "double_blocks.0.image.qkv:0", "double_blocks.0.image.mlp:0", "final.linear:0",
        "step:latents", "step:latents@1", "step", "step@1", "autoencoder.decode:latents", "autoencoder.decode",
        "clip.forward:input_ids", "t5.forward.last_hidden_state",
    ):  # fmt: skip
        assert name in recording, name
    first, second, velocity = (recording[n].double() for n in ("step:latents", "step:latents@1", "step"))
    moved = (second - first) / velocity
    assert float(moved.std()) < 1e-3 * abs(float(moved.mean()))  # one Euler step along the velocity


Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Wrapped:
    value: Tensor
    note: str = "no tensor"


class Odd(nn.Module):
    """Takes and gives what networks of others do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.act = nn.ReLU(inplace=True)
        self.silent = Silent()
        self.tree = Tree()
        self.lazy = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        self.silent()
        given = x.clone()
        self.act(given)
        return self.tree(x, mask=given, more={"a": [x + 1, (x + 2,)], "b": Wrapped(x + 3)}, pair=Pair(x, x + 4))


class Silent(nn.Module):
    def forward(self) -> str:
        return "nothing"


class Tree(nn.Module):
    def forward(self, x: Tensor, mask: Tensor, more: Any, pair: Pair) -> dict[str, Any]:
        return {"out": Wrapped(x * 2), "rest": [mask, {"deep": more["a"][0]}]}


def test_trees_keywords_and_inputs_before_an_in_place_change_are_recorded() -> None:
    module = Odd()
    with record(module) as recording:
        module(torch.tensor([-1.0, 2.0]))
    expected = {
        "forward:x": [-1, 2], "act:0": [-1, 2], "act": [0, 2], "tree:0": [-1, 2], "tree:mask": [0, 2], "tree:more.a.0": [0, 3],
        "tree:more.a.1": [1, 4], "tree:more.b.value": [2, 5], "tree:pair.0": [-1, 2], "tree:pair.1": [3, 6],
        "tree.out.value": [-2, 4], "tree.rest.0": [0, 2], "tree.rest.1.deep": [0, 3],
        "forward.out.value": [-2, 4], "forward.rest.0": [0, 2], "forward.rest.1.deep": [0, 3],
    }  # fmt: skip
    assert {name: tensor.tolist() for name, tensor in recording.items()} == expected
    assert list(recording)[:3] == ["forward:x", "act:0", "act"]  # in the order of computation
    assert recording.unrecorded == {
        "inner": "never ran", "lazy": "never ran", "silent": "its output, a str, holds no tensor",
    }  # fmt: skip


def test_calls_and_patterns_choose_what_is_kept() -> None:
    network = tiny.flux()
    latents, *given = arguments(network)
    run = network.prepare(given[0], given[1], torch.tensor([0.9, 0.6, 0.3]), given[3], given[4])

    def names(**options: Any) -> list[str]:
        with record(network, ["step*", "final.linear"], **options) as recording:
            for i in range(3):
                network.step(latents + i, run, i)
        return list(recording)

    one = ["step:latents", "step:i", "final.linear", "step"]
    assert names() == one and names(calls=0) == one
    assert names(calls=2) == [f"{name}@2" for name in one]
    assert names(calls=(0, 2)) == names(calls=0) + names(calls=2)
    assert names(calls="all") == names(calls=range(3)) and len(names(calls="all")) == 12
    with record(network, "step") as last:
        for i in range(3):
            out = network.step(latents + i, run, i)
    assert torch.equal(last["step"], out)


def test_a_pattern_without_a_tensor_is_an_error_that_names_the_nearest() -> None:
    network = tiny.flux()
    with pytest.raises(TraceError, match="no tensor is called 'double_blocks.0.imge.qkv'.*double_blocks.0.image.qkv"):  # noqa: SIM117
        with record(network, "double_blocks.0.imge.qkv"):
            network(*arguments(network))


@pytest.mark.parametrize("how", ["block", "wrapper", "forward"])
def test_a_compiled_module_is_refused_by_name(how: str) -> None:
    network: Any = tiny.flux()
    if how == "block":
        network.double_blocks[1].compile()
    elif how == "wrapper":
        network.double_blocks[1] = torch.compile(network.double_blocks[1])
    else:
        network.double_blocks[1].forward = torch.compile(network.double_blocks[1].forward)
    with pytest.raises(TraceError, match="'double_blocks.1' is compiled.*before it is compiled"), record(network):
        pass


# files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("calls", ["last", "all"])
def test_a_trace_in_a_file_is_the_one_in_memory(kind: str, calls: Any, tmp_path: Path) -> None:
    network = NETWORKS[kind]()
    path = tmp_path / "new" / "t.safetensors"
    with record(network, calls=calls) as inside, record(network, calls=calls, to=path) as streamed:
        for _ in range(2):
            network(*arguments(network))
        inside["own"] = streamed["own"] = torch.arange(3)
        assert torch.equal(streamed["own"], inside["own"]) and len(streamed) == len(inside)
    trace = read_trace(path)
    assert list(trace) == list(inside) and trace.ordered
    assert all(
        torch.equal(trace[name], tensor) and trace[name].dtype == tensor.dtype for name, tensor in inside.items()
    )
    assert trace.metadata.get("unrecorded", {}) == inside.unrecorded
    assert [*path.parent.iterdir()] == [path]
    read = load_file(path)  # a plain safetensors file, in which no tensor is repeated
    distinct = {(t.data_ptr(), t.shape) for t in inside.values()}
    assert len(read) <= len(distinct) < 0.75 * len(inside)
    (said,) = trace.metadata["eridiff.config"].values()
    assert said == json.loads(json.dumps({**vars(network.config)}))


def test_nothing_is_written_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), record(tiny.flux(), to=tmp_path / "t.safetensors"):
        _ = 1 / 0
    assert [*tmp_path.iterdir()] == []


def test_probes_keep_statistics_and_values_at_fixed_places(tmp_path: Path) -> None:
    network = tiny.flux()
    path = tmp_path / "t.safetensors"
    with record(network) as whole, record(network, probes=True, to=path):
        network(*arguments(network))
    trace = read_trace(path)
    assert all(torch.equal(trace[name], probe(tensor)) for name, tensor in whole.items())
    assert trace.probes == {name: list(tensor.shape) for name, tensor in whole.items()}
    assert path.stat().st_size < 0.5 * sum(t.nbytes for t in whole.values())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200), st.integers(0, 3), st.sampled_from([1, 2, 7, 1000]))
@example([699051.561986095] * 3, 0, 1000)
@example([1e6 + 1e-3 * i for i in range(100)], 0, 7)
def test_a_probe_says_what_the_values_are(values: list[float], lost: int, size: int) -> None:
    """To the last digits but two of float64, wherever parts of a tensor that are read one by one are cut."""
    tensor = torch.tensor(values + [math.nan, math.inf, -math.inf][:lost], dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eridiff.trace.format.CHUNK", 8 * size)
        found = probe(tensor)
    expected = [statistics.fmean(values), _deviation(values), min(values), max(values), math.hypot(*values), lost]
    largest = max(map(abs, values))
    assert np.allclose(found[:6], expected, rtol=1e-13, atol=1e-14 * largest)
    assert torch.equal(found[6], tensor[0]) and len(found) == 70


def _deviation(values: list[float]) -> float:
    """By exact fractions of the largest, of which the root is the one rounding."""
    largest = max(map(abs, values)) or 1.0
    return largest * math.sqrt(statistics.pvariance(Fraction(value) / Fraction(largest) for value in values))


@pytest.mark.parametrize("size", [1e200, 1e-200, 1.0])
def test_a_probe_of_values_of_any_size_has_their_digits(size: float) -> None:
    found = probe(torch.tensor([size, -size, 3 * size, size], dtype=torch.float64))
    assert np.allclose(found[:5] / size, [1, math.sqrt(2), -1, 3, math.sqrt(12)], rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.uint8, torch.bool])
def test_a_probe_of_another_dtype_is_that_of_its_values(dtype: torch.dtype) -> None:
    values = (torch.arange(1000) % 97 + 3).to(dtype)
    assert torch.equal(probe(values), probe(values.double()))
    assert torch.equal(probe(values), probe(values.reshape(10, 100).T.contiguous().T))


def test_a_probe_of_complex_numbers_is_that_of_their_parts() -> None:
    pairs = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(probe(torch.view_as_complex(pairs)), probe(pairs))


def test_a_probe_of_few_values_or_none_has_all_statistics() -> None:
    assert probe(torch.tensor(2.5))[:6].tolist() == [2.5, 0, 2.5, 2.5, 2.5, 0]
    assert probe(torch.zeros(3))[:6].tolist() == [0, 0, 0, 0, 0, 0]
    for nothing, lost in ((torch.zeros(0, 4), 0), (torch.tensor([math.nan, math.inf]), 2)):
        assert probe(nothing)[:6].tolist() == [0, 0, math.inf, -math.inf, 0, lost]


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8]


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text("abc.:@01é", min_size=1, max_size=9),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=4)),
        min_size=1,
        max_size=9,
    )
)
@example({"a": (torch.float64, [0]), "b": (torch.float64, [0])})
def test_every_dtype_and_shape_comes_back_from_a_file(
    tmp_path_factory: pytest.TempPathFactory, plan: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("t") / "t.safetensors"
    tensors = {name: (torch.randn(shape) * 9).to(dtype) for name, (dtype, shape) in plan.items()}
    write_trace(tensors, path)
    trace, plain = read_trace(path), load_file(path)
    assert list(trace) == list(tensors)
    for name, tensor in tensors.items():
        assert (
            torch.equal(trace[name], tensor) and torch.equal(plain[name], tensor) and trace[name].dtype == tensor.dtype
        )


def test_numpy_files_are_traces(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "z.1": rng.normal(size=(2, 3)),
        "a": rng.normal(size=4).astype(np.float16),
        "z.10": np.arange(3).astype(">f4"),
    }
    np.savez(tmp_path / "t.npz", **arrays)
    (tmp_path / "t" / "z").mkdir(parents=True)
    for name, array in arrays.items():
        np.save(tmp_path / "t" / f"{name.replace('z.', 'z/')}.npy", array)
    archive, folder = read_trace(tmp_path / "t.npz"), read_trace(tmp_path / "t")
    assert list(archive) == ["z.1", "a", "z.10"] and list(folder) == ["a", "z.1", "z.10"] and not folder.ordered
    (tmp_path / "t" / "order.txt").write_text("z.10\nz.1\na\n")
    assert list(read_trace(tmp_path / "t")) == ["z.10", "z.1", "a"]
    for name, array in arrays.items():
        assert np.array_equal(archive[name].numpy(), array) and np.array_equal(folder[name].numpy(), array)
    save_file({n: torch.from_numpy(a.astype(np.float32)) for n, a in arrays.items()}, tmp_path / "t.safetensors")
    assert not read_trace(tmp_path / "t.safetensors").ordered  # what others write is read too


def as_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


ARRAY = np.random.default_rng(0).normal(size=(64, 64))
UNREADABLE = {
    "objects": as_npy(np.array([{}], dtype=object)), "bfloat16": as_npy(np.zeros(3, dtype="V2")), "text": as_npy(np.array(["a"])),
    "cut": as_npy(ARRAY)[:-8], "short": as_npy(ARRAY)[:20],
}  # fmt: skip


def damaged(folder: Path, kind: str) -> Path:
    """`cut.npz`, `cut`: an archive or a folder of a good array `x` and a wrong one; or another file that is not a trace."""
    path, (name, _, archive) = folder / kind, kind.partition(".")
    if archive == "npz" and name in UNREADABLE:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("x.npy", as_npy(ARRAY))
            file.writestr("wrong.npy", UNREADABLE[name])
    elif kind in (*UNREADABLE, "empty", "order"):
        path.mkdir()
        if kind != "empty":
            (path / "x.npy").write_bytes(as_npy(ARRAY))
            (path / ("order.txt" if kind == "order" else "wrong.npy")).write_bytes(UNREADABLE.get(kind, b"\xff\xfe"))
    elif kind == "x.npy":
        np.save(path, ARRAY)
    elif kind == "half.npz":
        np.savez(path, x=ARRAY)
        path.write_bytes(path.read_bytes()[:-300])
    elif kind == "half.safetensors":
        write_trace({"x": torch.from_numpy(ARRAY)}, path)
        path.write_bytes(path.read_bytes()[:-8])
    elif kind == "lies.safetensors":
        save_file({"x": torch.zeros(2)}, path, {"same": '{"y": "z"}'})
    return path


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("absent", "'.*absent' does not exist"),
        ("empty", "is a folder without .npy files; give"),
        ("x.npy", "is one array without a name; give the folder"),
        ("cut", "wrong.npy' is cut off or damaged; write it again"),
        ("short", "wrong.npy' is cut off or damaged; write it again"),
        ("cut.npz", "cut.npz', array 'wrong', is cut off or damaged; write it again"),
        ("half.npz", "is not a complete .npz archive; write it again"),
        ("half.safetensors", "half.safetensors' is .* 8 of 32888 bytes are missing"),
        ("lies.safetensors", "same as one that it does not hold"),
        ("objects", "holds Python objects, which are never opened; save plain numbers"),
        ("objects.npz", "array 'wrong', holds Python objects, which are never opened"),
        ("bfloat16", "holds a type that NumPy does not know, bfloat16 perhaps; save float32"),
        ("bfloat16.npz", "array 'wrong', holds a type that NumPy does not know"),
        ("text", "holds <U1, which torch does not have; save plain numbers"),
        ("order", "order.txt' is not a list of names; write one per line, or remove it"),
    ],
)
def test_what_is_not_a_trace_is_refused_in_one_sentence_when_it_is_opened(kind: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=says) as caught:
        read_trace(damaged(tmp_path, kind))
    assert "\n" not in str(caught.value)


def test_an_array_whose_values_are_damaged_is_refused_when_it_is_read(tmp_path: Path) -> None:
    for save, at in ((np.savez, 2000), (np.savez_compressed, 2000), (np.savez_compressed, 60)):
        save(tmp_path / "t.npz", x=ARRAY)
        whole = bytearray((tmp_path / "t.npz").read_bytes())
        whole[at : at + 100] = b"\xff" * 100
        (tmp_path / "t.npz").write_bytes(whole)
        with pytest.raises(TraceError, match="array 'x', is cut off or damaged; write it again"):
            read_trace(tmp_path / "t.npz")["x"]


def test_a_large_trace_needs_no_memory_for_the_whole(tmp_path: Path) -> None:
    """400 MB of activations are recorded to a file and read within 150 MB beside what importing takes."""
    code = f"""
import resource, torch
from torch import nn
from eridiff.trace import read_trace, record
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
network = nn.Sequential(*(nn.LayerNorm(1024) for _ in range(20)))
x = torch.randn(5000, 1024)
with torch.no_grad():
    network(x)
    before = peak()
    with record(network, to={str(tmp_path / "t.safetensors")!r}):
        network(x)
sizes = [t.nbytes for t in read_trace({str(tmp_path / "t.safetensors")!r}).values() if float(t.sum()) != 1]
print(sum(sizes) >> 20, peak() - before)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    read, taken = map(int, ran.stdout.split())
    assert read > 800 and taken < 150  # every output is read twice, as the next module's input too
    assert (tmp_path / "t.safetensors").stat().st_size < 450e6
