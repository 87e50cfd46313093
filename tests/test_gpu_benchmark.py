"""`benchmarks/gpu.py` as far as a CPU can tell: all of it at tiny size, its arithmetic, its budget, what an error leaves."""

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_cases, gpu_networks
from benchmarks.gpu_measure import Budget
from benchmarks.gpu_sections import Bench, Section, run_section, table, write

ROOT = Path(__file__).parents[1]
CASES = ["G1", "G3", "G5", "G4", "G6a", "G6b", "G2"]
SECTIONS = ["rates", "tests", *CASES, "offload", "training", *(f"{name} compiled" for name in CASES)]


def run(out: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", str(out), *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    return result.returncode, json.loads(out.read_text()), result.stdout + result.stderr


@pytest.mark.slow
def test_every_section_runs_at_tiny_size(tmp_path: Path) -> None:
    code, found, said = run(tmp_path / "gpu.json", "--seconds", "800")
    sections = {section["name"]: section for section in found["sections"]}
    failed = [row for section in sections.values() for row in section["rows"] if row["outcome"] == "failed"]
    assert not failed and code == 0, said[-4000:]
    assert list(sections) == SECTIONS
    rows = {name: {row["name"]: row for row in section["rows"]} for name, section in sections.items()}
    assert all(section["outcome"] == "done" and section["seconds"] > 0 for section in sections.values()), said[-4000:]
    outcomes = [row["outcome"] for row in rows["tests"].values()]
    assert len(outcomes) > 30 and set(outcomes) == {"passed"}
    for name in CASES:
        apart = ["ours, step"] if name in ("G1", "G3", "G4", "G5") else []
        for way in [*apart, "ours", "diffusers"]:
            row = rows[name][way]
            low, high = row["ms_quartiles"]
            assert 0 < low <= row["ms"] <= high and row["kernels"] > 10 and 0 < row["of_limit"] < 1
            assert row["relative_l2"] < 0.1 and row["faster_than_diffusers"] > 0
        assert any(row_name.startswith("block ") for row_name in rows[name])
        ours = f"ours compiled{', step' if apart else ''}"
        assert {ours, "diffusers compiled"} <= set(rows[f"{name} compiled"])
        assert all(row["ms"] > 0 and row["first_s"] > 0 for row in rows[f"{name} compiled"].values())
    assert {"ours, step, LoRA of rank 16", "diffusers, LoRA of rank 16"} <= set(rows["G1"])
    assert set(rows["offload"]) == {
        "weights on the host", "offload='stages'", "offload='stream'", "offload='layers'", "offload='stream' in 24 GiB",
        "offload='stream' in 12 GiB", "all on the device", "the same latents, bit for bit"
    }  # fmt: skip
    assert set(rows["training"]) == {
        "without images", "with an image in between, verify=True", "the same losses, bit for bit",
        "LoRA on the layers of modulation", "scale 0 and detached: as without it",
    }  # fmt: skip
    assert rows["training"]["LoRA on the layers of modulation"]["moved_by_1"] > 1e-4
    assert {"date", "commit", "cpu", "torch", "diffusers", "transformers", "peft", "device"} <= set(found["machine"])


def test_what_does_not_fit_is_listed_as_not_run(tmp_path: Path) -> None:
    code, found, said = run(tmp_path / "gpu.json", "--seconds", "0")
    assert code == 0 and [section["name"] for section in found["sections"]] == SECTIONS
    assert {section["outcome"] for section in found["sections"]} == {"not run"}
    assert (
        all("s are needed" in section["why"] for section in found["sections"]) and "not run to the end: rates" in said
    )


STEPS_OF_SCHNELL, PROMPT = 4, 2 * 256 * 4096 * 3072 / 1e12  # which our network projects once, diffusers' at each step
PUBLISHED = {  # TFLOP of one forward of diffusers' modules, counted with FlopCounterMode on the meta device
    "G1": 74.385, "G3": 62.242, "G5": 13.522, "G4": 22.499, "G6a": 10.472, "G6b": 48.486,
    "G2": STEPS_OF_SCHNELL * 69.467 + 10.472 - (STEPS_OF_SCHNELL - 1) * PROMPT,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_work_of_a_published_case_is_counted_right(name: str) -> None:
    case = next(case for case in gpu_cases.published() if case.name == name)
    rounding = 0.0005 * (STEPS_OF_SCHNELL + 1 if name == "G2" else 1)
    assert case.flops() / 1e12 == pytest.approx(PUBLISHED[name], abs=rounding)


def bench(seconds: float, *sections: Section) -> Bench:
    return Bench(torch.device("cpu"), Budget(seconds), True, 0.0, list(sections))


OUTCOMES = """
import pytest

@pytest.mark.parametrize("name", ["with a space"])
def test_good(name): pass
def test_bad(): assert 1 == 2, "one is not two"
def test_absent(): pytest.importorskip("no_such_package")
def test_without(no_such_fixture): pass
"""


def test_each_test_is_a_row_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "test_few.py").write_text(OUTCOMES)
    section = Section("tests", "", 0, lambda b: gpu.run_pytest(b, [str(tmp_path / "test_few.py")], ""))
    run_section(bench(100), section)
    found = {name.split("::")[1]: (row["outcome"], row["why"]) for name, row in section.rows.items()}
    assert section.outcome == "failed" and found.pop("test_good[with a space]") == ("passed", None)
    assert found.pop("test_without") == ("failed", None)  # whose reason is in the log
    assert "no_such_fixture" in "".join(section.log)
    for name, outcome, reason in (
        ("test_bad", "failed", "one is not two"),
        ("test_absent", "skipped", "no_such_package"),
    ):
        assert found[name][0] == outcome and reason in str(found[name][1])
    assert len(found) == 2


def test_without_diffusers_the_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_networks, "version", lambda _: None)
    case = gpu_cases.tiny()[0]
    section = Section("G1", "", 0, partial(gpu_networks.run_case, case=case, compiled=False))
    run_section(bench(100), section)
    absent = {name for name, row in section.rows.items() if row["outcome"] == "not run"}
    assert absent == {"diffusers", "diffusers, LoRA of rank 16"} and section.outcome == "done"
    assert "diffusers is not installed" in table(section) and section.rows["ours"]["ms"] > 0


def test_an_error_is_a_row_and_the_rest_of_the_section_goes_on() -> None:
    def work(bench: Bench) -> None:
        with bench.guarded("bad"):
            raise ValueError("two\nlines")
        bench.row("good", ms=1.0)

    section = Section("s", "", 0, work)
    run_section(bench(100), section)
    assert section.outcome == "failed" and section.why is None
    assert section.rows["bad"] == {"outcome": "failed", "why": "ValueError: two lines"}
    assert section.rows["good"]["outcome"] == "done" and "| good | done |" in table(section)


def test_a_section_that_breaks_says_why() -> None:
    section = Section("s", "", 0, lambda _: 1 / 0)  # type: ignore[arg-type,return-value]
    run_section(bench(100), section)
    assert (section.outcome, section.why) == ("failed", "ZeroDivisionError: division by zero")


def test_a_section_is_stopped_when_the_time_is_spent_and_keeps_its_rows() -> None:
    def work(bench: Bench) -> None:
        bench.row("early")
        with bench.guarded("late"):  # the end of the time is not an error of a row
            time.sleep(30)

    section, begun = Section("s", "", 0, work), time.monotonic()
    run_section(bench(0.3), section)
    assert time.monotonic() - begun < 10
    assert (section.outcome, list(section.rows)) == ("stopped", ["early"])


def test_the_file_holds_what_was_done_before_the_end(tmp_path: Path) -> None:
    first, second = (Section(name, "", 0, lambda b: b.row("x", ms=1.0)) for name in ("a", "b"))
    both = bench(100, first, second)
    run_section(both, first)
    write(tmp_path / "results" / "gpu.json", {}, {}, both)
    done, left = json.loads((tmp_path / "results" / "gpu.json").read_text())["sections"]
    assert (done["outcome"], done["rows"]) == ("done", [{"name": "x", "outcome": "done", "why": None, "ms": 1.0}])
    assert (left["outcome"], left["why"]) == ("not run", "the run ended before")
