"""What a trainer holds, passed as it is: text encoders and tokenizers, cached embeddings, numbers of NumPy, wrong attempts.

Nothing here needs diffusers, so that `make oldest` runs it.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

import eridiff
from eridiff import ClipEncoder, Prompt, T5Encoder
from eridiff.errors import ConfigError
from eridiff.models.flux import FluxConfig
from eridiff.text import Conditioning
from eridiff.text.tokenizers import clip_tokenizer, published_clip_tokenizer, t5_tokenizer, token_ids
from eridiff.training import Sampler, adopt
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
            raise AssertionError("tokenizers that are written in Python have no offsets, and raise")
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


def test_float16_on_a_cpu_is_called_slow(caplog: pytest.LogCaptureFixture) -> None:
    """A convolution of 512 channels took 8.2 s in float16, 0.05 in float32 and 0.02 in bfloat16."""
    for dtype, said in ((torch.bfloat16, 0), (torch.float32, 0), (torch.float16, 2)):
        caplog.clear()
        eridiff.FluxInference(tiny.flux().to(dtype), tiny.autoencoder().to(dtype), device="cpu")
        assert sum("is float16 on a CPU" in record.message for record in caplog.records) == said


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


# wrong attempts ------------------------------------------------------------------------------------------------------


class Pipeline:
    """A pipeline as diffusers makes them: parts by name."""

    def __init__(self, **parts: Any) -> None:
        vars(self).update(parts)


def under_the_originals_names(module: nn.Module, network: str) -> nn.Module:
    """As trainers hold a network that took the original's code: parameters under its names, and no configuration."""
    from eridiff.weights.detect import sizes_of
    from eridiff.weights.keymap import key_map

    theirs = nn.Module()
    tensors = key_map(network).layouts["original"].to_foreign(module.state_dict(), sizes_of(module.config))
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        owner = theirs
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
    return theirs


FLUX = FluxConfig(64, 64, 8, 12, 128, 1, 4.0, 1, 1)  # of a head's size that is published
FOREIGN = under_the_originals_names(tiny.flux(FLUX), "flux")
FOREIGN_VAE = under_the_originals_names(tiny.autoencoder(), "vae")


def flux(**options: Any) -> eridiff.FluxInference:
    return eridiff.FluxInference(tiny.flux(), tiny.autoencoder(), progress=False, **options)


def conditioning(rows: int = 1) -> Conditioning:
    return Conditioning(torch.ones(rows, 5, 12), torch.ones(rows, 8))


SECTION = {"prompts": ["a swan"], "sample_steps": 2, "width": 32, "height": 32, "seed": 1}
ATTEMPTS: dict[str, tuple[Callable[[], Any], str]] = {
    "a foreign network": (
        lambda: eridiff.FluxInference(FOREIGN, FOREIGN_VAE),
        r"network must be eridiff's Flux and is of class Module: .*FluxInference.from_diffusers\(transformer=..., vae=...\)",
    ),
    "a foreign network beside our autoencoder": (
        lambda: eridiff.FluxInference(FOREIGN, tiny.autoencoder()),
        r"network must be eridiff's Flux and is of class Module: pass .* by FluxInference.from_diffusers\(pipe\)",
    ),
    "a foreign UNet": (
        lambda: eridiff.SDXLInference(nn.Linear(2, 2)),
        r"must be eridiff's UNet and is of class Linear: .*SDXLInference.from_diffusers\(unet=..., vae=...\)",
    ),
    "adopted ones": (
        lambda: eridiff.FluxInference(adopt(FOREIGN), adopt(FOREIGN_VAE)),
        r"network must be eridiff's Flux and is of class Adopted: .*from_diffusers",
    ),
    "bare encoders": (
        lambda: flux(clip=tiny.clip_module(), t5=tiny.t5_module()),
        r"clip is of class CLIPTextModelWithProjection: pass eridiff.ClipEncoder\(module, tokenizer\), .*from_diffusers\(pipe\)",
    ),
    "bare T5": (
        lambda: flux(t5=tiny.t5_module()),
        r"t5 is of class T5EncoderModel: pass eridiff.T5Encoder\(module, tokenizer, length\)",
    ),
    "bare CLIP-G": (
        lambda: eridiff.SDXLInference(tiny.unet(), None, clip_g=tiny.clip_module()),
        r"pass eridiff.ClipEncoder\(module, tokenizer, pad=0, name='CLIP-G'\)",
    ),
    "exchanged encoders": (
        lambda: flux(clip=T5Encoder(tiny.t5_module(), T5_TOKENIZER, 16)),
        "clip is of class T5Encoder: pass eridiff.ClipEncoder",
    ),
    "another family": (
        lambda: eridiff.FluxInference(tiny.unet()),
        "FluxInference generates with Flux, and the network is of class UNet: use SDXLInference",
    ),
    "another family's pipeline": (
        lambda: eridiff.FluxInference.from_diffusers(Pipeline(unet=tiny.unet(), vae=tiny.autoencoder())),
        "FluxInference generates with Flux, and the network is of class UNet: use SDXLInference",
    ),
    "another family's adopted network": (
        lambda: eridiff.SD35Inference.from_diffusers(transformer=FOREIGN, vae=FOREIGN_VAE),
        "SD35Inference generates with MMDiT, and the network is of class Flux: use FluxInference",
    ),
    "other latents": (
        lambda: eridiff.FluxInference(tiny.flux(), tiny.autoencoder(tiny.SDXL_AUTOENCODER)),
        "the autoencoder has 4 latent channels, .* generates 16",
    ),
    "a network for a pipeline": (
        lambda: eridiff.FluxInference.from_diffusers(FOREIGN),
        r"takes a pipeline, or its parts by name: FluxInference.from_diffusers\(transformer=..., vae=...\)",
    ),
    "an autoencoder as the network": (
        lambda: eridiff.FluxInference.from_diffusers(transformer=FOREIGN_VAE, vae=FOREIGN_VAE),
        "FluxInference.from_diffusers takes a network and an autoencoder as vae, and was given Autoencoder and Autoencoder",
    ),
    "a network as the autoencoder": (
        lambda: eridiff.FluxInference.from_diffusers(transformer=FOREIGN, vae=FOREIGN),
        "takes a network and an autoencoder as vae, and was given Flux and Flux",
    ),
    "no tokenizer of T5": (
        lambda: eridiff.FluxInference.from_diffusers(
            transformer=FOREIGN, vae=FOREIGN_VAE, text_encoder=tiny.clip_module(49408), text_encoder_2=tiny.t5_module()
        ),
        "no tokenizer of T5 was passed and the hub's cache has none: give tokenizer_2",
    ),
    "a UNet that is not told sizes": (
        lambda: eridiff.SDXLInference(tiny.unet(replace(tiny.UNET, vector_width=776))),
        "the UNet is given 776 features beside the text, which have no room for a pooled vector and the numbers of an image's size",
    ),
    "no autoencoder": (
        lambda: eridiff.FluxInference.from_diffusers(transformer=FOREIGN),
        r"no vae was given: FluxInference.from_diffusers\(pipe\) or",
    ),
    "an empty pipeline": (
        lambda: eridiff.FluxInference.from_diffusers(Pipeline()),
        "no transformer or unet and no vae is in the Pipeline",
    ),
    "one encoder of two": (
        lambda: eridiff.FluxInference.from_diffusers(transformer=FOREIGN, vae=FOREIGN_VAE, text_encoder=tiny.clip_module()),
        "text_encoder_2 is missing: pass every text encoder, or none and conditioning",
    ),
    "exchanged encoders of a pipeline": (
        lambda: eridiff.FluxInference.from_diffusers(
            transformer=FOREIGN, vae=FOREIGN_VAE, text_encoder=tiny.t5_module(), text_encoder_2=tiny.clip_module()
        ),
        "text_encoder must be a CLIP text model and is of class T5EncoderModel",
    ),
    "a misspelt part": (
        lambda: eridiff.FluxInference.from_diffusers(transformer=FOREIGN, vae=FOREIGN_VAE, text_encoder2=1),
        "FluxInference.from_diffusers has no option 'text_encoder2'; did you mean 'text_encoder_2'",
    ),
    "a Sampler of a network": (
        lambda: Sampler(FOREIGN, SECTION),  # type: ignore[arg-type]
        r"Sampler needs an inference, and this is of class Module: .*FluxInference.from_diffusers\(pipe\)",
    ),
    "a Conditioning for a Prompt": (
        lambda: flux().generate(conditioning=conditioning()),  # type: ignore[arg-type]
        r"conditioning must be an eridiff.Prompt, not a Conditioning: Prompt\(Conditioning\(text, pooled\)\)",
    ),
    "nothing at all": (
        lambda: eridiff.FluxInference().network,
        "no model is loaded: give FluxInference its modules, or call load_model",
    ),
    "an autoencoder without a network": (
        lambda: eridiff.FluxInference(autoencoder=tiny.autoencoder()),
        "FluxInference was given modules without a network",
    ),
    "two rows of noise": (
        lambda: flux().generate(conditioning=Prompt(conditioning()), seed=1, noise=torch.zeros(2, 16, 4, 4), width=32, height=32),
        r"the noise has the shape \[2, 16, 4, 4\], and an image of 32x32 needs \[1, 16, 4, 4\]",
    ),
    "two images": (
        lambda: flux().generate(conditioning=Prompt(conditioning()), seed=1, image=torch.zeros(2, 3, 32, 32)),
        "2 rows of image for 1 prompts and seeds",
    ),
}  # fmt: skip


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_a_natural_attempt_that_is_wrong_ends_in_a_sentence_that_names_the_right_call(attempt: str) -> None:
    call, says = ATTEMPTS[attempt]
    with pytest.raises(ConfigError, match=says) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_size_embedding_that_is_not_the_published_one_trains_and_is_refused_for_sampling() -> None:
    """The same vector has room for another pooled one."""
    unet = under_the_originals_names(tiny.unet(), "unet")
    unet.config = {"addition_time_embed_dim": 128}  # type: ignore[assignment]
    adopted, vae = adopt(unet), tiny.autoencoder(tiny.SDXL_AUTOENCODER)
    with pytest.raises(
        ConfigError, match="^'Module': addition_time_embed_dim is 128, and an SDXL here computes with 256 alone"
    ):
        eridiff.SDXLInference.from_diffusers(unet=adopted, vae=vae)


def test_matrices_of_two_dtypes_are_refused_where_no_autocast_joins_them(tmp_path: Path) -> None:
    model = flux()
    model.network.double_blocks[0].image.qkv.bfloat16()
    section = {**SECTION, "out": str(tmp_path)}
    given = {"a swan": conditioning()}
    with pytest.raises(
        ConfigError,
        match=r"network has matrices of two dtypes \(.* is float32 and double_blocks.0.image.qkv.weight is bfloat16",
    ):
        Sampler(model, section, conditioning=given)
    with pytest.raises(ConfigError, match="generate under autocast, or convert one"):
        model.generate(conditioning=Prompt(conditioning()), width=32, height=32)
    drawn = Sampler(model, section, conditioning=given, autocast=torch.bfloat16, raise_errors=True).sample(0)
    assert len(drawn.paths) == 1


def test_numbers_of_numpy_are_taken_and_recorded(tmp_path: Path) -> None:
    numbers = {
        "seed": 7,
        "width": 32,
        "height": 48,
        "steps": 2,
        "guidance_scale": 3.5,
        "cfg_interval": (0.0, 0.5),
        "cfg_scale": 2.0,
        "shift": None,
    }
    theirs = {
        "seed": np.int64(7), "width": np.int32(32), "height": np.uint16(48), "steps": np.int64(2),
        "guidance_scale": np.float32(3.5), "cfg_interval": tuple(np.float64([0.0, 0.5])), "cfg_scale": np.float16(2),
        "shift": None,
    }  # fmt: skip
    model = flux()
    expected, found = (
        model.generate(conditioning=Prompt(conditioning(), conditioning()), **n) for n in (numbers, theirs)
    )
    assert found.images[0].tobytes() == expected.images[0].tobytes()
    assert json.dumps(found.settings) == json.dumps(expected.settings)
    both = model.generate(conditioning=Prompt(conditioning(), conditioning()), **{**numbers, "seed": np.arange(2)})
    assert [said["seed"] for said in both.settings] == [0, 1]
    section = {**SECTION, "seed": np.int64(7), "sample_steps": np.int64(2), "out": str(tmp_path)}
    Sampler(model, section, conditioning={"a swan": conditioning()})
