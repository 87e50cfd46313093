"""How to steer: functions on raw network outputs."""

from torch import Tensor


def classifier_free(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """`negative + scale * (positive - negative)` (Ho and Salimans 2022); all of one shape, scale 1 is `positive`."""
    return negative + scale * (positive - negative)
