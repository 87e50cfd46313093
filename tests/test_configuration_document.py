"""docs/configuration.md says of every key what it becomes; here each row is put into a file and read."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from docs import tables
from eridiff.config import (
    ABSENT_SAMPLERS,
    FOR_TRAINING,
    NO_EFFECT,
    SAMPLER_SYNONYMS,
    TOP,
    RunConfig,
    SampleSettings,
    TrainingSchedule,
    Words,
)
from eridiff.errors import ConfigError
from eridiff.inference.sd35 import TABLES
from eridiff.inference.sdxl import SCHEDULES
from eridiff.prompt_files import FLAGS, KOHYA_KEYS, UNUSED_FLAGS, UNUSED_KOHYA_KEYS
from eridiff.request import FIELDS, WORDS
from eridiff.run_files import ai_toolkit, kohya, load_config, onetrainer, simpletuner
from eridiff.run_files.ai_toolkit import MODEL_KEYS, PROCESS_KEYS, UNUSED_KEYS
from eridiff.schedulers.samplers import SAMPLERS
from eridiff.schedulers.tables import FLOW_TABLES
from eridiff.yaml_reader import read_yaml

DOCUMENT = (Path(__file__).parent.parent / "docs" / "configuration.md").read_text()
Row = tuple[str, ...]


def table(section: str, first: str) -> list[Row]:
    """The rows of the table in a section whose first column has a heading."""
    body = DOCUMENT.split(f"# {section}", 1)[1]
    lines = body[body.index(f"| {first} |") :].splitlines()
    rows = []
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        rows.append(tuple(cell.strip() for cell in line.strip("| ").split(" |")))
    assert rows
    return rows


def names(rows: list[Row]) -> list[str]:
    return [row[0].strip("`") for row in rows]


def read(cell: str) -> Any:
    return read_yaml(cell.strip("`"))


def wanted(cell: str) -> dict[str, Any]:
    """The fields that a cell promises; of `without effect, ...` those behind the comma."""
    found = re.fullmatch(r"(?:without effect(?:, )?)?(?:`(.*)`)?", cell)
    assert found, cell
    return read_yaml(found[1]) if found[1] else {}


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def image(words: Words) -> dict[str, Any]:
    """What is asked of an image, as YAML writes it."""
    kinds = {name: FIELDS[WORDS.get(name, name)].metadata["kind"] for name in words}
    return plain({name: value if name == "prompt" else kinds[name].write(value) for name, value in words.items()})


def loaded(folder: Path, document: Any, name: str = "run.json") -> RunConfig:
    (folder / name).write_text(document if isinstance(document, str) else json.dumps(document))
    return load_config(folder / name)


def fulfils(config: RunConfig, key: str, cell: str) -> None:
    """Whether the first image has what a cell says, and whether the key is listed as without effect just when it says so."""
    picture = plain(asdict(replace(config.sample, shared={}, entries=()))) | image(config.sample.each()[0])
    told = [notice for notice in config.notices if notice.startswith("without effect here: ")]
    assert len(told) <= 1
    words = re.findall(r"[-\w]+", told[0]) if told else []
    if cell.startswith("without effect"):
        assert key in words or wanted(cell).keys() & set(words), config.notices
    else:
        assert key not in words, config.notices
    assert {name: picture[name] for name in wanted(cell)} == wanted(cell)


def trainer(process: dict[str, Any], **document: Any) -> dict[str, Any]:
    sample = {"prompts": ["a [trigger] swan"], "guidance_scale": 2.0}
    return {"config": {"name": "run", "process": [{"sample": sample} | process]}} | document


SECTION = table("1. The section `sample`", "key")
TOP_LEVEL = table("2. Top-level keys", "key")
TRAINERS, SCHEDULE = "3. ai-toolkit and EriDiffusion", table("3. ai-toolkit and EriDiffusion", "key")
FLAG_ROWS, KOHYA = table("4. Flags in prompts", "flag"), table("5. kohya's prompt files", "key")


@pytest.mark.parametrize("row", SECTION, ids=names(SECTION))
def test_a_key_of_the_section_becomes_what_the_document_says(row: Row, tmp_path: Path) -> None:
    key, value, each, here = row[0].strip("`"), read(row[1]), row[2], row[3]
    prompts = {} if key in ("prompts", "samples") else {"prompts": ["a fox"]}
    fulfils(loaded(tmp_path, {"sample": {**prompts, key: value}}), key, here)
    entry = {"sample": {"samples": [{"prompt": "a fox", key: value}, {"prompt": "a dog"}]}}
    if each == "yes":
        config = loaded(tmp_path, entry)
        fulfils(config, key, here)
        first, second = config.sample.each()
        assert all(first.get(name) != second.get(name) for name in wanted(here))
    elif key not in NO_EFFECT:
        with pytest.raises(ConfigError, match=f"'{key}' is not a key of sample: entry 1"):
            loaded(tmp_path, entry)


@pytest.mark.parametrize("row", table("Samplers", "name"), ids=lambda row: row[0])
def test_a_samplers_name_becomes_what_the_document_says(row: Row, tmp_path: Path) -> None:
    for name in re.findall(r"`([^`]+)`", row[0]):
        config = loaded(tmp_path, {"sample": {"prompts": ["a fox"], "sampler": name}})
        sample = config.sample.shared
        if row[1].startswith("the model's own"):
            assert sample == {} and f"'{name}' is not available" in config.notices[0]
        else:
            assert sample == wanted(row[1]) and not config.notices


@pytest.mark.parametrize("row", TOP_LEVEL, ids=names(TOP_LEVEL))
def test_a_key_beside_the_section_becomes_what_the_document_says(row: Row, tmp_path: Path) -> None:
    key, here = row[0].strip("`"), row[2]
    config = loaded(tmp_path, {"sample": {"prompts": ["a fox"]}} | {key: read(row[1])})
    if key != "sample":
        said = here.startswith("without effect")
        assert (f"without effect here: {key} (" in " ".join(config.notices)) == said
        assert said or plain(getattr(config, next(iter(wanted(here))))) == next(iter(wanted(here).values()))


def agrees(config: RunConfig, key: str, here: str) -> None:
    """As `fulfils`, of a whole file."""
    found = plain(asdict(replace(config, sample=SampleSettings()))) | {"image": image(config.sample.each()[0])}
    found["sample"] = plain(asdict(replace(config.sample, shared={}, entries=())))
    for name, value in wanted(here).items():
        assert (
            {k: found[name][k] for k in value} == value
            if isinstance(value, dict) and name != "model"
            else found[name] == value
        )
    told = " ".join(config.notices)
    assert (re.search(rf"(?:^|[ :]){key}[ ,]", told) is not None) == here.startswith("without effect"), told


@pytest.mark.parametrize("row", table(TRAINERS, "key of the file")[:2], ids=lambda row: row[0])
def test_a_key_of_a_trainers_file_becomes_what_the_document_says(row: Row, tmp_path: Path) -> None:
    key = row[0].strip("`")
    agrees(loaded(tmp_path, trainer({}, **{key: read(row[1])})), key, row[2])


@pytest.mark.parametrize("row", table(TRAINERS, "key of `process`"), ids=lambda row: row[0])
def test_a_key_of_a_process_becomes_what_the_document_says(row: Row, tmp_path: Path) -> None:
    key = row[0].strip("`")
    agrees(loaded(tmp_path, trainer({key: read(row[1])})), key, row[2])


@pytest.mark.parametrize("row", table(TRAINERS, "key of `model`"), ids=lambda row: row[0])
def test_a_key_of_a_model_becomes_what_the_document_says(row: Row, tmp_path: Path) -> None:
    key = row[0].strip("`")
    agrees(loaded(tmp_path, trainer({"model": {"name_or_path": "M"} | {key: read(row[1])}})), key, row[2])


@pytest.mark.parametrize("row", SCHEDULE, ids=names(SCHEDULE))
def test_what_guides_a_training_becomes_what_the_document_says(row: Row, tmp_path: Path) -> None:
    section, key = row[0].strip("`").split(": ")
    process = {"sample": {"prompts": ["a fox"]}}
    process[section] = process.get(section, {}) | {key: read(row[1])}  # type: ignore[operator]
    config = loaded(tmp_path, trainer(process))
    assert asdict(config.training) == asdict(TrainingSchedule()) | wanted(row[2])
    told = " ".join(config.notices)
    assert read(row[1]) is False or (key if section == "sample" else section) in told


@pytest.mark.parametrize("row", FLAG_ROWS, ids=names(FLAG_ROWS))
def test_a_flag_becomes_what_the_document_says(row: Row, tmp_path: Path) -> None:
    flag, here = row[0].strip("`"), row[2]
    line = f"a fox {flag} {row[1].strip('`')} {'--h' if flag == '--w' else '--w'} 64"
    found = re.fullmatch("kohya (.*), ai-toolkit (.*)", here)
    kohya, toolkit = (found[1], found[2]) if found else (here, here)
    key = "prompt_2" if flag == "--p2" else flag
    fulfils(loaded(tmp_path, line, "prompts.txt"), key, kohya)
    process = {"model": {"is_xl": True}, "sample": {"prompts": [line]}}
    fulfils(loaded(tmp_path, trainer(process)), key, toolkit)


@pytest.mark.parametrize("row", KOHYA, ids=names(KOHYA))
def test_a_key_of_kohyas_files_becomes_what_the_document_says(row: Row, tmp_path: Path) -> None:
    key, value = row[0].strip("`"), read(row[1])
    fulfils(loaded(tmp_path, [{"prompt": "a fox"} | {key: value}], "prompts.json"), key, row[2])
    usual = f"[prompt]\n{key} = {json.dumps(value)}\n"
    subset = "[[prompt.subset]]\nwidth = 832\n" if key == "prompt" else "[[prompt.subset]]\nprompt = 'a fox'\n"
    fulfils(loaded(tmp_path, usual + subset, "prompts.toml"), key, row[2])


GENERATE = {
    "name": "run",
    "process": [{"model": {"name_or_path": "M", "arch": "flux"}, "generate": {"prompts": ["a fox"]}}],
}
PROGRAMS: dict[str, tuple[str, str, str, dict[str, Any]]] = {  # section, first heading, file's name, a document to add a key to
    "kohya": ("6. kohya's configuration", "key", "run.toml", {"pretrained_model_name_or_path": "M", "sample_prompts": "prompts.txt"}),
    "OneTrainer": (
        "7. OneTrainer", "key of a training", "run.json",
        {"base_model_name": "M", "sample_definition_file_name": "samples.json", "sample_after": 100, "sample_after_unit": "STEP"},
    ),
    "SimpleTuner": (
        "8. SimpleTuner", "key", "run.json",
        {
            "model_family": "flux", "pretrained_model_name_or_path": "M", "validation_prompt": "a fox",
            "validation_disable_unconditional": True, "validation_num_inference_steps": 8,
        },
    ),
}  # fmt: skip
PROGRAM_ROWS = [(name, row) for name, (section, first, *_) in PROGRAMS.items() for row in table(section, first)]


def toml(document: dict[str, Any]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in document.items())


@pytest.mark.parametrize(
    ("program", "row"), PROGRAM_ROWS, ids=lambda given: given if isinstance(given, str) else given[0]
)
def test_a_key_of_a_programs_training_becomes_what_the_document_says(program: str, row: Row, tmp_path: Path) -> None:
    key, document = row[0].strip("`"), PROGRAMS[program][3] | {row[0].strip("`"): read(row[1])}
    (tmp_path / "prompts.txt").write_text("a fox\n")
    (tmp_path / "samples.json").write_text(json.dumps([{"prompt": "a fox", "diffusion_steps": 12}]))
    (tmp_path / "library.json").write_text(json.dumps({"swan": "a swan", "strong": {"prompt": "b"}}))
    written = toml(document) if program == "kohya" else document
    agrees(loaded(tmp_path, written, PROGRAMS[program][2]), key, row[2])


@pytest.mark.parametrize("row", table("7. OneTrainer", "key of a sample"), ids=lambda row: row[0])
def test_a_key_of_onetrainers_samples_becomes_what_the_document_says(row: Row, tmp_path: Path) -> None:
    key = row[0].strip("`")
    sample = {"__version": 0, "prompt": "a fox", key: read(row[1])}
    fulfils(loaded(tmp_path, [sample], "samples.json"), key, row[2])
    rest = loaded(tmp_path, [sample, {"prompt": "a dog"}], "samples.json").sample.each()[1]
    assert rest == {"recipe": "onetrainer", "prompt": "a dog", "seed": 42}


@pytest.mark.parametrize("row", table("7. OneTrainer", "noise_scheduler"), ids=lambda row: row[0])
def test_onetrainers_samplers_become_what_the_document_says(row: Row, tmp_path: Path) -> None:
    for name in re.findall("`([^`]+)`", row[0]):
        config = loaded(tmp_path, [{"prompt": "a fox", "noise_scheduler": name}], "samples.json")
        found = config.sample.each()[0]
        assert found == {"recipe": "onetrainer", "prompt": "a fox", "seed": 42} | wanted(row[1])
        assert not any(name in notice for notice in config.notices)


@pytest.mark.parametrize("row", table(TRAINERS, "key of `to_folder`"), ids=lambda row: row[0])
def test_a_key_of_a_generating_process_becomes_what_the_document_says(row: Row, tmp_path: Path) -> None:
    (process,) = GENERATE["process"]
    document = {"config": GENERATE | {"process": [process | {row[0].strip("`"): read(row[1])}]}}
    agrees(loaded(tmp_path, document), row[0].strip("`"), row[2])


@pytest.mark.parametrize("row", table(TRAINERS, "key of `generate`"), ids=lambda row: row[0])
def test_a_key_of_the_section_generate_becomes_what_the_document_says(row: Row, tmp_path: Path) -> None:
    (process,) = GENERATE["process"]
    section = process["generate"] | {row[0].strip("`"): read(row[1])}  # type: ignore[operator,index]
    document = {"config": GENERATE | {"process": [process | {"generate": section}]}}
    agrees(loaded(tmp_path, document), row[0].strip("`"), row[2])


def test_the_documents_example_is_read(tmp_path: Path) -> None:
    examples = re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)
    assert [len(loaded(tmp_path, text, "run.yaml").sample.each()) for text in examples] == [2]


def test_the_tables_of_what_can_be_asked_are_made_from_the_code() -> None:
    """`python docs/tables.py` writes them, and those of measurements."""
    for document in tables.TABLES:
        assert tables.written(document) == (tables.FOLDER / document).read_text(), document
    assert tables.COMMANDS.read_text() == tables.command_line()


def test_every_key_that_the_parser_knows_is_in_the_document_and_no_other() -> None:
    samplers = {name for row in table("Samplers", "name") for name in re.findall(r"`([^`]+)`", row[0])}
    assert {name for name in samplers if not name.startswith(("k_", "sample_"))} == {
        *SAMPLERS,
        *SAMPLER_SYNONYMS,
        *ABSENT_SAMPLERS,
    }
    assert {name for row in table("Schedules", "name") for name in re.findall(r"`([^`]+)`", row[0])} == {
        *SCHEDULES,
        "original",
        *TABLES,
        *FLOW_TABLES,
    }
    assert sorted(names(TOP_LEVEL)) == sorted(TOP)
    process = names(table(TRAINERS, "key of `process`"))
    model = names(table(TRAINERS, "key of `model`"))
    assert set(PROCESS_KEYS) <= set(process) and {*MODEL_KEYS} <= set(model)
    assert set(UNUSED_KEYS) <= {*process, *model}
    assert sorted(names(FLAG_ROWS)) == sorted(f"--{flag}" for flag in [*FLAGS, *UNUSED_FLAGS])
    assert {*KOHYA_KEYS, *UNUSED_KOHYA_KEYS} - {"prompt_2"} <= set(names(KOHYA))
    assert set(names(table(TRAINERS, "key of `to_folder`"))) <= set(ai_toolkit.GENERATE_PROCESS_KEYS)
    generate = {*ai_toolkit.GENERATE_KEYS, *ai_toolkit.UNUSED_GENERATE_KEYS}
    assert set(names(table(TRAINERS, "key of `generate`"))) == generate


@pytest.mark.parametrize(
    ("program", "known", "unused"),
    [
        ("kohya", kohya.TRAINING_KEYS, kohya.UNUSED_TRAINING_KEYS),
        ("OneTrainer", onetrainer.TRAINING_KEYS, onetrainer.UNUSED_TRAINING_KEYS),
        ("SimpleTuner", simpletuner.KNOWN_KEYS, simpletuner.UNUSED_KEYS),
    ],
)
def test_every_key_of_a_program_is_in_the_document_and_no_other(
    program: str, known: tuple[str, ...], unused: dict[str, str]
) -> None:
    """But those that a training has like all others, which are listed because a key that is read is near to them."""
    listed = {row[0].strip("`") for name, row in PROGRAM_ROWS if name == program}
    assert listed == {*known, *(key for key, reason in unused.items() if reason != FOR_TRAINING)}
    assert not set(known) & set(unused)
    samples = {*onetrainer.OWN_SAMPLE_KEYS, *onetrainer.UNUSED_SAMPLE_KEYS}
    assert set(names(table("7. OneTrainer", "key of a sample"))) == samples
