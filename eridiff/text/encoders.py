"""CLIP and T5 from checkpoints, without a float32 detour: transformers' modules on the meta device, filled by key maps.

Sources: Radford et al. 2021 (CLIP), Raffel et al. 2020 (T5); which output a family takes is noted where it is taken.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eridiff.blocks import unwrapped
from eridiff.errors import CheckpointError, ConfigError, quoted
from eridiff.text.emphasis import emphasised, pieces
from eridiff.text.tokenizers import Token, all_windows, one_window
from eridiff.weights.configs import DESCRIPTIONS
from eridiff.weights.detect import Component, detect
from eridiff.weights.header import open_checkpoint
from eridiff.weights.hub import resolve
from eridiff.weights.load import NETWORKS, built_on_meta, empty_network, read_state
from eridiff.weights.locate import TEXT_ENCODERS, locate_part

PUBLISHED: dict[str, dict[str, Any]] = {  # sizes by transformers' names
    "clip": {
        "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "clip_g": {
        "vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280, "num_hidden_layers": 32,
        "num_attention_heads": 20,
    },
    "t5": {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
}  # fmt: skip


@dataclass(frozen=True)
class ClipFeatures:
    """All that a family may take of CLIP; B prompts, T tokens, layers from the embedding (0) on."""

    hidden: tuple[Tensor, ...]  # layers + 1 tensors [B, T, D], before the final norm
    last: Tensor  # [B, T, D], after the final norm
    pooled: Tensor  # [B, D], `last` at the first end token
    projected: Tensor  # [B, P], `pooled` through the text projection; `pooled` itself where there is none


class ClipEncoder:
    """A CLIP text encoder and its tokenizer."""

    def __init__(self, module: Any, tokenizer: Any, *, pad: int | None = None, name: str = "CLIP-L") -> None:
        """Use transformers' CLIPTextModel or CLIPTextModelWithProjection, wrapped or not, with a slow or fast tokenizer.

        `pad` None is the end token, as for CLIP-L; CLIP-G takes 0. Raises CheckpointError for a tokenizer with more tokens
        than the module, ConfigError for a CLIP-G without its projection, which SDXL and SD 3 need.
        """
        module = unwrapped(module)
        _check_size(name, tokenizer, module.config.vocab_size)
        if name == "CLIP-G" and not hasattr(module, "text_projection"):
            raise ConfigError(
                f"CLIP-G is a {type(module).__name__} without the projection of its pooled vector, which SDXL and SD 3 need: "
                "load it as CLIPTextModelWithProjection"
            )
        self.module, self.tokenizer, self.name = module, tokenizer, name
        self.end: int = tokenizer.eos_token_id  # of the tokenizer: published configurations say 2
        self.pad = self.end if pad is None else pad

    @property
    def length(self) -> int:
        return int(self.module.config.max_position_embeddings)

    def tokenize(self, prompts: Sequence[str], *, windows: int = 1, whole_words: bool = False) -> Tensor:
        """`[B, length * windows]` int64: one window with what fits, or as many as are asked for, the last ones empty.

        `whole_words` ends a single window before a short word that does not fit.
        """
        return self.weigh(prompts, windows=windows, whole_words=whole_words)[0]

    def weigh(
        self, prompts: Sequence[str], program: str = "none", *, windows: int = 1, whole_words: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As `tokenize`, and the weight of each token, float32 of the same shape, as a program reads them (`prompt_weights`)."""
        read = [pieces(prompt, program) for prompt in prompts]
        if windows == 1:
            return _tensors(
                [one_window(self.tokenizer, p, self.length, self.pad, self.name, whole_words) for p in read]
            )
        return _tensors([all_windows(self.tokenizer, p, self.length, self.pad, windows) for p in read])

    def windows_needed(self, prompts: Sequence[str], program: str = "none") -> int:
        """How many windows the longest prompt fills."""
        read = [pieces(prompt, program) for prompt in prompts]
        return max(len(all_windows(self.tokenizer, p, self.length, self.pad)) // self.length for p in read)

    @torch.no_grad()
    def __call__(self, ids: Tensor, weights: Tensor | None = None, program: str = "none") -> ClipFeatures:
        """ids `[B, T]`; no mask: padding is seen only through causality, as when the networks were trained.

        Several windows are encoded each for itself and joined; the pooled state is the first one's. `hidden` has the weights
        of `weigh`, applied as the program does.
        """
        embedding = self.module.get_input_embeddings().weight
        ids = ids.to(embedding.device)
        windows = ids.unflatten(1, (-1, min(ids.shape[1], self.length)))  # B W T
        output = self.module(input_ids=windows.flatten(0, 1), output_hidden_states=True)

        def in_rows(states: Tensor) -> Tensor:
            return states.unflatten(0, windows.shape[:2]).flatten(1, 2)

        hidden, last = tuple(map(in_rows, output.hidden_states)), in_rows(output.last_hidden_state)
        first_end = (windows[:, 0] == self.end).int().argmax(dim=1)  # 0 where there is none
        pooled = last[torch.arange(len(ids), device=ids.device), first_end]
        projection = getattr(self.module, "text_projection", nn.Identity())
        # a trainer's wrapper may give float32 of a bfloat16 module; weights of 8 bits are only stored so
        dtype = embedding.dtype if embedding.dtype.itemsize > 1 else pooled.dtype
        projected = projection(pooled.to(dtype))
        if weights is not None and bool((weights != 1).any()):
            none = self._of_nothing(windows.shape[:2]).hidden if program == "comfyui" else hidden
            hidden = tuple(
                emphasised(states, weights, program, self.length, empty)
                for states, empty in zip(hidden, none, strict=True)
            )
        return ClipFeatures(hidden, last, pooled, projected)

    def _of_nothing(self, shape: Sequence[int]) -> ClipFeatures:
        """Of the empty prompt, in as many rows and windows."""
        return self(self.tokenize([""]).expand(shape[0], -1).repeat(1, shape[1]))


class T5Encoder:
    """A T5 encoder, its tokenizer, and the number of tokens that the network was trained with."""

    def __init__(self, module: Any, tokenizer: Any, length: int) -> None:
        """Use transformers' T5EncoderModel, wrapped or not, with a slow or fast tokenizer.

        `length` is 512 for Flux (256 for schnell) and 256 for SD 3. Raises CheckpointError when the tokenizer has more
        tokens than the embedding has rows.
        """
        module = unwrapped(module)
        _check_size("T5", tokenizer, module.config.vocab_size)
        self.module, self.tokenizer, self.length = module, tokenizer, length

    def tokenize(self, prompts: Sequence[str], shortest: int | None = None, length: int | None = None) -> Tensor:
        """`[B, length]` int64, padded with 0; with `shortest` as many as the longest prompt needs, at least so many."""
        return self.weigh(prompts, "none", shortest, length)[0]

    def weigh(
        self, prompts: Sequence[str], program: str = "none", shortest: int | None = None, length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `tokenize`, and the weight of each token, float32 of the same shape, as a program reads them (`prompt_weights`)."""
        length = self.length if length is None else length
        read = [pieces(prompt, program) for prompt in prompts]
        ids, weights = _tensors([one_window(self.tokenizer, prompt, length, 0, "T5") for prompt in read])
        rows = length if shortest is None else max(shortest, int(self.real(ids).sum(dim=1).max()))
        return ids[:, :rows], weights[:, :rows]

    @torch.no_grad()
    def __call__(
        self, ids: Tensor, mask: Tensor | None = None, weights: Tensor | None = None, program: str = "none"
    ) -> Tensor:
        """ids `[B, T]` -> `[B, T, D]` after the final norm; without a mask, as published, padding is attended to too.

        With the weights of `weigh`, applied as the program does.
        """
        device = self.module.get_input_embeddings().weight.device
        seen = None if mask is None else mask.to(device)
        states = self.module(input_ids=ids.to(device), attention_mask=seen).last_hidden_state
        if weights is None or bool((weights == 1).all()):
            return states
        empty = states
        if program == "comfyui":
            none = self.tokenize([""], length=ids.shape[1]).expand(len(ids), -1)
            empty = self(none, None if mask is None else self.real(none))
        return emphasised(states, weights, program, ids.shape[1], empty)

    def real(self, ids: Tensor) -> Tensor:
        """`[B, T]` bool: which tokens are of the prompt, its end included; "<pad>" may be written in it."""
        return (ids != 0).flip(1).cumsum(1).flip(1) > 0


def _tensors(rows: list[list[Token]]) -> tuple[Tensor, Tensor]:
    """The ids and the weights of prompts."""
    return torch.tensor([[token for token, _ in row] for row in rows]), torch.tensor(
        [[w for _, w in row] for row in rows]
    )


def load_encoder(
    path: str | os.PathLike[str],
    part: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
    allow_unknown: bool = False,
) -> Any:
    """A text encoder of a checkpoint as transformers' module, in evaluation mode, without gradients; `ClipEncoder` and `T5Encoder` take it.

    - path: a file, a folder or a hub id, of the encoder or of a whole model.
    - part: "clip", "clip_g" or "t5"; None is the one that is there.
    - dtype, allow_unknown: as for `load_network`.

    Raises CheckpointError, with the names, for anything missing, unknown or misshapen, and where None could mean several.
    """
    if part is not None:
        if part not in TEXT_ENCODERS:
            raise ConfigError(f"part is {', '.join(TEXT_ENCODERS)}, not {quoted(part)}; load_network loads the others")
        return build_encoder(locate_part(path, part, allow_unknown), dtype=dtype, device=device, progress=progress)
    held = detect(open_checkpoint(resolve(path, "part")), allow_unknown)
    found = [component for component in held if component.network in TEXT_ENCODERS]
    if len(found) != 1:
        what = " and ".join(DESCRIPTIONS[component.network] for component in found or held)
        raise CheckpointError(f"{quoted(path)} holds {what}" + (f"; choose by part={found[0].network!r}" if found else ", not a text encoder"))  # fmt: skip
    return build_encoder(found[0], dtype=dtype, device=device, progress=progress)


def build_encoder(
    component: Component,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Any:
    """The transformers module of a clip, clip_g or t5 component, filled; in evaluation mode, without gradients.

    Raises CheckpointError, with the names, for anything missing, unknown or misshapen.
    """
    module = empty(component)
    wanted = {name: tuple(t.shape) for name, t in module.state_dict().items() if name != "encoder.embed_tokens.weight"}
    state = read_state(component, wanted, dtype=dtype, device=device, progress=progress)
    if component.network == "t5":
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
    module.load_state_dict(state, strict=True, assign=True)
    if component.network == "t5":  # assigning made two parameters of the one that both names share
        module.encoder.embed_tokens.weight = module.shared.weight
    for owner in module.modules():
        # in no file and so still on meta, where transformers gives wrong numbers silently
        if isinstance(getattr(owner, "position_ids", None), Tensor):
            owner.position_ids = torch.arange(component.config["max_position_embeddings"], device=device)[None]
    left = [name for name, t in [*module.named_parameters(), *module.named_buffers()] if t.is_meta]
    if left:
        raise CheckpointError(f"{component.checkpoint.path}: nothing fills '{left[0]}' of {type(module).__name__}")
    return module.eval().requires_grad_(False)


def empty(component: Component) -> Any:
    """The module of any component, on the meta device: its names and sizes; raises ConfigError for sizes of no module."""
    if component.network in NETWORKS:
        return empty_network(component)
    return built_on_meta(component, partial(_on_meta, component.network))


def published_encoder(network: str) -> Any:
    """The published clip, clip_g or t5 of all families, on the meta device: its names and sizes."""
    return _on_meta(network, PUBLISHED[network])


def _on_meta(network: str, config: Mapping[str, Any]) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    with torch.device("meta"):
        if network == "t5":
            return T5EncoderModel(T5Config(**config, feed_forward_proj="gated-gelu"))
        if config.get("num_attention_heads") == 0:
            raise ConfigError(
                f"a width of {config['hidden_size']} is not a multiple of the 64 features of a published CLIP's heads; give "
                "num_attention_heads in its config.json"
            )
        ends = {"bos_token_id": 0, "eos_token_id": 1}  # unused: pooling asks the tokenizer
        return CLIPTextModelWithProjection(CLIPTextConfig(**{**ends, **config}))


def _check_size(name: str, tokenizer: Any, rows: int) -> None:
    if len(tokenizer) > rows:
        raise CheckpointError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens, its encoder only {rows}; they do not belong together: give the encoder's own tokenizer"
        )
