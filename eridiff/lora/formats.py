"""The tensors of a LoRA file, sorted by the module they change; every spelling in use, and what is refused by name.

A file's tensor has a module's name, with a prefix that names.py knows, and an ending that says what it is.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from eridiff.errors import LoraError

# what a tensor is -> how its name may end
ENDINGS: dict[str, tuple[str, ...]] = {
    "down": (
        ".lora_down.weight", ".lora_A.weight", ".lora_A", ".lora.down.weight", ".lora_linear_layer.down.weight",
    ),
    "up": (
        ".lora_up.weight", ".lora_B.weight", ".lora_B", ".lora.up.weight", ".lora_linear_layer.up.weight",
    ),
    "mid": (".lora_mid.weight",),
    "up_bias": (".lora_B.bias",),
    "alpha": (".alpha",),
    "dora_scale": (".dora_scale",),
    "magnitude": (".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".magnitude"),
    **{name: (f".{name}",) for name in (
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
        "diff", "diff_b", "w_norm", "b_norm", "set_weight", "reshape_weight", "on_input",
    )},
}  # fmt: skip
ROLES = sorted(((end, role) for role, ends in ENDINGS.items() for end in ends), key=lambda pair: -len(pair[0]))

REFUSED = [  # (pattern of a name, what the file is)
    (r"\.oft_blocks$|\.oft_R\b|\.oft_diag$|\.rescale$", "an OFT or BOFT file"),
    (r"\.(a1|a2|b1|b2|bm)\.weight$", "a GLoRA file"),
    (r"lora_controlnet$", "a Stability control-LoRA, a ControlNet for SDXL"),
    (r"^(encoder|decoder)\.|^lora_vae_", "a LoRA of an autoencoder"),
    (r"^(image_proj|ip_adapter)\.", "an IP-Adapter"),
]


@dataclass
class Source:
    """All that a file says of one module."""

    key: str  # the module's name in the file, prefix included
    names: dict[str, str] = field(default_factory=dict)  # role -> the tensor's name in the file

    def __str__(self) -> str:
        return f"'{self.key}'"


def sort_names(
    names: list[str], replaces: Callable[[str], bool] = lambda name: False
) -> tuple[dict[str, Source], list[str]]:
    """The modules of a file, and the names whose endings are unknown.

    `replaces` is asked, for a name without a known ending, whether its tensor takes the place of the network's own. Raises
    LoraError for a format that is refused by name.
    """
    for pattern, what in REFUSED:
        found = next((name for name in names if re.search(pattern, name)), None)
        if found:
            raise LoraError(f"it is {what} ('{found}'), which is not supported")
    multipliers = {name.removesuffix(".on_input") for name in names if name.endswith(".on_input")}
    sources: dict[str, Source] = {}
    unknown = []
    for name in names:
        module, role = split_name(name)
        if not role and name.removesuffix(".weight") in multipliers:
            module, role = name.removesuffix(".weight"), "multiplier"
        if not role and replaces(name):
            module, role = name, "set_weight"
        if not role:
            unknown.append(name)
            continue
        source = sources.setdefault(module, Source(module))
        if role in source.names:
            raise LoraError(f"'{source.names[role]}' and '{name}' are the same thing in two spellings; keep one")
        source.names[role] = name
    return sources, unknown


def split_name(name: str) -> tuple[str, str]:
    """The module's name and what the tensor is; "" if the ending is unknown."""
    old = re.fullmatch(r"(.+)\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight", name)  # diffusers before 0.15
    if old:
        return f"{old[1]}.to_{'out.0' if old[2] == 'out' else old[2]}", old[3]
    xlabs = re.fullmatch(r"(.+\.processor\.(?:qkv|proj)_lora[12]?)\.(down|up)\.weight", name)
    if xlabs:
        return xlabs[1], xlabs[2]
    if name.endswith("norm.scale"):  # a control LoRA's norms, which replace the network's
        return name, "set_weight"
    plain = re.sub(r"(\.(lora_[AB]|lora_magnitude_vector))\.default(_\d+)?(?=\.|$)", r"\1", name)  # peft's adapter name
    return next(((plain.removesuffix(end), role) for end, role in ROLES if plain.endswith(end)), ("", ""))
