"""A forward and a step of each family on the CPU beside diffusers' of the same weights: `python -m benchmarks.cpu [--only C1 C6a]`.

float32, one thread, one process. Parity first. Then quads A B B A of eridiff and diffusers, so that a drift of the machine falls
on both; a fixed matrix product before and after each quad tells whether the machine changed meanwhile, and such quads are
left out. "step, oneDNN" is the step with `eridiff.onednn.use_onednn`, beside diffusers and beside eridiff's step without it; there is
none where that changes no layer. "step, compiled" is beside diffusers, eager and compiled. Prints the median of diffusers / eridiff with
its quartiles, the ratio of the two minima, the ratio if eridiff took time for nothing but products, convolutions, attention and GELU, whose
kernels are torch's on both sides, and the share of the rate of the largest product that one thread reaches here; writes `benchmarks/results/cpu.json` and `docs/images/cpu.svg`.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_cases import Case, decode_case, flux_case, in_diffusers, mmdit_case, random_weights, twin, unet_case
from benchmarks.gpu_measure import version
from eridiff.blocks import compile_blocks
from eridiff.models.autoencoder import AutoencoderConfig
from eridiff.models.flux import FluxConfig
from eridiff.models.mmdit import MMDiTConfig
from eridiff.models.unet import UNetConfig
from eridiff.onednn import use_onednn
from eridiff.trace.record import relative_l2

RESULTS = Path(__file__).parent / "results" / "cpu.json"
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "cpu.svg"
CPU = torch.device("cpu")
PARITY = 1e-5  # relative L2; of diffusers' channels-last convolutions twice that
SAMPLE_SECONDS = 0.02  # of one sample at least
DRIFT = 1.1  # how much the fixed product may change within a quad
LINEAR = ("C2", "C3", "C4", "C5a", "C5b")  # whose time is in linear layers
CALLS = ("C1s",)  # whose time is in calls, which a compiler saves
OWN = "eridiff's step"
THEIRS = {
    "step, oneDNN": ("diffusers", OWN),
    "step, compiled": ("diffusers", "diffusers, compiled"),
}  # beside what a way stands
KERNELS = (  # of products, convolutions, attention and GELU
    "addmm", "mm", "bmm", "_linear_pointwise", "mkldnn_convolution", "_slow_conv2d_forward",
    "_scaled_dot_product_flash_attention_for_cpu", "gelu", "gelu_",
)  # fmt: skip
Ask = Callable[[], Tensor]


def cases() -> list[Case]:
    """The sizes of small networks in use, from pure overhead (C1s) to matrix products (C3)."""
    small = FluxConfig(64, 64, 64, 64, 64, 4, 4.0, 4, 8, (4, 6, 6))
    wide = replace(small, hidden=256, text_width=256, pooled_width=256, rope_axes=(16, 24, 24))
    widest = FluxConfig(64, 64, 768, 768, 768, 6, 4.0, 2, 4, (16, 56, 56))
    medium = MMDiTConfig(hidden=1536, heads=24, depth=4, table_side=384, dual_blocks=(0, 1))
    unet = UNetConfig(4, 4, 64, (1, 2, 4), (0, 1, 2), 2, 32, text_width=256, vector_width=208 + 6 * 256)
    wider = replace(unet, channels=128, head_width=64, text_width=512, vector_width=464 + 6 * 256)
    vae, none = AutoencoderConfig.preset("flux"), (0.0, 0.0)
    return [
        flux_case("C1s", "Flux, 64 wide, 16 + 32 tokens", small, 4, 32, 0, none),
        flux_case("C1", "Flux, 64 wide, 1024 + 128 tokens", small, 32, 128, 0, none),
        flux_case("C2", "Flux, 256 wide, 1024 + 128 tokens", wide, 32, 128, 0, none),
        flux_case("C3", "Flux, 768 wide, 1024 + 128 tokens", widest, 32, 128, 0, none),
        mmdit_case("C4", "MMDiT, 4 blocks of sd3.5-medium, two rows of 256 + 333 tokens", medium, 16, 333, 0, none),
        unet_case("C5a", "UNet, 64 to 256 channels, two rows of 64 x 64", unet, 64, 77, 0, none),
        unet_case("C5b", "UNet, 128 to 512 channels, two rows of 64 x 64", wider, 64, 77, 0, none),
        decode_case("C6a", "decoding 256 pixels, 16 channels", vae, 32, 0, none),
    ]


@torch.no_grad()
def ways(case: Case) -> tuple[dict[str, Ask], dict[str, Ask]]:
    """How eridiff and diffusers are asked, with the same weights; raises ArithmeticError where their numbers differ."""
    networks, x = random_weights(case.ours, CPU, torch.float32), case.inputs(CPU, torch.float32)
    others = in_diffusers(case.theirs, networks)
    own: dict[str, Ask] = {"forward": lambda: case.forward(networks, x)}
    if case.apart:
        run = case.prepare(networks, x)
        own["step"] = lambda: case.step(networks, x, run)
        by_onednn = twin(case.ours, networks)
        if case.name in LINEAR and sum(use_onednn(module) for module in by_onednn.values()):
            own["step, oneDNN"] = lambda: case.step(by_onednn, x, run)
    theirs: dict[str, Ask] = {"diffusers": lambda: case.ask_theirs(others, x)}
    if case.name in CALLS:
        compiled, their_compiled = twin(case.ours, networks), in_diffusers(case.theirs, networks)
        for module in compiled.values():
            compile_blocks(module, fullgraph=True)
        for module in their_compiled.values():
            module.compile_repeated_blocks(fullgraph=True)
        own["step, compiled"] = lambda: case.step(compiled, x, run)
        theirs["diffusers, compiled"] = lambda: case.ask_theirs(their_compiled, x)
    if case.name.startswith(("C5", "C6")):
        last = {
            name: module.to(memory_format=torch.channels_last)
            for name, module in in_diffusers(case.theirs, random_weights(case.ours, CPU, torch.float32)).items()
        }
        theirs["diffusers, channels last"] = lambda: case.ask_theirs(last, x)
    expected = theirs["diffusers"]()
    for name, ask in (own | theirs).items():
        distance = relative_l2(ask(), expected)
        if distance > PARITY * (1 + name.endswith("last")):
            raise ArithmeticError(f"{case.name}, {name}: {distance:.1e} from diffusers")
    return own, theirs


def processor() -> str:
    """Its name, where Linux gives one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def seconds(ask: Callable[[], Any], repeats: int = 1) -> float:
    begun = time.perf_counter()
    for _ in range(repeats):
        ask()
    return (time.perf_counter() - begun) / repeats


@torch.no_grad()
def quads(ours: Ask, theirs: Ask, canary: Ask, budget: float) -> list[tuple[float, float, float, float]]:
    """Seconds of eridiff, diffusers, diffusers, eridiff; 4 to 12 quads as fit into the budget, of at most twice as many tries."""
    seconds(ours)
    repeats = [max(1, math.ceil(SAMPLE_SECONDS / seconds(ask))) for ask in (ours, theirs)]
    each = 2 * sum(n * seconds(ask) for n, ask in zip(repeats, (ours, theirs), strict=True))
    wanted = int(min(12, max(4, budget // each)))
    found: list[tuple[float, float, float, float]] = []
    for _ in range(2 * wanted):
        before = min(seconds(canary, 3) for _ in range(2))
        a, b = seconds(ours, repeats[0]), seconds(theirs, repeats[1])
        quad = (a, b, seconds(theirs, repeats[1]), seconds(ours, repeats[0]))
        after = min(seconds(canary, 3) for _ in range(2))
        if max(before, after) / min(before, after) <= DRIFT:
            found.append(quad)
        if len(found) == wanted:
            break
    return found


@torch.no_grad()
def share_of_kernels(ask: Ask) -> float:
    """What share of a call's time `KERNELS` take."""
    ask()
    with torch.profiler.profile() as profile:
        ask()
    times = {event.key.split("::")[-1]: event.self_cpu_time_total for event in profile.key_averages()}
    return sum(times.get(name, 0.0) for name in KERNELS) / sum(times.values())


def compare(case: Case, name: str, ours: Ask, other: str, theirs: Ask, canary: Ask, rate: float, budget: float) -> dict[str, Any]:  # fmt: skip
    found = quads(ours, theirs, canary, budget)
    row: dict[str, Any] = {"case": case.name, "what": case.what, "way": name, "beside": other, "quads": found}
    if len(found) > 1:
        ratios = [(b + c) / (a + d) for a, b, c, d in found]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        fastest, theirs_fastest = min(min(q[0], q[3]) for q in found), min(min(q[1], q[2]) for q in found)
        row |= {
            "ms": statistics.median(t for q in found for t in (q[0], q[3])) * 1000, "ratio": middle, "quartiles": [low, high],
            "ratio_of_minima": theirs_fastest / fastest, "of_rate": case.flops() / fastest / rate,
        }  # fmt: skip
        if not name.endswith("compiled"):  # where kernels are other ones
            row["at_most"] = middle / share_of_kernels(ours)
    return row


def figure(rows: list[dict[str, Any]]) -> str:
    """The ratios beside diffusers as bars, quartiles as lines; 1 is diffusers."""
    rows = [row for row in rows if "ratio" in row and row["beside"] != OWN]
    unit, line = 150, 26
    height = line * len(rows) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" font-family="sans-serif" font-size="13">',
        "<style>text{fill:#222}.bar{fill:#26a69a}.line{stroke:#222}@media(prefers-color-scheme:dark){text{fill:#eee}.line{stroke:#eee}}</style>",
        f'<line class="line" x1="{300 + unit}" x2="{300 + unit}" y1="24" y2="{height - 8}" stroke-dasharray="3 3"/>',
        f'<text x="{300 + unit}" y="16" text-anchor="middle">as fast as diffusers</text>',
    ]
    for i, row in enumerate(rows):
        y, (low, high) = 30 + line * i, row["quartiles"]
        beside = f", against {row['beside'].split(', ')[1]}" if ", " in row["beside"] else ""
        parts += [
            f'<text x="292" y="{y + 13}" text-anchor="end">{row["case"]}, {row["way"]}{beside}</text>',
            f'<rect class="bar" x="300" y="{y}" width="{unit * row["ratio"]:.0f}" height="18"/>',
            f'<line class="line" x1="{300 + unit * low:.0f}" x2="{300 + unit * high:.0f}" y1="{y + 9}" y2="{y + 9}"/>',
            f'<text x="{308 + unit * max(row["ratio"], high):.0f}" y="{y + 13}">{row["ratio"]:.2f}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--seconds", type=float, default=20, help="of each comparison, about")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    a, b, big = torch.randn(1024, 256), torch.randn(256, 768), torch.randn(2048, 2048)
    rate = 2 * 2048**3 / min(seconds(lambda: big @ big) for _ in range(5))
    rows = []
    print(
        f"a product reaches {rate / 1e9:.0f} GFLOP/s\n\n| | way | beside | ms | ratio | quartiles | of minima | at most | of the rate |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for case in cases():
        if options.only and case.name not in options.only:
            continue
        own, theirs = ways(case)
        for name, ask in own.items():
            every = theirs | {OWN: own["step"]} if "step" in own else theirs
            for other in THEIRS.get(name, [other for other in theirs if not other.endswith("compiled")]):
                their = every[other]
                row = compare(case, name, ask, other, their, lambda: a @ b, rate, options.seconds)
                rows.append(row)
                if "ratio" not in row:
                    print(f"| {case.name} | {name} | {other} | the machine changed within every quad |", flush=True)
                    continue
                (low, high), limit = row["quartiles"], f"{row['at_most']:.2f}" if "at_most" in row else ""
                print(
                    f"| {case.name} | {name} | {other} | {row['ms']:.1f} | **{row['ratio']:.2f}** | {low:.2f} to {high:.2f} | "
                    f"{row['ratio_of_minima']:.2f} | {limit} | {row['of_rate']:.2f} |", flush=True,
                )  # fmt: skip
    machine = {
        "processor": processor(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "threads": 1,
    }
    options.out.write_text(json.dumps({"machine": machine, "product_flop_per_s": rate, "rows": rows}, indent=1) + "\n")
    if options.out == RESULTS:
        FIGURE.write_text(figure(rows))


if __name__ == "__main__":
    main()
