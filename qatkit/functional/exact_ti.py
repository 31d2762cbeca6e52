"""TI's range shrink, bit by bit, for those who must reproduce its results."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def exact_shrink_range(x: Tensor, percentile: float) -> tuple[Tensor, Tensor] | None:
    """Return the range that TI's code gives for ``x``, ``None`` where it raises or answers NaN.

    The differences from the default: arithmetic in the dtype of ``x``, shares of bins in float32
    with float32 running sums (NumPy 2), a bin is dropped while the running sum stays *below* the
    percentile, and the upper end can be a rounding below ``hi`` although nothing was dropped.

    Args:
        x: any shape, floating point.
        percentile: percent of the samples cut on each side, any number.

    Returns:
        ``(min, max)``, 0-d float32.

    Source: TI edgeai-modeloptimization at 6f4732f4, ``xnn/utils/range_utils.py``.

    >>> exact_shrink_range(torch.tensor([-1.0, 3.0]), 0.01)
    (tensor(-1.), tensor(3.))
    """
    if x.numel() == 0:
        return None
    low, high = x.min(), x.max()
    if percentile == 0 or bool((low == 0) & (high == 0)):
        return _float_pair(low, high) if bool(torch.isfinite(low) & torch.isfinite(high)) else None
    factor = (1 / (high - low)) * 255
    if not bool(torch.isfinite(factor) & (factor > 0)):
        return None
    counts = torch.bincount(((x - low) * factor).round().int().flatten())
    share = counts.cpu().numpy().astype(np.float32) * np.float32(100) / np.float32(x.numel())
    first = _last_below(share, percentile)
    last = len(share) - 1 - _last_below(share[::-1], percentile)
    back = 1 / factor
    return _float_pair(
        torch.maximum(low, first * back + low), torch.minimum(high, last * back + low)
    )


def _last_below(share: np.ndarray[Any, Any], percentile: float) -> int:
    sums = np.add.accumulate(share, dtype=np.float32)
    reached = np.flatnonzero(~(sums < np.float32(percentile)))
    stop = int(reached[0]) if len(reached) else len(share)
    return max(stop - 1, 0)


def _float_pair(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    return low.to(torch.float32), high.to(torch.float32)
