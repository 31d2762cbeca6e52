"""The histogram of all samples of a data set, in one pass and constant memory.

The bins are as wide as a power of two, and their edges are the multiples of that width:

    bin k = floor(|x| / w) for x >= 0, -1 - floor(|x| / w) below, k = -K .. K - 1,

with ``w = 2^e / K`` and ``2^e`` the smallest power of two above every |x| so far.

When a larger sample comes, w doubles and pairs of bins merge. As the edges for 2 w are among those
for w, that gives the same counts as if w had been the width from the start: the histogram depends
on the samples only, not on their order nor on how they were split into batches or processes. At
least half of the K bins on one side are in use.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from qatkit.observers.calibrators.histogram import Histogram, Ints
from qatkit.observers.calibrators.samples import Extremes, finite_samples

BINS = 4096
"""K, the bins on each side of zero."""

_LOG_BINS = BINS.bit_length() - 1
_SMALLEST = -100
_CHUNK = 1 << 24
_CPU_CHUNK = 1 << 17
"""What fits into the cache."""


class StreamingHistogram:
    """Counts of the finite samples, int64, on the device of the first tensor.

    Attributes:
        extremes: the smallest and the largest sample so far.
        zeros: how many were exactly 0; 0 unless they are counted.

    >>> histogram = StreamingHistogram()
    >>> histogram.add(torch.tensor([0.0, 0.0]))
    >>> histogram.add(torch.tensor([-3.0, 1.0, float("nan")]))
    >>> histogram.width * BINS, histogram.total
    (4.0, 4)
    """

    def __init__(self, *, count_zeros: bool = False) -> None:
        """Start with nothing."""
        self.extremes = Extremes()
        self.zeros = 0
        self._count_zeros = count_zeros
        # Zeros are in bin 0 whatever the width: there is none until something else comes.
        self._exponent: int | None = None
        self._counts: Tensor | None = None

    @property
    def width(self) -> float:
        """The width of a bin; 0.0 where there were only zeros."""
        return 0.0 if self._exponent is None else math.ldexp(1.0, self._exponent - _LOG_BINS)

    @property
    def total(self) -> int:
        """How many samples were counted."""
        return 0 if self._counts is None else int(self._counts.sum())

    @property
    def counts(self) -> Tensor:
        """The counts of the bins -K .. K - 1, (2 K,) int64, those of the histogram itself."""
        return torch.zeros(2 * BINS, dtype=torch.int64) if self._counts is None else self._counts

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Count the finite elements of ``x``, of any shape and float dtype; done in float32."""
        x, low, high = finite_samples(x)
        if not x.numel():
            return
        self.extend(low, high, x.device)
        assert self._counts is not None
        if self._count_zeros:
            self.zeros += x.numel() - int(torch.count_nonzero(x))
        if self._exponent is None:
            self._counts[BINS] += x.numel()
            return
        factor = math.ldexp(1.0, _LOG_BINS - self._exponent)
        flat = x.flatten()
        size = _CPU_CHUNK if x.device.type == "cpu" else _CHUNK
        for start in range(0, flat.numel(), size):
            part = flat[start : start + size]
            # Exact: the factor is a power of two, and the rest are whole numbers up to 2 K.
            codes = part.mul(factor).trunc_().add_(float(BINS)).to(torch.int16)
            if low < 0:
                codes -= (part < 0).to(torch.int16)
            self._counts += torch.bincount(codes, minlength=2 * BINS)

    def merge(self, other: StreamingHistogram) -> None:
        """Add what another process has counted; exactly what one process would have counted."""
        if other._counts is None:
            return
        ends = other.extremes
        self.extend(ends.min_val, ends.max_val, other._counts.device)
        assert self._counts is not None
        theirs = _coarser(other._counts, _steps(other._exponent, self._exponent))
        self._counts += theirs.to(self._counts.device)
        self.zeros += other.zeros

    def signed(self, bins: int) -> Histogram:
        """Return the histogram of x from the first to the last bin used, at most ``bins``."""
        counts = self._numpy()
        used = np.flatnonzero(counts)
        first, last = (int(used[0]) - BINS, int(used[-1]) - BINS) if used.size else (0, 0)
        size = 1
        while last // size - first // size + 1 > bins:
            size *= 2
        counts = counts.reshape(-1, size).sum(1)
        first, last, middle = first // size, last // size, BINS // size
        edges = np.arange(first, last + 2, dtype=np.float64) * (self.width * size)
        return Histogram(counts[first + middle : last + middle + 1], edges)

    def magnitude(self, bins: int, *, unsigned: bool = False) -> Histogram:
        """Return the histogram of |x| from 0 to the last bin used, at most ``bins``.

        With ``unsigned`` codes everything below zero becomes zero, and counts as that.
        """
        counts = self._magnitudes(unsigned=unsigned)
        last = _last(counts)
        size = 1
        while last // size + 1 > bins:
            size *= 2
        counts = counts.reshape(-1, size).sum(1)[: last // size + 1]
        return Histogram(counts, np.arange(len(counts) + 1.0) * (self.width * size))

    def rounded(self, bins: int, *, unsigned: bool = False) -> Histogram:
        """Return the histogram of the nonzero |x| in bins around the multiples of their width.

        Bin k is ``(k - 1/2) w <= |x| < (k + 1/2) w``, for at most ``bins`` bins.
        """
        counts = self._magnitudes(unsigned=unsigned)
        below = int(self._numpy()[:BINS].sum()) if unsigned else 0
        counts[0] -= self.zeros + below
        last = _last(counts)
        size = 2
        while (last + size // 2) // size + 1 > bins:
            size *= 2
        shifted = np.concatenate((np.zeros(size // 2, np.int64), counts, np.zeros(size, np.int64)))
        used = (last + size // 2) // size + 1
        counts = shifted[: used * size].reshape(-1, size).sum(1)
        return Histogram(counts, (np.arange(used + 1.0) - 0.5) * (self.width * size))

    def _magnitudes(self, *, unsigned: bool) -> Ints:
        counts = self._numpy()
        above: Ints = counts[BINS:].copy()
        below = counts[:BINS][::-1]
        if unsigned:
            above[0] += below.sum()
        else:
            above += below
        return above

    def _numpy(self) -> Ints:
        if self._counts is None:
            return np.zeros(2 * BINS, np.int64)
        counts: Ints = self._counts.cpu().numpy()
        return counts

    def extend(self, low: float, high: float, device: torch.device) -> None:
        """Take ``low`` and ``high`` into the range and make the bins wide enough for it.

        Args:
            low: the smallest of some samples that another process has counted.
            high: the largest.
            device: where the counts are going to be, if there are none yet.
        """
        if self._counts is None:
            self._counts = torch.zeros(2 * BINS, dtype=torch.int64, device=device)
        self.extremes.include(low, high)
        largest = max(-low, high)
        if not largest:
            return
        exponent = max(math.frexp(largest)[1], _SMALLEST)
        if self._exponent is None or exponent > self._exponent:
            self._counts = _coarser(self._counts, _steps(self._exponent, exponent))
            self._exponent = exponent


def _steps(old: int | None, new: int | None) -> int:
    """Return how often pairs of bins merge on the way from one exponent to another."""
    return 0 if old is None or new is None else new - old


def _coarser(counts: Tensor, steps: int) -> Tensor:
    """Return the counts for bins that are ``2^steps`` times as wide, in a tensor of equal size."""
    size = 1 << min(steps, _LOG_BINS)
    if size == 1:
        return counts
    wider = torch.zeros_like(counts)
    half = BINS // size
    wider[BINS - half : BINS + half] = counts.reshape(-1, size).sum(1)
    return wider


def _last(counts: Ints) -> int:
    used = np.flatnonzero(counts)
    return int(used[-1]) if used.size else 0
