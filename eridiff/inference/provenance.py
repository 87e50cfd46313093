"""What a PNG says of an image: what was asked, and what else it depends on (which model, loaded how, computing where)."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

import eridiff
from eridiff.files import content_hash
from eridiff.inference.latents import dtype_of
from eridiff.inference.result import HandedIn
from eridiff.request import Checked, Request, is_file, listed_pictures
from eridiff.weights.locate import TEXT_ENCODERS

if TYPE_CHECKING:
    from eridiff.inference.base import DiffusionInference


def provenance(drawer: "DiffusionInference") -> dict[str, Any]:
    """For the record: as `load` takes it, to draw with the same model again."""
    parts = {drawer.family: drawer.network, "vae": drawer.autoencoder}
    encoders = {name: getattr(drawer, name, None) for name in TEXT_ENCODERS}
    parts |= {name: encoder.module for name, encoder in encoders.items() if encoder is not None}
    dtypes = {name: str(dtype_of(part)).removeprefix("torch.") for name, part in parts.items()}
    refiner = getattr(drawer, "refiner", None)
    refined = {} if refiner is None else {"refiner": refiner.source.get("parts")}
    published = vars(drawer.variants[drawer.variant])
    return {
        **drawer.source, **refined, "family": drawer.family, **{name: getattr(drawer, name) for name in drawer.recorded},
        "sampling": {name: value for name, value in vars(drawer.sampling).items() if value != published[name]},
        "dtype": dtypes[drawer.family], "dtypes": dtypes, "device": drawer.device.type, "threads": torch.get_num_threads(),
        "version": eridiff.__version__, "torch": torch.__version__,
    }  # fmt: skip


def records(drawer: "DiffusionInference", request: Request, asked: Checked, given: HandedIn) -> list[dict[str, Any]]:
    """For each image all that is needed to generate it again, as a PNG holds it."""
    pictures = {name: getattr(request, name) for name in ("image", "mask", "control", "references")}
    handed_in = [
        name for name, picture in pictures.items()
        if picture is not None and not all(map(is_file, listed_pictures(picture)))
    ]  # fmt: skip
    handed_in += [name for name in ("noise", "conditioning") if getattr(given, name) is not None]
    prompts, seeds = asked.prompt, asked.seed
    negatives = asked.negative or [None]
    rest = {
        **provenance(drawer), "batch": len(seeds), "loras": [handle.record() for handle in drawer.loras] or None,
        "handed_in": handed_in,
        "hashes": {
            name: [content_hash(file) for file in listed_pictures(picture)] for name, picture in pictures.items()
            if picture is not None and name not in handed_in
        } | ({"loras": [handle.hash for handle in drawer.loras]} if drawer.loras else {}),
    }  # fmt: skip
    rows = [
        replace(asked, prompt=p, seed=s, negative=negatives[i % len(negatives)], **pictures)
        for i, (p, s) in enumerate(zip(prompts, seeds, strict=True))
    ]
    return [{**row.to_json(), **rest} for row in rows]
