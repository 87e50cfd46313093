"""What ports of others need beside the command: weights in their language, recorders that know nothing of eridiff."""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor

from eridiff import load_network
from eridiff.models.flux import position_ids
from eridiff.trace.compare import compare
from eridiff.trace.format import read_trace
from eridiff.trace.hashfill import uniform
from eridiff.trace.record import record
from eridiff.trace.report import Report
from tests.test_diffusers import GRID, flux_inputs, reference_flux
from tests.tiny import scaled

EXAMPLES = Path(__file__).parents[1] / "examples"
COMPILERS = {
    "c": ["cc", "-O2", "hashfill.c", "-o", "program"], "rs": ["rustc", "-O", "hashfill.rs", "-o", "program"], "js": ["node"],
}  # fmt: skip


@pytest.mark.parametrize("language", COMPILERS)
@pytest.mark.parametrize(("salt", "name"), [("eridiff", "a.weight"), ("flux-dev-tiny", "input:img"), ("ü", "é.0.ß")])
def test_weights_are_the_same_in_every_language(language: str, salt: str, name: str, tmp_path: Path) -> None:
    compiler, *rest = COMPILERS[language]
    source = shutil.copy(EXAMPLES / "hashfill" / f"hashfill.{language}", tmp_path)
    assert len(Path(source).read_text().splitlines()) <= 32
    if shutil.which(compiler) is None:  # the tests install none; the source's length is checked all the same
        pytest.skip(f"there is no {compiler} here")
    if rest:
        subprocess.run([compiler, *rest], cwd=tmp_path, check=True)
    program = ["./program"] if rest else [compiler, f"hashfill.{language}"]
    said = subprocess.run(
        [*program, salt, name, "1000"], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout
    assert list(map(float, said.split())) == uniform(name, (1000,), salt).tolist()


# diffusers' own classes, recorded by the example -----------------------------------------------------------------------


def recorder(name: str = "trace_diffusers") -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flux_pair() -> tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]:
    x, times, guidance = flux_inputs(torch.float32), torch.tensor([0.3, 0.9]), torch.tensor([3.5, 2.0])
    theirs = lambda network: network(  # noqa: E731
        hidden_states=x["latents"], encoder_hidden_states=x["text"], pooled_projections=x["pooled"], timestep=times,
        guidance=guidance, img_ids=position_ids(GRID), txt_ids=torch.zeros(5, 3),
    )  # fmt: skip
    return (
        reference_flux(),
        theirs,
        lambda network: network(x["latents"], x["text"], x["pooled"], times, GRID, guidance),
    )


def sd3_pair() -> tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]:
    network = scaled(
        SD3Transformer2DModel(
            sample_size=32, patch_size=2, in_channels=16, num_layers=3, attention_head_dim=64, num_attention_heads=2,
            joint_attention_dim=20, caption_projection_dim=128, pooled_projection_dim=16, out_channels=16, pos_embed_max_size=8,
            dual_attention_layers=(0,), qk_norm="rms_norm",
        )
    )  # fmt: skip
    latents, text, pooled, times = drawn(2, 16, 6, 4), drawn(2, 5, 20), drawn(2, 16), torch.tensor([0.3, 0.9])
    theirs = lambda network: network(latents, text, pooled, 1000 * times)  # noqa: E731
    return network, theirs, lambda network: network(latents, text, pooled, times)


def vae_pair() -> tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]:
    network = scaled(
        AutoencoderKL(
            block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1, latent_channels=4, norm_num_groups=32,
        )
    )  # fmt: skip
    picture = drawn(1, 3, 16, 16)
    return network, lambda network: network(picture), lambda network: network(picture)


PAIRS = {"flux": (flux_pair, 125), "mmdit": (sd3_pair, 120), "vae": (vae_pair, 160)}


def beside(
    family: str, folder: Path, change: Callable[[Any], None] = lambda network: None, explain: bool = False
) -> Report:
    """diffusers' class as the example records it beside eridiff's, with the same weights; `change` may spoil diffusers'."""
    reference, theirs, ours = PAIRS[family][0]()
    reference.save_pretrained(folder / "m")
    network = load_network(folder / "m", dtype=torch.float32, progress=False)
    change(reference)
    with torch.no_grad():
        with recorder().recorded(reference, folder / "theirs.safetensors"):
            theirs(reference)
        with record(network, to=folder / "ours.safetensors"):
            ours(network)
    traces = read_trace(folder / "theirs.safetensors"), read_trace(folder / "ours.safetensors")
    wide = load_network(folder / "m", dtype=torch.float64, progress=False)
    return compare(*traces, network=wide, explain=explain)


@pytest.mark.parametrize("family", PAIRS)
def test_diffusers_classes_recorded_by_the_example_are_equal(family: str, tmp_path: Path) -> None:
    report = beside(family, tmp_path)
    assert report.equal and len([row for row in report.rows if row.other]) >= PAIRS[family][1]


def epsilon(network: Any) -> None:
    for module in network.modules():
        if type(module).__name__ == "RMSNorm":
            module.eps = 1e-2


def erf(network: Any) -> None:
    for module in network.modules():
        if type(module).__name__ == "GELU":
            module.approximate = "none"


@pytest.mark.parametrize(
    ("family", "change", "first", "says"),
    [
        ("flux", epsilon, "transformer_blocks.0.attn.norm_q", ""),
        ("flux", erf, "transformer_blocks.0.ff.net.2:0", "the erf form of GELU in place of tanh"),
        ("mmdit", erf, "transformer_blocks.0.ff.net.2:0", "the erf form of GELU in place of tanh"),
        ("mmdit", lambda n: n.transformer_blocks[1].attn.to_v.weight.data.mul_(1.01), "transformer_blocks.1.attn.to_q ... to_v", ""),
        ("flux", lambda n: n.norm_out.linear.bias.data.add_(0.01), "norm_out.linear", ""),
        ("vae", lambda n: n.decoder.mid_block.attentions[0].to_k.weight.data.mul_(2), "decoder.mid_block.attentions.0.to_k", ""),
    ],
    ids=["epsilon", "gelu", "gelu of SD 3", "v", "last modulation", "decoder's attention"],
)  # fmt: skip
def test_an_error_in_diffusers_classes_is_found_through_their_names(
    family: str, change: Callable[[Any], None], first: str, says: str, tmp_path: Path
) -> None:
    report = beside(family, tmp_path, change, explain=bool(says))
    assert report.made[0].name == first and says in report.made[0].cause


# the originals' code, recorded by the example --------------------------------------------------------------------------

ORIGINALS = {  # stand-ins: as in the originals, attention is a function of a file, not a module
    "flux.math": """
import torch
def attention(q, k, v, pe):
    q, k = apply_rope(q, k, pe)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
def apply_rope(q, k, pe):
    turned = [torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) for x in (q, k)]
    return tuple(pe[0] * x + pe[1] * y for x, y in zip((q, k), turned))
""",
    "flux.modules.layers": """
import torch
from flux.math import attention
class SingleStreamBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear1, self.linear2 = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)
    def forward(self, x, pe):
        q, k, v = self.linear1(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return x + self.linear2(attention(q, k, v, pe=pe))
""",
    "other_impls": """
import torch
def attention(q, k, v, heads, mask=None):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
""",
    "mmditx": """
import torch
from other_impls import attention
class JointBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(8, 24)
    def forward(self, context, x, c):
        q, k, v = self.qkv(torch.cat([context, x], 1)).chunk(3, -1)
        return None, x + attention(q, k, v, 2)[:, context.shape[1]:]
""",
    "sgm.modules.attention": """
import torch
class BasicTransformerBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = torch.nn.LayerNorm(8)
    def forward(self, x, context=None):
        return x + self.norm1(x)
""",
}


@pytest.fixture
def originals(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for name, text in ORIGINALS.items():
        for i in range(1, 1 + name.count(".")):
            monkeypatch.setitem(sys.modules, name.rsplit(".", i)[0], ModuleType(name.rsplit(".", i)[0]))
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(text, vars(module))
    return {name: sys.modules[name] for name in ORIGINALS}


def test_the_originals_code_is_recorded_with_its_functions_and_left_as_it_was(
    originals: dict[str, Any], tmp_path: Path
) -> None:
    files = {name: dict(vars(module)) for name, module in originals.items()}
    flux, sd3, sgm = (originals[name] for name in ("flux.modules.layers", "mmditx", "sgm.modules.attention"))
    x = drawn(2, 5, 8)
    runs: dict[str, tuple[torch.nn.Module, tuple[Tensor, ...], list[str]]] = {
        "single_blocks": (flux.SingleStreamBlock(), (x, torch.ones(2, 1, 1, 5, 4)), ["q_rope", "k_rope", "attention", "linear2"]),
        "joint_blocks": (sd3.JointBlock(), (x, x[:, :3], x), ["attention", "qkv:0", "1"]),
        "transformer_blocks": (sgm.BasicTransformerBlock(), (x,), ["norm1", "norm1:0", ""]),
    }  # fmt: skip
    for parent, (block, given, names) in runs.items():
        network = torch.nn.ModuleDict({parent: torch.nn.ModuleList([block])})
        network.forward = lambda *a, block=block: block(*a)  # type: ignore[method-assign]
        plain = network(*given)
        with recorder("trace_original").recorded(network, tmp_path / "t.safetensors"):
            again, second = network(*given), network(*given)
        trace = read_trace(tmp_path / "t.safetensors")
        last = again[1] if isinstance(again, tuple) else again
        assert torch.equal(last, plain[1] if isinstance(plain, tuple) else plain) and second is not None
        wanted = [f"{parent}.0{'.' if name else ''}{name}" for name in names]
        assert trace.ordered and all(name in trace and f"{name}@1" in trace for name in wanted), parent
    assert {name: dict(vars(module)) for name, module in originals.items()} == files


@pytest.mark.parametrize("name", ["trace_diffusers", "trace_original"])
def test_a_recorder_is_short_and_needs_no_eridiff(name: str) -> None:
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    assert len(lines) <= 60 and not any("eridiff" in line for line in lines if line.startswith(("import", "from")))
