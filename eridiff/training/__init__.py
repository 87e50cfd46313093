"""Pictures from weights in training, with nothing else changed."""

from eridiff.blocks import unwrapped
from eridiff.training.embeddings import EmbeddingCache, LatentCache
from eridiff.training.record import write_page, write_strip
from eridiff.training.restore import averaged_weights, undisturbed
from eridiff.training.sampler import Sampler, Samples

__all__ = [
    "EmbeddingCache", "LatentCache", "Sampler", "Samples", "averaged_weights", "undisturbed", "unwrapped", "write_page",
    "write_strip",
]  # fmt: skip
