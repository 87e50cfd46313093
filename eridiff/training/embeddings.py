"""Prompts encoded once and kept on the disk by content, so that text encoders need not be in memory.

A file is named after all that its tensors depend on: the prompt, what it is guided away from, the family's options of text
(length, padding, windows), and, as the folder that it lies in, the weights and the vocabulary of the encoders.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from eridiff.effects import own
from eridiff.errors import CheckpointError, ConfigError
from eridiff.inference import DiffusionInference, Prompt
from eridiff.inference.settings import spoken
from eridiff.request import ENCODING, Request, Text
from eridiff.text import Conditioning
from eridiff.training.fingerprint import digest
from eridiff.weights.locate import TEXT_ENCODERS
from eridiff.weights.save import write_tensors


class EmbeddingCache:
    """Encodes prompts by an inference's text encoders, or finds them in a folder."""

    def __init__(self, inference: DiffusionInference, folder: str | os.PathLike[str]) -> None:
        """The encoders' weights are hashed once, here; they must not be in training.

        Without encoders in memory the folder must hold the prompts of just one set of encoders: ConfigError otherwise.
        """
        self.inference = inference
        self.encoders = {n: e for n in TEXT_ENCODERS if (e := getattr(inference, n, None)) is not None}
        if self.encoders:
            self.folder = Path(folder) / encoders_digest(self.encoders)
            return
        found = sorted(p for p in Path(folder).iterdir() if p.is_dir()) if Path(folder).is_dir() else []
        if len(found) != 1:
            held = f"the prompts of {len(found)} sets of encoders" if found else "no prompts"
            raise ConfigError(f"no text encoders are loaded and '{folder}' holds {held}: load the encoders once")
        self.folder = found[0]

    def encode(
        self, prompt: Text, negative: Text | None = None, cfg_scale: float | None = None, **asked: Any
    ) -> Prompt:
        """As `inference.encode_prompt(prompt, negative, cfg_scale, **asked)`, on the CPU, bit for bit.

        Raises ConfigError for a prompt that is not in the folder when no encoders are loaded.
        """
        path = self.path(prompt, negative, cfg_scale, **asked)
        if path.exists():
            return read_prompt(path)
        if not self.encoders:
            raise ConfigError(f"the prompt {prompt!r} is not among those kept in '{self.folder}', and no text encoders are loaded")  # fmt: skip
        encoded = on_cpu(self.inference.encode_prompt(prompt, negative, cfg_scale, **asked))
        told = {"prompt": prompt, "negative": negative, "encoding": self._encoding(asked)}
        write_prompt(path, encoded, {name: json.dumps(value) for name, value in told.items()})
        return encoded

    def _encoding(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """How a prompt is encoded: what is asked, else the model's own."""
        request = Request.of(asked)
        found = {name: own(request, self.inference, name) for name in ENCODING}
        if request.t5_length is None:
            found["t5_length"] = getattr(self.inference.sampling, "text_length", None)
        return found

    def path(self, prompt: Text, negative: Text | None, cfg_scale: float | None, **asked: Any) -> Path:
        """The file of a prompt."""
        inference = self.inference
        steered = (inference.sampling.cfg_scale if cfg_scale is None else cfg_scale) != 1
        text_width, _ = inference.told_widths(inference.network.config)
        read = [None if text is None else read_by(inference, text) for text in (prompt, negative)]
        how = self._encoding(asked)
        how["length"] = how.pop("t5_length")  # the keys of files that were kept before there were weights
        if how["prompt_weights"] == "none":
            del how["prompt_weights"]
        key = {
            "prompt": read[0], "negative": read[1], "loras": loras_digest(self.encoders), "steered": steered, "family": inference.family, "width": text_width,
            "refiner": inference.variant == "refiner", **how,
        }  # fmt: skip
        text = json.dumps(key, sort_keys=True, ensure_ascii=False)
        return self.folder / f"{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}.safetensors"


def encoders_digest(encoders: Mapping[str, Any]) -> str:
    """Of the weights, and of how the tokenizers cut a text."""
    found = hashlib.blake2b(digest_size=16)
    for name, encoder in encoders.items():
        module: nn.Module = encoder.module
        for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
            found.update(f"{name} {key} {digest(tensor)}".encode())
        tokenizer = encoder.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        found.update((backend.to_str() if backend else repr(sorted(tokenizer.get_vocab().items()))).encode())
    return found.hexdigest()


def read_by(inference: DiffusionInference, prompt: Text) -> dict[str, str]:
    """What each text encoder reads of a prompt: one that has no text of its own reads the first."""
    return {name: spoken([prompt], name, inference.encoders)[0] for name in inference.encoders}


def loras_digest(encoders: Mapping[str, Any]) -> str | None:
    """Of the LoRAs on the encoders as they are now: branches, scales, and what is changed in place; None without any."""
    found = hashlib.blake2b(digest_size=16)
    changed = False
    for name, encoder in encoders.items():
        for path, module in encoder.module.named_modules():
            for branch in vars(module).get("lora_branches", ()):
                tensors = {**dict(branch.named_parameters()), **dict(branch.named_buffers()), "scale": branch.scale}
                told = " ".join(f"{key} {digest(tensor)}" for key, tensor in tensors.items())
                found.update(f"{name} {path} {type(branch).__name__} {told}".encode())
                changed = True
            for short in vars(module).get("lora_in_place", ()):
                found.update(f"{name} {path} {short} {digest(getattr(module, short))}".encode())
                changed = True
    return found.hexdigest() if changed else None


def on_cpu(prompt: Prompt) -> Prompt:
    """The same, in main memory."""

    def moved(c: Conditioning) -> Conditioning:
        return Conditioning(c.text.detach().cpu(), c.pooled.detach().cpu(), None if c.mask is None else c.mask.cpu())

    return Prompt(moved(prompt.positive), prompt.negative and moved(prompt.negative))


def write_prompt(path: Path, prompt: Prompt, metadata: Mapping[str, str]) -> None:
    """The file appears whole or not at all."""
    tensors: dict[str, Tensor] = {}
    for name, conditioning in vars(prompt).items():
        if conditioning is not None:
            tensors |= {f"{name}.{n}": t.contiguous().clone() for n, t in vars(conditioning).items() if t is not None}
    write_tensors(tensors, path, metadata)


def read_prompt(path: Path) -> Prompt:
    """Raises CheckpointError for a file that is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        both = [
            Conditioning(tensors[f"{name}.text"], tensors[f"{name}.pooled"], tensors.get(f"{name}.mask"))
            if f"{name}.text" in tensors
            else None
            for name in ("positive", "negative")
        ]
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); remove it and the prompt is encoded again") from None
    if both[0] is None:
        raise CheckpointError(f"{path} holds no prompt; remove it and the prompt is encoded again")
    return Prompt(both[0], both[1])


class LatentCache:
    """A data set's images as latents, encoded once and kept on the disk by content."""

    def __init__(self, inference: DiffusionInference, folder: str | os.PathLike[str]) -> None:
        """The autoencoder's weights are hashed once, here."""
        self.inference = inference
        found = hashlib.blake2b(json.dumps(asdict(inference.autoencoder.config)).encode(), digest_size=16)
        for name, tensor in inference.autoencoder.named_parameters():
            found.update(f"{name} {digest(tensor)}".encode())
        self.folder = Path(folder) / found.hexdigest()

    def encode(self, image: Tensor) -> Tensor:
        """An image `[1, 3, H, W]` in [-1, 1] -> its latents `[1, C, H / 8, W / 8]` float32 on the CPU, the posterior's mean."""
        path = self.folder / f"{digest(image)}.safetensors"
        if path.exists():
            try:
                with safe_open(path, framework="pt") as file:
                    return file.get_tensor("latents")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path} is damaged ({error}); remove it and the image is encoded again"
                ) from None
        latents = self.inference.encode_vae(image).cpu()
        write_tensors({"latents": latents.contiguous()}, path, {})
        return latents


__all__ = ["EmbeddingCache", "LatentCache"]
