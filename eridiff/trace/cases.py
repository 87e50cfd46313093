"""Golden cases: a network with weights that any language can rebuild, its inputs, what the original code computes with them."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from eridiff.errors import TraceError, quoted
from eridiff.models.flux import fill_condition, patchify, position_ids
from eridiff.text.encoders import build_encoder
from eridiff.trace.hashfill import parameter, value
from eridiff.trace.replay import Run, arguments_run
from eridiff.trace.text import ENCODERS, replayable
from eridiff.weights.detect import component_of
from eridiff.weights.header import open_checkpoint
from eridiff.weights.load import NETWORKS, build
from eridiff.weights.save import write_tensors

KINDS = (*NETWORKS, "clip", "clip_g", "t5")  # of cases that are one evaluation


def cases() -> dict[str, Path]:
    """The cases of one evaluation, by name: inside an installed package, or at the top of a source tree."""
    installed = Path(__file__).parents[1] / "goldens"
    folder = installed if installed.is_dir() else Path(__file__).parents[2] / "tests" / "goldens"
    found = (path.parent for path in sorted(folder.glob("*/case.json")))
    return {path.name: path for path in found if _described(path)["kind"] in KINDS}


def find_case(name: str) -> "Case | None":
    """A case by its name or its folder; None for what is neither."""
    folder = cases().get(name, Path(name).expanduser())
    return open_case(folder) if (folder / "case.json").is_file() else None


def weights_of(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """The case's parameters by the original's names, float64, every value exact in float32."""
    return {
        name: torch.as_tensor(parameter(name, tuple(shape), case["salt"], case["overrides"]))
        for name, shape in case["parameters"]
    }


def load_case(
    case: Mapping[str, Any],
    configs: Mapping[str, Mapping[str, Any]],
    dtype: torch.dtype,
    stored: torch.dtype = torch.float64,
) -> Any:
    """The case's weights through a file in the original layout and the loader: a module for each network of `configs`."""
    tensors = {name: tensor.to(stored) for name, tensor in weights_of(case).items()}
    modules = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.safetensors"
        write_tensors(tensors, path, {"eridiff.config": json.dumps(configs)})
        for network in configs:
            component = component_of(open_checkpoint(path), network)
            made = (build if network in NETWORKS else build_encoder)(component, dtype=dtype, progress=False)
            modules.append(made)
    return modules


def inputs_of(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """The case's inputs by name, float64 or, where it lists integers, int64."""
    result = {}
    for item in case["inputs"]:
        given = item.get("values")
        array = given if given is not None else value(item["name"], tuple(item["shape"]), case["salt"], item["scale"])
        result[item["name"]] = torch.as_tensor(
            array, dtype=None if given and isinstance(given[0], list) else torch.float64
        )
    return result


@dataclass(frozen=True)
class Case:
    """A network and its inputs: one evaluation, with every intermediate that is of use, or more than that."""

    name: str
    description: Mapping[str, Any]  # case.json
    expected: Mapping[str, Tensor]  # in the order of computation; by the names of docs/traces.md, or readable ones

    @property
    def family(self) -> str:
        """The network, by its key map; both CLIPs have one."""
        network: str = self.description["kind"].partition("-")[0]
        return "clip" if network == "clip_g" else network

    @property
    def epsilons(self) -> str:
        """The case of this family that shows wrong epsilons; this one itself, of a text encoder."""
        alike = (name for name, folder in cases().items() if _described(folder)["kind"] == self.family)
        return next((name for name in alike if name.endswith("-eps")), self.name)

    @cached_property
    def network(self) -> nn.Module:
        """eridiff's, in float64."""
        return self.load(torch.float64)

    def load(self, dtype: torch.dtype) -> Any:
        """The network, from a file in the original layout."""
        c = self.description["config"]
        if self.family in ENCODERS:
            network, named, end = self.description["kind"], {}, {}
            if self.family == "clip":
                named = {name: c[name] for name in ("num_attention_heads", "hidden_act")}
                end = {"eos_token_id": c["end_token"]}
            (module,) = load_case(self.description, {network: named}, dtype)
            return replayable(network, module, **end)
        if self.family == "flux":
            said = {"rope_axes": c["axes_dim"], "theta": c["theta"], "heads": c["num_heads"]}
        elif self.family == "vae":
            said = {"scale": c["scale_factor"], "shift": c["shift_factor"]}
        else:
            said = {"head_width": c["num_head_channels"]} if self.family == "unet" else {}
        (network,) = load_case(self.description, {self.family: said}, dtype)
        return network

    @property
    def config(self) -> Any:
        return self.network.config

    def run(self, dtype: torch.dtype) -> Run:
        """Calls the network as the original was called: its `forward`; an autoencoder both ways, each for itself."""
        if self.family != "vae":
            return arguments_run(self.arguments, dtype)
        image, latents = (inputs_of(self.description)[name].to(dtype) for name in ("image", "latents"))
        return lambda network: (network.encode(image), network.decode(latents))  # type: ignore[operator]

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """What the network's `forward` is given, by name."""
        given = inputs_of(self.description)
        if self.family in ENCODERS:
            return {"input_ids": given["ids"]}
        if self.family == "mmdit":
            return {"latents": given["x"], "text": given["context"], "pooled": given["y"], "times": given["t"] / 1000}
        if self.family == "unet":
            return {
                n: given[o] for n, o in {"latents": "x", "text": "context", "vector": "y", "times": "timesteps"}.items()
            }
        ids = position_ids(tuple(self.description["grid"]))
        if "reference_grid" in self.description:
            ids = torch.cat([ids, position_ids(tuple(self.description["reference_grid"]), index=1)])
        if "mask" in given:
            condition = fill_condition(given["masked_image"], (given["mask"] > 0).double())
            given["img"] = torch.cat([patchify(given["latents"]), condition], dim=-1)
        guidance = given.get("guidance") if self.description["config"]["guidance_embed"] else None
        return {
            "latents": given["img"], "text": given["txt"], "pooled": given["y"], "times": given["timesteps"],
            "guidance": guidance, "ids": ids,
        }  # fmt: skip


def _described(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "case.json").read_text(encoding="utf-8"))


def open_case(folder: Path) -> Case:
    """The case in a folder with case.json and expected.safetensors; raises TraceError for another."""
    try:
        description = _described(folder)
        expected = load_file(folder / "expected.safetensors")
        order = [
            *description.get("intermediates", ()),
            *description.get("tensors", ()),
            *description.get("outputs", ()),
        ]
        # without what the original's own rounding or a wrong reading gives, and without a table of T5
        other = ("penultimate_normed", "pooled_argmax", "relative_buckets")
        order = [name for name in order if "float32" not in name and name not in other]
        kind = description.get("kind")
        if kind not in KINDS:
            said = "its case.json says no kind" if kind is None else f"it is a golden of the kind {quoted(kind)}"
            raise TraceError(f"{quoted(folder)}: {said}; give one of {', '.join(KINDS)}")
        return Case(description["case"], description, {name: expected[name] for name in order if name in expected})
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise TraceError(
            f"{quoted(folder)} is not a golden case: {reason}; it needs case.json and expected.safetensors"
        ) from None
