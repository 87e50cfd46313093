"""What is in a checkpoint: family, layout, prefix and configuration, from names first, then shapes, then metadata."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any

from eridiff.errors import CheckpointError, ConfigError
from eridiff.models.autoencoder import PRESETS as AUTOENCODER_PRESETS
from eridiff.models.autoencoder import AutoencoderConfig
from eridiff.models.flux import FluxConfig
from eridiff.models.mmdit import MMDiTConfig
from eridiff.models.unet import UNetConfig
from eridiff.weights.header import Checkpoint
from eridiff.weights.keymap import Layout, Shape, key_map

ShapeOf = Callable[[str], Shape | None]


def sizes_of(config: Any) -> dict[str, Any]:
    """What the expressions of a key map may name: the fields and properties of a network's configuration."""
    if isinstance(config, Mapping):
        return dict(config)
    names = [
        *(f.name for f in fields(config)),
        *(n for n, v in vars(type(config)).items() if isinstance(v, property)),
    ]
    return {name: getattr(config, name) for name in names}


@dataclass(frozen=True)
class Component:
    """One network inside a checkpoint."""

    network: str  # flux, mmdit, unet, vae, clip, clip_g or t5
    layout: Layout
    prefix: str
    checkpoint: Checkpoint
    config: Any  # FluxConfig, MMDiTConfig, UNetConfig, AutoencoderConfig, or for a text encoder a dict of transformers' names
    old: bool = False  # names of older writers
    notices: tuple[str, ...] = ()
    keys: frozenset[str] = field(default=frozenset())  # of the file, this component's, prefix removed
    markers: frozenset[str] = field(default=frozenset())  # names of the file that only say how to sample

    @property
    def sizes(self) -> dict[str, Any]:
        """What the expressions of a key map may name."""
        return sizes_of(self.config)


# (pattern of a name, what the file then is): whatever else it holds
NEVER_LOADED = [
    (
        r"^edm_(mean|std)$|^edm_vpred\.",
        "trained with EDM's preconditioning (Playground 2.5 and relatives), which is not supported",
    ),
    (
        r"lora_(A|B|up|down)\b|^lora_(unet|te\d?|transformer)_|\.(lokr_w1|hada_w1_a)",
        "a LoRA, not a model; give the model it was made for",
    ),
    (
        r"weight\.(absmax|quant_map|quant_state)|\.(qweight|qzeros)$",
        "quantised to 4 bits (NF4, GPTQ or AWQ), which is not supported; use the bf16 or fp8 file",
    ),
]
# names that belong to no network and hold nothing that is needed: what SDXL finetunes and sgm's training add
MARKERS = ("v_pred", "ztsnr", "denoiser.sigmas")
# the same for files in which no network is found
REFUSED = [
    (
        r"^(redux_up|redux_down|image_proj)\.",
        "an image-prompt adapter (Redux or IP-Adapter), which eridiff does not load",
    ),
    (r"control_model\.|controlnet_|input_hint_block\.", "a ControlNet, which eridiff does not load"),
    (r"single_stream_modulation\.lin\.", "FLUX.2, which is not supported"),
    (r"distilled_guidance_layer\.", "Chroma, which is not supported"),
    (
        r"double_stream_blocks\.|patchify_proj\.|cap_embedder\.|txt_in\.individual_token_refiner|head\.modulation",
        "a network of another family, which is not supported",
    ),
    (r"motion_modules\.", "an AnimateDiff module, which is not supported"),
    (r"string_to_param|^emb_params$", "a textual inversion, not a model"),
]


def detect(checkpoint: Checkpoint) -> list[Component]:
    """The components of a checkpoint, at most one a network; CheckpointError when there is none or a name is unclear."""
    names = set(checkpoint.tensors)
    for pattern, sentence in NEVER_LOADED:
        if any(re.search(pattern, name) for name in names):
            raise CheckpointError(f"{checkpoint.path} is {sentence}.")
    found = [component for network in FAMILIES for component in _candidates(network, checkpoint, names)]
    if not found:
        raise CheckpointError(f"{checkpoint.path} {_refusal(checkpoint, list(checkpoint.tensors))}")
    components = [_with_keys(component, found, names) for component in found]
    markers = names & set(MARKERS)
    components = [replace(c, keys=c.keys - markers, markers=frozenset(markers)) for c in components]
    claimed = markers | {component.prefix + name for component in components for name in component.keys}
    if names - claimed:
        raise CheckpointError(f"{checkpoint.path} {_refusal(checkpoint, sorted(names - claimed))}")
    return components


def component_of(checkpoint: Checkpoint, *networks: str) -> Component:
    """The one component of a kind (or of the first kind that is there); CheckpointError says what is there instead."""
    found = detect(checkpoint)
    for component in found:
        if component.network in networks:
            return component
    held = ", ".join(DESCRIPTIONS[component.network] for component in found)
    wanted = " or ".join(DESCRIPTIONS[network] for network in networks)
    raise CheckpointError(f"{checkpoint.path} holds {held}, not {wanted}; give it under its own option")


def _candidates(family: str, checkpoint: Checkpoint, names: set[str]) -> list[Component]:
    signature, configure = FAMILIES[family]
    found = []
    for layout in key_map(family).layouts.values():
        for prefix in layout.prefixes:
            for old in (False, True):
                shape_of = _shapes(layout, prefix, checkpoint, old)
                if all(shape_of(native) for native in signature):
                    found.append((layout, prefix, shape_of, old))
    found = [item for i, item in enumerate(found) if not any(item[:2] == other[:2] for other in found[:i])]
    result = []
    for layout, prefix, shape_of, old in found:
        try:
            config = configure(shape_of, checkpoint)
        except (IndexError, ZeroDivisionError, TypeError, ValueError) as error:  # too few dimensions, or of size 0
            what = f"{checkpoint.path} has the names of {DESCRIPTIONS[family]} and shapes of none"
            raise CheckpointError(f"{what} ({error}); download it again") from None
        network = _clip_kind(layout, prefix, config, checkpoint) if family == "clip" else family
        result.append(Component(network, layout, prefix, checkpoint, _declared(network, config, checkpoint), old))
    for network, count in Counter(c.network for c in result).items():
        if count > 1:
            places = " and ".join(f"'{c.prefix}' ({c.layout.name})" for c in result if c.network == network)
            raise CheckpointError(f"{checkpoint.path} holds {DESCRIPTIONS[network]} twice, under the prefixes {places}")
    return result


def _clip_kind(layout: Layout, prefix: str, config: Mapping[str, Any], checkpoint: Checkpoint) -> str:
    """clip (OpenAI's CLIP-L) or clip_g (OpenCLIP's bigG): by place and names, by what the file says, by depth."""
    if (
        layout.name == "openclip" or "clip_g" in prefix or checkpoint.path.name == "text_encoder_2"
    ):  # of diffusers' folders
        return "clip_g"
    if prefix:
        return "clip"
    declared = '"clip_g"' in checkpoint.metadata.get("eridiff.config", "")
    return "clip_g" if declared or config["num_hidden_layers"] > 24 else "clip"  # 12 and 32


def _shapes(layout: Layout, prefix: str, checkpoint: Checkpoint, old: bool) -> ShapeOf:
    """A function from a native name to the shape that the file gives it, None where it is absent."""

    def shape_of(native: str) -> Shape | None:
        entry = layout.entry(native, {"levels": 4, "hidden": 0, "mlp": 0}, old)
        present = [name for name in entry.foreign if prefix + name in checkpoint.tensors]
        if len(present) != len(entry.foreign) and not (present and entry.operation == "alias"):
            return None
        return entry.native_shape([checkpoint.tensors[prefix + name].shape for name in present])

    return shape_of


def _count(shape_of: ShapeOf, *patterns: str) -> int:
    """One more than the highest number for which a pattern's tensor exists."""
    return max((i + 1 for i in range(200) for pattern in patterns if shape_of(pattern.format(i))), default=0)


def _needed(shape_of: ShapeOf, checkpoint: Checkpoint, family: str, name: str, dimensions: int = 2) -> Shape:
    found = shape_of(name)
    if found is None or len(found) != dimensions:
        raise CheckpointError(
            f"{checkpoint.path} looks like {DESCRIPTIONS[family].split(' ', 1)[1]} but has no {dimensions}-dimensional "
            f"tensor for {name}; it is incomplete"
        )
    return found


def _flux_config(shape_of: ShapeOf, checkpoint: Checkpoint) -> FluxConfig:
    def shape(name: str) -> Shape:
        return _needed(shape_of, checkpoint, "flux", name)

    hidden, in_channels = shape("image_in.weight")
    head = (shape_of("double_blocks.0.image.k_norm.weight") or (128,))[0]
    axes = checkpoint.config.get("axes_dims_rope") or ((16, 56, 56) if head == 128 else (0, 0, head))
    if not isinstance(axes, list | tuple) or not all(type(axis) is int and axis >= 0 for axis in axes):
        raise ConfigError(f"{checkpoint.path}: config.json says axes_dims_rope {axes!r}, three sizes are needed")
    found = FluxConfig(
        in_channels=in_channels,
        out_channels=shape("final.linear.weight")[0],
        pooled_width=shape("pooled_in.in_layer.weight")[1],
        text_width=shape("text_in.weight")[1],
        hidden=hidden,
        heads=hidden // head,
        mlp_ratio=shape("double_blocks.0.image.mlp.0.weight")[0] / hidden,
        double_depth=_count(shape_of, "double_blocks.{}.image.proj.weight", "double_blocks.{}.text.proj.weight"),
        single_depth=_count(shape_of, "single_blocks.{}.linear2.weight", "single_blocks.{}.modulation.weight"),
        rope_axes=tuple(axes),
        guidance=shape_of("guidance_in.in_layer.weight") is not None,
    )
    stated = {
        "in_channels": found.in_channels,
        "num_layers": found.double_depth,
        "num_single_layers": found.single_depth,
        "num_attention_heads": found.heads,
        "attention_head_dim": found.hidden // found.heads,
        "joint_attention_dim": found.text_width,
        "pooled_projection_dim": found.pooled_width,
        "guidance_embeds": found.guidance,
    }
    _agree(stated, checkpoint)
    return found


def _mmdit_config(shape_of: ShapeOf, checkpoint: Checkpoint) -> MMDiTConfig:
    def shape(name: str, dimensions: int = 2) -> Shape:
        return _needed(shape_of, checkpoint, "mmdit", name, dimensions)

    hidden, in_channels, *_ = shape("image_in.weight", 4)
    positions = shape("positions.table", 3)[1]
    side = math.isqrt(positions)
    if side * side != positions:
        raise CheckpointError(f"{checkpoint.path}: its table of {positions} positions is no square; download it again")
    depth = _count(shape_of, "joint_blocks.{}.image.qkv.weight", "joint_blocks.{}.text.qkv.weight")
    norm = shape_of("joint_blocks.0.text.k_norm.weight")
    head = norm[0] if norm else 64  # 64 wide in every published one
    found = MMDiTConfig(
        in_channels=in_channels,
        out_channels=shape("final.linear.weight")[0] // 4,
        pooled_width=shape("pooled_in.in_layer.weight")[1],
        text_width=shape("text_in.weight")[1],
        hidden=hidden,
        heads=hidden // head,
        mlp_ratio=shape("joint_blocks.0.image.mlp.0.weight")[0] / hidden,
        depth=depth,
        table_side=side,
        qk_norm=shape_of("joint_blocks.0.text.k_norm.weight") is not None,
        dual_blocks=tuple(i for i in range(depth) if shape_of(f"joint_blocks.{i}.image.qkv2.weight")),
    )
    stated = {
        "in_channels": found.in_channels,
        "num_layers": found.depth,
        "num_attention_heads": found.heads,
        "attention_head_dim": head,
        "joint_attention_dim": found.text_width,
        "pooled_projection_dim": found.pooled_width,
        "caption_projection_dim": found.hidden,
        "pos_embed_max_size": found.table_side,
        "dual_attention_layers": list(found.dual_blocks),
    }
    _agree(stated, checkpoint)
    return found


def _unet_config(shape_of: ShapeOf, checkpoint: Checkpoint) -> UNetConfig:
    def shape(name: str, dimensions: int = 2) -> Shape:
        return _needed(shape_of, checkpoint, "unet", name, dimensions)

    channels, in_channels, *_ = shape("conv_in.weight", 4)
    levels = _count(shape_of, "down.{}.residual.0.conv1.weight")
    widths = [shape(f"down.{level}.residual.0.conv1.weight", 4)[0] for level in range(levels)]
    block = "transformer.0.blocks.{}.norm1.weight"
    return UNetConfig(
        in_channels=in_channels,
        out_channels=shape("conv_out.weight", 4)[0],
        channels=channels,
        channel_multipliers=tuple(width // channels for width in widths),
        transformer_depths=tuple(_count(shape_of, f"down.{level}.{block}") for level in range(levels)),
        middle_depth=_count(shape_of, f"middle.{block}"),
        text_width=shape("middle.transformer.0.blocks.0.cross_attention.k.weight")[1],
        vector_width=shape("vector_in.in_layer.weight")[1],
        guidance=shape_of("guidance_in.weight") is not None,
    )


def _agree(found: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Raises ConfigError where a folder's config.json says other sizes than the tensors have."""
    for key, value in found.items():
        if key in checkpoint.config and checkpoint.config[key] != value:
            raise ConfigError(
                f"{checkpoint.path}: config.json says {key} {checkpoint.config[key]!r}, the tensors say {value}; "
                "they are of two models"
            )


def _autoencoder_config(shape_of: ShapeOf, checkpoint: Checkpoint) -> AutoencoderConfig:
    channels = (shape_of("encoder.conv_in.weight") or (128,))[0]
    levels = _count(shape_of, "encoder.down.{}.block.0.conv1.weight")
    widths = [(shape_of(f"encoder.down.{level}.block.0.conv1.weight") or (0,))[0] for level in range(levels)]
    latent_channels = (shape_of("decoder.conv_in.weight") or (0, 16))[1]
    published = AUTOENCODER_PRESETS["sdxl" if latent_channels == 4 else "flux"]
    return AutoencoderConfig(
        channels=channels,
        channel_multipliers=tuple(width // channels for width in widths),
        residual_blocks=_count(shape_of, "encoder.down.0.block.{}.conv1.weight"),
        latent_channels=latent_channels,
        scale=float(checkpoint.config.get("scaling_factor") or published.scale),
        shift=float(checkpoint.config.get("shift_factor") or published.shift),
        quant_convolutions=shape_of("quant_conv.weight") is not None,
    )


def _clip_config(shape_of: ShapeOf, checkpoint: Checkpoint) -> dict[str, Any]:
    vocabulary, width = shape_of("text_model.embeddings.token_embedding.weight") or (49408, 768)
    positions = (shape_of("text_model.embeddings.position_embedding.weight") or (77,))[0]
    mlp = (shape_of("text_model.encoder.layers.0.mlp.fc1.weight") or (4 * width,))[0]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": mlp,
        "projection_dim": (shape_of("text_projection.weight") or (width,))[0],
        "num_hidden_layers": _count(shape_of, "text_model.encoder.layers.{}.mlp.fc1.weight"),
        "num_attention_heads": checkpoint.config.get("num_attention_heads") or width // 64,  # 64 wide in every CLIP
        "max_position_embeddings": positions,
        # the activation is not in the file: OpenAI's CLIP-L has the quick one, OpenCLIP's the exact one
        "hidden_act": checkpoint.config.get("hidden_act") or ("quick_gelu" if width == 768 else "gelu"),
    }


def _t5_config(shape_of: ShapeOf, checkpoint: Checkpoint) -> dict[str, Any]:
    vocabulary, width = shape_of("shared.weight") or (32128, 4096)
    first = "encoder.block.0.layer.0.SelfAttention."
    buckets, heads = shape_of(first + "relative_attention_bias.weight") or (32, 64)
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": (shape_of(first + "q.weight") or (heads * 64,))[0] // heads,
        "d_ff": (shape_of("encoder.block.0.layer.1.DenseReluDense.wi_0.weight") or (0,))[0],
        "num_layers": _count(shape_of, "encoder.block.{}.layer.0.SelfAttention.q.weight"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def _declared(network: str, config: Any, checkpoint: Checkpoint) -> Any:
    """The configuration with what the file's own metadata says; shapes were only evidence."""
    text = checkpoint.metadata.get("eridiff.config")
    if text is None:
        return _checked(network, config, checkpoint)
    try:
        given = json.loads(text).get(network, {})
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
        return {**config, **given} if isinstance(config, dict) else replace(config, **given)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{checkpoint.path}: the metadata eridiff.config is not a configuration of {network}: {error}"
        ) from None


def _checked(network: str, config: Any, checkpoint: Checkpoint) -> Any:
    if network == "flux" and config.rope_axes[0] == 0:
        raise ConfigError(
            f"{checkpoint.path}: heads of {sum(config.rope_axes)} features are in no published Flux; "
            "give rope_axes in the metadata eridiff.config"
        )
    return config


def _with_keys(component: Component, found: list[Component], names: set[str]) -> Component:
    """The component with its names of the file: each name goes to the longest prefix that it has."""
    longer = [c.prefix for c in found if c.prefix != component.prefix and c.prefix.startswith(component.prefix)]
    own = frozenset(
        name.removeprefix(component.prefix)
        for name in names
        if name.startswith(component.prefix) and not any(name.startswith(prefix) for prefix in longer)
    )
    return replace(component, keys=own)


def _refusal(checkpoint: Checkpoint, names: list[str]) -> str:
    """What the tensors `names`, which belong to no part that is known, make of the file."""
    for pattern, sentence in REFUSED:
        if any(re.search(pattern, name) for name in names):
            return f"is {sentence}."
    context = next((t.shape for n, t in checkpoint.tensors.items() if n.endswith("attn2.to_k.weight")), None)
    if context is not None:
        family = {
            768: "Stable Diffusion 1.x",
            1024: "Stable Diffusion 2.x",
            2048: "a part of an SDXL",
            1280: "a part of an SDXL refiner",
        }
        return f"is {family.get(context[-1], 'a UNet of unknown kind')}, which eridiff does not load."
    near = _nearest_signature(names)
    if len(names) < len(checkpoint.tensors):
        return f"holds {len(names)} tensors that belong to no part of a model, the first is '{names[0]}'{near}."
    return f"is no model that eridiff knows: its {len(names)} tensors begin with '{names[0]}'{near}."


def _nearest_signature(names: list[str]) -> str:
    """A hint for misspelt names: one that is almost a name by which a network is told."""
    known = [
        layout.entry(native, {"levels": 4, "hidden": 0, "mlp": 0}).foreign[0]
        for network, (signature, _) in FAMILIES.items()
        for layout in key_map(network).layouts.values()
        for native in signature
    ]
    close = ((name, get_close_matches(name, known, 1, 0.9)) for name in names[:200])
    return next((f" ('{name}' is near '{matches[0]}')" for name, matches in close if matches), "")


FAMILIES: dict[str, tuple[tuple[str, ...], Callable[[ShapeOf, Checkpoint], Any]]] = {
    "flux": (("double_blocks.0.image.k_norm.weight", "image_in.weight"), _flux_config),
    "mmdit": (("joint_blocks.0.text.qkv.weight", "positions.table"), _mmdit_config),
    "unet": (("vector_in.in_layer.weight", "middle.residual.0.norm1.weight"), _unet_config),
    "vae": (("encoder.conv_in.weight", "encoder.middle.attention.q.weight"), _autoencoder_config),
    "clip": (
        ("text_model.embeddings.token_embedding.weight", "text_model.encoder.layers.0.mlp.fc1.weight"),
        _clip_config,
    ),
    "t5": (("shared.weight", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"), _t5_config),
}
DESCRIPTIONS = {
    "flux": "a Flux", "mmdit": "a Stable Diffusion 3", "unet": "an SDXL", "vae": "an autoencoder", "clip": "a CLIP text encoder",
    "clip_g": "a CLIP-G text encoder", "t5": "a T5 text encoder",
}  # fmt: skip
