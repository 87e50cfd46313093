"""Embeddings that trainers cache, handed to a Sampler by prompt: every layout gives what a Prompt gives."""

from dataclasses import replace
from itertools import permutations
from math import factorial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eridiff import Prompt, SDXLInference
from eridiff.errors import ConfigError
from eridiff.inference.again import circumstances, read_settings
from eridiff.request import Request
from eridiff.text import Conditioning
from eridiff.training import Sampler
from eridiff.training.cached import handed_in_prompts
from tests import tiny
from tests.families import FAMILIES, inference, rows

SECTION = {"prompts": ["a swan", "a fox"], "sample_steps": 2, "width": 64, "height": 64, "seed": 1}
WIDTHS = {"flux": (12, 8), "mmdit": (20, 16), "unet": (16, 8)}  # of the tiny networks' text and pooled vector
CLIPS = {"mmdit": 16, "unet": 8}  # of the text's width, both CLIPs together in SD 3 and CLIP-L alone in SDXL


class PromptEmbeds:
    """As ai-toolkit's: attributes, the pooled vector or the mask may be None."""

    def __init__(self, text: Tensor, pooled: Tensor | None, mask: Tensor | None = None) -> None:
        self.text_embeds, self.pooled_embeds, self.attention_mask = text, pooled, mask


def embeddings(family: str, seed: int) -> Conditioning:
    """Of one prompt, as the family's encoders give it: SD 3's rows of CLIP end in zeros."""
    text, pooled = WIDTHS[family]
    made = Conditioning(rows(1, 77 + 6, text, seed=seed).float(), rows(1, pooled, seed=seed + 50).float())
    if family == "mmdit":
        made.text[:, :77, CLIPS[family] :] = 0
    return made


def layouts(family: str, of: Conditioning) -> dict[str, Any]:
    """The same embeddings as trainers keep them."""
    text, pooled = of.text, of.pooled
    mask = torch.ones(1, text.shape[1] - (77 if family == "mmdit" else 0), dtype=torch.int64)  # of T5's tokens
    found: dict[str, Any] = {
        "a Prompt": Prompt(of), "a Conditioning": of, "diffusers' scripts": (text, pooled),
        "by diffusers' names": {"prompt_embeds": text, "pooled_prompt_embeds": pooled},
        "one prompt of a batch": {"prompt_embeds": text[0].numpy(), "pooled_prompt_embeds": pooled[0].numpy()},
        "ai-toolkit's": PromptEmbeds(text, pooled), "ai-toolkit's cache": {"conditional": PromptEmbeds(text, pooled), "unconditional": PromptEmbeds(text, pooled)},
    }  # fmt: skip
    if family == "flux":
        ids = torch.zeros(1, text.shape[1], 3)
        found |= {
            "diffusers' encode_prompt": (text, pooled, ids[0]), "kohya's list": [pooled, text, ids, mask],
            "kohya's file": {"l_pooled": pooled[0].numpy(), "t5_out": text[0].numpy(), "txt_ids": ids[0].numpy(), "t5_attn_mask": mask[0].numpy(), "apply_t5_attn_mask": np.array(False)},
        }  # fmt: skip
    if family == "mmdit":
        clips, t5 = text[:, :77, : CLIPS[family]], text[:, 77:]
        found |= {
            "diffusers' encode_prompt": (text, None, pooled, None), "kohya's list": [clips, t5, pooled, None, None, mask],
            "kohya's file": {"lg_out": clips[0].numpy(), "t5_out": t5[0].numpy(), "lg_pooled": pooled[0].numpy(), "clip_l_attn_mask": np.ones(77), "clip_g_attn_mask": np.ones(77), "t5_attn_mask": mask[0].numpy()},
        }  # fmt: skip
    if family == "unet":
        clip, clip_g = text[..., : CLIPS[family]], text[..., CLIPS[family] :]
        found |= {
            "diffusers' encode_prompt": (text, None, pooled, None), "kohya's list": [clip, clip_g, pooled],
            "kohya's file": {"hidden_state1": clip[0].numpy(), "hidden_state2": clip_g[0].numpy(), "pool2": pooled[0].numpy()},
        }  # fmt: skip
    return found


def same(a: Prompt, b: Prompt) -> bool:
    def equal(a: Conditioning | None, b: Conditioning | None) -> bool:
        if a is None or b is None:
            return a is b
        masks = a.mask is b.mask or (a.mask is not None and b.mask is not None and torch.equal(a.mask, b.mask))
        return torch.equal(a.text, b.text) and torch.equal(a.pooled, b.pooled) and masks

    return equal(a.positive, b.positive) and equal(a.negative, b.negative)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_gives_the_images_of_the_embeddings_themselves(family: str, tmp_path: Path) -> None:
    """Guidance is off, so that no negative prompts are needed."""
    model, section = inference(family), {**SECTION, "true_cfg_scale": 1.0, "out": str(tmp_path)}
    swan, fox = embeddings(family, 1), embeddings(family, 2)
    both = layouts(family, swan), layouts(family, fox)
    for name in both[0]:
        sampler = Sampler(
            model, section, conditioning={"a swan": both[0][name], "a fox": both[1][name]}, raise_errors=True
        )
        found = [Prompt(prompt.positive) for prompt in sampler.prompts]
        assert all(same(f, Prompt(e)) for f, e in zip(found, (swan, fox), strict=True)), name
    drawn = sampler.sample(3)
    expected = [
        model.generate(conditioning=Prompt(told), seed=1, steps=2, width=64, height=64, cfg_scale=1.0).images[0]
        for told in (swan, fox)
    ]
    assert [image.tobytes() for image in drawn.images] == [image.tobytes() for image in expected]


@pytest.mark.parametrize("family", FAMILIES)
def test_negative_prompts_are_found_by_their_text_and_the_familys_rule_holds_where_none_is_given(
    family: str, tmp_path: Path
) -> None:
    model, section = inference(family), {**SECTION, "true_cfg_scale": 4.0, "out": str(tmp_path)}
    swan, fox, empty, blurry = (embeddings(family, seed) for seed in range(4))
    table = {"a swan": swan, "a fox": fox, "": empty, "blurry": blurry}
    told = Sampler(model, {**section, "negative_prompt": "blurry"}, conditioning=table).prompts
    assert same(told[0], Prompt(swan, blurry)) and same(told[1], Prompt(fox, blurry))
    zeros = Conditioning(torch.zeros_like(empty.text), torch.zeros_like(empty.pooled))
    usual = Sampler(model, section, conditioning=table).prompts
    assert same(usual[0], Prompt(swan, zeros if family == "unet" else empty))
    assert Sampler(model, section, conditioning=table, raise_errors=True).sample(0).failure is None


@pytest.mark.parametrize("family", FAMILIES)
def test_negative_embeddings_beside_a_prompts_own_are_used(family: str, tmp_path: Path) -> None:
    model, section = inference(family), {**SECTION, "true_cfg_scale": 4.0, "out": str(tmp_path)}
    swan, fox, blurry = (embeddings(family, seed) for seed in range(3))
    names = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
    table = {
        "a swan": dict(zip(names, (swan.text, swan.pooled, blurry.text, blurry.pooled), strict=True)),
        "a fox": {"conditional": PromptEmbeds(fox.text, fox.pooled), "unconditional": PromptEmbeds(blurry.text, blurry.pooled)},
    }  # fmt: skip
    told = Sampler(model, section, conditioning=table).prompts
    assert same(told[0], Prompt(swan, blurry)) and same(told[1], Prompt(fox, blurry))
    if family != "flux":
        table["a swan"] = (swan.text, blurry.text, swan.pooled, blurry.pooled)
        assert same(Sampler(model, section, conditioning=table).prompts[0], Prompt(swan, blurry))


@pytest.mark.parametrize("family", ["flux", "mmdit"])
def test_t5s_padding_is_hidden_where_the_network_was_trained_so(family: str, tmp_path: Path) -> None:
    model, section = inference(family), {**SECTION, "prompts": ["a swan"], "true_cfg_scale": 1.0, "out": str(tmp_path)}
    swan = embeddings(family, 1)
    real = torch.tensor([[1, 1, 0, 0, 0, 0]])
    if family == "flux":
        value: Any = [swan.pooled, swan.text[:, :6], torch.zeros(1, 6, 3), real]
        expected = real.bool()
    else:
        value = [swan.text[:, :77, : CLIPS[family]], swan.text[:, 77:], swan.pooled, None, None, real]
        expected = torch.cat([torch.ones(1, 77, dtype=torch.bool), real.bool()], dim=1)
    assert Sampler(model, section, conditioning={"a swan": value}).prompts[0].positive.mask is None
    section["t5_mask"] = True
    found = Sampler(model, section, conditioning={"a swan": value}).prompts[0].positive.mask
    assert found is not None and torch.equal(found, expected)
    joined = PromptEmbeds(swan.text[:, : expected.shape[1]].requires_grad_(), swan.pooled, real)
    told = Sampler(model, section, conditioning={"a swan": joined}).prompts[0].positive
    assert told.mask is not None and torch.equal(told.mask, expected) and not told.text.requires_grad
    with pytest.raises(ConfigError, match="embeddings of 'a swan' have no mask of T5's padding"):
        Sampler(model, section, conditioning={"a swan": (swan.text, swan.pooled)})


def test_an_sd3_that_kohya_trains_without_t5_has_77_rows_of_zeros_in_its_place(tmp_path: Path) -> None:
    swan, section = (
        embeddings("mmdit", 1),
        {**SECTION, "prompts": ["a swan"], "true_cfg_scale": 1.0, "out": str(tmp_path)},
    )
    value = {"lg_out": swan.text[:, :77, :16], "t5_out": None, "lg_pooled": swan.pooled}
    told = Sampler(inference("mmdit"), section, conditioning={"a swan": value}).prompts[0].positive
    assert (
        torch.equal(told.text[:, :77], swan.text[:, :77]) and told.text.shape[1] == 154 and not told.text[:, 77:].any()
    )


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({}, r"no embeddings of 'a swan', 'a fox': pass those of every prompt"),
        ({"a swan": "text"}, r"'a swan' \(str\) are in no layout that is known: give prompt_embeds and pooled"),
        ({"a swan": {"embeds": torch.ones(1, 5, 12)}}, r"'a swan' \(embeds\) are in no layout"),
        ({"a swan": [torch.ones(1, 5, 12)]}, r"'a swan' \(list of 1\) are in no layout"),
        ({"a swan": {"conditional": "text", "unconditional": None}}, r"'a swan' \(str\) are in no layout"),
        ({"a swan": Conditioning(torch.ones(1, 5, 12), None)}, r"'a swan' \(text, pooled, mask\) are in no layout"),
        (
            {"a swan": (torch.ones(1, 5, 13), torch.ones(1, 8))},
            r"^prompt_embeds of 'a swan' is \[1, 5, 13\], and this network takes \[1, T, 12\]; "
            "a list of 2 holds prompt_embeds, pooled_prompt_embeds in this order$",
        ),
        ({"a swan": {"prompt_embeds": "text", "pooled_prompt_embeds": 1}}, "prompt_embeds of 'a swan' is of class str, and a tensor is needed"),
    ],
)  # fmt: skip
def test_what_is_missing_or_cannot_be_read_is_named(table: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        Sampler(inference("flux"), {**SECTION, "out": str(tmp_path)}, conditioning=table)


def spoilt(tensor: Tensor) -> dict[str, Any]:
    """Shapes and values of no use."""
    found = {
        "wider": torch.cat([tensor, tensor[..., :1]], dim=-1), "two rows": torch.cat([tensor, tensor]), "none": tensor[:0],
        "not a number": tensor.clone(), "infinite": tensor / 0, "integers": tensor.long(), "one more dimension": tensor[..., None],
    }  # fmt: skip
    found["not a number"].view(-1)[-1] = torch.nan
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_no_use_is_named_when_the_sampler_is_made(family: str) -> None:
    model, of = inference(family), embeddings(family, 1)
    makers: dict[str, Any] = {
        "ai-toolkit's": lambda **told: PromptEmbeds(*told.values()),
        "a Conditioning": Conditioning,
    }
    held = layouts(family, of)
    held["ai-toolkit's"], held["a Conditioning"] = vars(PromptEmbeds(of.text, of.pooled)), vars(of)
    tried = 0
    for layout in ("by diffusers' names", "kohya's file", *makers):
        parts = held[layout]
        for name in [n for n, t in parts.items() if t is not None and "mask" not in n and "ids" not in n]:
            for fault, wrong in spoilt(torch.as_tensor(parts[name]).reshape(1, *parts[name].shape[-2:])).items():
                given = makers.get(layout, dict)(**{**parts, name: wrong})
                says = rf"^{name} of 'a swan' (is|has) .*(takes|needed|infinite)"
                with pytest.raises(ConfigError, match=says) as error:
                    handed_in_prompts(model, {"a swan": given}, REQUESTS)
                assert fault not in ("wider", "two rows") or str(list(wrong.shape)) in str(error.value)
                tried += 1
    assert tried >= 7 * 2 * 4


REQUESTS = [Request(prompt="a swan", cfg_scale=1.0)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_list_of_kohyas_in_another_order_is_refused_with_the_right_one_wherever_shapes_tell(family: str) -> None:
    model, of = inference(family), embeddings(family, 1)
    if family == "unet":  # CLIP-L is narrower than CLIP-G, as in the published one
        network = tiny.unet(replace(tiny.UNET, text_width=12))
        model = SDXLInference(network, model.autoencoder, device="cpu", progress=False)
        kohya, told = [of.text[..., :4], of.text[..., 4:12], of.pooled], "hidden_state1, hidden_state2, pool2"
    else:
        kohya, told = layouts(family, of)["kohya's list"], "l_pooled, t5_out, txt_ids, t5_attn_mask"
    if family == "mmdit":
        kohya[3:5] = torch.ones(1, 77), torch.ones(1, 77)
        told = "lg_out, t5_out, lg_pooled, clip_l_attn_mask, clip_g_attn_mask, t5_attn_mask"
    refused = 0
    for order in permutations(range(len(kohya))):
        given = [kohya[i] for i in order]
        if [t.shape for t in given] == [t.shape for t in kohya]:
            handed_in_prompts(model, {"a swan": given}, REQUESTS)
            continue
        with pytest.raises(ConfigError, match=f"; a list of {len(kohya)} holds {told} in this order$"):
            handed_in_prompts(model, {"a swan": given}, REQUESTS)
        refused += 1
    assert refused == factorial(len(kohya)) - (2 if family == "mmdit" else 1)  # both CLIPs' masks are alike
    pair = (of.pooled, of.text[..., : model.network.config.text_width])
    with pytest.raises(ConfigError, match="; a list of 2 holds prompt_embeds, pooled_prompt_embeds in this order"):
        handed_in_prompts(model, {"a swan": pair}, REQUESTS)


@pytest.mark.parametrize("family", ["flux", "mmdit"])
def test_masks_that_do_not_fit_are_named(family: str) -> None:
    """Also where they are not used, as they tell that something is mixed up."""
    value = layouts(family, embeddings(family, 1))["kohya's file"]
    length = len(value["t5_attn_mask"])
    for mask, says in (
        (np.ones(length + 1), f"T5's padding of 'a swan' is of {length + 1} tokens and T5's text of {length}"),
        (np.full(length, -10000.0), r"t5_attn_mask of 'a swan' has values other than 0 \(hidden\) and 1 \(seen\)"),
    ):
        with pytest.raises(ConfigError, match=says):
            handed_in_prompts(inference(family), {"a swan": {**value, "t5_attn_mask": mask}}, REQUESTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_negative_prompt_of_another_number_of_tokens_is_named(family: str) -> None:
    model, swan, short = inference(family), embeddings(family, 1), embeddings(family, 2)
    short = Conditioning(short.text[:, :50], short.pooled)
    asked = Request(prompt="a swan", negative="blurry", cfg_scale=4.0)
    says = "the prompt has 83 rows of text and the negative one 50"
    with pytest.raises(ConfigError, match=f"conditioning of 'a swan' and 'blurry': {says}"):
        handed_in_prompts(model, {"a swan": swan, "blurry": short}, [asked])
    with pytest.raises(ConfigError, match=f"conditioning of 'a swan': {says}"):
        handed_in_prompts(model, {"a swan": Prompt(swan, short)}, [asked])
    assert len(handed_in_prompts(model, {"a swan": Prompt(swan, short)}, REQUESTS)) == 1


def test_a_list_is_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    swan, fox, section = embeddings("flux", 1), embeddings("flux", 2), {**SECTION, "out": str(tmp_path)}
    told = Sampler(inference("flux"), section, conditioning=[swan, {"conditional": fox, "unconditional": swan}]).prompts
    assert same(told[0], Prompt(swan)) and same(told[1], Prompt(fox, swan))
    for wrong in ([swan], Prompt(swan)):
        with pytest.raises(ConfigError, match=r"mapping from prompts to embeddings, or a list of as many as .* \(2\)"):
            Sampler(inference("flux"), section, conditioning=wrong)  # type: ignore[arg-type]


def test_a_missing_negative_prompt_is_named(tmp_path: Path) -> None:
    section = {**SECTION, "true_cfg_scale": 4.0, "out": str(tmp_path)}
    table = {"a swan": embeddings("flux", 1), "a fox": embeddings("flux", 2)}
    with pytest.raises(ConfigError, match="no embeddings of '': pass"):
        Sampler(inference("flux"), section, conditioning=table)
    with pytest.raises(ConfigError, match="no embeddings of 'blurry': pass"):
        Sampler(inference("flux"), {**section, "negative_prompt": "blurry"}, conditioning=table)


def test_other_ways_to_encode_are_refused_beside_it(tmp_path: Path) -> None:
    table = {"a swan": embeddings("flux", 1), "a fox": embeddings("flux", 2)}
    for option in ({"embeddings": tmp_path / "kept"}, {"text_in_training": True}):
        with pytest.raises(ConfigError, match="conditioning replaces the text encoders"):
            Sampler(inference("flux"), {**SECTION, "out": str(tmp_path)}, conditioning=table, **option)  # type: ignore[arg-type]


def test_the_record_says_that_the_embeddings_were_the_trainers(tmp_path: Path) -> None:
    table = {"a swan": embeddings("flux", 1), "a fox": embeddings("flux", 2)}
    sampler = Sampler(inference("flux"), {**SECTION, "out": str(tmp_path)}, conditioning=table, raise_errors=True)
    settings = read_settings(sampler.sample(0).paths[0])
    assert settings["training"]["conditioning"] == "the trainer's" and settings["handed_in"] == []
    assert "embeddings that the trainer passed, now encoded" in circumstances(settings, settings)
