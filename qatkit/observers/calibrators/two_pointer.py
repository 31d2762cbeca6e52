"""Two pointers walk inwards from the ends of a histogram of x and drop the emptier bin each time.

| | ``two-pointer`` | ``two-pointer-exact`` |
|---|---|---|
| goes on while | the share left after it is >= the coverage | the share left before it is > it |
| right end | right edge of its bin | left edge of its bin |

At equal counts the right pointer moves. The threshold is the larger magnitude of the two ends; a
coverage of 1 clips nothing by default, and half a bin or more in the exact variant.

Source: the published two-pointer histogram (../shared/design/range_estimation.md, section 2).
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from qatkit.observers.calibrators.histogram import Histogram, Settings


def two_pointer_threshold(histogram: Histogram, settings: Settings) -> float:
    """Return the threshold of the default variant.

    >>> thin = Histogram(np.array([1, 0, 50, 49]), np.arange(-2.0, 3.0))
    >>> two_pointer_threshold(thin, Settings(coverage=0.99))
    2.0
    >>> two_pointer_threshold(thin, Settings(coverage=0.5))
    1.0
    """
    counts = histogram.counts.tolist()
    kept = sum(counts)
    needed = math.ceil(Fraction(settings.coverage).limit_denominator(10**9) * kept)
    left, right = 0, len(counts) - 1
    while left < right:
        drop_left = counts[left] < counts[right]
        kept -= counts[left if drop_left else right]
        if kept < needed:
            break
        left, right = left + drop_left, right - (not drop_left)
    return float(max(abs(histogram.edges[left]), abs(histogram.edges[right + 1])))


def exact_two_pointer_threshold(histogram: Histogram, settings: Settings) -> float:
    """Return the threshold of the original."""
    counts, edges = histogram.counts.tolist(), np.abs(histogram.edges)
    total = kept = sum(counts)
    left, right = 0, len(counts) - 1
    while left <= right and kept / total > settings.coverage:
        if counts[left] < counts[right]:
            kept -= counts[left]
            left += 1
        else:
            kept -= counts[right]
            right -= 1
    # Of a single bin the right pointer can run out, below its first edge.
    return float(max(edges[min(left, len(counts))], edges[max(right, 0)]))
