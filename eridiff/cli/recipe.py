"""`eridiff recipe`: how other programs generate, and why two images of one seed differ."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from eridiff.errors import ConfigError
from eridiff.foreign_pngs import foreign_settings
from eridiff.images import METADATA_KEY, read_image
from eridiff.inference import DiffusionInference, load
from eridiff.inference.again import load_again, read_settings
from eridiff.inference.choices import Difference, Move, as_published, differences, moves, of_weights
from eridiff.inference.latents import as_told
from eridiff.recipe import FAMILIES, TITLES, Recipe, families, recipe, recipes
from eridiff.request import Request, size_of

CIRCUMSTANCES = ("model", "parts", "variant", "dtypes", "sampling", "loras", "hashes", "device", "version", "torch")
SMALL = {"flux": "tiny-flux", "mmdit": "tiny-sd35", "unet": "tiny-sdxl"}
PROMPT = "a robot on the sea"
EXAMPLES = """examples:
  eridiff recipe show kohya --family sdxl
  eridiff recipe diff kohya comfyui --family flux
  eridiff recipe diff diffusers eridiff --family sd3 --steps 28 --size 128x128
  eridiff recipe explain trainer.png --against mine.png
"""


def add_parser(commands: Any) -> None:
    """Put the command and its four beside the others."""
    parser = commands.add_parser(
        "recipe", help="why two programs' images differ", epilog=EXAMPLES,
        description="How other programs generate, and why two images of one seed differ.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    kinds = parser.add_subparsers(required=True, metavar="COMMAND")
    listed = kinds.add_parser(
        "list", help="say which there are", description="Say which recipes there are, for which families."
    )
    listed.set_defaults(run=_list)
    show = kinds.add_parser(
        "show", help="what a program chooses", description="What a program chooses, and where it says so."
    )
    show.set_defaults(run=_show)
    show.add_argument("name", choices=recipes(), metavar="RECIPE")
    diff = kinds.add_parser(
        "diff", help="what two programs choose differently",
        description="What two programs choose differently, and how far each choice alone moves the image of a small model.",
    )  # fmt: skip
    diff.set_defaults(run=_diff)
    diff.add_argument("first", choices=recipes(), metavar="RECIPE")
    diff.add_argument("second", choices=recipes(), metavar="RECIPE")
    diff.add_argument("--steps", type=int, metavar="N", help="of both; otherwise each program's own number")
    diff.add_argument("--size", metavar="WxH", help="of both, in pixels (the small model's)")
    diff.add_argument("--sampler", help="of both, by eridiff's name; otherwise each program's own")
    diff.add_argument(
        "--weights", choices=("bfloat16", "float16", "float32"), default="bfloat16",
        help="dtype to which those round that round to the dtype of their weights (bfloat16)",
    )  # fmt: skip
    diff.add_argument("--prompt", default=PROMPT, metavar="TEXT", help=f"of the images that are measured ({PROMPT})")
    diff.add_argument("--seed", type=int, default=42, metavar="N", help="of their noise (42)")
    explain = kinds.add_parser(
        "explain", help="why an image differs from another",
        description="What differs between the settings in two PNGs, and how far each setting alone moves the first image.",
    )  # fmt: skip
    explain.set_defaults(run=_explain)
    explain.add_argument("image", metavar="IMAGE.png")
    explain.add_argument("--against", required=True, metavar="OTHER.png")
    for each in (show, diff, explain):
        each.add_argument("--family", choices=FAMILIES, help="where a recipe is for several")
    for each in (diff, explain):
        each.add_argument("--model", metavar="PATH|ID", help="to measure with, in place of the small one of the family")


def _list(_: argparse.Namespace) -> int:
    rows = []
    for name in recipes():
        found = {TITLES[family]: recipe(name, family) for family in families(name)}
        whole = next(iter(found.values()))
        rows.append((name, ", ".join(found), _program(whole)))
    _table(rows)
    return 0


def _program(found: Recipe) -> str:
    version = f" ({found.version})" if found.version else ""
    return f"{found.program}{version}{', from reading' if found.seen == 'reading' else ''}"


def _family(options: argparse.Namespace, *names: str) -> str:
    """The family that is asked for, or the only one that the recipes share."""
    if options.family is not None:
        return FAMILIES[options.family]
    shared = [family for family in TITLES if all(family in families(name) for name in names)]
    if not shared:
        raise ConfigError(f"{' and '.join(names)} have no family in common")
    if len(shared) != 1:
        words = [word for word, family in FAMILIES.items() if family in shared]
        raise ConfigError(
            f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} for several families: say --family {' or '.join(words)}"
        )
    return shared[0]


def _show(options: argparse.Namespace) -> int:
    family = _family(options, options.name)
    found = recipe(options.name, family)
    print(f"{TITLES[family]}: {_program(found)}")
    rows = [(field, choice) for field, choice in found.choices.items()]
    rows += [
        (f"{field} ({sampler})", choice) for sampler, own in found.samplers.items() for field, choice in own.items()
    ]
    _table([(field, _said(choice.value), choice.source) for field, choice in rows] or [("it chooses nothing",)])
    for sentence in found.apart:
        print(f"no setting says: {sentence}")
    return 0


def _diff(options: argparse.Namespace) -> int:
    family = _family(options, options.first, options.second)
    one, other = (recipe(name, family) for name in (options.first, options.second))
    model = load(options.model or SMALL[family], family=family, progress=False)
    common: dict[str, Any] = {
        "prompt": options.prompt,
        "seed": options.seed,
        "steps": options.steps,
        "sampler": options.sampler,
    }
    asked = [Request.of({**common, "recipe": each.name}).filled(model) for each in (one, other)]
    sizes = [(request.width, request.height) for request in asked]
    if options.size is not None:
        common["height"], common["width"] = size_of("--size", options.size)
    else:
        common |= {name: model.defaults()[name] for name in ("height", "width")}
    asked = [
        of_weights(
            as_published(replace(request, width=common["width"], height=common["height"]), model), options.weights
        )
        for request in asked
    ]
    for each in (one, other):
        print(f"{each.name}: {_program(each)}")
    print(
        f"{TITLES[family]}, {common['width']} x {common['height']} pixels on {options.model or 'the built-in ' + SMALL[family]}, {options.prompt!r}, seed {options.seed}, weights as in {options.weights}"
    )
    if sizes[0] != sizes[1] and options.size is None:
        print(
            f"The usual size differs: {_pixels(sizes[0], model)} and {_pixels(sizes[1], model)}. Both are measured at one size."
        )
    found = differences(asked[0], asked[1], model)
    _answer(asked, found, model, (one.name, other.name))
    _points(asked, model, (one.name, other.name))
    print("\nWhat else differs from eridiff and no setting says:")
    for name in dict.fromkeys((one.name, other.name)):
        for sentence in recipe(name, family).apart:
            print(f"- {name}: {sentence}")
    return 0


def _pixels(size: tuple[int | None, int | None], model: DiffusionInference) -> str:
    width, height = (own or model.defaults()[name] for own, name in zip(size, ("width", "height"), strict=True))
    return f"{width} x {height}"


@dataclass(frozen=True)
class _Said:
    """What a PNG says of how it was generated."""

    request: Request
    own: dict[str, Any]  # eridiff's settings; empty where another program wrote the file
    rest: list[str]  # what no field holds


def _read(path: str) -> _Said:
    """The settings in a PNG of eridiff or of another program. Raises ConfigError for one that has none."""
    information = read_image(path).info
    foreign = None if METADATA_KEY in information else foreign_settings(information)
    if foreign is None and METADATA_KEY not in information:
        raise ConfigError(f"'{path}' has no settings of eridiff, A1111, Forge or ComfyUI; they may have been removed")
    if foreign is None:
        settings = read_settings(path)
        return _Said(replace(Request.from_json(settings), lora_scale=None), settings, [])
    values, rest = foreign
    for name, value in list(values.items()):
        try:
            Request.of({name: value}).check()
        except ConfigError:
            del values[name]
            rest.append(f"{name}: {value}")
    if values.pop("strength", None) is not None:
        rest.append("it began from another image, which is not in the file; measured without it")
    return _Said(Request.of(values), {}, rest)


def _explain(options: argparse.Namespace) -> int:
    said = [_read(path) for path in (options.image, options.against)]
    names = [Path(path).name for path in (options.image, options.against)]
    one, other = (TITLES.get(each.own.get("family", "")) for each in said)
    if one and other and one != other:
        raise ConfigError(f"{names[0]} was generated by {one}, and {names[1]} by {other}")
    if names[0] == names[1]:
        names = [options.image, options.against]
    for name, each in zip(names, said, strict=True):
        if not each.own:
            print(f"{name} was generated by another program, taken as the recipe '{each.request.recipe}' says")
        for sentence in each.rest:
            print(f"{name}, which no setting of eridiff says: {sentence}")
    for key in ("prompt", "seed"):
        values = [getattr(each.request, key) for each in said]
        if values[0] != values[1]:
            print(f"{key}: {_said(values[0])} in {names[0]}, {_said(values[1])} in {names[1]}; measured with the first")
    own = [each.own for each in said]
    for key in CIRCUMSTANCES if all(own) else ():
        if own[0].get(key) != own[1].get(key):
            print(
                f"{key}: {_said(own[0].get(key))} in {names[0]}, {_said(own[1].get(key))} in {names[1]}; not measured"
            )
    model = _model_of(options, own)
    seed = next((each.request.seed for each in said if each.request.seed is not None), 42)
    shared: dict[str, Any] = {"prompt": said[0].request.prompt, "seed": seed}
    if not all(own):  # a small model stands for another: at its size, with the published numbers
        sizes = [(each.request.width, each.request.height) for each in said]
        if sizes[0] != sizes[1] and None not in (*sizes[0], *sizes[1]):
            print(
                f"size: {sizes[0][0]} x {sizes[0][1]} in {names[0]}, {sizes[1][0]} x {sizes[1][1]} in {names[1]}; not measured"
            )
        shared |= {name: model.defaults()[name] for name in ("width", "height")}
    asked = [as_published(replace(each.request, **shared).filled(model), model) for each in said]
    found = differences(asked[0], asked[1], model)
    _answer(asked, found, model, names)
    if found:
        _points(asked, model, names)
    return 0


def _model_of(options: argparse.Namespace, own: Sequence[dict[str, Any]]) -> DiffusionInference:
    """The model to measure with: the one asked for, that of the first image that names one, or the family's small one."""
    if options.model is not None:
        return load(options.model, progress=False)
    named = next((settings for settings in own if settings), None)
    if named is not None and (named.get("parts") or named.get("model")):
        return load_again(named, progress=False)
    if options.family is None and named is None:
        raise ConfigError(f"neither image says which family it is of: say --family {' or '.join(FAMILIES)}, or --model")
    family = named["family"] if named is not None else FAMILIES[options.family]
    return load(SMALL[family], family=family, progress=False)


def _answer(
    asked: Sequence[Request], found: Sequence[Difference], model: DiffusionInference, names: Sequence[str],
) -> None:  # fmt: skip
    """The table of what differs, the choice that moves the image most first."""
    model.words = None  # what is measured may name what a small model has not learned
    if not found:
        print("nothing differs that a setting says: the images are equal")
        return
    rows, quiet, whole = [], [], ""
    for difference, move in moves(asked[0], asked[1], model, list(found)):
        if difference is None:
            whole = _how_far(move)
            continue
        both = _said(difference.first), _said(difference.second)
        if isinstance(move, Move) and move.levels == 0 and move.latents == 0:
            quiet.append(f"{difference.name} ({both[0]}, {both[1]})")
        else:
            size = move.levels if isinstance(move, Move) else -1.0
            rows.append((size, (difference.name, *both, _how_far(move))))
    ordered = [row for _, row in sorted(rows, key=lambda row: -row[0])]
    print()
    _table(
        [
            ("what differs", *names, "alone it moves the image by (root mean square)"),
            *ordered,
            ("all of them", "", "", whole),
        ]
    )
    if quiet:
        print(f"\nDifferent without a trace in this image: {', '.join(quiet)}.")
    if any(difference.name == "noise_device" for difference in found):
        print("On a GPU noise_device alone makes another image: its generator gives other noise for the same seed.")


def _how_far(move: Move | str) -> str:
    if isinstance(move, str):
        return move
    return f"{move.levels:.3g} of 255 levels (latents {move.latents:.2g})"


def _points(asked: Sequence[Request], model: DiffusionInference, names: Sequence[str]) -> None:
    """Both runs step by step: the noise level, and the time that the network is given, rounded as there."""
    runs, told = [], []
    for request in asked:
        settled: Any = request.checked(model)
        runs.append(model.points(settled))
        told.append(as_told(runs[-1].times, settled.time_dtype, 1000 if runs[-1].prediction == "velocity" else 1))
    if torch.equal(runs[0].sigmas, runs[1].sigmas) and torch.equal(*told):
        print("\nBoth go through the same noise levels.")
        return
    rows = [("step", *(f"{name}: {what}" for name in names for what in ("noise level", "time")))]
    for i in range(max(len(run.sigmas) for run in runs)):
        cells = []
        for run, times in zip(runs, told, strict=True):
            levels = run.sigmas / run.alphas if model.family == "unet" else run.sigmas
            cells += [f"{float(values[i]):.6g}" if i < len(values) else "" for values in (levels, times)]
        rows.append((str(i), *cells))
    print()
    _table(rows)


def _said(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list) and len(value) == 1:
        return repr(value[0])
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
