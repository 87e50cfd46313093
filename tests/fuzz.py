"""Files that are damaged in every way that a seeded generator can think of: `python -m tests.fuzz N SEED`.

Whatever is read, a file gives a result or a typed sentence: an EridiffError of one line and at most 300 characters. It takes less
than 10 seconds and 1 GiB, and nothing is written. Every other outcome is printed with the number of the case, which makes it again:
`python -m tests.fuzz 1 SEED --from NUMBER`.
"""

import argparse
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import eridiff
from eridiff.errors import EridiffError
from eridiff.images import read_image, save_png
from eridiff.inference.again import read_settings
from eridiff.lora import inject_lora, load_lora, save_lora
from eridiff.report import inspect, summary
from eridiff.run_files import load_config
from eridiff.text.tokenizers import clip_tokenizer, t5_tokenizer
from eridiff.weights.locate import locate
from tests import tiny

SECONDS, BYTES, CHARACTERS = 10, 1 << 30, 300
NAMES = [
    "", " ", ".", "..", "a" * 3000, "new\nline", "tab\t", "\x00", "\u202e", "é", "𝕏", "\ud800", "'", '"', "{0}", "%s", "\x1b[31m", "*",
    "weight", "img_in.weight", "scaled_fp8", "img_in.comfy_quant", "img_in.scale_weight", "lora_unet_x.lora_down.weight", "v_pred",
    "model.diffusion_model.x", "vae.encoder.conv_in.weight", "__metadata__", "double_blocks.99999999999.img_attn.qkv.weight",
    "bundle_emb.x.y", "edm_mean", "module.img_in.weight", "x.absmax", "conditioner.embedders.0.x", "../../x", "CON", "a/b\\c",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3.5, 1e308, -1e-320, float("nan"), float("inf"), 2**31, 2**63, 2**64, 10**400, "", "x", "0", "None",
    "1e999", [], {}, [[]], [0], [1, 2, 3], ["a"], [None], {"a": 1}, {"": {"": {}}}, "é\n", "a" * 5000, [0] * 2000, [[[[[[1]]]]]], *NAMES[:12],
]  # fmt: skip
DTYPES = [
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "F64",
    "I64",
    "U8",
    "BOOL",
    "C64",
    "F4",
    "F6_E2M3",
    "f32",
    "",
    "Q4",
    "F8_E8M0",
]
Cases = dict[str, Callable[[random.Random, Path], Callable[[], Any]]]


class Samples:
    """Good files of every kind, from which the others are made."""

    def __init__(self, folder: Path) -> None:
        self.flux = tiny.write_model(folder / "flux")
        self.sd3 = tiny.write_sd3_model(folder / "sd3")
        self.sdxl = tiny.write_sdxl_model(folder / "sdxl")
        self.network = tiny.flux()
        lora = inject_lora(self.network, 2, targets=["double_blocks.*.qkv", "single_blocks.*"])
        for branch in lora.all_branches():
            torch.nn.init.normal_(branch.up)
        self.loras = [
            save_lora(lora, folder / f"{name}.safetensors", format=name) for name in ("kohya", "diffusers", "native")
        ]
        lora.detach()
        settings = eridiff.load(progress=False, device="cpu").generate("a swan", seed=1, steps=1).settings[0]
        self.picture = save_png(Image.new("RGB", (32, 32)), folder / "picture.png", settings)
        self.files = [
            *sorted(self.flux.glob("*.safetensors")),
            *sorted(self.sd3.glob("*.safetensors")),
            self.sdxl / "sdxl.safetensors",
        ]
        root = Path(__file__).parents[1]
        self.yaml = [
            YAML,
            *re.findall(r"```yaml\n(.*?)```", (root / "docs" / "configuration.md").read_text(), re.DOTALL),
        ]
        self.tokenizers = [tiny.TOKENIZERS / "clip", tiny.TOKENIZERS / "t5"]


YAML = """
model:
  path: flux1-dev.safetensors
dtype: bfloat16
sample:
  prompts:
    - a fox
    - a swan
  sample_steps: 20
  guidance_scale: 3.5
  seed: 42
  width: 512
"""
PROMPTS = {
    ".txt": "a fox --n ugly --w 512 --h 768 --d 3 --l 7.5 --s 20 --g 3.5 --fs 1\n# a remark\na swan --ss euler --rf 1,2\n",
    ".toml": '[prompt]\nwidth = 512\n[[prompt.subset]]\nprompt = "a fox"\nseed = 3\n',
    ".json": '[{"prompt": "a fox", "width": 512, "seed": 1}, {"prompt": "b", "sample_steps": 3}]',
}

PROGRAMS: dict[str, Any] = {  # name -> a configuration of another program, as JSON or TOML
    "kohya.toml": (
        '[a]\npretrained_model_name_or_path = "m.safetensors"\nsample_prompts = "prompts.txt"\nsample_sampler = "euler_a"\n'
        'sample_every_n_steps = 250\noutput_dir = "runs"\n[b]\nnetwork_module = "networks.lora_flux"\nclip_skip = 2\n'
        'mixed_precision = "bf16"\napply_t5_attn_mask = true\nlearning_rate = 1e-4\n'
    ),
    "samples.json": [
        {"__version": 0, "enabled": True, "prompt": "a fox", "negative_prompt": "", "seed": 42, "random_seed": False, "width": 512,
         "height": 512, "diffusion_steps": 20, "cfg_scale": 7.0, "noise_scheduler": "EULER_A", "frames": 1, "length": 10.0,
         "text_encoder_1_layer_skip": 0, "transformer_attention_mask": False},
    ],
    "onetrainer.json": {
        "__version": 11, "base_model_name": "m", "model_type": "FLUX_DEV_1", "workspace_dir": "w", "sample_after": 10,
        "sample_after_unit": "STEP", "train_dtype": "BFLOAT_16", "transformer": {"model_name": "", "attention_mask": False},
        "samples": [{"prompt": "a fox", "diffusion_steps": 20}], "learning_rate": 1e-4,
    },
    "simpletuner.json": {
        "--model_family": "sd3", "--validation_prompt": "a fox", "--validation_resolution": "1024x1024,512", "--validation_guidance": "3.0",
        "--validation_num_inference_steps": 20, "--validation_guidance_skip_layers": [7, 8], "--validation_seed": 42,
        "--validation_noise_scheduler": "euler", "--flow_schedule_shift": 3, "--output_dir": "out", "--user_prompt_library": "library.json",
    },
    "library.json": {"fox": "a fox", "swan": {"prompt": "a swan", "adapter_strength": 0.5, "bbox_entities": []}},
    "generate.json": {
        "job": "generate",
        "config": {"name": "x", "process": [{
            "type": "to_folder", "output_folder": "out", "model": {"name_or_path": "m", "arch": "flux:tag"},
            "generate": {"prompts": ["a fox --w 512", "[name]"], "seed": -1, "sample_steps": 20, "num_repeats": 2, "prompt_2": "b"},
        }]},
    },
}  # fmt: skip


def value(r: random.Random) -> Any:
    return r.choice(
        [
            *VALUES,
            r.randint(-5, 5000),
            r.random(),
            {r.choice(NAMES): r.choice(VALUES)},
            [r.choice(VALUES) for _ in range(3)],
        ]
    )


def changed(r: random.Random, document: Any) -> Any:
    """A JSON document in which something, anywhere, is something else."""
    if isinstance(document, dict) and document and r.random() < 0.8:
        key = r.choice(list(document))
        other = dict(document)
        way = r.random()
        if way < 0.7:
            other[key] = changed(r, document[key])
        elif way < 0.85:
            del other[key]
        else:
            other[r.choice(NAMES)] = value(r)
        return other
    if isinstance(document, list) and document and r.random() < 0.7:
        at = r.randrange(len(document))
        return [*document[:at], *([changed(r, document[at])] if r.random() < 0.8 else []), *document[at + 1 :]]
    return value(r)


def dumped(document: Any) -> bytes:
    try:
        return json.dumps(document).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return b"{}"


def bent(r: random.Random, data: bytes, times: int = 3) -> bytes:
    """Bytes after some flips, cuts, copies and insertions."""
    raw = bytearray(data)
    for _ in range(r.randint(1, times)):
        at = r.randrange(len(raw) + 1) if r.random() < 0.5 else r.randrange(min(len(raw), 64) + 1)
        way = r.randrange(6)
        if way == 0 and at < len(raw):
            raw[at] = r.randrange(256)
        elif way == 1:
            del raw[at:]
        elif way == 2:
            del raw[at : at + r.randint(1, 9)]
        elif way == 3:
            raw[at:at] = bytes(r.randrange(256) for _ in range(r.randint(1, 9)))
        elif way == 4:
            raw[at:at] = raw[at : at + r.randint(1, 40)]
        else:
            raw[at:at] = r.choice(NAMES).encode("utf-8", "surrogatepass")[:50]
    return bytes(raw)


def parted(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(header: Any, data: bytes, pairs: list[tuple[str, Any]] | None = None) -> bytes:
    """`pairs` in place of a header hold a name twice."""
    text = dumped(header)
    if pairs is not None:
        text = b"{" + b",".join(dumped(n) + b":" + dumped(v) for n, v in pairs) + b"}"
    return len(text).to_bytes(8, "little") + text + data


def tensor_file(r: random.Random, path: Path) -> bytes:
    """A safetensors file after one change that keeps the rest consistent, or after any damage."""
    header, data = parted(path)
    names = [name for name in header if name != "__metadata__"]
    name, way = r.choice(names), r.randrange(12)
    entry = dict(header[name])
    if way == 0:
        return bent(r, path.read_bytes())
    if way == 1:
        return joined(changed(r, header), data)
    if way == 2:  # another name
        header = {r.choice(NAMES) if n == name else n: e for n, e in header.items()}
    elif way == 3:  # another shape with as many numbers
        shape = [s for s in entry["shape"] for _ in (0, 1) if _ == 0 or r.random() < 0.2]
        r.shuffle(shape)
        header[name] = entry | {"shape": r.choice([shape, shape[::-1], [1, *shape], [*shape, 1]])}
    elif way == 4:
        header[name] = entry | {"dtype": r.choice(DTYPES)}
    elif way == 5:
        header[name] = entry | {r.choice(["shape", "data_offsets"]): value(r)}
    elif way == 6:
        header["__metadata__"] = changed(r, header.get("__metadata__", {"eridiff.config": "{}"}))
    elif way == 7:  # something else in a metadata text that is read
        told = dict(header.get("__metadata__", {}))
        key = r.choice(["eridiff.config", "eridiff.sampling", "eridiff.words", "eridiff.markers", "eridiff.variant",
                        "modelspec.prediction_type", "ss_network_args", "lora_adapter_metadata", "ss_network_dim"])  # fmt: skip
        try:
            document = json.loads(told.get(key, '{"flux": {"heads": 2}, "unet": {"head_width": 32}, "r": 4}'))
        except ValueError:
            document = {}
        told[key] = r.choice([dumped(changed(r, document)).decode("utf-8", "replace"), str(value(r))])
        header["__metadata__"] = {n: t if isinstance(t, str) else str(t) for n, t in told.items()}
    elif way == 8:  # a tensor more, with its bytes
        more = r.choice([0, 4, 16, 64])
        end = max(header[n]["data_offsets"][1] for n in names)
        shape = r.choice([[more // 4], [more // 4, 1], [1, more // 4]]) if more != 4 or r.random() < 0.5 else []
        header[r.choice(NAMES)] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + more]}
        data += bytes(r.randrange(256) for _ in range(more))
    elif way == 9:  # the last tensor away
        last = max(names, key=lambda n: header[n]["data_offsets"][1])
        data = data[: header[last]["data_offsets"][0]]
        del header[last]
    elif way == 10:
        return joined(header, data, [*header.items(), (name, entry)])
    else:  # other numbers
        at = r.randrange(max(1, len(data) - 64))
        data = data[:at] + bytes(r.choice([0, 255, 127, r.randrange(256)]) for _ in range(64)) + data[at + 64 :]
    return joined(header, data)


def cases(samples: Samples) -> Cases:
    def model_file(r: random.Random, folder: Path) -> Callable[[], Any]:
        source = r.choice(samples.files)
        path = folder / r.choice([source.name, "m.safetensors", "é ü.safetensors"])
        path.write_bytes(tensor_file(r, source))
        kind = r.randrange(3)
        if kind == 0:
            return lambda: summary(inspect(path, values=True))
        options = {"allow_unknown": r.random() < 0.3, "dtype": r.choice([None, torch.float16])}
        return lambda: eridiff.load_network(path, progress=False, **options)

    def whole_model(r: random.Random, folder: Path) -> Callable[[], Any]:
        source = r.choice([samples.flux, samples.sd3, samples.sdxl])
        shutil.copytree(source, folder / "m")
        victim = r.choice(sorted((folder / "m").glob("*.safetensors")))
        victim.write_bytes(tensor_file(r, victim))
        return lambda: eridiff.load(folder / "m", progress=False, device="cpu")

    def lora_file(r: random.Random, folder: Path) -> Callable[[], Any]:
        path = folder / r.choice(["adapter_model.safetensors", "x.safetensors"])
        path.write_bytes(tensor_file(r, r.choice(samples.loras)))
        if r.random() < 0.5:
            config = {
                "peft_type": "LORA",
                "r": 2,
                "lora_alpha": 4,
                "rank_pattern": {},
                "use_rslora": False,
                "target_modules": ["a"],
            }
            (folder / "adapter_config.json").write_bytes(
                dumped(changed(r, config)) if r.random() < 0.8 else bent(r, dumped(config))
            )
        partial = r.random() < 0.5
        return lambda: load_lora(path, samples.network, allow_partial=partial)

    def folders(r: random.Random, folder: Path) -> Callable[[], Any]:
        place = folder / "transformer"
        place.mkdir()
        source = samples.flux / "flux.safetensors"
        header, _ = parted(source)
        shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
        (place / shard).write_bytes(source.read_bytes() if r.random() < 0.8 else tensor_file(r, source))
        index: Any = {"metadata": {"total_size": 1}, "weight_map": {n: shard for n in header if n != "__metadata__"}}
        index = changed(r, index) if r.random() < 0.7 else index
        (place / "diffusion_pytorch_model.safetensors.index.json").write_bytes(
            dumped(index) if r.random() < 0.8 else bent(r, dumped(index))
        )
        config = {
            "_class_name": "FluxTransformer2DModel",
            "num_layers": 2,
            "attention_head_dim": 16,
            "axes_dims_rope": [4, 6, 6],
            "guidance_embeds": True,
        }
        (place / "config.json").write_bytes(dumped(changed(r, config)) if r.random() < 0.8 else bent(r, dumped(config)))
        pipeline = {
            "_class_name": "FluxPipeline",
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": [None, None],
        }
        if r.random() < 0.7:
            (folder / "model_index.json").write_bytes(
                dumped(changed(r, pipeline)) if r.random() < 0.7 else bent(r, dumped(pipeline))
            )
        way = r.randrange(8)
        if way == 0:
            (place / "model.safetensors").symlink_to(place / "model.safetensors")
        elif way == 1:
            (place / "model.safetensors").mkdir()
        elif way == 2:
            (folder / "vae").mkdir()
            os.mkfifo(folder / "vae" / "x.safetensors")
        elif way == 3:
            (folder / "unet").symlink_to(folder)
        elif way == 4:
            (place / shard).unlink()
        elif way == 5:
            (place / "x.bin").write_bytes(b"\x80\x02")
        target = r.choice([folder, place, {"path": folder, "vae": place}, {"transformer": place, "tokenizers": folder}])
        return lambda: locate(target)

    def yaml_file(r: random.Random, folder: Path) -> Callable[[], Any]:
        lines = r.choice(samples.yaml).splitlines()
        for _ in range(r.randint(1, 3)):
            at = r.randrange(len(lines))
            key, colon, _ = lines[at].partition(":")
            told = json.dumps(value(r), ensure_ascii=r.random() < 0.5)
            lines[at] = r.choice([
                f"{key}{colon} {told}", key, lines[at] * 2, "  " + lines[at], lines[at].strip(), f"{key}: &a [*a]", f"{key}: !!python/object:os.x {{}}",
                f"{key}: .nan", f"{key}: 1e999", f"? {told}", f"{told}: {told}", "\t" + lines[at], f"{key}: 2026-13-45", f"{key}: 0o9", "<<: *x",
                "- " * 300, "[" * 1200, f"{key}: {'9' * 5000}", "---", "%YAML 9", f"{key}: |", "@", "`", "\x07",
            ])  # fmt: skip
        path = folder / f"run{r.choice(['.yaml', '.yml', '.json', ''])}"
        data = "\n".join(lines).encode("utf-8", "surrogatepass")
        path.write_bytes(data if r.random() < 0.8 else bent(r, data))
        return lambda: load_config(path)

    def prompt_file(r: random.Random, folder: Path) -> Callable[[], Any]:
        ending = r.choice(list(PROMPTS))
        text = PROMPTS[ending]
        if ending == ".json" and r.random() < 0.7:
            data = dumped(changed(r, json.loads(text)))
        elif ending == ".txt" and r.random() < 0.7:
            words = text.split(" ")
            words[r.randrange(len(words))] = r.choice(
                [*NAMES, "--", "--zz", "--w", "--d -1", "--l nan", "--s 1e9", str(value(r))]
            )
            data = " ".join(words).encode("utf-8", "surrogatepass")
        else:
            data = bent(r, text.encode())
        path = folder / f"prompts{ending}"
        path.write_bytes(data)
        return lambda: load_config(path)

    def program(r: random.Random, folder: Path) -> Callable[[], Any]:
        (folder / "prompts.txt").write_text(PROMPTS[".txt"])
        (folder / "library.json").write_bytes(dumped(changed(r, PROGRAMS["library.json"])))
        name = r.choice(list(PROGRAMS))
        told = PROGRAMS[name]
        if isinstance(told, str):
            lines = told.splitlines()
            at = r.randrange(len(lines))
            lines[at] = f"{lines[at].partition('=')[0]}= {json.dumps(value(r), ensure_ascii=r.random() < 0.5)}"
            data = "\n".join(lines).encode("utf-8", "surrogatepass")
        else:
            data = dumped(changed(r, told))
        path = folder / name
        path.write_bytes(data if r.random() < 0.8 else bent(r, data))
        return lambda: load_config(path)

    def picture(r: random.Random, folder: Path) -> Callable[[], Any]:
        path = folder / "p.png"
        if r.random() < 0.4:
            path.write_bytes(bent(r, samples.picture.read_bytes()))
        else:
            with Image.open(samples.picture) as image:
                settings = changed(r, json.loads(image.info["eridiff"]))
                info = PngInfo()
                info.add_itxt("eridiff", dumped(settings).decode("utf-8", "replace"))
                Image.new(r.choice(["RGB", "L", "RGBA", "P", "I;16"]), (r.randint(1, 40), 8)).save(path, pnginfo=info)
        if r.random() < 0.3:
            return lambda: read_image(path)
        return lambda: read_settings(path)

    def tokenizer(r: random.Random, folder: Path) -> Callable[[], Any]:
        source = r.choice(samples.tokenizers)
        shutil.copytree(source, folder / "t")
        victim = r.choice(sorted((folder / "t").iterdir()))
        data = victim.read_bytes()
        as_json = victim.suffix == ".json" and r.random() < 0.6
        data = dumped(changed(r, json.loads(data))) if as_json else bent(r, data)
        victim.write_bytes(data)
        if r.random() < 0.1:
            victim.unlink()
        reader = clip_tokenizer if source.name == "clip" else t5_tokenizer
        return lambda: reader(folder / "t")("a fox").input_ids

    return {
        "model file": model_file, "whole model": whole_model, "lora": lora_file, "folder": folders, "yaml": yaml_file,
        "prompt file": prompt_file, "program": program, "picture": picture, "tokenizer": tokenizer,
    }  # fmt: skip


class Slow(BaseException):
    pass


def _alarm(*_: Any) -> None:
    raise Slow


def tree(folder: Path) -> list[tuple[str, int, int]]:
    found = ((str(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*"))
    return sorted(found)


def outcome(read: Callable[[], Any], folder: Path) -> str:
    """What came of one case: "read", "refused", or what is wrong."""
    before = tree(folder)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of work, on a machine that others use too
    signal.alarm(6 * SECONDS)  # for what waits for ever
    try:
        read()
        found = "read"
    except EridiffError as error:
        text = str(error)
        found = "refused"
        if len(text) > CHARACTERS or "\n" in text or not text.isprintable():
            found = f"a sentence of {len(text)} characters: {text!r}"
    except (Slow, MemoryError) as error:
        found = f"{type(error).__name__}: more than {SECONDS} s or {BYTES} bytes"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        own = [f for f in traceback.extract_tb(error.__traceback__) if "/eridiff/" in f.filename]
        found = f"{type(error).__name__} at {Path((own or [place])[-1].filename).name}:{(own or [place])[-1].lineno}: {str(error)[:150]!r}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    return found if tree(folder) == before else f"{found}, and wrote {set(tree(folder)) ^ set(before)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--from", type=int, default=0, dest="start", metavar="NUMBER")
    parser.add_argument("--kind", help="this kind of file alone")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    table: Counter[tuple[str, str]] = Counter()
    faults = 0
    with tempfile.TemporaryDirectory() as name:
        samples = Samples(Path(name))
        kinds = cases(samples)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, resource.RLIM_INFINITY))
        for kind_of_alarm in (signal.SIGALRM, signal.SIGPROF):
            signal.signal(kind_of_alarm, _alarm)
        for number in range(options.start, options.start + options.count):
            r = random.Random(f"{options.seed}/{number}")
            kind = options.kind or list(kinds)[number % len(kinds)]
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place)
                try:
                    read = kinds[kind](r, folder)
                except (ValueError, OSError):  # a name that no file can have
                    continue
                found = outcome(read, folder)
            table[kind, found if found in ("read", "refused") else "FAULT"] += 1
            if found not in ("read", "refused"):
                faults += 1
                print(f"case {number} of seed {options.seed}, {kind}: {found}", flush=True)
    for kind in kinds:
        print(f"{kind:12}", *(f"{word} {table[kind, word]:6}" for word in ("read", "refused", "FAULT")))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
