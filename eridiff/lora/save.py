"""Write a LoRA in the formats that other programs read; what a format cannot say is an error, never dropped.

kohya's scripts name modules as the original checkpoint does, with underscores, and keep an alpha a module. diffusers-PEFT
names them as diffusers does, so that fused weights are split, and keeps alpha in the metadata `lora_adapter_metadata`.
native is this package's names.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import eridiff
from eridiff.errors import LoraError
from eridiff.lora.attach import LoraSet
from eridiff.lora.deltas import Item
from eridiff.lora.load import Lora, Network
from eridiff.lora.names import Names, Target, module_of, names_of, network_of, rooted, targets_of
from eridiff.lora.rows import part_of
from eridiff.weights.keymap import key_map
from eridiff.weights.locate import DENOISERS
from eridiff.weights.save import write_tensors

FORMATS = ("kohya", "diffusers", "native")
LAYOUTS = {"kohya": "original", "diffusers": "diffusers"}
ENCODER_PREFIXES = {  # format -> network beside a denoiser -> prefix
    "kohya": {"clip": "lora_te1_", "clip_g": "lora_te2_", "t5": "lora_te3_"},
    "native": {
        "clip": "text_encoders.clip_l.transformer.", "clip_g": "text_encoders.clip_g.transformer.",
        "t5": "text_encoders.t5xxl.transformer.",
    },
}  # fmt: skip
DIFFUSERS_ENCODERS = {  # denoiser -> the text encoders in the order in which diffusers numbers them
    "flux": ("clip", "t5"), "mmdit": ("clip", "clip_g", "t5"), "unet": ("clip", "clip_g"), "": ("clip", "clip_g", "t5"),
}  # fmt: skip
ARCHITECTURES = {"flux": "flux-1-dev", "mmdit": "stable-diffusion-3", "unet": "stable-diffusion-xl-v1-base"}


def save_lora(
    lora: Lora | LoraSet, path: str | os.PathLike[str], networks: nn.Module | Mapping[str, Network] | None = None, *,
    format: str | None = None, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None,
) -> Path:  # fmt: skip
    """Write a LoRA as a file; it appears whole or not at all.

    - networks: as for `load_lora`, those that the LoRA changes; a `LoraSet` knows its own.
    - format: kohya (the usual, which other programs read), diffusers or native (the usual for a module of another library).
    - dtype: of the matrices; None keeps their own.

    Raises LoraError for a kind of change that the format cannot hold.
    """
    if isinstance(lora, LoraSet):
        networks = lora.network if networks is None else networks
        lora = lora.lora()
    if networks is None:
        raise LoraError("say which networks the LoRA is for: its names follow those networks'")
    tensors, told = lora_tensors(lora, networks, format=format or ("native" if "" in lora.networks else "kohya"))
    kept = {}
    for name, tensor in tensors.items():
        matrix = tensor.is_floating_point() and not name.endswith(".alpha")  # a number stays
        kept[name] = tensor.detach().cpu().to(dtype if dtype and matrix else tensor.dtype).contiguous().clone()
    software = {"format": "pt", "software": f"eridiff {eridiff.__version__}"}
    return write_tensors(kept, path, {**software, **told, **(metadata or {})})


def lora_tensors(
    lora: Lora, networks: nn.Module | Mapping[str, Network], *, format: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Names and tensors of a file in a format, and its metadata."""
    if format not in FORMATS:
        raise LoraError(f"the format must be one of {', '.join(FORMATS)}, not '{format}'")
    given: dict[str, Network] = {network_of(networks): networks} if isinstance(networks, nn.Module) else dict(networks)
    lacking = [name for name in lora.networks if name not in given]
    if lacking:
        raise LoraError(f"the LoRA changes {lacking[0]}, which is not given")
    denoiser = next((name for name in (*lora.networks, *given) if name in DENOISERS), "")
    items = [
        (prefix_of(format, network, denoiser), item)
        for network in lora.networks
        for item in regrouped(lora.of(network), given[network], format)
    ]
    tensors: dict[str, Tensor] = {}
    for prefix, item in items:
        key = prefix + (item.key.replace(".", "_") if format == "kohya" else item.key)
        for ending, tensor in (_peft(item) if format == "diffusers" else _kohya(item)).items():
            tensors[key + ending] = tensor
    return tensors, _metadata(items, format, denoiser)


def prefix_of(format: str, network: str, denoiser: str) -> str:
    """What stands before the names of a network's modules."""
    if network in DENOISERS or not network:
        return {"kohya": "lora_unet_", "native": ""}.get(format, "unet." if network == "unet" else "transformer.")
    if format != "diffusers":
        return ENCODER_PREFIXES[format][network]
    place = DIFFUSERS_ENCODERS[denoiser].index(network)
    return f"text_encoder_{place + 1}." if place else "text_encoder."


def regrouped(lora: Lora, network: Network, format: str) -> list[Item]:
    """The items of a LoRA of one network, an item for each module of a layout; their keys are the layout's names."""
    by_tensor: dict[str, list[Item]] = {}
    for item in lora.items:
        by_tensor.setdefault(item.target.name, []).append(item)
    names = names_of(lora.networks[0], network)
    result = []
    for native, items in by_tensor.items():
        for key, target in _modules(names, native, format).items():
            found = part_of(items, target, names.shapes[native][0])
            if found is not None:
                result.append(replace(found, key=key, target=target))
    return result


def _modules(names: Names, native: str, format: str) -> dict[str, Target]:
    """The modules that hold a native tensor in a format's layout, and which rows of it each is."""
    module, _, parameter = native.rpartition(".")
    whole = Target(names.network, module, parameter)
    if format == "native" or not names.network:
        return {module_of(native): whole}
    layout = key_map(names.network).layouts[LAYOUTS[format] if names.network in DENOISERS else "huggingface"]
    targets = targets_of(layout.entry(rooted(native, names.lacks), names.sizes), whole, names.shapes[native])
    return {module_of(foreign): target for foreign, target in targets.items()}


def _kohya(item: Item) -> dict[str, Tensor]:
    """Endings as kohya's scripts and LyCORIS write them."""
    names = {"down": ".lora_down.weight", "up": ".lora_up.weight", "mid": ".lora_mid.weight", "multiplier": ".weight"}
    result: dict[str, Tensor] = {}
    for role, tensor in item.tensors.items():
        if role in ("up_bias", "diff_b"):
            result[".diff_b"] = item.bias_delta(torch.zeros_like(tensor))
        elif role == "magnitude":
            result[".dora_scale"] = tensor.reshape(-1, *[1] * (item.tensors["down"].ndim - 1))
        else:
            result[names.get(role, f".{role}")] = tensor
    if item.rank is not None:
        result[".alpha"] = _alpha(item, item.rank)
    return result


def _alpha(item: Item, rank: int) -> Tensor:
    """A number that, over the rank, gives the item's ratio: in the matrices' dtype as other writers do, or in a wider one."""
    alpha = item.alpha if item.alpha is not None and item.alpha / rank == item.ratio else item.ratio * rank
    own = next(t.dtype for t in item.tensors.values() if t.is_floating_point())
    dtypes = (own, torch.float32, torch.float64)
    numbers = [torch.tensor(alpha, dtype=dtype) for dtype in dtypes if dtype.itemsize > 1]
    return next((number for number in numbers if float(number) / rank == item.ratio), numbers[-1])


def _peft(item: Item) -> dict[str, Tensor]:
    """Endings as peft writes them."""
    strange = sorted(item.tensors.keys() - {"down", "up", "up_bias", "diff_b", "magnitude", "dora_scale"})
    if item.kind != "lora" or strange:
        what = item.kind if item.kind != "lora" else strange[0]
        raise LoraError(f"{item.target}: a diffusers-PEFT file cannot hold '{what}'; write kohya or native")
    result = {".lora_A.weight": item.tensors["down"], ".lora_B.weight": item.tensors["up"]}
    if "up_bias" in item.tensors or "diff_b" in item.tensors:
        bias = item.tensors.get("up_bias", torch.zeros(()))
        if "diff_b" in item.tensors:
            bias = bias + item.tensors["diff_b"] / item.ratio
        result[".lora_B.bias"] = bias
    magnitude = item.tensors.get("magnitude", item.tensors.get("dora_scale"))
    if magnitude is not None:
        outputs = item.tensors["up"].shape[0]
        if "dora_scale" in item.tensors and magnitude.shape[:2] != (outputs, 1):
            raise LoraError(
                f"{item.target}: a diffusers-PEFT file cannot hold a DoRA of the input's lengths; write kohya"
            )
        flat = item.tensors["down"].ndim == 2
        result[".lora_magnitude_vector"] = magnitude.flatten() if flat else magnitude.reshape(1, -1, 1, 1)
    return result


def _metadata(items: list[tuple[str, Item]], format: str, denoiser: str) -> dict[str, str]:
    ranks = {item.rank for _, item in items if item.rank is not None}
    alphas = {item.ratio * item.rank for _, item in items if item.rank is not None}
    if format != "diffusers":
        told = {"ss_network_module": "networks.lora"} if format == "kohya" else {"eridiff.lora": "native"}
        if format == "kohya":
            told["ss_network_dim"] = str(ranks.pop()) if len(ranks) == 1 else "None"
            told["ss_network_alpha"] = str(alphas.pop()) if len(alphas) == 1 else "None"
        if denoiser:
            told["modelspec.architecture"] = f"{ARCHITECTURES[denoiser]}/lora"
        return told
    if all(item.ratio == 1 and "up_bias" not in item.tensors and not item.dora for _, item in items):
        return {}  # alpha is the rank, as every reader assumes
    body: dict[str, Any] = {}
    for prefix in dict.fromkeys(prefix for prefix, _ in items):
        own = [item for p, item in items if p == prefix]
        rank = max(item.rank or 0 for item in own)
        # a CLIP of transformers 5 has no `text_model.` before its modules, one of transformers 4 has: the rest fits both
        keys = {item.key.removeprefix("text_model."): item for item in own}
        anchor = {key: "" if item.key.startswith("text_model.") else "^" for key, item in keys.items()}
        names = {f"{anchor[key]}{key.replace('.', r'[.]')}": item for key, item in keys.items()}
        alphas_of = {name: item.ratio * (item.rank or 0) for name, item in names.items()}
        said = {
            "r": rank, "lora_alpha": rank, "target_modules": sorted(keys),
            "rank_pattern": {name: item.rank for name, item in names.items() if item.rank != rank},
            "alpha_pattern": {name: _whole(alpha) for name, alpha in alphas_of.items() if alpha != rank},
            "use_dora": any(item.dora for item in own), "use_rslora": False, "fan_in_fan_out": False, "bias": "none",
            "lora_bias": any("up_bias" in item.tensors or "diff_b" in item.tensors for item in own),
        }  # fmt: skip
        body |= {prefix + key: value for key, value in said.items()}
    return {"lora_adapter_metadata": json.dumps(body, sort_keys=True)}


def _whole(number: float) -> int | float:
    return int(number) if number == int(number) else number
