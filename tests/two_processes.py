"""What two gloo processes do with sharded networks, run by `torchrun`; rank 0 writes what came of it."""

import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from eridiff import FluxInference, Prompt
from eridiff.errors import ConfigError, EridiffError
from eridiff.ranks import agreed, launched, spread
from eridiff.schedulers.guidance import SkipLayers
from eridiff.training import Sampler
from eridiff.training.distributed import shard
from eridiff.training.objective import discrete_levels, flow_levels, noised, squared_error, target
from tests.families import FAMILIES, conditioning, inference, inputs, packed, rows
from tests.test_undisturbed import ScheduleFree


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def latents(model: Any, told: Any) -> Tensor:
    """A small image, guided where the family is."""
    skip = {"skip_layers": SkipLayers((1,), 2.0, 0.0, 1.0)} if model.family == "mmdit" else {}
    result = model.generate(
        conditioning=told, seed=3, width=32, height=32, steps=2, cfg_scale=2.0, keep=("latents",), **skip
    )
    return result.latents


def train(model: Any, part: slice, optimizer: Any) -> dict[str, Tensor]:
    """A step on some rows of a batch of two; the gradients, whole."""
    family, network = model.family, model.network
    shares = torch.tensor([0.3, 0.8])
    levels = discrete_levels(999 * shares[part]) if family == "unet" else flow_levels(shares[part])
    clean, noise = (rows(2, model.latent_channels, 4, 4, seed=seed)[part] for seed in (5, 6))
    both = discrete_levels(999 * shares) if family == "unet" else flow_levels(shares)
    told = inputs(model, both, torch.float64)
    text, pooled, times, *rest = told
    rest = [item[part] if isinstance(item, Tensor) else item for item in rest]
    optimizer.zero_grad()
    output = network(packed(family, noised(clean, noise, levels)), text[part], pooled[part], times[:, part], *rest)
    squared_error(output, packed(family, target(clean, noise, levels))).backward()
    gradients = {name: whole(p.grad) for name, p in network.named_parameters() if p.grad is not None}
    optimizer.step()
    return gradients


def compare(name: str) -> dict[str, float | bool]:
    """A sharded network beside a plain one: images, gradients of a step, images after it."""
    plain, sharded = inference(name), inference(name)
    for model in (plain, sharded):
        model.network.double().requires_grad_(True)
    total = sum(p.numel() for p in plain.network.parameters())
    assert shard(sharded.network) is sharded.network
    local = sum(p.to_local().numel() for p in sharded.network.parameters())  # type: ignore[operator]
    told = Prompt(conditioning(plain), conditioning(plain, seed=7))
    found: dict[str, float | bool] = {"share": local / total}
    before = latents(plain, told)
    found["same image"] = torch.equal(latents(sharded, told), before)
    optimizers = [torch.optim.AdamW(m.network.parameters(), lr=1e-2) for m in (plain, sharded)]
    rank = dist.get_rank()
    expected = train(plain, slice(0, 2), optimizers[0])
    gradients = train(sharded, slice(rank, rank + 1), optimizers[1])
    found["same names"] = gradients.keys() == expected.keys()
    size = float(torch.stack([e.norm() for e in expected.values()]).norm())  # some are 0 but for rounding
    found["gradients"] = max(float((gradients[n] - e).norm()) for n, e in expected.items()) / size
    after = latents(plain, told)
    found["image after"] = float((latents(sharded, told) - after).norm() / after.norm())
    found["change"] = float((after - before).norm() / after.norm())
    return found


def sampled(out: Path) -> dict[str, Any]:
    """What a Sampler of each rank has generated: of a network under DDP, and of a sharded one."""
    found: dict[str, Any] = {}
    for name, wrap in (("ddp", nn.parallel.DistributedDataParallel), ("fsdp", shard)):
        torch.manual_seed(0)
        model = inference("flux")
        told = Prompt(conditioning(model))
        model.encode_prompt = lambda *_, told=told: told
        model.network.requires_grad_(True)
        network = wrap(model.network)  # type: ignore[operator]
        section = {
            "prompts": ["a swan", "a fox", "a dog"],
            "sample_steps": 1,
            "walk_seed": True,
            "width": 32,
            "height": 32,
            "out": str(out / name),
        }
        sampler = Sampler(model, section, verify=True, raise_errors=True)
        x = inputs(model, flow_levels(torch.tensor([0.5])))
        network(rows(1, 4, 64, dtype=torch.float32), *x).square().mean().backward()
        samples = sampler.sample(7)
        found[name] = [path.name for path in samples.paths], [image.tobytes() for image in samples.images]
    return found


def sampler_of(wrap: Any, out: Path, **options: Any) -> tuple[Any, Sampler]:
    """A Flux in training, and what samples it."""
    torch.manual_seed(0)
    model = inference("flux")
    told = Prompt(conditioning(model))
    model.encode_prompt = lambda *_, told=told: told
    model.network.requires_grad_(True)
    wrap(model.network)
    optimizer = options.pop("optimizer", lambda _: None)(model.network.parameters())
    section = {"prompts": ["a", "b", "c"], "sample_steps": 2, "width": 32, "height": 32, "out": str(out), **options}
    return model, Sampler(model, section, optimizer=optimizer)


def failures(out: Path) -> dict[str, Any]:
    """What each rank learns where one of them cannot go on, or comes late."""
    found: dict[str, Any] = {}
    rank = dist.get_rank()
    found["disk"] = sampler_of(shard, Path("/dev/null/x"))[1].sample(0).failure
    _, sampler = sampler_of(shard, out / "late", sample_max_seconds=1.0, sample_steps=4)
    time.sleep(2.0 * (rank == 1))
    found["late"] = sampler.sample(0).failure
    model, sampler = sampler_of(nn.parallel.DistributedDataParallel, out / "alone")
    if rank == 1:
        model.network.image_in.weight.data.fill_(float("nan"))
    samples = sampler.sample(0)
    found["alone"] = samples.failure, len(samples.paths)
    for name, wrap in (("fully_shard", foreign), ("FSDP1", fsdp1)):
        try:
            model = FluxInference(wrap(inference("flux").network), inference("flux").autoencoder, progress=False)
            Sampler(model, {"prompts": ["a"], "out": str(out)})
        except ConfigError as error:
            found[name] = str(error)
    return found


def foreign(network: Any) -> Any:
    """As accelerate shards."""
    for block in [*network.double_blocks, *network.single_blocks]:
        fully_shard(block)
    return fully_shard(network)


def fsdp1(network: Any) -> Any:
    return FullyShardedDataParallel(network, use_orig_params=True, device_id=torch.device("cpu"))


def schedule_free(out: Path) -> tuple[bool, bool]:
    """Whether the EMA weights of a sharded network are used, and its shards come back bit for bit."""
    _, live = sampler_of(shard, out / "live")
    model, sampler = sampler_of(shard, out / "averages", optimizer=ScheduleFree)
    before = [p.to_local().clone() for p in model.network.parameters()]
    images = [s.sample(0).images for s in (live, sampler)]
    same = all(torch.equal(a, p.to_local()) for a, p in zip(before, model.network.parameters(), strict=True))
    return all(a.tobytes() != b.tobytes() for a, b in zip(*images, strict=True)), same


def main(out: Path) -> None:
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    found: dict[str, Any] = {}
    with launched() as rank:
        for name in FAMILIES:
            found[name] = compare(name)
        found["sampled"] = sampled(out.parent)
        found["failures"] = failures(out.parent / "failures")
        found["schedule-free"] = schedule_free(out.parent / "free")
        found["spread"] = spread(5, lambda i: (i, dist.get_rank()))
        found["agreed"] = agreed(f"of rank {rank}")
        every: list[Any] = [None, None]

        def fail(i: int) -> int:
            if i == 3:
                raise EridiffError("the sea is rough")
            return i

        try:
            spread(4, fail)
        except EridiffError as error:
            found["failure"] = str(error)
        dist.gather_object(found, every if rank == 0 else None)
        if rank == 0:
            torch.save(every, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # now and then a thread of FSDP2's is not joined when the interpreter ends, and aborts it
