"""The range with the least mean squared error of the quantized histogram.

For a candidate amax, ``s = amax / L`` with ``L = 2^(bits - 1 + unsigned) - 1``, the error is
``sum_k c_k (x_k - s clip(round(x_k / s), 0, L))^2`` over bin centers ``x_k``. The bins that round
to level q are neighbors, so with the running sums ``S0, S1, S2`` of ``c, c x, c x^2`` it is

    S2 - 2 s sum_q q S1_q + s^2 sum_q q^2 S0_q,

which costs L + 1 steps for a candidate instead of N. Candidates are the centers of the bins from
128 on; the first minimum wins.

Source: NVIDIA pytorch-quantization 2.2.1, ``calib/histogram.py``.
"""

from __future__ import annotations

import numpy as np

from qatkit.observers.calibrators.histogram import FIRST_CUT, Floats, Histogram, Settings

_BLOCK = 1 << 18
_TIE = 1e-14


def mse_threshold(histogram: Histogram, settings: Settings) -> float:
    """Return the bin center that, as amax, has the least squared error.

    >>> counts = np.maximum(1000 - np.arange(256) * 5, 0)
    >>> mse_threshold(Histogram(counts, np.arange(257.0)), Settings()) < 205
    True
    """
    counts, centers = histogram.counts.astype(np.float64), histogram.centers
    candidates = centers[min(FIRST_CUT, len(centers) - 1) :]
    errors = squared_errors(counts, centers, candidates, settings.levels - 1)
    close = errors <= errors.min() + _TIE * float(counts @ np.square(centers))
    return float(candidates[int(np.argmax(close))])


def squared_errors(counts: Floats, centers: Floats, candidates: Floats, steps: int) -> Floats:
    """Return the error of each candidate.

    Args:
        counts: (N,).
        centers: (N,), ascending, none negative.
        candidates: (K,), positive.
        steps: L, the highest code.

    Returns:
        (K,) float64.

    >>> squared_errors(np.ones(3), np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0]), 1)
    array([2., 2.])
    """
    by_level = steps < len(centers)
    rows = max(_BLOCK // (steps + 1 if by_level else len(centers)), 1)
    blocks = [candidates[start : start + rows] for start in range(0, len(candidates), rows)]
    error = _by_level if by_level else _by_bin
    return np.concatenate([error(counts, centers, block / steps, steps) for block in blocks])


def _by_level(counts: Floats, centers: Floats, scales: Floats, steps: int) -> Floats:
    count, first = (
        np.concatenate(([0.0], np.cumsum(values))) for values in (counts, counts * centers)
    )
    middles = (np.arange(steps) + 0.5) * scales[:, None]
    bounds = np.full((len(scales), steps + 2), len(centers))
    bounds[:, 0] = 0
    bounds[:, 1:-1] = np.searchsorted(centers, middles)
    codes = np.arange(steps + 1.0)
    linear = np.diff(first[bounds], axis=1) @ codes
    square = np.diff(count[bounds], axis=1) @ np.square(codes)
    total = float(counts @ np.square(centers))
    result: Floats = total - 2 * scales * linear + np.square(scales) * square
    return result


def _by_bin(counts: Floats, centers: Floats, scales: Floats, steps: int) -> Floats:
    codes = np.rint(centers / scales[:, None]).clip(0, steps)
    result: Floats = np.square(codes * scales[:, None] - centers) @ counts
    return result
