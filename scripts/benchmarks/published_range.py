"""The percentile range the way TI's published code does it, step by step, as the one to beat."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def published_range(x: Tensor, percentile: float) -> tuple[float, float]:
    """Return the range: a histogram of 256 bins, and a walk from both of its ends.

    A bin is left out while the running share stays below the percentile.
    """
    low, high = x.min(), x.max()
    factor = (1 / (high - low)) * 255
    counts = torch.bincount(((x - low) * factor).round().int().flatten())
    share = counts.cpu().numpy().astype(np.float32) * np.float32(100) / np.float32(x.numel())
    first = _walk(share, percentile)
    last = len(share) - 1 - _walk(share[::-1], percentile)
    back = 1 / factor
    lowest = torch.maximum(low, first * back + low)
    highest = torch.minimum(high, last * back + low)
    return float(lowest), float(highest)


def _walk(share: np.ndarray, percentile: float) -> int:
    total, index = np.float32(0), 0
    for index, part in enumerate(share):  # noqa: B007
        total += part
        if total >= percentile:
            break
    return max(index - 1, 0)
