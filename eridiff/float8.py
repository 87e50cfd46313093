"""Linear layers in float8, lossy: for GPUs that multiply float8 faster than bfloat16."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from eridiff.blocks import repeated_blocks
from eridiff.errors import ConfigError
from eridiff.memory.stages import asked_once
from eridiff.models.flux import Flux
from eridiff.models.mmdit import MMDiT
from eridiff.models.unet import UNet, UNetConfig
from eridiff.weights.keymap import unwrapped

log = logging.getLogger(__name__)
FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
CAPABILITY = (8, 9)  # Ada and Hopper are the first with such products


class Float8Linear(nn.Linear):
    """`nn.Linear` of bfloat16 with a float8 weight and a float32 scale for each of its rows; rows of the input are scaled as they come.

    `weight` is what it computes with, made anew in bfloat16 for each reader (DoRA is one). There is no gradient.
    """

    weight8: nn.Parameter  # [out_features, in_features] float8_e4m3fn
    weight_scale: Tensor  # [out_features] float32

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return (self.weight8.float() * self.weight_scale[:, None]).to(torch.bfloat16)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` bfloat16 -> `[..., out_features]`. Raises ConfigError where a gradient is needed."""
        if torch.is_grad_enabled() and input.requires_grad:
            raise ConfigError("layers in float8 have no gradients: train the network before use_float8")
        rows, scale = rounded(input.flatten(0, -2))
        product = torch._scaled_mm(
            rows, self.weight8.t(), scale_a=scale[:, None], scale_b=self.weight_scale[None], bias=self.bias, out_dtype=torch.bfloat16,
        )  # fmt: skip
        return product.unflatten(0, input.shape[:-1])

    def _save_to_state_dict(self, destination, prefix, keep_vars):  # type: ignore[no-untyped-def]
        raise ConfigError("a network in float8 is not saved, as its weights are rounded: save it before use_float8")


def rounded(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`[N, D]` -> float8 `[N, D]` and float32 scales `[N]`, by which the rows are to be multiplied; each row fills float8's range."""
    scale = (matrix.abs().amax(dim=1) / LARGEST).clamp_min(torch.finfo(matrix.dtype).tiny)
    return (matrix / scale[:, None]).to(FLOAT8), scale.float()


def check_device(device: torch.device) -> None:
    """Raises ConfigError unless a device multiplies float8 with scales for rows, which is tried there."""
    what = f"float8 needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or later"
    if device.type != "cuda":
        raise ConfigError(f"{what}, and the network is on {device}")
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        raise ConfigError(f"{what}, and {device} has {found[0]}.{found[1]}")
    a, scale = torch.ones(32, 32, device=device).to(FLOAT8), torch.ones(32, device=device)
    try:
        torch._scaled_mm(a, a.t(), scale_a=scale[:, None], scale_b=scale[None], out_dtype=torch.bfloat16)
    except RuntimeError as error:  # some pairs of GPU and torch have no kernel
        first = str(error).partition("\n")[0]
        raise ConfigError(
            f"torch {torch.__version__} has no float8 product with scales for rows on {device}: {first}"
        ) from None


def is_float8(network: nn.Module) -> bool:
    """Whether layers of a network are in float8."""
    return any(isinstance(module, Float8Linear) for module in network.modules())


@torch.no_grad()
def use_float8(network: nn.Module) -> float:
    """Turn the linear layers of a network's blocks into float8; returns, and logs, how far its output has moved: relative, L2.

    - network: a Flux, MMDiT or UNet in bfloat16 on a GPU that has float8. Its modulation, its first and its last layers stay.

    The distance is that of one output for random inputs. The layers keep their names and the LoRAs beside them, which
    compute in their own dtype; a LoRA cannot be merged afterwards, and nothing saved. Raises ConfigError for another network,
    device or dtype, for one in training, and for one that is adopted or has float8 already.
    """
    inner = unwrapped(network)
    if not isinstance(inner, Flux | MMDiT | UNet):
        raise ConfigError(f"float8 is for Flux, SD 3 and SDXL, not for a {type(inner).__name__}")
    if is_float8(inner):
        raise ConfigError("the network is in float8 already")
    if hasattr(inner, "adopted_from"):
        raise ConfigError("an adopted network has the trainer's weights, which float8 would replace")
    if any(p.requires_grad for p in inner.parameters()):
        raise ConfigError(
            "float8 has no gradients, and the network's parameters require them: call requires_grad_(False)"
        )
    device = next(inner.parameters()).device
    check_device(device)
    once = {id(layer) for layer in asked_once(inner)}
    layers = [layer for block in repeated_blocks(inner) for layer in block.modules()]
    chosen = [layer for layer in layers if type(layer) is nn.Linear and id(layer) not in once and _fits(layer)]
    other = next((layer.weight.dtype for layer in chosen if layer.weight.dtype != torch.bfloat16), None)
    if other is not None or not chosen:
        why = (
            f"not of {str(other).removeprefix('torch.')}"
            if other
            else "with sides that are multiples of 16, and has none"
        )
        raise ConfigError(f"float8 takes the place of linear layers of bfloat16, {why}")
    before = _output(inner)
    for layer in chosen:
        weight, scale = rounded(layer.weight)
        del layer._parameters["weight"]
        layer.__class__ = Float8Linear
        layer.register_parameter("weight8", nn.Parameter(weight, requires_grad=False))
        layer.register_buffer("weight_scale", scale)
    error = float(torch.linalg.vector_norm(_output(inner) - before) / torch.linalg.vector_norm(before))
    log.warning(
        "float8, lossy: %d linear layers; for random inputs the output is off by %.1f %%", len(chosen), 100 * error
    )
    return error


def _fits(layer: nn.Linear) -> bool:
    return layer.in_features % 16 == 0 and layer.out_features % 16 == 0  # as the product needs it


def _output(network: Flux | MMDiT | UNet) -> Tensor:
    """One output, float32, for inputs that are random and always the same."""
    config, generator = network.config, torch.Generator().manual_seed(0)
    like = next(network.parameters())

    def rows(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(like.device, like.dtype)

    side = min(16, getattr(config, "table_side", 16))
    flux, guidance = isinstance(network, Flux), getattr(config, "guidance", False)
    latents = rows(1, side * side, config.in_channels) if flux else rows(1, config.in_channels, 2 * side, 2 * side)
    vector = rows(1, config.vector_width if isinstance(config, UNetConfig) else config.pooled_width)
    times = torch.tensor([500.0 if isinstance(network, UNet) else 0.5], device=like.device)
    further: dict[str, Any] = {"grid": (side, side)} if flux else {}
    further |= {"guidance": torch.full((1,), 4.0, device=like.device)} if guidance else {}
    return network(latents, rows(1, 64, config.text_width), vector, times, **further).float()
