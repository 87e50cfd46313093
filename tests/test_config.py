"""The YAML of people's training runs is read as they meant it, or refused in a sentence with the line."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from eridiff.cli import main
from eridiff.config import parse_config
from eridiff.errors import ConfigError
from eridiff.inference.section import settle_guidance
from eridiff.run_files import load_config
from eridiff.yaml_reader import read_yaml

PLAN = """
sample:
  prompts: ["a white swan on mars"]
  sample_every: 100
  sample_steps: 30
  cfg_scale: 7.5
  seed: 42
  use_lora: true
  lora_scale: 1.0
"""


def test_the_plans_section_is_accepted_as_it_stands() -> None:
    config = parse_config(read_yaml(PLAN))
    sample = config.sample
    assert sample.each() == [
        {"prompt": "a white swan on mars", "steps": 30, "cfg_scale": 7.5, "seed": 42, "lora_scale": 1.0}
    ]
    assert sample.use_lora is True
    assert config.notices == ("without effect here: sample_every (it is for training)",)


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("yes", "yes"), ("No", "No"), ("on", "on"), ("true", True), ("FALSE", False), ("tRue", "tRue"), ("y", "y"), ("~", None),
        ("null", None), ("", None), ("none", "none"), ("nan", "nan"), ("1e-4", 1e-4), ("5E-5", 5e-5), ("1.0e4", 1e4), ("12e03", 12000.0),
        (".5", 0.5), ("-.5", -0.5), ("5.", 5.0), ("1:30", "1:30"), ("16:9", "16:9"), ("010", 10), ("08", 8), ("0x1F", "0x1F"),
        ("0o10", "0o10"), ("1_000", "1_000"), ("1024x1024", "1024x1024"), ("+1", 1), ("-0", 0), ("2024-01-05", "2024-01-05"), ("=", "="),
        ("<<", "<<"), ("0.1.2", "0.1.2"), (".inf", ".inf"), ("42 # seed", 42), ("42# seed", "42# seed"), (r"C:\models\x", r"C:\models\x"),
        ("(swan:1.2), mars", "(swan:1.2), mars"), ("a#b", "a#b"), ("don't panic", "don't panic"), ("3:30pm, a clock", "3:30pm, a clock"),
        ("50% grey", "50% grey"), ("--n blurry", "--n blurry"), ('"a: b"', "a: b"), ("123456789012345678901234567890", 123456789012345678901234567890),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(written: str, wanted: Any) -> None:
    found = read_yaml(f"v: {written}")["v"]
    assert found == wanted and type(found) is type(wanted)


def test_the_processs_own_yaml_is_untouched() -> None:
    assert yaml.safe_load("v: yes")["v"] is True


BAD = {
    "a duplicate key": ("sample:\n  seed: 1\n  seed: 2\n", "line 3: the key 'seed' is repeated, first in line 2"),
    "a colon in a prompt": ("sample:\n  prompts:\n    - a swan: on mars\n", 'prompt 1 has a colon and must be quoted: - "a swan: on mars"'),
    "fields of a prompt": ("sample:\n  prompts:\n    - {prompt: a swan, seed: 3}\n", "prompt 1 has fields of its own: write 'samples:' in place of 'prompts:'"),
    "a colon at its end": ("sample:\n  prompts:\n    - a, b, c:\n", 'must be quoted: - "a, b, c:"'),
    "a colon in a value": ("sample:\n  neg: a swan: mars\n", "line 2: .* must be quoted, here perhaps 'a swan: mars'"),
    "a comment for a prompt": ("sample:\n  prompts:\n    - #tag swan\n", "prompt 1 is empty; '#' begins a comment"),
    "a bracket": ("sample:\n  prompts:\n    - [trigger] a swan\n", "line 3: .* must be quoted, here perhaps '\\[trigger\\] a swan'"),
    "a bracket alone": ("sample:\n  prompts:\n    - [trigger]\n", r"prompt 1 begins with '\['"),
    "an alias": ("sample:\n  prompts:\n    - *important* swan\n", "line 3: "),
    "an anchor": ("sample:\n  prompts:\n    - &x swan\n", "line 3: '&' begins an anchor"),
    "a tag": ("sample:\n  prompts:\n    - !swan\n", "line 3: "),
    "an at sign": ("sample:\n  prompts:\n    - @x\n", "line 3: .* must be quoted"),
    "text after quotes": ('sample:\n  prompts:\n    - "a" b\n', "line 3: "),
    "a number for a prompt": ("sample:\n  prompts: [42]\n", 'prompt 1 is read as an int; quote it: - "42"'),
    "a bool for a prompt": ("sample:\n  prompts: [true]\n", 'quote it: - "True"'),
    "no prompts": ("sample:\n  prompts: []\n", "list of prompts is empty"),
    "a misspelt key": ("sample:\n  sample_step: 3\n", "'sample_step' is not a key of sample; did you mean 'sample_steps'"),
    "a capital": ("sample:\n  Seed: 3\n", "'Seed' is not a key of sample; did you mean 'seed'"),
    "an unknown key": ("sample:\n  qqqq: 3\n", "'qqqq' is not a key of sample; there are"),
    "an option of the model in a section": ("sample:\n  memory: {vram: 24GiB}\n", "'memory' is not a key of sample; write vram: 24GiB at the top of the file"),
    "the same in one of its own": ("memory:\n  vram: 24GiB\n  vae_rows: 64\n", "not a key of the file; write vram: 24GiB and vae_rows: 64 at the top of the file"),
    "the same among those of images": ("sample:\n  compile: true\n", "'compile' is not a key of sample; write compile: true at the top of the file"),
    "the same of one image": ("sample:\n  samples: [{prompt: a, dtype: bf16}]\n", "entry 1; write dtype: bf16 at the top of the file"),
    "an unknown section": ("samples:\n  seed: 3\n", "'samples' belongs under 'sample:'"),
    "a tab": ("sample:\n\tseed: 1\n", "line 2: a tab where spaces are needed"),
    "a backslash": ('sample:\n  out: "C:\\models"\n', "line 2: a backslash in double quotes .* single quotes"),
    "two documents": ("sample:\n  seed: 1\n---\nsample: 2\n", "line 3: a second document"),
    "empty": ("# nothing\n", "the file is empty"),
    "a list": ("- a\n", "a mapping with a section 'sample' is expected, not list"),
    "a section that is text": ("sample: x\n", "sample must be a mapping"),
    "a number beyond all": (f"sample:\n  guidance_scale: 1{'0' * 400}\n", "sample: guidance_scale is too large a number"),
    "text for a number": ("sample:\n  sample_steps: many\n", "sample: sample_steps must be a whole number, not 'many'"),
    "thousands": ("sample:\n  seed: 1_000\n", "must be a whole number, not '1_000'; write 1000"),
    "a float for steps": ("sample:\n  sample_steps: 4.5\n", "must be a whole number, not 4.5"),
    "yes for a bool": ("sample:\n  walk_seed: yes\n", "must be true or false, not 'yes'"),
    "a synonym twice": ("sample:\n  neg: a\n  negative_prompt: b\n", "both mean negative"),
    "a Python tag": ("sample: !!python/object/apply:os.system [x]\n", "line 1: "),
    "nested too deep": ("[" * 3000, "nested too deep|line 1"),
    "a control character": ("sample:\n  neg: a\x07b\n", "a character that YAML does not allow|special characters"),
    "an unknown part": ("model: {network: x}\nsample:\n  prompts: [x]\n", "'network' is not a part of a model"),
    "two guidances": ("sample:\n  prompts: [x]\n  cfg_scale: 2\n  true_cfg_scale: 2\n", "keep true_cfg_scale"),
    "a size that does not fit": ("sample:\n  prompts: [x]\n  width: 1000\n", "width must be a multiple of 16, not 1000; the nearest is 992"),
    "no steps": ("sample:\n  prompts: [x]\n  sample_steps: 0\n", "at least one step, not 0"),
    "a negative seed": ("sample:\n  prompts: [x]\n  seed: -1\n", "the seed must be"),
    "an unknown dtype": ("dtype: half\nsample:\n  prompts: [x]\n", "dtype must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_sentence(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    text, says = BAD[case]
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert main(["sample", str(path), "--out", str(tmp_path / "out"), "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.search(says, err), err
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_missing_or_no_utf8_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none.yaml: is not a file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("sample: {neg: h\xe4sslich}".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfsample:\r\n  prompts: [a swan]\r\n")
    assert load_config(tmp_path / "a.yaml").sample.prompts == ("a swan",)


def test_cfg_scale_means_what_the_network_has() -> None:
    class Net:
        def __init__(self, family: str, embedding: bool) -> None:
            self.family, self.guidance_embedding = family, embedding

    def settled(words: dict[str, float], family: str, embedding: bool) -> tuple[dict[str, Any], str]:
        values, notices = settle_guidance(words, Net(family, embedding))  # type: ignore[arg-type]
        return values, " ".join(notices)

    values, told = settled({"cfg_scale": 7.5}, "flux", True)
    assert values == {"guidance_scale": 7.5} and "taken as guidance_scale" in told
    values, told = settled({"cfg_scale": 7.5}, "flux", False)
    assert values == {} and "no effect" in told
    both = {"cfg_scale": 2.0, "guidance_scale": 3.5}
    assert settled(both, "flux", True) == ({"guidance_scale": 3.5, "cfg_scale": 2.0}, "")
    values, told = settled({"guidance_scale": 6.0}, "unet", False)
    assert values == {"cfg_scale": 6.0} and "is taken as cfg_scale 6" in told
    assert settled({"guidance_scale": 6.0}, "unet", True) == ({"guidance_scale": 6.0}, "")  # lcm-sdxl has an embedding
    assert settled({"true_cfg_scale": 2.0}, "flux", False) == ({"cfg_scale": 2.0}, "")


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff\ufffe\uffff"), min_size=1),
        min_size=1,
        max_size=4,
    )
)
def test_any_prompt_survives_in_quotes(prompts: list[str]) -> None:
    text = yaml.safe_dump({"sample": {"prompts": prompts}}, default_style='"', allow_unicode=True)
    assert parse_config(read_yaml(text)).sample.prompts == tuple(prompt.strip() for prompt in prompts)


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("original_size: 1024", "sample: original_size must be WIDTHxHEIGHT such as 1024x768, not 1024"),
        ("target_size: [1024, 768]", "sample: target_size must be WIDTHxHEIGHT"),
        ("crop: 64", r"sample: crop must be two numbers, top and left, such as \[0, 64\], not 64"),
        ("crop: [0, 1.5]", "sample: crop must be a whole number, not 1.5"),
        ("aesthetic_score: high", "sample: aesthetic_score must be a number, not 'high'"),
    ],
)
def test_sizes_that_cannot_be_read_end_in_a_sentence(written: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_config(read_yaml(f"sample:\n  {written}\n"))


def test_sizes_are_written_width_first_and_read_height_first() -> None:
    sample = parse_config(read_yaml("sample:\n  original_size: 1024x768\n  crop: [8, 16]\n")).sample
    assert sample.shared == {"original_size": (768, 1024), "crop": (8, 16)}
