"""The command line: `eridiff sample` draws, `resample` draws again, `inspect` says what a file is."""

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from eridiff import __version__, cli_golden, cli_lora, cli_trace
from eridiff.config import MODEL_OPTIONS, RunConfig, SampleSettings, size_of
from eridiff.errors import ConfigError, EridiffError
from eridiff.images import contact_sheet, read_image, save_png, slug
from eridiff.inference import BUILT_IN, DiffusionInference, SDXLInference, load
from eridiff.inference.again import circumstances, draw_again, load_again, read_settings
from eridiff.inference.lora import LoraHandle
from eridiff.inference.result import Result
from eridiff.inference.sd35 import OPTIONS as TEXT_OPTIONS
from eridiff.inference.sdxl import PREDICTIONS
from eridiff.inference.section import fitted, picture_paths, picture_requests, told_sizes
from eridiff.inference.settings import check_settings, check_size
from eridiff.inference.words import read_words
from eridiff.inspect import inspect, summary
from eridiff.lora.ledger import counted
from eridiff.run_files import load_config
from eridiff.schedulers.samplers import SAMPLERS
from eridiff.training.distributed import agreed, launched, ranks, spread
from eridiff.weights.locate import DENOISERS, PART_NAMES, locate

BUILT_IN_PROMPTS = (
    "a swan on mars", "a big pumpkin at night", "a robot on the sea", "a small pizza in a cave", "a guitar on snow",
    "a parrot on grass", "a rocket at sunset", "a panda in the desert", "a unicorn in a cave",
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
SETTINGS = {  # option -> field of SampleSettings
    "prompt": "prompts", "negative": "negative_prompt", "steps": "sample_steps", "seed": "seed",
    "guidance": "guidance_scale", "cfg": "true_cfg_scale", "image": "image", "strength": "strength", "mask": "mask",
    "control": "control", "out": "out", "sampler": "sampler", "schedule": "schedule", "shift": "shift",
    "cfg_rescale": "cfg_rescale", "skip_layers": "skip_layers", "hand_over": "hand_over",
    "original_size": "original_size", "crop": "crop", "target_size": "target_size", "aesthetic_score": "aesthetic_score",
    "negative_aesthetic_score": "negative_aesthetic_score", "lora": "lora", "lora_partial": "lora_partial",
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0, or 2 after one sentence on stderr for input that cannot be used."""
    logging.basicConfig(format="eridiff: %(message)s", level=logging.WARNING)
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except EridiffError as error:
        print(f"eridiff: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eridiff", description="Draw pictures with Flux, Stable Diffusion 3 and SDXL, from published checkpoints."
    )
    parser.add_argument("--version", action="version", version=f"eridiff {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    sample = commands.add_parser(
        "sample", help="draw pictures", description="Draw pictures; options win over the file."
    )
    sample.set_defaults(run=_sample_on_every_rank)
    sample.add_argument(
        "config",
        nargs="?",
        type=Path,
        metavar="FILE",
        help="what to load and to draw: YAML, a trainer's too, or a prompt file",
    )
    model = sample.add_argument_group("model")
    model.add_argument(
        "--model", metavar="PATH|ID", help="a checkpoint, a folder or a hub id; the built-in small Flux otherwise"
    )
    for name, what in (
        ("transformer", "the network"),
        ("vae", "the autoencoder"),
        ("clip", "CLIP-L"),
        ("clip-g", "CLIP-G, of SD 3"),
        ("t5", "T5-XXL"),
    ):
        model.add_argument(f"--{name}", metavar="PATH", help=f"{what}, if the model lacks it or it shall be replaced")
    model.add_argument(
        "--tokenizers", metavar="FOLDER", help="holds tokenizer/ (CLIP, may be absent) and tokenizer_2/ (T5)"
    )
    model.add_argument(
        "--variant", help="which published model this is, where sizes cannot tell: sd3.5-large-turbo, depth"
    )
    for name, values in TEXT_OPTIONS.items():
        model.add_argument(
            f"--{name.replace('_', '-')}", choices=values, help=f"of SD 3's text; {values[0]} by default"
        )
    model.add_argument(
        "--t5-mask", action="store_true", default=None, help="hide T5's padding, for a network trained so"
    )
    model.add_argument("--prediction", choices=PREDICTIONS, help="what an SDXL predicts, where its file does not say")
    model.add_argument(
        "--empty-negative", choices=["zeros", "encoded"], help="SDXL's negative prompt when none is given"
    )
    model.add_argument("--device", help="cpu, cuda, cuda:1, ...; a GPU if there is one")
    model.add_argument(
        "--dtype", choices=DTYPES, help="of the computation; the file's on a GPU, float32 on a CPU with room"
    )
    model.add_argument("--refiner", metavar="PATH|ID", help="an SDXL refiner, which finishes the base's pictures")
    model.add_argument(
        "--lora",
        action="append",
        metavar="FILE[:SCALE]",
        help="a LoRA of any format, or a peft folder; may be given several times",
    )
    model.add_argument(
        "--lora-partial", action="store_true", default=None, help="leave out what of a LoRA does not fit"
    )
    model.add_argument(
        "--allow-unknown",
        action="store_true",
        default=None,
        help="leave out what of a model's file its network does not use",
    )
    model.add_argument("--vae-rows", type=int, metavar="N", help="decode in strips of N rows: exact, in less memory")
    model.add_argument("--offload", choices=["stages"], help="only the component at work is on the device")
    picture = sample.add_argument_group("picture")
    picture.add_argument("--prompt", action="append", help="may be given several times")
    picture.add_argument(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help="kohya's .txt, .toml or .json; in place of the configuration's prompts",
    )
    picture.add_argument("--negative", metavar="TEXT", help="what to steer away from, with --cfg")
    picture.add_argument("--steps", type=int)
    picture.add_argument("--seed", type=int, help="of every picture; 42 when not said")
    picture.add_argument("--size", metavar="WxH", help="in pixels, multiples of 16")
    picture.add_argument("--guidance", type=float, metavar="G", help="what the guidance embedding is told (dev: 3.5)")
    picture.add_argument(
        "--cfg", type=float, metavar="G", help="true classifier-free guidance; asks the network twice a step"
    )
    picture.add_argument(
        "--cfg-rescale", type=float, metavar="S", help="share of the deviation that is put back, 0 to 1"
    )
    picture.add_argument("--skip-layers", action="store_true", default=None, help="sd3.5-medium's published guidance")
    picture.add_argument("--sampler", choices=SAMPLERS)
    picture.add_argument(
        "--hand-over", type=float, metavar="S", help="share of the run after which the refiner goes on"
    )
    picture.add_argument(
        "--schedule", metavar="NAME", help="SD 3: original, script, diffusers, candle; SDXL: leading, karras, ..."
    )
    picture.add_argument(
        "--original-size", metavar="WxH", help="what SDXL is told that the picture had before it was scaled and cropped"
    )
    picture.add_argument("--crop", type=int, nargs=2, metavar=("TOP", "LEFT"), help="and what was cut away (0 0)")
    picture.add_argument(
        "--target-size", metavar="WxH", help="and what it should have; the picture's size when not said"
    )
    for name, score in (("--aesthetic-score", "6"), ("--negative-aesthetic-score", "2.5")):
        picture.add_argument(name, type=float, metavar="S", help=f"what SDXL's refiner is told, 0 to 10 ({score})")
    picture.add_argument("--shift", type=float, help="of SD 3's schedule; 3 when not said")
    picture.add_argument("--image", metavar="FILE", help="begin from this picture")
    picture.add_argument(
        "--strength", type=float, metavar="S", help="0 keeps the picture, 1 keeps nothing of it (0.75)"
    )
    picture.add_argument("--mask", metavar="FILE", help="paint only where it is white")
    picture.add_argument("--control", metavar="FILE", help="the picture that Canny or Depth follows")
    picture.add_argument(
        "--out", metavar="FOLDER", help="where pictures are written (samples); a name ending in .png is one file"
    )
    sample.add_argument("--quiet", action="store_true", help="print nothing but errors")
    sample.add_argument("--list", action="store_true", help="show the words that the built-in model knows, or --model")

    again = commands.add_parser(
        "resample", help="draw a picture again", description="Draw a picture again from what its own PNG says."
    )
    again.set_defaults(run=_resample)
    again.add_argument("picture", metavar="SAMPLE.png")
    again.add_argument("--model", metavar="PATH|ID", help="draw with this in place of what the picture names")
    for name in PART_NAMES:
        again.add_argument(
            f"--{name.replace('_', '-')}",
            metavar="PATH",
            help=f"another {name}; of a training run its checkpoint" if name == "transformer" else argparse.SUPPRESS,
        )
    again.add_argument(
        "--lora",
        action="append",
        metavar="FILE[:SCALE]",
        help="in place of the picture's LoRAs; may be given several times",
    )
    again.add_argument("--device", help="another than the picture's")
    again.add_argument("--out", metavar="FILE.png", help="where it is written (SAMPLE.again.png)")
    again.add_argument("--quiet", action="store_true", help="print nothing but errors")

    look = commands.add_parser(
        "inspect", help="say what a file is", description="Say what a checkpoint is, to the last key."
    )
    look.set_defaults(run=_inspect)
    look.add_argument("path", metavar="FILE|FOLDER")
    look.add_argument("--json", action="store_true", help="everything, for programs")
    look.add_argument("--values", action="store_true", help="read every weight and name those that are not finite")
    cli_lora.add_parser(commands)
    cli_trace.add_parser(commands)
    cli_golden.add_parser(commands)
    return parser


def _sample_on_every_rank(options: argparse.Namespace) -> int:
    """A process alone draws all pictures; those of `torchrun` draw their shares, and the first speaks."""
    with launched() as rank:
        options.quiet = options.quiet or rank > 0
        return _sample(options)


def _sample(options: argparse.Namespace) -> int:
    say = (lambda *_: None) if options.quiet else print
    if options.list:
        return _list_words(BUILT_IN if options.model is None else options.model)
    config = agreed(
        _merged(load_config(options.config) if options.config else RunConfig(), options)
    )  # random seeds too
    if config.model is None and not config.sample.prompts:
        config = replace(config, sample=replace(config.sample, prompts=BUILT_IN_PROMPTS))
    settings = config.sample
    _check(settings, config)
    for notice in config.notices:
        say(f"eridiff: {notice}")
    if config.model is None:
        say("eridiff: no model is given, so the built-in small Flux draws; --list shows its words")
    common: dict[str, Any] = {
        "device": _device(config.device), "dtype": DTYPES[config.dtype] if config.dtype else None,
        "offload": config.offload, "progress": not options.quiet,
    }  # fmt: skip
    told = told_sizes(settings)
    model = load(config.model, family=config.family, **common, **config.options, **told)
    loras = _apply_loras(model, settings, say)
    refiner: SDXLInference | None = None
    if config.refiner:
        if not isinstance(model, SDXLInference):
            raise ConfigError("a refiner works with an SDXL base alone")
        refiner = load(config.refiner, **common, **told)  # type: ignore[assignment]
    if any("aesthetic" in name for name in told) and not config.refiner and model.variant != "refiner":
        say(f"eridiff: an aesthetic score has no effect: {model.variant} is not told one, the refiner is")
    entries, notices = fitted(model, settings, (refiner or model).multiple)
    if refiner is None and any(entry.hand_over is not None for entry in entries):
        notices.append("hand_over has no effect without a refiner")
    for notice in notices:
        say(f"eridiff: {notice}")
    for path in _draw(model, entries, refiner, loras):
        say(path)
    return 0


def _list_words(model: str) -> int:
    components = locate(model).components
    words = next((read_words(components[name]) for name in DENOISERS if name in components), None)
    if words is None:
        raise ConfigError(f"'{model}' lists no words that it knows; the built-in model does")
    for name, entries in vars(words).items():
        print(f"{name.replace('_', ' ')}: {', '.join(entries)}")
    print(f'a prompt is "{words.pattern}", such as "a {words.sizes[0]} {words.nouns[0]} {words.backgrounds[0]}"')
    return 0


def _apply_loras(model: DiffusionInference, settings: SampleSettings, say: Callable[[str], None]) -> list[LoraHandle]:
    """Put the files on the model; those without a scale of their own, which each picture may weigh otherwise, come back."""
    if not settings.lora:
        told = [name for name in ("use_lora", "lora_scale") if getattr(settings, name) not in (None, False)]
        if told:
            say(f"eridiff: without effect here: {', '.join(told)} (no LoRA file is given)")
        return []
    weighed = []
    for file, scale in settings.lora if settings.use_lora is not False else ():
        handle = model.apply_lora(file, 1.0 if scale is None else scale, allow_partial=settings.lora_partial)
        say(f"eridiff: {file}: {counted(handle.ledger)}")
        weighed += [handle] * (scale is None)
    return weighed


def _resample(options: argparse.Namespace) -> int:
    settings = read_settings(options.picture)
    parts = {name: getattr(options, name) for name in PART_NAMES if getattr(options, name)}
    model = {**({"path": options.model} if options.model else {}), **parts} if parts else options.model
    device = {"device": _device(options.device or settings.get("device"))}
    out = Path(options.out or Path(options.picture).with_suffix(".again.png"))
    _check_writable(out)
    loras = [cli_lora.scaled(text) for text in options.lora] if options.lora else None
    drawn = draw_again(load_again(settings, model, loras=loras, progress=not options.quiet, **device), settings)
    image, now = drawn.images[0], drawn.settings[0]
    original = read_image(options.picture)
    kept = {name: settings[name] for name in ("image", "mask", "control") if settings.get(name)}
    save_png(image, out, {**now, **kept})
    if not options.quiet:
        print(out)
        if image.tobytes() == original.convert("RGB").tobytes():
            print("eridiff: the same picture, bit by bit")
        else:
            others = "; ".join(circumstances(settings, now))
            print("eridiff: another picture" + (f" (then {others})" if others else ""))
    return 0


def _draw(
    model: DiffusionInference, entries: Sequence[SampleSettings], refiner: SDXLInference | None, loras: Sequence[LoraHandle]
) -> list[Path]:  # fmt: skip
    """One picture at a time, so that none depends on its neighbours; then the contact sheet of several. Of a rank: its share."""
    out = Path(entries[0].out)
    single = out.suffix.lower() == ".png"
    if single and len(entries) > 1:
        raise ConfigError(f"'{out}' is one file and there are {len(entries)} prompts; give a folder")
    start = agreed(0 if single else _next_number(out))
    requests = picture_requests(model, entries)
    if refiner is not None:
        requests = [{**r, "refiner": refiner, "hand_over": e.hand_over} for r, e in zip(requests, entries, strict=True)]
    model.check_words([request["prompt"] for request in requests])
    model.words = None  # `generate` need not say it again for each image
    rank, size = ranks()

    def results() -> Iterator[Result]:
        """Of this rank's share, those with the same weights in one call, so that `offload` moves each component once."""
        for scale, group in groupby(range(rank, len(entries), size), key=lambda i: entries[i].lora_scale):
            for handle in loras:
                handle.set_scale(1.0 if scale is None else scale)
            yield from model.generate_each([requests[i] for i in group])

    generated = results()

    def draw(i: int) -> tuple[Path, Image.Image]:
        result, entry = next(generated), entries[i]
        record = {**result.settings[0], **picture_paths(entry)}
        path = out if single else out / f"{start + i:04d}-{slug(requests[i]['prompt'])}.png"
        return save_png(result.images[0], path, record), result.images[0]

    drawn = spread(len(entries), draw)
    paths = [path for path, _ in drawn]
    if len(drawn) > 1:
        paths.append(save_png(contact_sheet([image for _, image in drawn]), out / f"{start:04d}-contact-sheet.png"))
    return paths


def _next_number(folder: Path) -> int:
    """One more than the highest number that a picture in the folder begins with: nothing is overwritten."""
    try:
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    except OSError as error:
        raise EridiffError(f"'{folder}' cannot be read: {error.strerror}") from None
    return max((int(found[1]) + 1 for name in names if (found := re.match(r"(\d{4,})-.*\.png$", name))), default=0)


def _merged(config: RunConfig, options: argparse.Namespace) -> RunConfig:
    """The file's configuration with what the command line says in its place."""
    given = {
        field: getattr(options, option) for option, field in SETTINGS.items() if getattr(options, option) is not None
    }
    if options.prompts_file is not None:
        if options.prompt:
            raise ConfigError("--prompt and --prompts-file both say what to draw; keep one")
        read = load_config(options.prompts_file)
        sample = replace(config.sample, prompts=read.sample.prompts, own=read.sample.own, lenient=True)
        config = replace(config, sample=sample, notices=(*config.notices, *read.notices))
    if "lora" in given:
        given |= {"lora": tuple(cli_lora.scaled(text) for text in given["lora"]), "use_lora": True}
    if "prompts" in given:
        given |= {"prompts": tuple(given["prompts"]), "own": ()}
    if options.size is not None:
        height, width = size_of("--size", options.size)
        given |= {"width": width, "height": height}
    for name in ("original_size", "target_size"):
        if name in given:
            given[name] = size_of(f"--{name.replace('_', '-')}", given[name])
    if "crop" in given:
        given["crop"] = tuple(given["crop"])
    parts = {name: getattr(options, name) for name in [*PART_NAMES, "tokenizers"] if getattr(options, name)}
    model: str | dict[str, Any] | None = options.model or config.model
    if parts:
        model = {**({"path": model} if isinstance(model, str) else model or {}), **parts}
    rest = {
        name: getattr(options, name) for name in ("device", "dtype", "offload", "refiner") if getattr(options, name)
    }
    chosen = {name: getattr(options, name) for name in MODEL_OPTIONS if getattr(options, name) is not None}
    own = [{k: v for k, v in entry.items() if k not in _replaced(given)} for entry in config.sample.own]
    sample = replace(config.sample, **({"own": tuple(own)} | given))
    family = None if options.model or options.transformer else config.family
    return replace(config, model=model, family=family, sample=sample, options=config.options | chosen, **rest)


def _replaced(given: Mapping[str, Any]) -> set[str]:
    """What of a prompt's own settings gives way to the command line's."""
    return {*given, "cfg_scale"} if "true_cfg_scale" in given else set(given)


def _check(settings: SampleSettings, config: RunConfig) -> None:
    """What can be known to be impossible before anything is loaded."""
    if not settings.prompts:
        raise ConfigError("no prompt is given: use --prompt, or prompts in the sample section")
    for entry in settings.each():
        for side, name in ((entry.width, "width"), (entry.height, "height")):
            if side is not None and not entry.lenient:
                check_size(side if name == "width" else 16, side if name == "height" else 16)
        check_settings(
            steps=entry.sample_steps, guidance_scale=entry.guidance_scale, cfg_scale=entry.true_cfg_scale,
            strength=entry.strength, cfg_rescale=entry.cfg_rescale, cfg_interval=entry.cfg_interval,
            sampler=entry.sampler, shift=entry.shift,
        )  # fmt: skip
        if not 0 <= entry.seed < 2**63:
            raise ConfigError(f"the seed must be a whole number from 0 to 2^63 - 1, not {entry.seed}")
    if config.dtype is not None and config.dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not '{config.dtype}'")
    if config.offload not in (None, "stages"):
        raise ConfigError(f"offload must be 'stages', not '{config.offload}'")
    _check_writable(Path(settings.out))
    if (settings.mask or settings.strength is not None) and not settings.image:
        raise ConfigError("a mask or a strength needs the image that it is for")


def _check_writable(out: Path) -> None:
    """Before hours of work, and without making anything: the nearest folder that exists must take new files."""
    home = out.absolute().parent if out.suffix.lower() == ".png" else out.absolute()
    while not home.exists():
        home = home.parent
    if not home.is_dir() or not os.access(home, os.W_OK):
        raise EridiffError(f"'{out}' cannot be written: '{home}' is no folder that takes new files")


def _device(name: str | None) -> torch.device | None:
    if name is None and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:  # of torchrun
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError, ImportError):  # asserted: built with CUDA; imported: another maker's package
        raise ConfigError(
            f"the device '{name}' is not there; this machine has cpu"
            + (f" and cuda ({torch.cuda.device_count()} of them)" if torch.cuda.is_available() else "")
        ) from None


def _inspect(options: argparse.Namespace) -> int:
    report = inspect(options.path, values=options.values)
    print(json.dumps(report, indent=2) if options.json else summary(report))
    return 2 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
