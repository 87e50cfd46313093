"""The README's commands, copied one by one, work in a fresh clone; make checks Python first and says how to go on."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from pathlib import Path

import pytest
import tomllib

from eridiff.cli import _parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands(text: str) -> list[str]:
    """The shell commands of blocks without a language, continuation lines joined, comments removed."""
    blocks = re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := re.sub(r"\s+# .*", "", line).strip())]


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def words_of(command: str) -> list[str]:
    return [word for word in shlex.split(command) if word != "..."]


COMMANDS = commands(README)
SPANS = [" ".join(span.split()) for span in re.findall(r"`(eridiff [^`]+)`", README)]
FILES = ("config", "model", "transformer", "lora", "refiner")  # options that name files which no clone has


def runs_offline(command: str) -> bool:
    if not command.startswith("eridiff sample"):
        return False
    options = _parser().parse_args(words_of(command)[1:])
    return not any(getattr(options, name) for name in FILES)


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=570)


@pytest.mark.parametrize("command", [*(c for c in COMMANDS if c.startswith("eridiff ")), *SPANS])
def test_the_command_line_takes_every_command_of_the_readme(command: str) -> None:
    assert _parser().parse_args(words_of(command)[1:]).run


def fake_python(path: Path, version: str) -> Path:
    """A Python of another version that writes down what else it is asked to do."""
    path.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "if sys.argv[1] == '-c':\n"
        f"    sys.version_info = {version}\n    exec(sys.argv[2])\n"
        "else:\n"
        f"    open({str(path.with_name('asked'))!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n    sys.exit(3)\n"
    )
    path.chmod(0o755)
    return path


def test_an_old_python_is_refused_before_anything_is_made_or_fetched(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    old = fake_python(tmp_path / "python3.9", "(3, 9, 18, 'final', 0)")
    result = run(["make", "sample", f"PYTHON={old}"], tmp_path)
    assert result.returncode != 0 and result.stdout == ""
    assert result.stderr.splitlines()[0] == (
        f"eridiff needs Python 3.10 or later, and {old} is 3.9: run make sample PYTHON=python3.12"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Makefile", "python3.9"]


@pytest.mark.parametrize("version", ["(3, 10, 0, 'final', 0)", "(3, 14, 1, 'final', 0)", "(4, 0, 0, 'final', 0)"])
def test_a_newer_python_goes_on_to_make_the_environment(version: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    result = run(["make", "sample", f"PYTHON={fake_python(tmp_path / 'python', version)}"], tmp_path)
    assert "eridiff needs" not in result.stderr
    assert (tmp_path / "asked").read_text() == "-m venv .venv\n"


def last_lines(number: str) -> list[str]:
    return [
        "",
        f"Open samples/{number}-contact-sheet.png to see all images. To go on:",
        "    source .venv/bin/activate",
        '    eridiff sample --prompt "a fox on snow"',
    ]


def test_make_sample_ends_with_what_to_open_and_how_to_go_on(tmp_path: Path) -> None:
    """The slow test below runs the whole of it; here a line stands for eridiff."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "samples").mkdir()
    (tmp_path / "bin" / "eridiff").write_text('#!/bin/sh\ntouch "samples/$NUMBER-contact-sheet.png"\n')
    (tmp_path / "bin" / "eridiff").chmod(0o755)
    for number in ("0000", "0009", "0019"):
        result = run(["make", "sample", "-o", ".venv/.base", "BIN=bin"], tmp_path, NUMBER=number)
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[1:] == last_lines(number)


BACKEND = """
import os, tomllib, zipfile

def build_editable(folder, config_settings=None, metadata_directory=None):
    with open("pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    name, about = project["name"] + "-" + project["version"], project["name"] + "-" + project["version"] + ".dist-info/"
    needs = "".join(f"Requires-Dist: {need}\\n" for need in project["dependencies"])
    scripts = "".join(f"{script} = {place}\\n" for script, place in project["scripts"].items())
    head = f"Metadata-Version: 2.1\\nName: {project['name']}\\nVersion: {project['version']}\\n"
    python = f"Requires-Python: {project['requires-python']}\\n"
    with zipfile.ZipFile(os.path.join(folder, name + "-py3-none-any.whl"), "w") as wheel:
        wheel.writestr("eridiff_clone.pth", os.getcwd() + "\\n")
        wheel.writestr(about + "METADATA", head + python + needs)
        wheel.writestr(about + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(about + "entry_points.txt", "[console_scripts]\\n" + scripts)
        wheel.writestr(about + "RECORD", "")
    return name + "-py3-none-any.whl"
"""


def offline(folder: Path) -> dict[str, str]:
    """An environment in which pip finds all packages of the running one, except eridiff itself, and fetches nothing.

    pip needs the build backend that pyproject.toml names; a few lines stand for it.
    """
    packages, wheels, programs = (folder / name for name in ("packages", "wheels", "programs"))
    for place in (packages, wheels, programs):
        place.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "eridiff" not in entry.name and not entry.name.startswith("pip") and entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)
    for name in ("python", "python3"):
        (programs / name).symlink_to(os.path.realpath(sys.executable))
    (backend,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    with zipfile.ZipFile(wheels / f"{backend}-1.0-py3-none-any.whl", "w") as wheel:
        about = f"{backend}-1.0.dist-info/"
        wheel.writestr(f"{backend}/build.py", BACKEND)
        wheel.writestr(about + "METADATA", f"Metadata-Version: 2.1\nName: {backend}\nVersion: 1.0\n")
        wheel.writestr(about + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(about + "RECORD", "")
    path = [str(programs), *(p for p in os.environ["PATH"].split(os.pathsep) if Path(p) != Path(sys.executable).parent)]
    return {
        "PATH": os.pathsep.join(path), "PYTHONPATH": str(packages), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1", "PIP_CONFIG_FILE": os.devnull,
    }  # fmt: skip


@pytest.mark.slow
def test_the_readmes_commands_run_one_by_one_in_a_fresh_clone(tmp_path: Path) -> None:
    environment = offline(tmp_path)
    blocks, sentence = section("Install").split("Without make: ")
    by_make = commands(blocks)
    by_pip = re.findall(r"`([^`]+)`", re.sub(r"\(on Windows [^)]*\)", "", sentence.split("[Installation]")[0]))
    assert by_make[:3] == ["git clone URL_OF_THIS_REPOSITORY eridiff", "cd eridiff", "make sample"]
    assert by_pip[0] == "python -m venv .venv" and by_pip[-1] == "pip install -e ."
    elsewhere = [command for command in COMMANDS if runs_offline(command) and command not in by_make]
    assert elsewhere
    where = 'python -c "import eridiff; print(eridiff.__file__)"'
    for name, asked in (
        ("make", [*by_make, *elsewhere, where]),
        ("pip", [*by_make[:2], *by_pip, "eridiff sample", where]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        script = "\n".join(asked).replace("URL_OF_THIS_REPOSITORY", str(ROOT))
        result = run(["bash", "-exc", script], folder, **environment)
        assert result.returncode == 0, textwrap.indent(result.stdout + result.stderr, "  ")
        assert result.stdout.splitlines()[-1] == str(folder / "eridiff" / "eridiff" / "__init__.py")
        assert "Downloading" not in result.stdout and "Traceback" not in result.stderr
        drawn = sorted(path.name for path in (folder / "eridiff" / "samples").glob("*.png"))
        assert "0000-contact-sheet.png" in drawn
        if name == "make":
            assert "\n".join(last_lines("0000")) in result.stdout and "0015-a-fox-on-snow.png" in drawn
        assert "does not know" not in result.stderr
