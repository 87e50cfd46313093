"""What the command line says to common mistakes: what is wrong, and what to write in its place."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageShow
from safetensors.torch import save_file

from eridiff.cli import COMMANDS, _parser, main
from eridiff.errors import LONGEST, EridiffError
from eridiff.inference import BUILT_IN
from tests import tiny
from tests.sparse import sparse_manifest

ROOT = Path(__file__).parents[1]
LORAS = ROOT / "tests" / "goldens"
FLUX = Path(BUILT_IN) / "flux.safetensors"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the mistakes are about, which is the current one."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(FLUX, tmp_path)
    shutil.copy(LORAS / "lora-kohya-flux" / "lora.safetensors", tmp_path / "fox.safetensors")
    Image.new("RGB", (64, 64)).save("pic.png")
    Image.new("RGB", (64, 64)).save("photo.jpg")
    (tmp_path / "cut.safetensors").write_bytes(FLUX.read_bytes()[:7_000_000])
    (tmp_path / "bad.safetensors").write_bytes(FLUX.read_bytes()[:10] + b"\xff" * 100_000)
    pair = {"lora_down": torch.ones(2, 3072), "lora_up": torch.ones(9216, 2)}
    save_file(
        {f"lora_unet_double_blocks_0_img_attn_qkv.{name}.weight": tensor for name, tensor in pair.items()},
        tmp_path / "dev.safetensors",
    )
    (tmp_path / "notes.md").write_text("# Notes on models\n")
    return tmp_path


MISTAKES = {  # a command or a file's text -> what the error says
    "sample flux.safetensors": "flux.safetensors: is a checkpoint; pass it as --model",
    "sample pic.png": "pic.png: is an image; eridiff resample generates it again, --image begins from it",
    "sample photo.jpg": "photo.jpg: is a JPEG image, not a configuration; --image begins from an image",
    "sample a~swan~on~mars": "a swan on mars: is not a file; pass a prompt with --prompt",
    "sample nowhere.yaml": "nowhere.yaml: is not a file",
    "sample --promt x": "--promt is not an option of eridiff sample; did you mean --prompt?",
    "sample --num-inference-steps 4": "--num-inference-steps is not an option of eridiff sample; did you mean --steps?",
    "sample --negative-prompt x": "--negative-prompt is not an option of eridiff sample; did you mean --negative?",
    "sample --sampler eulr": "'eulr' is not a value of --sampler; did you mean 'euler'?",
    "sample run.yaml more": "eridiff sample takes no further argument, and got 'more'",
    "smaple": "'smaple' is not a command; did you mean 'sample'?",
    "lora chek": "'chek' is not a command; did you mean 'check'?",
    "sample --model flux-dev --prompt x": "'flux-dev' names sizes, not weights; pass a file, a folder or black-forest-labs/FLUX.1-dev",
    "sample --model flux1.safetensors --prompt x": "'flux1.safetensors' does not exist; did you mean 'flux.safetensors'?",
    "sample --model pic.png --prompt x": "'pic.png' is not a safetensors file: it is a PNG image",
    "sample --lora foxes.safetensors --prompt x": "'foxes.safetensors' does not exist; did you mean 'fox.safetensors'?",
    "sample --model org/name --prompt x": "the hub is not asked (HF_HUB_OFFLINE is set), and the cache '",
    "sample --prompt x --schedule kaaras": "'kaaras' is not a schedule of Flux: it has original, dev, schnell, diffusers",
    "sample --prompt x --out new/pic.jpg": "'new/pic.jpg' cannot be written: images are PNG; pass a name ending in .png, or a folder",
    "sample --transformer flux.safetensors --prompt x": "an autoencoder, a CLIP text encoder and a T5 text encoder are missing: the model holds a Flux; "
    "give the rest as vae (--vae ae.safetensors), clip (--clip clip_l.safetensors), t5 (--t5 t5xxl_fp16.safetensors)",
    "sample --lora fox.safetensors --prompt x": "it was made for Flux of width 16, and this one has 192: load that model (--model)",
    "sample --lora dev.safetensors --prompt x": "it was made for Flux of width 3072 (flux1-dev or -schnell), and this one has 192: load that model (--model)",
    "inspect cut.safetensors": "'cut.safetensors' is damaged: it is an incomplete download, 784384 of 7784384 bytes are missing; download it again",
    "inspect bad.safetensors": "'bad.safetensors' is damaged: it has a header that is not UTF-8 at byte 2; download it again",
    "sample --prompt x --out /proc/x": "'/proc/x' cannot be written: '/proc' takes no new files",
    "inspect notes.md": "'notes.md' is not a safetensors file: it is text, which begins with '# Notes on model'",
    "inspect pic.png": "'pic.png' is not a safetensors file: it is a PNG image",
    "lora check fox.safetensors --model flux1-dev": "'flux1-dev' is not a file and not a published model; did you mean 'flux-dev'?",
    "sample: {prompts: [a fox], size: 64x64}": "'size' is not a key of sample; pass width and height",
    "sample: {prompts: [a fox], n_iter: 3}": "'n_iter' is not a key of sample; repeat the prompt, each time with its own seed",
    "prompts: [a fox]": "'prompts' belongs under 'sample:'",
    "sample: {prompts: [a fox], sampler: dpm++}": "run.yaml: sampler: 'dpm++' is not a sampler; did you mean 'dpmpp_2m'?",
    'sample:\n  prompts: ["a swan"\n': "run.yaml: line 2: expected ',' or ']', but got the end of the file\n",
}  # fmt: skip


@pytest.mark.parametrize("given", MISTAKES)
def test_a_mistake_is_answered_with_what_may_be_meant(
    given: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [word.replace("~", " ") for word in given.split()]
    if ":" in given:
        (home / "run.yaml").write_text(given)
        command = ["sample", "run.yaml"]
    before = sorted(home.iterdir())
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert out == "" and MISTAKES[given] in err and err.count("\n") == 1
    assert sorted(home.iterdir()) == before


def test_a_loras_scale_must_be_a_number(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("fox.safetensors", "tiny-style"):
        assert main(["sample", "--prompt", "x", "--lora", f"{name}:strong"]) == 2
        assert f"the scale of the LoRA '{name}' must be a number, not 'strong'" in capsys.readouterr().err
    assert main(["lora", "convert", "fox.safetensors:a", "--model", "tiny-flux", "--out", "x.safetensors"]) == 2
    assert "'fox.safetensors:a' does not exist" in capsys.readouterr().err


def test_a_missing_tokenizer_is_answered_with_the_option(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {name: f"{BUILT_IN}/{file}.safetensors" for name, file in (("vae", "ae"), ("clip", "clip"), ("t5", "t5"))}
    flags = [word for name, file in parts.items() for word in (f"--{name}", file)]
    assert main(["sample", "--transformer", "flux.safetensors", *flags, "--prompt", "x"]) == 2
    assert "no T5 tokenizer was found: pass --tokenizers FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["num_inference_steps: 2", "sample_steps: 2", "steps: 2"])
def test_other_programs_names_of_the_steps_are_taken(words: str, home: Path) -> None:
    (home / "run.yaml").write_text(f"sample: {{prompts: [a fox on snow], {words}, out: one.png}}")
    assert main(["sample", "run.yaml", "--quiet"]) == 0
    with Image.open("one.png") as image:
        assert json.loads(image.info["eridiff"])["steps"] == 2


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "bfloat16", "float32"])
def test_short_and_long_names_of_dtypes_are_taken_in_files_and_as_options(
    dtype: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "run.yaml").write_text(f"dtype: {dtype}\nsample: {{prompts: [a fox on snow], steps: 1}}")
    long = {"bf16": "bfloat16", "fp32": "float32"}.get(dtype, dtype)
    for command in (["run.yaml"], ["--prompt", "a fox on snow", "--steps", "1", "--dtype", dtype]):
        assert main(["sample", *command, "--out", "one.png"]) == 0
        assert f", {long} on " in capsys.readouterr().err


def test_notices_go_to_stderr_and_paths_to_stdout(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "run.yaml").write_text("sample: {prompts: [a fox on snow, ''], neg: blurry, steps: 1, sample_every: 5}")
    assert main(["sample", "run.yaml", "--out", "out"]) == 0
    out, err = capsys.readouterr()
    assert sorted(Path(line) for line in out.splitlines()) == sorted(Path("out").iterdir())
    for notice in ("without effect here: sample_every", "negative has no effect", "a prompt is empty", ", 2 images, "):
        assert err.count(notice) == 1


def test_one_line_says_what_runs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny.write_model(home / "model"))
    size = ["--size", "32x32", "--steps", "1"]
    assert main(["sample", "--model", model, "--prompt", "x", *size, "--device", "cpu", "--out", "a.png"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eridiff: ")]
    assert line.startswith("eridiff: dev (") and "have the same sizes" in line
    assert line.endswith("), float32 on cpu, 1 image, 32 x 32, 1 step, guidance 3.5")
    command = [
        "sample",
        "--model",
        model,
        "--prompt",
        "x",
        *size,
        "--device",
        "cpu",
        "--out",
        "b.png",
        "--vae-rows",
        "16",
    ]
    assert main(command) == 0
    assert "1 step, guidance 3.5, vae_rows 16\n" in capsys.readouterr().err
    assert main([*command, "--offload", "stages"]) == 0
    assert "guidance 3.5, vae_rows 16\n" in capsys.readouterr().err  # and no offload, which has no effect there


def test_inspect_says_what_a_lora_is_and_how_to_go_on(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "fox.safetensors"]) == 0
    assert capsys.readouterr().out == (
        "fox.safetensors: a LoRA for Flux, with kohya names\n"
        "  24 modules: 24 lora; rank 2, 3, 4; bfloat16\n"
        "  eridiff lora check fox.safetensors --model flux-dev shows what becomes of each module\n"
    )
    assert main(["inspect", "fox.safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["modules"] == 24


@pytest.mark.parametrize("case", sorted(path.parent.name for path in LORAS.glob("lora-*/lora.safetensors")))
def test_inspect_takes_no_lora_for_a_model(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(LORAS / case / "lora.safetensors")]) == 0
    wanted = "SD 3" if "sd3" in case else "Flux" if "flux" in case else ""
    out = capsys.readouterr().out
    assert out.startswith("lora.safetensors: a LoRA for ")
    assert not wanted or "sd3" in case or f"for {wanted}" in out


def test_inspect_names_the_published_models_of_a_files_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sparse_manifest(tmp_path / "flux1-dev.safetensors", "flux1-dev")
    assert main(["inspect", str(file)]) == 0
    assert capsys.readouterr().out.startswith(
        "flux1-dev.safetensors: a Flux of the sizes of dev, krea, kontext, original layout\n"
    )


def test_a_long_message_loses_whole_words() -> None:
    text = str(EridiffError(" ".join(f"word{i}" for i in range(100))))
    assert len(text) <= LONGEST
    assert all(re.fullmatch(r"word\d+|\.\.\.", word) for word in text.split(" "))
    assert text.startswith("word0 word1 ") and text.endswith(" word98 word99")


def test_the_warnings_of_other_packages_have_their_own_names(home: Path) -> None:
    code = (
        "import logging, sys\nfrom eridiff.cli import main\nmain(['inspect', 'notes.md'])\n"
        "for name in ('torchao.utils', 'eridiff.weights.load'):\n    logging.getLogger(name).warning('slow')"
    )
    assert python("-c", code).stderr.splitlines()[1:] == ["torchao: slow", "eridiff: slow"]


def test_open_shows_the_image_or_says_that_nothing_can(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []

    class Viewer(ImageShow.Viewer):
        def show(self, image: Image.Image, **options: object) -> int:
            shown.append(image.size)
            return 1

    command = ["sample", "--prompt", "a fox on snow", "--steps", "1", "--out", "one.png", "--open"]
    monkeypatch.setattr(ImageShow, "_viewers", [])
    assert main(command) == 0 and "no program to show images" in capsys.readouterr().err
    monkeypatch.setattr(ImageShow, "_viewers", [Viewer()])
    assert main(command) == 0 and shown == [(64, 64)]
    assert "no program" not in capsys.readouterr().err


def test_inspect_lists_the_keys_with_both_names(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "flux.safetensors", "--keys"]) == 0
    assert "  img_in.weight  bfloat16 [192, 64]  image_in.weight\n" in capsys.readouterr().out


def test_lora_check_fits_into_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    for case, model in (("lora-kohya-flux", "flux-dev"), ("lora-kohya-sdxl", "sdxl-base")):
        main(["lora", "check", str(LORAS / case / "lora.safetensors"), "--model", model])
        lines = capsys.readouterr().out.splitlines()
        assert lines and max(map(len, lines)) <= 80
        main(["lora", "check", str(LORAS / case / "lora.safetensors"), "--model", model, "--wide"])
        assert max(map(len, capsys.readouterr().out.splitlines())) > 80


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True)


def test_a_pipe_that_closes_early_is_not_an_error() -> None:
    lora = LORAS / "lora-kohya-flux" / "lora.safetensors"
    command = shlex.join([sys.executable, "-m", "eridiff", "lora", "check", str(lora), "--model", "flux-dev"])
    result = subprocess.run(f"{command} | head -1", shell=True, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.stdout.count("\n") == 1 and "Traceback" not in result.stderr and "BrokenPipe" not in result.stderr


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_no_torch(option: str) -> None:
    code = (
        "import sys\nfrom eridiff.cli import main\n"
        f"try:\n    main(['{option}'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    assert python("-c", code).stdout.splitlines()[-1] == "[]"


def test_the_short_help_of_each_command_is_its_own() -> None:
    """The list of commands is read without their files, so it repeats one line of each."""
    all_known, none_known = _parser().format_help(), _parser([]).format_help()
    assert all_known == none_known
    assert all(name in none_known and help in none_known for name, help in COMMANDS.items())


def test_the_help_of_sample_has_groups_and_four_examples() -> None:
    text = python("-m", "eridiff", "sample", "--help").stdout
    for title in ("image", "image to image", "Flux", "SD 3", "SDXL", "LoRA", "model", "device and memory"):
        assert f"\n{title}:\n" in text
    examples = text.split("examples:\n")[1].strip().splitlines()
    assert len(examples) == 4
    for example in examples:
        assert _parser().parse_args(shlex.split(example)[1:]).run
