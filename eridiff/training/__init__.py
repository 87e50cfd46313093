"""Sampling inside somebody's training loop, and the mathematics of training with the samplers' own conventions."""
