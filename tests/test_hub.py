"""Hub ids: what of a repository is fetched, by the real client from a server here, and the message when something lacks."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from huggingface_hub import constants, file_download, utils
from safetensors.torch import load_file, save

import eridiff
from eridiff import load_encoder, load_network
from eridiff.cli.convert import convert
from eridiff.errors import CheckpointError, EridiffError
from eridiff.lora import inject_lora, load_lora, save_lora
from eridiff.weights.hub import resolve
from eridiff.weights.locate import locate
from eridiff.weights.save import save_network
from tests import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Files = dict[str, bytes]


class Hub:
    """Repositories that a server here gives as the hub does; `sent` is which files were asked for, with their first byte."""

    def __init__(self) -> None:
        self.repositories: dict[str, Files] = {}
        self.gated: set[str] = set()
        self.sent: list[tuple[str, int]] = []
        self.asked: list[str] = []
        self.breaks_at: int | None = None  # a connection is lost after so many bytes of a file
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def log_message(self, *_: Any) -> None:
                pass

            def give(self, status: int, data: bytes, body: bool, length: int | None = None, **headers: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(data) if length is None else length))
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def answer(self, body: bool) -> None:
                path = unquote(self.path.split("?")[0]).removeprefix("/")
                hub.asked.append(path)
                if path.startswith("api/models/"):
                    name = "/".join(path.split("/")[2:4])
                    files = hub.repositories.get(name)
                    if files is None:
                        return self.give(401, b"{}", body, X_Error_Code="RepoNotFound")
                    tree = [{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in files.items()]
                    told = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}
                    return self.give(
                        200,
                        json.dumps(tree if "/tree/" in path else told).encode(),
                        body,
                        Content_Type="application/json",
                    )
                owner, name, kind, _, *file = path.split("/") if "/resolve/" in path else ("",) * 5
                if not kind:
                    return self.give(404, b"{}", body)
                if f"{owner}/{name}" in hub.gated:
                    return self.give(403, b"{}", body, X_Error_Code="GatedRepo")
                data = hub.repositories[f"{owner}/{name}"].get("/".join(file))
                if data is None:
                    return self.give(404, b"{}", body, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
                headers = {"ETag": f'"{abs(hash(data)):040x}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
                start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
                rest = data[start:]
                if body:
                    hub.sent.append(("/".join(file), start))
                if start:
                    headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                if body and hub.breaks_at is not None and len(rest) > hub.breaks_at:
                    at, hub.breaks_at = hub.breaks_at, None
                    self.give(200, rest[:at], body, len(rest), **headers)
                    self.close_connection = True
                else:
                    self.give(206 if start else 200, rest, body, **headers)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def fetched(self) -> set[str]:
        return {file for file, _ in self.sent}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()
    address = f"http://127.0.0.1:{made.server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    for module in (constants, file_download):  # the latter keeps its own until 1.0
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    offline(monkeypatch, False)
    monkeypatch.chdir(tmp_path)
    yield made
    made.server.shutdown()
    made.server.server_close()


def offline(monkeypatch: pytest.MonkeyPatch, yes: bool = True) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", yes)
    getattr(utils, "reset_sessions", lambda: None)()  # before 1.0 a session stays as it was made


def pipeline(folder: Path) -> Files:
    """A tiny Flux in diffusers' folders, with what published repositories have beside them."""
    source = tiny.write_model(folder)
    files = {
        "model_index.json": json.dumps(
            {
                "_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"],
                "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
                "text_encoder_2": ["transformers", "T5EncoderModel"], "image_encoder": [None, None],
            }
        ).encode(),
        "transformer/diffusion_pytorch_model.safetensors": (source / "flux.safetensors").read_bytes(),
        "text_encoder/model.safetensors": (source / "clip.safetensors").read_bytes(),
        "text_encoder_2/model.safetensors": (source / "t5.safetensors").read_bytes(),
    }  # fmt: skip
    vae = save_network(tiny.autoencoder(), folder.with_name("vae.safetensors"), layout="diffusers")
    files["vae/diffusion_pytorch_model.safetensors"] = vae.read_bytes()
    for name in ("tokenizer", "tokenizer_2"):
        files |= {f"{name}/{file.name}": file.read_bytes() for file in (source / name).iterdir()}
    never = (
        "flux1-dev.safetensors", "ae.safetensors", "transformer/diffusion_pytorch_model.fp16.safetensors", "README.md",
        "vae/diffusion_pytorch_model.bin", "vae_1_0/diffusion_pytorch_model.safetensors", "transformer_ema/model.safetensors",
        "text_encoders/t5xxl_fp16.safetensors", "text_encoder/model.fp16.safetensors", "text_encoder/flax_model.msgpack",
    )  # fmt: skip
    return files | {name: b"never read: " + name.encode() for name in never}


def test_of_a_pipeline_only_what_is_read_is_fetched_and_loads(hub: Hub, tmp_path: Path) -> None:
    files = hub.repositories["some-one/flux"] = pipeline(tmp_path / "files")
    model = eridiff.load("some-one/flux", device="cpu", progress=False)
    assert hub.fetched == {name for name, data in files.items() if not data.startswith(b"never read")}
    here = eridiff.load(tmp_path / "files", device="cpu", progress=False)
    assert model.generate("a swan", seed=1).images[0].tobytes() == here.generate("a swan", seed=1).images[0].tobytes()
    hub.sent.clear()
    eridiff.load("some-one/flux", device="cpu", progress=False)
    assert not hub.sent, "what is cached is not fetched again"


def test_what_is_cached_is_used_without_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["some-one/flux"] = pipeline(tmp_path / "files")
    first = locate("some-one/flux")
    offline(monkeypatch)
    assert {n: c.checkpoint.path for n, c in locate("some-one/flux").components.items()} == {
        n: c.checkpoint.path for n, c in first.components.items()
    }
    offline(monkeypatch, False)
    del hub.repositories["some-one/flux"]  # gone at the hub, and still here
    assert set(locate("some-one/flux").components) == set(first.components)


def test_of_shards_those_that_the_index_names_are_fetched(hub: Hub) -> None:
    index = {
        "weight_map": {
            "a": "diffusion_pytorch_model-00001-of-00002.safetensors",
            "b": "diffusion_pytorch_model-00002-of-00002.safetensors",
        }
    }
    hub.repositories["some-one/sd3"] = {
        "model_index.json": b'{"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "x"], "text_encoder_3": [null, null]}',
        "transformer/config.json": b'{"a": 1}',
        "transformer/diffusion_pytorch_model.safetensors.index.json": json.dumps(index).encode(),
        **{f"transformer/{shard}": shard.encode() for shard in index["weight_map"].values()},
        **{f"transformer/diffusion_pytorch_model-{i:05}-of-00003.safetensors": b"of another number" for i in (1, 2, 3)},
        "transformer/diffusion_pytorch_model.safetensors.index.fp16.json": b"{}",
        "text_encoder_3/model.safetensors": b"switched off in the index",
        "scheduler/scheduler_config.json": b"{}",
    }  # fmt: skip
    resolve("some-one/sd3")
    assert hub.fetched == {
        "model_index.json", "scheduler/scheduler_config.json", "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        *(f"transformer/{shard}" for shard in index["weight_map"].values()),
    }  # fmt: skip


def test_a_part_that_is_replaced_is_not_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["some-one/flux"] = pipeline(tmp_path / "files")
    own = tmp_path / "files" / "flux.safetensors"
    parts = locate({"path": "some-one/flux", "transformer": own})
    assert parts.components["flux"].checkpoint.path == own
    assert not [name for name in hub.fetched if name.startswith("transformer")]


def test_single_parts_and_loras_load_by_id_and_by_file(hub: Hub, tmp_path: Path) -> None:
    network = tiny.flux()
    lora = inject_lora(network, 2)
    for branch in lora.all_branches():
        branch.up.data.fill_(0.01)
    here = load_lora(save_lora(lora, tmp_path / "x.safetensors", format="diffusers"), network)
    file = (tmp_path / "x.safetensors").read_bytes()
    state = load_file(save_network(tiny.autoencoder(), tmp_path / "v.safetensors", layout="diffusers"))
    vae = save(state)  # without metadata, which would say the statistics
    sd3 = json.dumps({"scaling_factor": 1.5305, "shift_factor": 0.0609}).encode()
    hub.repositories = {
        "some-one/vae": {"config.json": sd3, "diffusion_pytorch_model.safetensors": vae, "old.bin": b"pickled"},
        "some-one/pipe": {"model_index.json": b"{}", "vae/config.json": sd3, "vae/diffusion_pytorch_model.safetensors": vae},
        "some-one/fox": {"pytorch_lora_weights.safetensors": file, "other.safetensors": b"x"},
        "some-one/peft": {"adapter_model.safetensors": file, "adapter_config.json": b'{"peft_type": "LORA"}'},
        "some-one/many": {"a.safetensors": file, "b.safetensors": file},
    }  # fmt: skip
    for name in (
        "some-one/vae",
        "some-one/vae/diffusion_pytorch_model.safetensors",
        "some-one/pipe/vae/diffusion_pytorch_model.safetensors",
    ):
        found = eridiff.load_network(name, progress=False)
        assert (found.config.scale, found.config.shift) == (1.5305, 0.0609), "its config.json counts"
        assert locate({"vae": name}).components["vae"].config == found.config
    for name in ("some-one/fox", "some-one/peft", "some-one/many/b.safetensors"):
        assert len(load_lora(name, network).items) == len(here.items)
    assert not {"old.bin", "other.safetensors", "a.safetensors"} & hub.fetched
    assert "adapter_config.json" in hub.fetched
    with pytest.raises(
        EridiffError, match=r"'some-one/many' holds several .*'a.safetensors', 'b.safetensors'.*give one"
    ):
        load_lora("some-one/many", network)
    with pytest.raises(CheckpointError, match="'some-one/pipe' is a whole pipeline; give one file of it"):
        eridiff.load_network("some-one/pipe")


def test_of_a_pipeline_a_part_alone_is_fetched(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    convert(tiny.write_model(tmp_path / "m"), folder, "diffusers")
    hub.repositories["org/flux"] = {
        str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()
    }
    autoencoder = load_network("org/flux", part="vae", progress=False)
    assert torch.equal(autoencoder.encoder.conv_in.weight, load_network(folder, part="vae").encoder.conv_in.weight)  # type: ignore[union-attr, arg-type]
    assert {name for name, _ in hub.sent if name.endswith(".safetensors")} == {
        "vae/diffusion_pytorch_model.safetensors"
    }
    hub.sent.clear()
    assert type(load_encoder("org/flux", "t5", progress=False)).__name__ == "T5EncoderModel"
    assert not [name for name, _ in hub.sent if name.startswith(("transformer/", "vae/"))]


def test_tokenizers_by_id_bring_no_weights(hub: Hub, tmp_path: Path) -> None:
    files = hub.repositories["some-one/flux"] = pipeline(tmp_path / "files")
    assert set(locate({"tokenizers": "some-one/flux"}).tokenizers) == {"clip", "t5"}
    assert hub.fetched == {"model_index.json", *(name for name in files if name.startswith("tokenizer"))}


def test_an_interrupted_download_goes_on_where_it_stopped(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = save_network(tiny.autoencoder(), tmp_path / "v.safetensors").read_bytes()
    hub.repositories["some-one/vae"] = {"ae.safetensors": data}
    hub.breaks_at = len(data) // 2
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    try:
        eridiff.load_network("some-one/vae", progress=False)  # newer clients go on by themselves
    except CheckpointError as error:
        assert "the cache lacks 'ae.safetensors'" in str(error)
    eridiff.load_network("some-one/vae", progress=False)
    starts = [start for name, start in hub.sent if name == "ae.safetensors"]
    assert starts[0] == 0 and all(start > len(data) // 3 for start in starts[1:]) and len(starts) > 1


def test_offline_the_exact_files_that_lack_are_named(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["some-one/flux"] = pipeline(tmp_path / "files")
    folder = resolve("some-one/flux")
    offline(monkeypatch)
    for file in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        (folder / file).unlink()
    with pytest.raises(
        CheckpointError,
        match=r"HF_HUB_OFFLINE.*lacks 'vae/diffusion_pytorch_model\.safetensors, text_encoder/model\.safetensors'$",
    ):
        resolve("some-one/flux")
    with pytest.raises(CheckpointError, match=r"lacks 'vae/x\.safetensors'$"):
        resolve("some-one/flux/vae/x.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "text_encoder_2/model.safetensors").unlink()
    (folder / "text_encoder_2/model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "text_encoder_2/model-00002-of-00002.safetensors").symlink_to(tmp_path / "unfinished")
    with pytest.raises(
        CheckpointError, match=r"text_encoder_2/model-00001-of-00002\.safetensors, text_encoder_2/model-00002-of-00002"
    ):
        resolve("some-one/flux")


def test_why_a_repository_cannot_be_read_is_reported_by_kind(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["some-one/gated"] = {"flux.safetensors": b"x"}
    hub.gated.add("some-one/gated")
    for name, told in {
        "some-one/gated": "'some-one/gated': its licence must be accepted .* lacks 'flux.safetensors'",
        "some-one/nothing": "'some-one/nothing' is not a path here, the hub knows no such repository",
    }.items():
        with pytest.raises(CheckpointError, match=told):
            resolve(name)
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(
        CheckpointError, match=r"'some-one/new' is not a path here, the hub could not be reached \(\w+\)"
    ):
        resolve("some-one/new")
    offline(monkeypatch)
    with pytest.raises(
        CheckpointError, match="'some-one/new' is not a path here, the hub is not asked .HF_HUB_OFFLINE"
    ):
        resolve("some-one/new")


def test_another_pipeline_is_refused_before_its_weights_come(hub: Hub) -> None:
    hub.repositories["some-one/pixart"] = {
        "model_index.json": b'{"_class_name": "PixArtAlphaPipeline"}', "transformer/model.safetensors": b"x",
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="folder of a PixArtAlphaPipeline"):
        eridiff.load("some-one/pixart")
    assert hub.fetched == {"model_index.json"}


def test_a_mistyped_path_is_never_asked_for(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "models" / "flux").mkdir(parents=True)
    for name in (
        "models/flux1-dev.safetensors", "loras/x.safetensors", "models/other", "models/other/x.safetensors", "a/b/c", "/none/x",
        "../a/b.safetensors", "./some-one/flux", "~/some-one/flux", "some-one/flux/../x.safetensors", "config/run.yaml", "x.ckpt",
        "a b/c", "org/model.gguf", "org/model.bin",
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match="does not exist"):
            resolve(name)
    assert not hub.asked


def test_a_path_that_exists_wins(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "some-one" / "flux").mkdir(parents=True)
    assert resolve("some-one/flux") == Path("some-one/flux") and not hub.asked
    assert constants.ENDPOINT.startswith("http://127.0.0.1")
