"""LoRA files of every format: what they make of the weights, merged and attached."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from eridiff.lora.attach import attach_lora
from eridiff.lora.load import Lora, load_lora
from eridiff.lora.merge import merge_lora
from eridiff.models import unet
from eridiff.models.flux import Flux
from eridiff.models.mmdit import MMDiT
from eridiff.trace.hashfill import parameter
from eridiff.trace.record import relative_l2
from eridiff.weights.detect import sizes_of
from eridiff.weights.keymap import Entry, Layout, key_map
from tests.golden.case import Row, load_case

FAMILIES = {"flux": "flux", "sd3": "mmdit", "sdxl": "unet"}
ENCODERS = {  # prefix in a single file -> network and layout
    "text_encoders.clip_l.transformer.": ("clip", "huggingface"),
    "text_encoders.clip_g.transformer.": ("clip_g", "huggingface"),
    "text_encoders.t5xxl.transformer.": ("t5", "huggingface"),
    "conditioner.embedders.0.transformer.": ("clip", "huggingface"),
    "conditioner.embedders.1.model.": ("clip_g", "openclip"),
}
CLIP_LAYER = (
    "layer_norm1",
    "layer_norm2",
    "mlp.fc1",
    "mlp.fc2",
    *(f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")),
)


class Base:
    """The networks of a case before any LoRA: the denoiser as a module, parts of text encoders as native state dicts."""

    def __init__(self, case: Mapping[str, Any], dtype: torch.dtype) -> None:
        self.case = case
        self.names = [name for name, _ in case["parameters"]]
        encoders = [name for name in self.names if name.startswith(tuple(ENCODERS))]
        own = [pair for pair in case["parameters"] if pair[0] not in encoders]
        self.network = FAMILIES[case["family"]]
        plain = unet.group_norm
        unet.group_norm = lambda channels, eps=1e-5: nn.GroupNorm(4, channels, eps=eps)  # 8 channels in the cases
        try:
            (self.module,) = load_case(
                {**case, "overrides": case.get("base_overrides") or [], "parameters": own},
                {self.network: self.config()},
                dtype,
            )
        finally:
            unet.group_norm = plain
        tensors = {name: self.foreign(name, shape).to(dtype) for name, shape in case["parameters"] if name in encoders}
        self.entries: dict[str, list[Entry]] = {}
        self.states: dict[str, dict[str, Tensor]] = {}
        for prefix, (network, layout) in ENCODERS.items():
            held = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            entries = [e for e in candidates(network, layout, held) if set(e.foreign) <= held.keys()]
            if held:
                self.entries[prefix] = entries
                shapes = {n: tuple(t.shape) for n, t in held.items()}
                self.states[prefix] = {
                    e.native: e.read(
                        [held[n] for n in e.foreign], e.native_shape([shapes[n] for n in e.foreign])
                    ).clone()
                    for e in entries
                }

    def foreign(self, name: str, shape: list[int]) -> Tensor:
        return torch.as_tensor(parameter(name, tuple(shape), self.case["salt"], self.case.get("base_overrides") or []))

    def config(self) -> dict[str, Any]:
        """What shapes do not tell; the heads do not matter where weights alone are compared."""
        c = self.case["config"]
        if self.network == "flux":
            width = c["hidden_size"] // c["num_heads"]
            return {"heads": c["num_heads"], "rope_axes": [width // 4 * 2, width // 4, width // 4]}
        return {"head_width": 4} if self.network == "unet" else {}

    def with_weights(self, state: Mapping[str, Tensor]) -> Any:
        """A network of this kind with a state dict, whose first layer may be wider."""
        module = copy.deepcopy(self.module)
        if self.network == "flux" and state["image_in.weight"].shape != module.image_in.weight.shape:
            module = Flux(replace(module.config, in_channels=state["image_in.weight"].shape[1]))
        module.load_state_dict(dict(state), assign=True)
        return module

    def given(self) -> dict[str, Any]:
        """For load_lora."""
        return {self.network: self.module} | {ENCODERS[p][0]: s for p, s in self.states.items()}

    def written(self, lora: Lora | None, scale: float, dtype: torch.dtype, dora: str) -> dict[str, Tensor]:
        """All tensors under their original names, with a LoRA merged."""

        def merged(network: str, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            if lora is None or network not in lora.networks:
                return state
            return merge_lora(state, lora.of(network), scale, dtype=dtype, dora=dora).state

        layout = key_map(self.network).layouts["original"]
        result = layout.to_foreign(merged(self.network, self.module.state_dict()), sizes_of(self.module.config))
        for prefix, state in self.states.items():
            network, name = ENCODERS[prefix]
            foreign = (
                key_map("clip" if network == "clip_g" else network).layouts[name].to_foreign(merged(network, state), {})
            )
            result |= {prefix + name: tensor for name, tensor in foreign.items()}
        return result


def candidates(network: str, name: str, held: Mapping[str, Tensor]) -> list[Entry]:
    """The entries of every native name that the held tensors may be."""
    layout: Layout = key_map("clip" if network == "clip_g" else network).layouts[name]
    if name == "huggingface":
        natives = list(held)
    else:
        layers = [
            f"text_model.encoder.layers.{b}.{m}.{p}" for b in range(4) for m in CLIP_LAYER for p in ("weight", "bias")
        ]
        natives = [
            *layers,
            "text_model.final_layer_norm.weight",
            "text_model.final_layer_norm.bias",
            "text_projection.weight",
        ]
    return layout.entries(natives, {})


def run_lora(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    folder = Path(case["folder"])
    base = Base(case, dtype)
    unscaled = "base_model.model." in case["format"]  # peft's names, and no adapter_config.json: the scale is 1
    lora = load_lora(folder / "lora.safetensors", base.given(), alpha_is_rank=unscaled, measure=True)
    rows = compare(case, dtype, "merged", base, lora, expected) + ledger_rows(case, dtype, lora)
    if base.network in lora.networks:
        rows += forward_rows(case, dtype, base, lora.of(base.network), expected)
    for name, scale, dora in (
        ("scale0.5", 0.5, "peft"), ("scale0", 0.0, "peft"), ("peft.scale0.5", 0.5, "peft"),
    ):  # fmt: skip
        file = folder / f"expected.{name}.safetensors"
        if file.is_file():
            rows += compare(case, dtype, name, base, lora, load_file(file), scale, dora)
    return rows


def ledger_rows(case: Mapping[str, Any], dtype: torch.dtype, lora: Lora) -> list[Row]:
    """The ledger says of each module what the case says: rank, alpha, scale and the size of the change."""
    rows, found = [], {row.key: row for row in lora.ledger}
    for module in case["modules"]:
        if module["scale"] is None or "diff" in module["kind"] or module["kind"] in ("w_norm", "b_norm"):
            continue  # a row a tensor there, a row a module here
        row = found[module["key"].replace(".processor.to_out", ".to_out.0").replace(".processor.to_", ".to_")]
        error = abs(row.scale - module["scale"])
        if row.kind.startswith("lora"):
            error += abs((row.rank or 0) - (module["rank"] or 0)) + abs((row.alpha or 0) - (module["alpha"] or 0))
        if row.change is not None and module["dw_over_w"]:
            error += abs(row.change / module["dw_over_w"] - 1)
        rows.append(Row(case["case"], str(dtype).removeprefix("torch."), f"ledger {row.key}", error, 1e-5))
    return rows


def forward_rows(
    case: Mapping[str, Any], dtype: torch.dtype, base: Base, lora: Lora, expected: Mapping[str, Tensor]
) -> list[Row]:
    """The network with the LoRA attached gives what it gives with merged weights, and with the reference's."""
    plain = ask(base.module)
    attached = attach_lora(base.module, lora)
    beside, keys = ask(base.module), list(base.module.state_dict())
    attached.detach()
    restored = ask(base.module)
    merged = base.with_weights(merge_lora(base.module.state_dict(), lora, dtype=dtype).state)
    layout = key_map(base.network).layouts["original"]
    own = layout.to_foreign(base.module.state_dict(), sizes_of(base.module.config))
    foreign = own | {name: tensor.to(dtype) for name, tensor in expected.items() if name in own}
    shapes = {n: tuple(t.shape) for n, t in merged.state_dict().items()}
    entries = layout.entries(shapes, sizes_of(merged.config))
    reference = base.with_weights(
        {e.native: e.read([foreign[n] for n in e.foreign], shapes[e.native]) for e in entries}
    )
    label, exact = str(dtype).removeprefix("torch."), dtype == torch.float64
    distances = {
        "attached, merged": (relative_l2(beside, ask(merged)), 1e-12 if exact else 2e-5),
        "attached, reference": (relative_l2(beside, ask(reference)), 1e-6 if exact else 2e-5),
        "detached": (float(not torch.equal(restored, plain)), 0.0),
        "names": (float(keys != list(shapes)), 0.0),
        "it changes the output": (float(relative_l2(beside, plain) < 1e-3), 0.0),
    }
    return [Row(case["case"], label, name, error, bound) for name, (error, bound) in distances.items()]


def ask(module: Any) -> Tensor:
    """The network's output for some input."""
    g = torch.Generator().manual_seed(0)
    c, dtype = module.config, next(module.parameters()).dtype

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    with torch.no_grad():
        if isinstance(module, Flux):
            options = (
                noise(2, 5, c.text_width),
                noise(2, c.pooled_width),
                torch.tensor([[0.7, 0.3]], dtype=dtype),
                (2, 3),
            )
            return module(noise(2, 6, c.in_channels), *options, torch.tensor([3.5, 2.0], dtype=dtype))
        if isinstance(module, MMDiT):
            options = (noise(2, 5, c.text_width), noise(2, c.pooled_width), torch.tensor([[0.7, 0.3]], dtype=dtype))
            return module(noise(2, c.in_channels, 4, 6), *options)
        options = (noise(2, 5, c.text_width), noise(2, c.vector_width), torch.tensor([[700.0, 300.0]], dtype=dtype))
        return module(noise(2, c.in_channels, 8, 12), *options)


def compare(
    case: Mapping[str, Any], dtype: torch.dtype, name: str, base: Base, lora: Lora, expected: Mapping[str, Tensor],
    scale: float = 1.0, dora: str = "peft",
) -> list[Row]:  # fmt: skip
    """A row a changed tensor, and one for all others, which must stay bit for bit."""
    plain, found = (base.written(merged, scale, dtype, dora) for merged in (None, lora))
    label = str(dtype).removeprefix("torch.")
    rows = []
    for key, tensor in expected.items():
        wide = tensor.double()
        error = float((found[key].double().reshape(wide.shape) - wide).abs().max() / wide.abs().max())
        rows.append(Row(case["case"], label, f"{name} {key}", error, case["tolerance"]["value"]))
    same = all(torch.equal(found[key], tensor) for key, tensor in plain.items() if key not in expected)
    rows.append(Row(case["case"], label, f"{name}: the others", 0.0 if same else 1.0, 0.0))
    return rows
