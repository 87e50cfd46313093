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
from eridiff.text.encoders import published_encoder
from eridiff.trace.cases import weights_of
from eridiff.trace.record import relative_l2
from eridiff.trace.replay import arguments_run
from eridiff.weights.detect import sizes_of
from eridiff.weights.keymap import Entry, Layout, key_map
from tests.golden.case import Row, opened

ENCODERS = {  # prefix in a single file -> network and layout
    "text_encoders.clip_l.transformer.": ("clip", "huggingface"),
    "text_encoders.clip_g.transformer.": ("clip_g", "huggingface"),
    "text_encoders.t5xxl.transformer.": ("t5", "huggingface"),
    "conditioner.embedders.0.transformer.": ("clip", "huggingface"),
    "conditioner.embedders.1.model.": ("clip_g", "openclip"),
}


class Base:
    """The networks of a case before any LoRA: the denoiser as a module, parts of text encoders as native state dicts."""

    def __init__(self, case: Mapping[str, Any], dtype: torch.dtype) -> None:
        encoders = [pair for pair in case["parameters"] if pair[0].startswith(tuple(ENCODERS))]
        own = [pair for pair in case["parameters"] if pair not in encoders]
        self.case = opened({**case, "parameters": own})
        self.network = self.case.family
        plain = unet.group_norm
        unet.group_norm = lambda channels, eps=1e-5: nn.GroupNorm(case["config"]["norm_groups"], channels, eps=eps)
        try:
            self.module = self.case.load(dtype)
        finally:
            unet.group_norm = plain
        tensors = {name: tensor.to(dtype) for name, tensor in weights_of({**case, "parameters": encoders}).items()}
        self.entries: dict[str, list[Entry]] = {}
        self.states: dict[str, dict[str, Tensor]] = {}
        for prefix, (network, layout) in ENCODERS.items():
            held = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            if held:
                entries = [e for e in candidates(network, layout, held) if set(e.foreign) <= held.keys()]
                self.entries[prefix] = entries
                shapes = {n: tuple(t.shape) for n, t in held.items()}
                self.states[prefix] = {
                    e.native: e.read(
                        [held[n] for n in e.foreign], e.native_shape([shapes[n] for n in e.foreign])
                    ).clone()
                    for e in entries
                }

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
            foreign = key_map(network).layouts[name].to_foreign(merged(network, state), {})
            result |= {prefix + name: tensor for name, tensor in foreign.items()}
        return result


def candidates(network: str, name: str, held: Mapping[str, Tensor]) -> list[Entry]:
    """The entries of every native name that the held tensors may be."""
    layout: Layout = key_map(network).layouts[name]
    natives = list(held) if name == "huggingface" else list(published_encoder(network).state_dict())
    return layout.entries(natives, {})


def run_lora(case: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: torch.dtype) -> list[Row]:
    folder = Path(case["folder"])
    base = Base(case, dtype)
    lora = load_lora(folder / "lora.safetensors", base.given(), alpha_is_rank=case["alpha_is_rank"], measure=True)
    rows = compare(case, dtype, "merged", base, lora, expected) + ledger_rows(case, dtype, lora)
    if base.network in lora.networks:
        rows += forward_rows(case, dtype, base, lora.of(base.network), expected)
    for at in case.get("at_scales", ()):
        stored = load_file(folder / f"expected.{at['name']}.safetensors")
        rows += compare(case, dtype, at["name"], base, lora, stored, at["scale"], at["dora"])
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

    def ask(module: Any) -> Tensor:
        given = dict(base.case.arguments)
        if base.network == "flux":  # whose first layer a LoRA may widen
            given["latents"] = given["latents"][..., : module.config.in_channels]
        with torch.no_grad():
            return arguments_run(given, dtype)(module)

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
