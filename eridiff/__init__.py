"""SDXL, Stable Diffusion 3 / 3.5 and Flux in plain PyTorch: a published checkpoint in, a picture out."""

__version__ = "0.1.0.dev0"
