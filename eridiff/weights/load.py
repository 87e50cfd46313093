"""Fill a module from a checkpoint: every key used, carried or named in an error; one tensor at a time, no second copy."""

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from eridiff.errors import CheckpointError, ConfigError, quoted
from eridiff.models.autoencoder import PRESETS, Autoencoder
from eridiff.models.flux import Flux
from eridiff.models.mmdit import MMDiT
from eridiff.models.unet import UNet
from eridiff.precision import check_dtype
from eridiff.weights.configs import DESCRIPTIONS
from eridiff.weights.detect import Component, detect, listing, with_statistics
from eridiff.weights.format import read_json_file
from eridiff.weights.header import open_checkpoint
from eridiff.weights.hub import resolve
from eridiff.weights.keymap import Entry
from eridiff.weights.locate import locate_part

log = logging.getLogger(__name__)
NETWORKS: dict[str, type[nn.Module]] = {"flux": Flux, "mmdit": MMDiT, "unet": UNet, "vae": Autoencoder}
SCALES = (".scale_weight", ".weight_scale")  # of fp8 weights: older and newer ComfyUI
NOTES = (*SCALES, ".scale_input", ".input_scale", ".comfy_quant")  # of activations, for fp8 matrix products; the format
FORMATS = ("float8_e4m3fn", "float8_e5m2")  # of comfy_quant
MARKERS = "eridiff.markers"  # in metadata: markers of the file that the layout has no place for
WORDS = "eridiff.words"  # in metadata: which words a small model knows
VARIANT = "eridiff.variant"  # in metadata: the published model, of those with the same sizes
UNTRUE = (  # metadata that hold of the file alone
    "_quantization_metadata", "modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash", "eridiff.config", "format",
)  # fmt: skip
USUAL_MEMORY = 16 * 2**30  # where the system does not say
CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # cgroup 2, 1
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


def load_network(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
    part: str | None = None,
    family: str | None = None,
    allow_unknown: bool = False,
) -> nn.Module:
    """The denoising network of a checkpoint, or its autoencoder if that is all it holds; text encoders: `load_encoder`.

    - path: a file, the folder of one network, or the hub id of either (`org/name`, `org/name/file.safetensors`).
    - dtype: None keeps the file's; of a file with fp8 weights all become what `eridiff.load` computes in.
    - part: "transformer" (the denoising network) or "vae", of a file or a pipeline's folder that holds several.
    - family: flux, sd3 or sdxl, whose latents' statistics an autoencoder gets if nothing beside its tensors says them: those of
      Flux and SD 3 have the same names and shapes.
    - allow_unknown: tensors that the network does not use are left out with a warning, and are not an error.

    Raises CheckpointError, with the names, for anything missing, unknown or misshapen.
    """
    if family is not None and family not in PRESETS:
        raise ConfigError(f"{quoted(family)} is not a family; there are {', '.join(PRESETS)}")
    if part is None:
        held = [c for c in detect(open_checkpoint(resolve(path, "part")), allow_unknown) if c.network in NETWORKS]
        if not held:
            raise CheckpointError(f"{quoted(path)} holds a text encoder, which load_encoder loads")
        component = with_statistics(held[0], family)
    elif part in ("transformer", "vae"):
        component = with_statistics(locate_part(path, part, allow_unknown), family)
    else:
        raise ConfigError(f"part is transformer or vae, not {quoted(part)}; load_encoder loads text encoders")
    config = component.config
    if component.network == "vae" and family is None and not config.stated and config.latent_channels == 16:
        log.warning(
            "%s does not say its latents' statistics: Flux's are taken, scale %g and shift %g; family='sd3' takes SD 3's, and "
            "so does an SD35Inference that it is handed to",
            path, config.scale, config.shift,
        )  # fmt: skip
    return build(component, dtype=dtype, device=device, progress=progress)


def build(
    component: Component,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> nn.Module:
    """The module of a flux, mmdit, unet or vae component, filled; in evaluation mode, parameters without gradients.

    Tensors of the file's dtype stay memory mapped. What is not a parameter (a table of positions) keeps the file's dtype and
    stays on the CPU.
    """
    module = empty_network(component)
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    stay = wanted.keys() - dict(module.named_parameters()).keys()
    state = read_state(component, wanted, stay, dtype=dtype, device=device, progress=progress)
    module.load_state_dict(state, strict=True, assign=True)
    vars(module)["said_by_file"] = said_by_file(component)
    return module.eval().requires_grad_(False)


def built_on_meta(component: Component, kind: Callable[[Any], Any]) -> Any:
    """A module of a component's configuration on the meta device; raises ConfigError for sizes that torch or transformers refuse."""
    try:
        with torch.device("meta"):
            return kind(component.config)
    except Exception as error:  # transformers validates by an error of its own
        reason = " ".join(str(error.__cause__ or error).split())
        what = f"{component.checkpoint.path}: no {component.network} has this configuration: {reason}"
        raise ConfigError(what) from None


def empty_network(component: Component) -> nn.Module:
    """The module of a flux, mmdit, unet or vae component, on the meta device: its names and sizes."""
    module: nn.Module = built_on_meta(component, NETWORKS[component.network])
    return module


def said_by_file(component: Component) -> dict[str, str]:
    """What a file says beside its weights and is still true of a copy: metadata, and how an SDXL is sampled."""
    kept = {name: text for name, text in component.checkpoint.metadata.items() if name not in (*UNTRUE, MARKERS)}
    prediction, zero = prediction_told(component)
    markers = " ".join(["v_pred"] * (prediction in ("v", "v_prediction")) + ["ztsnr"] * zero)
    if component.network == "unet":
        kept |= {MARKERS: markers} if markers else {}
        kept |= {"modelspec.prediction_type": prediction} if isinstance(prediction, str) else {}
    return kept


def prediction_told(component: Component) -> tuple[str | None, bool]:
    """What an SDXL's checkpoint says: its prediction type (None: nothing) and whether its last noise level is all noise.

    By markers, by metadata, or by the scheduler's folder beside a diffusers one.
    """
    checkpoint = component.checkpoint
    markers = component.markers.union(checkpoint.metadata.get(MARKERS, "").split())
    said, zero = checkpoint.metadata.get("modelspec.prediction_type"), "ztsnr" in markers
    beside = checkpoint.path.parent / "scheduler" / "scheduler_config.json"
    if checkpoint.path.is_dir() and beside.is_file():
        config = read_json_file(beside)
        said, zero = config.get("prediction_type"), config.get("rescale_betas_zero_snr") is True
    return ("v" if "v_pred" in markers else said), zero


def read_state(
    component: Component,
    wanted: dict[str, tuple[int, ...]],
    stay: Collection[str] = (),
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, Tensor]:
    """The tensors of `wanted` (native names and shapes), mapped and converted one by one.

    `dtype` None is the file's, and for a file with fp8 weights `default_dtypes`', throughout. Those named in `stay` are neither
    converted nor moved.
    """
    check_dtype(dtype)
    state = {}
    entries = plan(component, wanted)
    if dtype is None and _is_quantised(component):
        dtype = default_dtypes({"": component}, torch.device(device))[""]
    read_as = dtype or _main_dtype(component)
    bar = {"disable": None if progress else True, "leave": False}
    for entry in tqdm(entries, desc=f"loading {component.network}", unit="tensor", **bar):
        tensor = _read(component, entry, wanted[entry.native], read_as)
        state[entry.native] = tensor if entry.native in stay else tensor.to(device=device, dtype=dtype or tensor.dtype)
    return state


def native_reader(
    component: Component, module: nn.Module
) -> tuple[Callable[[str], Tensor], dict[str, tuple[int, ...]], dict[str, torch.dtype]]:
    """How a file's tensors are read one by one: a function of the native name, native shapes, and the dtypes that they have.

    What the file lacks and a default stands for is not among them; fp8 tensors are read in float32, and count as what
    `load_network` would make of them. Raises CheckpointError unless the file fills the module.
    """
    shapes = {n: tuple(t.shape) for n, t in module.state_dict().items() if n != "encoder.embed_tokens.weight"}
    main, dtypes, found = _main_dtype(component), dict[str, torch.dtype](), dict[str, Entry]()
    for entry in plan(component, shapes):
        held = [component.entry(name).dtype for name in entry.foreign if name in component.keys]
        if held:
            found[entry.native] = entry
            dtypes[entry.native] = reduce(torch.promote_types, [main if dtype in FLOAT8 else dtype for dtype in held])

    def read(native: str) -> Tensor:
        return _read(component, found[native], shapes[native], torch.float32)

    return read, {native: shapes[native] for native in found}, dtypes


def mapped_bytes(component: Component, dtype: torch.dtype) -> int:
    """Of a component's tensors those, in bytes, that stay in the mapped file when it is loaded to a CPU in this dtype.

    The others are converted, or joined of several (query, key and value of diffusers' files), in memory of their own.
    """
    if component.network in NETWORKS:
        wanted = {name: tuple(t.shape) for name, t in empty_network(component).state_dict().items()}
        kept = (e.foreign for e in plan(component, wanted) if e.operation not in ("rows", "swap_halves", "transpose"))
        names = {name for foreign in kept for name in foreign} & component.keys
    else:
        names = set(component.keys)
    entries = [component.entry(name) for name in names]
    return sum(math.prod(entry.shape) * dtype.itemsize for entry in entries if entry.dtype == dtype)


def default_dtypes(components: Mapping[str, Component], device: torch.device) -> dict[str, torch.dtype]:
    """In what to compute by default: the files' dtypes on a GPU, float32 on a CPU with room for it.

    What has to be converted is no longer mapped. All that is may take half of the memory together; the smallest come first, as
    a text encoder in float32 costs least for what it gains. T5 overflows in float16, so such a file becomes bfloat16.
    """
    found, held, room = {}, {}, machine_memory() // 2
    numbers = {name: sum(math.prod(entry.shape) for entry in c.entries) for name, c in components.items()}
    for name, component in components.items():
        dtype = _main_dtype(component)
        found[name] = torch.bfloat16 if component.network == "t5" and dtype == torch.float16 else dtype
        held[name] = found[name].itemsize * numbers[name] if _is_quantised(component) or found[name] != dtype else 0
        room -= held[name]
    for name in sorted(numbers, key=lambda name: numbers[name]) if device.type == "cpu" else ():
        further = 4 * numbers[name] - held[name]
        if found[name] != torch.float32 and further <= room:
            found[name], room = torch.float32, room - further
    return found


def machine_memory() -> int:
    """Bytes that this process may have: of the machine, or of its container if that is less."""
    try:
        sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (AttributeError, ValueError):  # Windows has no sysconf
        sizes = [USUAL_MEMORY]
    for limit in CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # "max" is not a number
            sizes.append(int(Path(limit).read_text()))
    return min(sizes)


def plan(component: Component, wanted: dict[str, tuple[int, ...]]) -> list[Entry]:
    """The entries that fill `wanted` (native names and shapes); raises CheckpointError unless file and module agree."""
    entries = component.layout.entries(wanted, component.sizes, component.keys)
    used = {name for entry in entries for name in entry.foreign}
    missing = [n for e in entries for n in e.foreign if n not in component.keys and not _may_lack(component, e)]
    unknown = sorted(component.keys - used - set(component.layout.carry) - _notes(component, used))
    if missing or (unknown and not component.allow_unknown):
        told = _disagreement(missing, unknown, sorted(used))
        raise CheckpointError(f"{quoted(component.checkpoint.path)}: {told}")
    if unknown:
        what = f"{DESCRIPTIONS[component.network]} does not use {listing(unknown)}"
        log.warning("%s: %s, left out", component.checkpoint.path, what)
    for entry in entries:
        _check_shapes(component, entry, wanted[entry.native])
    return entries


def _may_lack(component: Component, entry: Entry) -> bool:
    present = sum(name in component.keys for name in entry.foreign)
    return entry.operation == "default" or (entry.operation == "alias" and present > 0)


def _notes(component: Component, used: set[str]) -> set[str]:
    """What the file says of the quantisation of its weights; a note that belongs to no weight is an unknown name."""
    known = {name.removesuffix(".weight") + ending for name in used for ending in NOTES}
    return {name for name in component.keys if name in known or name == "scaled_fp8"}


def _disagreement(missing: list[str], unknown: list[str], known: list[str]) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} tensors are missing, the first is {quoted(missing[0], 60)}")
    if unknown:
        near = get_close_matches(unknown[0], missing or known, n=1, cutoff=0.0)
        hint = f", nearest to {quoted(near[0], 60)}" if near else ""
        parts.append(f"{len(unknown)} are unknown, the first is {quoted(unknown[0], 60)}{hint}")
    return "; ".join(parts)


def _check_shapes(component: Component, entry: Entry, shape: tuple[int, ...]) -> None:
    for name, expected in zip(entry.foreign, entry.foreign_shapes(shape), strict=True):
        if name not in component.keys:
            continue
        found, where = component.entry(name), f"{quoted(component.checkpoint.path)}: {quoted(component.prefix + name)}"
        if not found.dtype.is_floating_point:
            _check_format(component, name)
            raise CheckpointError(f"{where} holds {found.dtype}, not numbers of a weight")
        squeezed = entry.operation == "squeeze" and found.shape == shape  # older files keep the 1x1 convolution
        if found.shape != expected and not squeezed:
            raise CheckpointError(f"{where} has the shape {list(found.shape)}, the network needs {list(expected)}")


def _read(component: Component, entry: Entry, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The native tensor; fp8 ones among the file's become `dtype`."""
    present = [name for name in entry.foreign if name in component.keys]
    if entry.operation == "default" and not present:
        return torch.eye(shape[0], shape[1], dtype=dtype)
    tensors = [_dequantised(component, name, dtype) for name in present]
    if entry.operation == "alias" and not all(torch.equal(tensors[0], other) for other in tensors[1:]):
        both = " and ".join(quoted(name, 60) for name in present)
        raise CheckpointError(f"{quoted(component.checkpoint.path)}: {both} must be equal and differ")
    if entry.operation == "alias":
        return tensors[0]
    return entry.read(tensors, shape)


def _main_dtype(component: Component) -> torch.dtype:
    """The dtype that most numbers of the file have; bfloat16 where those are quantised to 8 bits."""
    held: Counter[torch.dtype] = Counter()
    for entry in component.entries:
        held[entry.dtype] += math.prod(entry.shape)
    dtype = held.most_common(1)[0][0]
    return dtype if dtype.itemsize > 1 and dtype.is_floating_point else torch.bfloat16


def _is_quantised(component: Component) -> bool:
    # the note scaled_fp8 holds no number
    return any(entry.dtype in FLOAT8 and math.prod(entry.shape) for entry in component.entries)


def _dequantised(component: Component, name: str, dtype: torch.dtype) -> Tensor:
    """A tensor of the file; an fp8 one multiplied with its scale in float32 and cast once, to `dtype`."""
    tensor, base = component.read(name), name.removesuffix(".weight")
    scale_name = next((base + suffix for suffix in SCALES if base + suffix in component.keys), None)
    where = quoted(component.checkpoint.path)
    scale = None if scale_name is None else component.read(scale_name).float()
    if tensor.dtype not in FLOAT8:
        if scale is not None and not bool((scale == 1).all()):
            raise CheckpointError(
                f"{where}: {quoted(scale_name, 60)} is a scale other than 1 of a weight that is {tensor.dtype}, not fp8"
            )
        return tensor
    _check_format(component, name)
    if scale is None:
        if any(key.endswith(SCALES) for key in component.keys):
            raise CheckpointError(f"{where}: the fp8 weight {quoted(name, 60)} has no scale, others have one")
        return tensor.to(dtype)
    # one scale in all, one per row, or one per block of a row: [rows, blocks, 1]
    rows = 1 if scale.numel() == 1 else tensor.shape[:1].numel()
    blocks = scale.shape[1] if scale.ndim == 3 else 1
    fits = scale.numel() == rows * blocks > 0 and tensor.numel() % scale.numel() == 0
    if not fits or not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise CheckpointError(f"{where}: {quoted(scale_name, 60)} is not a positive scale of {quoted(name, 60)}")
    in_blocks = tensor.float().reshape(rows, blocks, tensor.numel() // scale.numel())
    return (in_blocks * scale.reshape(rows, blocks, 1)).reshape(tensor.shape).to(dtype)


def _check_format(component: Component, name: str) -> None:
    """ComfyUI's note beside a weight is JSON in bytes; what it says of fp8 is known without it, any other format is refused by name."""
    note = name.removesuffix(".weight") + ".comfy_quant"
    if note not in component.keys:
        return
    try:
        told = json.loads(component.read(note).numpy().tobytes()).get("format")
    except (ValueError, TypeError, AttributeError):
        told = None
    if told not in FORMATS:
        raise CheckpointError(
            f"{quoted(component.checkpoint.path)}: {quoted(note, 60)} says the format {quoted(told, 40)}, only "
            f"{' and '.join(FORMATS)} are read; use the bf16 or fp8 file"
        )
