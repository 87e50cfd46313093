"""Damaged files are read or refused by one typed sentence: 300 of every kind, and what more of them (`make fuzz`) have found."""

import json
import subprocess
import sys
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from eridiff.errors import CheckpointError, ConfigError, EridiffError, LoraError
from eridiff.lora import load_lora, save_lora
from eridiff.lora.load import Refusal
from eridiff.report import inspect, summary
from eridiff.run_files import load_config
from eridiff.text.tokenizers import clip_tokenizer
from eridiff.weights.header import open_checkpoint
from eridiff.weights.save import save_network, write_tensors
from tests import tiny
from tests.fuzz import outcome
from tests.loras import some_lora


def test_three_hundred_damaged_files_are_read_or_refused() -> None:
    ran = subprocess.run([sys.executable, "-m", "tests.fuzz", "300", "1"], capture_output=True, text=True)
    table = [line for line in ran.stdout.splitlines() if "FAULT" in line]
    assert ran.returncode == 0 and len(table) == 9, ran.stdout + ran.stderr[-2000:]
    assert all(int(line.split("read")[1].split()[0]) and int(line.split("refused")[1].split()[0]) for line in table), (
        "both happen"
    )


def test_a_fault_is_noticed(tmp_path: Path) -> None:
    def fails(error: BaseException) -> Any:
        def read() -> None:
            raise error

        return read

    assert outcome(lambda: 1, tmp_path) == "read" and outcome(fails(ConfigError("no")), tmp_path) == "refused"
    assert outcome(fails(KeyError("x")), tmp_path).startswith("KeyError at")
    assert "wrote" in outcome(lambda: (tmp_path / "x").touch(), tmp_path)
    long = ConfigError("no")
    long.args = ("a\nb",)
    assert outcome(fails(long), tmp_path).startswith("a sentence of 3 characters")


@pytest.mark.parametrize("kind", [EridiffError, CheckpointError, ConfigError, LoraError, Refusal])
def test_every_error_is_one_line_of_at_most_300_characters(kind: type[EridiffError]) -> None:
    text = str(kind("begin " + "x" * 1000 + "\n\x1b[31m\u202e\ud800 the end"))
    assert len(text) == 300 and text.startswith("begin xxx") and text.endswith(r"\n\x1b[31m\u202e\ud800 the end")
    assert str(kind("'é' is read: 你好")) == "'é' is read: 你好"


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        (".yaml", "sample:\n  prompts: [a]\n  seed: {}"), (".json", '{{"sample": {{"seed": {}}}}}'), (".toml", "[prompt]\nseed = {}\n"),
        (".txt", "a fox --d {}"), (".txt", "a fox --l {}"), (".yaml", "sample:\n  prompts: [a]\n  guidance_scale: {}"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("number", ["9" * 5000, "-" + "1" * 4301])
def test_a_number_of_thousands_of_digits_is_one_sentence_in_every_format(
    ending: str, text: str, number: str, tmp_path: Path
) -> None:
    path = tmp_path / f"run{ending}"
    path.write_text(text.format(number))
    with pytest.raises(ConfigError):
        load_config(path)


@pytest.mark.parametrize(
    ("ending", "text"), [(".toml", "a=" + "[" * 3000), (".json", "[" * 100_000), (".yaml", "[" * 3000)]
)
def test_what_is_nested_too_deep_is_one_sentence_in_every_format(ending: str, text: str, tmp_path: Path) -> None:
    (tmp_path / f"run{ending}").write_text(text)
    with pytest.raises(ConfigError):
        load_config(tmp_path / f"run{ending}")


@pytest.mark.parametrize("kind", [["LORA"], {"a": 1}, 3, None, "new\nline"])
def test_a_peft_type_that_is_not_a_known_text_is_refused(kind: Any, tmp_path: Path) -> None:
    save_lora(some_lora(tiny.flux()), tmp_path / "adapter_model.safetensors", tiny.flux())
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "r": 2}))
    with pytest.raises(LoraError, match="of peft's kinds LORA, LOHA, LOKR are read"):
        load_lora(tmp_path, tiny.flux())


@pytest.mark.parametrize("key", ["model_max_length", "padding_side", "truncation_side", "bos_token", "unk_token"])
@pytest.mark.parametrize("told", [[], [1, 2], {"a": 1}])
def test_a_tokenizers_setting_of_a_wrong_type_is_reported_when_it_is_read(key: str, told: Any, tmp_path: Path) -> None:
    copytree(tiny.TOKENIZERS / "clip", tmp_path / "t")
    config = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(config | {key: told}))
    assert outcome(lambda: clip_tokenizer(tmp_path / "t")("a fox").input_ids, tmp_path) in ("read", "refused")


RIGHT = (("up_depths", None), ("up_depths", []), *(("scale", n) for n in (3.5, -1, 2**31, 2**64)), ("guidance", True))


@pytest.mark.parametrize("value", ["32", None, -1, 2**31, 2**64, True, 3.5, [], [32], {"a": 1}, [["x"]]])
@pytest.mark.parametrize(
    ("network", "key"),
    [("flux", "heads"), ("unet", "head_width"), ("unet", "channel_multipliers"), ("unet", "up_depths"), ("mmdit", "table_side"),
     ("vae", "residual_blocks"), ("vae", "scale"), ("flux", "guidance"), ("clip", "hidden_size"), ("clip", "hidden_act")],
)  # fmt: skip
def test_a_setting_of_a_wrong_type_in_the_metadata_is_one_sentence(
    network: str, key: str, value: Any, tmp_path: Path
) -> None:
    modules = {"flux": tiny.flux, "unet": tiny.unet, "mmdit": tiny.mmdit, "vae": tiny.autoencoder}
    path = tmp_path / "m.safetensors"
    if network == "clip":
        tiny.write_text(tmp_path, "m", "clip", tiny.clip_module())
    else:
        save_network(modules[network](), path)
    file = open_checkpoint(path)
    told = json.loads(file.metadata["eridiff.config"])
    told[network] = told.get(network, {}) | {key: value}
    write_tensors({name: file.read(name).clone() for name in file.tensors}, path, {"eridiff.config": json.dumps(told)})
    found = outcome(lambda: summary(inspect(path)), tmp_path)
    assert found == "refused" or (found == "read" and (key, value) in RIGHT), found
