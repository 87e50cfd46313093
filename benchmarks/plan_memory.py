"""Memory on a CPU beside what `eridiff plan --device cpu` predicts: `python -m benchmarks.plan_memory [WORD ...]`.

Images of the built-in models, and the decoder at full width beside diffusers', plain, channels-last and in strips. Each
measurement is a process of its own, on one thread: one with `MALLOC`, where malloc returns what is freed, and with malloc's own
settings another one, or three of a built-in model, as its heap is different each time; the middle one counts. Measured is the
highest anonymous resident memory (RssAnon of /proc/PID/status, read every millisecond by the parent) less what the process
held when torch, transformers and eridiff were imported; what is mapped from files is shown apart. Full-size files have
published headers and zeros for weights: sparse files, of which nothing is read from a disk. diffusers' weights are made
before, and so not counted either. With words only cases whose names have all of them are measured; the others keep their
rows. Prints a table and writes `benchmarks/results/plan_memory.json`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from eridiff.inference.placing import MALLOC

RESULTS = Path(__file__).parent / "results" / "plan_memory.json"
ASSETS = Path(__file__).parents[1] / "eridiff" / "assets"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAST = "diffusers, channels-last"


@dataclass(frozen=True)
class Case:
    """One image of a built-in model (`tiny-*`), or the decoding of one at the width of published autoencoders ("decode")."""

    what: str
    size: int
    dtype: str = "float32"
    rows: int = 0  # of a strip, 0 is the plain decode
    by: str = ""  # eridiff, or "diffusers" or LAST, whose decoders are not predicted

    @property
    def name(self) -> str:
        return f"{self.what} {self.size} {self.dtype} {self.by or (f'strips of {self.rows}' if self.rows else 'plain')}"


CASES = [
    *(Case("tiny-flux", size, dtype) for dtype in DTYPES for size in (64, 512, 1024)),
    *(Case("tiny-flux", size, rows=64) for size in (512, 1024)),
    *(Case("tiny-sd35", size) for size in (64, 256)),
    *(Case("tiny-sdxl", size) for size in (64, 512, 1024)),
    Case("tiny-sdxl", 1024, "bfloat16", 64),
    *(Case("decode", size, "bfloat16") for size in (256, 512)),
    *(case for size in (256, 512, 1024) for case in [
        *(Case("decode", size, by=by) for by in ("diffusers", LAST)),
        *(Case("decode", size, rows=rows) for rows in (0, 64, 32, 16)),
    ]),
]  # fmt: skip


def components(case: Case, folder: Path) -> Any:
    """The parts of a case's model; a published header is written to the folder."""
    from eridiff.weights.locate import locate, locate_part
    from tests.sparse import sparse_manifest

    if case.what != "decode":
        return locate(ASSETS / case.what)
    return locate_part(sparse_manifest(folder / "ae.safetensors", "ae"), "vae")


def predicted(case: Case) -> dict[str, int]:
    """Bytes of a case in memory of its own, with malloc as it comes and with `MALLOC`, and of weights that stay in their file."""
    from eridiff.inference import FAMILIES
    from eridiff.inference.placing import RUNTIME, plan_parts
    from eridiff.memory.plan import stages

    if case.by:
        return {}
    dtype = DTYPES[case.dtype]
    with tempfile.TemporaryDirectory() as folder:
        found = components(case, Path(folder))
        if case.what == "decode":
            (stage,) = stages({"vae": found}, case.size, case.size, dtype=dtype, vae_rows=case.rows or None, cpu=True)
            held = stage.held + stage.code + RUNTIME["cpu"]
            return {
                "predicted": held + stage.heap + stage.large, "predicted_returned": held + stage.work, "predicted_mapped": stage.mapped,
            }  # fmt: skip
        kind = next(family for family in FAMILIES if family.family in found.components)
        size = {"width": case.size, "height": case.size, "steps": 2}
        plan = plan_parts(kind, found, **size, dtype=dtype, device=torch.device("cpu"))
    (placement,) = (p for p in plan.placements if bool(p.vae_rows) == bool(case.rows))
    needed = placement.needed
    return {"predicted": needed, "predicted_returned": needed - placement.kept, "predicted_mapped": plan.mapped}


def work(case: Case, folder: Path) -> None:
    """In a process of its own: imports, waits for a line, generates or decodes."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizerFast, T5EncoderModel, T5TokenizerFast

    import eridiff
    from benchmarks.gpu_cases import their_autoencoder
    from eridiff.inference import DiffusionInference
    from eridiff.memory.strips import decode_in_strips
    from eridiff.models.autoencoder import AutoencoderConfig
    from eridiff.weights.load import build

    assert (
        CLIPTextModelWithProjection and CLIPTokenizerFast and T5EncoderModel and T5TokenizerFast and DiffusionInference
    )
    torch.set_num_threads(1)
    found = components(case, folder)
    dtype, rows = DTYPES[case.dtype], case.rows or None
    autoencoder: Any = None
    if case.by:
        autoencoder = their_autoencoder(AutoencoderConfig.preset("flux")).eval().to(dtype)
    if case.by == LAST:
        autoencoder.to(memory_format=torch.channels_last)
    print("ready", flush=True)
    sys.stdin.readline()
    if case.what == "decode":
        autoencoder = autoencoder or build(found, dtype=dtype, progress=False)
        latents = torch.zeros(1, 16, case.size // 8, case.size // 8, dtype=dtype)
        with torch.no_grad():
            decode_in_strips(autoencoder, latents, rows) if rows else autoencoder.decode(latents)
        return
    model = eridiff.load(ASSETS / case.what, device="cpu", dtype=dtype, vae_rows=rows, progress=False)
    model.generate("a swan", width=case.size, height=case.size, steps=2, seed=1)


def measured(case: Case, **environment: str) -> dict[str, Any]:
    """Highest anonymous memory of a case in bytes, and pages that it has mapped from files, less those of its libraries."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.plan_memory", "--one", json.dumps(asdict(case)), folder]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": env}
        with subprocess.Popen(command, **pipes) as child:
            assert child.stdin and child.stdout
            if child.stdout.readline() != "ready\n":
                raise RuntimeError(f"{case.name} did not start")
            most = before = _resident(child.pid)
            begun = time.monotonic()
            child.stdin.write("\n")
            child.stdin.flush()
            while child.poll() is None:
                now = _resident(child.pid)
                most = [max(pair) for pair in zip(most, now, strict=True)]
                time.sleep(0.001)
        if child.returncode:
            raise RuntimeError(f"{case.name} ended with {child.returncode}")
    anonymous, file = (a - b for a, b in zip(most, before, strict=True))
    return {"measured": anonymous, "measured_mapped": file, "seconds": round(time.monotonic() - begun, 1)}


def _resident(pid: int) -> list[int]:
    """Anonymous bytes and those of mapped files that a process has in memory; zeros when it has ended."""
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except ProcessLookupError:
        return [0, 0]
    return [int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("RssAnon", "RssFile")]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*", help="measure the cases whose names have all of these; without any, all")
    parser.add_argument("--keep", action="store_true", help="measure nothing, predict anew")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        work(Case(**json.loads(options.one[0])), Path(options.one[1]))
        return
    before = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    kept = {Case(**row["case"]): row for row in before}
    print(
        "| case | malloc returns: MB | of diffusers' | predicted MB | measured / predicted | its own settings: MB | least, most "
        "| predicted MB | measured / predicted | mapped MB | seconds |\n" + "|---" * 11 + "|"
    )
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if not options.keep and all(word in case.name for word in options.words):
            found = [measured(case) for _ in range(1 if case.what == "decode" else 3)]
            found.sort(key=lambda one: one["measured"])
            row = found[len(found) // 2] | {"least": found[0]["measured"], "most": found[-1]["measured"]}
            row["returned"] = measured(case, **dict([MALLOC]))["measured"]
        elif case in kept:
            row = {
                name: kept[case][name]
                for name in ("measured", "returned", "measured_mapped", "seconds", "least", "most")
            }
        else:
            continue
        row = {"case": asdict(case), **row, **predicted(case)}
        rows.append(row)
        print(line(case, row, rows), flush=True)
        machine = {
            "torch": torch.__version__,
            "threads": 1,
            "libc": " ".join(os.confstr("CS_GNU_LIBC_VERSION").split()),
        }
        known = [row["case"] for row in rows]
        others = [row for at, row in kept.items() if at in CASES and asdict(at) not in known]
        RESULTS.write_text(json.dumps({"machine": machine, "runs": [*rows, *others]}, indent=1) + "\n")


def line(case: Case, row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Of the table; the measured memory also as a part of what diffusers' plain decode took, if that is in `rows`."""
    beside = asdict(Case(case.what, case.size, case.dtype, by="diffusers"))
    of = "".join(f"{row['returned'] / other['returned']:.2f}" for other in rows if other["case"] == beside)
    spread = f"{row['least'] / 1e6:.0f}, {row['most'] / 1e6:.0f}" if row["most"] > row["least"] else ""
    cells = [f"{row['returned'] / 1e6:.0f}", of, *planned(row, "returned", "predicted_returned")]
    cells += [f"{row['measured'] / 1e6:.0f}", spread, *planned(row, "measured", "predicted")]
    mapped = f"{row['predicted_mapped'] / 1e6:.0f}" if not case.by else ""
    return " | ".join(["", case.name, *cells, mapped, str(row["seconds"]), ""]).strip()


def planned(row: dict[str, Any], measured: str, predicted: str) -> list[str]:
    """What was predicted, in MB, and how many times as much was measured."""
    if predicted not in row:
        return ["", ""]
    return [f"{row[predicted] / 1e6:.0f}", f"{row[measured] / row[predicted]:.2f}"]


if __name__ == "__main__":
    main()
