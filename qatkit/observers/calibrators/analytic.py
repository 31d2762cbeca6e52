"""Thresholds from a model of the error: rounding noise inside the range, clipping outside.

With ``M = 2^(bits - 1 + unsigned)`` steps from 0 to the threshold t, the rounding noise is
``t^2 / (12 M^2)``. ACIQ takes the density of |x| from a family,

| family | f(x) for x >= 0 | mean / root mean square | optimum, z = t / b or t / sigma |
|---|---|---|---|
| Laplace | exp(-x / b) / b | 0.7071 | z exp(z) = 12 M^2 |
| Gauss | 2 phi(x / sigma) / sigma | 0.7979 | z / (12 M^2) = 2 (phi(z) - z Phi(-z)) |

(the family whose ratio of the moments is closer to that of the data), OCTAV takes the data itself.
Zeros lie on the grid and make no noise: their bin is lowered to the next one first.

Source: Banner et al. 2018, ACIQ (arXiv:1810.05723), the published tables to 0.02; Sakr et al. 2022,
    OCTAV (arXiv:2206.06501), equation of the fixed point.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from qatkit.observers.calibrators.histogram import Histogram, Settings

_LAPLACE, _GAUSS = math.sqrt(0.5), math.sqrt(2 / math.pi)
_STEPS = 100
_PRECISION = 1e-10


def aciq_threshold(histogram: Histogram, settings: Settings) -> float:
    """Return the optimal threshold for the Laplace or Gauss density that fits the data."""
    trimmed = histogram.without_zeros()
    counts, centers = trimmed.counts.astype(np.float64), trimmed.centers
    total = counts.sum()
    if not total:
        return histogram.top
    mean, square = float(counts @ centers / total), float(counts @ np.square(centers) / total)
    deviation = math.sqrt(square)
    if 2 * mean < (_LAPLACE + _GAUSS) * deviation:
        return min(laplace_clip(settings.levels) * mean, histogram.top)
    return min(gauss_clip(settings.levels) * deviation, histogram.top)


def laplace_clip(steps: int) -> float:
    """Return the optimal threshold in units of b, for ``steps`` from 0 to the threshold.

    >>> [round(laplace_clip(2 ** (bits - 1)), 2) for bits in (2, 3, 4, 8)]
    [2.83, 3.9, 5.03, 9.9]
    """
    return _root(lambda z: math.exp(-z) - z / (12 * steps**2))


def gauss_clip(steps: int) -> float:
    """Return the optimal threshold in standard deviations.

    >>> [round(gauss_clip(2 ** (bits - 1)), 2) for bits in (2, 3, 4, 8)]
    [1.71, 2.15, 2.56, 3.92]
    """

    def slope(z: float) -> float:
        density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        clipped = density - z * math.erfc(z / math.sqrt(2)) / 2
        return 2 * clipped - z / (12 * steps**2)

    return _root(slope)


def octav_threshold(histogram: Histogram, settings: Settings) -> float:
    """Return the fixed point of ``t = E[x; x > t] / (P(0 < x <= t) / (12 M^2) + P(x > t))``.

    Newton's method on the error, from the mean on; sums are over bin centers.

    >>> spread = Histogram(np.array([100, 90, 50, 10, 1]), np.arange(6.0))
    >>> octav_threshold(spread, Settings(num_bits=2)) < octav_threshold(spread, Settings())
    True
    """
    trimmed = histogram.without_zeros()
    counts, centers = trimmed.counts.astype(np.float64), trimmed.centers
    total = counts.sum()
    if not total:
        return histogram.top
    # Sums over the bins from k on, for k = 0..N.
    number, moment = (
        np.append(np.cumsum(values[::-1])[::-1], 0.0) for values in (counts, counts * centers)
    )
    threshold, noise = float(moment[0] / total), 1 / (12 * settings.levels**2)
    for _ in range(_STEPS):
        k = int(np.searchsorted(centers, threshold, side="right"))
        new = float(moment[k] / ((total - number[k]) * noise + number[k]))
        if new == 0.0 or abs(new - threshold) <= _PRECISION * threshold:
            break
        threshold = new
    return min(threshold, histogram.top)


def _root(falling: Callable[[float], float]) -> float:
    """Return the zero of a falling function between 0 and 64."""
    low, high = 0.0, 64.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2
