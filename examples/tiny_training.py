"""What every training of a built-in small model shares: the optimiser, the budget of time, the checkpoint.

Muon (Jordan 2024) on the matrices and AdamW on the rest, warm-up and linear decay over a wall-clock budget, a moving
average of the weights. A run that was stopped goes on from its checkpoint, with what is left of its budget.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from eridiff.models.layers import Attention


def orthogonalised(gradient: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, by five Newton-Schulz steps (Jordan 2024), which bfloat16 is enough for."""
    x = gradient.bfloat16()
    x = x.T if gradient.shape[0] > gradient.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if gradient.shape[0] > gradient.shape[1] else x).to(gradient.dtype)


class Trainer:
    """Updates a module from losses, for a number of minutes, earlier runs of the same checkpoint included."""

    def __init__(
        self, module: nn.Module, is_matrix: Callable[[str, Tensor], bool], rate: float, minutes: float, checkpoint: Path
    ) -> None:
        """`is_matrix` tells from name and tensor which parameters Muon moves, at `rate`; the rest is AdamW's at 2e-3."""
        self.module, self.rate, self.minutes, self.checkpoint = module, rate, minutes, checkpoint
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.matrices = [p for n, p in named if is_matrix(n, p)]
        self.momenta = [torch.zeros_like(p) for p in self.matrices]
        self.adam = torch.optim.AdamW(
            [p for n, p in named if not is_matrix(n, p)], lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01
        )
        self.average = {n: p.detach().clone() for n, p in named}
        self.steps, self.seconds, self.loss = 0, 0.0, 0.0
        if checkpoint.exists():
            self.resume(torch.load(checkpoint, map_location=named[0][1].device))
        self.last = self.told = time.monotonic()

    def resume(self, state: dict[str, object]) -> None:
        for name, value in state.items():
            if name == "module":
                self.module.load_state_dict(value, strict=False)
            elif name == "adam":
                self.adam.load_state_dict(value)
            else:
                setattr(self, name, value)

    def save(self) -> None:
        """Written beside the target and renamed, so that a stopped run leaves a whole file."""
        parameters = {n: p.detach() for n, p in self.module.named_parameters()}
        names = ("average", "momenta", "steps", "seconds", "loss")
        state = {"module": parameters, "adam": self.adam.state_dict(), **{n: getattr(self, n) for n in names}}
        torch.save(state, self.checkpoint.with_suffix(".part"))
        self.checkpoint.with_suffix(".part").replace(self.checkpoint)

    @property
    def spent(self) -> float:
        """The share of the budget that is used up."""
        return self.seconds / 60 / self.minutes

    def skip(self) -> None:
        """What was done since the last update is not counted as training."""
        self.last = time.monotonic()

    def step(self, loss: Tensor) -> None:
        """One update; once a minute a line and a checkpoint."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        factor = min(1.0, (self.steps + 1) / 100) * min(1.0, max(0.02, (1 - self.spent) / 0.7))
        self.adam.param_groups[0]["lr"] = 2e-3 * factor
        self.adam.step()
        with torch.no_grad():
            for p, momentum in zip(self.matrices, self.momenta, strict=True):
                momentum.mul_(0.95).add_(p.grad)
                update = orthogonalised((p.grad + 0.95 * momentum).flatten(1))
                rate = self.rate * factor
                scale = math.sqrt(max(1.0, update.shape[0] / update.shape[1]))
                p.mul_(1 - 0.01 * rate).sub_(update.view_as(p), alpha=rate * scale)
            decay = min(0.998, (1 + self.steps) / (10 + self.steps))
            for n, p in self.module.named_parameters():
                if n in self.average:
                    self.average[n].lerp_(p, 1 - decay)
        self.module.zero_grad(set_to_none=True)
        self.steps += 1
        self.loss += (loss.item() - self.loss) * max(0.02, 1 / self.steps)
        now = time.monotonic()
        self.seconds += now - self.last
        self.last = now
        if now > self.told + 60 or self.spent >= 1:
            self.told = now
            print(f"{self.checkpoint.stem} {self.spent:.3f} step {self.steps} loss {self.loss:.4f}", flush=True)
            self.save()


def averaged(module: nn.Module, checkpoint: Path) -> nn.Module:
    """The module with the moving average of a checkpoint's weights."""
    module.load_state_dict(torch.load(checkpoint, map_location="cpu")["average"], strict=False)
    return module.eval()


def plain_attention(self: Attention, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """Attention of few tokens in three operations: the backward pass of torch's own is slower on a CPU."""
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


def is_convolution(name: str, p: Tensor) -> bool:
    """What Muon moves in an autoencoder."""
    return p.ndim == 4 and "conv_out" not in name
