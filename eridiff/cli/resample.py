"""`eridiff resample`: generate an image again from what its own PNG says."""

import argparse
from pathlib import Path
from typing import Any

from eridiff.cli.common import check_writable, device_of, note, scaled
from eridiff.images import read_image, save_png
from eridiff.inference.again import circumstances, generate_again, load_again, read_settings
from eridiff.weights.locate import PART_NAMES


def add_parser(commands: Any) -> None:
    """Put the command beside the others."""
    parser = commands.add_parser(
        "resample", help="generate an image again", description="Generate an image again from what its own PNG says."
    )
    parser.set_defaults(run=_resample)
    parser.add_argument("image", metavar="SAMPLE.png")
    parser.add_argument("--model", metavar="PATH|ID", help="generate with this in place of what the image names")
    for name in PART_NAMES:
        what = f"another {name}; of a training run its checkpoint" if name == "transformer" else argparse.SUPPRESS
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="PATH", help=what)
    parser.add_argument(
        "--lora",
        action="append",
        metavar="FILE[:SCALE]",
        help="in place of the image's LoRAs; may be given several times",
    )
    parser.add_argument("--device", help="another than the image's")
    parser.add_argument("--out", metavar="FILE.png", help="where it is written (SAMPLE.again.png)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _resample(options: argparse.Namespace) -> int:
    settings = read_settings(options.image)
    parts = {name: getattr(options, name) for name in PART_NAMES if getattr(options, name)}
    model = {**({"path": options.model} if options.model else {}), **parts} if parts else options.model
    device = device_of(options.device or settings.get("device"))
    out = Path(options.out or Path(options.image).with_suffix(".again.png"))
    check_writable(out)
    loras = [scaled(text) for text in options.lora] if options.lora else None
    loaded = load_again(settings, model, loras=loras, progress=not options.quiet, device=device)
    generated = generate_again(loaded, settings)
    image, now = generated.images[0], generated.settings[0]
    original = read_image(options.image)
    save_png(image, out, now)
    if not options.quiet:
        print(out)
        if image.tobytes() == original.convert("RGB").tobytes():
            note("the same image, bit for bit")
        else:
            others = "; ".join(circumstances(settings, now))
            note("another image" + (f" (then {others})" if others else ""))
    return 0
