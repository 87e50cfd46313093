"""The configuration of a network from the shapes of its tensors, compared with what a config.json says of them."""

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from eridiff.errors import CheckpointError, ConfigError, quoted
from eridiff.models.autoencoder import PRESETS as AUTOENCODER_PRESETS
from eridiff.models.autoencoder import AutoencoderConfig
from eridiff.models.flux import FluxConfig
from eridiff.models.mmdit import MMDiTConfig
from eridiff.models.unet import RESIDUAL_BLOCKS, UNetConfig
from eridiff.weights.header import Checkpoint
from eridiff.weights.keymap import Layout, Shape

USUAL_SIZES = {"levels": 4, "hidden": 0, "mlp": 0, "middle_attends": 1}  # where only names are asked for
DESCRIPTIONS = {
    "flux": "a Flux", "mmdit": "a Stable Diffusion 3", "unet": "an SDXL", "vae": "an autoencoder", "clip": "a CLIP text encoder",
    "clip_g": "a CLIP-G text encoder", "t5": "a T5 text encoder",
}  # fmt: skip


class Shapes:
    """The shapes that a file gives the tensors of one network, by native name."""

    def __init__(self, family: str, layout: Layout, prefix: str, checkpoint: Checkpoint) -> None:
        self.family, self.layout, self.prefix, self.checkpoint = family, layout, prefix, checkpoint
        self.held = {name.removeprefix(prefix) for name in checkpoint.tensors if name.startswith(prefix)}

    def find(self, native: str, **sizes: int) -> Shape | None:
        """None where it is absent, or a lone number. Raises CheckpointError for one of size 0, as sizes are divided by sizes."""
        entry = self.layout.entry(native, USUAL_SIZES | sizes, self.held)
        shapes = {n: self.checkpoint.tensors[self.prefix + n].shape for n in entry.foreign if n in self.held}
        if len(shapes) != len(entry.foreign) and not (shapes and entry.operation == "alias"):
            return None
        empty = next((name for name, shape in shapes.items() if 0 in shape), None)
        if empty is not None:
            self.refuse(f"{quoted(self.prefix + empty)} of the shape {list(shapes[empty])} is empty")
        return entry.native_shape(list(shapes.values())) if all(shapes.values()) else None

    def need(self, native: str, dimensions: int = 2) -> Shape:
        """The shape of a tensor that every network of the family has; raises CheckpointError where the file lacks it."""
        found = self.find(native)
        if found is None or len(found) != dimensions:
            raise CheckpointError(
                f"{quoted(self.checkpoint.path)} looks like {DESCRIPTIONS[self.family].split(' ', 1)[1]} but has no "
                f"{dimensions}-dimensional tensor for {native}; it is incomplete"
            )
        return found

    def first(self, native: str, usual: int) -> int:
        """The first size of a tensor that a file may lack."""
        return (self.find(native) or (usual,))[0]

    def count(self, *patterns: str, **sizes: int) -> int:
        """One more than the highest number for which a pattern's tensor exists; a few may be missing between."""
        highest, number = 0, 0
        while number < highest + 8:
            number += 1
            if any(self.find(pattern.format(number - 1), **sizes) for pattern in patterns):
                highest = number
        return highest

    def heads(self, width: int, head: int) -> int:
        """How many heads of `head` features a width has; raises CheckpointError where it cannot be divided."""
        if width % head:
            self.refuse(f"a width of {width} is not a multiple of the {head} features of a head")
        return width // head

    def refuse(self, problem: str) -> NoReturn:
        """CheckpointError for tensors of which no network is made."""
        raise CheckpointError(f"{quoted(self.checkpoint.path)}: {problem}{self.checkpoint.remedy('download it again')}")


def flux_config(shapes: Shapes) -> FluxConfig:
    checkpoint = shapes.checkpoint
    hidden, in_channels = shapes.need("image_in.weight")
    head = shapes.first("double_blocks.0.image.k_norm.weight", 128)
    usual = (16, 56, 56) if head == 128 else (0, 0, head)
    axes = checkpoint.config.get("axes_dims_rope") or usual
    sizes = axes if isinstance(axes, list | tuple) and all(type(n) is int and n >= 0 for n in axes) else ()
    if axes is not usual and (len(sizes) != 3 or sum(sizes) != head or any(size % 2 for size in sizes)):
        needed = f"three even sizes are needed that add up to the {head} features of a head"
        _misstated(checkpoint, f"axes_dims_rope {quoted(axes)}, {needed}")
    found = FluxConfig(
        in_channels=in_channels,
        **_transformer_sizes(shapes, hidden, head, "double_blocks.0.image.mlp.0.weight"),
        out_channels=shapes.need("final.linear.weight")[0],
        double_depth=shapes.count("double_blocks.{}.image.proj.weight", "double_blocks.{}.text.proj.weight"),
        single_depth=shapes.count("single_blocks.{}.linear2.weight", "single_blocks.{}.modulation.weight"),
        rope_axes=tuple(axes),
        guidance=shapes.find("guidance_in.in_layer.weight") is not None,
    )
    _agree(_flux_said(found), checkpoint)
    return found


def mmdit_config(shapes: Shapes) -> MMDiTConfig:
    hidden, in_channels, *patch = shapes.need("image_in.weight", 4)
    positions = shapes.need("positions.table", 3)[1]
    side = math.isqrt(positions)
    if side * side != positions:
        shapes.refuse(f"its table of {positions} positions is not a square")
    depth = shapes.count("joint_blocks.{}.image.qkv.weight", "joint_blocks.{}.text.qkv.weight")
    norm = shapes.find("joint_blocks.0.text.k_norm.weight")
    told = shapes.checkpoint.config.get("attention_head_dim")  # which leaves no trace in shapes without the norm
    usual = told if type(told) is int and told > 0 and hidden % told == 0 else 64  # as all published
    found = MMDiTConfig(
        in_channels=in_channels,
        **_transformer_sizes(shapes, hidden, norm[0] if norm else usual, "joint_blocks.0.image.mlp.0.weight"),
        out_channels=shapes.need("final.linear.weight")[0] // 4,
        depth=depth,
        table_side=side,
        qk_norm=norm is not None,
        dual_blocks=tuple(i for i in range(depth) if shapes.find(f"joint_blocks.{i}.image.qkv2.weight")),
    )
    _agree(_mmdit_said(found) | {"patch_size": patch[0]}, shapes.checkpoint)
    return found


def _transformer_sizes(shapes: Shapes, hidden: int, head: int, mlp: str) -> dict[str, Any]:
    """What Flux and SD 3 have in common."""
    return {
        "pooled_width": shapes.need("pooled_in.in_layer.weight")[1],
        "text_width": shapes.need("text_in.weight")[1],
        "hidden": hidden,
        "heads": shapes.heads(hidden, head),
        "mlp_ratio": shapes.need(mlp)[0] / hidden,
    }


def unet_config(shapes: Shapes) -> UNetConfig:
    """Depths are counted one transformer at a time, as distilled SDXLs (SSD-1B, Vega) have others on the way up."""
    checkpoint = shapes.checkpoint
    channels, in_channels, *_ = shapes.need("conv_in.weight", 4)
    levels = shapes.count("down.{}.residual.0.conv1.weight")
    widths = [shapes.need(f"down.{level}.residual.0.conv1.weight", 4)[0] for level in range(levels)]

    def depths(way: str, level: int, transformers: int) -> tuple[int, ...]:
        names = [f"{way}.{level}.transformer.{i}.blocks.{{}}.norm1.weight" for i in range(transformers)]
        return tuple(shapes.count(name, levels=levels) for name in names)

    down = [depths("down", level, RESIDUAL_BLOCKS) for level in range(levels)]
    up = tuple(depths("up", level, RESIDUAL_BLOCKS + 1) for level in range(levels))
    middle = shapes.count("middle.transformer.0.blocks.{}.norm1.weight", levels=levels)
    attends = {"middle_attends": min(middle, 1)}
    residuals = [shapes.find(f"middle.residual.{i}.norm1.weight", **attends) is not None for i in range(2)]
    if not residuals[0] or any(len(set(level)) > 1 for level in down):
        raise CheckpointError(
            f"{quoted(checkpoint.path)} is a distilled SDXL of a kind that is not supported (KOALA and relatives): it has "
            "one block per stage, or no middle; SSD-1B and Vega are"
        )
    same = tuple((level[0],) * (RESIDUAL_BLOCKS + 1) for level in down)
    attention = next((level for level in range(levels) if down[level][0]), None)
    text = "middle.transformer.0" if attention is None else f"down.{attention}.transformer.0"
    found = UNetConfig(
        in_channels=in_channels,
        out_channels=shapes.need("conv_out.weight", 4)[0],
        channels=channels,
        channel_multipliers=tuple(width // channels for width in widths),
        transformer_depths=tuple(level[0] for level in down),
        up_depths=None if up == same else up,
        middle_depth=middle,
        middle_blocks=sum(residuals),
        head_width=_head_width(checkpoint, widths, [level[0] for level in down]),
        text_width=shapes.need(f"{text}.blocks.0.cross_attention.k.weight")[1],
        vector_width=shapes.need("vector_in.in_layer.weight")[1],
        guidance=shapes.find("guidance_in.weight") is not None,
    )
    _agree(_unet_said(found), checkpoint)
    _agree_on_depths(found, checkpoint)
    return found


def _head_width(checkpoint: Checkpoint, widths: list[int], depths: list[int]) -> int:
    """64, or what a config.json says; diffusers' `attention_head_dim` is the number of heads."""
    stated = checkpoint.config.get("num_attention_heads") or checkpoint.config.get("attention_head_dim") or []
    heads = [stated] * len(widths) if type(stated) is int else stated
    if not isinstance(heads, list) or not all(type(count) is int and count > 0 for count in heads):
        _misstated(checkpoint, f"the heads {quoted(stated)}, not their numbers")
    pairs = list(zip(widths, heads, strict=False))
    used = [pair for pair, depth in zip(pairs, depths, strict=False) if depth] or pairs[-1:]
    found = {width // count if width % count == 0 else 0 for width, count in used} or {64}
    if len(found) > 1 or 0 in found:
        _misstated(checkpoint, f"{quoted(stated)} heads for the widths {widths}; a UNet here has heads of one width")
    return found.pop()


def _agree_on_depths(found: UNetConfig, checkpoint: Checkpoint) -> None:
    """Of stages with transformers alone: for the others the number in a config.json has no meaning."""
    down = [[depth] * RESIDUAL_BLOCKS for depth in found.transformer_depths]
    ways = {
        "transformer_layers_per_block": down,
        "reverse_transformer_layers_per_block": [list(depths) for depths in reversed(found.depths_up)],
    }
    for key, own in ways.items():
        stated = checkpoint.config.get(key)
        told = stated if isinstance(stated, list) else [stated] * found.levels
        full = [t if isinstance(t, list) else [t] * len(depths) for t, depths in zip(told, own, strict=False)]
        if stated is not None and (
            len(told) != found.levels or any(t != depths for t, depths in zip(full, own, strict=True) if any(depths))
        ):
            _contradiction(checkpoint, key, stated, own)


def autoencoder_config(shapes: Shapes) -> AutoencoderConfig:
    checkpoint = shapes.checkpoint
    channels, in_channels = shapes.need("encoder.conv_in.weight", 4)[:2]
    levels = shapes.count("encoder.down.{}.block.0.conv1.weight")
    widths = [shapes.first(f"encoder.down.{level}.block.0.conv1.weight", 0) for level in range(levels)]
    latent_channels = shapes.need("decoder.conv_in.weight", 4)[1]
    published = AUTOENCODER_PRESETS["sdxl" if latent_channels == 4 else "flux"]
    statistics = {}
    for key, usual in (("scaling_factor", published.scale), ("shift_factor", published.shift)):
        value = checkpoint.config.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            _misstated(checkpoint, f"{key} {quoted(value)}, not a number")
        statistics[key] = usual if value is None else float(value)
    found = AutoencoderConfig(
        channels=channels,
        channel_multipliers=tuple(width // channels for width in widths),
        residual_blocks=shapes.count("encoder.down.0.block.{}.conv1.weight"),
        latent_channels=latent_channels,
        scale=statistics["scaling_factor"],
        shift=statistics["shift_factor"],
        quant_convolutions=shapes.find("quant_conv.weight") is not None,
        stated="scaling_factor" in checkpoint.config,
    )
    _agree(_autoencoder_said(found) | {"in_channels": in_channels}, checkpoint)
    return found


def clip_config(shapes: Shapes) -> dict[str, Any]:
    config = shapes.checkpoint.config
    whole = config.get("text_config")  # of a CLIP with its vision tower
    stated = whole if isinstance(whole, dict) else config
    vocabulary, width = shapes.need("text_model.embeddings.token_embedding.weight")
    projection = shapes.find("text_projection.weight")
    found = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes.first("text_model.encoder.layers.0.mlp.fc1.weight", 4 * width),
        "projection_dim": (projection or (width,))[0],
        "num_hidden_layers": shapes.count("text_model.encoder.layers.{}.mlp.fc1.weight"),
        "max_position_embeddings": shapes.first("text_model.embeddings.position_embedding.weight", 77),
    }
    # a text_config often repeats transformers' default of the projection, the whole CLIP's own is beside it
    compared = {k: v for k, v in found.items() if k != "projection_dim" or (projection and stated is not whole)}
    _agree(compared, shapes.checkpoint, stated)
    return found | {
        # 64 wide in every CLIP; 0 where that cannot be
        "num_attention_heads": stated.get("num_attention_heads") or (0 if width % 64 else width // 64),
        # the activation is not in the file: OpenAI's CLIP-L has the quick one, OpenCLIP's the exact one
        "hidden_act": stated.get("hidden_act") or ("quick_gelu" if width == 768 else "gelu"),
    }


def t5_config(shapes: Shapes) -> dict[str, Any]:
    first, second = (f"encoder.block.{i}.layer.0.SelfAttention." for i in (0, 1))
    if shapes.find(second + "relative_attention_bias.weight"):
        raise CheckpointError(
            f"{quoted(shapes.checkpoint.path)} is a UMT5 (each of its layers has a relative_attention_bias), which no Flux and no "
            "SD 3 reads; give T5 v1.1 XXL"
        )
    vocabulary, width = shapes.need("shared.weight")
    bias = first + "relative_attention_bias.weight"
    buckets, heads = shapes.need(bias) if shapes.find(bias) else (32, 64)
    found = {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes.first(first + "q.weight", heads * 64) // heads,
        "d_ff": shapes.first("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 0),
        "num_layers": shapes.count("encoder.block.{}.layer.0.SelfAttention.q.weight"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }
    _agree(found, shapes.checkpoint)
    return found


def _agree(found: Mapping[str, Any], checkpoint: Checkpoint, stated: Mapping[str, Any] | None = None) -> None:
    """Raises ConfigError where a config.json says other sizes than the tensors have; null counts as absent."""
    told = checkpoint.config if stated is None else stated
    for key, value in found.items():
        if told.get(key) is not None and told[key] != value:
            _contradiction(checkpoint, key, told[key], value)


# what else a config.json may set, which leaves no trace in shapes, and the one value that the networks here compute with
FIXED: dict[str, dict[str, Any]] = {
    "unet": {
        "norm_num_groups": 32, "norm_eps": 1e-5, "act_fn": "silu", "freq_shift": 0, "flip_sin_to_cos": True,
        "mid_block_scale_factor": 1, "downsample_padding": 1, "resnet_time_scale_shift": "default", "center_input_sample": False,
        "resnet_out_scale_factor": 1.0, "attention_type": "default",
    },
    "vae": {"norm_num_groups": 32, "act_fn": "silu", "mid_block_add_attention": True},
    "mmdit": {"patch_size": 2},
}  # fmt: skip


# the same of settings that a network may be trained with here, and that images are not generated with
DRAWN: dict[str, dict[str, Any]] = {"unet": {"addition_time_embed_dim": 256}}


def check_fixed(
    network: str, source: object, config: Mapping[str, Any], fixed: Mapping[str, Mapping[str, Any]] = FIXED
) -> None:
    """Raises ConfigError for a setting that would change the numbers and that no published network here has."""
    for key, value in fixed.get(network, {}).items():
        stated = config.get(key)
        if stated is not None and stated != value:
            raise ConfigError(
                f"{quoted(source)}: {key} is {quoted(stated, 60)}, and {DESCRIPTIONS[network]} here computes with "
                f"{value!r} alone"
            )


def _contradiction(checkpoint: Checkpoint, key: str, stated: Any, found: Any) -> None:
    told = stated if isinstance(stated, int | float) else quoted(stated, 60)
    remedy = checkpoint.remedy("they are of two models")
    _misstated(checkpoint, f"{key} {told}, the tensors say {found}{remedy}")


def _misstated(checkpoint: Checkpoint, what: str) -> NoReturn:
    raise ConfigError(f"{quoted(checkpoint.path)}: {checkpoint.config_name} says {what}")


# the sizes as a config.json of diffusers says them: compared when a file is read, written when one is made -------------------


def _transformer_said(config: FluxConfig | MMDiTConfig, depth: int) -> dict[str, Any]:
    return {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": depth,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.hidden // config.heads,
        "joint_attention_dim": config.text_width,
        "pooled_projection_dim": config.pooled_width,
    }


def _flux_said(config: FluxConfig) -> dict[str, Any]:
    return _transformer_said(config, config.double_depth) | {
        "num_single_layers": config.single_depth,
        "guidance_embeds": config.guidance,
        "patch_size": 1,
    }


def _mmdit_said(config: MMDiTConfig) -> dict[str, Any]:
    return _transformer_said(config, config.depth) | {
        "caption_projection_dim": config.hidden,
        "pos_embed_max_size": config.table_side,
        "dual_attention_layers": list(config.dual_blocks),
    }


def _unet_said(config: UNetConfig) -> dict[str, Any]:
    return {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": config.widths,
        "cross_attention_dim": config.text_width,
        "projection_class_embeddings_input_dim": config.vector_width,
        "layers_per_block": RESIDUAL_BLOCKS,
        "time_cond_proj_dim": 256 if config.guidance else None,
    }


def _autoencoder_said(config: AutoencoderConfig) -> dict[str, Any]:
    return {
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "block_out_channels": [config.channels * multiplier for multiplier in config.channel_multipliers],
        "layers_per_block": config.residual_blocks,
        "use_quant_conv": config.quant_convolutions,
        "use_post_quant_conv": config.quant_convolutions,
    }


def config_json(network: str, config: Any) -> dict[str, Any]:
    """The config.json with which diffusers builds a flux, mmdit, unet or vae of this configuration.

    Raises ConfigError for sizes that diffusers' settings cannot say.
    """
    fixed = FIXED.get(network, {})
    if network in ("flux", "mmdit") and config.mlp_ratio != 4:
        raise ConfigError(
            f"diffusers builds {DESCRIPTIONS[network]} with MLPs 4 times as wide as the rest, not {config.mlp_ratio:g}; write the "
            "original layout"
        )
    if network == "flux":
        return {"_class_name": "FluxTransformer2DModel", **_flux_said(config), "axes_dims_rope": list(config.rope_axes)}
    if network == "mmdit":
        norm = {"qk_norm": "rms_norm" if config.qk_norm else None, "sample_size": 128}
        return {"_class_name": "SD3Transformer2DModel", **_mmdit_said(config), **norm, **fixed}
    if network == "vae":
        levels = len(config.channel_multipliers)
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
        statistics = {"scaling_factor": config.scale, "shift_factor": config.shift or None}
        sizes = {**_autoencoder_said(config), "out_channels": 3, "sample_size": 1024}
        return {"_class_name": "AutoencoderKL", **sizes, **blocks, **statistics, **fixed}
    depths, middle = list(config.transformer_depths), (config.middle_blocks, config.middle_depth)
    mixed = any(0 in level and any(level) for level in config.depths_up)
    if mixed or middle not in ((1, 0), (2, depths[-1] or config.middle_depth)) or middle == (2, 0):
        raise ConfigError(
            f"diffusers builds no UNet with {middle[0]} blocks and the depth {middle[1]} in the middle, and the depths {depths} down "
            f"and {config.depths_up} up; write the original layout"
        )
    # the middle reads the last, which a stage without transformers does not
    depths[-1] = depths[-1] or config.middle_depth
    kinds = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.transformer_depths]
    upward = [list(level) for level in reversed(config.depths_up)]
    return {
        "_class_name": "UNet2DConditionModel", **_unet_said(config), **fixed,
        "down_block_types": kinds,
        "mid_block_type": "UNetMidBlock2DCrossAttn" if config.middle_depth else "UNetMidBlock2D",
        "up_block_types": ["CrossAttnUpBlock2D" if any(level) else "UpBlock2D" for level in upward],
        "transformer_layers_per_block": [depth or 1 for depth in depths],
        "reverse_transformer_layers_per_block": None if config.up_depths is None else upward,
        "attention_head_dim": [width // config.head_width for width in config.widths],
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "use_linear_projection": True, "sample_size": 128,
    }  # fmt: skip
