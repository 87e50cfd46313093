"""A section of `benchmarks/gpu.py`: a LoRA on a Flux of flux1-dev's size in training, and images in between."""

import tempfile
import time
from typing import Any

import torch

from benchmarks.gpu_measure import free, synchronise
from benchmarks.gpu_offload import bytes_of, empty_parts, fill, whole
from benchmarks.gpu_sections import Bench
from eridiff import FluxInference, inject_lora
from eridiff.blocks import checkpoint_blocks
from eridiff.training import Sampler

STEPS, SAMPLED = 6, 2  # the image is generated behind the step SAMPLED
T5_LAYERS = 1  # the text's numbers do not matter here


def run(bench: Bench) -> None:
    """The same training without and with an image in between: losses, seconds and memory; then the LoRA's own rows."""
    device, tiny = bench.device, bench.tiny
    parts = empty_parts(tiny, T5_LAYERS)
    needed = 1.6 * sum(bytes_of(module) for module in parts.values())
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < needed:
        return bench.row("training", "not run", f"{needed / 1e9:.0f} GB are needed")
    for module in parts.values():
        fill(module)
        module.to(device)
    model = whole(parts, device)
    size = 64 if tiny else 1024
    section = {"prompts": ["a white swan on mars"], "sample_steps": 4, "seed": 1, "width": size, "height": size}
    plain = generated(model, size)
    losses = {}
    for sampling in (False, True):
        name = "with an image in between, verify=True" if sampling else "without images"
        with bench.guarded(name), tempfile.TemporaryDirectory() as out:
            losses[name] = trained(bench, name, model, {**section, "out": out}, sampling)
    if len(losses) == 2:
        same = len(set(map(tuple, losses.values()))) == 1
        bench.row("the same losses, bit for bit", "done" if same else "failed", None if same else f"{losses}")
    with bench.guarded("LoRA on the layers of modulation"):
        modulation(bench, model, plain, size)


def generated(model: FluxInference, size: int) -> torch.Tensor:
    """Latents of an image in four steps."""
    result = model.generate("a white swan on mars", width=size, height=size, steps=4, seed=1, keep=("latents",))
    assert result.latents is not None
    return result.latents.cpu()


def trained(bench: Bench, name: str, model: Any, section: dict[str, Any], sampling: bool) -> list[float]:
    """A few steps at a batch of one, with checkpointed blocks; puts seconds and memory into the table."""
    device, on_gpu = bench.device, bench.device.type == "cuda"
    free(device)
    generator = torch.Generator().manual_seed(0)
    lora = inject_lora(model.network, 16, targets="*", generator=generator).to(device)
    sampler = Sampler(model, section, verify=True, raise_errors=True)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=1e-3)
    side, config = section["width"] // 16, model.network.config
    losses, steps, event = [], [], 0.0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        for step in range(STEPS):
            begun = time.monotonic()
            shapes = [(1, side**2, config.in_channels)] * 2 + [(1, 512, config.text_width), (1, config.pooled_width)]
            clean, noise, text, pooled = (torch.randn(s, generator=generator).bfloat16().to(device) for s in shapes)
            level = torch.rand(1, generator=generator).to(device)
            x = (level * noise + (1 - level) * clean).bfloat16()
            guidance = torch.ones(1, device=device)
            with checkpoint_blocks(model.network):
                velocity = model.network(x, text, pooled, level, (side, side), guidance)
                loss = (velocity.float() - (noise - clean).float()).square().mean()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            steps.append(time.monotonic() - begun)
            if sampling and step == SAMPLED:
                begun = time.monotonic()
                sampler.sample(step)
                synchronise(device)
                event = time.monotonic() - begun
        memory = {"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if on_gpu else {}
        before, after = sorted(steps[1 : SAMPLED + 1])[0], sorted(steps[SAMPLED + 1 :])[0]
        bench.row(name, seconds_a_step=before, seconds_a_step_later=after, seconds_of_the_image=event or None, **memory)
    finally:
        lora.detach()
    return losses


def modulation(bench: Bench, model: Any, plain: torch.Tensor, size: int) -> None:
    """Attached, rescaled and detached: what a run has computed once must follow."""
    lora = inject_lora(model.network, 16, targets="*modulation", generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    lora.to(bench.device)
    found = {scale: generated(model, size) for scale in (1.0, 0.5, 0.0) if lora.set_scale(scale)}
    lora.detach()
    distances = {scale: float((x - plain).norm() / plain.norm()) for scale, x in found.items()}
    bench.row("LoRA on the layers of modulation", moved_by_1=distances[1.0], moved_by_half=distances[0.5])
    right = distances[1.0] != distances[0.5] > 0 == distances[0.0] and torch.equal(generated(model, size), plain)
    bench.row("scale 0 and detached: as without it", "done" if right else "failed", None if right else f"{distances}")
