"""`eridiff plan` and `vram=`: from headers alone, which placement fits a device, or why none does."""

import json
import math
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import eridiff
from benchmarks import plan_memory
from eridiff.cli import main
from eridiff.errors import ConfigError, MemoryPlanError
from eridiff.inference import BUILT_IN, FAMILIES
from eridiff.inference.placing import MALLOC, RUNTIME, Plan, Room, bytes_of, plan_parts
from eridiff.inference.sdxl import refiner_parts
from eridiff.memory.plan import peak_bytes, stages
from eridiff.text.encoders import empty
from eridiff.weights.detect import detect
from eridiff.weights.header import open_checkpoint
from eridiff.weights.locate import locate
from tests import tiny
from tests.sparse import sparse_manifest

GIB = 2**30
PUBLISHED = {
    "flux1-dev": {"transformer": "flux1-dev", "vae": "ae", "clip": "clip_l", "t5": "t5xxl"},
    "sd3.5-large": {"transformer": "sd3.5-large", "vae": "sd3.5-large", "clip": "clip_l", "clip_g": "clip_g-hf", "t5": "t5xxl"},
    "sd_xl_base_1.0": {"path": "sd_xl_base_1.0"},
    "sd_xl_base_1.0, sd_xl_refiner_1.0": {"path": "sd_xl_base_1.0", "refiner": "sd_xl_refiner_1.0"},
}  # fmt: skip


@cache
def planned(model: str, **options: Any) -> Plan:
    """Of a published model of full size, from headers alone."""
    with tempfile.TemporaryDirectory() as folder:
        files = {part: Path(folder, f"{name}.safetensors") for part, name in PUBLISHED[model].items()}
        for part, name in PUBLISHED[model].items():
            sparse_manifest(files[part], name)
        refiner = files.pop("refiner", None)
        parts = locate(files)
        beside = {} if refiner is None else {"refiner": refiner_parts(parts, refiner)}
        kind = next(family for family in FAMILIES if family.family in parts.components)
        return plan_parts(kind, parts, **beside, **options)


@pytest.mark.parametrize(
    ("model", "vram", "flags"),
    [
        ("flux1-dev", "48GiB", "(no option)"), ("flux1-dev", "24GiB", "--offload stages"), ("sd_xl_base_1.0", "12GiB", "(no option)"),
        ("sd_xl_base_1.0", "10GiB", "--vae-rows 64"), ("sd_xl_base_1.0", "8 GB", "--offload stages"),
        ("sd_xl_base_1.0, sd_xl_refiner_1.0", "18GiB", "(no option)"), ("sd_xl_base_1.0, sd_xl_refiner_1.0", "12GiB", "--offload stages"),
        ("flux1-dev", "12GiB", "--offload stream"), ("flux1-dev", "4GiB", "--offload stream --vae-rows 64"),
        ("sd3.5-large", "2GiB", "--offload layers --vae-rows 64"),
        ("sd3.5-large", "32GiB", "(no option)"), ("sd3.5-large", "24GiB", "--offload stages"),
    ],
)  # fmt: skip
def test_the_fastest_placement_that_fits_is_chosen(model: str, vram: str, flags: str) -> None:
    plan = planned(model)
    placement = plan.placement(vram)
    assert placement.flags == flags and placement.needed <= bytes_of(vram)
    faster = plan.placements[: plan.placements.index(placement)]
    assert all(other.needed > bytes_of(vram) for other in faster)


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    plan = planned("flux1-dev")
    with pytest.raises(MemoryPlanError, match=r"^dev at 1024x1024 needs 2\.\d GiB with --offload stream --vae-rows 64, most of it for decoding, and there are 2\.0 GiB"):  # fmt: skip
        plan.placement("2GiB")
    larger = planned("flux1-dev", width=2048, height=2048, images=2)
    for before, after in zip(plan.placements, larger.placements, strict=True):
        assert after.peak > before.peak


def test_a_plan_adds_up_what_is_on_the_device() -> None:
    plan = planned("sd_xl_base_1.0")
    assert (plan.variant, plan.guided, plan.images, plan.width) == ("base", True, 1, 1024)
    dtypes = {stage.component: stage.dtype for stage in plan.stages}
    assert dtypes["vae"] == torch.float32 and dtypes["unet"] == torch.float16  # as `load` would
    resident, _, staged, *_ = plan.placements
    weights, work = (sum(s.weights for s in plan.stages), [s.work for s in plan.stages])
    assert resident.peak == weights + max(work) and staged.peak == max(s.total for s in plan.stages)
    alone = planned("sd_xl_base_1.0", cfg_scale=1.0)
    assert (
        alone.stages[2].work < 0.7 * plan.stages[2].work and alone.stages[3] == plan.stages[3]
    )  # one image is decoded


def test_a_refiner_is_planned_with_its_base_and_decodes_nothing() -> None:
    """Without offload the weights of both lie on the device, with one each component comes for itself."""
    alone, plan = planned("sd_xl_base_1.0"), planned("sd_xl_base_1.0, sd_xl_refiner_1.0")
    names = [stage.name for stage in plan.stages]
    assert names == ["CLIP", "CLIP-G", "denoising", "refiner CLIP-G", "refiner denoising", "decoding"]
    its = [s for s in plan.stages if s.name.startswith("refiner")]
    for one, other in zip(alone.placements, plan.placements, strict=True):
        if one.offload:
            expected = max(one.peak, *(stage.peak(one.offload) for stage in its))
        else:
            expected = one.peak + sum(stage.weights for stage in its)
        assert math.isclose(other.peak, expected, rel_tol=1e-6), one  # some small tables are made once
    assert sum(stage.weights for stage in its) > 2 * 2_259_526_660
    room = Room("8GiB", lambda **asked: planned("sd_xl_base_1.0, sd_xl_refiner_1.0", **asked))
    assert room.weights("unet") == 8 * GIB - RUNTIME["cuda"] - max(s.work for s in plan.stages if s.component == "unet")


def test_weights_may_take_what_the_largest_image_so_far_leaves() -> None:
    room = Room("12GiB", lambda **asked: planned("flux1-dev", **asked))
    (stage,) = (s for s in planned("flux1-dev").stages if s.component == "flux")
    left = room.weights("flux")
    assert left + stage.work + RUNTIME["cuda"] == 12 * GIB and stage.weights / 2 > left / 2 > stage.peak("stream")
    room.place(width=1536, height=1024)
    larger = room.weights("flux")
    room.place(width=512, height=512)
    assert room.weights("flux") == larger < left and room.weights("t5") > left


def test_a_larger_image_has_a_slower_placement_where_the_model_can_change_to_it() -> None:
    """Weights that lie on the host may come in any way; those that lie on the device stay there."""
    room = Room("18GiB", lambda **asked: planned("flux1-dev", **asked))
    assert room.placement.flags == "--offload stages"
    found = [room.place(width=side, height=side).flags for side in (1024, 2048, 1024)]
    assert found == ["--offload stages", "--offload stream --vae-rows 64", "--offload stream --vae-rows 64"]
    with pytest.raises(MemoryPlanError, match=r"^1 of 4096x4096 would need .* with --offload stream --vae-rows 64, and there are 18.0 GiB: ask for smaller images or fewer at once$"):  # fmt: skip
        room.place(width=4096, height=4096)
    resident = Room("48GiB", lambda **asked: planned("flux1-dev", **asked))
    assert resident.placement.flags == "(no option)"
    with pytest.raises(MemoryPlanError, match=r"fewer at once; loaded with --offload stages --vae-rows 64 they fit$"):
        resident.place(width=4096, height=4096)


def test_vram_decodes_a_larger_image_in_strips_and_its_png_says_so(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path)
    plan = plan_parts(eridiff.FluxInference, locate(folder), width=256, height=256, steps=1, device=torch.device("cpu"))
    whole, strips = plan.placements
    model = eridiff.load(folder, vram=(whole.needed + strips.needed) // 2, device="cpu", progress=False)
    assert model.vae_rows is None
    settings = model.generate("a", seed=1, steps=1, width=256, height=256).settings[0]
    assert model.vae_rows == settings["vae_rows"] == 64


def test_vram_chooses_at_loading_and_refuses_what_would_not_fit(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model")
    model = eridiff.load(folder, vram="1GiB", device="cpu", progress=False)
    plain = eridiff.load(folder, device="cpu", progress=False)
    assert (model.offload, model.vae_rows) == (None, None)
    asked: dict[str, Any] = {"seed": 1, "steps": 1, "width": 32, "height": 32}
    assert model.generate("a", **asked).images[0].tobytes() == plain.generate("a", **asked).images[0].tobytes()
    with pytest.raises(MemoryPlanError, match=r"1 of 4096x4096 would need \d+\.\d GiB as the model is placed \(\(no option\)\)|as the model"):  # fmt: skip
        model.generate("a", seed=1, steps=1, width=4096, height=4096)
    with pytest.raises(MemoryPlanError, match="needs .* MiB, .*, and there are 20 MiB"):
        eridiff.load(vram="20MiB", device="cpu", progress=False)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"vram": "24"}, "a size of memory is a text such as 24GiB or 12GB, or bytes, at least 1 MiB, not '24'"),
        ({"vram": True}, "a size of memory"), ({"vram": 24}, "a size of memory"), ({"vram": "9" * 400 + "GiB"}, "a size of memory"),
        ({"vram": "0GiB"}, "a size of memory"), ({"vram": "24GiB", "offload": "stages"}, "vram chooses offload and vae_rows"),
        ({"vram": "24GiB", "vae_rows": 64}, "vram chooses offload and vae_rows"),
    ],
)  # fmt: skip
def test_an_impossible_vram_is_one_sentence(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        eridiff.load(device="cpu", progress=False, **options)


@pytest.mark.parametrize("size", ["24GiB", "24gib", "24 GiB", 24 * GIB, str(24 * GIB), "24576 MiB", "25769803.776kB"])
def test_sizes_of_memory_in_any_writing(size: int | str) -> None:
    assert bytes_of(size) == 24 * GIB and bytes_of("24GB") == 24 * 10**9


@pytest.mark.slow
@pytest.mark.parametrize("model", PUBLISHED)
def test_more_memory_and_smaller_images_never_have_a_slower_placement(model: str) -> None:
    """Over sizes of memory, of images and of batches: what is refused counts as the slowest."""

    def slowness(plan: Plan, vram: int) -> int:
        try:
            return plan.placements.index(plan.placement(vram))
        except MemoryPlanError as error:
            assert f"there are {vram / GIB:.1f} GiB" in str(error)
            return len(plan.placements)

    sizes = [4 * GIB, 8 * GIB, 12 * GIB, 16 * GIB, 24 * GIB, 48 * GIB]
    found = {}
    for side, images in ((512, 1), (512, 4), (1024, 1), (1024, 4), (2048, 1), (2048, 4)):
        plan = planned(model, width=side, height=side, images=images)
        found[side, images] = [slowness(plan, vram) for vram in sizes]
    for (side, images), chosen in found.items():
        assert chosen == sorted(chosen, reverse=True)
        for (larger, more), others in found.items():
            if larger >= side and more >= images:
                assert all(a <= b for a, b in zip(chosen, others, strict=True)), (side, images, larger, more)


def test_vram_beside_modules_that_are_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match="vram has no effect on modules that are passed"):
        eridiff.FluxInference(tiny.flux(), tiny.autoencoder(), vram="24GiB")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--batch 0", "images must be a whole number, at least 1, not 0"), ("--batch -1", "images must be a whole number"),
        ("--steps 0", "steps must be a whole number"), ("--cfg nan", "cfg_scale must be a finite number"),
        ("--size 100x100", "multiples of 16"), ("--vram 24", "a text such as 24GiB"), ("--vram -1GiB", "at least 1 MiB, not '-1GiB'"), ("--vram=", "at least 1 MiB, not ''"),
        ("--device cpu --vram 20MiB", "and there are 20 MiB"), ("--batch 100000000000000", "a plan counts images up to 10000"),
        ("--size 1600000x1600000 --device cpu", "a plan counts width up to 16384"), ("--steps 1000000000", "counts steps up to"),
    ],
)  # fmt: skip
def test_impossible_numbers_of_a_plan_are_one_sentence(arguments: str, says: str, capsys: Any) -> None:
    assert main(["plan", *arguments.split()]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("manifest", ["clip_l", "clip_g-hf", "t5xxl"])
def test_text_encoders_are_planned_as_transformers_has_them(manifest: str, tmp_path: Path) -> None:
    """Weights to a thousandth; the work, a fiftieth of them at most, is near enough that the sum is within a hundredth."""
    (component,) = detect(open_checkpoint(sparse_manifest(tmp_path / f"{manifest}.safetensors", manifest)))
    module = empty(component).to(torch.bfloat16)
    length = 77 if component.network != "t5" else 512
    ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
    with torch.device("meta"):
        work = peak_bytes(lambda: module(input_ids=ids).last_hidden_state)
    weights = sum(t.nbytes for t in module.parameters())
    (stage,) = stages({component.network: component}, 64, 64, text_length=512)
    assert math.isclose(stage.weights, weights, rel_tol=1e-3)
    assert math.isclose(stage.weights + stage.work, weights + work, rel_tol=0.01)


def test_a_plan_imports_no_transformers_and_no_compiler() -> None:
    """Which would take longer than the plan: with torch it is all that is slow."""
    program = "import sys; from eridiff.cli import main; main(['plan']); sys.exit(str([m for m in ('transformers', 'torch._dynamo', 'sympy') if m in sys.modules]))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stderr.strip().splitlines()[-1] == "[]", ran.stderr


def test_memory_on_a_cpu_was_measured_as_it_is_predicted() -> None:
    """`benchmarks/plan_memory.py`, each case with malloc that returns what is freed; as it comes, whole decodes at full width."""
    runs = json.loads(plan_memory.RESULTS.read_text())["runs"]
    rows = [(row, plan_memory.predicted(plan_memory.Case(**row["case"]))) for row in runs if not row["case"]["by"]]
    assert len(rows) >= 24
    assert {row["case"]["what"] for row, _ in rows} == {"tiny-flux", "tiny-sd35", "tiny-sdxl", "decode"}
    for row, predicted in rows:
        assert math.isclose(row["returned"], predicted["predicted_returned"], rel_tol=0.1), (row["case"], predicted)
        if row["case"]["what"] == "decode" and not row["case"]["rows"]:
            assert math.isclose(row["measured"], predicted["predicted"], rel_tol=0.1), (row["case"], predicted)


@pytest.mark.parametrize(("dtype", "copies"), [(torch.float32, 1), (torch.bfloat16, 3)])
def test_attention_on_a_cpu_copies_keys_and_values_of_two_bytes(dtype: torch.dtype, copies: int) -> None:
    """Beside its output: as measured, 1.0 and 3.0 times the output."""
    x = torch.empty(2, 38, 589, 64, dtype=dtype, device="meta")
    assert peak_bytes(lambda: F.scaled_dot_product_attention(x, x, x), cpu=True) == copies * x.nbytes
    assert peak_bytes(lambda: F.scaled_dot_product_attention(x, x, x)) == x.nbytes


CASES = [
    plan_memory.Case("tiny-flux", 1024), plan_memory.Case("tiny-flux", 512, "bfloat16"), plan_memory.Case("tiny-sdxl", 512, rows=64),
    plan_memory.Case("tiny-sd35", 256), plan_memory.Case("decode", 512),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_memory_on_a_cpu_is_measured_as_it_is_predicted(case: plan_memory.Case) -> None:
    """A process of its own generates with a built-in model, or decodes at the width of published autoencoders."""
    found = plan_memory.measured(case, **dict([MALLOC]))["measured"]
    predicted = plan_memory.predicted(case)["predicted_returned"]
    assert math.isclose(found, predicted, rel_tol=0.1), (found / 1e6, predicted / 1e6)


def test_the_command_prints_stages_and_placements_and_answers_by_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--vram", "1GiB"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("dev (") and said[0].endswith(": 1 of 64x64 in 8 steps")
    assert said[-1] == "1GiB: (no option) fits"
    assert main(["plan", BUILT_IN, "--json", "--size", "128x64", "--batch", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["width"], told["height"], told["images"]) == (128, 64, 2) and len(told["placements"]) == 8
    assert [stage["component"] for stage in told["stages"]] == ["clip", "t5", "flux", "vae"]
    assert main(["plan", "--vram", "10MiB"]) == 2
    assert "and there are 10 MiB" in capsys.readouterr().err


def test_the_command_names_the_stages_of_a_refiner(capsys: pytest.CaptureFixture[str]) -> None:
    both = ["plan", "tiny-sdxl", "--refiner", "tiny-sdxl-refiner"]
    assert main(both) == 0
    found = re.findall(r"^(\S.*?) +bfloat16 +\d+ MiB +\d+ MiB$", capsys.readouterr().out, re.M)
    assert found == ["CLIP", "CLIP-G", "denoising", "refiner CLIP-G", "refiner denoising", "decoding"]
    assert main([*both, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [stage["stage"] for stage in told["stages"]] == found
    for model, says in (
        ("tiny-flux", "works with an SDXL base alone"),
        ("tiny-sdxl-refiner", "not refiner and refiner"),
    ):
        assert main(["plan", model, "--refiner", "tiny-sdxl-refiner"]) == 2
        assert says in capsys.readouterr().err


def test_on_a_cpu_the_command_says_what_malloc_keeps(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--device", "cpu", "--size", "1024x1024"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"in brackets with {'='.join(MALLOC)} set" in said
    found = [(int(a), int(b)) for a, b in re.findall(r"^ +(\d+) MiB \((\d+) MiB\)  ", said, re.M)]
    assert main([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert sum(stage["kernels"] for stage in plan["stages"]) > 0
    needed = [(p["needed"], p["needed"] - p["kept"]) for p in plan["placements"]]
    assert found == [(round(a / 2**20), round(b / 2**20)) for a, b in needed] and all(a > b for a, b in found)
