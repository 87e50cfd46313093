"""The text encoders of the built-in small models, frozen and random, their tokenizers' files, and captions encoded.

One token a word. Joint training of the encoders was measured to gain nothing. Captions are encoded by transformers'
classes directly, so that what the networks learn does not depend on how eridiff reads a prompt.
"""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tiny_world import words
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizerFast,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

T5_NAMES = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
CLIP_NAMES = {
    "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}  # fmt: skip


@cache
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens and merges: merges fold each word from its end, so that none can disturb another word."""
    characters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    merges = sorted(
        {(w[i], w[i + 1 :] + "</w>") for w in words() for i in range(len(w) - 1)}, key=lambda m: (len(m[1]), m)
    )
    tokens = characters + [c + "</w>" for c in characters] + [a + b for a, b in merges]
    return {t: i for i, t in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}, merges


@cache
def t5_pieces() -> list[tuple[str, float]]:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    characters = [(chr(c), -10.0) for c in range(33, 127) if not chr(c).isupper()]
    return special + [("▁" + w, -2.0) for w in words()] + characters


def _frozen(module: Any) -> Any:
    """With random matrices that keep the size of what goes through, rounded to bfloat16, as they are stored."""
    for name, p in module.named_parameters():
        if p.ndim == 2:
            std = 1.0 if name == "shared.weight" else 0.5 if "embedding" in name else 1 / math.sqrt(p.shape[1])
            nn.init.normal_(p, std=std)
    return module.eval().requires_grad_(False).bfloat16().float()


def clip_encoder(seed: int, *, width: int, length: int, layers: int, act: str, projected: bool) -> Any:
    """A CLIP of `width` features, in heads of 32; without a projection of its own that is the identity."""
    torch.manual_seed(seed)
    size = len(clip_vocabulary()[0])
    model = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=size, hidden_size=width, intermediate_size=2 * width, projection_dim=width,
            num_hidden_layers=layers, num_attention_heads=width // 32, max_position_embeddings=length, hidden_act=act,
            bos_token_id=size - 2, eos_token_id=size - 1,
        )
    )  # fmt: skip
    model = _frozen(model)
    if not projected:
        nn.init.eye_(model.text_projection.weight)
    return model


def t5_encoder(seed: int, *, width: int) -> Any:
    """A T5 of one layer, its embedding tied."""
    torch.manual_seed(seed)
    model = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_pieces()), d_model=width, d_kv=32, d_ff=2 * width, num_layers=1, num_heads=2,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        )
    )  # fmt: skip
    model = _frozen(model)
    model.encoder.embed_tokens.weight = model.shared.weight
    return model


def write_clip_tokenizer(folder: Path, length: int) -> Path:
    """Files that transformers' ordinary classes read."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = clip_vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (folder / "special_tokens_map.json").write_text(json.dumps(CLIP_NAMES))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, **CLIP_NAMES}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_t5_tokenizer(folder: Path, length: int) -> Path:
    """The same for T5."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = [{"id": i, "content": c, **flags, "special": True} for i, c in enumerate(["<pad>", "</s>", "<unk>"])]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    end = {"id": "</s>", "ids": [1], "tokens": ["</s>"]}
    template = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    document = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
        "post_processor": {"type": "TemplateProcessing", "single": template,
                           "pair": template + template, "special_tokens": {"</s>": end}},
        "decoder": metaspace, "model": {"type": "Unigram", "unk_id": 2, "vocab": t5_pieces(), "byte_fallback": False},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False))
    (folder / "special_tokens_map.json").write_text(json.dumps(T5_NAMES))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length, **T5_NAMES}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def clip_states(model: Any, tokenizer: Path, captions: list[str], pad: int | None = None) -> tuple[Tensor, Tensor]:
    """The last but one states `[n, T, D]` and the projected state of the first end token `[n, P]`.

    Rows are padded with the end token, or with `pad`, which the pooled state never sees.
    """
    length = model.config.max_position_embeddings
    options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
    ids = CLIPTokenizerFast.from_pretrained(tokenizer)(captions, **options).input_ids
    end = len(clip_vocabulary()[0]) - 1
    first_end = (ids == end).int().argmax(1)
    if pad is not None:
        ids = torch.where(torch.arange(length) > first_end[:, None], pad, ids)
    out = model(input_ids=ids, output_hidden_states=True)
    pooled = out.last_hidden_state[torch.arange(len(ids)), first_end]
    return out.hidden_states[-2], model.text_projection(pooled)


def t5_states(model: Any, tokenizer: Path, captions: list[str], length: int) -> Tensor:
    """Features `[n, length, D]`; padding is attended to, as in Flux and SD 3."""
    reader = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer / "tokenizer.json"), **T5_NAMES)
    options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
    ids = reader(captions, **options).input_ids
    assert not (ids == 2).any(), "a caption with a word that the tokenizer does not know"
    return model(input_ids=ids).last_hidden_state
