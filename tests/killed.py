"""Kills processes that generate, keep prompts and save checkpoints, at random times: `python -m tests.killed FOLDER COUNT`.

One parent loads everything and forks, so that a child begins at once. After each kill every file must be whole. Prints how
many files of each kind were checked, and how many kills left a temporary file behind, in the middle of a write.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

import eridiff
from eridiff.training import EmbeddingCache, Sampler


def work(sampler: Sampler, cache: EmbeddingCache, folder: Path) -> None:
    """For ever, in any order: an image with its page, a prompt, a checkpoint."""
    generator = random.Random(os.urandom(8))
    while True:
        match min(generator.randrange(4), 2):
            case 0:
                sampler.sample(generator.randrange(8))
            case 1:
                cache.encode(f"a {generator.randrange(1000)}")
            case 2:
                eridiff.save_network(sampler.inference.network, folder / "checkpoint.safetensors")


def check(folder: Path) -> dict[str, int]:
    """Read every file to its end; the number of each kind, and of temporary ones, which are removed."""
    found = {"png": 0, "safetensors": 0, "html": 0, "tmp": 0}
    for path in (p for p in folder.rglob("*") if p.is_file()):
        kind = "tmp" if path.name.startswith(".") else path.suffix[1:]
        if kind == "tmp":
            path.unlink()
        elif kind == "png":
            with Image.open(path) as image:
                image.load()
        elif kind == "safetensors":
            load_file(path)
        elif kind == "html":
            assert path.read_text().rstrip().endswith("</html>"), path
        else:
            raise AssertionError(f"{path} is not one of these files")
        found[kind] += 1
    return found


def main() -> None:
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)  # threads do not survive a fork
    inference = eridiff.load(device="cpu", progress=False)  # its checkpoint takes long enough to be interrupted
    out = folder / "run"
    section = {
        "prompts": ["a swan", "a fox"],
        "sample_steps": 1,
        "out": str(out / "samples"),
    }
    sampler = Sampler(inference, section, raise_errors=True)
    sampler.sample(0)
    cache = EmbeddingCache(inference, out / "prompts")
    total = {"png": 0, "safetensors": 0, "html": 0, "tmp": 0}
    generator = random.Random(0)
    interrupted = 0
    for _ in range(count):
        child = os.fork()
        if child == 0:
            try:
                work(sampler, cache, out)
            finally:
                os._exit(1)
        time.sleep(generator.uniform(0.05, 0.8))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child ended by itself"
        found = check(out)
        interrupted += found["tmp"] > 0
        total = {kind: total[kind] + found[kind] for kind in total}
    print(json.dumps({"killed": count, "interrupted": interrupted, **total}))


if __name__ == "__main__":
    main()
