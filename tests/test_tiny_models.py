"""The built-in models generate what is asked, by the ordinary loader and `generate`; a pipeline that is wrong anywhere does not.

Each break below changes one thing that a pipeline could do consistently and wrongly, and the share of images that are
right falls below the bound that the model as it is keeps.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import eridiff
from eridiff.errors import EridiffError
from eridiff.inference import sd35, sdxl
from eridiff.models import flux, layers, mmdit, unet
from eridiff.models.layers import FinalLayer, RMSNorm, Stream
from eridiff.schedulers import discrete, guidance

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from tiny_judge import Judge, outline, sample

JUDGE, OUTLINED = Judge(), Judge(outlines=True)
SCENES = sample(16)
BOUND, BROKEN = 0.9, 0.8  # share of the scenes that are right: at least, of a model as it is, and less, of a broken one
NEAR = {"tiny-flux": 40, "tiny-sd35": 55, "tiny-sdxl": 40}  # root mean square to the nearest rendering, in 0..255
ASKED: dict[str, dict[str, Any]] = {  # more guidance than by default shows what is wrong more clearly
    "tiny-flux": {"steps": 4}, "tiny-sd35": {"steps": 6, "cfg_scale": 3.0}, "tiny-sdxl": {"steps": 10},
}  # fmt: skip
Patch = pytest.MonkeyPatch
MODELS: dict[str, Any] = {}


def model_of(name: str) -> Any:
    if name not in MODELS:
        MODELS[name] = eridiff.load(name, device="cpu", dtype=torch.float32, progress=False)
    return MODELS[name]


def right(name: str, **how: Any) -> float:
    """The share of the scenes that a model generates as asked: noun, background and size, and near enough to a rendering."""
    how = {**ASKED[name], **how}
    result = model_of(name).generate([s.caption for s in SCENES], seed=list(range(len(SCENES))), **how)
    pairs = [(np.asarray(image, np.float32).reshape(-1), s) for image, s in zip(result.images, SCENES, strict=True)]
    near = [JUDGE.distance(p, s.noun, s.background, s.size) < NEAR[name] ** 2 for p, s in pairs]
    return float((JUDGE.right(result.images, SCENES).all(1) & near).mean())


@pytest.mark.parametrize("name", ASKED)
def test_a_built_in_model_generates_noun_background_and_size_as_asked(name: str) -> None:
    assert right(name) >= BOUND


def sharpness(images: list[Any]) -> float:
    """The mean difference of neighbouring pixels, in 0..255."""
    pixels = np.stack([np.asarray(image, dtype=float) for image in images])
    return float(np.abs(np.diff(pixels, axis=1)).mean() + np.abs(np.diff(pixels, axis=2)).mean())


def test_sdxl_that_is_given_a_small_original_generates_it_enlarged_and_blurred() -> None:
    model, captions = model_of("tiny-sdxl"), [s.caption for s in SCENES[:8]]

    def drawn(side: int) -> float:
        return sharpness(model.generate(captions, seed=5, original_size=(side, side)).images)

    small, middle, large = map(drawn, (12, 24, 64))
    assert small < 0.85 * large and small < middle < large


@pytest.mark.parametrize("crop", [(12, 0), (0, 12)])
def test_sdxl_that_is_given_a_crop_moves_the_image_up_or_to_the_left(crop: tuple[int, int]) -> None:
    """Of drawings at four places the one that lies where the crop puts it is the nearest."""
    model, scenes = model_of("tiny-sdxl"), [replace(s, size="small") for s in SCENES]
    found = []
    for image, scene in zip(model.generate([s.caption for s in scenes], seed=6, crop=crop).images, scenes, strict=True):
        places = [(0, 0), (12, 0), (0, 12), (12, 12)]
        drawn = [JUDGE.world.draw(scene, None, -left, -top).astype(float) for top, left in places]
        found.append(places[int(np.argmin([((d - np.asarray(image)) ** 2).mean() for d in drawn]))] == crop)
    assert np.mean(found) >= 0.8


def test_sd35_generates_without_t5_and_with_skipped_layers(monkeypatch: Patch) -> None:
    assert right("tiny-sd35", steps=8, skip_layers=True) >= BOUND
    monkeypatch.setattr(model_of("tiny-sd35"), "t5", None)
    assert right("tiny-sd35", steps=8) >= BOUND


def test_fluxs_guidance_scale_has_a_best_value() -> None:
    """Told 0 it generates without the prompt; more gives more contrast, and in four steps too much."""
    model, scenes, found = model_of("tiny-flux"), SCENES[:12], {}
    for scale in (0.0, 1.5, 8.0):
        asked = {"seed": list(range(len(scenes))), "steps": 4, "guidance_scale": scale}
        images = model.generate([s.caption for s in scenes], **asked).images
        pixels = np.stack([np.asarray(image, np.float32) for image in images])
        found[scale] = pixels.std((1, 2)).mean(), JUDGE.right(images, scenes).all(1).mean()
    contrast, share = zip(*found.values(), strict=True)
    assert contrast[0] < contrast[1] < contrast[2]
    assert share[1] >= BOUND > 0.5 > max(share[0], share[2])


@pytest.mark.parametrize("name", ASKED)
def test_the_style_outlines_more_at_every_scale_and_keeps_the_nouns(name: str) -> None:
    model, scenes, drawn = model_of(name), SCENES[:8], {}
    with model.apply_lora("tiny-style", 0.0) as lora:
        for scale in (0.0, 0.5, 1.0):
            lora.set_scale(scale)
            asked = {"seed": list(range(len(scenes))), **ASKED[name]}
            drawn[scale] = model.generate([s.caption for s in scenes], **asked).images
    none, half, all_of_it = (outline(images, scenes) for images in drawn.values())
    assert none < 0.05 and none + 0.1 < half < all_of_it - 0.1
    assert OUTLINED.right(drawn[1.0], scenes)[:, 0].mean() >= 0.85


def test_the_refiner_finishes_images_as_sharp_as_its_score_says() -> None:
    model, scenes = model_of("tiny-sdxl").with_refiner(model_of("tiny-sdxl-refiner")), SCENES[:8]
    asked = {"seed": list(range(len(scenes))), "steps": 10, "hand_over": 0.7}
    captions = [s.caption for s in scenes]
    high = model.generate(captions, **asked).images
    low = model.generate(captions, aesthetic_score=1.0, negative_aesthetic_score=1.0, **asked).images
    assert JUDGE.right(high, scenes)[:, 0].mean() >= 0.85
    assert sharpness(low) < 0.95 * sharpness(high)


# each changes a pipeline in place, undone after the test -----------------------------------------------------------------


def configured(patch: Patch, model: Any, **sizes: float) -> None:
    patch.setattr(model.autoencoder, "config", replace(model.autoencoder.config, **sizes))


def times_reversed(last: float) -> Callable[[Patch, Any], None]:
    def broken(patch: Patch, model: Any) -> None:
        told = model.network.conditioning_vector
        patch.setattr(
            model.network, "conditioning_vector", lambda pooled, times, *rest: told(pooled, last - times, *rest)
        )

    return broken


def times_scaled(patch: Patch, model: Any) -> None:
    told = model.network.conditioning_vector
    patch.setattr(model.network, "conditioning_vector", lambda pooled, times, *rest: told(pooled, times / 1000, *rest))


def sines_first(patch: Patch, model: Any) -> None:
    for module in (layers, unet):
        found = module.sinusoid
        patch.setattr(module, "sinusoid", lambda values, width=256, f=found: f(values, width).roll(width // 2, -1))


def shifted_times(shift: float) -> Callable[[Patch, Any], None]:
    """The schedule's, as for images of a thousand pixels."""

    def broken(patch: Patch, model: Any) -> None:
        patch.setattr(model, "sampling", replace(model.sampling, shift=shift))

    return broken


def predicts(kind: str) -> Callable[[Patch, Any], None]:
    def broken(patch: Patch, model: Any) -> None:
        named = model.named_schedule
        patch.setattr(model, "named_schedule", lambda *how: replace(named(*how), prediction=kind))

    return broken


def sign_flipped(patch: Patch, model: Any) -> None:
    step = model.step
    patch.setattr(model, "step", lambda *given, **options: -step(*given, **options))


def prompts_exchanged(patch: Patch, model: Any) -> None:
    patch.setattr(guidance, "classifier_free", lambda p, n, scale: p + scale * (n - p))


def told(change: Callable[[Any], Any]) -> Callable[[Patch, Any], None]:
    """What the encoders give, changed."""

    def broken(patch: Patch, model: Any) -> None:
        encoding = model.encoding

        def changed(prompts: Any, asked: Any) -> Any:
            return change((yield from encoding(prompts, asked)))

        patch.setattr(model, "encoding", changed)

    return broken


def clips_exchanged(module: Any) -> Callable[[Patch, Any], None]:
    def broken(patch: Patch, model: Any) -> None:
        joined = module.joined
        patch.setattr(module, "joined", lambda first, second, *rest: joined(second, first, *rest))

    return broken


def last_states(module: Any) -> Callable[[Patch, Any], None]:
    """CLIP's last states in place of the last but one."""

    def broken(patch: Patch, model: Any) -> None:
        joined = module.joined

        def last(first: Any, second: Any, *rest: Any) -> Any:
            pair = [SimpleNamespace(hidden=(None, f.last, None), projected=f.projected) for f in (first, second)]
            return joined(*pair, *rest)

        patch.setattr(module, "joined", last)

    return broken


def corner_of_the_table(patch: Patch, model: Any) -> None:
    table = model.network.positions
    square = table.table.unflatten(1, (table.side, table.side))
    patch.setattr(table, "_crop", lambda grid: square[:, : grid[0], : grid[1]].flatten(1, 2))
    patch.setattr(table, "last", type(table.last)())


def patches_in_flux_order(patch: Patch, model: Any) -> None:
    patch.setattr(mmdit, "unpatchify", flux.unpatchify)


def patches_in_sd3_order(patch: Patch, model: Any) -> None:
    from eridiff.inference import flux as drawing

    patch.setattr(drawing, "unpatchify", mmdit.unpatchify)


def no_positions(patch: Patch, model: Any) -> None:
    patch.setattr(flux, "position_ids", lambda grid, index=0: torch.zeros(grid[0] * grid[1], 3))
    patch.setattr(model.network, "last_rotations", type(model.network.last_rotations)())


def no_norm_of_queries(patch: Patch, model: Any) -> None:
    patch.setattr(RMSNorm, "forward", lambda self, x: x)


def shift_and_scale_exchanged(patch: Patch, model: Any) -> None:
    forward = FinalLayer.forward
    patch.setattr(
        FinalLayer, "forward", lambda self, x, m: forward(self, x, torch.cat(m.chunk(2, dim=-1)[::-1], dim=-1))
    )


def no_second_attention(patch: Patch, model: Any) -> None:
    def update(self: Any, x: Any, attention: Any, modulation: Any) -> Any:
        return Stream.update(self, x, attention, modulation[:6])

    patch.setattr(mmdit.DualStream, "update", update)


def even_betas(patch: Patch, model: Any) -> None:
    betas = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)
    patch.setattr(discrete, "alphas_cumprod", lambda zero=False: torch.cumprod(1 - betas, 0))


def sizes_in_another_order(patch: Patch, model: Any) -> None:
    """Target, original, crop."""
    vector = sdxl.size_vector
    patch.setattr(sdxl, "size_vector", lambda pooled, numbers: vector(pooled, numbers.roll(2, dims=1)))


def gates_for_values(patch: Patch, model: Any) -> None:
    for module in model.network.modules():
        if isinstance(module, unet.TransformerBlock):
            forward = module.mlp_in.forward
            patch.setattr(module.mlp_in, "forward", lambda x, f=forward: f(x).roll(4 * x.shape[-1], -1))


def skips_reversed(patch: Patch, model: Any) -> None:
    forward = unet.UpStage.forward
    patch.setattr(unet.UpStage, "forward", lambda self, x, kept, *rest: forward(self, x, _alike(kept), *rest))


def _alike(kept: Any) -> Any:
    """Skips in the other order among those of the same shape."""
    same = [k for k in kept if k.shape == kept[0].shape]
    return [*same[::-1], *kept[len(same) :]]


def zeroed(**names: None) -> Callable[[Patch, Any], None]:
    return told(lambda c: replace(c, **{name: torch.zeros_like(getattr(c, name)) for name in names}))


def rows_exchanged(c: Any) -> Any:
    """CLIP-G's 64 features before CLIP-L's 32."""
    return replace(c, text=c.text.roll(64, dims=2))


def pooled_exchanged(c: Any) -> Any:
    return replace(c, pooled=c.pooled.roll(64, dims=1))


FLUX = {
    "the latents' scale of SD 3": lambda p, m: configured(p, m, scale=1.5305),
    "velocity of the other sign": sign_flipped,
    "noise predicted in place of velocity": predicts("epsilon"),
    "no text": zeroed(text=None),
    "no positions": no_positions,
    "tokens in SD 3's order": patches_in_sd3_order,
    "final shift and scale exchanged": shift_and_scale_exchanged,
    "queries and keys without their norm": no_norm_of_queries,
}
SD35 = {
    "the latents' scale of Flux": lambda p, m: configured(p, m, scale=0.3611),
    "times a thousand times too small": times_scaled,
    "velocity of the other sign": sign_flipped,
    "noise predicted in place of velocity": predicts("epsilon"),
    "positive and negative prompt exchanged": prompts_exchanged,
    "CLIPs exchanged": clips_exchanged(sd35),
    "the last states of the CLIPs": last_states(sd35),
    "pooled vectors exchanged": told(pooled_exchanged),
    "a corner of the position table": corner_of_the_table,
    "patches in Flux's order": patches_in_flux_order,
    "no second attention": no_second_attention,
    "the shift of large images": shifted_times(3.0),
    "final shift and scale exchanged": shift_and_scale_exchanged,
    "queries and keys without their norm": no_norm_of_queries,
}
SDXL = {
    "the latents' scale of Flux": lambda p, m: configured(p, m, scale=0.3611),
    "times that fall": times_reversed(999),
    "sines before cosines": sines_first,
    "the clean image predicted in place of noise": predicts("sample"),
    "noise of the other sign": sign_flipped,
    "positive and negative prompt exchanged": prompts_exchanged,
    "CLIPs' rows exchanged": told(rows_exchanged),
    "the last states of the CLIPs": last_states(sdxl),
    "no text": zeroed(text=None),
    "betas even in themselves": even_betas,
    "sizes in another order": sizes_in_another_order,
    "skips of a stage in the wrong order": skips_reversed,
    "gates for values": gates_for_values,
}
BREAKS = [
    pytest.param(name, broken, id=f"{name}: {what}")
    for name, table in {"tiny-flux": FLUX, "tiny-sd35": SD35, "tiny-sdxl": SDXL}.items()
    for what, broken in table.items()
]


@pytest.mark.parametrize(("name", "broken"), BREAKS)
def test_a_broken_pipeline_generates_something_else(
    name: str, broken: Callable[[Patch, Any], None], monkeypatch: Patch
) -> None:
    broken(monkeypatch, model_of(name))
    try:
        found = right(name)
    except EridiffError:  # not finite
        found = 0.0
    assert found < BROKEN
