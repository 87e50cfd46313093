"""A section of `benchmarks/gpu.py`: a whole Flux of flux1-dev's size that lives on the host, under caps of 24 and 12 GiB."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.gpu_measure import ROOT, free, synchronise
from benchmarks.gpu_sections import Bench
from eridiff import FluxInference
from eridiff.inference.placing import RUNTIME, Placement, Room
from eridiff.memory.plan import Stage, stages
from eridiff.memory.stages import OFFLOAD
from eridiff.models.autoencoder import Autoencoder, AutoencoderConfig
from eridiff.models.flux import Flux, FluxConfig
from eridiff.text.encoders import ClipEncoder, T5Encoder
from eridiff.text.tokenizers import clip_tokenizer, t5_tokenizer
from eridiff.weights.detect import Component
from eridiff.weights.header import Checkpoint
from eridiff.weights.keymap import key_map

CAPS = (24 * 2**30, 12 * 2**30)
ROOM = 1.25  # of the host's memory: how much more than the weights must be free
T5_LAYERS = 24
TINY = FluxConfig(64, 64, 8, 12, 32, 2, 4.0, 1, 1, (4, 6, 6))


def run(bench: Bench) -> None:
    """Generate with each component on the device for its stage alone, then with all of them there: the same latents."""
    device, tiny = bench.device, bench.tiny
    parts, layers = empty_parts(tiny), T5_LAYERS
    needed = sum(bytes_of(module) for module in parts.values())
    while not tiny and ROOM * needed > bench.host_bytes and layers > 1:
        layers //= 2
        parts = empty_parts(tiny, layers)
        needed = sum(bytes_of(module) for module in parts.values())
    if not tiny and ROOM * needed > bench.host_bytes:
        return bench.row("weights", "not run", f"{ROOM * needed / 1e9:.0f} GB of free host memory are needed")
    begun = time.monotonic()
    for module in parts.values():
        fill(module)
    note = (
        None if layers == T5_LAYERS else f"T5 of {layers} layers, since the host's memory has no room for {T5_LAYERS}"
    )
    bench.row("weights on the host", gb=needed / 1e9, seconds=time.monotonic() - begun, note=note)
    # of CLIP and T5 the tensors of their work are left out: small beside their weights
    found, sizes = {}, [predicted(bench, parts, n) for n in ("flux", "vae")]
    needs = {offload: max(stage.peak(offload) for stage in sizes) / 1e9 for offload in OFFLOAD}
    ways: list[tuple[str | None, int]] = [
        *((offload, 0) for offload in OFFLOAD),
        *(("stream", cap) for cap in CAPS),
        (None, 0),
    ]
    for offload, cap in ways:
        name = f"offload={offload!r}" + (f" in {cap >> 30} GiB" if cap else "") if offload else "all on the device"
        if offload is None and device.type == "cuda":
            if torch.cuda.mem_get_info(device)[0] < needed + 4e9:
                bench.row(name, "not run", f"{needed / 1e9 + 4:.0f} GB are needed")
                break
            for module in parts.values():
                module.to(device)
        model = whole(parts, device, offload)
        if cap:  # what `vram=` does for a model that is loaded
            model._room = Capped(cap, sizes[0].work)
        with bench.guarded(name):
            found[name] = draw(bench, name, model, cap or (CAPS[0] if offload else 0))
            bench.section.rows[name]["predicted_gb"] = None if cap else needs.get(offload)
    if len(found) > 1:
        first, *others = found.values()
        equal = all(torch.equal(first, other) for other in others)
        bench.row("the same latents, bit for bit", "done" if equal else "failed", None if equal else "they differ")


def whole(parts: dict[str, Any], device: torch.device, offload: str | None = None) -> FluxInference:
    clip = ClipEncoder(parts["clip"], clip_tokenizer())
    # a T5 with random weights needs no published tokenizer, only ids
    t5 = T5Encoder(parts["t5"], t5_tokenizer(ROOT / "tests" / "goldens" / "text-tokenizers-tiny" / "t5"), 512)
    return FluxInference(parts["flux"], parts["vae"], clip, t5, device=device, offload=offload, progress=False)


class Capped(Room):
    """The room of modules that are passed, of which `vram=` knows no headers."""

    def __init__(self, cap: int, work: int) -> None:
        self.cap, self.work = cap, work

    def place(self, **asked: Any) -> Placement:
        return Placement("stream", None, self.cap, RUNTIME["cuda"])

    def weights(self, component: str) -> int:
        return self.cap - RUNTIME["cuda"] - self.work  # a text encoder works with less than the network


def predicted(bench: Bench, parts: dict[str, Any], name: str) -> Stage:
    """What `eridiff plan` says of a stage in bfloat16."""
    component = Component(
        name, key_map(name).layouts["original"], "", Checkpoint(Path(), {}, {}, {}), parts[name].config
    )
    size = 64 if bench.tiny else 1024
    (stage,) = stages({name: component}, size, size, steps=4)
    return stage


def draw(bench: Bench, name: str, model: FluxInference, cap: int) -> torch.Tensor:
    """Latents of an image in four steps; puts its seconds and its memory into the table."""
    device = bench.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        free(device)
        torch.cuda.reset_peak_memory_stats()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total) if cap else 1.0, device)
    try:
        begun, size = time.monotonic(), 64 if bench.tiny else 1024
        result = model.generate("a white swan on mars", width=size, height=size, steps=4, seed=1, keep=("latents",))
        synchronise(device)
        values: dict[str, Any] = {"seconds": time.monotonic() - begun}
        if on_gpu:
            values["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            values["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        bench.row(name, **values, cap_gb=cap / 1e9 if cap and on_gpu else None)
    finally:
        if on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert result.latents is not None
    return result.latents.cpu()


def empty_parts(tiny: bool, layers: int = T5_LAYERS) -> dict[str, Any]:
    """All modules of a Flux, in bfloat16 on the meta device."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    flux = TINY if tiny else FluxConfig.preset("dev")
    vae = AutoencoderConfig(32, (1, 1, 2, 2), 1) if tiny else AutoencoderConfig.preset("flux")
    head, width, heads = (4, 8, 2) if tiny else (64, 768, 12)
    with torch.device("meta"):
        clip = CLIPTextConfig(
            vocab_size=49408, hidden_size=width, intermediate_size=4 * width, projection_dim=width, num_attention_heads=heads,
            num_hidden_layers=2 if tiny else 12, bos_token_id=49406, eos_token_id=49407,
        )  # fmt: skip
        t5 = T5Config(
            vocab_size=32128, d_model=flux.text_width, d_kv=head, d_ff=16 if tiny else 10240, num_heads=2 if tiny else 64,
            num_layers=2 if tiny else layers, feed_forward_proj="gated-gelu",
        )  # fmt: skip
        parts: dict[str, nn.Module] = {
            "clip": CLIPTextModelWithProjection(clip), "t5": T5EncoderModel(t5), "flux": Flux(flux), "vae": Autoencoder(vae)
        }  # fmt: skip
    return {name: module.bfloat16().eval().requires_grad_(False) for name, module in parts.items()}


def bytes_of(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


@torch.no_grad()
def fill(module: Any) -> None:
    """Memory of its own for each tensor, of the same few million random numbers again and again, which is fast."""
    module.to_empty(device="cpu")
    if hasattr(module, "shared"):  # T5's embedding has two names
        module.encoder.embed_tokens.weight = module.shared.weight
    for owner in module.modules():  # CLIP's are not parameters
        if isinstance(getattr(owner, "position_ids", None), torch.Tensor):
            owner.position_ids = torch.arange(owner.position_ids.shape[-1])[None]
    numbers = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(float(name.endswith("weight")))
            continue
        scaled = numbers * parameter[0].numel() ** -0.5
        for piece in parameter.view(-1).split(len(numbers)):
            piece.copy_(scaled[: len(piece)])
