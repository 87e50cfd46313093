"""The tensors of a LoRA file, sorted by the module they change; every spelling in use, and what is refused by name.

A file's tensor has a module's name, with a prefix that names.py knows, and an ending that says what it is.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from eridiff.errors import LoraError

# what a tensor is -> how its name may end
ENDINGS: dict[str, tuple[str, ...]] = {
    "down": (
        ".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora_A", ".lora.down.weight",
        ".lora_linear_layer.down.weight",
    ),
    "up": (
        ".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight", ".lora_B", ".lora.up.weight",
        ".lora_linear_layer.up.weight",
    ),
    "mid": (".lora_mid.weight",),
    "up_bias": (".lora_B.bias", ".lora_B.default.bias"),
    "alpha": (".alpha",),
    "dora_scale": (".dora_scale",),
    "magnitude": (
        ".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".lora_magnitude_vector.default.weight", ".magnitude",
    ),
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
FAMILIES = [  # (pattern of a name with dots as underscores, what such names belong to)
    (r"double_blocks_|single_blocks_|single_transformer_blocks_", "Flux"),
    (r"joint_blocks_|context_block", "SD 3"),
    (r"input_blocks_|output_blocks_|middle_block_|down_blocks_|up_blocks_|mid_block_", "SDXL or an older Stable Diffusion"),
    (r"(^|[a-z]_)transformer_blocks_\d+_(attn|ff|norm1)", "SD 3 or Flux"),
    (r"lora_te\d?_|text_model_encoder|text_encoder", "a text encoder"),
    (r"lora_unet_blocks_|layers_\d+_attention|diffusion_model_blocks_", "Wan, HiDream, Lumina or another network that is not supported"),
]  # fmt: skip
UNKNOWN_FAMILY = "no known network"


@dataclass
class Source:
    """All that a file says of one module."""

    key: str  # the module's name in the file, prefix included
    names: dict[str, str] = field(default_factory=dict)  # role -> the tensor's name in the file

    def __str__(self) -> str:
        return f"'{self.key}'"


def sort_names(names: list[str]) -> tuple[dict[str, Source], list[str]]:
    """The modules of a file, and the names whose endings are unknown.

    Raises LoraError for a format that is refused by name.
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
    return next(((name.removesuffix(end), role) for end, role in ROLES if name.endswith(end)), ("", ""))


def nearest_ending(name: str) -> str:
    """The known ending that is most like a name's."""
    for parts in (2, 1):
        ending = "." + ".".join(name.split(".")[-parts:])
        near = get_close_matches(ending, [end for end, _ in ROLES], n=1, cutoff=0.75)
        if near:
            return near[0]
    return ".lora_down.weight"


def family_of(names: list[str]) -> str:
    """What a file's names look like, for an error."""
    flat = [name.replace(".", "_") for name in names]
    return next(
        (what for pattern, what in FAMILIES if any(re.search(pattern, name) for name in flat)), "no known network"
    )


@dataclass(frozen=True)
class Scaling:
    """What peft's configuration says of alpha and rank: a file's metadata `lora_adapter_metadata` or adapter_config.json."""

    sections: Mapping[str, Mapping[str, Any]]  # prefix of names -> configuration

    @classmethod
    def read(cls, metadata: Mapping[str, str], adapter_config: Mapping[str, Any] | None) -> "Scaling":
        """Raises LoraError for metadata that is no JSON object: to ignore it would change the scale."""
        if adapter_config is not None:
            return cls({"base_model.model.": adapter_config})
        text = metadata.get("lora_adapter_metadata")
        if text is None:
            return cls({})
        try:
            body = json.loads(text)
            assert isinstance(body, dict)
        except (ValueError, AssertionError):
            raise LoraError(
                "its metadata lora_adapter_metadata is no JSON object, and without it the scale is unknown; write the file again"
            ) from None
        sections: dict[str, dict[str, Any]] = {}
        for name, value in body.items():
            prefix, _, key = name.rpartition(".")
            sections.setdefault(f"{prefix}." if prefix else "", {})[key] = value
        return cls(sections)

    def of(self, key: str, rank: int) -> tuple[float, float] | None:
        """(alpha, scale) of a module, by its name in the file; None where nothing is said.

        A pattern counts for a module whose name it ends, the first one in the order of the file (peft's rule).
        Raises LoraError when a rank is declared that is not the tensors'.
        """
        for prefix, section in self.sections.items():
            if key.startswith(prefix) and "lora_alpha" in section:
                name = key.removeprefix(prefix)
                try:
                    alpha = float(_by_pattern(section.get("alpha_pattern"), name, section["lora_alpha"]))
                    declared = int(_by_pattern(section.get("rank_pattern"), name, section.get("r", rank)))
                except (TypeError, ValueError, AttributeError, re.error) as error:
                    raise LoraError(
                        f"the metadata say no alpha and rank for '{key}' that can be read ({error}); correct the metadata"
                    ) from None
                if not math.isfinite(alpha):
                    raise LoraError(
                        f"the metadata say alpha {alpha} for '{key}', which is not finite; correct the metadata"
                    )
                if declared != rank:
                    raise LoraError(
                        f"the metadata declare rank {declared} for '{key}' and its tensors have rank {rank}: "
                        f"the scale would be {alpha:g}/{declared} or {alpha:g}/{rank}; correct the metadata"
                    )
                return alpha, alpha / (rank**0.5 if section.get("use_rslora") else rank)
        return None


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
