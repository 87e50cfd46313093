"""How `benchmarks/gpu.py` measures: time by CUDA events, in turns; kernels; memory; the machine; a budget of seconds."""

import gc
import importlib.metadata
import math
import platform
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
Ask = Callable[[], Any]
PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "pytest")


class OutOfTime(BaseException):
    """Ends a section from within; no Exception, so that nothing that guards a row catches it."""


@dataclass
class Budget:
    """Seconds that a run may take, from its beginning."""

    seconds: float
    begun: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begun)

    @contextmanager
    def limit(self) -> Iterator[None]:
        """Within the block OutOfTime is raised when nothing is left; a kernel or a compiler that runs is waited for."""

        def stop(*_: Any) -> None:
            raise OutOfTime

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(self.left, 0.001))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def milliseconds(ask: Ask, device: torch.device, repeats: int = 1) -> float:
    """Of one call, over a few in a row."""
    if device.type != "cuda":
        begun = time.perf_counter()
        for _ in range(repeats):
            ask()
        return (time.perf_counter() - begun) * 1000 / repeats
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        ask()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def in_turns(asks: Mapping[str, Ask], device: torch.device, seconds: float) -> list[dict[str, float]]:
    """Milliseconds of each, a mapping a round: all in order, then all the other way round, and the mean of both.

    So a drift of the clock falls on all alike. 3 to 10 rounds, as fit into `seconds`; a sample takes at least 20 ms.
    """
    repeats, spent = {}, 0.0
    for name, ask in asks.items():
        ask()
        once = milliseconds(ask, device)
        repeats[name] = min(1000, max(1, math.ceil(20 / once)))
        spent += 2 * once * repeats[name] / 1000
    rounds = []
    for _ in range(int(min(10, max(3, seconds // spent)))):
        there = {name: milliseconds(ask, device, repeats[name]) for name, ask in asks.items()}
        back = {name: milliseconds(asks[name], device, repeats[name]) for name in reversed(list(asks))}
        rounds.append({name: (there[name] + back[name]) / 2 for name in asks})
    return rounds


def spread(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")


def kernels(ask: Ask, device: torch.device) -> tuple[int | None, list[tuple[str, int, float]]]:
    """CUDA kernels of one call, without copies and fills by the driver; on a CPU operators. None: the profiler saw none.

    And those that take longest together: name, number, milliseconds.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as seen:
        ask()
        synchronise(device)
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [event for event in seen.events() if event.device_type == wanted and not event.is_user_annotation]
    chosen = [
        e for e in events if (not e.name.startswith(("Memcpy", "Memset")) if on_gpu else e.name.startswith("aten::"))
    ]
    spent: dict[str, list[float]] = {}
    for event in chosen:
        spent.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1000)
    longest = sorted(((name, len(t), sum(t)) for name, t in spent.items()), key=lambda row: -row[2])
    return len(chosen) or None, longest[:12]


def memory(ask: Ask, device: torch.device) -> dict[str, float]:
    """GB: the most that torch had allocated during a call, and how much of it the call itself made; nothing on a CPU."""
    if device.type != "cuda":
        ask()
        return {}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ask()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return {"peak_gb": peak / 1e9, "made_gb": (peak - before) / 1e9}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def free(device: torch.device) -> None:
    """Between sections: nothing compiled, nothing cached."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def rates(device: torch.device, size: int) -> tuple[float, float]:
    """FLOP/s of a bfloat16 product of `size`^3 with random numbers, and bytes/s of a copy, read and written.

    With zeros the product is faster, because the chip then takes less power.
    """
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    product = statistics.median(r["x"] for r in in_turns({"x": lambda: a @ b}, device, 2))
    source = torch.empty(size * size * 8, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = statistics.median(r["x"] for r in in_turns({"x": lambda: target.copy_(source)}, device, 2))
    return 2 * size**3 / product * 1000, 2 * source.nbytes / copy * 1000


def said(*command: str) -> str | None:
    """The first line that a command prints; None where it cannot run."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip().split("\n")[0] if result.returncode == 0 else None


def line_of(path: str, start: str) -> str | None:
    """What a file of /proc says behind a key."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(start)), None)


def available_bytes() -> int:
    """Memory of the host that is free for a process; 0 where nobody says."""
    return int((line_of("/proc/meminfo", "MemAvailable") or "0 kB").split()[0]) * 1024


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": said("git", "rev-parse", "HEAD"),
        "changed": bool(said("git", "status", "--porcelain", "--untracked-files=no")),
        "cpu": line_of("/proc/cpuinfo", "model name") or platform.processor(),
        "host_gb": round(int((line_of("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) * 1024 / 1e9, 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "device": device.type,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name, "device_gb": round(properties.total_memory / 1e9, 1),
            "capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }  # fmt: skip
    return found
