"""Sampling restores everything that it may touch, and `verify` names whatever is not restored."""

import random
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import eridiff
import eridiff.training.sampler
from eridiff.blocks import checkpoint_blocks, unwrapped
from eridiff.errors import ConfigError, TrainingError
from eridiff.request import Request
from eridiff.training import Sampler, averaged_weights, restore, undisturbed
from eridiff.training.fingerprint import changed, fingerprint
from tests import tiny


class ScheduleFree(torch.optim.SGD):
    """Averages weights in place, as schedule-free optimizers do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        for group in self.param_groups:
            group["train_mode"] = True

    @torch.no_grad()
    def _turn(self, train: bool, share: float) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train:
                for p in group["params"]:
                    p.lerp_(torch.full_like(p, 0.123), share)
                group["train_mode"] = train

    def eval(self) -> None:
        self._turn(False, 0.3)

    def train(self) -> None:
        self._turn(True, 1 - 1 / (1 - 0.3))


@dataclass
class Run:
    """A training run in the middle: gradients, an optimizer that has stepped, modules in training mode."""

    model: Any
    head: nn.Module
    optimizer: torch.optim.Optimizer
    out: Path

    def sampler(self, disturb: Callable[["Run"], object], **options: Any) -> Sampler:
        given = {"modules": {"head": self.head}, "optimizer": self.optimizer, "verify": True, "raise_errors": True}
        section = {"prompts": ["a swan"], "sample_steps": 1, "out": str(self.out)}
        return Sampler(self.model, section, callbacks=[lambda _: disturb(self)], **given | options)

    def fingerprint(self) -> dict[str, Any]:
        return fingerprint({"network": self.model.network, "head": self.head}, self.optimizer)

    def weight(self) -> nn.Parameter:
        found = self.model.network.double_blocks[0].image.qkv.weight
        assert isinstance(found, nn.Parameter)
        return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return eridiff.load(tiny.write_model(tmp_path_factory.mktemp("model")), device="cpu", progress=False)


@pytest.fixture
def run(model: Any, tmp_path: Path) -> Iterator[Run]:
    with ExitStack() as stack:  # whatever a deliberately broken run leaves
        for keep in (restore.random_states, restore.flags, restore.precision, restore.grad_mode):
            stack.enter_context(keep())
        stack.enter_context(torch.enable_grad())
        torch.set_autocast_cache_enabled(True)
        model.network = tiny.flux().requires_grad_(True).train()
        head = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4))
        parameters = [*model.network.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        generator = torch.Generator().manual_seed(0)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        model.network.gradient_checkpointing = True
        stack.enter_context(checkpoint_blocks(model.network))
        yield Run(model, head, optimizer, tmp_path)


def other(name: str) -> Callable[[Run], object]:
    """Set a flag to another value."""
    read, put = restore.FLAGS[name]
    values: dict[str, Any] = {"float32 matmul precision": "medium", "deterministic algorithms": (True, True)}
    return lambda _: put(values.get(name, 3 if name == "threads" else not read()))


def replace_parameter(run: Run) -> None:
    run.model.network.double_blocks[0].image.qkv.weight = nn.Parameter(run.weight().detach().clone())


def lose_checkpointing(run: Run) -> None:
    block = run.model.network.double_blocks[0]
    block.forward = type(block).forward.__get__(block)


DISTURBANCES: dict[str, tuple[str, Callable[[Run], object]]] = {  # what verify calls it -> who keeps it, what breaks it
    "Python's random state": ("random_states", lambda _: random.random()),
    "NumPy's random state": ("random_states", lambda _: np.random.rand()),
    "torch's random state on the CPU": ("random_states", lambda _: torch.rand(1)),
    "training mode of network": ("evaluation", lambda run: run.model.network.eval()),
    "training mode of head.1": ("evaluation", lambda run: run.head[1].eval()),  # type: ignore[index]
    "requires_grad of network.image_in.weight": ("tensors", lambda run: run.model.network.requires_grad_(False)),
    "gradient of network.double_blocks.0.image.qkv.weight": ("tensors", lambda run: setattr(run.weight(), "grad", None)),
    "parameter network.double_blocks.0.image.qkv.weight": ("tensors", replace_parameter),
    "parameter head.0.weight": ("tensors", lambda run: run.head.double()),  # in place: other memory, the same parameter
    "parameter head.0.bias": ("tensors", lambda run: run.head.to("meta")),  # as a module sent to another device
    "gradient_checkpointing of network": ("checkpointing", lambda run: setattr(run.model.network, "gradient_checkpointing", False)),
    "forward of network.double_blocks.0": ("checkpointing", lose_checkpointing),
    "grad mode": ("grad_mode", lambda _: torch.set_grad_enabled(False)),
    "autocast on cpu": ("precision", lambda _: torch.set_autocast_enabled("cpu", True)),
    "autocast cache": ("precision", lambda _: torch.set_autocast_cache_enabled(False)),
    "default dtype": ("precision", lambda _: torch.set_default_dtype(torch.float64)),
    **{f"flag {name}": ("flags", other(name)) for name in restore.FLAGS},
}  # fmt: skip


@pytest.mark.parametrize("name", DISTURBANCES)
def test_what_sampling_disturbs_is_restored(run: Run, name: str) -> None:
    before = run.fingerprint()
    run.sampler(DISTURBANCES[name][1]).sample(1)
    assert changed(before, run.fingerprint()) == []


@pytest.mark.parametrize("name", DISTURBANCES)
def test_without_its_keeper_a_disturbance_is_named(run: Run, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper, disturb = DISTURBANCES[name]
    monkeypatch.setattr(restore, keeper, lambda *_: nullcontext())
    with pytest.raises(TrainingError, match="sampling at step 1 changed the .*" + re.escape(name)):
        run.sampler(disturb).sample(1)


class FakeCuda:
    """Two devices whose random states are tensors here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.states = [torch.arange(16, dtype=torch.uint8), torch.arange(16, 32, dtype=torch.uint8)]
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [state.clone() for state in self.states])
        monkeypatch.setattr(
            torch.cuda, "set_rng_state_all", lambda states: self.states.__setitem__(slice(None), states)
        )

    def draw(self, _: Run) -> None:
        self.states[1] += 1


def test_every_cuda_devices_random_state_is_restored(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    sampler = run.sampler(cuda.draw)
    sampler.sample(1)
    assert cuda.states[1].tolist() == list(range(16, 32))
    monkeypatch.setattr(restore, "random_states", lambda *_: nullcontext())
    with pytest.raises(TrainingError, match="changed the torch's random state on cuda:1"):
        sampler.sample(2)


def in_place(run: Run) -> None:
    """An adapter merged and taken out again by arithmetic."""
    run.weight().data.add_(1e3).sub_(1e3)


@pytest.mark.parametrize(
    ("name", "disturb"),
    [
        ("parameter network.double_blocks.0.image.qkv.weight", in_place),
        ("gradient of head.0.weight", lambda run: run.head[0].weight.grad.mul_(2)),
        ("buffer head.2.running_mean", lambda run: run.head[2].running_mean.add_(1)),
        ("optimizer state 0 exp_avg", lambda run: next(iter(run.optimizer.state.values()))["exp_avg"].add_(1)),
        ("optimizer param_groups 0 lr", lambda run: run.optimizer.param_groups[0].__setitem__("lr", 1.0)),
    ],
)
def test_what_cannot_be_restored_is_named(run: Run, name: str, disturb: Callable[[Run], object]) -> None:
    with pytest.raises(TrainingError, match=f"changed the .*{name}"):
        run.sampler(disturb, raise_errors=False).sample(1)


def test_everything_is_restored_after_an_error_too(run: Run) -> None:
    def fail(_: Run) -> None:
        random.random(), np.random.rand(), torch.rand(1)
        run.model.network.double()
        torch.set_default_dtype(torch.float64)
        raise KeyboardInterrupt

    before = run.fingerprint()
    with pytest.raises(KeyboardInterrupt):
        run.sampler(fail).sample(1)
    assert changed(before, run.fingerprint()) == []


# EMA weights ----------------------------------------------------------------------------------------------------------


def drawn(run: Run, **options: Any) -> dict[str, bytes]:
    """The pixels by each kind of weights."""
    samples = run.sampler(lambda _: None, **options).sample(1)
    return {s["training"]["weights"]: i.tobytes() for s, i in zip(samples.settings, samples.images, strict=True)}


@pytest.mark.parametrize("kind", ["mapping", "module", "AveragedModel"])
def test_ema_weights_generate_their_own_image_and_the_live_weights_come_back(run: Run, kind: str) -> None:
    averages = tiny.flux(seed=1)
    run.model.network, live = averages, run.model.network
    alone = drawn(run)["live"]
    run.model.network = live
    given: Any = {"mapping": averages.state_dict(), "module": averages}.get(kind)
    if given is None:
        given = torch.optim.swa_utils.AveragedModel(averages)
    before, weight = run.fingerprint(), run.weight()
    found = drawn(run, ema=given)
    assert found["ema"] == alone != found["live"]
    assert changed(before, run.fingerprint()) == [] and run.weight() is weight


def test_ema_weights_that_stay_are_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def one_way(module: nn.Module, averages: Any) -> Iterator[None]:
        module.load_state_dict(averages)
        yield

    sampler = run.sampler(lambda _: None, ema=tiny.flux(seed=1).state_dict())
    monkeypatch.setattr(eridiff.training.sampler, "averaged_weights", one_way)
    with pytest.raises(TrainingError, match="changed the parameter network.image_in.weight"):
        sampler.sample(1)


def test_ema_weights_of_another_network_are_refused_before_training(run: Run) -> None:
    for wrong, says in (
        ({"a.b": torch.zeros(1)}, "have 'a.b'"),
        ({"image_in.bias": torch.zeros(1)}, "shape"),
        ({}, "empty"),
    ):
        with pytest.raises(ConfigError, match=says):
            run.sampler(lambda _: None, ema=wrong)


def test_a_schedule_free_optimizer_gives_its_averaged_weights_and_gets_its_weights_back(run: Run) -> None:
    live = drawn(run)["live"]
    run.optimizer = ScheduleFree(run.model.network.parameters())
    before = run.fingerprint()
    seen: list[bool] = []
    samples = run.sampler(lambda r: seen.append(r.optimizer.param_groups[0]["train_mode"])).sample(1)
    assert changed(before, run.fingerprint()) == [] and seen == [False]
    run.optimizer.eval()  # type: ignore[attr-defined]
    inner = drawn(run)["live"]
    assert samples.images[0].tobytes() == inner != live


class Wrapped:
    """A schedule-free wrapper around an optimizer: its mode is an attribute, not in the groups."""

    def __init__(self, base: ScheduleFree) -> None:
        self.base, self.train_mode, self.param_groups = base, True, [{"params": g["params"]} for g in base.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def eval(self) -> None:
        self.base.eval()
        self.train_mode = False

    def train(self) -> None:
        self.base.train()
        self.train_mode = True


@pytest.mark.parametrize("make", [lambda base: base, Wrapped])
def test_an_optimizer_that_the_trainer_has_switched_to_its_averaged_weights_stays_there(run: Run, make: Any) -> None:
    """As trainers do for a validation: eval, images, train."""
    optimizer = make(ScheduleFree(run.model.network.parameters()))
    run.optimizer = optimizer
    optimizer.eval()
    weight = run.model.network.image_in.weight.detach().clone()
    run.sampler(lambda _: None).sample(1)
    assert torch.equal(run.model.network.image_in.weight, weight)
    trained = weight.lerp(torch.full_like(weight, 0.123), 1 - 1 / (1 - 0.3))
    optimizer.train()
    assert torch.allclose(run.model.network.image_in.weight, trained)


def test_images_on_demand_leave_no_trace(run: Run) -> None:
    before = run.fingerprint()
    sampler = run.sampler(lambda _: None)
    asked = {"prompt": "a swan", "steps": 1, "seed": 42, "width": 32, "height": 32}
    results = sampler.draw([Request.of(asked), {**asked, "seed": 5}])
    assert [r.settings[0]["seed"] for r in results] == [42, 5] and changed(before, run.fingerprint()) == []
    with pytest.raises(ConfigError, match="'stps' is not a setting"):
        sampler.draw([{"prompt": "a swan", "stps": 1}])


def test_a_schedule_free_optimizer_that_computes_its_way_back_is_named(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def by_arithmetic(optimizer: Any) -> Iterator[None]:
        if optimizer:
            optimizer.eval()
        yield
        if optimizer:
            optimizer.train()

    run.optimizer = ScheduleFree(run.model.network.parameters())
    monkeypatch.setattr(restore, "schedule_free", by_arithmetic)
    with pytest.raises(TrainingError, match="changed the parameter network.image_in.weight"):
        run.sampler(lambda _: None).sample(1)


# graphs and autocast --------------------------------------------------------------------------------------------------


def loss_of(network: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    tokens, text, pooled = (torch.randn(1, *s, generator=generator) for s in ((4, 64), (5, 12), (8,)))
    out = network(tokens, text, pooled, torch.tensor([[0.5]]), (2, 2), torch.tensor([3.5]))
    return (out**2).mean()


@pytest.mark.parametrize("averages", ["none", "ema", "schedule-free"])
def test_a_graph_under_construction_gives_the_same_gradients(run: Run, averages: str) -> None:
    options: dict[str, Any] = {"ema": tiny.flux(seed=1)} if averages == "ema" else {}
    if averages == "schedule-free":
        run.optimizer = ScheduleFree(run.model.network.parameters())
    gradients = []
    for interrupt in (False, True):
        run.model.network.zero_grad()
        loss = loss_of(run.model.network)
        if interrupt:
            run.sampler(lambda _: None, **options).sample(1)
        loss.backward()
        gradients.append([p.grad.clone() for p in run.model.network.parameters() if p.grad is not None])
    assert len(gradients[0]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_weights_that_autocast_casts_for_an_image_are_not_kept(run: Run) -> None:
    linear = run.model.network.image_in
    with torch.autocast("cpu", torch.bfloat16):
        run.sampler(lambda _: None, autocast=torch.bfloat16).sample(1)
        linear.weight.data.zero_()
        with torch.no_grad():
            assert torch.equal(linear(torch.ones(1, 64)).float(), linear.bias.bfloat16().float()[None])


def test_an_image_does_not_depend_on_the_runs_precision(run: Run) -> None:
    plain = drawn(run)["live"]
    try:
        torch.set_default_dtype(torch.float64)
        with torch.autocast("cpu", torch.bfloat16):
            assert drawn(run)["live"] == plain
    finally:
        torch.set_default_dtype(torch.float32)
    assert drawn(run, autocast=torch.bfloat16)["live"] != plain


def test_default_device_of_the_run_does_not_reach_the_image(run: Run) -> None:
    plain = drawn(run)["live"]
    sampler = run.sampler(lambda _: None, verify=False)
    with torch.device("meta"):
        found = sampler.sample(2)
        assert torch.get_default_device().type == "meta"
    assert found.failure is None and found.images[0].tobytes() == plain


def test_modules_come_out_of_their_wrappers() -> None:
    network = tiny.flux()
    wrapped = torch.compile(torch.optim.swa_utils.AveragedModel(nn.DataParallel(network)))
    assert type(unwrapped(wrapped)) is type(network)  # an averaged model holds a copy
    assert unwrapped(nn.DataParallel(torch.compile(network))) is network
    assert unwrapped(network) is network


def test_evaluation_mode_is_set_without_asking_the_module() -> None:
    class Merging(nn.Dropout):
        def train(self, mode: bool = True) -> Any:
            raise AssertionError("merged")

    module = Merging()
    with undisturbed({"m": module}):
        assert not module.training and not torch.is_grad_enabled()
    assert module.training


def test_weights_that_require_gradients_generate_as_those_that_do_not() -> None:
    """matmul folds a batch of small matrices into one product when the weight requires gradients, whatever the grad mode."""
    linear, x = nn.Linear(128, 128), torch.randn(2, 2, 128, generator=torch.Generator().manual_seed(0))
    seen = []
    for requires_grad in (True, False):
        linear.requires_grad_(requires_grad)
        with undisturbed({"linear": linear}):
            seen.append(linear(x))
            assert not linear.weight.requires_grad
        assert linear.weight.requires_grad == requires_grad
    assert torch.equal(seen[0], seen[1])


def test_averaged_buffers_are_swapped_too() -> None:
    module, averages = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    averages.running_mean = torch.full((2,), 3.0)
    own = module.running_mean
    with averaged_weights(module, averages):
        assert module.running_mean is not None and module.running_mean.tolist() == [3, 3]
    assert module.running_mean is own
