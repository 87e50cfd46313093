"""Small random models for tests: the same classes and files as the published ones."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eridiff.models.autoencoder import Autoencoder, AutoencoderConfig
from eridiff.models.flux import Flux, FluxConfig
from eridiff.models.mmdit import MMDiT, MMDiTConfig
from eridiff.models.unet import UNet, UNetConfig
from eridiff.weights.save import save_network

UNET = UNetConfig(4, 4, 64, (1, 2, 2), (0, 1, 2), 2, 32, text_width=16, vector_width=8 + 6 * 256)
FLUX = FluxConfig(64, 64, 8, 12, 32, 2, 4.0, 2, 2, (4, 6, 6))
MMDIT = MMDiTConfig(16, 16, 16, 20, 128, 2, 2.0, depth=3, table_side=6, dual_blocks=(0,))  # like sd3.5-medium
AUTOENCODER = AutoencoderConfig(32, (1, 1, 2, 2), 1)
TOKENIZERS = Path(__file__).parent / "goldens" / "text-tokenizers-tiny"


def randomised(module: nn.Module, seed: int = 0) -> Any:
    """Every parameter random: default initialisation leaves norms and biases where a swap of names goes unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim > 1 else 0.1) + (p.ndim == 1) * 0.5)
    return module.eval().requires_grad_(False)


def flux(config: FluxConfig = FLUX, seed: int = 0) -> Flux:
    return randomised(Flux(config), seed)


def mmdit(config: MMDiTConfig = MMDIT, seed: int = 0) -> MMDiT:
    model = randomised(MMDiT(config), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    model.positions.table = torch.randn(model.positions.table.shape, generator=generator)
    return model


def unet(config: UNetConfig = UNET, seed: int = 0) -> UNet:
    return scaled(UNet(config), seed)


def scaled(module: nn.Module, seed: int = 0) -> Any:
    """Every parameter random, matrices scaled by fan-in: for networks too deep for `randomised`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            values = torch.randn(p.shape, generator=generator)
            gain = p.ndim == 1 and name.endswith("weight")
            p.copy_(values / max(1, p[0].numel()) ** 0.5 if p.ndim > 1 else gain + values / 5)
    return module.eval().requires_grad_(False)


def autoencoder(config: AutoencoderConfig = AUTOENCODER, seed: int = 0) -> Autoencoder:
    model: Autoencoder = Autoencoder(config)
    torch.manual_seed(seed)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5 / max(1, p[0].numel()) ** 0.5 if p.ndim > 1 else 0.1)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
    return model.eval().requires_grad_(False)


def clip_module(vocabulary: int = 844) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=8, intermediate_size=16, projection_dim=8, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, bos_token_id=841, eos_token_id=842,
    )  # fmt: skip
    return randomised(CLIPTextModelWithProjection(config))


def t5_module(vocabulary: int = 320, width: int = 12) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=4, d_ff=16, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )  # fmt: skip
    return randomised(T5EncoderModel(config))


def write_text(folder: Path, name: str, network: str, module: Any) -> None:
    """A text encoder as a published single file."""
    from eridiff.weights.save import write_tensors

    unprojected = {"text_projection.weight"} if network == "clip" else set()
    state = {n: t for n, t in module.state_dict().items() if n not in {"encoder.embed_tokens.weight", *unprojected}}
    heads = {"num_attention_heads": 2, "hidden_act": "gelu" if network == "clip_g" else "quick_gelu"}
    configs = {} if network == "t5" else {network: heads}
    write_tensors(state, folder / f"{name}.safetensors", {"eridiff.config": json.dumps(configs)})


SDXL_REFINER = UNetConfig(4, 4, 64, (1, 1, 2, 2), (0, 1, 1, 0), 1, 32, text_width=8, vector_width=8 + 5 * 256)
SDXL_AUTOENCODER = AutoencoderConfig(32, (1, 1, 2, 2), 1, 4, 0.13025, 0.0, True)


def write_sdxl_model(folder: Path, config: UNetConfig = UNET, name: str = "sdxl", **sampling: Any) -> Path:
    """A whole small SDXL in one file, as published: UNet, autoencoder, CLIP-L, CLIP-G in OpenCLIP's names."""
    from safetensors.torch import load_file

    from eridiff.weights.keymap import key_map
    from eridiff.weights.save import write_tensors

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for prefix, module in (
        ("model.diffusion_model.", unet(config)),
        ("first_stage_model.", autoencoder(SDXL_AUTOENCODER)),
    ):
        part = load_file(save_network(module, folder / "part.safetensors"))
        tensors |= {prefix + key: tensor for key, tensor in part.items()}
    (folder / "part.safetensors").unlink()
    refiner = config.text_width == 8
    bigg = key_map("clip").layouts["openclip"].to_foreign(clip_module().state_dict(), {})
    tensors |= {f"conditioner.embedders.{0 if refiner else 1}.model.{key}": tensor for key, tensor in bigg.items()}
    if not refiner:
        clip = {n: t for n, t in clip_module().state_dict().items() if n != "text_projection.weight"}
        tensors |= {f"conditioner.embedders.0.transformer.{key}": tensor for key, tensor in clip.items()}
    heads = {"num_attention_heads": 2}
    configs = {
        "unet": {"head_width": 32},
        "clip": heads | {"hidden_act": "quick_gelu"},
        "clip_g": heads | {"hidden_act": "gelu"},
    }
    given = {"steps": 2, "width": 64, "height": 64} | sampling
    metadata = {"eridiff.config": json.dumps(configs), "eridiff.sampling": json.dumps(given)}
    write_tensors({n: t.contiguous().clone() for n, t in tensors.items()}, folder / f"{name}.safetensors", metadata)
    if not (folder / "tokenizer").exists():
        (folder / "tokenizer").symlink_to(TOKENIZERS / "clip")
    return folder


def write_sd3_model(folder: Path, config: MMDiTConfig = MMDIT, t5: bool = True, **sampling: Any) -> Path:
    """A whole small SD 3, as `write_model`; the autoencoder is in the network's file, as in the published one."""
    from safetensors.torch import load_file

    from eridiff.weights.save import write_tensors

    folder.mkdir(parents=True, exist_ok=True)
    given = {"steps": 2, "width": 32, "height": 32} | sampling
    tensors = {}
    for prefix, module in (("model.diffusion_model.", mmdit(config)), ("first_stage_model.", autoencoder())):
        part = load_file(save_network(module, folder / "part.safetensors"))
        tensors |= {prefix + name: tensor for name, tensor in part.items()}
    (folder / "part.safetensors").unlink()
    write_tensors(tensors, folder / "sd3.safetensors", {"eridiff.sampling": json.dumps(given)})
    write_text(folder, "clip_l", "clip", clip_module())
    write_text(folder, "clip_g", "clip_g", clip_module())
    if t5:
        write_text(folder, "t5", "t5", t5_module(width=config.text_width))
    for name, source in (("tokenizer", "clip"), ("tokenizer_2", "clip"), ("tokenizer_3", "t5")):
        if not (folder / name).exists():
            (folder / name).symlink_to(TOKENIZERS / source)
    return folder


def load(kind: type[Any], path: Any, **options: Any) -> Any:
    """Everything that generates with a model's files, which must be of that kind."""
    import eridiff

    model = eridiff.load(path, device="cpu", progress=False, **options)
    assert isinstance(model, kind)
    return model


def draw(model: Any, prompt: Any, **options: Any) -> Any:
    """A small image in four steps, with every intermediate."""
    given = {"height": 32, "steps": 4, "seed": 1, "keep": ("latents", "noise", "conditioning")} | options
    return model.generate("" if "conditioning" in options else prompt, **given)


def every_tensor_is_in_its_place(parts: Any, modules: dict[str, nn.Module]) -> bool:
    """The networks, by name, hold what their files hold, through the key map; none is left on the meta device."""
    for network, module in modules.items():
        component, state = parts.components[network], module.state_dict()
        for entry in component.layout.entries(state, component.sizes):
            stored = [component.checkpoint.read(component.prefix + name) for name in entry.foreign]
            read = entry.read(stored, tuple(state[entry.native].shape))
            assert torch.equal(read.to(state[entry.native].dtype), state[entry.native]), entry
    return not any(t.is_meta for m in modules.values() for t in [*m.parameters(), *m.buffers()])


def write_model(folder: Path, config: FluxConfig = FLUX, **sampling: Any) -> Path:
    """A whole model as files side by side, with tokenizers; `sampling` goes into the network's metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {"steps": 2, "text_length": 16, "width": 32, "height": 32} | sampling
    save_network(flux(config), folder / "flux.safetensors", metadata={"eridiff.sampling": json.dumps(given)})
    save_network(autoencoder(), folder / "ae.safetensors")
    write_text(folder, "clip", "clip", clip_module())
    write_text(folder, "t5", "t5", t5_module())
    for name, source in (("tokenizer", "clip"), ("tokenizer_2", "t5")):
        if not (folder / name).exists():
            (folder / name).symlink_to(TOKENIZERS / source)
    return folder
