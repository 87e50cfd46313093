"""`python -m benchmarks.cpu` checks parity first, leaves out quads in which the machine changed, and writes what it has measured."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cpu
from eridiff import onednn
from eridiff.models.flux import FluxConfig

pytest.importorskip("diffusers")


def tiny() -> Any:
    return cpu.flux_case("T", "a tiny Flux", FluxConfig(64, 64, 8, 12, 32, 2, 4.0, 1, 1, (4, 6, 6)), 2, 5, 0, (0, 0))


def test_a_case_is_compared_and_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(cpu, "cases", lambda: [tiny()])
    monkeypatch.setattr(cpu, "LINEAR", ("T",))
    monkeypatch.setattr(onednn, "_measured", lambda weight, rows, seconds: (1e9, 2.0, 1.0))  # oneDNN is faster
    monkeypatch.setattr(cpu, "DRIFT", 100.0)  # a busy machine is none of this test's business
    monkeypatch.setattr(sys, "argv", ["cpu", "--seconds", "0.1", "--out", str(tmp_path / "cpu.json")])
    cpu.main()
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert [(row["way"], row["beside"]) for row in rows] == [
        ("forward", "diffusers"), ("step", "diffusers"), ("step, oneDNN", "diffusers"), ("step, oneDNN", "eridiff's step"),
    ]  # fmt: skip
    for row in rows:
        assert len(row["quads"]) >= 4 and row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1] and row["ms"] > 0
    assert cpu.figure(rows).count('class="bar"') == 3  # those beside diffusers


def test_other_numbers_are_not_timed() -> None:
    wrong = replace(tiny(), ask_theirs=lambda networks, x: 1.001 * tiny().ask_theirs(networks, x))
    with pytest.raises(ArithmeticError, match=r"T, forward: 1\.0e-03 from diffusers"):
        cpu.ways(wrong)


def test_a_quad_in_which_the_machine_changed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def times() -> Iterator[float]:  # of the fixed product: alike, then twice as slow, and so on
        while True:
            yield from (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0)

    product = times()
    monkeypatch.setattr(cpu, "seconds", lambda ask, repeats=1: next(product) if ask is canary else 1.0)

    def canary() -> None: ...

    assert len(cpu.quads(lambda: torch.zeros(1), lambda: torch.zeros(1), canary, 0)) == 4
    monkeypatch.setattr(cpu, "DRIFT", 3.0)
    assert len(cpu.quads(lambda: torch.zeros(1), lambda: torch.zeros(1), canary, 0)) == 4
    monkeypatch.setattr(cpu, "DRIFT", 0.5)
    assert cpu.quads(lambda: torch.zeros(1), lambda: torch.zeros(1), canary, 0) == []
