"""Files become modules, and back."""

from eridiff.weights.checkpoint import Checkpoint, open_checkpoint
from eridiff.weights.keymap import KeyMap

__all__ = ["Checkpoint", "KeyMap", "open_checkpoint"]
