"""What `benchmarks/gpu.py` asks: our networks and diffusers' with the same random weights, at published and at tiny size.

A case is a dictionary of networks by the names of their key maps, so that diffusers' get our tensors through these maps,
without a copy but where a map exchanges halves.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from eridiff.memory.strips import decode_in_strips
from eridiff.models.autoencoder import Autoencoder, AutoencoderConfig
from eridiff.models.flux import Flux, FluxConfig, position_ids, unpatchify
from eridiff.models.mmdit import MMDiT, MMDiTConfig
from eridiff.models.unet import UNet, UNetConfig, size_vector
from eridiff.weights.detect import sizes_of
from eridiff.weights.keymap import key_map

Networks = dict[str, Any]
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """`prepare` and `step` ask our networks, `ask_theirs` diffusers' for the same numbers."""

    name: str
    what: str
    shapes: dict[str, tuple[int, ...]]
    ours: Callable[[], Networks]
    theirs: Callable[[], Networks]
    prepare: Callable[[Networks, Inputs], Any]
    step: Callable[[Networks, Inputs, Any], Tensor]
    ask_theirs: Callable[[Networks, Inputs], Tensor]
    seconds: float  # what it costs without compilation
    compiling: tuple[float, float]  # what compilation costs: eridiff's, diffusers'
    apart: bool = True  # whether a step is asked without its preparation, as in a run of many
    further: Mapping[str, Callable[[Networks, Inputs], Tensor]] = field(default_factory=dict)  # eridiff's other ways

    def forward(self, networks: Networks, inputs: Inputs) -> Tensor:
        return self.step(networks, inputs, self.prepare(networks, inputs))

    def inputs(self, device: torch.device, dtype: torch.dtype) -> Inputs:
        """Random, of a fixed seed; times and guidance in float32, as the samplers give them."""
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(1)
        return {
            name: torch.randn(shape, generator=generator, device=device, dtype=dtype)
            for name, shape in self.shapes.items()
        }

    def flops(self) -> int:
        """Of one forward, two a multiply-add, in linear layers, convolutions and attention; counted on the meta device."""
        meta = torch.device("meta")
        with torch.no_grad(), meta, FlopCounterMode(display=False) as counter:
            self.forward(on_meta(self.ours), self.inputs(meta, torch.bfloat16))
        return counter.get_total_flops()


def on_meta(build: Callable[[], Networks]) -> Networks:
    with torch.device("meta"):
        return {
            name: module.bfloat16().eval().requires_grad_(False) for name, module in build().items() if module is not None
        }  # fmt: skip


@torch.no_grad()
def random_weights(build: Callable[[], Networks], device: torch.device, dtype: torch.dtype) -> Networks:
    """Matrices of a scale that keeps activations finite, gains one, biases zero, made where they stay."""
    generator, networks = torch.Generator(device).manual_seed(0), on_meta(build)
    for module in networks.values():
        state = {}
        for name, tensor in module.state_dict().items():
            state[name] = made = torch.empty(tensor.shape, device=device, dtype=dtype)
            if made.ndim > 1:
                made.normal_(0, made[0].numel() ** -0.5, generator=generator)
            else:
                made.fill_(float(name.endswith("weight")))
        module.load_state_dict(state, assign=True)
    return networks


def twin(build: Callable[[], Networks], networks: Networks) -> Networks:
    """The same networks again, of the same tensors."""
    others = on_meta(build)
    for name, module in others.items():
        module.load_state_dict(networks[name].state_dict(), assign=True)
    return others


def in_diffusers(build: Callable[[], Networks], networks: Networks) -> Networks:
    """diffusers' networks of our tensors."""
    others = on_meta(build)
    for name, module in others.items():
        layout, own = key_map(name).layouts["diffusers"], networks[name]
        module.load_state_dict(layout.to_foreign(own.state_dict(), sizes_of(own.config)), assign=True)
        module.requires_grad_(False)
    return others


@cache
def constant(device: torch.device, *values: float) -> Tensor:
    """Made once, as pipelines do."""
    return torch.tensor(values, device=device)


def times(inputs: Inputs, values: list[float]) -> Tensor:
    return constant(inputs["text"].device, *values)


@cache
def their_ids(grid: tuple[int, int], text: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of the image's tokens and of the text's."""
    return position_ids(grid, device=device).float(), torch.zeros(text, 3, device=device)


# the families ---------------------------------------------------------------------------------------------------------


def their_autoencoder(config: AutoencoderConfig) -> Any:
    from diffusers import AutoencoderKL

    levels, quant = config.levels, config.quant_convolutions
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.channels * m for m in config.channel_multipliers), use_quant_conv=quant,
        layers_per_block=config.residual_blocks, latent_channels=config.latent_channels, use_post_quant_conv=quant,
    )  # fmt: skip


def flux_case(
    name: str, what: str, config: FluxConfig, side: int, text: int, seconds: float, compiling: tuple[float, float],
    decoded: AutoencoderConfig | None = None, steps: int = 1,
) -> Case:  # fmt: skip
    """One evaluation; with an autoencoder a whole image of `steps` steps without shift. `side` in tokens."""
    levels = (
        [1 - i / steps for i in range(steps)] if decoded else [0.5]
    )  # 500 and 4000 are exact in bfloat16, in which diffusers takes them
    grid = (side, side)

    def theirs() -> Networks:
        from diffusers import FluxTransformer2DModel

        network = FluxTransformer2DModel(
            patch_size=1, in_channels=config.in_channels, out_channels=config.out_channels, num_layers=config.double_depth,
            num_single_layers=config.single_depth, attention_head_dim=config.hidden // config.heads,
            num_attention_heads=config.heads, joint_attention_dim=config.text_width, guidance_embeds=config.guidance,
            pooled_projection_dim=config.pooled_width, axes_dims_rope=config.rope_axes,
        )  # fmt: skip
        return {"flux": network} | ({"vae": their_autoencoder(decoded)} if decoded else {})

    def ours() -> Networks:
        return {"flux": Flux(config)} | ({"vae": Autoencoder(decoded)} if decoded else {})

    def guidance(x: Inputs) -> Tensor | None:
        return times(x, [4.0]) if config.guidance else None

    def prepare(networks: Networks, x: Inputs) -> Any:
        return networks["flux"].prepare(x["text"], x["pooled"], times(x, levels), grid, guidance(x))

    def step(networks: Networks, x: Inputs, run: Any) -> Tensor:
        if decoded is None:
            return networks["flux"].step(x["latents"], run, 0)
        tokens = x["latents"]
        for i in range(steps):
            tokens = tokens - networks["flux"].step(tokens, run, i) / steps
        return networks["vae"].decode(unpatchify(tokens, grid))

    def ask_theirs(networks: Networks, x: Inputs) -> Tensor:
        tokens = x["latents"]
        ids, text_ids = their_ids(grid, text, tokens.device)
        for level in levels:
            velocity = networks["flux"](
                hidden_states=tokens, encoder_hidden_states=x["text"], pooled_projections=x["pooled"],
                timestep=times(x, [level]), guidance=guidance(x), img_ids=ids, txt_ids=text_ids, return_dict=False,
            )[0]  # fmt: skip
            if decoded is None:
                return velocity
            tokens = tokens - velocity / steps
        assert decoded is not None
        latents = unpatchify(tokens, grid) / decoded.scale + decoded.shift
        return networks["vae"].decode(latents, return_dict=False)[0]

    shapes = {
        "latents": (1, side * side, config.in_channels),
        "text": (1, text, config.text_width),
        "pooled": (1, config.pooled_width),
    }
    return Case(name, what, shapes, ours, theirs, prepare, step, ask_theirs, seconds, compiling, apart=decoded is None)


def mmdit_case(
    name: str, what: str, config: MMDiTConfig, side: int, text: int, seconds: float, compiling: tuple[float, float]
) -> Case:  # fmt: skip
    """One evaluation with guidance: two rows."""

    def theirs() -> Networks:
        from diffusers import SD3Transformer2DModel

        network = SD3Transformer2DModel(
            sample_size=2 * side, patch_size=2, in_channels=config.in_channels, num_layers=config.depth,
            attention_head_dim=config.hidden // config.heads, num_attention_heads=config.heads, out_channels=config.out_channels,
            joint_attention_dim=config.text_width, caption_projection_dim=config.hidden, dual_attention_layers=config.dual_blocks,
            pooled_projection_dim=config.pooled_width, pos_embed_max_size=config.table_side,
            qk_norm="rms_norm" if config.qk_norm else None,
        )  # fmt: skip
        return {"mmdit": network}

    def ask_theirs(networks: Networks, x: Inputs) -> Tensor:
        return networks["mmdit"](x["latents"], x["text"], x["pooled"], times(x, [500.0, 500.0]), return_dict=False)[0]

    return Case(
        name, what,
        {"latents": (2, config.in_channels, 2 * side, 2 * side), "text": (2, text, config.text_width), "pooled": (2, config.pooled_width)},
        lambda: {"mmdit": MMDiT(config)}, theirs,
        lambda networks, x: networks["mmdit"].prepare(x["text"], x["pooled"], times(x, [0.5]), (side, side)),
        lambda networks, x, run: networks["mmdit"].step(x["latents"], run, 0),
        ask_theirs, seconds, compiling,
    )  # fmt: skip


def unet_case(
    name: str, what: str, config: UNetConfig, side: int, text: int, seconds: float, compiling: tuple[float, float]
) -> Case:  # fmt: skip
    """One evaluation with guidance: two rows. `side` in latents."""
    pooled = config.vector_width - 6 * 256

    def theirs() -> Networks:
        from diffusers import UNet2DConditionModel

        blocks = [("CrossAttn" if depth else "") for depth in config.transformer_depths]
        heads = tuple(width // config.head_width for width in config.widths)
        network = UNet2DConditionModel(
            sample_size=side, in_channels=config.in_channels, out_channels=config.out_channels, layers_per_block=2,
            block_out_channels=tuple(config.widths), down_block_types=tuple(f"{b}DownBlock2D" for b in blocks),
            up_block_types=tuple(f"{b}UpBlock2D" for b in reversed(blocks)), cross_attention_dim=config.text_width,
            transformer_layers_per_block=tuple(depth or 1 for depth in config.transformer_depths), attention_head_dim=heads,
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=config.vector_width,
        )  # fmt: skip
        return {"unet": network}

    def sizes(x: Inputs) -> Tensor:
        return times(x, [8.0 * side, 8.0 * side, 0.0, 0.0, 8.0 * side, 8.0 * side])[None].repeat(2, 1)

    def ask_theirs(networks: Networks, x: Inputs) -> Tensor:
        told = {"text_embeds": x["pooled"], "time_ids": sizes(x)}
        given = times(x, [500.0, 500.0])
        return networks["unet"](x["latents"], given, x["text"], added_cond_kwargs=told, return_dict=False)[0]

    return Case(
        name, what, {"latents": (2, config.in_channels, side, side), "text": (2, text, config.text_width), "pooled": (2, pooled)},
        lambda: {"unet": UNet(config)}, theirs,
        lambda networks, x: networks["unet"].prepare(x["text"], size_vector(x["pooled"], sizes(x)), times(x, [500.0])),
        lambda networks, x, run: networks["unet"].step(x["latents"], run, 0),
        ask_theirs, seconds, compiling,
    )  # fmt: skip


def decode_case(
    name: str, what: str, config: AutoencoderConfig, side: int, seconds: float, compiling: tuple[float, float]
) -> Case:  # fmt: skip
    """`side` in latents."""
    return Case(
        name, what, {"latents": (1, config.latent_channels, side, side)},
        lambda: {"vae": Autoencoder(config)}, lambda: {"vae": their_autoencoder(config)}, lambda networks, x: None,
        lambda networks, x, run: networks["vae"].decode(x["latents"]),
        lambda networks, x: networks["vae"].decode(x["latents"] / config.scale + config.shift, return_dict=False)[0],
        seconds, compiling, False, {"ours, in strips of 64 rows": lambda networks, x: decode_in_strips(networks["vae"], x["latents"], 64)},
    )  # fmt: skip


def published() -> list[Case]:
    """G1 to G6, the most telling first; seconds are estimates for an H100."""
    vae = AutoencoderConfig.preset("flux")
    return [
        flux_case("G1", "Flux dev, 1024 pixels, 512 text tokens, one step", FluxConfig.preset("dev"), 64, 512, 25, (35, 35)),
        mmdit_case("G3", "SD 3.5 large, 1024 pixels, guidance, 333 text tokens, one step", MMDiTConfig.preset("sd3.5-large"), 64, 333, 15, (30, 30)),
        unet_case("G5", "SDXL base, 1024 pixels, guidance, one step", UNetConfig.preset("base"), 128, 77, 10, (70, 40)),
        mmdit_case("G4", "SD 3.5 medium, 1024 pixels, guidance, 333 text tokens, one step", MMDiTConfig.preset("sd3.5-medium"), 64, 333, 10, (40, 40)),
        decode_case("G6a", "decoding 1024 pixels, 16 channels", vae, 128, 5, (20, 20)),
        decode_case("G6b", "decoding 2048 pixels, 16 channels", vae, 256, 10, (20, 20)),
        flux_case("G2", "Flux schnell, 1024 pixels, 256 text tokens, 4 steps and decoding", FluxConfig.preset("schnell"), 64, 256, 30, (50, 35), vae, 4),
    ]  # fmt: skip


def tiny() -> list[Case]:
    """The same cases, as small as the networks can be."""
    flux = FluxConfig(64, 64, 8, 12, 32, 2, 4.0, 1, 1, (4, 6, 6))
    schnell = FluxConfig(64, 64, 8, 12, 32, 2, 4.0, 1, 1, (4, 6, 6), guidance=False)
    mmdit = MMDiTConfig(16, 16, 16, 20, 128, 2, 4.0, depth=2, table_side=6)
    dual = MMDiTConfig(16, 16, 16, 20, 128, 2, 4.0, depth=2, table_side=6, dual_blocks=(0,))
    unet = UNetConfig(4, 4, 32, (1, 2), (0, 1), 1, 32, text_width=16, vector_width=8 + 6 * 256)
    vae = AutoencoderConfig(32, (1, 1, 2, 2), 1)
    return [
        flux_case("G1", "a tiny Flux", flux, 2, 5, 1, (1, 1)),
        mmdit_case("G3", "a tiny MMDiT", mmdit, 2, 5, 1, (1, 1)),
        unet_case("G5", "a tiny UNet", unet, 8, 5, 1, (1, 1)),
        mmdit_case("G4", "a tiny MMDiT with a dual block", dual, 2, 5, 1, (1, 1)),
        decode_case("G6a", "decoding 32 pixels", vae, 4, 1, (1, 1)),
        decode_case("G6b", "decoding 64 pixels", vae, 8, 1, (1, 1)),
        flux_case("G2", "a tiny Flux without guidance, 4 steps and decoding", schnell, 2, 5, 1, (1, 1), vae, 4),
    ]  # fmt: skip
