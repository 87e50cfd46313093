"""Compiled blocks: how often, for what, and what they then compute. `Compiler` counts graphs and runs them as they are."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import eridiff
from eridiff.blocks import compile_blocks
from eridiff.cli import main
from eridiff.errors import ConfigError
from eridiff.inference import compiled
from eridiff.models.autoencoder import AutoencoderConfig
from tests import tiny
from tests.loras import same
from tests.test_lora_compile import DEEP, SMALL, Compiler
from tests.test_lora_compile import compiler as compiler

Ask = Callable[[Any, int, int], Tensor]  # a network, and a size


def tokens(network: Any, height: int, width: int, steps: int = 1, batch: int = 2) -> Tensor:
    """The last step of a run of a Flux or MMDiT at a size in tokens."""
    g, c = torch.Generator().manual_seed(height), network.config
    text, pooled = (torch.randn(batch, *shape, generator=g) for shape in ((5, c.text_width), (c.pooled_width,)))
    flux = type(network).__name__ == "Flux"
    shape = (height * width, c.in_channels) if flux else (c.in_channels, 2 * height, 2 * width)
    times, scale = torch.linspace(0.9, 0.1, steps), torch.full((batch,), 3.5)
    run = network.prepare(text, pooled, times, (height, width), *([scale] if flux else []))
    return network.step(torch.randn(batch, *shape, generator=g), run, steps - 1)


def pixels(network: Any, height: int, width: int) -> Tensor:
    """One evaluation of a UNet."""
    g, c = torch.Generator().manual_seed(height), network.config
    text, vector = (torch.randn(2, *shape, generator=g) for shape in ((5, c.text_width), (c.vector_width,)))
    return network(torch.randn(2, 4, 4 * height, 4 * width, generator=g), text, vector, torch.tensor([500.0, 500.0]))


def decoded(network: Any, height: int, width: int) -> Tensor:
    return network.decode(torch.randn(1, 16, height, width, generator=torch.Generator().manual_seed(height)))


def unet(*depths: int) -> Any:
    return tiny.unet(replace(tiny.UNET, channel_multipliers=(1, 2), transformer_depths=depths, middle_depth=2))


MMDIT = replace(tiny.MMDIT, depth=4)
NETWORKS: dict[
    str, tuple[Ask, int, Callable[[], Any], Callable[[], Any]]
] = {  # how to ask, graphs, two networks of so many
    "flux": (tokens, 2, lambda: tiny.flux(DEEP), lambda: tiny.flux(SMALL)),
    "mmdit": (tokens, 3, lambda: tiny.mmdit(MMDIT), lambda: tiny.mmdit()),  # with a second attention, plain, the last
    # these see several sizes in each call
    "unet": (pixels, 10, lambda: unet(0, 3), lambda: unet(0, 1)),  # by their channels
    "decoder": (decoded, 5, lambda: tiny.autoencoder(FLAT), lambda: tiny.autoencoder(replace(FLAT, residual_blocks=2))),
}
FLAT = AutoencoderConfig(32, (1, 1, 1, 1), 1)
EACH = [pytest.param(name, marks=pytest.mark.slow) if name != "flux" else name for name in NETWORKS]


@torch.no_grad()
@pytest.mark.parametrize("name", EACH)
def test_each_kind_of_block_is_one_graph_and_a_second_size_one_more(name: str, compiler: Compiler) -> None:
    ask, graphs, build, other = NETWORKS[name]
    network, eager = build(), build()
    compile_blocks(network, backend=compiler, fullgraph=True)
    counts = []
    for size in ((2, 3), (4, 4), (4, 6), (6, 4)):
        assert torch.equal(ask(network, *size), ask(eager, *size))
        counts.append(compiler.count)
    assert counts[0] == graphs and counts[1] <= 2 * graphs and len(set(counts[1:])) == 1
    compiler.count = 0
    torch.compiler.reset()
    shorter = other()
    compile_blocks(shorter, backend=compiler, fullgraph=True)
    ask(shorter, 2, 3)
    assert compiler.count == graphs


@torch.no_grad()
def test_another_number_of_steps_compiles_at_most_once_more(compiler: Compiler) -> None:
    network, eager = tiny.flux(DEEP), tiny.flux(DEEP)
    compile_blocks(network, backend=compiler, fullgraph=True)
    counts = []
    for steps in (2, 3, 5, 4):
        assert torch.equal(tokens(network, 2, 3, steps), tokens(eager, 2, 3, steps))
        counts.append(compiler.count)
    assert counts[0] == 2 and counts[1] <= 4 and len(set(counts[1:])) == 1


def test_training_and_sampling_take_turns_with_one_compiled_network(compiler: Compiler) -> None:
    networks = [tiny.flux(SMALL).requires_grad_(True) for _ in range(2)]
    compile_blocks(networks[0], backend=compiler, fullgraph=True)
    optimizers = [torch.optim.Adam(network.parameters(), 1e-3) for network in networks]
    counts, images = [], []
    for _ in range(3):
        gradients = []
        for network, optimizer in zip(networks, optimizers, strict=True):
            optimizer.zero_grad()
            tokens(network, 2, 3).square().mean().backward()
            gradients.append([p.grad for p in network.parameters() if p.grad is not None])
            optimizer.step()
        assert len(gradients[0]) == len(gradients[1]) > 50
        assert all(same(a, b, 1e-5) for a, b in zip(*gradients, strict=True))
        with torch.no_grad():
            sampled = [tokens(network, 2, 3, steps=3) for network in networks]
        assert same(*sampled, 1e-5)
        images.append(sampled[0])
        counts.append(compiler.count)
    assert counts == [4, 4, 4]  # a graph for each kind of block with gradients, and one without
    assert not torch.equal(images[0], images[2])


@torch.no_grad()
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_the_kernels_of_attention_are_those_that_the_caller_chooses(how: str, compiler: Compiler) -> None:
    network = tiny.flux(SMALL)
    if how == "compiled":  # down to the kernels, among which inductor does not choose again
        compile_blocks(network, backend="aot_eager", fullgraph=True)

    def kernels() -> set[str]:
        tokens(network, 2, 3)  # what compiles runs other operations too
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            tokens(network, 2, 3)
        names = " ".join(event.name for event in seen.events() or ())
        return {word for word in ("flash", "softmax") if word in names}

    assert kernels() == {"flash"}
    with sdpa_kernel(SDPBackend.MATH):
        assert kernels() == {"softmax"}
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            assert kernels() == {"flash"}
        assert kernels() == {"softmax"}
    assert kernels() == {"flash"}


@pytest.fixture
def without_inductor(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """`compile=True` with the counting backend."""
    monkeypatch.setattr(compiled, "compile_blocks", partial(compile_blocks, backend=compiler, fullgraph=True))
    return compiler


ASKED: dict[str, Any] = {"seed": 3, "steps": 2, "width": 64, "height": 64}


@pytest.mark.parametrize("offload", [None, "stages"])
def test_a_model_that_is_compiled_when_loaded_generates_the_same(
    offload: str | None, without_inductor: Compiler
) -> None:
    def image(**options: Any) -> Any:
        return eridiff.load("tiny-flux", device="cpu", progress=False, **options).generate("a swan on mars", **ASKED)

    plain = image()
    assert without_inductor.count == 0 and plain.settings[0]["compile"] is False
    found = image(compile=True, offload=offload)
    assert without_inductor.count == 2 and found.settings[0]["compile"] is True
    assert found.images[0].tobytes() == plain.images[0].tobytes()


def test_the_command_line_compiles_and_says_what_to_wait_for(
    without_inductor: Compiler, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kept"))
    file = tmp_path / "run.yaml"
    file.write_text("model: tiny-flux\ncompile: true\nsample: {prompts: [a swan on mars]}\n")
    for words in (["--compile", "--model", "tiny-flux", "--prompt", "a swan on mars"], [str(file)]):
        without_inductor.count = 0
        torch.compiler.reset()
        assert main(["sample", *words, "--device", "cpu", "--steps", "1", "--out", str(tmp_path / "a.png")]) == 0
        said = capsys.readouterr().err
        assert without_inductor.count == 2
        assert (
            said.count("the first image waits until the network is compiled") == 1
            and f"{tmp_path / 'kept'} keeps it" in said
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"offload": "layers"},
            "offload='layers' moves them meanwhile: leave compile out, or take offload='stages'",
        ),
        ({"compile": "yes"}, "compile must be True or False, not 'yes'"),
    ],
)
def test_what_cannot_be_compiled_is_refused_before_anything_is_read(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        eridiff.load("tiny-flux", device="cpu", **{"compile": True, **options})


def test_modules_that_are_passed_are_compiled_by_their_owner() -> None:
    with pytest.raises(ConfigError, match="eridiff.blocks.compile_blocks compiles them"):
        eridiff.FluxInference(tiny.flux(), tiny.autoencoder(), compile=True)


def test_without_a_compiler_one_sentence_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from torch._inductor import config, cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    command = ["sample", "--compile", "--device", "cpu", "--prompt", "a swan on mars", "--out", str(tmp_path / "a.png")]
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):  # monkeypatch would delete the option on its way back
        assert main(command) == 2
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith(
            "eridiff: the network cannot be compiled here: torch finds no C++ compiler (g++, or what the variable CXX names); "
            "leave compile out"
        )
    )
    cpp_builder.cpp_compiler_search.cache_clear()


def test_the_work_of_the_compiler_is_kept_with_the_users_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "TORCHINDUCTOR_CACHE_DIR"
    monkeypatch.setenv(name, str(tmp_path / "chosen"))
    assert compiled.cache_folder() == str(tmp_path / "chosen")
    monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiled.cache_folder() == os.environ[name] == str(tmp_path / "eridiff" / "compiled")
    assert Path(os.environ[name]).is_dir()
    monkeypatch.setenv(name, os.path.join(tempfile.gettempdir(), "torchinductor_me"))  # which torch sets by itself
    assert compiled.cache_folder() == str(tmp_path / "eridiff" / "compiled")
    monkeypatch.delenv(name)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compiled.cache_folder() == "torch's temporary folder" and name not in os.environ


WARM = """
import json, os, torch, eridiff
from torch._dynamo.utils import counters
model = eridiff.load("tiny-flux", device="cpu", progress=False, compile=True)
result = model.generate("a swan on mars", seed=3, steps=2, width=64, height=64, keep=("latents",))
counts = {name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss")}
print(json.dumps([counts, os.environ["TORCHINDUCTOR_CACHE_DIR"], result.latents.flatten().tolist()]))
"""


@pytest.mark.slow
def test_a_second_process_starts_warm_and_computes_what_eager_mode_does(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    found = []
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", WARM], capture_output=True, text=True, env=environment, check=True)
        found.append(json.loads(run.stdout.splitlines()[-1]))
    (first, folder, cold), (second, _, warm) = found
    assert folder == str(tmp_path / "eridiff" / "compiled")
    assert (first["hit"], second["miss"]) == (0, 0) and first["miss"] == second["hit"] == 2
    plain = eridiff.load("tiny-flux", device="cpu", progress=False).generate(
        "a swan on mars", **ASKED, keep=("latents",)
    )
    latents = plain.latents
    assert latents is not None and cold == warm and same(torch.tensor(cold), latents.flatten(), 1e-4)
