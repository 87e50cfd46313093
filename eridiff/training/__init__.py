"""Images from weights in training, with nothing else changed; the mathematics of training in the samplers' conventions."""

from eridiff.adopt import Adopted, adopt
from eridiff.blocks import unwrapped
from eridiff.training.distributed import shard
from eridiff.training.embeddings import EmbeddingCache, LatentCache
from eridiff.training.record import write_page, write_strip
from eridiff.training.restore import averaged_weights, undisturbed
from eridiff.training.sampler import Sampler, Samples

__all__ = [
    "Adopted", "EmbeddingCache", "LatentCache", "Sampler", "Samples", "adopt", "averaged_weights", "shard", "undisturbed",
    "unwrapped", "write_page", "write_strip",
]  # fmt: skip
