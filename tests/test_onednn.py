"""Linear layers by oneDNN give torch's own numbers within rounding, follow every change of a weight, and leave training alone."""

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import eridiff
from eridiff import onednn, save_network
from eridiff.images import save_png
from eridiff.inference.again import generate_again, load_again, read_settings
from eridiff.lora import attach_lora, merge_into
from eridiff.onednn import OneDNNLinear, use_onednn
from eridiff.trace import record
from eridiff.trace.record import relative_l2
from tests import tiny
from tests.loras import FAMILIES, ask, some_lora

ABSENT = not hasattr(torch.ops.mkldnn, onednn.OPERATOR)  # then one test is left: the line that says so
needs_onednn = pytest.mark.usefixtures("onednn_built_in")
families = pytest.mark.parametrize("family", FAMILIES)
# relative L2 in float32 of a layer beside torch's own, and about that of a network beside itself in float64
LAYER = 1e-6
BOUND = 2 * LAYER  # of two networks in float32, each so far from float64


@pytest.fixture
def onednn_built_in() -> None:
    if ABSENT:
        pytest.skip("torch is built without oneDNN here, so there is nothing to switch to")


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch, onednn_built_in: None) -> None:
    """A processor on which oneDNN is twice as fast, from one row on."""
    monkeypatch.setattr(onednn, "ROWS", (1,))
    monkeypatch.setattr(onednn, "_measured", lambda weight, rows, seconds: (1e9, 2.0, 1.0))


class Asked(TorchDispatchMode):
    """How many linear layers oneDNN computes within the block."""

    def __enter__(self) -> "Asked":
        self.count = 0
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "mkldnn::" in func.name()
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def apart(network: Any, twin: Any) -> float:
    """How far a network with oneDNN is from its twin without; fails where oneDNN has computed nothing."""
    expected = ask(twin)
    with Asked() as asked:
        found = ask(network)
    assert asked.count
    return relative_l2(found, expected)


def pair(family: str = "flux") -> tuple[Any, Any]:
    network, twin = FAMILIES[family](), FAMILIES[family]()
    assert use_onednn(network) == sum(type(m) is nn.Linear for m in twin.modules())
    return network, twin


@families
@torch.no_grad()
def test_every_family_gives_the_numbers_that_it_gives_without(family: str, faster: None) -> None:
    network, twin = pair(family)
    distances = []

    def compare(module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        distances.append(relative_l2(output, nn.Linear.forward(module, *inputs)))

    for module in network.modules():
        if isinstance(module, OneDNNLinear):
            module.register_forward_hook(compare)
    assert 0 < apart(network, twin) < BOUND
    assert 0 < max(distances) < LAYER
    found, plain, exact = ask(network), ask(twin), ask(twin.double()).float()
    assert relative_l2(found, exact) < max(LAYER, 1.5 * relative_l2(plain, exact))


@pytest.mark.parametrize("family, before", [("flux", True), ("flux", False), ("mmdit", True), ("unet", False)])
def test_a_lora_counts_attached_rescaled_and_detached(family: str, before: bool, faster: None) -> None:
    network, twin = FAMILIES[family](), FAMILIES[family]()
    lora = some_lora(twin)
    if not before:
        use_onednn(network)
    sets = [attach_lora(each, lora) for each in (network, twin)]
    if before:
        use_onednn(network)
    with torch.no_grad():
        changed = ask(twin)
    assert apart(network, twin) < BOUND
    for each in sets:
        each.set_scale(0.3)
    assert relative_l2(ask(twin), changed) > 1e-3 and apart(network, twin) < BOUND
    for each in sets:
        each.detach()
    assert apart(network, FAMILIES[family]()) < BOUND


@pytest.mark.parametrize("family", ["flux", "mmdit"])
def test_a_merged_lora_counts_and_comes_out_again(family: str, faster: None) -> None:
    network, twin = pair(family)
    lora = some_lora(twin)
    assert apart(network, twin) < BOUND  # the weights as they are have been used
    merged = merge_into(network, lora), merge_into(twin, lora)
    assert relative_l2(ask(twin), ask(FAMILIES[family]())) > 1e-3
    assert apart(network, twin) < BOUND
    for each in merged:
        each.restore()
    assert apart(network, FAMILIES[family]()) < BOUND


def replaced(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(2 * layer.weight.detach(), requires_grad=False)


CHANGES: dict[str, Callable[[nn.Linear], Any]] = {
    "in place": lambda layer: layer.weight.mul_(2),
    "through data, unseen by the version": lambda layer: layer.weight.data.mul_(2),
    "by NumPy": lambda layer: layer.weight.numpy().__imul__(2),
    "by other data": lambda layer: setattr(layer.weight, "data", 2 * layer.weight.data),
    "by another parameter": replaced,
    "by load_state_dict": lambda layer: layer.load_state_dict({n: 2 * t for n, t in layer.state_dict().items()}),
    "of the bias": lambda layer: layer.bias.add_(1),
    "in its dtype": lambda layer: layer.double().float().weight.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_every_change_of_a_weight_counts_at_once(change: Callable[[nn.Linear], Any], faster: None) -> None:
    network, twin = pair()
    first = ask(network)
    for each in (network, twin):
        change(each.double_blocks[0].image.qkv)
    assert relative_l2(ask(twin), first) > 1e-3
    assert apart(network, twin) < BOUND


@families
def test_training_is_as_before_bit_for_bit_and_an_optimizers_step_counts(family: str, faster: None) -> None:
    both = pair(family)
    assert apart(*both) < BOUND  # without gradients, before
    assert torch.equal(*map(ask, both))  # with grad mode, also of weights that are frozen
    for network in both:
        network.requires_grad_(True)
        ask(network).square().mean().backward()
        torch.optim.SGD(network.parameters(), lr=0.1).step()
    for own, other in zip(*(network.parameters() for network in both), strict=True):
        assert own.grad is None or torch.equal(own.grad, other.grad)
        assert torch.equal(own, other)
    assert apart(*both) < BOUND


def test_tensors_names_and_files_stay_what_they_are(tmp_path: Path, faster: None) -> None:
    network = FAMILIES["flux"]()
    before = network.state_dict()
    save_network(network, tmp_path / "before.safetensors")
    use_onednn(network)
    after = network.state_dict()
    assert list(after) == list(before) and all(after[n].data_ptr() == before[n].data_ptr() for n in before)
    save_network(network, tmp_path / "after.safetensors")
    assert (tmp_path / "after.safetensors").read_bytes() == (tmp_path / "before.safetensors").read_bytes()


@torch.no_grad()
def test_a_copy_and_a_pickled_network_have_weights_of_their_own(faster: None) -> None:
    network, twin = pair()
    assert apart(network, twin) < BOUND
    for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        copied.double_blocks[0].image.qkv.weight.mul_(2)
        assert apart(network, twin) < BOUND < apart(copied, twin)


def test_hooks_and_traces_see_what_the_layers_give(faster: None) -> None:
    network, twin = pair()
    seen: list[Tensor] = []
    for each in (network, twin):
        layer = each.double_blocks[0].image.qkv
        layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert apart(network, twin) < BOUND
    assert relative_l2(seen[2], seen[0]) < BOUND  # each network is asked twice, the twin first
    traces = []
    for each in (network, twin):
        with record(each) as trace, torch.no_grad():
            ask(each)
        traces.append(trace)
    assert list(traces[0]) == list(traces[1])
    assert all(relative_l2(traces[0][name], traces[1][name]) < BOUND for name in traces[0])


def layer() -> OneDNNLinear:
    torch.manual_seed(0)
    made: Any = nn.Linear(40, 24)
    assert use_onednn(made) == 1
    return made


def test_what_the_operator_cannot_do_is_torchs_own(faster: None) -> None:
    made = layer().requires_grad_(False)
    plain, x = nn.Linear.forward, torch.randn(2, 130, 40)

    def own(x: Tensor) -> bool:
        with Asked() as asked:
            found = made(x)
        assert torch.equal(found, plain(made, x)) if not asked.count else relative_l2(found, plain(made, x)) < LAYER
        return asked.count == 0

    assert own(x) and own(x.requires_grad_())
    x = x.detach()
    with torch.no_grad():
        assert not own(x) and not own(x[..., ::2].repeat(1, 1, 2))
        assert own(x.transpose(0, 1)) and own(torch.randn(2, 130, 50)[..., 10:])  # the operator would copy these
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert own(x) and made(x).dtype == torch.bfloat16
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, x)
            tangent = forward_ad.unpack_dual(made(dual)).tangent
            assert torch.equal(tangent, F.linear(x, made.weight))
        assert own(x[0, 0]) and own(x[:0])
        with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied \(3x39 and 40x24\)"):
            made(torch.randn(3, 39))
    made = layer().requires_grad_(False).double()
    with torch.no_grad():
        assert own(x.double())


def test_who_replaces_torchs_linear_is_heard(faster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer()
    monkeypatch.setattr(F, "linear", lambda x, weight, bias: torch.zeros(3))
    with torch.no_grad():
        assert torch.equal(made(torch.randn(9, 40)), torch.zeros(3))


def test_compiled_blocks_compute_as_torch_does(faster: None) -> None:
    made = layer()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    x = torch.randn(9, 40)
    with torch.no_grad():
        assert torch.equal(torch.compile(made, backend=backend, fullgraph=True)(x), nn.Linear.forward(made, x))
    assert len(graphs) == 1 and "mkldnn" not in graphs[0].code
    torch.compiler.reset()


@needs_onednn
def test_only_shapes_and_rows_that_are_faster_change(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    speeds = {(64, 1024): 1.5, (64, 128): 0.9, (32, 1024): 1.2, (32, 128): 1.2, (16, 1024): 1.04}
    monkeypatch.setattr(onednn, "_measured", lambda weight, rows, seconds: (1e9, speeds[len(weight), rows], 1.0))
    network = nn.Sequential(*(nn.Linear(8, outputs) for outputs in (64, 64, 32, 16)), nn.Linear(8, 64).double())
    with caplog.at_level(logging.INFO, "eridiff"):
        assert use_onednn(network) == 3
    assert caplog.messages == [
        "oneDNN computes 3 of 4 float32 linear layers on the CPU, of at least 128 rows: 1 GFLOP/s in place of 1"
    ]
    assert [getattr(m, "onednn_rows", None) for m in network] == [1024, 1024, 128, None, None]
    with torch.no_grad():
        for rows, expected in ((1023, 0), (1024, 1)):
            with Asked() as asked:
                network[0](torch.randn(rows, 8))
            assert asked.count == expected
    speeds |= {(64, 1024): 1.0, (32, 1024): 1.0}
    caplog.clear()
    with caplog.at_level(logging.INFO, "eridiff"):
        assert use_onednn(network) == 0
    assert all(type(m) is nn.Linear for m in network)
    assert "not faster for any of the 4" in caplog.messages[0]


@pytest.mark.parametrize("few_rows, many_rows, expected", [(1.1, 0.93, None), (0.9, 1.1, 1024), (1.1, 1.1, 128)])
def test_a_layer_is_measured_as_a_step_asks_it(
    few_rows: float, many_rows: float, expected: int | None, monkeypatch: pytest.MonkeyPatch, onednn_built_in: None
) -> None:
    """By a clock: how much faster oneDNN is for few rows and for many; torch is slow for a width of no whole registers."""
    clock = [0.0]

    def takes(by_onednn: bool, layer: nn.Linear, x: Tensor) -> None:
        rows, outputs = len(x), len(layer.weight)
        faster = few_rows if rows < 600 else many_rows
        clock[0] += rows * outputs / (faster if by_onednn else 1.0 if outputs % 16 == 0 else 0.87)

    monkeypatch.setattr(OneDNNLinear, "forward", lambda layer, x: takes(True, layer, x))
    monkeypatch.setattr(nn.Linear, "forward", lambda layer, x: takes(False, layer, x))
    monkeypatch.setattr(onednn.time, "perf_counter", lambda: clock[0])
    for shape in ((5376, 768), (768, 3840), (96, 64)):
        network = nn.Sequential(nn.Linear(shape[1], shape[0]))
        use_onednn(network)
        assert getattr(network[0], "onednn_rows", None) == expected


def test_a_torch_without_the_operator_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(onednn, "OPERATOR", "_gone")
    network = nn.Sequential(nn.Linear(4, 4))
    assert use_onednn(network) == 0 and type(network[0]) is nn.Linear
    assert caplog.messages == [
        f"torch {torch.__version__} has no torch.ops.mkldnn._gone: linear layers stay torch's own"
    ]


@needs_onednn
def test_a_network_without_such_layers_is_one_line(caplog: Any) -> None:
    with caplog.at_level(logging.INFO, "eridiff"):
        assert use_onednn(nn.Sequential(nn.Linear(8, 8).bfloat16())) == 0
    assert caplog.messages == ["the Sequential has no float32 linear layer on a CPU, so oneDNN computes none"]


@needs_onednn
def test_measuring_changes_no_weight_and_no_random_state(caplog: Any) -> None:
    network = FAMILIES["flux"]()
    weights, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    with caplog.at_level(logging.INFO, "eridiff"):
        count = use_onednn(network, seconds=0.01)
    assert len(caplog.messages) == 1 and count == sum(type(m) is OneDNNLinear for m in network.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())


def test_an_image_says_that_onednn_computed_it_and_is_generated_again(faster: None, tmp_path: Path) -> None:
    model = eridiff.load(tiny.write_model(tmp_path), device="cpu", dtype=torch.float32, progress=False)
    asked = {"steps": 2, "seed": 1, "width": 32, "height": 32}
    assert model.generate("a swan", **asked).settings[0]["onednn"] is None
    use_onednn(model.network)
    result = model.generate("a swan", **asked)
    settings = read_settings(save_png(result.images[0], tmp_path / "a.png", result.settings[0]))
    again = load_again(settings, progress=False)
    assert settings["onednn"] and any(isinstance(layer, OneDNNLinear) for layer in again.network.modules())
    assert generate_again(again, settings).images[0].tobytes() == result.images[0].tobytes()
