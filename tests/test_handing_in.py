"""What a trainer holds, handed in as it is: text encoders and tokenizers, cached embeddings, numbers of NumPy, wrong attempts.

Nothing here needs diffusers, so that `make oldest` runs it.
"""

import logging
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

import eridiff
from eridiff import ClipEncoder, T5Encoder
from eridiff.errors import ConfigError
from eridiff.text.tokenizers import clip_tokenizer, published_clip_tokenizer, t5_tokenizer, token_ids
from tests import tiny

CLIP_TOKENIZER, T5_TOKENIZER = clip_tokenizer(tiny.TOKENIZERS / "clip"), t5_tokenizer(tiny.TOKENIZERS / "t5")


def without_projection() -> Any:
    """The text model of `tiny.clip_module()` as trainers of Flux and SDXL hold it."""
    whole = tiny.clip_module()
    module = CLIPTextModel(CLIPTextConfig(**{**whole.config.to_dict(), "architectures": None})).eval()
    tensors = {n.removeprefix("text_model."): t for n, t in whole.state_dict().items() if n != "text_projection.weight"}
    prefix = "text_model." if hasattr(module, "text_model") else ""
    module.load_state_dict({prefix + name: tensor for name, tensor in tensors.items()})
    return module


class Slow:
    """A tokenizer that is written in Python, as transformers 4 has them: it tells no offsets."""

    def __init__(self, fast: Any) -> None:
        self.fast = fast

    def __len__(self) -> int:
        return len(self.fast)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fast, name)

    def __call__(self, text: str, **options: Any) -> Any:
        if "return_offsets_mapping" in options:
            raise NotImplementedError("return_offset_mapping is not available when using Python tokenizers")
        return self.fast(text, **options)


# text encoders --------------------------------------------------------------------------------------------------------


def test_a_clip_without_projection_gives_the_same_states_and_no_other_pooled_vector() -> None:
    whole, bare = (ClipEncoder(m, CLIP_TOKENIZER) for m in (tiny.clip_module(), without_projection()))
    ids = whole.tokenize(["a photo of a cat", ""])
    expected, found = whole(ids), bare(ids)
    assert all(torch.equal(a, b) for a, b in zip(expected.hidden, found.hidden, strict=True))
    assert torch.equal(expected.last, found.last) and torch.equal(expected.pooled, found.pooled)
    assert torch.equal(found.projected, found.pooled)


def test_a_clip_g_without_projection_is_refused_by_the_name_of_the_right_class() -> None:
    with pytest.raises(
        ConfigError, match="CLIP-G is a CLIPTextModel without .* load it as CLIPTextModelWithProjection"
    ):
        ClipEncoder(without_projection(), CLIP_TOKENIZER, pad=0, name="CLIP-G")


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrapped_encoders_are_used_without_their_wrappers(wrap: Any) -> None:
    clip, t5 = tiny.clip_module(), tiny.t5_module()
    assert ClipEncoder(wrap(clip), CLIP_TOKENIZER).module is clip
    assert T5Encoder(wrap(t5), T5_TOKENIZER, 16).module is t5


def test_an_encoder_in_bfloat16_may_be_made_to_give_float32() -> None:
    """As accelerate's mixed precision does, by another `forward`."""
    module = tiny.clip_module().bfloat16()
    encoder = ClipEncoder(module, CLIP_TOKENIZER)
    ids = encoder.tokenize(["a cat"])
    expected, forward = encoder(ids).projected, module.forward

    def converted(**options: Any) -> Any:
        output = forward(**options)
        return type(output)(
            {n: v.float() if torch.is_tensor(v) else tuple(x.float() for x in v) for n, v in output.items()}
        )

    module.forward = converted
    assert torch.equal(encoder(ids).projected, expected)


@pytest.mark.parametrize("whole_words", [False, True])
def test_a_slow_tokenizer_cuts_a_long_prompt_as_a_fast_one(whole_words: bool, caplog: pytest.LogCaptureFixture) -> None:
    prompt = " ".join(f"swan{i}, don't stop" for i in range(30))
    for fast, length in ((published_clip_tokenizer(), 77), (T5_TOKENIZER, 100)):
        with caplog.at_level(logging.WARNING):
            expected = token_ids(fast, prompt, length, 0, "it", whole_words)
            found = token_ids(Slow(fast), prompt, length, 0, "it", whole_words)
        assert found == expected and caplog.records[-1].getMessage() == caplog.records[-2].getMessage()


def test_the_slow_tokenizers_of_transformers_4_are_taken() -> None:
    if transformers.CLIPTokenizer is transformers.CLIPTokenizerFast:  # transformers 5: there are none
        assert transformers.__version__ >= "5"
        return
    slow = transformers.CLIPTokenizer.from_pretrained(tiny.TOKENIZERS / "clip")
    assert not slow.is_fast
    encoders = [ClipEncoder(tiny.clip_module(), tokenizer) for tokenizer in (slow, CLIP_TOKENIZER)]
    for prompt in ("a cat", "a swan on mars " * 30):
        ids = [encoder.tokenize([prompt], whole_words=True) for encoder in encoders]
        assert torch.equal(*ids)
    assert encoders[0].windows_needed(["a swan on mars " * 30]) == encoders[1].windows_needed(["a swan on mars " * 30])


def test_the_encoders_are_names_of_the_package() -> None:
    assert eridiff.ClipEncoder is ClipEncoder and {"ClipEncoder", "T5Encoder"} <= {*eridiff.__all__}
