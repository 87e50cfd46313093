"""Everything that only a GPU can tell, in one command of at most 8 minutes: `python -m benchmarks.gpu`.

First the tests marked `gpu`. Then the networks at published size with random weights in bfloat16 beside diffusers' with the
same weights, where diffusers is installed: time in turns, share of the roofline, kernels, memory, parity; an image of
Flux-dev's size under a cap of 24 GiB; and again compiled. Sections that do not fit into what is left of `--seconds` are
listed as not run; an error becomes a row and the rest goes on. Prints tables and writes
`benchmarks/results/gpu-<device>.json` after each section; exits with 1 where anything failed. `--tiny` runs all of it on the
CPU with tiny networks: these numbers mean nothing.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks import gpu_cases, gpu_measure, gpu_networks, gpu_offload, gpu_training
from benchmarks.gpu_measure import ROOT, Budget
from benchmarks.gpu_sections import Bench, Section, run_section, table, write


def run_rates(bench: Bench) -> None:
    bench.rates = gpu_measure.rates(bench.device, 256 if bench.tiny else 8192)
    bench.row("bfloat16 product", tflop_per_s=bench.rates[0] / 1e12)
    bench.row("copy, read and written", tb_per_s=bench.rates[1] / 1e12)


def run_tests(bench: Bench) -> None:
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_gpu*.py"))
    run_pytest(bench, files, "not gpu and not slow" if bench.tiny else "gpu")


def run_pytest(bench: Bench, files: list[str], chosen: str) -> None:
    """In a process of its own, whose lines are read, so that tests that ended count even if the process does not."""
    if gpu_measure.version("pytest") is None:
        return bench.row("pytest", "not run", "pytest is not installed")
    options = ["-o", "addopts=", "-v", "-rfE", "--tb=short", "--color=no", "--noconftest", "-p", "no:cacheprovider"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "400", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", *files, *options, "-m", chosen]
    seconds = max(1, bench.budget.left / 2)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            ended = f"pytest ended with {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            ended = f"the tests did not end within {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what the tests have started
                process.wait()
        log.seek(0)
        lines = log.read().splitlines()
    reasons = dict(m.groups() for line in lines if (m := re.match(r"(?:FAILED|ERROR) (\S+::.+?) - (.*)", line)))
    for line in lines:
        if m := re.match(r"(\S+\.py::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b(?: \((.*)\))?", line):
            name, outcome, reason = m.groups()
            bench.row(name, {"ERROR": "failed"}.get(outcome, outcome.lower()), reasons.get(name, reason))
    first = next((i for i, line in enumerate(lines) if re.match(r"=+ (ERRORS|FAILURES) =+", line)), len(lines))
    bench.section.log = lines[first:][:400]
    if process.returncode not in (0, 1) or not bench.section.rows:
        bench.row("pytest", "failed", f"{ended}: {' '.join(lines[-3:])}"[:400])


def plan(tiny: bool) -> list[Section]:
    """What is run, in this order: each case without compilation before any with it."""
    cases = gpu_cases.tiny() if tiny else gpu_cases.published()
    slow = {c.name: c.seconds + sum(c.compiling) for c in cases}
    return [
        Section("rates", "what the device reaches", 5, run_rates),
        Section("tests", "the tests marked gpu" if not tiny else "the same tests on the CPU", 30 if tiny else 150, run_tests),
        *(Section(c.name, c.what, c.seconds, partial(gpu_networks.run_case, case=c, compiled=False)) for c in cases),
        Section("offload", "a whole Flux on the host, by each offload", 5 if tiny else 90, gpu_offload.run),
        Section("training", "a LoRA of a whole Flux in training, and an image in between", 5 if tiny else 45, gpu_training.run),
        *(Section(f"{c.name} compiled", c.what, slow[c.name], partial(gpu_networks.run_case, case=c, compiled=True)) for c in cases),
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480, help="what all may take")
    parser.add_argument("--tiny", action="store_true", help="tiny networks on the CPU, to try the program itself")
    parser.add_argument("--out", type=Path, help="the JSON file")
    parser.add_argument(
        "--host-gb", type=float, help="memory of the host, where the system grows into more than it says"
    )
    parser.add_argument(
        "--only", nargs="*", help="the names of sections to run, such as G1 (and --out, or the rest is overwritten)"
    )
    options = parser.parse_args()
    budget = Budget(options.seconds)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --tiny tries the program on the CPU")
    device = torch.device("cpu" if options.tiny else "cuda:0")
    torch.backends.cudnn.allow_tf32 = False  # float32 convolutions are references here
    machine = gpu_measure.machine(device)
    slug = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    path = options.out or ROOT / "benchmarks" / "results" / f"gpu-{slug}.json"
    host = options.host_gb * 1e9 if options.host_gb else gpu_measure.available_bytes()
    bench = Bench(device, budget, options.tiny, host, plan(options.tiny))
    told = {"seconds": options.seconds, "tiny": options.tiny, "only": options.only}
    print("\n".join(f"{name}: {value}" for name, value in machine.items()), flush=True)
    write(path, machine, told, bench)
    for section in bench.sections:
        if options.only and section.name not in options.only:
            section.why = "it was not asked for"
        else:
            run_section(bench, section)
            print(table(section), *section.log, sep="\n", flush=True)
        write(path, machine, told, bench)
    failed = [section.name for section in bench.sections if section.outcome == "failed"]
    left_out = [section.name for section in bench.sections if section.outcome in ("not run", "stopped")]
    print(f"\nfailed: {', '.join(failed) or 'nothing'}; not run to the end: {', '.join(left_out) or 'nothing'}; {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
