"""LoRA files that are damaged, misnamed, or made for something else: none of them ends in silence."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eridiff.errors import LoraError
from eridiff.lora import Row, load_lora
from eridiff.lora.deltas import kind_of
from eridiff.lora.formats import ENDINGS, Source, sort_names
from eridiff.lora.load import OPTIONAL
from tests.lora_files import BAD, FILES, GOOD, contents, loaded, look_names_up_once, networks_of, write

LINEAR1, QKV = "lora_unet_single_blocks_0_linear1", "lora_unet_double_blocks_0_img_attn_qkv"
REFUSED = {  # file of lora-bad -> what the sentence must hold
    "missing-up": ["is incomplete", f"'{LINEAR1}.lora_up.weight' is missing"],
    "missing-down": ["is incomplete", f"'{LINEAR1}.lora_down.weight' is missing"],
    "alpha-alone": ["is incomplete", f"only '{LINEAR1}.alpha'"],
    "renamed-key": ["lora_unet_single_blocks_0_linaer1", "3 tensors", f"nearest is '{LINEAR1}'", "allow_partial"],
    "renamed-suffix": [f"'{LINEAR1}.lora_upp.weight'", "unknown ending", "'.lora_up.weight'"],
    "nan": [f"'{QKV}.lora_up.weight'", "not finite"],
    "inf": [f"'{QKV}.lora_down.weight'", "not finite"],
    "alpha-inf": [f"'{QKV}.alpha'", "not finite"],
    "rank-mismatch": ["ranks disagree", "[2, 16]", "[48, 3]"],
    "wrong-out": [f"'{QKV}.lora_up.weight'", "[32, 2]", "[48, 16]", "48 rows"],
    "wrong-in": [f"'{QKV}.lora_down.weight'", "[2, 24]", "[48, 16]", "16 columns"],
    "alpha-zero": [f"'{QKV}.alpha'", "alpha is the rank", "scale 0"],
    "alpha-vector2": [f"'{QKV}.alpha'", "2 values"],
    "wrong-family-sdxl": ["nothing in it fits Flux", "SDXL"],
    "wrong-family-sd3-lying-metadata": ["nothing in it fits Flux", "names look like SD 3", "'flux1'"],
    "empty": ["no tensors"],
    "only-metadata": ["no tensors"],
    "duplicate-target": [f"'{QKV}'", "'diffusion_model.double_blocks.0.img_attn.qkv'", "keep one"],
    "overlapping-slices": ["double_blocks.0.img_attn.qkv'", "attn.to_", "keep one"],
    "dead-all": ["changes nothing", "zero"],
    "int-dtype": [f"'{QKV}.lora_up.weight'", "int8", "floating point"],
    "truncated": ["100 of 4240 bytes are missing"],
    "header-too-long": ["not a safetensors file"],
    "not-safetensors": ["pickled checkpoint, never opened"],
    "bias-extra-kohya": [f"'{QKV}.lora_up.bias'", "unknown ending"],
    "target-not-linear": ["attn.norm_q'", "no matrix"],
    "glora": ["GLoRA", "not supported"],
    "oft": ["OFT or BOFT", "not supported"],
    "unknown-format": ["no known LoRA format", "'blocks.0.adapter.W1'"],
    "te-unmatched": ["'lora_te1_single_blocks_0_linear1'", "not in a CLIP text encoder"],
    "block-out-of-range": ["'lora_unet_double_blocks_7_img_attn_qkv'", "double_blocks 0 alone"],
    "mid-on-linear": [f"'{QKV}.lora_mid.weight'", "Tucker core", "not a convolution"],
    "dora-magnitude-shape": ["lora_magnitude_vector'", "[15]", "16 lengths"],
    "metadata-rank-disagrees": ["rank 4", "rank 2", "8/4 or 8/2"],
    "metadata-broken-json": ["lora_adapter_metadata", "not a JSON object"],
}
PEFT = ("applied", 1.0, "no alpha: scale 1")
SLICE = ("applied to a slice", 1.0, "no alpha: scale 1")
HALF = ("applied", 0.5, "")
LOADED = {  # file of lora-bad -> rows of the ledger: status, scale, note
    "good-kohya": [HALF] * 4,
    "good-fp16": [HALF] * 4,
    "good-peft": [PEFT, SLICE, SLICE],
    "good-lora-bias-peft": [PEFT, *[(*SLICE[:2], "no alpha: scale 1; no bias, which other modules have")] * 2],
    "good-with-te1": [HALF] * 5,
    "alpha-missing": [PEFT] * 4,
    "alpha-negative": [("applied", -0.5, "negative scale"), HALF, HALF, HALF],
    "alpha-vector1": [HALF] * 4,
    "alpha-int": [HALF] * 4,
    "dead-one": [("dead", 0.5, "all zero: changes nothing"), HALF, HALF, HALF],
}


@pytest.fixture(autouse=True)
def names_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    look_names_up_once(monkeypatch)


def test_the_tables_below_hold_every_file() -> None:
    assert {path.stem for path in BAD.glob("*.safetensors")} == REFUSED.keys() | LOADED.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_file_is_refused_in_one_sentence(name: str) -> None:
    networks = networks_of("lora-bad")
    before = {n: t.clone() for n, t in networks["flux"].state_dict().items()}
    with pytest.raises(LoraError) as raised:
        loaded(f"lora-bad/{name}.safetensors")
    sentence = str(raised.value)
    assert [part for part in [f"{name}.safetensors", *REFUSED[name]] if part not in sentence] == [], sentence
    assert "\n" not in sentence and "Traceback" not in sentence and len(sentence) < 500
    after = networks["flux"].state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items()) and not hasattr(networks["flux"], "lora_branches")


@pytest.mark.parametrize("name", LOADED)
def test_a_good_file_loads_and_says_what_is_unusual(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ledger = loaded(f"lora-bad/{name}.safetensors").ledger
    assert [(row.status, row.scale, row.note) for row in ledger] == LOADED[name]
    assert ("1 dead" in caplog.text) == (name == "dead-one"), "what changes nothing is warned of"


def test_text_encoders_that_are_not_given_need_an_explicit_choice() -> None:
    path, flux = BAD / "good-with-te1.safetensors", {"flux": networks_of("lora-bad")["flux"]}
    with pytest.raises(LoraError, match="a CLIP text encoder, which is not given.*part=.network. leaves it out"):
        load_lora(path, flux)
    for choice, status in (({"part": "network"}, "left out"), ({"allow_partial": True}, "no text encoder here")):
        rows = load_lora(path, flux, **choice).ledger
        assert [row.status for row in rows] == [status, *["applied"] * 4]


def test_leaving_text_encoders_out_hides_no_misnamed_module() -> None:
    with pytest.raises(LoraError, match="'lora_te1_single_blocks_0_linear1' is not in a CLIP text encoder"):
        load_lora(BAD / "te-unmatched.safetensors", {"flux": networks_of("lora-bad")["flux"]}, part="network")


def test_allow_partial_loads_what_fits_and_keeps_the_rest_in_the_ledger() -> None:
    expected = {
        "renamed-key": ("lora_unet_single_blocks_0_linaer1", "unmatched", f"nearest is '{LINEAR1}'"),
        "wrong-in": (QKV, "shape mismatch", "needs 16 columns"),
        "block-out-of-range": ("lora_unet_double_blocks_7_img_attn_qkv", "unmatched", "double_blocks 0 alone"),
        "bias-extra-kohya": (f"{QKV}.lora_up.bias", "unmatched", "unknown ending"),
    }
    for name, (key, status, note) in expected.items():
        rows = {row.key: row for row in loaded(f"lora-bad/{name}.safetensors", allow_partial=True).ledger}
        row = rows.pop(key)
        assert row.status == status and note in row.note and row.scale is None
        assert [other.status for other in rows.values()] == ["applied"] * len(rows) and len(rows) >= 3


@pytest.mark.parametrize("name", ["nan", "missing-up", "alpha-zero", "int-dtype", "glora", "duplicate-target"])
def test_allow_partial_is_not_a_leave_to_guess(name: str) -> None:
    with pytest.raises(LoraError):
        loaded(f"lora-bad/{name}.safetensors", allow_partial=True)


def rows_of(path: Path, file: str) -> dict[str, Row] | None:
    """The ledger of a changed file by key, or None for an error."""
    try:
        return {row.key: row for row in load_lora(path, networks_of(Path(file).parent.name), alpha_is_rank=True).ledger}
    except LoraError:
        return None


def without_change(rows: Mapping[str, Row]) -> dict[str, tuple[Any, ...]]:
    return {key: (row.module, row.kind, row.rank, row.alpha, row.scale, row.status) for key, row in rows.items()}


@pytest.mark.parametrize("file", FILES)
def test_no_tensor_can_be_taken_out_of_a_file_in_silence(file: str, tmp_path: Path) -> None:
    """Only a part that a module may lack can be missing, and the ledger names it."""
    tensors, metadata = contents(file)
    sources, _ = sort_names(list(tensors))
    whole = {row.key: row for row in loaded(file).ledger}
    for source in sources.values():
        for role, name in source.names.items() if len(source.names) > 1 else ():
            rows = rows_of(write(tmp_path / "f", {n: t for n, t in tensors.items() if n != name}, metadata), file)
            if rows is None:
                continue
            said, kind = rows[source.key].note, whole[source.key].kind
            if role == "alpha":
                assert "no alpha: scale 1" in said, name
            else:
                alike = [other for other in sources.values() if kind_of(set(other.names)) == kind.partition("+")[0]]
                alone = sum(role in other.names for other in alike) == 1
                lacks = f"no {OPTIONAL[role]}, which other modules have"
                assert lacks in said or (alone and rows[source.key].kind != kind), name


@pytest.mark.parametrize("file", FILES)
def test_a_file_without_one_whole_module_is_another_good_file(file: str, tmp_path: Path) -> None:
    tensors, metadata = contents(file)
    sources, _ = sort_names(list(tensors))
    whole = without_change({row.key: row for row in loaded(file).ledger})
    for source in sources.values():
        rest = {name: t for name, t in tensors.items() if name not in source.names.values()}
        rows = rows_of(write(tmp_path / "f", rest, metadata), file)
        assert rows is not None and without_change(rows) == {k: v for k, v in whole.items() if k != source.key}


def one_of_each_sort(file: str) -> Iterator[tuple[Source, dict[str, Tensor], dict[str, str]]]:
    """Of the modules that consist of the same parts one, with another beside it: (it, tensors of both, metadata)."""
    tensors, metadata = contents(file)
    sources = list(sort_names(list(tensors))[0].values())
    rows = {row.key: row for row in loaded(file).ledger}
    seen = set()
    for i, source in enumerate(sources):
        parts = tuple((role, tensors[name].ndim) for role, name in sorted(source.names.items()))
        sort = (parts, rows[source.key].status)
        if sort not in seen or file in GOOD:
            seen.add(sort)
            both = [*source.names.values(), *sources[i - 1].names.values()]
            yield source, {name: tensors[name] for name in both}, metadata


def misspelled(name: str) -> list[str]:
    """A letter too many at the start, within, in the ending and at the end; another number; an ending exchanged."""
    middle, ending = len(name) // 2, name.rfind(".") + 2
    found = [f"x{name}", f"{name[:middle]}x{name[middle:]}", f"{name[:ending]}x{name[ending:]}", f"{name}x"]
    found += [name.replace("0", "7"), name.replace("lora_A", "lora_B"), name.replace("down", "up"), name.upper()]
    return [new for new in dict.fromkeys(found) if new != name]


@pytest.mark.parametrize("file", FILES)
def test_no_tensor_can_be_renamed_in_silence(file: str, tmp_path: Path) -> None:
    for source, tensors, metadata in one_of_each_sort(file):
        for i, name in enumerate(source.names.values()):
            for new in misspelled(name) if file in GOOD else misspelled(name)[i % 3 :: 3]:
                changed = {(new if n == name else n): t for n, t in tensors.items()}
                assert rows_of(write(tmp_path / "f", changed, metadata), file) is None, (name, new)


@pytest.mark.parametrize("file", FILES)
def test_no_tensor_can_be_added_in_silence(file: str, tmp_path: Path) -> None:
    """A name that no format has, a module that no network has, and every part that a module has no use for."""
    for source, tensors, metadata in one_of_each_sort(file):
        extra = ["foo", "foo.weight", "lora_unet_foo.lora_down.weight", "transformer.foo.alpha", "logit_scale"]
        extra += [f"{source.key}.weight", f"{source.key}.lora_up.bias"]
        extra += [source.key + ends[0] for role, ends in ENDINGS.items() if role not in source.names]
        for name in [name for name in extra[:: 1 if file in GOOD else 2] if name not in tensors]:
            changed = {name: torch.ones(3, 5), **tensors}
            assert rows_of(write(tmp_path / "f", changed, metadata), file) is None, name


def corrupted(tensor: Tensor, role: str) -> Iterator[tuple[str, Tensor]]:
    """What a tensor of a LoRA may not be."""
    if role in ("on_input", "reshape_weight"):
        yield "another number", tensor + 2
    elif tensor.is_floating_point():
        for value in ("nan", "inf", "-inf"):
            flat = tensor.clone().flatten()
            flat[-1] = float(value)
            yield value, flat.reshape(tensor.shape)
        yield "complex", tensor.to(torch.complex64)
        if role != "alpha":
            yield "integers", tensor.to(torch.int8)
            yield "truth values", tensor.bool()
    yield "empty", tensor.new_empty(0, *tensor.shape[1:])
    yield "two", torch.stack([tensor, tensor])
    if tensor.ndim:
        yield "a row more", torch.cat([tensor, tensor[:1]])
        yield "one row", tensor[:1] if len(tensor) > 1 else tensor[:0]
    if tensor.ndim > 1:
        yield "a column more", torch.cat([tensor, tensor[:, :1]], dim=1)
        yield "one column", tensor[:, :1] if tensor.shape[1] > 1 else tensor[:, :0]
        yield "no columns", tensor[:, :0]
        yield "one number", tensor.flatten()[0]
        if tensor.shape[0] != tensor.shape[1] and min(tensor.shape[:2]) > 1:
            yield "transposed", tensor.transpose(0, 1)


@pytest.mark.parametrize("file", FILES)
def test_no_tensor_can_be_corrupted_in_silence(file: str, tmp_path: Path) -> None:
    for source, tensors, metadata in one_of_each_sort(file):
        for role, name in source.names.items():
            for how, broken in corrupted(tensors[name], role):
                path = write(tmp_path / "f", tensors | {name: broken}, metadata)
                assert rows_of(path, file) is None, (name, how)


METADATA = {  # what peft's metadata of good-peft may say -> what the sentence must hold
    '{"transformer.r": 2, "transformer.lora_alpha": "x"}': "correct the metadata",
    '{"transformer.r": null, "transformer.lora_alpha": 2}': "correct the metadata",
    '{"transformer.r": 2, "transformer.lora_alpha": NaN}': "alpha nan .* not finite",
    '{"transformer.r": 2, "transformer.lora_alpha": 0}': "the alpha that the metadata say .* is 0, which some tools read",
    '{"transformer.r": 2, "transformer.lora_alpha": 1, "transformer.alpha_pattern": {"(": 1}}': "correct the metadata",
    '{"transformer.r": 2, "transformer.lora_alpha": 1, "transformer.alpha_pattern": [1]}': "correct the metadata",
    "[1]": "not a JSON object",
}


@pytest.mark.parametrize("text", METADATA)
def test_metadata_that_leave_the_scale_open_are_refused(text: str, tmp_path: Path) -> None:
    tensors, _ = contents("lora-bad/good-peft.safetensors")
    with pytest.raises(LoraError, match=METADATA[text]):
        load_lora(write(tmp_path / "f", tensors, {"lora_adapter_metadata": text}), networks_of("lora-bad"))


def test_an_alpha_in_the_file_and_another_in_the_metadata_are_refused(tmp_path: Path) -> None:
    tensors, _ = contents("lora-bad/good-peft.safetensors")
    name = "transformer.single_transformer_blocks.0.proj_out"
    told = {"lora_adapter_metadata": '{"transformer.r": 2, "transformer.lora_alpha": 3}'}
    path = write(tmp_path / "f", {**tensors, f"{name}.alpha": torch.tensor(1.0)}, told)
    with pytest.raises(LoraError, match="makes the scale 0.5 and the metadata lora_adapter_metadata make it 1.5"):
        load_lora(path, networks_of("lora-bad"))
    agreeing = write(tmp_path / "g", {**tensors, f"{name}.alpha": torch.tensor(3.0)}, told)
    assert {row.scale for row in load_lora(agreeing, networks_of("lora-bad")).ledger} == {1.5}


def test_a_folder_of_peft_has_alpha_in_its_configuration(tmp_path: Path) -> None:
    tensors, _ = contents("lora-bad/good-peft.safetensors")
    renamed = {name.replace("transformer.", "base_model.model.", 1): t for name, t in tensors.items()}
    write(tmp_path / "adapter_model.safetensors", renamed)
    for extra, scale in (("", 0.5), (', "use_rslora": true', 0.5 * 2**0.5)):
        (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 1' + extra + "}")
        rows = load_lora(tmp_path, networks_of("lora-bad")).ledger
        assert [row.scale for row in rows] == pytest.approx([scale] * 3)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "OFT", "r": 2}')
    with pytest.raises(LoraError, match="says OFT; of peft's kinds LORA, LOHA, LOKR are read"):
        load_lora(tmp_path, networks_of("lora-bad"))
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(LoraError, match="adapter_config.json' is damaged: it is not valid JSON"):
        load_lora(tmp_path, networks_of("lora-bad"))


@pytest.mark.parametrize("networks", [{}, {"fluxx": torch.nn.Linear(2, 2)}])
def test_networks_that_are_none_are_refused(networks: dict[str, Any]) -> None:
    with pytest.raises(LoraError, match="a LoRA is for flux, mmdit, unet"):
        load_lora(BAD / "good-kohya.safetensors", networks)


def test_a_bias_for_a_layer_without_one_is_refused(tmp_path: Path) -> None:
    network = torch.nn.Linear(3, 2, bias=False)
    path = write(tmp_path / "f", {"weight.diff": torch.ones(2, 3), "weight.diff_b": torch.ones(2)})
    with pytest.raises(LoraError, match="changes a bias, and .* has none"):
        load_lora(path, network)


def test_a_trained_lokr_whose_alpha_has_no_effect_says_so(tmp_path: Path) -> None:
    key = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = {
        f"{key}.lokr_w1": torch.ones(4, 4),
        f"{key}.lokr_w2": torch.ones(4, 4),
        f"{key}.alpha": torch.tensor(1.0),
    }
    for said, noted in (("32", True), ("1", False), ("None", False), ("many", True)):
        path = write(tmp_path / "f", tensors, {"ss_network_dim": said})
        (row,) = load_lora(path, networks_of("lora-bad")).ledger
        assert row.scale == 1 and ("alpha 1 has no effect" in row.note) == noted


def test_two_spellings_of_one_tensor_are_refused(tmp_path: Path) -> None:
    tensors, _ = contents("lora-bad/good-kohya.safetensors")
    path = write(tmp_path / "f", {**tensors, f"{QKV}.lora_A.weight": tensors[f"{QKV}.lora_down.weight"]})
    with pytest.raises(LoraError, match="are the same thing in two spellings; keep one"):
        load_lora(path, networks_of("lora-bad"))


@pytest.mark.parametrize("columns", [7, 9, 15, 24])
def test_a_first_layer_reads_the_latents_or_twice_as_much(columns: int, tmp_path: Path) -> None:
    """diffusers' control LoRAs replace no norms: only the width tells that they read a control image."""
    names = ("img_in.lora_A.weight", "img_in.lora_B.weight")
    control = write(tmp_path / "f", dict(zip(names, (torch.ones(2, 16), torch.ones(16, 2)), strict=True)))
    (row,) = load_lora(control, networks_of("lora-bad")).ledger
    assert row.status == "applied" and "widens the layer for a control image" in row.note
    other = write(tmp_path / "g", dict(zip(names, (torch.ones(2, columns), torch.ones(16, 2)), strict=True)))
    with pytest.raises(LoraError, match="8 columns"):
        load_lora(other, networks_of("lora-bad"))


def test_factors_whose_product_is_transposed_are_refused(tmp_path: Path) -> None:
    """As many numbers as the weight [48, 16] has, but 16 rows of 48."""
    loha = {f"{QKV}.hada_w{n}_{side}": torch.ones(shape) for n in "12" for side, shape in (("a", (16, 2)), ("b", (2, 48)))}  # fmt: skip
    lokr = {f"{QKV}.lokr_w1": torch.ones(4, 4), f"{QKV}.lokr_w2": torch.ones(4, 12)}
    for tensors in (loha, lokr):
        with pytest.raises(LoraError, match=r"do not make double_blocks.0.image.qkv's \[48, 16\]"):
            load_lora(write(tmp_path / "f", tensors), networks_of("lora-bad"))


def test_a_pattern_of_the_metadata_counts_for_names_that_it_ends(tmp_path: Path) -> None:
    tensors, _ = contents("lora-bad/good-peft.safetensors")
    told = (
        '{"transformer.r": 2, "transformer.lora_alpha": 1, "transformer.alpha_pattern": {"to_q": 4, "^attn.to_k": 4}}'
    )
    rows = load_lora(write(tmp_path / "f", tensors, {"lora_adapter_metadata": told}), networks_of("lora-bad")).ledger
    assert {row.key.rpartition(".")[2]: row.scale for row in rows} == {"proj_out": 0.5, "to_q": 2.0, "to_k": 0.5}


@pytest.mark.parametrize("ending", [".lora_down.weight", ".hada_w1_b", ".hada_w2_a", ".lokr_w1", ".lokr_w2"])
def test_a_module_with_any_factor_of_zero_is_dead(ending: str, tmp_path: Path) -> None:
    folder = "lora-bad" if "lora_" in ending else "lora-loha" if "hada" in ending else "lora-lokr"
    tensors, _ = contents(f"{folder}/{'good-kohya' if folder == 'lora-bad' else 'lora'}.safetensors")
    name = next(name for name in tensors if name.endswith(ending))
    path = write(tmp_path / "f", tensors | {name: torch.zeros_like(tensors[name])})
    rows = {row.key: row for row in load_lora(path, networks_of(folder)).ledger}
    assert [key for key, row in rows.items() if row.status == "dead"] == [name.removesuffix(ending)]
