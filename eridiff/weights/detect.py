"""What is in a checkpoint: family, layout, prefix and configuration, from names first, then shapes, then metadata."""

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import yaml
from torch import Tensor

from eridiff.errors import CheckpointError, ConfigError, quoted
from eridiff.weights import configs
from eridiff.weights.configs import DESCRIPTIONS as DESCRIPTIONS
from eridiff.weights.configs import USUAL_SIZES, Shapes, check_fixed
from eridiff.weights.format import TensorEntry
from eridiff.weights.header import Checkpoint
from eridiff.weights.keymap import Layout, key_map, map_folder, without_wrappers

log = logging.getLogger(__name__)
# network -> the native names by which it is recognised, and what makes its configuration
FAMILIES: dict[str, tuple[tuple[str, ...], Callable[[Shapes], Any]]] = {
    "flux": (("double_blocks.0.image.k_norm.weight", "image_in.weight"), configs.flux_config),
    "mmdit": (("joint_blocks.0.text.qkv.weight", "positions.table"), configs.mmdit_config),
    "unet": (("vector_in.in_layer.weight", "conv_in.weight", "conv_out.weight"), configs.unet_config),
    "vae": (("encoder.conv_in.weight", "encoder.middle.attention.q.weight"), configs.autoencoder_config),
    "clip": (
        ("text_model.embeddings.token_embedding.weight", "text_model.encoder.layers.0.mlp.fc1.weight"),
        configs.clip_config,
    ),
    "t5": (("shared.weight", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"), configs.t5_config),
}
UNETS = {  # by the width of their texts
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    2048: "a part of an SDXL",
    1280: "a part of an SDXL refiner",
}


def sizes_of(config: Any) -> dict[str, Any]:
    """What the expressions of a key map may name: the fields and properties of a network's configuration, nothing of transformers'."""
    if not is_dataclass(config):
        return dict(config) if isinstance(config, Mapping) else {}
    computed = [name for name, value in vars(type(config)).items() if isinstance(value, property)]
    return vars(config) | {name: getattr(config, name) for name in computed}


@dataclass(frozen=True)
class Component:
    """One network inside a checkpoint."""

    network: str  # flux, mmdit, unet, vae, clip, clip_g or t5
    layout: Layout
    prefix: str
    checkpoint: Checkpoint
    config: Any  # FluxConfig, MMDiTConfig, UNetConfig, AutoencoderConfig, or for a text encoder a dict of transformers' names
    notices: tuple[str, ...] = ()
    keys: frozenset[str] = field(default=frozenset())  # of the file, this component's, prefix removed
    markers: frozenset[str] = field(default=frozenset())  # names of the file that only say how to sample
    allow_unknown: bool = False  # whether keys that the network does not use are left out in place of an error

    @property
    def sizes(self) -> dict[str, Any]:
        """What the expressions of a key map may name."""
        return sizes_of(self.config)

    @property
    def entries(self) -> list[TensorEntry]:
        """Of all its tensors in the file."""
        return [self.entry(name) for name in self.keys]

    def entry(self, name: str) -> TensorEntry:
        """What the file's header says of a tensor, by its name without the prefix."""
        return self.checkpoint.tensors[self.prefix + name]

    def read(self, name: str) -> Tensor:
        """A tensor as the file has it, mapped."""
        return self.checkpoint.read(self.prefix + name)


def detect(checkpoint: Checkpoint, allow_unknown: bool = False) -> list[Component]:
    """The components of a checkpoint, at most one per network.

    Tensors that no network needs are left out with one warning. Raises CheckpointError when there is no network, or a network
    that is unclear, incomplete or of another family; `allow_unknown` leaves out what is unclear beside a network.
    """
    checkpoint = _unwrapped(checkpoint)
    names = set(checkpoint.tensors)
    said = _said_of(names, "never_loaded")
    if said:
        raise CheckpointError(f"{quoted(checkpoint.path)} is {said}.")
    found = [component for network in FAMILIES for component in _candidates(network, checkpoint, names)]
    if not found:
        raise CheckpointError(f"{quoted(checkpoint.path)} {_refusal(names, checkpoint, found)}")
    markers = frozenset(names.intersection(_leftovers()["markers"]))
    found = [replace(c, markers=markers, allow_unknown=allow_unknown) for c in found]
    components = [replace(c, keys=_keys_of(c, found, names) - markers) for c in found]
    left = sorted(names - markers - {c.prefix + name for c in components for name in c.keys})
    other = [name for name in left if not _is_harmless(name, found)]
    if not allow_unknown and (any(map(_below_a_network, other)) or _said_of(other, "refused")):
        raise CheckpointError(f"{quoted(checkpoint.path)} {_refusal(other, checkpoint, found)}")
    if left:
        notice = f"no network uses {listing(left)}, left out"
        log.warning("%s: %s", checkpoint.path, notice)
        components[0] = replace(components[0], notices=(notice,))
    return components


def component_of(checkpoint: Checkpoint, *networks: str, allow_unknown: bool = False) -> Component:
    """The one component of a kind (or of the first kind that is there); CheckpointError says what is there instead."""
    held = detect(checkpoint, allow_unknown)
    return chosen(held, networks, checkpoint.path, checkpoint.remedy("give it under its own option"))


def chosen(held: Collection[Component], networks: Sequence[str], path: object, remedy: str = "") -> Component:
    """The first component of some kinds; CheckpointError says what `path` holds instead."""
    for component in held:
        if component.network in networks:
            return component
    there = ", ".join(DESCRIPTIONS[component.network] for component in held) or "no network"
    wanted = " or ".join(DESCRIPTIONS[network] for network in networks)
    raise CheckpointError(f"{quoted(path)} holds {there}, not {wanted}{remedy}")


def listing(names: Collection[str]) -> str:
    """Some tensors in a sentence: the first three by name, the rest by number."""
    first = ", ".join(quoted(name) for name in list(names)[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more tensors"


def _unwrapped(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with plain names, where a module or its blocks were saved compiled or sharded."""
    plain = {name: without_wrappers(name) for name in checkpoint.tensors}
    if all(name == short for name, short in plain.items()):
        return checkpoint
    tensors: dict[str, Any] = {}
    for name, short in plain.items():
        if short in tensors:
            raise CheckpointError(
                f"{quoted(checkpoint.path)} holds {quoted(short)} twice, with and without what a wrapper adds to a name; save "
                "one of them"
            )
        tensors[short] = checkpoint.tensors[name]
    return replace(checkpoint, tensors=tensors)


def _candidates(family: str, checkpoint: Checkpoint, names: set[str]) -> list[Component]:
    signature, configure = FAMILIES[family]
    result = []
    for layout in key_map(family).layouts.values():
        for prefix in layout.prefixes:
            if not any(name.startswith(prefix) for name in names):
                continue
            shapes = Shapes(family, layout, prefix, checkpoint)
            if not all(shapes.find(native) for native in signature):
                continue
            config = configure(shapes)
            check_fixed(family, checkpoint.path, checkpoint.config)
            network = _clip_kind(layout, prefix, config, checkpoint) if family == "clip" else family
            result.append(Component(network, layout, prefix, checkpoint, _declared(network, config, checkpoint)))
    for network, count in Counter(c.network for c in result).items():
        if count > 1:
            places = " and ".join(f"'{c.prefix}' ({c.layout.name})" for c in result if c.network == network)
            raise CheckpointError(
                f"{quoted(checkpoint.path)} holds {DESCRIPTIONS[network]} twice, under the prefixes {places}"
            )
    return result


def _clip_kind(layout: Layout, prefix: str, config: Mapping[str, Any], checkpoint: Checkpoint) -> str:
    """clip (OpenAI's CLIP-L) or clip_g (OpenCLIP's bigG): by place and names, by what the file says, by depth."""
    in_folder = "clip_g" in prefix or checkpoint.path.name == "text_encoder_2"  # the latter of diffusers
    if in_folder or (layout.name == "openclip" and (prefix or config["num_hidden_layers"] != 12)):
        return "clip_g"
    if prefix:
        return "clip"
    declared = '"clip_g"' in checkpoint.metadata.get("eridiff.config", "")
    return "clip_g" if declared or config["num_hidden_layers"] > 24 else "clip"  # 12 and 32


def _declared(network: str, config: Any, checkpoint: Checkpoint) -> Any:
    """The configuration with what the file's own metadata says; shapes were only evidence."""
    given: dict[str, Any] = {}
    try:
        declared = json.loads(checkpoint.metadata.get("eridiff.config", "{}")).get(network, {})
        given = {key: _tuples(value) for key, value in declared.items()}
        usual = dict(config) if isinstance(config, dict) else vars(config)
        wrong = next((key for key, value in given.items() if key in usual and not _alike(value, usual[key], key)), None)
        if wrong is not None:
            raise ValueError(f"{wrong} is {quoted(given[wrong], 60)}, where {quoted(usual[wrong], 60)} is usual")
        if network == "vae" and given:
            given = {"stated": True, **given}
        config = {**config, **given} if isinstance(config, dict) else replace(config, **given)
    except (ValueError, TypeError, AttributeError, ConfigError) as error:
        raise ConfigError(
            f"{quoted(checkpoint.path)}: the metadata eridiff.config is not a configuration of {network}: {error}"
        ) from None
    if network == "flux" and config.rope_axes[0] == 0 and "rope_axes" not in given:
        where = "rope_axes in the metadata eridiff.config"
        where = "axes_dims_rope in its configuration" if checkpoint.module else where
        raise ConfigError(
            f"{quoted(checkpoint.path)}: heads of {sum(config.rope_axes)} features are in no published Flux; give {where}"
        )
    return config


def _alike(value: Any, usual: Any, name: str) -> bool:
    """Whether a setting has the type of the one that the shapes give, None standing for tuples too, and a size that can be built."""
    if isinstance(usual, tuple) or usual is None:
        if not isinstance(value, tuple):
            return value is None
        return all(_alike(v, () if isinstance(v, tuple) else 0, name) for v in value)
    if isinstance(usual, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if type(usual) is int:
        return type(value) is int and 0 <= value <= (1000 if re.search("depth|blocks|layers", name) else 1_000_000)
    return type(value) is type(usual)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def with_statistics(component: Component, family: str | None) -> Component:
    """An autoencoder with the latents' statistics of flux, sd3 or sdxl, unless its file says its own or has other latents."""
    if component.network != "vae" or family is None:
        return component
    return replace(component, config=replace(component.config.of_family(family), stated=True))


# what belongs to no network -------------------------------------------------------------------------------------------------


@cache
def _leftovers() -> Any:
    return yaml.safe_load((map_folder() / "leftovers.yaml").read_text(encoding="utf-8"))


def _matches(name: str, *lists: str) -> bool:
    harmless = _leftovers()["harmless"]
    return any(fnmatchcase(name, pattern) for kind in lists for pattern in harmless.get(kind, ()))


def _is_harmless(name: str, found: Iterable[Component]) -> bool:
    """Whether a name that is below no network, or below one of `found`, is known to hold nothing that is needed."""
    below = [c for c in found if name.startswith(c.prefix)]
    return _matches(name, "any") or any(_matches(name.removeprefix(c.prefix), "any", c.network) for c in below)


def _keys_of(component: Component, found: list[Component], names: set[str]) -> frozenset[str]:
    """A component's names of the file, those known to be harmless left out; a name goes to its longest prefix."""
    longer = tuple(c.prefix for c in found if c.prefix != component.prefix and c.prefix.startswith(component.prefix))
    own = {name for name in names if name.startswith(component.prefix) and not name.startswith(longer)}
    own = {name.removeprefix(component.prefix) for name in own}
    carried = component.layout.carry
    return frozenset(n for n in own if n in carried or _is_note(n, own) or not _matches(n, "any", component.network))


def _is_note(name: str, own: Collection[str]) -> bool:
    """Whether ComfyUI's note of a quantisation stands where it means something: beside a weight, or at the network's top."""
    return name == "scaled_fp8" or (
        name.endswith(".comfy_quant") and name.removesuffix("comfy_quant") + "weight" in own
    )


def _below_a_network(name: str) -> bool:
    """Whether a name is below a prefix that is a network's own wherever it occurs."""
    layouts = (layout for family in FAMILIES for layout in key_map(family).layouts.values())
    return name.startswith(tuple(prefix for layout in layouts for prefix in layout.prefixes if prefix))


def _said_of(names: Iterable[str], table: str) -> str:
    """What the first pattern of a table that one of the names has makes of a file, with the name; "" if none has."""
    for pattern, sentence in _leftovers()[table].items():
        first = next((name for name in sorted(names) if re.search(pattern, name)), None)
        if first is not None:
            return f"{sentence} ({quoted(first, 60)} is in it)"
    return ""


def _refusal(left: Collection[str], checkpoint: Checkpoint, found: Collection[Component]) -> str:
    """What the tensors `left`, which belong to none of the networks that are found, make of a file."""
    if said := _said_of(left, "refused"):
        return f"is {said}."
    ordered = sorted(left)
    context = next((name for name in ordered if name.endswith("attn2.to_k.weight")), None)
    if context is not None and all(component.network != "unet" for component in found):
        width = checkpoint.tensors[context].shape[-1:]
        what = UNETS.get(width[0] if width else 0, "a UNet of unknown kind")
        return f"is {what}, which eridiff does not load ({quoted(context, 60)} is {list(width)} wide)."
    hint = _lacking(left) or f"the first is {quoted(ordered[0], 60)}{_misspelt(ordered)}"
    if found:
        return f"holds {len(left)} tensors of no part of a model: {hint}{checkpoint.remedy('allow_unknown leaves them out')}."
    return f"is not a model that eridiff knows: of its {len(left)} tensors {hint}."


def _told_by() -> list[tuple[str, str, list[list[str]]]]:
    """Network, prefix, and the names by which it is recognised: for each of them its spellings."""
    return [
        (network, prefix, [[e.foreign[0] for e in layout.spellings([native], USUAL_SIZES)] for native in signature])
        for network, (signature, _) in FAMILIES.items()
        for layout in key_map(network).layouts.values()
        for prefix in layout.prefixes
    ]


def _lacking(names: Collection[str]) -> str:
    """A hint for a network that is not whole: one of the names by which it is recognised is there, another is not."""
    for network, prefix, signature in _told_by():
        there = [next((prefix + name for name in spellings if prefix + name in names), None) for spellings in signature]
        if any(there) and not all(there):
            has, lacks = next(filter(None, there)), prefix + signature[there.index(None)][0]
            return f"{quoted(has, 60)} is of {DESCRIPTIONS[network]}, which needs {quoted(lacks, 60)} too"
    return ""


def _misspelt(names: list[str]) -> str:
    """A hint for a name that is almost one by which a network is recognised."""
    known = {name for _, _, signature in _told_by() for spellings in signature for name in spellings}
    close = ((name, get_close_matches(name, known - {name}, 1, 0.9)) for name in names[:200])
    return next((f" ({quoted(name, 60)} is near {quoted(near[0], 60)})" for name, near in close if near), "")
