"""What a sentence may say of a LoRA that does not fit: its family, the nearest name, the size it was made for.

Nothing here decides whether a file is loaded.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

from eridiff.lora.formats import ROLES, Source
from eridiff.lora.names import Names, inner, layouts_of
from eridiff.weights.detect import DESCRIPTIONS
from eridiff.weights.locate import TEXT_ENCODERS

FAMILIES = [  # (pattern of a name with dots as underscores, what such names belong to, its network)
    (r"double_blocks_|single_blocks_|single_transformer_blocks_", "Flux", "flux"),
    (r"joint_blocks_|context_block", "SD 3", "mmdit"),
    (r"input_blocks_|output_blocks_|middle_block_|down_blocks_|up_blocks_|mid_block_", "SDXL or an older Stable Diffusion", "unet"),
    (r"(^|[a-z]_)transformer_blocks_\d+_(attn|ff|norm1)", "SD 3 or Flux", ""),
    (r"lora_te\d?_|text_model_encoder|text_encoder", "a text encoder", ""),
    (r"lora_unet_blocks_|layers_\d+_attention|diffusion_model_blocks_", "Wan, HiDream, Lumina or another network that is not supported", "?"),
]  # fmt: skip
WIDTHS = {  # network -> width of what a matrix reads -> the model it was made for
    "flux": {3072: "flux1-dev or -schnell"},
    "mmdit": {1536: "sd3-medium or sd3.5-medium", 2432: "sd3.5-large"},
    "unet": {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "SDXL's refiner", 2048: "SDXL's base"},
}


def described(networks: Iterable[str], link: str) -> str:
    """A denoiser by its bare name."""
    return link.join(
        DESCRIPTIONS[n] if n in TEXT_ENCODERS else DESCRIPTIONS[n].split(" ", 1)[1] if n else "this module"
        for n in networks
    )


def fits_nowhere(
    rows: Sequence[str], networks: Sequence[str], metadata: Mapping[str, str], problem: str, some: bool
) -> str:
    """The sentence for a file that is not for these networks; `rows` are its names, `problem` is the first of its modules'."""
    names = [name.replace(".", "_") for name in rows]
    found = (entry[1:] for entry in FAMILIES if any(re.search(entry[0], name) for name in names))
    what, network = next(found, ("no known network", "?"))
    said = metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture")
    like = f"its names look like {what}" + (f" (its metadata say '{said[:60]}')" if said else "")
    text = f"{'little' if some else 'nothing'} in it fits {described(networks, ' and ')}"
    if network in networks or not network:
        return f"{text}, though {like}; {problem}"
    return f"{text}; {like}" + (f"; {problem}" if network == "?" else ", so give the network it was made for")


def made_for(widths: Sequence[tuple[str, int, int]]) -> str:
    """What a file was made for if none of its matrices is as wide as the network's: (network, file's width, network's)."""
    if not widths:
        return ""
    (network, made, own), _ = Counter(widths).most_common(1)[0]
    name = WIDTHS.get(network, {}).get(made)
    of = described([network], "")
    return f"it was made for {of} of width {made}{f' ({name})' if name else ''}, and this one has {own}: load that model (--model)"


def unmatched(source: Source, tables: Mapping[str, Names], look: bool) -> tuple[str, str]:
    """Status and sentence of a module that no given network has; to `look` for the nearest name takes a tenth of a second."""
    prefix, meant, name = inner(source.key)
    encoders = set(meant) <= set(TEXT_ENCODERS)
    what = described([n for n in meant if n in tables or encoders], " or ")
    if encoders and not any(_could_be(network, name) for network in meant):
        return "unmatched", f"'{source.key}' is not in {what}, which never has such a module"
    if set(meant).isdisjoint(tables) and encoders:
        return "no text encoder here", (
            f"'{source.key}' belongs to {what}, which is not given; give the encoder, or part=\"network\" leaves it out"
        )
    given = [tables[n] for n in ([n for n in meant if n in tables] or [""]) if n in tables]
    known = [name for table in given for name in (table.targets if "." in source.key else table.underscored)]
    if not known:
        return "unmatched", f"'{source.key}' belongs to no network that is given"
    numbers = _beyond(name, set(known))
    if numbers:
        return "unmatched", f"'{source.key}' is not in the network, which has {numbers}"
    near = get_close_matches(name, known, n=1, cutoff=0.6) if look else []
    hint = f", the nearest is '{prefix}{near[0]}'" if near else ""
    return "unmatched", f"'{source.key}' ({len(source.names)} tensors) is not in {what or 'the network'}{hint}"


def nearest_ending(name: str) -> str:
    """The known ending that is most like a name's."""
    for parts in (2, 1):
        ending = "." + ".".join(name.split(".")[-parts:])
        near = get_close_matches(ending, [end for end, _ in ROLES], n=1, cutoff=0.75)
        if near:
            return near[0]
    return ".lora_down.weight"


def missing(source: Source, role: str) -> str:
    """How the file would spell a tensor that it lacks."""
    other = {"up": "down", "down": "up"}.get(role)
    if other in source.names:
        for up, down in (("lora_up", "lora_down"), ("lora_B", "lora_A"), (".up.", ".down.")):
            old, new = (up, down) if role == "down" else (down, up)
            if old in source.names[other]:
                return source.names[other].replace(old, new)
    return f"{source.key}.{ {'down': 'lora_down.weight', 'up': 'lora_up.weight'}.get(role, role) }"


def _could_be(network: str, name: str) -> bool:
    """Whether a text encoder of some size has a module of this name, as far as the first number or wildcard of its map tells."""
    rules = [rule for layout in layouts_of(network) for rule in layout.rules]
    heads = [re.split(r"[{*]", rule.native)[0].removesuffix(".weight").replace(".", "_") for rule in rules]
    return name.replace(".", "_").startswith((*heads, "encoder_layers_"))


def _beyond(name: str, known: set[str]) -> str:
    """What the network has, "double_blocks 0 to 18", if the name fits but for a number that is too high."""
    for match in re.finditer(r"\d+", name):
        there = [number for number in range(200) if f"{name[: match.start()]}{number}{name[match.end() :]}" in known]
        if there:
            what = re.sub(r"[._]$", "", name[: match.start()])
            return f"{what} {there[0]} to {there[-1]}" if len(there) > 1 else f"{what} {there[0]} alone"
    return ""
