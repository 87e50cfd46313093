"""Weights of words: brackets are read as kohya's scripts, Forge and ComfyUI read them, and weigh the states by their formulas."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import eridiff
from eridiff.errors import ConfigError
from eridiff.inference import DiffusionInference
from eridiff.text.emphasis import pieces, unweighted
from eridiff.text.tokenizers import published_clip_tokenizer, tokens_of
from eridiff.training import Sampler
from tests import tiny
from tests.test_text import published_t5  # noqa: F401  # a fixture

TENTH, LESS = 1.1, 1 / 1.1
WORDS = [("a", 1.0), ("big", 1.5), ("swan", 0.25), ("on", 1.0), ("mars", -1.0)]
WEIGHED, PLAIN = "a (big:1.5) (swan:0.25) on (mars:-1)", "a big swan on mars"
PROGRAMS = {"unet": ("kohya", "a1111", "comfyui"), "mmdit": ("a1111", "comfyui"), "flux": ("a1111", "comfyui")}
CASES = [(family, program) for family, programs in PROGRAMS.items() for program in programs]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    write = {"unet": tiny.write_sdxl_model, "mmdit": tiny.write_sd3_model, "flux": tiny.write_model}
    return {name: tiny.load(DiffusionInference, make(folder / name)) for name, make in write.items()}


# brackets -------------------------------------------------------------------------------------------------------------

MULTIPLIED = [  # of kohya and of a1111 (library/strategy_base.py, line 112; backend/text_processing/parsing.py, line 23)
    ("a (swan) on [mars]", [("a ", 1), ("swan", TENTH), (" on ", 1), ("mars", LESS)]),
    ("((big:1.5) swan:2)", [("big", 1.5 * 2), (" swan", 2)]),
    ("(((swan)))", [("swan", TENTH * TENTH * TENTH)]),
    (r"a \(swan\) \[on\] \\ m\ars", [(r"a (swan) [on] \ mars", 1)]),
    ("a (swan on mars", [("a ", 1), ("swan on mars", TENTH)]),
    ("a [swan", [("a ", 1), ("swan", LESS)]),
    ("a swan:1.3) on] mars", [("a swan:1.3) on] mars", 1)]),
    ("(swan)(fox)", [("swanfox", TENTH)]),
    ("(a [b) c]", [("a ", TENTH), ("b", TENTH * LESS), (" c", LESS)]),
    ("(at 10:30)", [("at 10", 30)]),
    ("()", [("", 1)]),
    ("", [("", 1)]),
]
INTERPOLATED = [  # of comfyui (comfy/sd1_clip.py, token_weights and parse_parentheses)
    ("a (swan:1.3) on [mars]", [("a ", 1), ("swan", 1.3), (" on [mars]", 1)]),
    ("((big:1.5) swan:2)", [("big", 1.5), (" swan", 2)]),
    ("((swan) fox)", [("swan", TENTH * TENTH), (" fox", TENTH)]),
    ("(swan:fox)", [("swan:fox", TENTH)]),
    ("(:1.3)", [(":1.3", TENTH)]),
    ("(swan: 1e1 )", [("swan", 10)]),
    (r"a \(swan\)", [("a (swan)", 1)]),
    ("a (swan on mars", [("a ", 1), ("(swan on mars", 1)]),
    ("a) (swan:1.3) b", [("a) (swan:1.3) b", 1)]),
    ("((a)", [("(a", TENTH)]),
    ("", [("", 1)]),
]


@pytest.mark.parametrize("program", ["kohya", "a1111"])
@pytest.mark.parametrize(("text", "expected"), MULTIPLIED)
def test_brackets_multiply_as_in_kohyas_scripts_and_forge(program: str, text: str, expected: list[Any]) -> None:
    found = pieces(text, program)
    assert [piece for piece, _ in found] == [piece for piece, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize(("text", "expected"), INTERPOLATED)
def test_brackets_set_weights_as_in_comfyui(text: str, expected: list[Any]) -> None:
    found = pieces(text, "comfyui")
    assert [piece for piece, _ in found] == [piece for piece, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


def test_blanks_around_a_number_are_allowed_by_forge_alone() -> None:
    assert pieces("(swan: 1.3 )", "a1111") == [("swan", 1.3)]
    assert pieces("(swan: 1.3 )", "kohya") == [("swan: 1.3 ", TENTH)]


@pytest.mark.parametrize("program", ["kohya", "a1111", "comfyui"])
def test_brackets_may_be_deep(program: str) -> None:
    ((text, weight),) = pieces("(" * 2000 + "a" + ")" * 2000, program)
    assert text == "a" and weight == pytest.approx(1.1**2000)


@pytest.mark.parametrize(
    "text", ["(a" * 10000 + ")" * 10000, "(" * 10001 + "a" + ")" * 10000, "(a:1.1" * 5000 + ")" * 5000]
)
@pytest.mark.parametrize("program", ["kohya", "a1111", "comfyui"])
def test_letters_between_ten_thousand_brackets_are_kept(program: str, text: str) -> None:
    assert "".join(piece for piece, _ in pieces(text, program)).count("a") == text.count("a")


def test_a_weight_that_is_not_a_number_is_an_error() -> None:
    with pytest.raises(ConfigError, match="the weight '1.2.3' in a prompt is not a number"):
        pieces("a (swan:1.2.3)", "kohya")


@given(st.text("ab ()[]:\\.1", max_size=20))
def test_any_text_is_read_and_none_leaves_it_as_it_stands(text: str) -> None:
    assert pieces(text, "none") == [(text, 1.0)]
    for program in ("kohya", "a1111", "comfyui"):
        try:
            found = pieces(text, program)
        except ConfigError:
            assert program != "comfyui" and re.search(r":\s*[.1]+\s*\)", text)
            continue
        letters = [c for c in text if c in "ab"]
        assert [c for piece, _ in found for c in piece if c in "ab"] == letters
        assert unweighted(text, program) == "".join(piece for piece, _ in found)


# states ---------------------------------------------------------------------------------------------------------------


def of_words(tokenizer: Any, rows: int, begin: int, words: list[tuple[str, float]] = WORDS) -> Tensor:
    """The weight of each row, by the tokens of each word alone: `[1, rows, 1]`."""
    own = [w for word, w in words for _ in tokenizer(word, add_special_tokens=False).input_ids]
    return torch.tensor([1.0] * begin + own + [1.0] * (rows - begin - len(own)))[None, :, None]


def by_formula(program: str, states: Tensor, factor: Tensor, empty: Tensor) -> Tensor:
    """Weighted states `[1, T, D]` of one window, as the three programs write them down."""
    if program == "comfyui":
        return empty + (states - empty) * factor
    scaled = states * factor
    return scaled if program == "kohya" else scaled * states.mean() / scaled.mean()


def clip_states(encoder: Any, text: str) -> Tensor:
    """By transformers' own tokenizer and module: the last but one layer of one window."""
    pad = encoder.tokenizer.eos_token_id if encoder.name == "CLIP-L" else 0
    ids = encoder.tokenizer(text).input_ids
    told = torch.tensor([ids + [pad] * (77 - len(ids))])
    return encoder.module(input_ids=told, output_hidden_states=True).hidden_states[-2]


def t5_states(encoder: Any, text: str, rows: int) -> Tensor:
    ids = encoder.tokenizer(text).input_ids
    return encoder.module(input_ids=torch.tensor([ids + [0] * (rows - len(ids))])).last_hidden_state


@pytest.mark.parametrize(("family", "program"), CASES)
@torch.no_grad()
def test_weights_act_on_the_states_of_their_tokens(family: str, program: str, models: dict[str, Any]) -> None:
    model = models[family]
    found = model.encode_prompt(WEIGHED, prompt_weights=program, cfg_scale=1.0).positive
    plain = model.encode_prompt(PLAIN, cfg_scale=1.0).positive
    assert torch.equal(found.pooled, plain.pooled)
    at = 0
    if family != "flux":
        for encoder in (model.clip, model.clip_g):
            factor = of_words(encoder.tokenizer, 77, 1)
            states, empty = (clip_states(encoder, text) for text in (PLAIN, ""))
            own = found.text[:, :77, at : at + 8]
            assert torch.allclose(own, by_formula(program, states, factor, empty), atol=2e-6, rtol=1e-5)
            at += 8
    if family != "unet":
        rows = found.text[:, 77:] if family == "mmdit" else found.text
        factor = of_words(model.t5.tokenizer, rows.shape[1], 0)
        states, empty = (t5_states(model.t5, text, rows.shape[1]) for text in (PLAIN, ""))
        assert torch.allclose(rows, by_formula(program, states, factor, empty), atol=2e-6, rtol=1e-5)
    assert not torch.allclose(found.text, plain.text, atol=1e-3)


@pytest.mark.parametrize("program", PROGRAMS["unet"])
@torch.no_grad()
def test_weights_follow_their_words_into_the_window_that_reads_them(program: str, models: dict[str, Any]) -> None:
    model = models["unet"]
    before = " ".join(["fox"] * 40)
    tokens = [len(model.clip.tokenizer(before, add_special_tokens=False).input_ids), 75]
    assert tokens[0] < tokens[1] * 2
    words = [(word, 1.0) for word in before.split()] + [("swan", 2.0)]
    own = [(t, w) for word, w in words for t in model.clip.tokenizer(word, add_special_tokens=False).input_ids]
    windows = [own[i : i + 75] for i in range(0, len(own), 75)]
    found = model.encode_prompt(f"{before} (swan:2)", prompt_weights=program, clip_windows="all", cfg_scale=1.0)
    assert len(windows) > 1 and found.positive.text.shape[1] == 77 * len(windows)
    for i, window in enumerate(windows):
        for at, encoder in ((0, model.clip), (8, model.clip_g)):
            pad = encoder.pad
            row = [encoder.tokenizer.bos_token_id, *(t for t, _ in window), encoder.end]
            ids = torch.tensor([row + [pad] * (77 - len(row))])
            factor = torch.tensor([1.0, *(w for _, w in window)] + [1.0] * (76 - len(window)))[None, :, None]
            states = encoder.module(input_ids=ids, output_hidden_states=True).hidden_states[-2]
            expected = by_formula(program, states, factor, clip_states(encoder, ""))
            part = found.positive.text[:, 77 * i : 77 * (i + 1), at : at + 8]
            assert torch.allclose(part, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("family", "program"), CASES)
def test_a_weight_of_one_changes_no_bit(family: str, program: str, models: dict[str, Any]) -> None:
    model = models[family]
    plain = model.encode_prompt(PLAIN, "a fox", cfg_scale=2.0)
    for text in (PLAIN, "a (big swan:1.0) on mars", "(a (big:1) swan on mars:1.0)"):
        found = model.encode_prompt(text, "(a fox:1)", cfg_scale=2.0, prompt_weights=program)
        for one, other in ((found.positive, plain.positive), (found.negative, plain.negative)):
            assert torch.equal(one.text, other.text) and torch.equal(one.pooled, other.pooled)


def test_pieces_of_a_text_have_the_tokens_of_its_words(published_t5: Any) -> None:  # noqa: F811
    """With the published vocabularies: what a bracket cuts apart at a blank is read as before."""
    text, words = (
        "a photo of (a big swan:1.3) on (mars)",
        [("a photo of", 1.0), ("a big swan", 1.3), ("on", 1.0), ("mars", TENTH)],
    )
    for tokenizer in (published_clip_tokenizer(), published_t5):
        expected = [(t, w) for part, w in words for t in tokenizer(part, add_special_tokens=False).input_ids]
        assert [t for t, _ in expected] == tokenizer(unweighted(text, "kohya"), add_special_tokens=False).input_ids
        for program in ("kohya", "a1111", "comfyui"):
            _, own, _ = tokens_of(tokenizer, pieces(text, program))
            assert own == expected


@pytest.mark.parametrize("family", PROGRAMS)
def test_without_a_program_brackets_are_text(family: str, models: dict[str, Any]) -> None:
    model = models[family]
    text = "a (swan:1.3) on [mars]"
    unsaid, none = model.encode_prompt(text).positive, model.encode_prompt(text, prompt_weights="none").positive
    assert torch.equal(unsaid.text, none.text) and torch.equal(unsaid.pooled, none.pooled)
    assert not torch.allclose(unsaid.pooled, model.encode_prompt("a swan on mars").positive.pooled, atol=1e-4)


def test_a_small_model_knows_weighted_words(caplog: pytest.LogCaptureFixture) -> None:
    model = eridiff.load("tiny-flux", device="cpu", progress=False)
    asked: dict[str, Any] = {"seed": 1, "steps": 1, "prompt_weights": "a1111"}
    weighed, plain = (model.generate(text, **asked) for text in ("a (swan:1.4) on mars", "a swan on mars"))
    assert weighed.images[0].tobytes() != plain.images[0].tobytes()
    assert not [record for record in caplog.records if record.name.startswith("eridiff")]
    assert weighed.settings[0]["prompt"] == "a (swan:1.4) on mars"
    again = model.generate(eridiff.Request.from_json(weighed.settings[0]))
    assert again.images[0].tobytes() == weighed.images[0].tobytes()


def test_a_sampler_encodes_with_weights_and_records_them(models: dict[str, Any], tmp_path: Path) -> None:
    model, asked = models["mmdit"], {"steps": 1, "width": 32, "height": 32, "seed": 1, "prompt_weights": "comfyui"}
    section = {"prompts": [WEIGHED], **asked, "out": str(tmp_path / "out")}
    for folder in (None, tmp_path / "kept", tmp_path / "kept"):
        samples = Sampler(model, section, embeddings=folder, raise_errors=True).sample(0)
        assert samples.images[0].tobytes() == model.generate(WEIGHED, **asked).images[0].tobytes()
        assert (samples.settings[0]["prompt"], samples.settings[0]["prompt_weights"]) == (WEIGHED, "comfyui")
