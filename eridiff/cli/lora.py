"""`eridiff lora check | convert | merge | extract | resize`."""

import argparse
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eridiff.cli.common import dtype_of, scaled
from eridiff.errors import ConfigError
from eridiff.lora.decompose import extract_lora, resize_lora
from eridiff.lora.decompose import table as energy_table
from eridiff.lora.ledger import table
from eridiff.lora.load import PARTS, Refusal, load_lora
from eridiff.lora.merge import merge_lora
from eridiff.lora.save import FORMATS, save_lora
from eridiff.models import flux, mmdit, unet
from eridiff.text.encoders import build_encoder, published_encoder
from eridiff.weights.load import NETWORKS, build
from eridiff.weights.locate import DENOISERS, TEXT_ENCODERS, locate
from eridiff.weights.save import save_network

PUBLISHED: dict[str, tuple[str, Any, tuple[str, ...]]] = {  # name -> network, configuration, text encoders
    **{f"flux-{name}": ("flux", config, ("clip", "t5")) for name, config in flux.PRESETS.items()},
    **{name: ("mmdit", config, TEXT_ENCODERS) for name, config in mmdit.PRESETS.items()},
    **{f"sdxl-{name}": ("unet", config, ("clip", "clip_g")) for name, config in unet.PRESETS.items()},
}
DTYPES = ("float32", "bfloat16", "float16")
MODEL_HELP = (
    f"for what it is: a checkpoint or a folder, which also gives |dW|/|W|, or by name one of {', '.join(PUBLISHED)}"
)


def add_parser(commands: Any) -> None:
    """Put `lora` and its five commands beside the others."""
    parser = commands.add_parser(
        "lora", help="look into LoRA files and change them", description="Look into LoRA files and change them."
    )
    kinds = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], help: str, model: bool = True) -> Any:
        made = kinds.add_parser(name, help=help, description=help)
        made.set_defaults(run=run)
        if model:
            made.add_argument("--model", required=True, metavar="PATH|NAME", help=MODEL_HELP)
            made.add_argument("--partial", action="store_true", help="go on with what fits")
            made.add_argument("--part", choices=PARTS, help="leave the other part of the file out")
        return made

    def output(made: Any, default: str) -> None:
        made.add_argument("--out", required=True, type=Path, metavar="FILE")
        made.add_argument("--format", choices=FORMATS, default=default, help=f"{default} when not said")
        made.add_argument("--dtype", choices=DTYPES, help="of the matrices; theirs when not said")

    check = command("check", _check, "print a row for each module: what becomes of it, and how much it changes")
    check.add_argument("file")
    convert = command("convert", _convert, "write a LoRA in another format")
    convert.add_argument("file")
    output(convert, "kohya")
    merge = command("merge", _merge, "write the network with LoRAs in its weights")
    merge.add_argument("lora", nargs="+", metavar="FILE[:SCALE]")
    merge.add_argument("--out", required=True, type=Path, metavar="FILE")
    merge.add_argument("--dtype", choices=DTYPES, help="of the weights; theirs when not said")
    extract = command("extract", _extract, "make a LoRA of the difference of two checkpoints", model=False)
    extract.add_argument("tuned")
    extract.add_argument("base")
    extract.add_argument("--rank", type=int, default=32)
    extract.add_argument(
        "--targets", nargs="+", default=["*"], metavar="PATTERN", help="of native module names; all when not said"
    )
    output(extract, "kohya")
    resize = command("resize", _resize, "write a LoRA with a smaller rank")
    resize.add_argument("file")
    resize.add_argument("--rank", type=int, required=True)
    output(resize, "kohya")


def _check(options: argparse.Namespace) -> int:
    try:
        lora = load_lora(
            options.file, _networks(options.model), part=options.part, allow_partial=options.partial, measure=True
        )
    except Refusal as error:
        if error.ledger:
            print(table(error.ledger))
        raise
    print(table(lora.ledger))
    return 0


def _convert(options: argparse.Namespace) -> int:
    networks = _networks(options.model)
    lora = load_lora(options.file, networks, part=options.part, allow_partial=options.partial)
    kept = {name: value for name, value in lora.metadata.items() if name.startswith(("ss_", "modelspec."))}
    for name in (
        "ss_network_dim",
        "ss_network_alpha",
        "ss_network_module",
        "ss_network_args",
    ):  # of the old file's matrices
        kept.pop(name, None)
    print(save_lora(lora, options.out, networks, format=options.format, dtype=dtype_of(options.dtype), metadata=kept))
    return 0


def _merge(options: argparse.Namespace) -> int:
    networks = {n: m for n, m in _networks(options.model).items() if n in DENOISERS}
    if not networks or _is_published(options.model):
        raise ConfigError(f"'{options.model}' holds no weights to merge into; give a checkpoint")
    (network, module), *_ = networks.items()
    state = module.state_dict()
    if options.dtype:
        state = {name: tensor.to(dtype_of(options.dtype)) for name, tensor in state.items()}
    loras = []
    for text in options.lora:
        file, scale = scaled(text)
        loras.append(
            (
                load_lora(file, networks, part=options.part, allow_partial=options.partial).of(network),
                1.0 if scale is None else scale,
            )
        )
    merged = merge_lora(state, loras)
    print(merged)
    module.load_state_dict(merged.state, assign=True)
    print(save_network(module, options.out))  # type: ignore[arg-type]
    return 0


def _extract(options: argparse.Namespace) -> int:
    tuned, base = (_only(_networks(path), path) for path in (options.tuned, options.base))
    lora, kept = extract_lora(tuned, base, options.rank, tuple(options.targets))
    print("\n".join(energy_table(kept)))
    print(save_lora(lora, options.out, base, format=options.format, dtype=dtype_of(options.dtype)))
    return 0


def _resize(options: argparse.Namespace) -> int:
    networks = _networks(options.model)
    lora = load_lora(options.file, networks, part=options.part, allow_partial=options.partial)
    shapes = {name: {n: tuple(t.shape) for n, t in module.state_dict().items()} for name, module in networks.items()}
    resized, kept = resize_lora(lora, options.rank, shapes)
    print("\n".join(energy_table(kept)))
    print(save_lora(resized, options.out, networks, format=options.format, dtype=dtype_of(options.dtype)))
    return 0


def _is_published(model: str) -> bool:
    return model in PUBLISHED and not Path(model).exists()


def _networks(model: str) -> dict[str, nn.Module]:
    """The network and the text encoders of a checkpoint, or of a published model by name, then without weights."""
    if _is_published(model):
        network, config, encoders = PUBLISHED[model]
        with torch.device("meta"):
            module = NETWORKS[network](config)
        return {network: module} | {name: published_encoder(name) for name in encoders}
    if "/" not in model and not Path(model).exists():
        near = get_close_matches(model, PUBLISHED, 1)
        raise ConfigError(f"'{model}' is no file and no published model" + (f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(PUBLISHED)}"))  # fmt: skip
    components = locate(model).components
    found = {n: build(c) for n, c in components.items() if n in DENOISERS}
    return found | {n: build_encoder(c) for n, c in components.items() if n in TEXT_ENCODERS}


def _only(networks: dict[str, nn.Module], path: str) -> nn.Module:
    found = [module for name, module in networks.items() if name in DENOISERS]
    if not found:
        raise ConfigError(f"'{path}' holds no network that draws")
    return found[0]
