"""Files become modules, and back."""

from eridiff.weights.header import Checkpoint, open_checkpoint
from eridiff.weights.keymap import KeyMap

__all__ = ["Checkpoint", "KeyMap", "open_checkpoint"]
