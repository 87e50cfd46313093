"""Files with 8-bit floats: every spelling of their scales, one rounding, one dtype."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import eridiff
from eridiff import load_network
from eridiff.errors import CheckpointError
from eridiff.weights.header import open_checkpoint
from eridiff.weights.load import default_dtypes
from eridiff.weights.locate import locate
from eridiff.weights.save import save_network
from tests import tiny

State = dict[str, Tensor]
WEIGHT = "double_blocks.0.img_attn.qkv"
FORMATS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


def note(text: str = '{"format": "float8_e4m3fn"}') -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def quantised(
    state: State, kind: torch.dtype = torch.float8_e4m3fn, ending: str = ".scale_weight", rows: str = "one"
) -> State:
    """Matrices as fp8 with a scale each, a row, or a block of 8 columns; the rest as it was."""
    found: State = {}
    for name, w in state.items():
        if w.ndim != 2:
            found[name] = w
            continue
        blocks = w.shape[1] // 8 if w.shape[1] % 8 == 0 else 1
        w = w.unflatten(1, (blocks, -1))
        scale = w.abs().amax(dim={"one": (0, 1, 2), "rows": (1, 2), "blocks": (2,)}[rows], keepdim=rows != "one")
        scale = scale / torch.finfo(kind).max
        found[name] = (w / scale).to(kind).flatten(1)
        found[name.removesuffix(".weight") + ending] = (
            scale if rows == "blocks" else scale.flatten() if rows == "rows" else scale
        )
    return found


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Callable[[State], State]], Path]:
    def written(change: Callable[[State], State]) -> Path:
        path = save_network(tiny.flux(), tmp_path / "flux.safetensors")
        state, metadata = load_file(path), open_checkpoint(path).metadata
        save_file({n: t.contiguous() for n, t in change(state).items()}, path, metadata=metadata)
        return path

    return written


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rows", ["one", "rows", "blocks"])
@pytest.mark.parametrize("ending", [".scale_weight", ".weight_scale"])
def test_the_product_is_made_in_float32_and_rounded_once_to_the_dtype_that_is_asked_for(
    ending: str, rows: str, kind: torch.dtype, dtype: torch.dtype, write: Callable[..., Path]
) -> None:
    path = write(lambda state: quantised(state, kind, ending, rows))
    stored = load_file(path)
    q, scale = stored[WEIGHT + ".weight"].float(), stored[WEIGHT + ending]
    expected = {
        "one": lambda: q * scale, "rows": lambda: q * scale[:, None],
        "blocks": lambda: (q.unflatten(1, (scale.shape[1], -1)) * scale).flatten(1),
    }[rows]()  # fmt: skip
    found = load_network(path, dtype=dtype)
    assert torch.equal(found.double_blocks[0].image.qkv.weight, expected.to(dtype))
    assert {p.dtype for p in found.parameters()} == {dtype}


def test_scales_by_row_are_not_taken_in_another_order(write: Callable[..., Path]) -> None:
    """Against the weights that were quantised, so that a permutation cannot hide in the test's own formula."""
    expected = tiny.flux().double_blocks[0].image.qkv.weight
    spread = torch.linspace(0.01, 4.0, len(expected))[:, None]

    def change(state: State) -> State:
        return quantised({n: t * spread if n == WEIGHT + ".weight" else t for n, t in state.items()}, rows="rows")

    found = load_network(write(change), dtype=torch.float32).double_blocks[0].image.qkv.weight
    assert ((found - expected * spread).norm(dim=1) / (expected * spread).norm(dim=1)).max() < 0.05


@pytest.mark.parametrize("scaled", [True, False])
def test_a_file_with_fp8_weights_gives_one_dtype_the_one_that_load_computes_in(
    scaled: bool, tmp_path: Path, write: Callable[..., Path]
) -> None:
    folder = tiny.write_model(tmp_path / "model")
    path = folder / "flux.safetensors"
    state, metadata = load_file(path), open_checkpoint(path).metadata
    fp8 = quantised(state) if scaled else {n: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for n, t in state.items()}
    save_file({n: t.contiguous() for n, t in fp8.items()}, path, metadata=metadata)
    network = load_network(path)
    drawn = eridiff.load(folder, device="cpu", progress=False).network
    assert len({p.dtype for p in network.parameters()}) == 1
    assert {p.dtype for p in network.parameters()} == {p.dtype for p in drawn.parameters()}
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), drawn.parameters(), strict=True))
    (dtype,) = default_dtypes(locate(path).components, torch.device("cuda")).values()
    assert dtype in (torch.bfloat16, torch.float32)


def test_notes_of_a_quantisation_are_read_and_not_needed(write: Callable[..., Path]) -> None:
    def noted(state: State) -> State:
        found = quantised(state, ending=".weight_scale")
        bases = [n.removesuffix(".weight_scale") for n in found if n.endswith(".weight_scale")]
        more = {f"{b}.comfy_quant": note() for b in bases} | {f"{b}.input_scale": torch.tensor(0.25) for b in bases}
        return found | more | {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}

    plain = load_network(write(lambda state: quantised(state, ending=".weight_scale")), dtype=torch.float32)
    found = load_network(write(noted), dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), found.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: {f"{WEIGHT}.comfy_quant": note('{"format": "nvfp4"}')}, "says the format 'nvfp4', only float8"),
        (lambda s: {f"{WEIGHT}.comfy_quant": note("{")}, "says the format None, only float8"),
        (lambda s: {f"{WEIGHT}.comfy_quant": note('{"format": "int8_tensorwise"}'),
                    f"{WEIGHT}.weight": s[f"{WEIGHT}.weight"].float().to(torch.int8)}, "says the format 'int8_tensorwise'"),
        (lambda s: {f"{WEIGHT}.weight_scale_2": torch.ones(1)}, "unknown, the first is '.*weight_scale_2'"),
        (lambda s: {f"{WEIGHT}.pre_quant_scale": torch.ones(1)}, "unknown, the first is '.*pre_quant_scale'"),
        (lambda s: {f"{WEIGHT}.scale_weight": torch.ones(96, 3, 1)}, "not a positive scale"),
        (lambda s: {f"{WEIGHT}.scale_weight": torch.tensor(float("inf"))}, "not a positive scale"),
        (lambda s: {f"{WEIGHT}.scale_weight": torch.tensor(-1.0)}, "not a positive scale"),
    ],
)  # fmt: skip
def test_what_says_another_quantisation_is_refused_by_name(
    change: Callable[[State], State], says: str, write: Callable[..., Path]
) -> None:
    def changed(state: State) -> State:
        found = quantised(state)
        return found | change(found)

    with pytest.raises(CheckpointError, match=says):
        load_network(write(changed))


@pytest.mark.parametrize("ending", [".scale_weight", ".weight_scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_beside_a_weight_that_is_not_fp8_must_be_one(
    ending: str, dtype: torch.dtype, write: Callable[..., Path]
) -> None:
    def beside(scale: float) -> Callable[[State], State]:
        return lambda s: {n: t.to(dtype) for n, t in s.items()} | {WEIGHT + ending: torch.tensor(scale)}

    assert torch.equal(
        load_network(write(beside(1.0))).double_blocks[0].image.qkv.weight,
        tiny.flux().double_blocks[0].image.qkv.weight.to(dtype),
    )
    with pytest.raises(CheckpointError, match="is a scale other than 1 of a weight that is torch"):
        load_network(write(beside(0.5)))


def test_a_text_encoder_in_fp8_is_read_alike(tmp_path: Path) -> None:
    from eridiff.text.encoders import build_encoder

    state = {n: t for n, t in tiny.t5_module().state_dict().items() if n != "encoder.embed_tokens.weight"}
    fp8 = quantised(state) | {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    path = tmp_path / "t5.safetensors"
    save_file({n: t.contiguous() for n, t in fp8.items()}, path, metadata={"eridiff.config": json.dumps({})})
    module = build_encoder(locate(path).components["t5"], dtype=torch.float32, progress=False)
    name = "encoder.block.0.layer.0.SelfAttention.q"
    assert torch.equal(
        module.state_dict()[name + ".weight"], fp8[name + ".weight"].float() * fp8[name + ".scale_weight"]
    )
