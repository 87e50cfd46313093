"""LoRA: read, attach, merge, train and write; every format, nothing dropped silently."""

from eridiff.lora.attach import TARGETS, LoraSet, all_reduce_gradients, attach_lora, inject_lora
from eridiff.lora.branches import install_slots
from eridiff.lora.ledger import Row, table
from eridiff.lora.load import Lora, load_lora
from eridiff.lora.merge import Merged, MergedModule, merge_into, merge_lora
from eridiff.lora.save import save_lora

__all__ = [
    "TARGETS", "Lora", "LoraSet", "Merged", "MergedModule", "Row", "all_reduce_gradients", "attach_lora", "inject_lora",
    "install_slots", "load_lora", "merge_into", "merge_lora", "save_lora", "table",
]  # fmt: skip
