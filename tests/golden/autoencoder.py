"""The autoencoders of 4 and 16 channels."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eridiff.trace.record import record
from tests.golden.case import Row, inputs_of, opened, placed, row


def run_autoencoder(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    model, given = opened(case).load(dtype), inputs_of(case)
    picture, latents, noise = (given[n].to(dtype) for n in ("image", "latents", "noise"))
    with torch.no_grad(), record(model) as recording:
        mean, log_variance = model.moments(picture)
        outputs = {
            "moments": torch.cat([mean, log_variance], 1),
            "mode": mean,
            "latents.mode": model.encode(picture),
            "latents.sample": model.encode(picture, noise),
            "decoded": model.decode(latents),
        }
    rows = []
    for name, tensor in expected.items():
        if name.endswith(".float32"):
            continue
        found = outputs[name] if name in outputs else placed(recording, name, model)
        bound = 1e-5 if dtype == torch.float32 else 1e-9 if name in outputs else 1e-6
        rows.append(row(case, dtype, name, found, tensor, bound))
    return rows
