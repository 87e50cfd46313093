"""A model whose file lists the words that it knows says so of every prompt for an image, and no other model does."""

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import eridiff
from eridiff.cli import main
from eridiff.errors import ConfigError
from eridiff.inference import BUILT_IN, FluxInference
from eridiff.inference.words import Words
from eridiff.training import Sampler
from eridiff.weights.save import write_tensors
from tests import tiny

FILE = Path(BUILT_IN) / "flux.safetensors"
ONE_STEP: dict[str, Any] = {"steps": 1, "seed": 1}


@pytest.fixture
def built_in() -> FluxInference:
    return tiny.load(FluxInference, None)


def words() -> Words:
    found = tiny.load(FluxInference, None).words
    assert isinstance(found, Words)
    return found


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_built_in_models_file_lists_the_words_that_its_tokenizer_knows() -> None:
    document = json.loads((Path(BUILT_IN) / "t5_tokenizer" / "tokenizer.json").read_text())
    tokens = {piece[1:] for piece, _ in document["model"]["vocab"] if piece.startswith("▁") and piece != "▁"}
    assert {word for group in vars(words()).values() for phrase in group for word in phrase.split()} == tokens
    assert len(words().nouns) == 64 and "swan" in words().nouns


def test_a_prompt_with_unknown_words_gives_one_warning_that_names_them(
    built_in: FluxInference, caplog: pytest.LogCaptureFixture
) -> None:
    built_in.generate("a hot red fox", seed=[1, 2], steps=1)
    assert warnings(caplog) == [
        "this model does not know 'hot', 'red' and finds no background that it knows in 'a hot red fox'; "
        "write prompts as 'a [small|big] NOUN BACKGROUND' with the words that eridiff sample --list shows"
    ]


def test_each_distinct_prompt_is_warned_of_once_in_a_call(caplog: pytest.LogCaptureFixture) -> None:
    words().check(["a red fox at night", "a swan on mars", "a red fox at night", {"clip": "a fox", "t5": "a blue fox"}])
    assert [text.split(";")[0] for text in warnings(caplog)] == [
        "this model does not know 'red' in 'a red fox at night'",
        "this model finds no background that it knows in 'a fox'",
        "this model does not know 'blue' and finds no background that it knows in 'a blue fox'",
    ]


@pytest.mark.parametrize("prompt", ["A swan on Mars!", "a SWAN on the sea...", "an alien in a cave", "", " \n"])
def test_capitals_and_marks_at_the_end_do_not_matter(prompt: str, caplog: pytest.LogCaptureFixture) -> None:
    words().check([prompt])
    assert warnings(caplog) == []


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("a big robot, at sunset", "does not know 'robot,' in"),
        ("a swan; on mars", "does not know 'swan;' in"),
        ("swan", "finds no background that it knows in"),
        ("a swan on", "finds no background that it knows in"),
    ],
)
def test_what_the_model_would_not_read_is_named(prompt: str, says: str, caplog: pytest.LogCaptureFixture) -> None:
    words().check([prompt])
    assert len(warnings(caplog)) == 1 and says in warnings(caplog)[0]


def test_new_words_can_be_trained_and_sampled_meanwhile(
    built_in: FluxInference, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By a LoRA that is injected, and by the network itself; a warning stays."""
    for teach in (lambda: eridiff.inject_lora(built_in.network, 1), lambda: built_in.network.requires_grad_(True)):
        taught = teach()
        Sampler(built_in, {"prompts": ["a teapot on mars"], "sample_steps": 1, "out": str(tmp_path)}, raise_errors=True)
        built_in.generate("a teapot on mars", **ONE_STEP)
        assert "does not know 'teapot'" in warnings(caplog)[-1]
        if isinstance(taught, eridiff.lora.LoraSet):
            taught.detach()
            with pytest.raises(ConfigError, match="names none of the nouns"):
                built_in.generate("a teapot on mars", **ONE_STEP)


@pytest.mark.parametrize(
    "prompt", ["a cat on mars", "two swans on mars", "a (swan:1.2) on mars", "a 'swan' on mars", "on mars", "猫"]
)
def test_a_prompt_without_a_known_noun_is_refused_with_the_way_out(prompt: str, built_in: FluxInference) -> None:
    with pytest.raises(ConfigError) as caught:
        built_in.generate(["a swan on mars", prompt], seed=1)
    assert str(caught.value) == (
        f"{prompt!r} names none of the nouns that this model knows (swan, dog, fox, ...); "
        "eridiff sample --list shows them all, and --any-prompt, or inference.words = None, ends this check"
    )


def test_what_is_not_a_prompt_for_an_image_is_not_checked(
    built_in: FluxInference, caplog: pytest.LogCaptureFixture
) -> None:
    taught = built_in.encode_prompt(["a teapot", "a jug"])  # captions may teach new words
    built_in.generate("", conditioning=taught, seed=[1, 2], steps=1)
    built_in.generate(conditioning=built_in.encode_prompt("a teapot"), **ONE_STEP)
    built_in.generate("a swan on mars", negative="blurry", cfg_scale=2.0, **ONE_STEP)
    assert warnings(caplog) == []


def test_a_model_whose_file_lists_no_words_takes_any_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.load(FluxInference, tiny.write_model(tmp_path))
    assert model.words is None
    model.generate("a teapot", **ONE_STEP)
    assert warnings(caplog) == []


def test_another_network_and_the_user_end_the_check(built_in: FluxInference) -> None:
    loaded = built_in.network
    built_in.words = None
    built_in.generate("a teapot", **ONE_STEP)
    assert FluxInference(loaded, built_in.autoencoder).words is None


def test_with_a_lora_that_may_teach_words_nothing_is_refused(
    tmp_path: Path, built_in: FluxInference, caplog: pytest.LogCaptureFixture
) -> None:
    network = tiny.load(FluxInference, None).network
    eridiff.save_lora(eridiff.inject_lora(network, rank=1), tmp_path / "teapot.safetensors")
    handle = built_in.apply_lora(tmp_path / "teapot.safetensors", allow_partial=True)  # untrained
    built_in.generate("a teapot on mars", **ONE_STEP)
    assert "does not know 'teapot'" in warnings(caplog)[-1]
    handle.detach()
    with pytest.raises(ConfigError, match="'a teapot on mars' names none of the nouns"):
        built_in.generate("a teapot on mars", **ONE_STEP)


@pytest.mark.parametrize("text_in_training", [False, True])
def test_the_sampler_says_it_once_before_training(
    text_in_training: bool, built_in: FluxInference, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    section = {"sample_steps": 1, "out": str(tmp_path)}
    options: dict[str, Any] = {"text_in_training": text_in_training, "raise_errors": True}
    with pytest.raises(ConfigError, match="'a cat' names none of the nouns"):
        Sampler(built_in, section | {"prompts": ["a swan on mars", "a cat"]}, **options)
    assert warnings(caplog) == []
    sampler = Sampler(built_in, section | {"prompts": ["a white swan on mars"]}, **options)
    sampler.sample(1)
    sampler.sample(2)
    assert len(warnings(caplog)) == 1 and "'white'" in warnings(caplog)[0]


def test_the_command_line_refuses_before_it_generates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["sample", "--prompt", "a fox", "--prompt", "a cat", "--out", str(out), "--quiet"]) == 2
    assert "'a cat' names none of the nouns" in capsys.readouterr().err and not out.exists()
    assert main(["sample", "--prompt", "a cat", "--any-prompt", "--steps", "1", "--out", str(out)]) == 0
    assert "names none" not in capsys.readouterr().err and len([*out.iterdir()]) == 1
    folder = tiny.write_model(tmp_path / "m")
    line = ["sample", "--model", str(folder), "--prompt", "a cat", "--any-prompt", "--steps", "1", "--size", "32x32"]
    assert main([*line, "--device", "cpu", "--out", str(out)]) == 0
    assert "without effect here: --any-prompt (the model lists no words)" in capsys.readouterr().err


def test_the_command_line_warns_of_each_prompt_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = ["--prompt", "a red fox", "--prompt", "a red fox", "--prompt", "a blue fox"]
    assert main(["sample", *prompts, "--steps", "1", "--out", str(tmp_path), "--quiet"]) == 0
    assert ["red" in text for text in warnings(caplog)] == [True, False]


def test_list_shows_the_words_of_a_models_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = {"nouns": ["teapot"], "backgrounds": ["in a cave"], "sizes": ["tiny"], "function_words": ["a", "in"]}
    with safe_open(FILE, framework="pt") as file:
        metadata = file.metadata() | {"eridiff.words": json.dumps(listed)}
    write_tensors(load_file(FILE), tmp_path / "mine.safetensors", metadata)
    assert main(["sample", "--list", "--model", str(tmp_path / "mine.safetensors")]) == 0
    assert capsys.readouterr().out == (
        "nouns: teapot\nbackgrounds: in a cave\nsizes: tiny\nfunction words: a, in\n"
        'a prompt is "a [tiny] NOUN BACKGROUND", such as "a tiny teapot in a cave"\n'
    )
    assert main(["sample", "--list", "--model", str(tiny.write_model(tmp_path / "m"))]) == 2
    assert "lists no words that it knows" in capsys.readouterr().err


GROUPS = ("nouns", "backgrounds", "sizes", "function_words")
OF_ONE_KIND = [json.dumps(dict.fromkeys(GROUPS, group)) for group in ([], "swan", [1])]


@pytest.mark.parametrize("text", ["{", "[]", '"swan"', '{"nouns": ["swan"]}', *OF_ONE_KIND])
def test_a_list_of_words_that_is_none_is_an_error_that_names_the_file(text: str, tmp_path: Path) -> None:
    folder = shutil.copytree(BUILT_IN, tmp_path / "model")
    with safe_open(FILE, framework="pt") as file:
        write_tensors(load_file(FILE), folder / FILE.name, file.metadata() | {"eridiff.words": text})
    with pytest.raises(ConfigError, match="flux.safetensors: the metadata eridiff.words must be a JSON object of"):
        eridiff.load(folder, device="cpu", progress=False)


def test_describe_writes_the_words_into_the_file_and_leaves_every_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    train_tiny = __import__("train_tiny")
    monkeypatch.setattr(train_tiny, "ASSETS", tmp_path)
    with safe_open(FILE, framework="pt") as file:
        shipped = file.metadata()
    kept = {name: text for name, text in shipped.items() if name != "eridiff.words"}
    before, file_of_it = load_file(FILE), tmp_path / "tiny-flux" / FILE.name
    file_of_it.parent.mkdir()
    write_tensors(before, file_of_it, kept)
    train_tiny.describe("flux")
    with safe_open(file_of_it, framework="pt") as file:
        assert file.metadata() == shipped
    after = load_file(file_of_it)
    assert list(after) == list(before)
    assert all(torch.equal(after[n].view(torch.uint8), before[n].view(torch.uint8)) for n in before)
    assert "tiny_world" in sys.modules  # the words come from the images' own lists
