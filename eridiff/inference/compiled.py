"""A network that is compiled when it is loaded, and where the compiler keeps its work for later processes."""

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from eridiff.blocks import compile_blocks
from eridiff.errors import ConfigError

log = logging.getLogger(__name__)


def compile_network(network: Any) -> None:
    """Compile the network's blocks, when its first step asks for it, into the folder of the cache; says so in the log."""
    log.info(waiting_notice())
    compile_blocks(network)


def waiting_notice() -> str:
    """What a user should know who waits for the first image."""
    return (
        f"the first image waits until the network is compiled, for seconds to a few minutes; {cache_folder()} keeps it, so "
        "that later processes wait less"
    )


def check_compiler(device: torch.device) -> None:
    """Raises ConfigError where torch finds no compiler for the device: a C++ compiler for a CPU, Triton for CUDA."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        lacking = None if has_triton() else "torch finds no Triton (pip install triton) that works with this GPU"
    else:
        lacking = None if has_cpp_compiler() else "torch finds no C++ compiler (g++, or what the variable CXX names)"
    if lacking:
        raise ConfigError(f"the network cannot be compiled here: {lacking}; leave compile out")


def has_cpp_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError:  # InvalidCxxCompiler; on Windows one without a class
        return False
    return True


def cache_folder() -> str:
    """Where inductor keeps its work: TORCHINDUCTOR_CACHE_DIR, by default a folder of the user's cache.

    torch's own default is in the temporary folder, which the next start of the machine may empty; it is taken where the user's
    cache cannot be written.
    """
    name = "TORCHINDUCTOR_CACHE_DIR"
    given = Path(os.environ.get(name, ""))
    by_import = given.parent == Path(tempfile.gettempdir()) and given.name.startswith("torchinductor_")  # of torch
    if name in os.environ and not by_import:
        return os.environ[name]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eridiff" / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return "torch's temporary folder"
    if not os.access(folder, os.W_OK):
        return "torch's temporary folder"
    os.environ[name] = str(folder)
    return str(folder)
