"""The finite elements of a tensor and their extremes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Extremes:
    """The smallest and the largest sample so far.

    Attributes:
        min_val: 0.0 where there was none.
        max_val: likewise.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self.min_val = self.max_val = 0.0
        self._seen = False

    def include(self, low: float, high: float) -> None:
        """Take both into the extremes."""
        self.min_val = min(self.min_val, low) if self._seen else low
        self.max_val = max(self.max_val, high) if self._seen else high
        self._seen = True


def finite_samples(x: Tensor) -> tuple[Tensor, float, float]:
    """Return the finite elements of ``x`` in float32, with the smallest and the largest.

    Args:
        x: any shape and float dtype.

    Returns:
        ``(samples, min, max)``; the samples keep the shape of ``x`` if all are finite, else they
        are 1-d; ``(0 elements, 0.0, 0.0)`` where there are none.

    >>> finite_samples(torch.tensor([1.0, float("nan"), -3.0]))
    (tensor([ 1., -3.]), -3.0, 1.0)
    """
    x = x.detach().to(torch.float32)
    if not x.numel():
        return x, 0.0, 0.0
    low, high = (end.item() for end in torch.aminmax(x))
    if math.isfinite(low) and math.isfinite(high):
        return x, low, high
    return finite_samples(x[torch.isfinite(x)])
