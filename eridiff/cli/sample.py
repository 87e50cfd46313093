"""`eridiff sample`: generate images. The flags of an image are the fields of `Request`."""

import argparse
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageShow

from eridiff.cli.common import DTYPES, check_model, check_writable, device_of, dtype_of, note, scaled
from eridiff.config import MODEL_OPTIONS, RunConfig, SampleSettings, Words
from eridiff.errors import ConfigError, EridiffError
from eridiff.images import contact_sheet, first_text, save_png, slug
from eridiff.inference import BUILT_IN, DiffusionInference, load
from eridiff.inference.compiled import waiting_notice
from eridiff.inference.encoding import check_words
from eridiff.inference.sdxl import PREDICTIONS
from eridiff.inference.section import early, requests_of
from eridiff.inference.words import read_words
from eridiff.lora.ledger import counted
from eridiff.memory.stages import OFFLOAD
from eridiff.ranks import agreed, launched, ranks, spread
from eridiff.request import ENCODING, FIELDS, Request, size_of
from eridiff.run_files import load_config
from eridiff.text.emphasis import unweighted
from eridiff.weights.hub import built_in
from eridiff.weights.locate import DENOISERS, PART_NAMES, locate

BUILT_IN_PROMPTS = (
    "a swan on mars", "a big pumpkin at night", "a robot on the sea", "a small pizza in a cave", "a unicorn on snow",
)  # fmt: skip
PARTS = {
    "transformer": "the network", "vae": "the autoencoder", "clip": "CLIP-L", "clip_g": "CLIP-G (SD 3, SDXL)", "t5": "T5-XXL",
}  # fmt: skip
GROUPS = {  # heading of the help -> the fields of `Request` in it; all others are in "image"
    "as another program does": (
        "recipe", "timestep_offset", "timestep_rounding", "final_noise", "clip_clean", "eta", "churn", "noise_scale", "noise_layout",
        "noise_dtype", "noise_device", "noise_generator", "noise_skip", "noise_row", "latents_dtype", "time_dtype",
        "guidance_dtype", "cfg_dtype", "cfg_batch", "strength_rounding", "pixels",
    ),
    "image to image": ("image", "strength", "mask", "mask_alpha"),
    "encoding of the prompt": ENCODING,
    "Flux": ("guidance_scale", "control", "references"),
    "SD 3": ("shift", "skip_layers"),
    "SDXL": (
        "hand_over", "original_size", "crop", "target_size", "aesthetic_score", "negative_aesthetic_score",
    ),
    "LoRA": ("lora_scale",),
}  # fmt: skip
EXAMPLES = """examples:
  eridiff sample --prompt "a big robot at sunset" --seed 7
  eridiff sample --model black-forest-labs/FLUX.1-schnell --prompt "a swan on mars" --offload stages
  eridiff sample --model sd_xl_base_1.0.safetensors --lora fox.safetensors:0.8 --prompt "a fox"
  eridiff sample run.yaml --steps 20 --out samples
"""


def add_parser(commands: Any) -> None:
    """Put the command beside the others."""
    parser = commands.add_parser(
        "sample",
        help="generate images",
        usage="%(prog)s [options] [FILE]",
        description="Generate images. Options override the file.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_sample_on_every_rank)
    titles = ("image", *GROUPS, "model", "device and memory")
    groups = {title: parser.add_argument_group(title) for title in titles}
    parser.add_argument(
        "config",
        nargs="?",
        type=Path,
        metavar="FILE",
        help="what to load and to generate: a configuration in YAML or JSON, one of a trainer (kohya's in TOML), or a prompt file",
    )
    _add_request(groups)
    _add_model(groups)
    run = groups["image"]
    run.add_argument(
        "--out", metavar="FOLDER", help="folder of the images (samples); a name ending in .png is one file"
    )
    run.add_argument("--open", action="store_true", help="show the image, of several the contact sheet, in the system's viewer")  # fmt: skip
    run.add_argument("--quiet", action="store_true", help="print only errors")
    run.add_argument(
        "--any-prompt", action="store_true", help="generate also what names nothing that a built-in model knows"
    )
    run.add_argument("--list", action="store_true", help="show the words that the built-in model, or --model, knows")


def _add_request(groups: dict[str, Any]) -> None:
    image = groups["image"]
    image.add_argument("--prompt", action="append", metavar="TEXT", help=FIELDS["prompt"].metadata["help"])
    image.add_argument("--prompts-file", type=Path, metavar="FILE", help="prompts in place of the configuration's, from kohya's .txt, .toml or .json, OneTrainer's or SimpleTuner's .json")  # fmt: skip
    image.add_argument("--size", metavar="WxH", help="width and height at once")
    image.add_argument("--walk-seed", action="store_true", default=None, help="seed, seed + 1, ... over the prompts")
    for name, field in FIELDS.items():
        if name == "prompt" or field.metadata["python"]:
            continue
        title = next((title for title, names in GROUPS.items() if name in names), "image")
        flags = [f"--{flag.replace('_', '-')}" for flag in (*field.metadata["flags"], name)]
        groups[title].add_argument(
            *flags, dest=name, default=None, help=field.metadata["help"], **field.metadata["kind"].flag
        )


def _add_model(groups: dict[str, Any]) -> None:
    model, device, sdxl, lora = (groups[t] for t in ("model", "device and memory", "SDXL", "LoRA"))

    def switch(group: Any, name: str, help: str) -> None:
        group.add_argument(name, action="store_true", default=None, help=help)

    model.add_argument(
        "--model",
        metavar="PATH|ID",
        help="a checkpoint, a folder, a hub id, or a built-in model: tiny-flux, tiny-sd35, tiny-sdxl (tiny-flux)",
    )
    for name, what in PARTS.items():
        flag = f"--{name.replace('_', '-')}"
        model.add_argument(flag, metavar="PATH", help=f"{what}, if it is missing in the model or to replace it")
    model.add_argument("--tokenizers", metavar="FOLDER", help="holds tokenizer/ (CLIP, optional) and tokenizer_2/ (T5)")
    model.add_argument("--variant", help="whose defaults to use if several variants have these sizes: depth, sd3.5-large-turbo")  # fmt: skip
    switch(model, "--allow-unknown", "skip tensors of the file that the network does not use")
    sdxl.add_argument(
        "--refiner",
        metavar="PATH|ID",
        help="a refiner, which finishes the base's images; tiny-sdxl-refiner is built in",
    )
    sdxl.add_argument(
        "--prediction", choices=PREDICTIONS, help="what the network predicts, if its file does not say it"
    )
    switch(sdxl, "--zero-terminal-snr", "the last noise level is pure noise, if the file does not say it")
    lora.add_argument("--lora", action="append", metavar="FILE[:SCALE]", help="a LoRA of any format, a peft folder, or tiny-style, the built-in models' own; repeatable")  # fmt: skip
    switch(lora, "--lora-partial", "skip what of a LoRA does not fit")
    device.add_argument("--device", help="cpu, cuda, cuda:1, ...; by default a GPU if there is one")
    device.add_argument("--dtype", choices=DTYPES, help="of the computation; by default the file's on a GPU, float32 on a CPU if it fits")  # fmt: skip
    device.add_argument(
        "--vram", metavar="SIZE", help="memory of the device, such as 24GiB: chooses --offload and --vae-rows"
    )
    device.add_argument(
        "--offload",
        choices=OFFLOAD,
        help="keep only the component at work on the device, or only a few of its blocks, or only the layer at work",
    )
    switch(device, "--compile", "compile the network: the first image of a size waits, each step is faster")
    device.add_argument("--vae-rows", type=int, metavar="N", help="decode in strips of N rows: exact, in less memory")


def _asked(options: argparse.Namespace) -> Words:
    """What the command line says of every image, in a file's words."""
    found: Words = {}
    for name, told in FIELDS.items():
        value = getattr(options, name, None)
        if value is not None and name != "prompt" and not told.metadata["python"]:
            word = "true_cfg_scale" if name == "cfg_scale" else name
            found[word] = told.metadata["kind"].read(f"--{name.replace('_', '-')}", value)
    if options.size is not None:
        if {"width", "height"} & found.keys():
            raise ConfigError("--size and --width or --height both say the size; keep one")
        found["height"], found["width"] = size_of("--size", options.size)
    return found


def _sample_on_every_rank(options: argparse.Namespace) -> int:
    """A process alone generates all images; those of `torchrun` generate their shares, and the first speaks."""
    with launched() as rank:
        options.quiet = options.quiet or rank > 0
        return _sample(options)


def _sample(options: argparse.Namespace) -> int:
    say: Callable[[str], object] = (lambda _: None) if options.quiet else note
    if options.list:
        return _list_words(BUILT_IN if options.model is None else options.model)
    asked = _asked(options)
    read = load_config(options.config) if options.config else RunConfig()
    config: RunConfig = agreed(_merged(read, options, asked))  # random seeds too
    models: list[Any] = [config.model]
    if not config.sample.entries and (config.model is None or config.model in built_in()):
        entries = tuple({"prompt": prompt} for prompt in BUILT_IN_PROMPTS)
        config = replace(config, sample=replace(config.sample, entries=entries))
        models = models if config.model else [name for name in built_in() if not name.endswith("refiner")]
    _check(config.sample, config)
    for notice in config.notices:
        say(notice)
    if any(entry["prompt"] == "" for entry in config.sample.entries):
        say("a prompt is empty; the image follows from the model alone")
    generated: list[tuple[Path, Image.Image]] = []
    captions = []
    for name in models:
        model, requests = _ready(replace(config, model=name), asked, options.quiet, say)
        if options.any_prompt:
            if model.words is None:
                say("without effect here: --any-prompt (the model lists no words)")
            model.words = None
        generated += _generate(model, requests, Path(config.sample.out))
        captions += [f"{name}: {first_text(r.prompt)}" if len(models) > 1 else first_text(r.prompt) for r in requests]
    if len(generated) > 1:
        columns = len(BUILT_IN_PROMPTS) if len(models) > 1 else None
        first = generated[0][0].name.split("-")[0]
        sheet = contact_sheet([image for _, image in generated], columns, captions=captions)
        generated.append((save_png(sheet, Path(config.sample.out) / f"{first}-contact-sheet.png"), sheet))
    for path, _ in generated:
        if not options.quiet:
            print(path)
    if options.open and not ImageShow.show(generated[-1][1]):
        say("--open: this system has no program to show images")
    return 0


def _ready(
    config: RunConfig, asked: Words, quiet: bool, say: Callable[[str], object]
) -> tuple[DiffusionInference, list[Request]]:
    """The model with its refiner and its LoRAs, and what it is asked for."""
    model = load(
        config.model, refiner=config.refiner, family=config.family, device=device_of(config.device),
        dtype=dtype_of(config.dtype), offload=config.offload, progress=not quiet, **config.options,
    )  # fmt: skip
    if model.compile:
        say(waiting_notice())
    _apply_loras(model, config.sample, say)
    explicit = {"cfg_scale" if word == "true_cfg_scale" else word for word in asked}
    requests, notices = requests_of(config.sample, model, explicit)
    for notice in notices:
        say(notice)
    say(_what_runs(model, requests, config.model))
    return model, requests


def _what_runs(model: DiffusionInference, requests: list[Request], chosen: Any) -> str:
    """One line: model, variant and why, dtype, device, and the numbers in which all images agree."""
    name = f"{model.variant} ({model.why})"
    if chosen is None:
        name = "the built-in small Flux (--list shows its words)"
    elif isinstance(chosen, str) and chosen in built_in():
        name = f"the built-in {chosen} (--list shows its words)"
    dtype = str(next(model.network.parameters()).dtype).removeprefix("torch.")
    each = [request.checked(model) for request in requests]
    numbers: dict[str, set[tuple[Any, ...]]] = {
        "{} x {}": {(r.width, r.height) for r in each}, "{} step{}": {(r.steps, "s" * (r.steps != 1)) for r in each},
        "guidance {:g}": {(r.guidance_scale,) for r in each}, "cfg {:g}": {(r.cfg_scale if r.cfg_scale != 1 else None,) for r in each},
    }  # fmt: skip
    said = [
        text.format(*next(iter(found))) for text, found in numbers.items() if len(found) == 1 and (None,) not in found
    ]
    if model.offload and model.device.type != "cpu":  # where it has no effect; --vram may have chosen both
        said.append(f"offload {model.offload}")
    if model.vae_rows:
        said.append(f"vae_rows {model.vae_rows}")
    count = f"{len(requests)} image{'s' * (len(requests) > 1)}"
    return ", ".join([name, f"{dtype} on {model.device}", count, *said])


def _list_words(model: str) -> int:
    components = locate(model).components
    words = next((read_words(components[name]) for name in DENOISERS if name in components), None)
    if words is None:
        raise ConfigError(f"'{model}' lists no words that it knows; the built-in model does")
    for name, entries in vars(words).items():
        print(f"{name.replace('_', ' ')}: {', '.join(entries)}")
    print(f'a prompt is "{words.pattern}", such as "a {words.sizes[0]} {words.nouns[0]} {words.backgrounds[0]}"')
    return 0


def _apply_loras(model: DiffusionInference, settings: SampleSettings, say: Callable[[str], object]) -> None:
    """Put the files on the model; those without a scale of their own are weighed by each request's `lora_scale`."""
    if not settings.lora and settings.use_lora:
        say("without effect here: use_lora (no LoRA file is given)")
    for file, scale in settings.lora if settings.use_lora is not False else ():
        handle = model.apply_lora(file, scale, allow_partial=settings.lora_partial)
        say(f"{file}: {counted(handle.ledger)}")


def _generate(model: DiffusionInference, requests: list[Request], out: Path) -> list[tuple[Path, Image.Image]]:
    """One image at a time, so that none depends on its neighbours. Of a rank: its share."""
    single = out.suffix.lower() == ".png"
    if single and len(requests) > 1:
        raise ConfigError(f"'{out}' is one file and there are {len(requests)} prompts; give a folder")
    start = agreed(0 if single else _next_number(out))
    check_words(model, [unweighted(r.prompt, r.prompt_weights) for r in requests])  # type: ignore[arg-type]  # each has one
    model.words = None  # `generate` need not say it again for each image
    rank, size = ranks()
    generated = model.generate_each(requests[rank::size])

    def save(i: int) -> tuple[Path, Image.Image]:
        result = next(generated)
        path = out if single else out / f"{start + i:04d}-{slug(requests[i].prompt)}.png"
        return save_png(result.images[0], path, result.settings[0]), result.images[0]

    return spread(len(requests), save)


def _next_number(folder: Path) -> int:
    """One more than the highest number that an image in the folder begins with: nothing is overwritten."""
    try:
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    except OSError as error:
        raise EridiffError(f"'{folder}' cannot be read: {error.strerror}") from None
    return max((int(found[1]) + 1 for name in names if (found := re.match(r"(\d{4,})-.*\.png$", name))), default=0)


def _merged(config: RunConfig, options: argparse.Namespace, asked: Words) -> RunConfig:
    """The file's configuration with what the command line says in its place."""
    sample = config.sample
    if options.prompts_file is not None:
        if options.prompt:
            raise ConfigError("--prompt and --prompts-file both say what to generate; keep one")
        read = load_config(options.prompts_file)
        sample = replace(sample, entries=read.sample.entries, lenient=True, euler_elsewhere=read.sample.euler_elsewhere)
        config = replace(config, unused=config.unused | read.unused, told=(*config.told, *read.told))
    if options.prompt:
        sample = replace(sample, entries=tuple({"prompt": prompt} for prompt in options.prompt))
    sample = sample.over(asked)
    if options.lora:
        sample = replace(sample, lora=tuple(scaled(text) for text in options.lora), use_lora=True)
    sample = replace(sample, **_given(options, ("walk_seed", "lora_partial", "out")))
    parts = _given(options, (*PART_NAMES, "tokenizers"))
    model: str | dict[str, Any] | None = options.model or config.model
    if parts:
        model = {**({"path": model} if isinstance(model, str) else model or {}), **parts}
    family = None if options.model or options.transformer else config.family
    chosen = config.options | _given(options, MODEL_OPTIONS)
    rest = _given(options, ("device", "dtype", "offload", "refiner"))
    return replace(config, model=model, family=family, sample=sample, options=chosen, **rest)


def _given(options: argparse.Namespace, names: Any) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _check(settings: SampleSettings, config: RunConfig) -> None:
    """What can be known to be impossible before anything is loaded."""
    if not settings.entries:
        raise ConfigError("no prompt is given: use --prompt, or prompts in the sample section")
    for words in settings.each():
        early(words).check(None if settings.lenient else 16)
    dtype_of(config.dtype)
    if config.offload not in (None, *OFFLOAD):
        raise ConfigError(f"offload must be {' or '.join(OFFLOAD)}, not '{config.offload}'")
    check_writable(Path(settings.out))
    named = config.model.values() if isinstance(config.model, dict) else [config.model, config.refiner]
    for file in [*named, *(file for file, _ in settings.lora)]:
        if isinstance(file, str):
            check_model(file)
