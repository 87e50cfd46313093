"""With the Hugging Face Trainer: `python examples/train_hf_trainer.py [STEPS]` trains a LoRA on eight images."""

import sys
from typing import Any

import torch
from lesson import lesson
from torch import Tensor, nn
from torch.utils.data import StackDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from eridiff import inject_lora
from eridiff.models.flux import patchify
from eridiff.training import Sampler
from eridiff.training.objective import flow_levels, logit_normal, noised, squared_error, target

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
flux, latents, text, pooled = lesson()
flux.network.requires_grad_(False)
lora = inject_lora(flux.network, rank=16)
sampler = Sampler(flux, {"prompts": ["a swan on mars", "a big fox at night"], "sample_every": 50, "out": "samples"})


class Loss(nn.Module):
    """The LoRA and its network as one model that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.generator = lora.wrap(), torch.Generator().manual_seed(0)

    def forward(self, clean: Tensor, text: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        noise = torch.randn(clean.shape, generator=self.generator).to(clean.device)
        levels = flow_levels(logit_normal(len(clean), self.generator))
        times, guidance = levels.times.float(), torch.ones(len(clean), device=clean.device)
        output = self.inner(patchify(noised(clean, noise, levels)), text, pooled, times, (4, 4), guidance)
        return {"loss": squared_error(output, patchify(target(clean, noise, levels)))}


class Pictures(TrainerCallback):
    """Generates when the section says so."""

    def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
        sampler.maybe_sample(state.global_step)


def measured() -> float:
    """On all images, always with the same noise at the same times."""
    loss.generator.manual_seed(1)
    with torch.no_grad():
        every = (item.repeat(8, *[1] * (item.ndim - 1)).to(flux.device) for item in (latents, text, pooled))
        return float(loss(*every)["loss"])


loss = Loss()
before = measured()
arguments = TrainingArguments("runs", max_steps=STEPS, per_device_train_batch_size=4, learning_rate=2e-3, report_to=[], save_strategy="no", disable_tqdm=True)  # fmt: skip
data = StackDataset(clean=latents, text=text, pooled=pooled)
Trainer(loss, arguments, train_dataset=data, callbacks=[Pictures()]).train()
sampler.finish(STEPS)
print(f"loss {before:.4f} -> {measured():.4f}")
