"""What peft says beside its tensors: adapter_config.json, or the metadata `lora_adapter_metadata` that diffusers writes.

Whatever changes the meaning of the tensors is read or refused. So is a key that this module does not know and that is set:
a newer peft may mean something else by the same tensors.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eridiff.errors import LoraError

KINDS = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr"}  # peft_type -> kind of a module
READ = frozenset({
    "peft_type", "r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias",
    "init_lora_weights", "init_weights", "modules_to_save", "bias", "fan_in_fan_out",
})  # fmt: skip
HARMLESS = frozenset({  # about training, or about which modules have tensors, which the tensors say themselves
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "target_modules",
    "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "runtime_config",
    "ensure_weight_tying", "rank_dropout", "module_dropout", "rank_dropout_scale", "use_effective_conv2d", "decompose_both",
    "decompose_factor",
})  # fmt: skip
# beginnings that leave the base as it is
STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica", "lycoris")
OTHER_BASE = r"pissa(_niter_\d+)?|olora|corda|loftq|lora_ga"


@dataclass(frozen=True)
class Section:
    """One configuration, and what it is called in an error."""

    said: Mapping[str, Any]
    where: str

    def check(self) -> None:
        """Raises LoraError for a value that changes the meaning of the tensors and that is not followed here."""
        kind = self.said.get("peft_type", "LORA")
        if not isinstance(kind, str) or kind not in KINDS:
            raise LoraError(f"{self.where} says {kind}; of peft's kinds {', '.join(KINDS)} are read")
        for key in ("init_lora_weights", "init_weights"):
            start = self.said.get(key)
            name = start.lower() if isinstance(start, str) else start
            if isinstance(name, str) and re.fullmatch(OTHER_BASE, name):
                raise LoraError(
                    f"{self.where} says {key} '{start}': this LoRA is for a base whose weights that method changed, not for "
                    "the published one; save it by peft with path_initial_model_for_weight_conversion"
                )
            if name not in STARTS or (isinstance(name, int) and not isinstance(name, bool)):
                raise LoraError(f"{self.where} says {key} {start!r}, which is not known and may change the base")
        if self.said.get("fan_in_fan_out"):
            raise LoraError(
                f"{self.where} says fan_in_fan_out: its matrices are transposed, as no network here has them"
            )
        if self.said.get("bias") not in (None, "none", "all", "lora_only"):
            raise LoraError(f"{self.where} says bias {self.said['bias']!r}, which is none of none, all, lora_only")
        strange = [key for key, value in self.said.items() if value and key not in READ and key not in HARMLESS]
        if strange:
            value = repr(self.said[strange[0]])
            raise LoraError(
                f"{self.where} sets {strange[0][:60]!r} to {value[:60]}, which may change what its tensors mean and is not "
                "supported"
            )

    def alpha_and_scale(self, name: str, rank: int | None) -> tuple[float, float] | None:
        """(alpha, scale) of a module; None where neither is declared. `rank` None takes the declared one."""
        key = "lora_alpha" if self.said.get("peft_type", "LORA") == "LORA" else "alpha"
        if key not in self.said:
            if "r" not in self.said:
                return None
            raise LoraError(f"{self.where} declares a rank and no {key}, so the scale is unknown; correct it")
        try:
            alpha = float(_by_pattern(self.said.get("alpha_pattern"), name, self.said[key]))
            declared = int(_by_pattern(self.said.get("rank_pattern"), name, self.said.get("r", rank)))
        except (TypeError, ValueError, AttributeError, OverflowError, re.error) as error:
            raise LoraError(
                f"{self.where} gives no alpha and rank for '{name}' that can be read ({error}); correct the metadata"
            ) from None
        if not math.isfinite(alpha):
            raise LoraError(f"{self.where} gives alpha {alpha} for '{name}', which is not finite; correct it")
        if rank is not None and declared != rank or declared < 1:
            raise LoraError(
                f"{self.where} declares rank {declared} for '{name}' and its tensors have rank {rank}: "
                f"the scale would be {alpha:g}/{declared} or {alpha:g}/{rank}; correct it"
            )
        return alpha, alpha / (declared**0.5 if self.said.get("use_rslora") else declared)

    def replaces(self, name: str) -> bool:
        """Whether a tensor was saved whole: of `modules_to_save`, or a bias that was trained with the base."""
        module, _, last = name.rpartition(".")
        if last == "bias" and self.said.get("bias") in ("all", "lora_only"):
            return True
        return any(f".{module}.".find(f".{saved}.") >= 0 for saved in self.saved)

    @property
    def saved(self) -> tuple[str, ...]:
        found = self.said.get("modules_to_save") or ()
        if isinstance(found, list | tuple) and all(isinstance(name, str) for name in found):
            return tuple(found)
        raise LoraError(f"{self.where} says modules_to_save {found!r}, which is not a list of names")


@dataclass(frozen=True)
class Scaling:
    """All configurations of a file, by the prefix of the names for which they count; "" is for every name."""

    sections: Mapping[str, Section]

    @classmethod
    def read(cls, metadata: Mapping[str, str], adapter_config: Mapping[str, Any] | None = None) -> "Scaling":
        """Raises LoraError for metadata that are not a JSON object, and for what `Section.check` refuses."""
        bodies: dict[str, dict[str, Any]] = {}
        text = metadata.get("lora_adapter_metadata")
        if text is not None:
            try:
                body = json.loads(text)
            except (ValueError, RecursionError):
                body = None
            if not isinstance(body, dict):
                raise LoraError(
                    "its metadata lora_adapter_metadata is not a JSON object, and without it the scale is unknown; write the file again"
                )
            for name, value in body.items():
                prefix, _, key = name.rpartition(".")
                bodies.setdefault(f"{prefix}." if prefix else "", {})[key] = value
        sections = {prefix: Section(body, "its metadata lora_adapter_metadata") for prefix, body in bodies.items()}
        if adapter_config is not None:
            sections.setdefault("", Section(adapter_config, "its adapter_config.json"))
        for section in sections.values():
            section.check()
        return cls(sections)

    def section(self, key: str) -> Section | None:
        """The configuration that counts for a name in the file."""
        return next((section for prefix, section in self.sections.items() if key.startswith(prefix)), None)

    def of(self, key: str, kind: str, rank: int | None) -> tuple[float, float] | None:
        """(alpha, scale) of a module, by its name in the file; None where neither is declared."""
        for prefix, section in self.sections.items():
            if key.startswith(prefix) and KINDS[section.said.get("peft_type", "LORA")] == kind:
                found = section.alpha_and_scale(key.removeprefix(prefix).removeprefix("base_model.model."), rank)
                if found:
                    return found
        return None

    def replaces(self, name: str) -> bool:
        """Whether a configuration says that a tensor takes the place of the network's own."""
        section = self.section(name)
        return section is not None and section.replaces(name.replace(".base_layer.", "."))

    def check(self, modules: Mapping[str, Mapping[str, str]]) -> None:
        """Compare what is declared of the file as a whole with its modules: key -> {what a tensor is: its name}.

        Raises LoraError when it holds no DoRA and should, the other way round, and when whole modules are missing.
        """
        for section in self.sections.values():
            own = {key: roles for key, roles in modules.items() if self.section(key) is section}
            directed = any(not roles.keys().isdisjoint({"magnitude", "dora_scale"}) for roles in own.values())
            adapted = any("down" in roles for roles in own.values())
            said = section.said.get("use_dora")
            if adapted and said is not None and bool(said) != directed:
                has = "holds lengths of a DoRA" if directed else "holds no lengths of a DoRA"
                raise LoraError(f"{section.where} says use_dora {bool(said)}, and the file {has}; correct one of them")
            lacking = [name for name in section.saved if not any(f".{name}." in f".{key}." for key in own)]
            if lacking:
                raise LoraError(
                    f"{section.where} names modules_to_save '{lacking[0]}', of which the file has no tensor"
                )


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern, in the file's order, that a module's name ends with (peft's rule)."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
