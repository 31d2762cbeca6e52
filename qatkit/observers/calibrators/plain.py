"""Thresholds read off a histogram: the largest magnitude, a percentile, mean and deviation.

Source: NVIDIA pytorch-quantization, ``calib/histogram.py`` (percentile); TI
    edgeai-modeloptimization, ``range_utils.py`` (sigma).
"""

from __future__ import annotations

import math

import numpy as np

from qatkit.observers.calibrators.histogram import Histogram, Settings


def max_threshold(histogram: Histogram, settings: Settings) -> float:
    """Return the outer edge of the outermost bin that is not empty."""
    return histogram.top


def percentile_threshold(histogram: Histogram, settings: Settings) -> float:
    """Return the lower edge of the bin with which the share of the samples reaches the percentile.

    At 100 nothing is clipped (the original returns the lower edge there too). The lower edge of
    the first bin, 0, is no range: its upper edge takes its place.

    >>> shares = Histogram(np.array([50, 40, 9, 1]), np.arange(5.0))
    >>> [percentile_threshold(shares, Settings(percentile=p)) for p in (40.0, 95.0, 100.0)]
    [1.0, 2.0, 4.0]
    """
    if settings.percentile == 100:
        return histogram.top
    shares = np.cumsum(histogram.counts / histogram.counts.sum())
    first = int(np.searchsorted(shares, settings.percentile / 100))
    if first == len(shares):
        return histogram.top
    return min(float(histogram.edges[max(first, 1)]), histogram.top)


def sigma_threshold(histogram: Histogram, settings: Settings) -> float:
    """Return ``max(|mean - d std|, |mean + d std|)``, at most the largest magnitude.

    There are ``d = 3`` deviations unless the settings say otherwise.

    The moments are those of the sample (n - 1), of a histogram of x or of |x|, whatever is given.

    >>> even = Histogram(np.array([1, 2, 1]), np.array([-1.5, -0.5, 0.5, 1.5]))
    >>> sigma_threshold(even, Settings())
    1.5
    """
    counts, centers = histogram.counts.astype(np.float64), histogram.centers
    total = counts.sum()
    mean = float(counts @ centers / total)
    variance = float(counts @ np.square(centers - mean)) / max(total - 1.0, 1.0)
    reach = settings.deviations * math.sqrt(variance)
    return min(max(abs(mean - reach), abs(mean + reach)), histogram.top)
