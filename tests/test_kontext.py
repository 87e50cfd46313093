"""Flux Kontext: the network attends to the tokens of references; against diffusers' own pipeline, step by step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from eridiff import FluxInference, Prompt
from eridiff.cli import main
from eridiff.errors import ConfigError
from eridiff.inference.flux import KONTEXT_SIZES
from eridiff.models.flux import FluxConfig, patchify
from eridiff.training import Sampler
from tests import families, tiny
from tests.loras import some_lora

DEV = FluxConfig(64, 64, 8, 12, 32, 2, 4.0, 1, 1, (4, 6, 6))


def picture(width: int, height: int, seed: int = 0) -> torch.Tensor:
    """A reference as a tensor, which keeps its size."""
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def kontext() -> FluxInference:
    return FluxInference(tiny.flux(DEV), tiny.autoencoder(), variant="kontext", device="cpu", progress=False)


def edited(model: FluxInference, references: Any, **asked: Any) -> Any:
    prompt = Prompt(families.conditioning(model))
    given = {"steps": 2, "seed": 1, "width": 32, "height": 48, "keep": ("latents",)} | asked
    return model.generate(conditioning=prompt, references=references, **given)


def test_the_defaults_are_kontexts_own(kontext: FluxInference) -> None:
    assert kontext.variant == "kontext" and kontext.sampling.guidance_scale == 2.5
    found = edited(kontext, picture(32, 48))
    assert found.settings[0]["guidance_scale"] == 2.5 and found.settings[0]["handed_in"] == [
        "references",
        "conditioning",
    ]


def test_each_reference_changes_the_image_and_their_order_counts(kontext: FluxInference) -> None:
    one, other = picture(32, 48), picture(48, 32, seed=1)
    asked = [None, one, other, [one, other], [other, one]]
    latents = [edited(kontext, references).latents for references in asked]
    assert all(a.shape == latents[0].shape for a in latents)
    assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(latents) for b in latents[:i])


def test_a_step_is_the_networks_on_tokens_and_positions_of_both(kontext: FluxInference) -> None:
    """A plain forward call with the reference's tokens behind the noise's, image index 1, its output cut."""
    reference = picture(48, 32)
    found = edited(kontext, reference, steps=1, keep=("latents", "noise"))
    p = families.conditioning(kontext)
    ids = torch.cat([
        torch.tensor([[i, y, x] for y in range(h) for x in range(w)]).double() for i, (h, w) in enumerate([(3, 2), (2, 3)])
    ])  # fmt: skip
    noise = patchify(found.noise)
    tokens = torch.cat([noise, patchify(kontext.encode_vae(reference))], dim=1)
    with torch.no_grad():
        velocity = kontext.network(
            tokens, p.text, p.pooled, torch.tensor([[1.0]]), guidance=torch.tensor([2.5]), ids=ids
        )
    assert torch.allclose(patchify(found.latents), noise - velocity[:, :6], atol=1e-5)


def test_every_step_is_diffusers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline

    from tests.test_from_diffusers import flux_pipeline

    pipe = flux_pipeline()
    theirs = FluxKontextPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.text_encoder_2, pipe.tokenizer_2, pipe.transformer
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    model = FluxInference.from_diffusers(theirs, progress=False)
    assert model.variant == "kontext"
    reference, side = picture(64, 64), 64
    seen: list[torch.Tensor] = []

    def keep(_: Any, i: int, t: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(values["latents"].clone())
        return values

    noise = model.noise([1], side, side)
    theirs(
        image=(reference + 1) / 2, prompt="make it night", width=side, height=side, max_area=side * side, _auto_resize=False,
        num_inference_steps=4, guidance_scale=2.5, latents=patchify(noise), callback_on_step_end=keep, output_type="latent",
        max_sequence_length=model.t5.length,
    )  # fmt: skip
    ours: list[torch.Tensor] = []
    model.generate(
        "make it night", references=reference, width=side, height=side, steps=4, noise=noise,
        callback=lambda step: ours.append(patchify(step.latents).clone()) or False,
    )  # fmt: skip
    assert len(seen) == len(ours) == 4
    for a, b in zip(seen, ours, strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-5


def test_images_are_resized_to_the_nearest_published_size(kontext: FluxInference) -> None:
    assert len(set(KONTEXT_SIZES)) == 17
    for size, nearest in (((64, 64), (1024, 1024)), ((300, 100), (1568, 672)), ((90, 120), (880, 1184))):
        (found,) = kontext.referred([Image.new("RGB", size)])
        assert (found.shape[3], found.shape[2]) == nearest


def test_the_file_by_its_name_a_prompts_own_reference_and_the_png(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eridiff.inference.flux.KONTEXT_SIZES", [(64, 48), (48, 64)])
    model = tiny.write_model(tmp_path / "FLUX.1-Kontext-dev")
    Image.effect_noise((48, 64), 90).convert("RGB").save(tmp_path / "a.png")
    Image.effect_noise((64, 48), 90).convert("RGB").save(tmp_path / "b.png")
    entries = [{"prompt": "make it night", "ctrl_img": str(tmp_path / "a.png")}, {"prompt": "x", "references": [str(tmp_path / "b.png")]}]  # fmt: skip
    document = {"config": {"process": [{"model": {"name_or_path": str(model), "arch": "flux"}, "sample": {"samples": entries, "sample_steps": 1}}]}}  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(document))
    assert main(["sample", str(tmp_path / "run.json"), "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert "kontext" in said and "has no effect" not in said
    first = Image.open(tmp_path / "out" / "0000-make-it-night.png")
    settings = json.loads(first.info["eridiff"])
    assert (settings["variant"], settings["references"], first.size) == ("kontext", ["../a.png"], (48, 64))
    assert main(["resample", str(tmp_path / "out" / "0000-make-it-night.png")]) == 0
    assert "the same image, bit for bit" in capsys.readouterr().err
    flags = ["--reference", str(tmp_path / "a.png"), "--reference", str(tmp_path / "b.png"), "--prompt", "x"]
    assert main(["sample", "--model", str(model), *flags, "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "c.png")]) == 0  # fmt: skip
    assert len(json.loads(Image.open(tmp_path / "c.png").info["eridiff"])["references"]) == 2


def test_what_is_not_an_edit_is_refused(kontext: FluxInference) -> None:
    with pytest.raises(
        ConfigError, match="image has no effect on kontext without a strength: what it edits are references"
    ):
        edited(kontext, None, image=picture(32, 48))
    assert edited(kontext, None, image=picture(32, 48), strength=0.5).images  # image to image, as asked
    with pytest.raises(ConfigError, match="references has no effect on Flux dev: Flux Kontext edits references"):
        edited(families.inference("flux"), picture(32, 32))
    with pytest.raises(ConfigError, match="width of a reference must be a multiple of 16, not 40"):
        edited(kontext, picture(40, 32))


def test_a_lora_and_a_training_run_edit_too(kontext: FluxInference, tmp_path: Path) -> None:
    reference = picture(32, 48)
    plain = edited(kontext, reference).latents
    with kontext.apply_lora(some_lora(kontext.network)):
        assert not torch.allclose(edited(kontext, reference).latents, plain, atol=1e-4)
    assert torch.equal(edited(kontext, reference).latents, plain)
    Image.new("RGB", (32, 48), "teal").save(tmp_path / "in.png")
    section = {"prompts": ["a"], "references": str(tmp_path / "in.png"), "sample_steps": 1, "width": 32, "height": 32, "out": str(tmp_path)}  # fmt: skip
    prompt = Prompt(families.conditioning(kontext))
    samples = Sampler(kontext, section, conditioning=[prompt], verify=True, raise_errors=True).sample(0)
    assert samples.settings[0]["references"] == [str(tmp_path / "in.png")] and samples.settings[0]["handed_in"] == []
