"""Two processes train a LoRA as one does: under DistributedDataParallel, and beside a network that FSDP2 shards."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from eridiff.lora import LoraSet, all_reduce_gradients, attach_lora, inject_lora, merge_into
from eridiff.training.distributed import shard
from tests import tiny
from tests.loras import arguments, ask, every_kind_on_flux, same

STEPS = 3


def start() -> tuple[Any, LoraSet]:
    network = tiny.flux().double()
    lora = inject_lora(network, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return network, lora


def train(module: nn.Module, lora: LoraSet, rows: slice, after_backward: Any = None) -> list[Tensor]:
    """The LoRA's parameters after some steps on these rows of a batch of two."""
    latents, (text, pooled, times, grid, guidance) = arguments(lora.network, dtype=torch.float64)
    optimizer = torch.optim.AdamW(lora.parameters(), 0.01)
    for i in range(STEPS):
        optimizer.zero_grad()
        both = times[:, None].expand(2, 2)[i % 2 : i % 2 + 1]
        output = module(latents[rows], text[rows], pooled[rows], both[:, rows], grid, guidance[rows])
        (output - 1).square().mean().backward()
        if after_backward:
            after_backward(lora)
        optimizer.step()
    return [parameter.detach().clone() for parameter in lora.parameters()]


def merges() -> dict[str, Any]:
    """What a network that FSDP2 shards gives merged, with every kind attached, and after each; and a plain one."""
    found: dict[str, Any] = {}
    lora = every_kind_on_flux(tiny.flux().double())
    for name, wrap in (("plain", lambda network: network), ("sharded", shard)):
        network = wrap(tiny.flux().double())
        with torch.no_grad():
            found[name] = [ask(network)]
            merged = merge_into(network, lora, 0.7, dtype=torch.float64)
            found[name] += [ask(network), merged.merged.changed]
            merged.restore()
            found[name].append(ask(network))
            with attach_lora(network, lora, 0.7).detached():
                found[name].append(ask(network))
            found[name].append(ask(network))
    return found


def process(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    rows = slice(rank, rank + 1)
    found: dict[str, Any] = {}
    network, lora = start()
    found["wrapped"] = train(nn.parallel.DistributedDataParallel(lora.wrap()), lora, rows)
    network, lora = start()
    try:
        nn.parallel.DistributedDataParallel(network)
    except RuntimeError as error:
        found["refused"] = str(error)
    network.final.linear.requires_grad_(True)  # something of the base trains too: the branches' gradients stay apart
    found["naive"] = train(nn.parallel.DistributedDataParallel(network), lora, rows)
    from torch.distributed.fsdp import fully_shard

    for name, after in (("sharded", all_reduce_gradients), ("alone", None)):
        network, lora = start()
        for block in [*network.double_blocks, *network.single_blocks]:
            fully_shard(block)
        for block in [*network.double_blocks, *network.single_blocks]:
            torch.distributed.fsdp.register_fsdp_forward_method(block, "modulate")
        found[name] = train(network, lora, rows, after)
    network, lora = start()
    unused = inject_lora(network, 1, targets="final.linear", dtype=torch.float64)
    unused.detach()
    all_reduce_gradients(unused)
    found["unused"] = [bool(p.grad.any()) for p in unused.parameters()]
    found["merges"] = merges()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()  # a rank that ends before the other would close connections that it uses
    dist.destroy_process_group()
    os._exit(0)  # now and then a thread of FSDP2's is not joined when the interpreter ends, and aborts it


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    import socket

    folder: Path = tmp_path_factory.mktemp("processes")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.spawn(process, (str(folder), port), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone() -> list[Tensor]:
    network, lora = start()
    return train(network, lora, slice(0, 2))


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(same(x, y, 1e-9) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("how", ["wrapped", "sharded"])
def test_two_processes_train_as_one(how: str, found: list[dict[str, Any]], alone: list[Tensor]) -> None:
    assert equal(found[0][how], alone) and equal(found[1][how], alone)
    assert not equal(alone, [p.detach() for p in start()[1].parameters()])


@pytest.mark.parametrize("how", ["naive", "alone"])
def test_without_wrap_or_reduction_processes_drift_apart(how: str, found: list[dict[str, Any]]) -> None:
    assert not equal(found[0][how], found[1][how])


def test_a_sharded_network_is_merged_and_changed_in_place_as_a_whole_one(found: list[dict[str, Any]]) -> None:
    for each in (one["merges"] for one in found):
        base, merged, changed, restored, detached, attached = each["sharded"]
        for own, plain in zip((base, merged, attached), (each["plain"][i] for i in (0, 1, 5)), strict=True):
            assert same(own, plain, 1e-12)
        assert torch.equal(restored, base) and torch.equal(detached, base) and not same(merged, base, 1e-3)
        assert same(merged, attached, 1e-9) and changed == each["plain"][2]


def test_a_frozen_network_alone_is_not_a_module_to_distribute(found: list[dict[str, Any]]) -> None:
    assert "doesn't have any parameter" in found[0]["refused"]


def test_a_branch_that_a_process_did_not_use_counts_as_zero(found: list[dict[str, Any]]) -> None:
    assert found[0]["unused"] == found[1]["unused"] == [False, False]
