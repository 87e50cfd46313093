"""What stays on the disk: encoded prompts and latents by content, the page, strips; each whole or not there."""

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

import eridiff
from eridiff.errors import CheckpointError, ConfigError, EridiffError
from eridiff.images import save_png
from eridiff.training import EmbeddingCache, LatentCache, Sampler, write_page, write_strip
from eridiff.training.record import drift, read_entries
from eridiff.weights.save import write_tensors
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_sd3_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(folder: Path) -> Any:
    return eridiff.load(folder, device="cpu", progress=False)


def equal(a: Any, b: Any) -> bool:
    """Two encoded prompts, bit for bit."""
    pairs = [(a.positive, b.positive), (a.negative, b.negative)]
    return all(
        (x is None) == (y is None) and (x is None or torch.equal(x.text, y.text) and torch.equal(x.pooled, y.pooled))
        for x, y in pairs
    )


# prompts and latents --------------------------------------------------------------------------------------------------


def test_a_kept_prompt_is_the_encoded_one_bit_for_bit_and_needs_no_encoders(model: Any, tmp_path: Path) -> None:
    cases = [
        ("a swan", None, None),
        ("a swan", "a fox", 3.0),
        ("a swan", None, 1.0),
        ({"clip": "a", "t5": "b"}, None, None),
    ]
    plain = [model.encode_prompt(*case) for case in cases]
    kept = EmbeddingCache(model, tmp_path)
    assert all(equal(kept.encode(*case), found) for case, found in zip(cases, plain, strict=True))
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(cases)
    model.clip = model.clip_g = model.t5 = None
    later = EmbeddingCache(model, tmp_path)
    assert all(equal(later.encode(*case), found) for case, found in zip(cases, plain, strict=True))
    with pytest.raises(ConfigError, match="'a dog' is not among those kept in .* no text encoders are loaded"):
        later.encode("a dog")


def test_a_kept_prompt_says_how_it_was_encoded(model: Any, tmp_path: Path) -> None:
    cache = EmbeddingCache(model, tmp_path)
    asked = {"prompt_weights": "comfyui", "t5_length": 90, "t5_mask": True}
    assert equal(cache.encode("a (swan:1.5)", **asked), model.encode_prompt("a (swan:1.5)", **asked))
    with safe_open(cache.path("a (swan:1.5)", None, None, **asked), framework="pt") as file:
        told = json.loads(file.metadata()["encoding"])
    own = {"t5_padding": "original", "without_t5": "zeros", "clip_windows": "first", "empty_negative": None}
    assert told == own | asked


def test_other_encoders_keep_their_prompts_apart(model: Any, tmp_path: Path) -> None:
    first = EmbeddingCache(model, tmp_path).encode("a swan")
    model.t5.module.encoder.block[0].layer[0].SelfAttention.q.weight.data[0, 0] += 1
    second = EmbeddingCache(model, tmp_path).encode("a swan")
    assert not equal(first, second) and len(list(tmp_path.iterdir())) == 2
    model.clip = model.clip_g = model.t5 = None
    with pytest.raises(ConfigError, match="holds the prompts of 2 sets of encoders"):
        EmbeddingCache(model, tmp_path)
    with pytest.raises(ConfigError, match="holds no prompts: load the encoders once"):
        EmbeddingCache(model, tmp_path / "empty")


ENCODERS = ("clip", "clip_g", "t5")
KEYS = st.tuples(
    st.text(max_size=5) | st.dictionaries(st.sampled_from(["clip", "t5"]), st.text(max_size=3), min_size=1),
    st.none() | st.text(max_size=3),
    st.sampled_from([None, 1.0, 5.0]),
    st.sampled_from(["original", "diffusers"]),
    st.sampled_from(["none", "a1111", "comfyui"]),
    st.sampled_from([None, 64, 256]),
)


@given(KEYS, KEYS)
def test_prompts_share_a_file_exactly_when_they_are_encoded_alike(model_once: Any, a: Any, b: Any) -> None:
    def path(key: Any) -> Path:
        return model_once.path(*key[:3], t5_padding=key[3], prompt_weights=key[4], t5_length=key[5])

    def read(prompt: Any) -> Any:  # by each encoder: one without a text of its own reads the first
        return [p if isinstance(p := prompt, str | None) else p.get(n, next(iter(p.values()))) for n in ENCODERS]

    def meaning(key: Any) -> Any:
        return read(key[0]), key[1], key[2] != 1, key[3], key[4], key[5] or 256  # the variant's own scale guides

    assert (path(a) == path(b)) == (meaning(a) == meaning(b))


@pytest.fixture(scope="module")
def model_once(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> EmbeddingCache:
    return EmbeddingCache(eridiff.load(folder, device="cpu", progress=False), tmp_path_factory.mktemp("cache"))


def test_a_lora_on_an_encoder_has_prompts_of_its_own(model: Any, tmp_path: Path) -> None:
    """In its file, at each scale, and gone again: each state of the encoders is another file."""
    generator = torch.Generator().manual_seed(0)
    name, width = "lora_te1_text_model_encoder_layers_0_mlp_fc1", model.clip.module.config.hidden_size
    up = torch.randn(model.clip.module.config.intermediate_size, 2, generator=generator)
    tensors = {"lora_up.weight": up, "lora_down.weight": torch.randn(2, width, generator=generator)}
    file = write_tensors({f"{name}.{key}": value for key, value in tensors.items()}, tmp_path / "te.safetensors", {})
    cache = EmbeddingCache(model, tmp_path / "kept")
    plain = cache.encode("a fox")
    with model.apply_lora(file, 1.0) as handle:
        for scale in (1.0, 0.5):
            handle.set_scale(scale)
            for kept in (cache, EmbeddingCache(model, tmp_path / "kept")):
                assert equal(kept.encode("a fox"), model.encode_prompt("a fox"))
                assert not equal(kept.encode("a fox"), plain)
    assert equal(cache.encode("a fox"), plain) and len(list(tmp_path.rglob("kept/*/*.safetensors"))) == 3


def test_a_damaged_file_is_named(model: Any, tmp_path: Path) -> None:
    kept = EmbeddingCache(model, tmp_path)
    kept.encode("a swan")
    path = kept.path("a swan", None, None)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(CheckpointError, match="is damaged .* remove it and the prompt is encoded again"):
        kept.encode("a swan")
    (tmp_path / "file").touch()
    kept.folder = tmp_path / "file" / "x"
    with pytest.raises(EridiffError, match="cannot be written"):
        kept.encode("a swan")


def test_a_sampler_generates_from_kept_prompts_the_same_image(model: Any, tmp_path: Path) -> None:
    section = {"prompts": ["a swan"], "sample_steps": 1, "out": str(tmp_path / "s")}
    plain = Sampler(model, section).sample(0).images[0].tobytes()
    for _ in range(2):  # written, then read without encoders
        assert Sampler(model, section, embeddings=tmp_path / "kept").sample(0).images[0].tobytes() == plain
        model.clip = model.clip_g = model.t5 = None


def test_latents_of_a_data_set_are_encoded_once(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = torch.rand(1, 3, 32, 16) * 2 - 1
    plain = model.encode_vae(picture)
    assert torch.equal(LatentCache(model, tmp_path).encode(picture), plain)
    later = LatentCache(model, tmp_path)
    monkeypatch.setattr(model, "encode_vae", None)
    assert torch.equal(later.encode(picture), plain)
    with pytest.raises(TypeError):  # another image is encoded
        later.encode(picture + 1e-6)
    model.autoencoder.encoder.conv_in.weight.data[0, 0, 0, 0] += 1
    assert LatentCache(model, tmp_path).folder != later.folder


# figures, page and strip ----------------------------------------------------------------------------------------------


@given(st.integers(0, 255), st.integers(0, 255))
def test_drift_of_flat_images_is_their_difference(a: int, b: int) -> None:
    found = drift(*(Image.new("RGB", (16, 24), (level,) * 3) for level in (a, b)))
    assert found == {"rms": abs(a - b), "coarse": abs(a - b)}


def test_texture_moves_the_fine_figure_and_not_the_coarse() -> None:
    board = np.indices((16, 16)).sum(axis=0) % 2 * 20
    picture = Image.fromarray((np.repeat(board[:, :, None], 3, 2) + 90).astype(np.uint8))
    found = drift(picture, Image.new("RGB", (16, 16), (100, 100, 100)))
    assert found["rms"] == 10 and found["coarse"] == 0
    half = Image.new("RGB", (16, 16))
    half.paste((100, 100, 100), (0, 0, 8, 16))
    assert drift(half, Image.new("RGB", (16, 16)))["coarse"] == round(100 / math.sqrt(2), 2)


class Page(HTMLParser):
    """The links, and every attribute that would make a browser fetch something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.cells: list[int] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "polyline", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.cells.append(0)
        if tag in ("td", "th"):
            self.cells[-1] += 1
        self.fetched += [v or "" for n, v in attributes if n in ("src", "href", "srcset", "data", "xlink:href")]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


PROMPTS = ['<b>swan</b> & "fox" 100%?#', ""]


@pytest.fixture(scope="module")
def samples(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts by live and EMA weights at three steps, generated by two samplers, as when a run is resumed."""
    model = eridiff.load(folder, device="cpu", progress=False)
    out = tmp_path_factory.mktemp("samples")
    for steps in ((0, 5), (10,)):
        section = {"prompts": PROMPTS, "sample_steps": 1, "out": str(out)}
        sampler = Sampler(model, section, ema=tiny.mmdit(seed=1).state_dict(), raise_errors=True)
        for step in steps:
            model.network.final.linear.weight.data.mul_(0.5 if step else 1.0)
            sampler.sample(step)
    Image.new("RGB", (8, 8)).save(out / "other.png")
    (out / "broken.png").write_bytes(b"PNG")
    return out


def test_the_page_shows_every_image_and_fetches_nothing_else(samples: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(samples, tmp_path / "moved where ever")
    text = (moved / "index.html").read_text()
    page = Page(text)
    assert not page.open and page.cells == [4] * 5
    names = {unquote(link) for link in page.fetched}
    assert names == set(read_entries(samples)) and all((moved / name).is_file() for name in names)
    assert "@import" not in text and "url(" not in text and "<script>" in text and "http" not in text
    assert PROMPTS[0] in page.text and "step 10" in page.text and "ema" in page.text
    browser = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if browser:
        shot = tmp_path / "page.png"
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--screenshot={shot}",
            "--window-size=1200,900",
        ]
        subprocess.run([*command, (moved / "index.html").as_uri()], check=True, timeout=120, capture_output=True)
        with Image.open(shot) as seen:
            assert len(seen.convert("RGB").getcolors(1 << 24) or []) > 50


def test_the_page_has_the_newest_step_first_and_the_common_settings_on_top(samples: Path) -> None:
    text = (samples / "index.html").read_text()
    assert re.findall(r"<th>step (\d+)</th>", text) == ["10", "5", "0"]
    assert re.search(r"<h1>[^<]*sd3\.5-medium, \d+ x \d+, 1 steps?, dpmpp_2m, cfg [\d.]+, float32</h1>", text)


def test_the_curves_of_the_page_have_one_scale(samples: Path) -> None:
    """Each ends as high as its difference is beside the largest of all rows."""
    text = (samples / "index.html").read_text()
    largest = float(re.search(r"one scale, 0 to\s+(\d+\.\d)", text)[1])  # type: ignore[index]
    curves = re.findall(r'up to ([\d.]+)</title><polyline points="([^"]+)"', text)
    assert len(curves) == 4 and max(float(up) for up, _ in curves) == largest > 0
    for up, points in curves:
        top = min(float(point.split(",")[1]) for point in points.split())
        assert top == pytest.approx(29 - 28 * float(up) / largest, abs=0.2)


def test_drift_is_measured_from_the_first_image_of_a_row_after_a_restart_too(samples: Path) -> None:
    entries = {(e.step, e.weights, e.settings["prompt"]): e for e in read_entries(samples).values()}
    assert len(entries) == 12
    for (step, weights, prompt), entry in entries.items():
        figures = entry.settings["training"]["drift"]
        assert ("first" in figures) == (step > 0) and ("live" in figures) == (weights == "ema")
        if step:
            first = entries[0, weights, prompt]
            with Image.open(samples / entry.name) as a, Image.open(samples / first.name) as b:
                assert figures["first"] == {"step": 0, **drift(a, b)}
            assert figures["previous"]["step"] == step - 5
            assert (figures["first"]["rms"] > 0) == (weights == "live")


def test_the_strip_holds_every_image_at_its_place(samples: Path, tmp_path: Path) -> None:
    path = write_strip(samples, tmp_path / "strip.png", side=32)
    with Image.open(path) as strip:
        assert strip.size == (56 + 3 * 36, 18 + 2 * (18 + 2 * (32 + 18)))
        top = 18 + 18
        for weights in ("live", "ema"):
            for column, step in enumerate((0, 5, 10)):
                entry = next(e for e in read_entries(samples).values() if e.row[1] == json.dumps("") and (e.step, e.weights) == (step, weights))  # fmt: skip
                left, lower = 56 + column * 36, top + (0 if entry.settings["prompt"] == PROMPTS[0] else 118)
                with Image.open(samples / entry.name) as image:
                    assert strip.crop((left, lower, left + 32, lower + 32)).tobytes() == image.tobytes()
            top += 50
    assert Image.open(write_strip(samples, columns=2, side=32)).width == 56 + 2 * 36
    with pytest.raises(EridiffError, match="holds no images that were sampled in training"):
        write_strip(tmp_path / "none")


def test_a_row_is_an_entry_of_the_section(model: Any, tmp_path: Path) -> None:
    """Two settings of one prompt and seed are compared with themselves, not with each other."""
    entries = [{"prompt": "a swan", "true_cfg_scale": scale} for scale in (1.5, 9.0)]
    section = {"samples": entries, "sample_steps": 1, "width": 32, "height": 32, "out": str(tmp_path)}
    sampler = Sampler(model, section, raise_errors=True)
    for step in (0, 5):
        said = sampler.sample(step).settings
    assert [one["training"]["drift"]["previous"]["rms"] for one in said] == [0, 0]
    assert (tmp_path / "index.html").read_text().count("<img loading") == 4


def test_a_page_that_cannot_be_written_is_one_sentence(samples: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EridiffError, match="cannot be written"):
        write_page(tmp_path / "file", read_entries(samples))


def test_an_image_removed_by_hand_ends_nothing(folder: Path, tmp_path: Path) -> None:
    model = eridiff.load(folder, device="cpu", progress=False)
    sampler = Sampler(model, {"prompts": ["a"], "sample_steps": 1, "out": str(tmp_path)}, raise_errors=True)
    sampler.sample(0).paths[0].unlink()
    assert "first" not in sampler.sample(1).settings[0]["training"]["drift"]
    save_png(Image.new("RGB", (8, 8)), tmp_path / "x.png", None)


@pytest.mark.slow
def test_a_process_killed_at_any_time_leaves_no_truncated_file(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "tests.killed", str(tmp_path), "50"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["killed"] == 50 and min(found[kind] for kind in ("png", "safetensors", "html")) > 0
    assert found["interrupted"] > 0  # some were killed in the middle of a file


@pytest.mark.slow
def test_memory_over_a_hundred_events_does_not_grow() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sampler_overhead", "--memory"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["growth_bytes"] < 6 * 2**20  # training alone wanders by 3
