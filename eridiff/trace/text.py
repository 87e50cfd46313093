"""CLIP and T5 as `eridiff diff` replays them: transformers' modules, in float64 all through.

What transformers computes in float32 whatever the dtype, and what it fixes when a module is made, is exchanged for our own
functions, so that `causes.py` can exchange those.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eridiff.errors import CheckpointError, TraceError, quoted
from eridiff.models.layers import RMSNorm
from eridiff.text.encoders import build_encoder
from eridiff.weights.detect import detect
from eridiff.weights.header import open_checkpoint
from eridiff.weights.hub import resolve


@dataclass(frozen=True)
class ClipConfig:
    """By transformers' names; CLIP-G's sizes, whose names are those of CLIP-L and more."""

    vocab_size: int = 49408
    hidden_size: int = 1280
    intermediate_size: int = 5120
    projection_dim: int = 1280
    num_hidden_layers: int = 32
    num_attention_heads: int = 20
    max_position_embeddings: int = 77
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407


@dataclass(frozen=True)
class T5Config:
    """By transformers' names."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def pool(last: Tensor, ids: Tensor, end: int, hidden: Sequence[Tensor]) -> Tensor:
    """`[B, T, D]` after the final norm -> `[B, D]` at the first end token, 0 where there is none; not of the states before."""
    return last[torch.arange(len(ids), device=ids.device), (ids == end).int().argmax(dim=1)]


def taken(hidden: Sequence[Tensor], norm: nn.Module) -> Tensor:
    """What SDXL and SD 3 take of CLIP's hidden states, the embedding's first: the last but one, without the final norm."""
    return hidden[-2]


def padded(ids: Tensor, end: int) -> Tensor:
    """The ids as they were given; what other padding would make of them is a cause."""
    return ids


def projected(pooled: Tensor, projection: nn.Module) -> Tensor:
    return cast(Tensor, projection(pooled))


def unseen(ids: Tensor, end: int | None = None) -> Tensor | None:
    """The mask of CLIP, whose end token pads, and of T5: none, padding is attended to."""
    return None


class _Activation(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        if self.name == "quick_gelu":
            return quick_gelu(x)
        return F.gelu(x, approximate="none" if self.name == "gelu" else "tanh")


class Clip(nn.Module):
    """CLIP's text encoder by the names of CLIPTextModelWithProjection, with what the families take of it."""

    def __init__(self, config: ClipConfig, module: Any = None) -> None:
        super().__init__()
        if module is None:
            from transformers import CLIPTextConfig, CLIPTextModelWithProjection

            module = CLIPTextModelWithProjection(CLIPTextConfig(**asdict(config), bos_token_id=0))
        self.config = config
        self.text_model, self.text_projection = module.text_model, module.text_projection
        self.text_model.eos_token_id = config.eos_token_id
        for layer in self.text_model.encoder.layers:
            layer.mlp.activation_fn = _Activation(config.hidden_act)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """`[B, T]` int64 -> penultimate and last `[B, T, D]`, pooled `[B, D]`, projected `[B, P]`."""
        hidden: list[Tensor] = []
        layers = self.text_model.encoder.layers
        seen = [layers[0].register_forward_pre_hook(lambda _, given: hidden.append(given[0]))]
        seen += [x.register_forward_hook(lambda _, __, out: hidden.append(_first(out))) for x in layers]
        try:
            ids, end = padded(input_ids, self.config.eos_token_id), self.config.eos_token_id
            last = self.text_model(input_ids=ids, attention_mask=unseen(ids, end)).last_hidden_state
        finally:
            for hook in seen:
                hook.remove()
        pooled = pool(last, input_ids, end, hidden)
        return {
            "penultimate": taken(hidden, self.text_model.final_layer_norm), "last_hidden_state": last,
            "pooled": pooled, "text_embeds": projected(pooled, self.text_projection),
        }  # fmt: skip


class T5(nn.Module):
    """T5's encoder by the names of T5EncoderModel; its norms compute in float64, which transformers' do not."""

    def __init__(self, config: T5Config, module: Any = None) -> None:
        super().__init__()
        if module is None:
            from transformers import T5Config as Config
            from transformers import T5EncoderModel

            module = T5EncoderModel(Config(**asdict(config), feed_forward_proj="gated-gelu"))
        if module.config._attn_implementation != "sdpa":
            raise TraceError(
                "T5 cannot be replayed with this transformers, which computes its softmax in float32; install 5.15 or later"
            )
        self.config = config
        self.shared, self.encoder = module.shared, module.encoder
        self.encoder.embed_tokens = None  # the same table under a second name
        del self.encoder.dropout  # runs at both ends, so that its last call is not its first
        self.encoder.dropout = _unchanged
        for block in self.encoder.block:
            block.layer[0].layer_norm, block.layer[1].layer_norm = (_wide(part.layer_norm) for part in block.layer)
            block.layer[1].DenseReluDense.act = _Activation("gelu_tanh")
        self.encoder.final_layer_norm = _wide(self.encoder.final_layer_norm)

    def forward(self, input_ids: Tensor) -> Tensor:
        """`[B, T]` int64 -> `[B, T, D]` after the final norm."""
        output = self.encoder(inputs_embeds=self.shared(input_ids), attention_mask=unseen(input_ids))
        return cast(Tensor, output.last_hidden_state)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _wide(norm: Any) -> RMSNorm:
    new = RMSNorm(norm.weight.shape[0], norm.variance_epsilon)
    new.weight = norm.weight
    return new


def _first(output: Any) -> Tensor:
    return cast(Tensor, output if isinstance(output, Tensor) else output[0])


ENCODERS: dict[str, Any] = {"clip": Clip, "t5": T5}
CONFIGS: dict[str, Any] = {"clip": ClipConfig, "t5": T5Config}


def replayable(network: str, module: Any, **said: Any) -> nn.Module:
    """What `build_encoder` made as it is replayed; `said` is what its configuration does not say, the end token."""
    kind = "t5" if network == "t5" else "clip"
    read = {f.name: getattr(module.config, f.name) for f in fields(CONFIGS[kind]) if "token" not in f.name}
    return cast(nn.Module, ENCODERS[kind](CONFIGS[kind](**read | said), module))


def load_encoder(path: str | os.PathLike[str], network: str) -> nn.Module:
    """The CLIP (`clip`, `clip_g`) or T5 (`t5`) of a checkpoint in float64; raises CheckpointError if it holds none."""
    found = detect(open_checkpoint(resolve(path, "part")))
    component = next((c for c in found if c.network.startswith(network)), None)
    if component is None:
        raise CheckpointError(f"{quoted(path)} holds no {network}, but {', '.join(c.network for c in found)}")
    module = build_encoder(component, dtype=torch.float64, progress=False)
    end = component.config.get("eos_token_id")  # of a small model's metadata; published files do not say it
    return replayable(component.network, module, **({} if end is None else {"eos_token_id": end}))
