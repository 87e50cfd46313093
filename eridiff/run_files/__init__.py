"""The files that say what to generate: eridiff's own, and those of other programs, one module per program.

Whatever a program's file says is put into the words of eridiff's configuration, so `eridiff.config` reads and checks all of
them. docs/configuration.md lists every key.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from eridiff.config import RunConfig, SampleSettings, parse_config
from eridiff.errors import ConfigError
from eridiff.prompt_files import read_json, read_prompts, read_toml
from eridiff.run_files import ai_toolkit, kohya, onetrainer, simpletuner
from eridiff.run_files.common import naming, read_text
from eridiff.yaml_reader import read_yaml

WEIGHTS = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")


def load_config(path: str | Path) -> RunConfig:
    """Read any of the files; raises ConfigError, naming file and line, for anything that is unknown or impossible.

    The ending says how the text is read (.txt is kohya's prompts, .toml, .json, all else is YAML), and the keys of what is
    in it whose file it is.
    """
    path = Path(path)
    if path.suffix.lower() in WEIGHTS:
        raise ConfigError(f"{path}: is a checkpoint; pass it as --model")
    with naming(path):
        return _parsed(read_text(path), path.suffix.lower(), path.parent)


def _parsed(text: str, ending: str, folder: Path) -> RunConfig:
    if ending == ".txt":
        return _prompts(text)
    if ending == ".toml":
        return _toml(read_toml(text), folder)
    if re.search(r'^config\s*:|"config"\s*:', text, re.MULTILINE):
        text = ai_toolkit.with_environment(text)
    json = ending in (".json", ".jsonc")
    document = read_json(text) if json else read_yaml(text)
    if json and isinstance(document, list):
        return (
            _as("onetrainer", onetrainer.of_samples(document, {}))
            if onetrainer.is_samples(document)
            else _prompts(document)
        )
    if not isinstance(document, dict):
        return parse_config(document)
    if "config" in document:
        return _as("ai-toolkit", ai_toolkit.read(document, folder))
    if json and simpletuner.is_training(document):
        return _as("simpletuner", simpletuner.read_training(document, folder))
    if json and onetrainer.is_training(document):
        return _as("onetrainer", onetrainer.read_training(document, folder))
    if json and simpletuner.is_library(document):
        return simpletuner.of_library(document, {})
    return parse_config(document)


def _as(program: str, read: RunConfig) -> RunConfig:
    """A trainer's configuration, whose images are generated as the trainer would, unless it names another recipe."""
    if "recipe" in read.sample.shared:
        return read

    def chosen(sample: SampleSettings) -> SampleSettings:
        return replace(sample, shared={"recipe": program, **sample.shared})

    first = None if read.first_sample is None else chosen(read.first_sample)
    return replace(read, sample=chosen(read.sample), first_sample=first, program=program)


def _prompts(given: object) -> RunConfig:
    unused: dict[str, str] = {}
    return kohya.of_prompts(read_prompts(given, unused), unused)


def _toml(document: dict[str, Any], folder: Path) -> RunConfig:
    if "prompt" in document:
        return _prompts(document)
    if simpletuner.is_training(document):
        return _as("simpletuner", simpletuner.read_training(document, folder))
    if kohya.is_training(document):
        return _as("kohya", kohya.read_training(document, folder))
    if "datasets" in document:
        raise ConfigError("is kohya's configuration of datasets; the one of the training names prompts and model")
    raise ConfigError(
        "a table [prompt] with entries [[prompt.subset]], or kohya's or SimpleTuner's configuration of a training, is expected"
    )
