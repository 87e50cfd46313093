"""The networks, one file each; they import torch and nothing of this package but `layers.py`."""
