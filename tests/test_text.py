"""Tokenizers and encoders: the traps that change an image without an error."""

import importlib.util
import json
import logging
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from eridiff.errors import CheckpointError
from eridiff.inference import DiffusionInference, Prompt
from eridiff.text.encoders import ClipEncoder, T5Encoder, build_encoder
from eridiff.text.tokenizers import clip_tokenizer, published_clip_tokenizer, t5_tokenizer, token_ids
from eridiff.trace.record import relative_l2
from eridiff.training import EmbeddingCache
from eridiff.weights.detect import component_of
from eridiff.weights.header import open_checkpoint
from tests import tiny

GOLDENS = Path(__file__).parent / "goldens"
TINY = json.loads((GOLDENS / "text-tokenizers-tiny" / "case.json").read_text())
PUBLISHED = json.loads((GOLDENS / "text-tokenizers-published" / "case.json").read_text())


@pytest.fixture(scope="module")
def published_t5() -> Any:
    spec = importlib.util.find_spec("diffsynth")
    assert spec is not None and spec.submodule_search_locations, "make test installs diffsynth for its tokenizer"
    return t5_tokenizer(Path(spec.submodule_search_locations[0]) / "tokenizer_configs" / "flux" / "tokenizer_2")


def ids(tokenizer: Any, prompt: str) -> list[int]:
    return list(tokenizer(prompt, verbose=False).input_ids)


def test_the_shipped_clip_vocabulary_is_the_published_one() -> None:
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49408
    wrong = [row["prompt"] for row in PUBLISHED["rows"] if ids(tokenizer, row["prompt"]) != row["clip"]]
    assert wrong == []


def test_the_published_t5_vocabulary_gives_the_published_ids(published_t5: Any) -> None:
    wrong = [row["prompt"] for row in PUBLISHED["rows"] if ids(published_t5, row["prompt"]) != row["t5"]]
    assert wrong == []


def test_folders_of_other_vocabularies_give_their_own_ids() -> None:
    clip, t5 = clip_tokenizer(tiny.TOKENIZERS / "clip"), t5_tokenizer(tiny.TOKENIZERS / "t5")
    for row in TINY["rows"]:
        assert (ids(clip, row["prompt"]), ids(t5, row["prompt"])) == (row["clip"], row["t5"]), row["prompt"]


def test_padding_and_cutting_are_the_references() -> None:
    clip, t5 = clip_tokenizer(tiny.TOKENIZERS / "clip"), t5_tokenizer(tiny.TOKENIZERS / "t5")
    for tokenizer, length, pad, key in ((clip, 77, 842, "clip, 77"), (t5, 16, 0, "t5, 16")):
        padded = TINY["padded"][key]
        text = tokenizer.decode([i for i in padded if i not in (pad, 1, 841, 842)])
        assert token_ids(tokenizer, text, length, pad, "it") == padded
        assert token_ids(tokenizer, TINY["windows_of_75"]["prompt"], length, pad, "it") == TINY["truncated"][key]


def test_a_prompt_that_does_not_fit_warns_with_the_words_that_are_cut(caplog: pytest.LogCaptureFixture) -> None:
    words = [f"swan{i}" for i in range(40)]
    with caplog.at_level(logging.WARNING):
        found = token_ids(published_clip_tokenizer(), " ".join(words), 77, 49407, "CLIP-L")
    (record,) = caplog.records
    kept = published_clip_tokenizer().decode(found[1:-1]).replace(" ", "")
    cut = record.getMessage().split("'")[1].split()
    assert "CLIP-L takes 77 tokens" in record.getMessage()
    assert words[-len(cut) :] == cut  # the end of the prompt, whole words
    assert "".join(words).startswith(kept)
    assert len("".join(words)) - len("".join(cut)) <= len(kept)  # nothing is lost unnamed
    assert found[-1] == 49407


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=300), st.integers(2, 77))
def test_any_text_gives_exactly_the_length_with_the_end_kept(text: str, length: int) -> None:
    tokenizer = clip_tokenizer(tiny.TOKENIZERS / "clip")
    found = token_ids(tokenizer, text, length, 842, "it")
    whole = ids(tokenizer, text)
    assert len(found) == length and found[0] == 841 and 842 in found
    assert found[: len(whole)] == whole if len(whole) <= length else found[:-1] == whole[: length - 1]


# damaged folders ------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: random.Random(1).randrange(len(content) // 2, len(content) - 20)])


def with_hole(path: Path) -> None:
    vocabulary = json.loads(path.read_text())
    vocabulary.pop(next(iter(vocabulary)))
    path.write_text(json.dumps(vocabulary))


def with_double(path: Path) -> None:
    vocabulary = json.loads(path.read_text())
    first, second = list(vocabulary)[:2]
    path.write_text(json.dumps({**vocabulary, first: vocabulary[second]}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: shutil.rmtree(f) or f.mkdir(), "lacks vocab.json"),
        (lambda f: (f / "vocab.json").unlink(), "lacks vocab.json"),
        (lambda f: (f / "merges.txt").unlink(), "lacks merges.txt"),
        (lambda f: cut(f / "merges.txt"), "do not belong together"),
        (lambda f: cut(f / "vocab.json"), "cannot be read"),
        (lambda f: with_hole(f / "vocab.json"), "without a hole"),
        (lambda f: with_double(f / "vocab.json"), "without a hole"),
        (lambda f: (f / "vocab.json").write_text('{"a": 0}'), "lacks <.startoftext"),
        (lambda f: (f / "vocab.json").write_text("[]"), "cannot be read"),
    ],
)
def test_a_damaged_clip_tokenizer_is_one_sentence(change: Callable[[Path], object], says: str, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(tiny.TOKENIZERS / "clip", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    assert len(clip_tokenizer(folder)) == 843
    change(folder)
    with pytest.raises(CheckpointError, match=says) as error:
        clip_tokenizer(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no tokenizer.json"),
        ("cut", "download it again"),
        ("{}", "cannot|download"),
        ("clip", "not a T5 tokenizer|download"),
    ],
)
def test_a_damaged_t5_tokenizer_is_one_sentence(content: str | None, says: str, tmp_path: Path) -> None:
    whole = (tiny.TOKENIZERS / "t5" / "tokenizer.json").read_text()
    if content == "cut":
        (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2])
    elif content == "clip":
        published_clip_tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    elif content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=says) as error:
        t5_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_spiece_alone_names_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spiece.model").write_bytes(b"x")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="sentencepiece and protobuf"):
        t5_tokenizer(tmp_path)


def test_no_t5_tokenizer_says_what_to_put_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eridiff.text.tokenizers.T5_CACHED", [])
    with pytest.raises(CheckpointError, match="tokenizer.json .*'tokenizers: {t5: PATH}'"):
        t5_tokenizer()


def test_a_tokenizer_larger_than_the_embedding_is_refused() -> None:
    with pytest.raises(CheckpointError, match="843 tokens, its encoder only 800"):
        ClipEncoder(tiny.clip_module(800), clip_tokenizer(tiny.TOKENIZERS / "clip"))
    with pytest.raises(CheckpointError, match="318 tokens, its encoder only 300"):
        T5Encoder(tiny.t5_module(300), t5_tokenizer(tiny.TOKENIZERS / "t5"), 16)


# encoders -------------------------------------------------------------------------------------------------------------


def built(
    tmp_path: Path, network: str, tensors: dict[str, torch.Tensor], metadata: dict[str, Any] | None = None
) -> Any:
    tmp_path.mkdir(exist_ok=True)
    path = tmp_path / f"{network}.safetensors"
    save_file(
        {n: t.clone() for n, t in tensors.items()},
        path,
        metadata={"eridiff.config": json.dumps({network: metadata or {}})},
    )
    return build_encoder(component_of(open_checkpoint(path), network))


CLIP_CONFIG = {"num_attention_heads": 2, "hidden_act": "quick_gelu"}


@pytest.mark.parametrize("spelling", ["prefixed", "flat", "with projection", "with position_ids"])
def test_every_spelling_of_clip_gives_the_same_numbers(spelling: str, tmp_path: Path) -> None:
    module = tiny.clip_module()
    state = dict(module.state_dict())
    projection = state.pop("text_projection.weight")
    if spelling == "flat":  # as transformers 5.6 and later write CLIPTextModel
        state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    if spelling == "with projection":
        state["text_projection.weight"] = projection
    if spelling == "with position_ids":
        state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    encoder = ClipEncoder(built(tmp_path, "clip", state, CLIP_CONFIG), clip_tokenizer(tiny.TOKENIZERS / "clip"))
    tokens = encoder.tokenize(["a photo of a cat"])
    found = encoder(tokens)
    with torch.no_grad():
        expected = module.text_model(input_ids=tokens).last_hidden_state
    assert torch.equal(found.last, expected)
    assert torch.equal(found.pooled, expected[:, 6]) and tokens[0, 6] == 842
    matrix = projection if spelling == "with projection" else torch.eye(8)
    assert torch.allclose(found.projected, found.pooled @ matrix.T)
    assert torch.equal(found.pooled, encoder(tokens).pooled)


def test_both_names_of_the_t5_embedding_are_one(tmp_path: Path) -> None:
    module = tiny.t5_module()
    state = dict(module.state_dict())
    embedding = state.pop("shared.weight")
    state.pop("encoder.embed_tokens.weight", None)
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        module.encoder.embed_tokens.weight = module.shared.weight
        expected = module(input_ids=tokens).last_hidden_state
    for names in (["shared.weight"], ["encoder.embed_tokens.weight"], ["shared.weight", "encoder.embed_tokens.weight"]):
        encoder = built(tmp_path, "t5", state | {name: embedding for name in names})
        assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
        assert torch.equal(encoder(input_ids=tokens).last_hidden_state, expected)
    with pytest.raises(CheckpointError, match="must be equal and differ"):
        built(tmp_path, "t5", state | {"shared.weight": embedding, "encoder.embed_tokens.weight": embedding + 1})


@pytest.mark.parametrize("scaled", [True, False])
def test_an_fp8_encoder_equals_its_dequantised_weights(scaled: bool, tmp_path: Path) -> None:
    state = {n: t for n, t in tiny.t5_module().state_dict().items() if n != "encoder.embed_tokens.weight"}
    plain: dict[str, torch.Tensor] = {}
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        quantise = not scaled or ("layer_norm" not in name and "shared" not in name and "bias" not in name)
        scale = tensor.abs().max() / 448 if scaled else torch.tensor(1.0)
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn) if quantise else tensor.bfloat16()
        plain[name] = stored[name].float() * (scale if quantise else 1)  # on a CPU with room all is computed in float32
        if quantise and scaled:
            stored[name.removesuffix("weight") + "scale_weight"] = scale
    tokens = torch.arange(16)[None]
    found = built(
        tmp_path / "fp8", "t5", stored | ({"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)} if scaled else {})
    )
    expected = built(tmp_path / "plain", "t5", plain)
    assert torch.equal(found(input_ids=tokens).last_hidden_state, expected(input_ids=tokens).last_hidden_state)


def test_nothing_is_left_on_the_meta_device(tmp_path: Path) -> None:
    state = {n: t for n, t in tiny.clip_module().state_dict().items() if n != "text_projection.weight"}
    module = built(tmp_path, "clip", state, CLIP_CONFIG)
    assert not any(t.is_meta for t in [*module.parameters(), *module.buffers()])
    assert not module.training and not any(p.requires_grad for p in module.parameters())


def test_padding_is_attended_to_by_t5_and_positions_after_the_end_do_not_reach_clips_pooled_state() -> None:
    t5 = T5Encoder(tiny.t5_module(), t5_tokenizer(tiny.TOKENIZERS / "t5"), 16)
    tokens = t5.tokenize(["a cat"])
    assert not torch.allclose(t5(tokens)[:, :4], t5(tokens[:, :8])[:, :4])
    clip = ClipEncoder(tiny.clip_module(), clip_tokenizer(tiny.TOKENIZERS / "clip"))
    tokens = clip.tokenize(["a cat"])
    other = torch.where(torch.arange(77) > int((tokens[0] == 842).int().argmax()), 5, tokens)
    assert torch.allclose(clip(tokens).pooled, clip(other).pooled)


def test_a_prompt_is_encoded_alike_alone_and_among_others() -> None:
    clip = ClipEncoder(tiny.clip_module(), clip_tokenizer(tiny.TOKENIZERS / "clip"))
    t5 = T5Encoder(tiny.t5_module(), t5_tokenizer(tiny.TOKENIZERS / "t5"), 16)
    prompts = ["a cat", "", "a white swan on mars with a very long neck"]
    for encode in (lambda p: clip(clip.tokenize(p)).pooled, lambda p: t5(t5.tokenize(p))):
        together = encode(prompts)
        for i, prompt in enumerate(prompts):
            assert torch.allclose(together[i : i + 1], encode([prompt]), atol=1e-5)


def test_an_encoder_that_is_only_pickled_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(CheckpointError, match="never opened"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_t5_padding_is_hidden_from_networks_that_were_trained_so(family: str, tmp_path: Path) -> None:
    """A masked prompt gives the image of a prompt without padding, in one batch with a longer one too, and from a cache."""
    folder = (tiny.write_model if family == "flux" else tiny.write_sd3_model)(tmp_path / "m")
    model = tiny.load(DiffusionInference, folder)
    told = model.encode_prompt("a swan", t5_mask=True).positive
    clip_rows = 0 if family == "flux" else 77
    real = int(told.mask[0, clip_rows:].sum())
    assert told.mask[0, :clip_rows].all() and 1 < real < told.mask.shape[1] - clip_rows
    assert not told.mask[0, clip_rows + real :].any()
    cut = replace(told, text=told.text[:, : clip_rows + real], mask=None)
    negative = None if family == "flux" else cut
    options = {"seed": 1, "steps": 2, "keep": ("latents",), "cfg_scale": 1.0}
    bare = model.generate(conditioning=Prompt(cut, negative), **options).latents
    masked = model.generate("a swan", **options, t5_mask=True).latents
    assert relative_l2(masked, bare) < 1e-5
    both = model.generate(["a swan", "a very long tale of a white swan"], **options | {"seed": [1, 1]}, t5_mask=True)
    assert relative_l2(both.latents[:1], bare) < 1e-5
    assert relative_l2(model.generate("a swan", **options).latents, bare) > 1e-4
    kept = EmbeddingCache(model, tmp_path / "kept").encode("a swan", None, t5_mask=True)
    again = EmbeddingCache(model, tmp_path / "kept").encode("a swan", None, t5_mask=True)
    assert torch.equal(kept.positive.mask, told.mask) and torch.equal(again.positive.mask, told.mask)


def test_the_second_clip_of_a_diffusers_folder_is_clip_g_however_small(tmp_path: Path) -> None:
    """As in the small pipelines that tests use, whose depth does not tell it from CLIP-L."""
    for name, network in (("text_encoder", "clip"), ("text_encoder_2", "clip_g")):
        tiny.clip_module().save_pretrained(tmp_path / name)
        assert component_of(open_checkpoint(tmp_path / name), "clip", "clip_g").network == network
