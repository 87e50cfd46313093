"""What a user sees of the package: its names, their types, its options, and the errors for wrong ones."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from torch import nn

import eridiff
from eridiff.errors import ConfigError
from eridiff.inference import FAMILIES
from eridiff.inference.options import LoadOptions, Options
from tests import tiny

ROOT = Path(__file__).parent.parent
USER = Path(__file__).with_name("users_loop.py")


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


WRONG = {  # a line of a user's file -> what mypy says of it
    "import eridiff": "",
    "reveal_type(eridiff.load)": "family: str | None =, **options: **TypedDict(eridiff.inference.options.LoadOptions, {",
    "reveal_type(eridiff.load())": '"eridiff.inference.base.DiffusionInference"',
    "reveal_type(eridiff.FluxInference().network)": '"eridiff.models.flux.Flux"',
    "reveal_type(eridiff.training.Sampler)": "eridiff.training.sampler.Sampler",
    'eridiff.load(devise="cpu")': 'Unexpected keyword argument "devise" for "load"',
    "eridiff.SD35Inference(offload=3)": 'Argument "offload" to "SD35Inference" has incompatible type "int"',
    'eridiff.FluxInference(prediction="v")': 'Unexpected keyword argument "prediction" for "FluxInference"',
    "eridiff.lode": 'Module has no attribute "lode"',
}


# without their types they are Any, and reading them takes twenty times as long as eridiff
OTHERS = "[mypy]\n[mypy-torch.*,transformers.*,numpy.*,PIL.*,huggingface_hub.*]\nfollow_imports = skip\nfollow_imports_for_stubs = true\n"


@pytest.fixture(scope="module", params=[OTHERS, pytest.param("", marks=pytest.mark.slow)], ids=["eridiff", "torch"])
def checked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with a user's files, and what mypy says of them: an installed package, no configuration of this project."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "loop.py").write_text(USER.read_text())
    (folder / "wrong.py").write_text("\n".join(WRONG) + "\n")
    (folder / "mypy.ini").write_text(request.param)
    result = python("-m", "mypy", "--strict", "loop.py", "wrong.py", cwd=folder)
    assert "checked 2 source files" in result.stdout, result.stdout + result.stderr
    return folder, result.stdout.splitlines()


def test_a_users_training_loop_passes_strict_type_checks_and_runs(checked: tuple[Path, list[str]]) -> None:
    folder, said = checked
    assert [line for line in said if not line.startswith(("wrong.py:", "Found "))] == []
    ran = python("loop.py", cwd=folder)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith(" flux.safetensors, 1 samples\n")
    assert (folder / "swan.png").stat().st_size > 1000


@pytest.mark.parametrize("number", range(1, len(WRONG)), ids=[*WRONG][1:])
def test_type_checkers_see_the_real_types_and_misspelt_names(number: int, checked: tuple[Path, list[str]]) -> None:
    about = [line for line in checked[1] if line.startswith(f"wrong.py:{number + 1}:")]
    assert [*WRONG.values()][number] in " ".join(about).replace("'", "")


def test_the_names_that_type_checkers_see_are_the_public_ones() -> None:
    """`_PLACES` and `_MODULES` at run time, the imports for type checkers: one list in two forms."""
    tree = ast.parse(Path(eridiff.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = [(node.module, name.name, name.asname) for node in block.body for name in node.names]  # type: ignore[attr-defined]
    assert all(name == exported for _, name, exported in seen)
    modules = {("eridiff", name) for name in eridiff._MODULES}
    assert {(place, name) for place, name, _ in seen} == modules | {(p, n) for n, p in eridiff._PLACES.items()}


def test_every_public_name_is_found_and_listed() -> None:
    for name in (*eridiff._MODULES, *eridiff._PLACES):
        assert name in dir(eridiff)
        assert getattr(eridiff, name) is not None
    assert {"__version__", "load", "training"} <= {*dir(eridiff)}
    with pytest.raises(AttributeError, match="module 'eridiff' has no attribute 'lode'"):
        eridiff.lode  # type: ignore[attr-defined]  # noqa: B018


def test_a_sub_package_is_an_attribute_from_the_start(tmp_path: Path) -> None:
    """In an order in which none was imported by an earlier one."""
    names = ["errors", "models", "lora.attach_lora", "blocks.compile_blocks", "trace.record", "training.Sampler"]
    code = (
        "import sys, eridiff\n"
        f"for name in {names}:\n"
        "    module, _, rest = name.partition('.')\n"
        "    assert f'eridiff.{module}' not in sys.modules, name\n"
        "    found = getattr(eridiff, module)\n"
        "    assert found.__name__ == f'eridiff.{module}' and (not rest or getattr(found, rest)), name\n"
    )
    ran = python("-c", code, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr


def test_names_of_networks_import_no_text_encoder(tmp_path: Path) -> None:
    code = (
        "import sys, eridiff; dir(eridiff); eridiff.models; eridiff.schedulers; eridiff.errors; eridiff.blocks; "
        "from eridiff import Flux, MMDiT, UNet, Autoencoder, load_network, save_network; "
        "print('transformers' in sys.modules)"
    )
    assert python("-c", code, cwd=tmp_path).stdout == "False\n"


def test_load_takes_every_option_of_the_families_and_no_other() -> None:
    """The options for `load` equal in name and type the keywords of the constructors."""
    own: dict[str, Any] = {}
    for family in FAMILIES:
        hints = get_type_hints(family.__init__)
        own |= {name: hints[name] for name in family.__init__.__kwdefaults__ or ()}  # type: ignore[misc]
    assert get_type_hints(LoadOptions) == get_type_hints(Options) | own


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: eridiff.load(devise="cpu"), "^load has no option 'devise'; did you mean 'device'?"),
        (lambda: eridiff.load("no/such", ofload=True), "^load has no option 'ofload'; did you mean 'offload'?"),
        (lambda: eridiff.load(family="sdxl"), "^'sdxl' is not a family; there are flux, mmdit, unet"),
        (lambda: eridiff.load(zzz=1), "^load has no option 'zzz'; it has variant, device, dtype, "),
        (lambda: eridiff.load(device="cpu", prediction="v"), "^FluxInference has no option 'prediction'"),
        (lambda: eridiff.load(t5_padding="diffusers"), "^load has no option 't5_padding': it is asked of each image"),
        (lambda: eridiff.FluxInference(devise="cpu"), "^FluxInference has no option 'devise'; did you mean 'device'?"),
        (lambda: eridiff.SDXLInference(predictions="v"), "^SDXLInference has no option 'predictions'; did you mean 'prediction'?"),
        (lambda: eridiff.SDXLInference(target=(8, 8)), "^SDXLInference has no option 'target'; it has "),
    ],
)  # fmt: skip
def test_an_unknown_option_is_answered_with_the_known_ones(make: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")):
        make()


def test_only_known_networks_in_known_layouts_are_saved(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with pytest.raises(ConfigError, match="'diffuser' is not a layout of a Flux; there are .*original.*diffusers"):
        eridiff.save_network(tiny.flux(), file, layout="diffuser")
    with pytest.raises(
        ConfigError, match="a Linear cannot be saved; pass one of eridiff's networks: Flux, MMDiT, UNet"
    ):
        eridiff.save_network(nn.Linear(2, 2), file)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    assert eridiff.save_network(tiny.flux(), file, layout="diffusers", dtype=torch.bfloat16) == file
