"""`eridiff golden`: cases for ports are listed, written in any layout and dtype, and an epsilon cannot pass them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tomllib
import torch
from safetensors.torch import load_file

from eridiff.cli import main
from eridiff.cli.diff import case_report
from eridiff.cli.golden import DTYPES
from eridiff.trace.cases import cases, open_case
from eridiff.trace.record import record
from eridiff.weights.load import load_network

ROOT = Path(__file__).parents[1]
PORT = ROOT / "examples" / "numpy_flux.py"


def run(capsys: pytest.CaptureFixture[str], *command: object) -> tuple[int, list[str]]:
    code = main(["golden", *map(str, command)])
    captured = capsys.readouterr()
    return code, (captured.out + captured.err).splitlines()


def ported(name: str, folder: Path, *options: str) -> Path:
    """What the NumPy port writes for an exported case."""
    assert main(["golden", "export", name, "--out", str(folder / name), *options]) == 0
    target = folder / f"{name}.npz"
    subprocess.run([sys.executable, PORT, folder / name, target], check=True)
    return target


def test_a_text_encoder_is_compared_with_its_weights_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No case is given: the file says the sizes and the end token, and the trace the ids."""
    for name, wrong in (("text-clip-g-tiny", "text_model.encoder.layers.1"), ("text-t5-tiny", "hidden.2")):
        folder, mine = tmp_path / name, tmp_path / f"{name}.npz"
        assert main(["golden", "export", name, "--out", str(folder), "--layout", "huggingface"]) == 0
        subprocess.run([sys.executable, ROOT / "examples" / "numpy_text.py", folder, mine], check=True)
        command = [
            "diff",
            str(mine),
            str(folder / "expected.safetensors"),
            "--weights",
            str(folder / "weights.safetensors"),
        ]
        assert main(command) == 0
        arrays = dict(np.load(mine))
        arrays[wrong] = arrays[wrong] * 1.01
        np.savez(mine, **arrays)
        capsys.readouterr()
        assert main(command) == 1
        assert f"{wrong}  " in next(line for line in capsys.readouterr().out.splitlines() if "FIRST" in line)


def test_the_wheel_holds_the_cases_that_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = run(capsys, "list")
    names = [line.split()[0] for line in lines]
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert code == 0 and names == list(cases())
    places = {"weights_map": "eridiff/weights_map"} | {f"tests/goldens/{n}": f"eridiff/goldens/{n}" for n in names}
    assert said["sources"] == places and set(said["only-include"]) == {"eridiff", *places}
    assert [line.endswith("shows wrong epsilons: run this one too") for line in lines] == [
        n.endswith("-eps") for n in names
    ]


@pytest.mark.parametrize(
    "name", [n for n in cases() if n not in ("sdxl-refiner-tiny", "sdxl-inpaint-tiny", "sd3-medium-tiny")]
)
@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=pytest.mark.slow), torch.float32])
def test_our_own_networks_pass_and_the_originals_values_do(name: str, dtype: torch.dtype) -> None:
    case = open_case(cases()[name])
    network = case.network.to(dtype)
    with record(network) as recording, torch.no_grad():
        case.run(dtype)(network)
    case.network.double()
    report = case_report(recording, case)
    assert report.equal, [(row.name, row.local, row.distance) for row in report.made][:3]
    assert len([row for row in report.rows if row.other]) >= 0.6 * len(case.expected)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("name", ["flux-eps", "sd3-eps", "sdxl-eps"])
def test_an_exported_file_has_the_cases_weights(
    name: str, layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = run(
        capsys, "export", name, "--out", tmp_path / "new" / name, "--layout", layout, "--dtype", "float32"
    )
    files = ["case.json", "expected.safetensors", "inputs.safetensors", "names.txt", "weights.safetensors"]
    assert code == 0 and [Path(line).name for line in lines] == files
    network, case = (
        load_network(tmp_path / "new" / name / "weights.safetensors", progress=False),
        open_case(cases()[name]),
    )
    for key, tensor in case.network.state_dict().items():
        assert tensor.dtype == torch.float64 and torch.equal(network.state_dict()[key], tensor.float()), key
    inputs = load_file(tmp_path / "new" / name / "inputs.safetensors")
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in inputs.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_written_in_every_dtype(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "export", "flux-eps", "--out", tmp_path, "--dtype", dtype)
    assert {t.dtype for t in load_file(tmp_path / "weights.safetensors").values()} == {DTYPES[dtype]}


def test_names_are_given_in_three_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "export", "flux-dev-tiny", "--out", tmp_path)
    rows = {line.split("  ")[0]: line.split() for line in (tmp_path / "names.txt").read_text().splitlines()}
    assert rows["name"] == ["name", "original", "diffusers", "shape"] and len(rows) == 53
    assert rows["double_blocks.0.image.mlp_in"][1:3] == ["double_blocks.0.img_mlp:0", "transformer_blocks.0.ff:0"]
    assert "".join(rows["double_blocks.0.text.qkv"][2:7]).count("+") == 2
    assert rows["rope.cos"] == ["rope.cos", "-", "-", "[2,", "22,", "8]"]


def test_a_port_passes_only_all_cases_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Float32's own epsilon in the norm of q and k: as small as rounding in one case, not in the other."""
    dev, eps = ported("flux-dev-tiny", tmp_path), ported("flux-eps", tmp_path)
    code, lines = run(capsys, "check", dev, eps)
    assert code == 0 and [line for line in lines if "equal, " in line] == [
        "flux-dev-tiny: equal, 49 tensors",
        "flux-eps: equal, 27 tensors",
    ]
    code, lines = run(capsys, "check", dev)
    assert code == 1 and lines[-1] == "flux-eps is missing: without it a wrong epsilon passes"
    with np.load(eps) as arrays:
        wrong = dict(arrays)
    wrong["double_blocks.0.q_rope"] = wrong["double_blocks.0.q_rope"][..., ::-1]
    np.savez(eps, **wrong)
    code, lines = run(capsys, "check", dev, eps, "--explain")
    assert code == 1 and any("double_blocks.0.q_rope" in line and "FIRST" in line for line in lines)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (
            ("export", "flux-prod", "--out", "x"),
            "there is no case 'flux-prod'; `eridiff golden list` names those there are",
        ),
        (
            ("export", "flux-eps", "--out", "x", "--layout", "bfl"),
            "'bfl' is not a layout of flux; there are native, original, diffusers",
        ),
        (("check", "mine.npz"), "'mine.npz' is not named as a case"),
        (("check", "flux-eps.npz"), "'flux-eps.npz' does not exist"),
    ],
)
def test_what_is_not_a_case_is_refused(command: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, lines = run(capsys, *command)
    assert code == 2 and len(lines) == 1 and says in lines[0] and [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", ["flux-dev-tiny", "ae-eps"])
def test_the_ladder_says_what_rounding_does_at_each_place(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A single operation loses what its dtype's last place says, within a factor that its sums explain."""
    assert main(["ladder", name]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: list(map(float, line.split()[1:])) for line in lines}
    assert head.split() == ["float32", "bfloat16", "float16"] and len(rows) > 50
    linear = rows["double_blocks.0.image.qkv" if name == "flux-dev-tiny" else "decoder.middle.block_1.conv1"]
    for found, eps in zip(linear, (2.0**-23, 2.0**-7, 2.0**-10), strict=True):
        assert 0.05 * eps < found < 5 * eps
    if name == "flux-dev-tiny":
        assert rows["prepare.rope"][1] < 1e-6  # which stays in float32
