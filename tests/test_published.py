"""Headers of files that people have, through the real loader: `published.yaml` says what each holds and where that is written."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from eridiff.report import inspect
from eridiff.text.encoders import empty
from eridiff.weights.load import native_reader
from eridiff.weights.locate import locate
from tests.manifest import Tensors, read_manifest
from tests.sparse import write_sparse

KINDS: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "published.yaml").read_text(encoding="utf-8"))


def tensors_of(kind: dict[str, Any]) -> Tensors:
    result: Tensors = {}
    for part in kind["parts"]:
        for name, (dtype, shape) in read_manifest(part["part"]).items():
            if any(re.search(pattern, name) for pattern in part.get("drop", ())):
                continue
            for pattern, new in part.get("rename", {}).items():
                name = re.sub(pattern, new, name)
            # embeddings and tables stay as they are in files with scales
            linear = (
                len(shape) == 2
                and name.endswith(".weight")
                and not re.search("embed_tokens|shared|embedding|relative|pos_embed|first_stage", name)
            )
            dtype = part.get("dtype", part["linear"] if "linear" in part and linear else dtype)
            result[part.get("prefix", "") + name] = (dtype, shape)
            if linear:
                for ending, (other, size) in part.get("beside", {}).items():
                    result[f"{part.get('prefix', '')}{name.removesuffix('weight')}{ending}"] = (other, tuple(size))
    return result | {name: (dtype, tuple(shape)) for name, (dtype, shape) in kind.get("add", {}).items()}


def test_each_kind_says_where_its_names_are_from_and_there_are_more_than_twelve() -> None:
    assert len(KINDS) >= 16 and all(len(kind["source"]) > 20 for kind in KINDS.values())


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_of_file_that_people_have_is_read_whole(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    tensors = tensors_of(kind)
    assert len(tensors) == kind.get("count", len(tensors))
    path = write_sparse(tmp_path / "m.safetensors", tensors)
    noted = {k for k, (dtype, _) in tensors.items() if k.endswith("comfy_quant")}
    report = inspect(path)
    assert [component["network"] for component in report["components"]] == kind["networks"] and report["problems"] == []
    held = {c["prefix"] + key for c in report["components"] for key in c["unused"]}
    carried = ("logit_scale", "position_ids")
    assert all(
        key in noted or key.endswith((*carried, "scale", "scale_weight", "scale_input", "scaled_fp8")) for key in held
    )
    told = " ".join(notice for c in report["components"] for notice in c["notices"])
    left = sorted(kind.get("left_out", ()))
    assert ("left out" in told) == bool(left) and all(repr(key) in told for key in left[:3])
    for component in locate(path).components.values():  # every parameter of the module is in the file
        _, shapes, _ = native_reader(component, empty(component))
        lacking = (
            {n for n, _ in empty(component).named_parameters()}
            - set(shapes)
            - {"text_projection.weight", "encoder.embed_tokens.weight"}
        )
        assert not lacking
