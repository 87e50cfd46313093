"""Damaged files and folders end in one sentence that names the file, exit code 2, and nothing written."""

import json
import os
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eridiff import load_network
from eridiff.cli import main
from eridiff.errors import CheckpointError, ConfigError
from eridiff.weights.header import open_checkpoint
from eridiff.weights.save import save_network
from tests import tiny


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_network(tiny.flux(), tmp_path_factory.mktemp("good") / "flux.safetensors")


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def edited(change: Callable[[dict[str, Any], list[str]], object]) -> Callable[[Path], bytes]:
    """A file whose header a function changed; it gets the tensor names in the order of their data."""

    def build(good: Path) -> bytes:
        header, data = parts(good)
        names = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
        change(header, names)
        return joined(header, data)

    return build


def with_field(field: str, value: Any) -> Callable[[Path], bytes]:
    return edited(lambda header, names: header[names[0]].update({field: value}))


def twice(different: bool) -> Callable[[Path], bytes]:
    def build(good: Path) -> bytes:
        header, data = parts(good)
        text = json.dumps(header)
        name = next(n for n in header if n != "__metadata__")
        entry = dict(header[name])
        if different:
            entry["shape"] = [1, *entry["shape"]]
        return joined((text[:-1] + f', "{name}": {json.dumps(entry)}}}').encode(), data)

    return build


def shared_offsets(header: dict[str, Any], names: list[str]) -> None:
    same = next((a, b) for a in names for b in names if a != b and header[a]["shape"] == header[b]["shape"])
    header[same[1]]["data_offsets"] = header[same[0]]["data_offsets"]


def shifted(header: dict[str, Any], names: list[str]) -> None:
    for name in names[1:]:
        header[name]["data_offsets"] = [offset + 4 for offset in header[name]["data_offsets"]]


def raw(change: Callable[[bytes], bytes]) -> Callable[[Path], bytes]:
    return lambda good: change(good.read_bytes())


def flipped(content: bytes) -> bytes:
    position = 8 + random.Random(0).randrange(int.from_bytes(content[:8], "little"))
    return content[:position] + b"\xff" + content[position + 1 :]


CASES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "1 empty": (lambda g: b"", "is empty"),
    "2 seven bytes": (lambda g: b"1234567", "too short for a header"),
    "3 last byte removed": (raw(lambda b: b[:-1]), "1 of .* bytes are missing"),
    "4 cut in the header": (raw(lambda b: b[:500]), "its header has .* bytes and the file 500"),
    "5 one byte appended": (raw(lambda b: b + b"x"), "1 byte more"),
    "6 zeros appended": (raw(lambda b: b + bytes(4096)), "4096 bytes more"),
    "7 length 2^63": (raw(lambda b: struct.pack("<Q", 2**63) + b[8:]), "not a safetensors file"),
    "9 big-endian length": (raw(lambda b: b[:8][::-1] + b[8:]), "not a safetensors file"),
    "10 a header byte 0xFF": (raw(flipped), "not UTF-8"),
    "11 header is a list": (lambda g: joined(b"[]", b""), "not an object"),
    "12 nested 100,000 deep": (lambda g: joined(b"[" * 100_000, b""), "not valid JSON"),
    "13 BOM": (lambda g: joined(b"\xef\xbb\xbf" + json.dumps(parts(g)[0]).encode(), parts(g)[1]), "not valid JSON"),
    "14 NUL padding": (lambda g: joined(json.dumps(parts(g)[0]).encode() + b"\0\0", parts(g)[1]), "not valid JSON"),
    "15 a name twice": (twice(True), "duplicate name"),
    "16 an entry twice": (twice(False), "duplicate name"),
    "17 shape of strings": (with_field("shape", ["32", "64"]), "impossible shape"),
    "18 shape with true": (with_field("shape", [True, 64]), "impossible shape"),
    "19 negative shape": (with_field("shape", [-1, 64]), "impossible shape"),
    "20 shape too large": (
        edited(lambda h, n: h[n[0]].update({"shape": [2**32, 2**32], "data_offsets": [0, 0]})), "its shape .* takes",
    ),
    "21 zero times 2^63": (with_field("shape", [0, 2**63, 4]), "impossible shape"),
    "22 offsets reversed": (edited(lambda h, n: h[n[0]]["data_offsets"].reverse()), "impossible offsets"),
    "23 shared offsets": (edited(shared_offsets), "overlap of .* and|gap of"),
    "24 a gap": (edited(shifted), "gap of 4 bytes"),
    "25 beyond the file": (
        edited(lambda h, n: h[n[-1]].update({"data_offsets": [x + 10**9 for x in h[n[-1]]["data_offsets"]]})), "gap",
    ),
    "26 dtype F12": (with_field("dtype", "F12"), "unknown dtype"),
    "27 dtype F6": (with_field("dtype", "F6_E2M3"), "not supported"),
    "28 integers": (with_field("dtype", "I32"), "torch.int32, not numbers of a weight"),
    "29 metadata with a number": (edited(lambda h, n: h.update({"__metadata__": {"a": 1}})), "not an object of strings"),
    "30 no tensors": (lambda g: joined({}, b""), "declares no tensors"),
    "40 zip": (lambda g: b"PK\x03\x04" + bytes(100), "pickled checkpoint, never opened"),
    "41 pickle 2": (lambda g: b"\x80\x02}q\x00." + b"x" * 50, "pickled checkpoint, never opened"),
    "41 pickle 4": (lambda g: b"\x80\x04\x95" + b"x" * 50, "pickled checkpoint, never opened"),
    "42 GGUF": (lambda g: b"GGUF" + bytes(100), "GGUF"),
    "43 LFS pointer": (
        lambda g: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 23802932552\n", "pointer .*23802932552",
    ),
    "44 web page": (lambda g: b"<!DOCTYPE html><html>not found</html>", "web page"),
}  # fmt: skip


def sentence(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says on stderr: exit code 2, one line, no traceback, nothing on stdout."""
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("eridiff: "), err
    return lines[0]


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_file_is_one_sentence(
    case: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, says = CASES[case]
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(build(good))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError):
        load_network(path)
    text = sentence(capsys, "sample", "--transformer", str(path), "--vae", str(path), "--clip", str(path),
                    "--t5", str(path), "--prompt", "x", "--out", str(tmp_path / "out")) if not case.startswith("28") else ""  # fmt: skip
    if text:
        assert re.search(says, text) and "damaged.safetensors" in text, text
    else:
        with pytest.raises(CheckpointError, match=says):
            load_network(path)
    assert sorted(tmp_path.iterdir()) == before


def test_a_header_larger_than_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    with open(path, "wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)
    with pytest.raises(CheckpointError, match="larger than the limit"):
        open_checkpoint(path)


def sharded(folder: Path, index: Any = None) -> Path:
    folder.mkdir()
    save_file({"a": torch.zeros(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(3)}, folder / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    text = json.dumps({"weight_map": weight_map} if index is None else index)
    (folder / "model.safetensors.index.json").write_text(text if not isinstance(index, str) else index)
    return folder


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path / "m"))
    assert sorted(checkpoint.tensors) == ["a", "b"]
    assert torch.equal(checkpoint.read("b"), torch.ones(3))


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"weight_map": {"a": FIRST, "b": "model-00003-of-00003.safetensors"}}, "'model-00003-of-00003.safetensors', which is not there"),
        ({"weight_map": {"a": SECOND, "b": SECOND}}, "lacks it|maps it to|does not map"),
        ({"weight_map": {"a": FIRST, "b": SECOND, "c": SECOND}}, "'c' to .* which lacks it"),
        ({"weight_map": {"a": FIRST, "b": "../x.safetensors"}}, "not a plain file name"),
        ({"weight_map": {"a": FIRST, "b": "/etc/passwd"}}, "not a plain file name"),
        ({"weight_map": [1]}, "not an object of strings"),
        ("{", "not valid JSON"),
    ],
)  # fmt: skip
def test_a_damaged_index_is_one_sentence(index: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(sharded(tmp_path / "m", index))


def test_a_folder_of_pickles_is_refused_unopened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    os.chmod(tmp_path / "pytorch_model.bin", 0)
    with pytest.raises(CheckpointError, match="never opened"):
        open_checkpoint(tmp_path)


def test_a_config_that_is_not_a_json_is_a_config_error(tmp_path: Path, good: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(good.read_bytes())
    (tmp_path / "config.json").write_text('{"num_layers": NaN}')
    with pytest.raises(ConfigError, match="not a finite one"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nothing.safetensors", "does not exist"),
        ("pipe", "a pipe"),
        ("link", "a link to a file"),
        ("x" * 300, "too long"),
        ("", "empty"),
    ],
)
def test_what_is_not_a_file_is_one_sentence(name: str, says: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(tmp_path / name if name else "")


def test_a_newline_in_a_name_does_not_break_the_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path / "a\nb.safetensors")
    assert "\n" not in str(error.value)


def test_tensors_are_mapped_each_with_a_storage_of_its_own(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(good.read_bytes())
    tensors = {
        name: open_checkpoint(path).read(name) for name in open_checkpoint(path).tensors
    }  # outlive their checkpoint
    expected = load_file(good)
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)
    save_file(tensors, tmp_path / "again.safetensors")  # refuses tensors that share a storage
    tensors["img_in.weight"].zero_()
    assert torch.equal(load_file(path)["img_in.weight"], expected["img_in.weight"])


def test_a_file_that_shrinks_after_it_was_opened_is_refused(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(good.read_bytes())
    checkpoint = open_checkpoint(path)
    path.write_bytes(good.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="changed after it was opened"):
        checkpoint.read("img_in.weight")
