"""Ports in NumPy with planted errors, their traces in any naming, and what `eridiff diff` says of them."""

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from eridiff.trace.cases import Case, inputs_of, open_case, weights_of
from eridiff.trace.compare import compare
from eridiff.trace.names import NATIVE, align, names_of
from eridiff.trace.record import record
from eridiff.trace.report import Report
from eridiff.weights.detect import sizes_of
from eridiff.weights.keymap import key_map

ROOT = Path(__file__).parents[1]
GOLDENS = ROOT / "tests" / "goldens"
CASES: dict[str, Case] = {}
Arrays = dict[str, np.ndarray]


def case(name: str = "flux-dev-tiny") -> Case:
    return CASES.setdefault(name, open_case(GOLDENS / name))


def loaded(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Bug:
    """An error of the port: the function that is wrong, how, the first tensor that shows it, and what it is called."""

    function: str
    wrong: Callable[[Any, Any], Any]
    first: str
    says: str


PORTS = {  # by family, the last of the modules and those that it imports
    "flux": ("numpy_flux",), "mmdit": ("numpy_flux", "numpy_mmdit"), "vae": ("numpy_flux", "numpy_autoencoder"),
    "unet": ("numpy_flux", "numpy_autoencoder", "numpy_unet"), "clip": ("numpy_flux", "numpy_text"), "t5": ("numpy_flux", "numpy_text"),
}  # fmt: skip


class Functions:
    """The functions of a port and of the modules that it imports, as they are when asked for."""

    def __init__(self, modules: Sequence[Any]) -> None:
        self.modules = modules

    def __getattr__(self, name: str) -> Any:
        return next(vars(m)[name] for m in reversed(self.modules) if name in vars(m))


def ported(golden: Case, bugs: Sequence[Bug] = (), dtype: type = np.float64) -> Arrays:
    """What the port computes on a case, with errors planted into it."""
    modules: list[Any] = []
    with ExitStack() as stack:
        for name in PORTS[golden.family]:
            modules.append(loaded(name))
            stack.enter_context(patch.dict(sys.modules, {name: modules[-1]}))
    functions = Functions(modules)
    for bug in bugs:
        if bug.function == "inputs":
            continue
        right = getattr(functions, bug.function)
        wrong = bug.wrong(functions, right)
        for module in modules:
            if vars(module).get(bug.function) is right:
                setattr(module, bug.function, wrong)
    weights = {name: tensor.numpy().astype(dtype) for name, tensor in weights_of(golden.description).items()}
    given = {n: t.numpy() for n, t in inputs_of(golden.description).items()}
    if golden.family == "flux":
        names = {
            "img": "latents",
            "txt": "text",
            "y": "pooled",
            "timesteps": "times",
            "ids": "ids",
            "guidance": "guidance",
        }
        given = {n: golden.arguments[a].numpy() for n, a in names.items() if golden.arguments[a] is not None}
    given = {n: a.astype(dtype) if a.dtype.kind == "f" else a for n, a in given.items()}
    for bug in bugs:
        if bug.function == "inputs":
            given = bug.wrong(functions, None)(given)
    config = golden.description["config"]
    if golden.family == "flux":
        modules[-1].flux(weights, config, given)
    elif golden.family == "vae":
        modules[-1].encoded(weights, config, given["image"])
        modules[-1].decoded(weights, config, given["latents"])
    elif golden.family in ("clip", "t5"):  # of CLIP-G the case has OpenCLIP's names
        native = {name: tensor.numpy().astype(dtype) for name, tensor in golden.network.state_dict().items()}
        getattr(modules[-1], golden.family)(native, config, given["ids"])
    else:
        getattr(modules[-1], golden.family)(weights, config, given)
    return {name: np.array(value) for name, value in modules[0].TRACE.items()}


def compared(golden: Case, trace: Any, **options: Any) -> Report:
    found = {name: torch.as_tensor(value) for name, value in trace.items()}
    return compare(found, golden.expected, network=golden.network, run=golden.run, **options)


# the same trace in another naming --------------------------------------------------------------------------------------


def native_names(golden: Case, trace: Mapping[str, Any], layout: str | None = None) -> dict[str, str]:
    """The names of a trace -> eridiff's; of what is joined from several, eridiff's for each."""
    sources = align(list(trace), {golden.family: golden.config}, layout, golden.family).sources
    return {name: native for native, source in sources.items() for name in source.names}


def renamed(network: Any, family: str, trace: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """A trace with eridiff's names as another implementation of `layout` would name and cut it; what has no name there keeps eridiff's."""
    if layout == NATIVE:
        return dict(trace)
    names, rules, sizes = (
        names_of(family, layout, network.config),
        key_map(family).layouts[layout],
        sizes_of(network.config),
    )
    own = {n.rpartition(".")[0]: n for n in reversed(list(network.state_dict())) if n.endswith(("weight", "bias"))}
    parts: dict[str, list[Tensor]] = {}
    found: dict[str, Tensor] = {}
    for name, value in trace.items():
        base, at, call = name.partition("@")
        if base not in own:
            foreign = names.foreign(name) if ":" in name and base.partition(":")[0] in own else "-"
            found[name if foreign == "-" else foreign] = value
            continue
        entry = rules.entry(own[base], sizes)
        axis = 1 if isinstance(network.get_submodule(base), torch.nn.Conv2d | torch.nn.GroupNorm) else -1
        moved = value.movedim(axis, 0)
        foreign = names.foreign(base).split(" + ")
        if entry.operation == "part":
            parts.setdefault(foreign[0] + at + call, []).append(value)
            if len(parts[foreign[0] + at + call]) == entry.sizes[1]:
                found[foreign[0] + at + call] = torch.cat(parts[foreign[0] + at + call], dim=-1)
            continue
        cut = entry.write(moved) if entry.operation in ("rows", "swap_halves") else [moved]
        found |= {f + at + call: part.movedim(0, axis) for f, part in zip(foreign, cut, strict=True)}
    return found


@cache
def recorded_case(name: str) -> dict[str, Tensor]:
    """What our network computes on a case in float64: what an implementation without errors would write down."""
    golden = case(name)
    with record(golden.network, calls="all") as recording, torch.no_grad():
        golden.run(torch.float64)(golden.network)
    return dict(recording)


@cache
def reference(name: str, layout: str) -> dict[str, Tensor]:
    """The same by the names of a layout."""
    golden = case(name)
    return renamed(golden.network, golden.family, recorded_case(name), layout)


def beside_reference(golden: Case, trace: Any, layout: str, **options: Any) -> tuple[Report, Callable[[str], str]]:
    """The report on a port's trace beside a trace of the reference, both named by `layout`; a row's name -> eridiff's."""
    found = {name: torch.as_tensor(value) for name, value in trace.items()}
    sources = align(list(found), {golden.family: golden.config}, None, golden.family).sources
    mine = renamed(
        golden.network, golden.family, {native: source.read(found) for native, source in sources.items()}, layout
    )
    report = compare(
        mine,
        reference(golden.name, layout),
        network=golden.network,
        run=golden.run,
        layout=(golden.family, layout),
        **options,
    )
    back = {
        s.name: n for n, s in align(list(mine), {golden.family: golden.config}, layout, golden.family).sources.items()
    }
    return report, lambda name: back.get(name, name)
