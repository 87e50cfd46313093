"""`eridiff diff`: names and arrangements of any program, an error in any module, and what the terminal says."""

import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import eridiff
from eridiff.cli import main
from eridiff.lora.names import network_of
from eridiff.trace.causes import CAUSES
from eridiff.trace.compare import compare
from eridiff.trace.format import TraceFile, read_trace, write_trace
from eridiff.trace.names import Names, align
from eridiff.trace.record import record, relative_l2
from eridiff.trace.shapes import distances, fit
from eridiff.weights.detect import sizes_of
from eridiff.weights.keymap import key_map
from tests import tiny
from tests.bugs.flux import FLUX, Q_NORM
from tests.ports import GOLDENS, case, compared, ported
from tests.test_traces import arguments, damaged

# names and arrangements -----------------------------------------------------------------------------------------------


def exported(recording: dict[str, Tensor], network: Any, layout: str, prefix: str = "") -> dict[str, Tensor]:
    """The outputs of modules with parameters as another implementation of `layout` would name and cut them."""
    names: dict[str, Tensor] = {}
    rules, sizes = key_map(network_of(network)).layouts[layout], sizes_of(network.config)
    for path, module in network.named_modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        if not own or path not in recording:
            continue
        entry = rules.entry(f"{path}.{own[0]}", sizes)
        axis = 1 if isinstance(module, torch.nn.Conv2d | torch.nn.GroupNorm) else -1
        value = recording[path].movedim(axis, 0)
        values = entry.write(value) if entry.operation in ("rows", "swap_halves") else [value] * len(entry.foreign)
        for foreign, part in zip(entry.foreign, values, strict=True):
            names[prefix + foreign.rpartition(".")[0]] = part.movedim(0, axis)
    for name in ("forward", "step"):
        names |= {n: t for n, t in recording.items() if n == name or n.startswith(f"{name}:")}
    return names


def recorded(network: Any, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    given = [
        value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in arguments(network)
    ]
    with record(network) as recording, torch.no_grad():
        network(*given)
    return dict(recording)


FAMILIES: dict[str, Callable[[], Any]] = {
    "flux": tiny.flux, "mmdit": tiny.mmdit, "unet": tiny.unet, "vae": tiny.autoencoder,
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "transformer.", "model.diffusion_model."])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("family", ["flux", "mmdit", "unet", "vae"])
def test_a_trace_with_published_names_is_aligned_with_eridiffs_own(family: str, layout: str, prefix: str) -> None:
    network = FAMILIES[family]().double()
    if prefix not in key_map(family).layouts[layout].prefixes:
        prefix = ""
    native = recorded(network)
    foreign = exported(native, network, layout, prefix)
    report = compare(foreign, native, layout=(family, layout), network=network)
    assert report.equal and report.unknown == () and len([r for r in report.rows if r.other]) > 0.3 * len(foreign)
    with_parameters = [
        p for p, m in network.named_modules() if any(True for _ in m.parameters(recurse=False)) and p in native
    ]
    assert {s for s in align(list(foreign), {family: network.config}, layout, family).sources} >= set(with_parameters)


def test_blocks_have_the_common_name_of_what_is_in_them() -> None:
    config = tiny.flux().config
    original, diffusers = (Names("flux", layout, config) for layout in ("original", "diffusers"))
    found = {name: diffusers.native(name) for name in (
        "transformer_blocks.1.ff", "transformer_blocks.1.0", "single_transformer_blocks.0", "time_text_embed.timestep_embedder:0",
        "transformer_blocks.0.attn.norm_q@3", "transformer_blocks.0.attn", "nothing", "norm_out.linear",
    )}  # fmt: skip
    assert {name: None if place is None else place[0] for name, place in found.items()} == {
        "transformer_blocks.1.ff": "double_blocks.1.image.mlp", "transformer_blocks.1.0": "double_blocks.1.0",
        "single_transformer_blocks.0": "single_blocks.0", "time_text_embed.timestep_embedder:0": "time_in:0",
        "transformer_blocks.0.attn.norm_q@3": "double_blocks.0.image.q_norm@3", "transformer_blocks.0.attn": None,
        "nothing": None, "norm_out.linear": "final.modulation",
    }  # fmt: skip
    place = original.native("double_blocks.0.img_mlp:0")
    assert place is not None and place[0] == "double_blocks.0.image.mlp:0"


ARRANGEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.permute(0, 2, 3, 1), "tokens": lambda x: x.flatten(2).transpose(1, 2),
    "flat": lambda x: x.flatten(2), "heads last": lambda x: x.transpose(1, 2).flatten(2), "a leading one": lambda x: x[None],
    "batch second": lambda x: x.transpose(0, 1), "no batch": lambda x: x[0] if len(x) == 1 else x,
}  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(ARRANGEMENTS)), st.lists(st.integers(1, 5), min_size=4, max_size=4), st.integers(0, 9),
    st.sampled_from([0.0, 1e-4, 0.1]),
)  # fmt: skip
def test_another_arrangement_of_the_same_values_is_found_both_ways(
    how: str, shape: list[int], seed: int, noise: float
) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=rng, dtype=torch.float64)
    noisy = x + noise * torch.randn(shape, generator=rng, dtype=torch.float64)
    there = ARRANGEMENTS[how](noisy)
    for found, wanted in ((there, x), (noisy, ARRANGEMENTS[how](x))):
        fitted = fit(found, wanted)
        assert fitted is not None and fitted.tensor.shape == wanted.shape
        if found.shape != wanted.shape:  # a square is ambiguous only where shapes are equal
            assert relative_l2(fitted.tensor, wanted) <= relative_l2(noisy, x) + 1e-12


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda t: t[None].expand(2, 5, 8), "equal for each row"),
        (lambda t: t.repeat_interleave(2, -1), "each value twice"),
        (lambda t: torch.cat([t, t], -1), "its halves equal"),
    ],
)
def test_a_table_that_is_repeated_is_taken_once(make: Callable[[Tensor], Tensor], says: str) -> None:
    table = torch.randn(5, 8)
    fitted = fit(make(table), table)
    assert fitted is not None and says in fitted.how and torch.equal(fitted.tensor, table)
    repeated = fit(table, table[None].expand(2, 5, 8))
    assert repeated is not None and repeated.how == "[5, 8] against [2, 5, 8]: the same for each row"
    assert fit(torch.zeros(3, 4), torch.zeros(5, 4)) is None
    assert fit(torch.zeros(2), torch.zeros(1, 4, 2, 3)) is None


def test_distances_are_what_numpy_computes() -> None:
    a, b = (torch.randn(3, 700_001, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    a = torch.where(torch.arange(700_001) < 9, b, a)
    found, x, y = distances(a, b), a.double().numpy(), b.double().numpy()
    assert found["relative"] == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(y), rel=1e-12)
    assert found["max_abs"] == pytest.approx(np.abs(x - y).max())
    assert found["cosine"] == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    assert found["first"] == [0, 9] and distances(b, b)["first"] == []


# errors of any kind in any eridiff module ------------------------------------------------------------------------------


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda t: t * 1.001, "shifted": lambda t: t + 1e-3 * t.abs().mean(), "one value": lambda t: t + 0.1 * (torch.arange(t.numel()) == 3).view(t.shape),
    "negated": lambda t: -t, "zero": lambda t: 0 * t, "rolled": lambda t: t.roll(1, -1), "flipped": lambda t: t.flip(-1),
    "rounded": lambda t: t.bfloat16().to(t.dtype), "clamped": lambda t: t.clamp(-0.1, 0.1), "relu": lambda t: t.relu(),
}  # fmt: skip


def injected(family: str, seed: int) -> None:
    """A random module goes wrong in a random way, in a trace of a random layout and dtype; it is named first."""
    rng = random.Random(seed)
    network = FAMILIES[family]().double()
    layout = rng.choice(["native", "original", "diffusers"])
    dtype = rng.choice([torch.float64, torch.float32])
    clean = recorded(network)
    names = [
        path
        for path, module in network.named_modules()
        if path in clean and any(True for _ in module.parameters(recurse=False))
    ]
    path, kind = rng.choice(names), rng.choice(list(KINDS))
    narrow = FAMILIES[family]().to(dtype)
    handle = narrow.get_submodule(path).register_forward_hook(lambda module, given, output: KINDS[kind](output))
    found = recorded(narrow, dtype)
    handle.remove()
    trace = found if layout == "native" else exported(found, network, layout)
    run = lambda dtype: lambda network: recorded_run(network, dtype)  # noqa: E731
    report = compare(trace, clean, network=network, run=run, layout=(family, layout))
    if torch.equal(KINDS[kind](clean[path]), clean[path]):
        return
    native = align(list(trace), {family: network.config}, layout, family).sources
    assert report.made and report.made[0].name == native[path].name, (seed, path, kind, layout, dtype, report.made[:2])
    assert len(report.groups()) == 1, (seed, [g[0].name for g in report.groups()])


def recorded_run(network: Any, dtype: torch.dtype) -> Any:
    return network(*[v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in arguments(network)])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_in_any_module_is_the_first_divergence(family: str) -> None:
    for seed in range(2 if family == "unet" else 6):
        injected(family, seed)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_fifty_errors_a_family_are_each_the_first_divergence(family: str) -> None:
    for seed in range(100, 150):
        injected(family, seed)


# the command ----------------------------------------------------------------------------------------------------------


def saved(trace: Any, path: Path) -> str:
    if path.suffix == ".npz":
        np.savez(path, **trace)
    elif path.suffix:
        write_trace({name: torch.as_tensor(value) for name, value in trace.items()}, path)
    else:
        path.mkdir()
        for name, value in trace.items():
            np.save(path / f"{name}.npy", value)
    return str(path)


def said(capsys: pytest.CaptureFixture[str], *command: str) -> tuple[int, str]:
    code = main(["diff", *command])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


THREE = ("rms eps 1e-5", "rope halves", "final shift and scale")
GOLDEN = str(GOLDENS / "flux-dev-tiny")


@pytest.mark.parametrize("form", ["mine.npz", "mine.safetensors", "mine"])
def test_the_terminal_names_three_errors_with_their_causes(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = saved(ported(case(), tuple(FLUX[name] for name in THREE)), tmp_path / form)
    code, text = said(capsys, mine, GOLDEN, "--explain")
    lines = text.splitlines()
    assert code == 1 and lines[0] == (
        "49 of 52 tensors compared (3 missing in yours: double_blocks.0.image.mlp, double_blocks.0.text.mlp, single_blocks.0.mlp_act); "
        "noise floor of float64 here 2e-16"
    )
    assert "rope.cos: [22, 8] against [2, 22, 8]: the same for each row (and 1 more)" in lines
    made = [line.split()[:2] + [" ".join(line.split()[2:])] for line in lines if "FIRST" in line or "ALSO" in line]
    assert made == [
        ["double_blocks.0.img_attn.norm.query_norm", "3.3e-06", "FIRST"], ["double_blocks.0.q_rope", "7.4e-01", "ALSO MADE HERE"],
        ["final_layer.linear:0", "1.0e+00", "ALSO MADE HERE"],
    ]  # fmt: skip
    causes = [line.partition("looks like: ")[2] for line in lines if "looks like" in line]
    assert [cause.partition(" (fits")[0] for cause in causes] == [
        "the RMS norm's epsilon is 1e-5 in place of 1e-6", "rotation of halves (i, i + D/2) in place of neighbours (2i, 2i + 1)",
        "shift and scale are exchanged",
    ]  # fmt: skip
    assert lines[-1].startswith("3 errors; ") and lines[-1].endswith(
        " tensors behind them differ by what is carried on alone"
    )


def test_equal_traces_end_with_0_and_a_word_on_epsilons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = saved(ported(case()), tmp_path / "mine.npz")
    code, text = said(capsys, mine, GOLDEN)
    assert code == 0 and text.endswith(
        "equal\na wrong epsilon may not show in flux-dev-tiny: compare with flux-eps too\n"
    )
    code, text = said(capsys, mine, GOLDEN, "--tolerance", "1e-20")
    assert code == 1
    code, text = said(capsys, mine, GOLDEN, "--json")
    found = json.loads(text)
    assert code == 0 and found["equal"] and found["errors"] == [] and len(found["rows"]) > 49
    code, text = said(capsys, mine, GOLDEN, "--all")
    assert code == 0 and "relative  max abs" in text and "vec " in text


def test_the_page_shows_errors_curve_heat_maps_and_every_tensor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = saved(ported(case(), tuple(FLUX[name] for name in THREE)), tmp_path / "<mine>.npz")
    code, _ = said(capsys, mine, GOLDEN, "--explain", "--html", str(tmp_path / "new" / "page.html"))
    text = (tmp_path / "new" / "page.html").read_text()
    tree = ElementTree.fromstring(text.replace("<!doctype html>", "").replace('<meta charset="utf-8">', "").replace(
        '<meta name="viewport" content="width=device-width">', ""))  # fmt: skip
    assert code == 1 and "http" not in text and "<script" not in text and "&lt;mine&gt;" in text
    svgs = tree.findall(".//svg")
    assert len(svgs) == 4 and len(svgs[0].findall("circle")) > 120 and len(svgs[1].findall("rect")) == 16 * 16
    rows = tree.findall(".//tbody/tr")
    made = {row.find("td").text for row in rows if row.get("class") == "here"}  # type: ignore[union-attr]
    assert len(rows) > 80 and {Q_NORM, "double_blocks.0.q_rope", "final_layer.linear:0"} <= made
    first = [p.find("b").text for p in tree.findall(".//p") if p.find("b") is not None]  # type: ignore[union-attr]
    assert first == [Q_NORM, "double_blocks.0.q_rope", "final_layer.linear:0"]


def test_a_float32_epsilon_that_passes_one_case_is_seen_in_the_other() -> None:
    golden = case("flux-eps")
    report = compared(golden, ported(golden, (FLUX["rms eps of float32"],), np.float32), explain=True)
    assert (
        report.made[0].name == Q_NORM
        and "float32's 1.19e-7" in report.made[0].cause
        and (report.made[0].local or 0) > 1e-2
    )


def test_what_is_not_finite_is_named_first_of_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = ported(case(), (FLUX["rope halves"],))
    trace["double_blocks.1.img_mlp.2"][1, 3, 5] = np.nan
    code, text = said(capsys, saved(trace, tmp_path / "mine.npz"), GOLDEN)
    first = next(line for line in text.splitlines() if "FIRST" in line)
    assert code == 1 and first.split()[:2] == ["double_blocks.1.img_mlp.2", "nan"]
    assert "1 of 1440 values are not finite, the first at [1, 3, 5]" in first and "ALSO MADE HERE" in text


def test_missing_and_unknown_names_are_listed_with_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = ported(case())
    trace["double_blocks.0.img_attn.projj"] = trace.pop("double_blocks.0.img_attn.proj")
    code, text = said(capsys, saved(trace, tmp_path / "mine.npz"), GOLDEN)
    assert (
        code == 0
        and "1 names in yours are unknown: double_blocks.0.img_attn.projj (nearest: double_blocks.0.image.proj)" in text
    )
    assert "double_blocks.0.image.proj" in text.splitlines()[0]


def test_names_that_are_nearly_all_unknown_are_listed_beside_a_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = {
        name.replace("double_blocks", "doubleblocks").replace("single_blocks", "singleblocks"): value
        for name, value in ported(case()).items()
    }
    code, text = said(capsys, saved(trace, tmp_path / "mine.npz"), GOLDEN)
    assert code == 0 and " names in yours are unknown: doubleblocks.0.img_mod.lin" in text
    assert "(nearest: double_blocks.0." in text and "give --weights" not in text


def test_more_calls_than_the_case_has_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = ported(case())
    code, text = said(capsys, saved(trace | {f"{n}@1": v for n, v in trace.items()}, tmp_path / "mine.npz"), GOLDEN)
    assert (
        code == 0
        and f"{len(trace)} in yours alone: time.sinusoid@1, " in text
        and "alone" not in said(capsys, saved(trace, tmp_path / "one.npz"), GOLDEN)[1]
    )


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("absent.npz", GOLDEN), "absent.npz' does not exist"),
        (("other.npz", GOLDEN), "no tensor of the two traces has the same name: 'x'; "),
        (("mine.npz", GOLDEN, "--map", "flix"), "there is no map 'flix'; there are flux, mmdit, unet, vae, clip, t5"),
        (("mine.npz", GOLDEN, "--map", "flux:bfl"), "has no layout 'bfl'; it has native, original, diffusers"),
        (("mine.npz", "mine.npz", "--explain"), "to explain a difference needs the weights: give --weights FILE"),
        (
            ("mine.npz", str(GOLDENS / "text-sd3-tiny")),
            "is a golden of the kind 'sd3-text'; give one of flux, mmdit, unet, vae, clip, clip_g, t5",
        ),
    ],
)
def test_what_cannot_be_compared_is_one_sentence_and_2(
    command: tuple[str, ...],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("mine.npz", out=np.zeros((2, 15, 64)))
    np.savez("other.npz", x=np.zeros(3))
    code, text = said(capsys, *command)
    assert code == 2 and says in text and text.count("\n") == 1


def test_without_weights_the_first_difference_and_those_with_equal_inputs_are_made_there() -> None:
    network = tiny.flux()
    clean = recorded(network, torch.float32)
    hooks = [
        network.get_submodule(path).register_forward_hook(lambda m, i, o: 1.01 * o)
        for path in ("double_blocks.1.image.qkv", "time_in.in_layer")
    ]
    found = recorded(network, torch.float32)
    for hook in hooks:
        hook.remove()
    report = compare(found, clean)
    assert [g[0].name for g in report.groups()][0] == "time_in.in_layer" and not report.replayed
    assert any(row.verdict == "carried" for row in report.rows)
    assert compare(clean, clean).equal


def test_a_recorded_image_is_replayed_step_by_step_with_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trace of a whole generation, every call; one wrong velocity in the second step is found there and nowhere else."""
    flux = eridiff.load(device="cpu", dtype=torch.float32, progress=False)
    weights = str(eridiff.save_network(flux.network, tmp_path / "flux.safetensors"))
    with record(flux.network, calls="all", to=tmp_path / "right.safetensors"):
        flux.generate("a fox at night", seed=1, steps=3)
    right = read_trace(tmp_path / "right.safetensors")
    wrong = {**right, "single_blocks.0.linear2@1": right["single_blocks.0.linear2@1"] * 1.01}
    write_trace(wrong, tmp_path / "wrong.safetensors")
    both = str(tmp_path / "wrong.safetensors"), str(tmp_path / "right.safetensors")
    code, text = said(capsys, both[1], both[1], "--weights", weights)
    assert code == 0 and "equal" in text
    code, text = said(capsys, *both, "--weights", weights)
    made = [line for line in text.splitlines() if "FIRST" in line or "ALSO" in line]
    assert code == 1 and made[0].split()[0] == "single_blocks.0.linear2@1" and len(made) <= 2


def test_another_number_of_calls_is_listed_and_the_rest_compared() -> None:
    network = tiny.flux().double()
    with record(network, calls="all") as recording, torch.no_grad():
        for _ in range(3):
            recorded_run(network, torch.float64)
    fewer = {name: tensor for name, tensor in recording.items() if not name.endswith("@2")}
    report = compare(fewer, dict(recording), network=network)
    assert report.equal and set(report.missing) == {name for name in recording if name.endswith("@2")}
    report = compare(dict(recording), fewer, network=network)
    assert report.equal and report.missing == () and "forward@2" in report.added


@pytest.mark.parametrize("beside", ["the same outputs", "others alone"])
def test_two_outputs_in_the_other_order_are_found_in_every_call(beside: str) -> None:
    """Diffusers' blocks give the text first."""
    network = tiny.flux().double()
    run = lambda dtype: lambda network: [recorded_run(network, dtype) for _ in range(2)]  # noqa: E731
    with record(network, calls="all") as recording, torch.no_grad():
        run(torch.float64)(network)
    block = re.compile(r"double_blocks\.\d+\.[01](@|$)")
    exchanged = {
        n: re.sub(r"[01](@\d+)?$", lambda m: f"{1 - int(m[0][0])}{m[1] or ''}", n) for n in recording if block.match(n)
    }
    swapped = {n: recording[other] for n, other in exchanged.items()}
    assert len(swapped) == 2 * 2 * 2 and any("@1" in n for n in swapped)
    expected = {n: t for n, t in recording.items() if beside == "the same outputs" or n not in swapped}
    assert compare(dict(recording) | swapped, expected, network=network, run=run).equal


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("half.safetensors", "is an incomplete download"), ("half.npz", "is not a complete .npz archive"), ("cut.npz", "is cut off"),
        ("objects", "holds Python objects"), ("objects.npz", "holds Python objects"), ("text", "which torch does not have"),
        ("bfloat16", "a type that NumPy does not know, bfloat16 perhaps"), ("empty", "a folder without .npy files"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("side", [0, 1])
def test_a_damaged_trace_on_either_side_is_one_sentence_and_2(
    name: str, says: str, side: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under a name that the other does not have, too."""
    traces = [saved({"x": np.zeros((64, 64))}, tmp_path / "good.npz"), str(damaged(tmp_path, name))]
    code, text = said(capsys, *(traces if side else traces[::-1]))
    assert code == 2 and says in text and text.count("\n") == 1


@pytest.mark.slow
def test_two_traces_of_a_gigabyte_are_compared_within_300_megabytes(tmp_path: Path) -> None:
    """What importing torch takes, 220 MB, is part of it. getrusage would count what this process has, too."""
    value = torch.randn(4608, 3072, generator=torch.Generator().manual_seed(0))
    for name, noise in (("a", 0.0), ("b", 1e-4)):
        with tempfile.TemporaryFile(dir=tmp_path) as data:
            trace = TraceFile(data)
            for i in range(19):
                trace[f"double_blocks.{i}.image.proj"] = value.roll(i, 0) + noise * (i == 7)
            trace.write(tmp_path / f"{name}.safetensors", {})
    code = (
        "import re, sys; from eridiff.cli import main; code = main(['diff', *sys.argv[1:]]);"
        "print(code, int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024)"
    )
    files = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    assert Path(files[0]).stat().st_size > 1e9
    ran = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    assert "double_blocks.7.image.proj  " in ran.stdout and "FIRST" in ran.stdout
    found, peak = map(int, ran.stdout.splitlines()[-1].split())
    assert found == 1 and peak < 300


@pytest.mark.parametrize("imaginary", [False, True])
def test_complex_numbers_differ_in_either_part(imaginary: bool) -> None:
    table = torch.polar(torch.ones(40), torch.linspace(0, 3, 40))
    other = table + (1e-3j if imaginary else 1e-3)
    assert compare({"rope": table}, {"rope": table * (1 + 1e-8)}).equal
    report = compare({"rope": other}, {"rope": table})
    assert not report.equal and abs(report.made[0].distance - 1e-3) < 1e-6


def test_probes_are_compared_with_a_whole_trace(tmp_path: Path) -> None:
    network = tiny.flux()
    with record(network, probes=True, to=tmp_path / "t.safetensors"):
        network(*arguments(network))
    whole = recorded(network, torch.float32)
    assert compare(read_trace(tmp_path / "t.safetensors"), whole).equal
    whole["final.linear"] += 1
    assert not compare(read_trace(tmp_path / "t.safetensors"), whole).equal


@cache
def right(family: str) -> tuple[Any, Callable[[Any], Any], Tensor]:
    if family in FAMILIES:
        network, run = FAMILIES[family]().double(), partial(recorded_run, dtype=torch.float64)
    else:
        network, run = case(family).network, case(family).run(torch.float64)
    return network, run, outcome(network, run)


def outcome(network: Any, run: Callable[[Any], Any]) -> Tensor:
    with torch.no_grad():
        given = run(network)
    return torch.cat([t.flatten() for t in (given.values() if isinstance(given, dict) else [*given])])


@pytest.mark.parametrize("number", range(len(CAUSES)), ids=[f"{c.says} ({c.function})" for c in CAUSES])
def test_every_cause_changes_a_network_and_leaves_it_as_it_was(number: int) -> None:
    changed = False
    for family in (*FAMILIES, "ae-4-tiny", "text-clip-l-tiny", "text-clip-g-tiny", "text-t5-tiny"):
        network, run, expected = right(family)
        with CAUSES[number].planted():
            try:
                changed = not torch.equal(outcome(network, run), expected)
            except RuntimeError:  # an error that these shapes do not allow
                continue
        assert torch.equal(outcome(network, run), expected)
        if changed:
            break
    assert changed
