"""What a PNG says of an image: what was asked, and what else it depends on (which model, loaded how, computing where)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

import eridiff
from eridiff.files import content_hash
from eridiff.float8 import is_float8
from eridiff.inference.latents import dtype_of
from eridiff.inference.model import Model
from eridiff.inference.result import HandedIn
from eridiff.inference.settings import differing
from eridiff.onednn import is_onednn
from eridiff.request import Checked, Request, is_file, listed_pictures


def provenance(model: Model) -> dict[str, Any]:
    """For the record: as `load` takes it, to generate with the same model again."""
    parts = {**model.modules(), "vae": model.autoencoder}
    dtypes = {name: str(dtype_of(part)).removeprefix("torch.") for name, part in parts.items()}
    return {
        **model.source, "family": model.kind.family, "variant": model.variant,
        "sampling": differing(model.sampling, model.kind.variants[model.variant]),
        "dtype": dtypes[model.kind.family], "dtypes": dtypes, "float8": is_float8(model.network) or None, "onednn": is_onednn(model.network) or None, "threads": torch.get_num_threads(),
        "version": eridiff.__version__, "torch": torch.__version__,
    }  # fmt: skip


def records(
    model: Model, request: Request, asked: Checked, given: HandedIn, options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """For each image all that is needed to generate it again, as a PNG holds it; `options` are those of the inference."""
    pictures = {name: getattr(request, name) for name in ("image", "mask", "control", "references")}
    handed_in = [
        name for name, picture in pictures.items()
        if picture is not None and not all(map(is_file, listed_pictures(picture)))
    ]  # fmt: skip
    handed_in += [name for name in ("noise", "conditioning") if getattr(given, name) is not None]
    prompts, seeds = asked.prompt, asked.seed
    negatives = asked.negative or [None]
    rest = {
        **provenance(model), **options, "batch": len(seeds), "loras": [handle.record() for handle in model.loras] or None,
        "handed_in": handed_in,
        "hashes": {
            name: [content_hash(file) for file in listed_pictures(picture)] for name, picture in pictures.items()
            if picture is not None and name not in handed_in
        } | ({"loras": [handle.hash for handle in model.loras]} if model.loras else {}),
    }  # fmt: skip
    shared = asked.noise_generator != "each" and len(seeds) > 1  # then its row says which noise is an image's
    rows = [
        replace(
            asked,
            prompt=p,
            seed=s,
            negative=negatives[i % len(negatives)],
            **pictures,
            noise_row=(i, len(seeds)) if shared else asked.noise_row,
        )  # fmt: skip
        for i, (p, s) in enumerate(zip(prompts, seeds, strict=True))
    ]
    return [{**row.to_json(), **rest} for row in rows]
