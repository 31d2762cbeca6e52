"""Percentile range shrink: the range that leaves out a given share of the samples on each side.

With ``lo, hi`` the extremes, ``m = 255 / (hi - lo)`` and ``bin = round((x - lo) * m)``, half to
even, there are 256 bins. Bins are dropped from each side as long as at most
``K = floor(percentile * N / 100)`` elements go. With ``i`` and ``j`` the last bins that can go,
``lo' = max(lo, i / m + lo)`` and ``hi' = min(hi, j / m + lo)``; no bin can go, the end stays.

The mapping to bins is monotone, so ``i`` is one bin before that of the (K+1)-th smallest element.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qatkit import kernels
from qatkit.errors import QatkitError, QatkitTypeError
from qatkit.functional.exact_ti import exact_shrink_range
from qatkit.spec import check_percentile


def shrink_range(
    x: Tensor,
    percentile: float,
    *,
    axis: int | None = None,
    exact_ti: bool = False,
    phase: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the range of ``x`` without the outermost ``percentile`` percent on each side.

    Elements that are not finite are ignored. The range is never wider than the data, and it is
    ``(0, 0)`` where there is no data. Where ``percentile * N / 100`` is an integer K, K elements
    may go (the original drops fewer than K).

    Args:
        x: any shape and float dtype; computed in float32.
        percentile: percent of the samples that may be cut on each side, 0 <= p < 50.
        axis: one range for each index along this axis, ``None`` for one range.
        exact_ti: reproduce TI's answer bit by bit, in the dtype of ``x`` and with its float32
            running sums; any percentile is taken, and from 50 on the answer can be inverted, as
            there. Where the original raises (constant, not finite, empty) the answer is the one of
            the default. Per-tensor only.
        phase: take only every second row and column, starting at these (0 or 1), of an ``x`` of
            shape (N, C, H, W) with H, W > 4, as TI's fast mode does with a random phase; unless
            ``exact_ti`` the extremes of all of ``x`` are added. Per-tensor only.

    Returns:
        ``(min, max)``, () or (C,) float32, finite, min <= max.

    Raises:
        QatkitError: the percentile or the axis is out of range.

    Source: TI edgeai-modeloptimization, ``range_utils.py`` (range shrink), with integer counts.

    >>> low, high = shrink_range(torch.arange(257.0), 1.0)
    >>> round(low.item(), 4), round(high.item(), 4)
    (1.0039, 254.9961)
    """
    _check(x, axis, exact_ti=exact_ti, phase=phase)
    if not exact_ti:
        check_percentile(percentile, "shrink_range")
    x = x.detach()
    if phase is not None and percentile != 0 and x.dim() == 4 and min(x.shape[2:]) > 4:
        part = x[:, :, phase[0] :: 2, phase[1] :: 2]
        x = (
            part
            if exact_ti
            else torch.cat([part.flatten().to(torch.float32), torch.stack(shrink_range(x, 0.0))])
        )
    if exact_ti:
        exact = exact_shrink_range(x, percentile)
        if exact is not None:
            return exact
        percentile = min(max(percentile, 0.0), 49.0)
    return kernels.shrink(x, percentile, axis)


def count_nonfinite(x: Tensor) -> Tensor:
    """Return how many elements of ``x`` are NaN or infinite, a 0-d int64 tensor.

    >>> count_nonfinite(torch.tensor([1.0, float("nan"), float("inf")]))
    tensor(2)
    """
    return torch.isfinite(x.detach()).logical_not_().sum()


def _check(x: Tensor, axis: int | None, *, exact_ti: bool, phase: tuple[int, int] | None) -> None:
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise QatkitTypeError(f"shrink_range(x): got {kind}, give a floating point tensor")
    if axis is None:
        return
    if not -x.dim() <= axis < x.dim():
        raise QatkitError(
            f"shrink_range(axis={axis}): x has shape {tuple(x.shape)}, give an axis of it or None"
        )
    if exact_ti or phase is not None:
        raise QatkitError(
            f"shrink_range(axis={axis}): exact_ti and phase are per-tensor, leave axis at None"
        )
