"""Sections of `benchmarks/gpu.py`: one of our networks beside diffusers' of the same weights."""

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.gpu_cases import Case, Networks, in_diffusers, on_meta, random_weights, twin
from benchmarks.gpu_measure import in_turns, kernels, memory, spread, synchronise, version
from benchmarks.gpu_sections import Bench
from eridiff.blocks import compile_blocks, repeated_blocks
from eridiff.graphs import graph_steps
from eridiff.lora import inject_lora
from eridiff.trace.record import relative_l2

BLOCK_BOUND = 0.03  # of a block in bfloat16 against float32: some ten roundings of 2^-9 each, doubled and rounded up
RANK = 16


@torch.no_grad()
def run_case(bench: Bench, case: Case, compiled: bool) -> None:
    device = bench.device
    networks = random_weights(case.ours, device, torch.bfloat16)
    x = case.inputs(device, torch.bfloat16)
    reference = case.forward(networks, x)
    limit = limit_ms(bench, case, networks)
    ways: dict[str, Callable[[], Tensor]] = {}

    def add(name: str, make: Callable[[], Callable[[], Tensor]], **values: Any) -> None:
        """A way to ask, tried once; where it fails or gives numbers that are not finite it is not timed."""
        with bench.guarded(name):
            begun = time.monotonic()
            ask = make()
            output = ask()
            synchronise(device)
            distance = relative_l2(output, reference)
            if not torch.isfinite(output).all():
                raise ArithmeticError("the output is not finite")
            ways[name] = ask
            bench.row(name, relative_l2=distance, first_s=time.monotonic() - begun, **values)

    def ours(owned: Networks) -> Callable[[], Tensor]:
        run = case.prepare(owned, x)
        return lambda: case.step(owned, x, run)

    def as_graphs(owned: Networks) -> Callable[[], Tensor]:
        for module in owned.values():
            graph_steps(module)
        return ours(owned)

    def with_blocks_compiled() -> Networks:
        others = twin(case.ours, networks)
        for module in others.values():
            compile_blocks(module, **bench.compiler)
        return others

    def theirs(change: Callable[[Networks], object] = lambda _: None) -> Callable[[], Tensor]:
        others = in_diffusers(case.theirs, networks)
        change(others)
        return lambda: case.ask_theirs(others, x)

    if case.apart:
        add("ours, step", lambda: ours(networks))
        if device.type == "cuda" and not compiled:
            add("ours, step, as a CUDA graph", lambda: as_graphs(twin(case.ours, networks)))
    add("ours", lambda: lambda: case.forward(networks, x))
    diffusers = version("diffusers") is not None
    if diffusers:
        add("diffusers", theirs)
    else:
        bench.row("diffusers", "not run", "diffusers is not installed")
    if not compiled:
        for name, ask in case.further.items():
            add(name, lambda ask=ask: lambda: ask(networks, x))  # type: ignore[misc]
        if case.name == "G1":
            add_loras(bench, case, networks, add, ours, theirs if diffusers else None)
        measure(bench, ways, limit)
        with bench.guarded("blocks in bfloat16"):
            compare_blocks(bench, networks, lambda: case.forward(networks, x))
        return
    if case.apart:
        step = ours(with_blocks_compiled())
        add("ours compiled, step", lambda: step)
        if device.type == "cuda":
            add("ours compiled, step, as a CUDA graph", lambda: as_graphs(with_blocks_compiled()))
    else:
        others = with_blocks_compiled()
        add("ours compiled", lambda: lambda: case.forward(others, x))
    measure(bench, ways, limit)
    if diffusers and bench.budget.left < case.compiling[1]:
        bench.row("diffusers compiled", "not run", f"about {case.compiling[1]:.0f} s are needed")
    elif diffusers:
        how = "; ".join(dict.fromkeys(compiler_of(module)[1] for module in on_meta(case.theirs).values()))

        def change(others: Networks) -> None:
            for module in others.values():
                compiler_of(module)[0](**bench.compiler)

        add("diffusers compiled", lambda: theirs(change), note=how)
        measure(bench, ways, limit)


def limit_ms(bench: Bench, case: Case, networks: Networks) -> float | None:
    """The roofline: no faster than the chip's products, and than the weights are read once."""
    if bench.rates is None:
        return None
    if case.name not in bench.flops:
        bench.flops[case.name] = case.flops()
    weights = sum(p.nbytes for module in networks.values() for p in module.parameters())
    return max(bench.flops[case.name] / bench.rates[0], weights / bench.rates[1]) * 1000


def compiler_of(module: Any) -> tuple[Callable[..., object], str]:
    """How diffusers' network is compiled: as it offers, or block by block where it names no repeated ones."""
    if module._repeated_blocks:
        return partial(module.compile_repeated_blocks, fullgraph=True), "compile_repeated_blocks"
    if hasattr(module, "transformer_blocks"):

        def each(**options: Any) -> None:
            for block in module.transformer_blocks:
                block.compile(fullgraph=True, **options)

        return each, "each block; diffusers names no repeated ones"
    return module.decoder.compile, "the whole decoder; diffusers names no repeated blocks"


def add_loras(bench: Bench, case: Case, networks: Networks, add: Any, ours: Any, theirs: Any) -> None:
    """A LoRA on every linear layer: our branches, and peft's."""

    def with_ours() -> Callable[[], Tensor]:
        others = twin(case.ours, networks)
        inject_lora(next(iter(others.values())), RANK, targets="all-linear", dtype=torch.bfloat16)
        return ours(others)

    def by_peft(others: Networks) -> None:
        from peft import LoraConfig

        module = next(iter(others.values()))
        module.add_adapter(LoraConfig(r=RANK, target_modules="all-linear"))
        module.to(torch.bfloat16).requires_grad_(False)

    add(f"ours, step, LoRA of rank {RANK}", with_ours)
    if theirs is None or version("peft") is None:
        bench.row(f"diffusers, LoRA of rank {RANK}", "not run", "diffusers or peft is not installed")
    else:
        add(f"diffusers, LoRA of rank {RANK}", lambda: theirs(by_peft), note="by peft")


def measure(bench: Bench, ways: dict[str, Callable[[], Tensor]], limit: float | None) -> None:
    """Time all ways in turns, then count kernels and memory of each."""
    if not ways:
        return
    rounds = in_turns(ways, bench.device, 0.2 if bench.tiny else 6)
    for name, ask in ways.items():
        low, middle, high = spread([r[name] for r in rounds])
        row = bench.section.rows[name]
        row |= {"ms": middle, "ms_quartiles": [low, high], "rounds": len(rounds)}
        row["of_limit"] = limit and limit / middle
        if "diffusers" in ways:
            low, middle, high = spread([r["diffusers"] / r[name] for r in rounds])
            row |= {"faster_than_diffusers": middle, "faster_quartiles": [low, high]}
        if "kernels" not in row:
            with bench.guarded(f"kernels and memory: {name}"):
                row["kernels"], longest = kernels(ask, bench.device)
                bench.section.log += [f"{name}: {ms:.2f} ms in {n} x {kernel[:110]}" for kernel, n, ms in longest]
                row |= memory(ask, bench.device)


def compare_blocks(bench: Bench, networks: Networks, forward: Callable[[], Tensor]) -> None:
    """The first and the last repeated block of each class on what they get in a forward, against the same in float32."""
    chosen: dict[str, nn.Module] = {}
    for part, network in networks.items():
        named = {module: name for name, module in network.named_modules()}
        blocks = [block for block in repeated_blocks(network) if any(True for _ in block.parameters())]
        for kind in dict.fromkeys(map(type, blocks)):
            own = [block for block in blocks if type(block) is kind]
            chosen |= {f"{part} {named[block]}": block for block in (own[0], own[-1])}
    given: dict[str, Any] = {}
    hooks = [
        block.register_forward_pre_hook(lambda _, inputs, name=name: given.__setitem__(name, inputs))
        for name, block in chosen.items()
    ]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    for name, inputs in given.items():  # an autoencoder's encoder is not asked
        wide = copy.deepcopy(chosen[name]).float()
        expected = tensors(wide(*mapped(inputs, lambda t: t.float() if t.is_floating_point() else t)))
        pairs = zip(tensors(chosen[name](*inputs)), expected, strict=True)
        distance = max(relative_l2(a, b) for a, b in pairs)
        fine = distance <= BLOCK_BOUND
        why = None if fine else f"further from float32 than {BLOCK_BOUND}"
        bench.row(f"block {name} against float32", "done" if fine else "failed", why, relative_l2=distance)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return tree_map_only(Tensor, change, value)


def tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]
