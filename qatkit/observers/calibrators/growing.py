"""Histograms built as the originals build theirs, for the ``-exact`` methods.

The first tensor sets the width of the bins, later ones add bins of the same width. Unlike the
originals these take zeros first, NaN, Inf and empty tensors; counts are int64; and beyond
`MOST_BINS` pairs of bins merge, as a tiny first tensor would otherwise make any number of them.

Source: NVIDIA pytorch-quantization 2.2.1, ``calib/histogram.py``; ``numpy.histogram``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qatkit.observers.calibrators.histogram import Floats, Histogram, Ints
from qatkit.observers.calibrators.samples import Extremes, finite_samples

MOST_BINS = 1 << 17
_SMALLEST = 2.0**-100
"""Below this a tensor cannot set a width: it counts as zeros."""
_LARGEST = 2.0**127
_CHUNK = 1 << 23
"""``torch.histc`` counts in float32, which is exact up to 2^24."""
_CPU_CHUNK = 1 << 15
"""``torch.histc`` shares out larger ones to threads, which costs more than it gains."""


class GrowingHistogram:
    """The histogram of |x| of pytorch-quantization: [0, max of the first tensor], then growing.

    >>> histogram = GrowingHistogram(4)
    >>> histogram.add(torch.tensor([1.0, -4.0]))
    >>> histogram.add(torch.tensor([5.5]))
    >>> histogram.histogram().counts
    array([0, 1, 0, 1, 0, 1])
    """

    def __init__(self, bins: int = 2048) -> None:
        """Start with nothing; ``bins`` is how many the first tensor gets."""
        self.extremes = Extremes()
        self._first_bins = bins
        self._zeros = 0
        self._width = np.float32(0)
        self._last = np.float32(0)
        self._counts = torch.zeros(0, dtype=torch.int64)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Count the finite elements of ``x``, on its device."""
        x, low, high = finite_samples(x)
        if not x.numel():
            return
        self.extremes.include(low, high)
        largest = np.float32(max(-low, high))
        if largest < _SMALLEST and not self._width:
            self._zeros += x.numel()
            return
        if not self._width:
            self._start(largest, x.device)
        elif largest > self._last:
            self._grow(largest)
        flat = x.flatten()
        size = _CPU_CHUNK if x.device.type == "cpu" else _CHUNK
        for start in range(0, flat.numel(), size):
            part = flat[start : start + size].abs()
            new = torch.histc(part, bins=len(self._counts), min=0.0, max=float(self._last))
            self._counts += new.to(torch.int64)

    def histogram(self) -> Histogram:
        """Return the counts with their edges."""
        if not self._width:
            return Histogram(np.array([self._zeros], np.int64), np.zeros(2))
        edges = np.linspace(0.0, float(self._last), len(self._counts) + 1)
        return Histogram(self._counts.cpu().numpy(), edges)

    def _start(self, largest: np.float32, device: torch.device) -> None:
        self._counts = torch.zeros(self._first_bins, dtype=torch.int64, device=device)
        self._counts[0] = self._zeros
        self._width, self._last = largest / np.float32(self._first_bins), largest

    def _grow(self, largest: np.float32) -> None:
        counts = self._counts
        while np.ceil(largest / self._width) > MOST_BINS:
            self._width *= np.float32(2)
            counts = torch.nn.functional.pad(counts, (0, len(counts) % 2)).view(-1, 2).sum(1)
        bins = max(int(np.ceil(largest / self._width)), len(counts))
        self._counts = torch.nn.functional.pad(counts, (0, bins - len(counts)))
        self._last = np.maximum(np.float32(bins) * self._width, largest)


class GrowingSignedHistogram:
    """``numpy.histogram(x, bins)`` of the first tensor, with more bins on both sides later.

    It counts on the CPU, as the original does.

    >>> histogram = GrowingSignedHistogram(2)
    >>> histogram.add(torch.tensor([-1.0, 1.0]))
    >>> histogram.add(torch.tensor([-1.5, 3.0]))
    >>> histogram.histogram().edges
    array([-2., -1.,  0.,  1.,  2.,  3.])
    """

    def __init__(self, bins: int = 100) -> None:
        """Start with nothing; ``bins`` is how many the first tensor gets."""
        self.extremes = Extremes()
        self._first_bins = bins
        self._zeros = 0
        self._edges: Floats | None = None
        self._counts: Ints = np.zeros(0, np.int64)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Count the finite elements of ``x``."""
        x, low, high = finite_samples(x)
        if not x.numel():
            return
        self.extremes.include(low, high)
        if self._edges is None and max(-low, high) < _SMALLEST:
            self._zeros += x.numel()
            return
        # In float32, as the original, unless the width of the range is no float32.
        samples = (x if high - low < _LARGEST else x.double()).flatten().cpu().numpy()
        if self._edges is None:
            self._start(samples)
            return
        self._grow(low, high)
        ends = (float(self._edges[0]), float(self._edges[-1]))
        self._counts = self._counts + np.histogram(samples, len(self._counts), ends)[0]

    def histogram(self) -> Histogram:
        """Return the counts with their edges."""
        if self._edges is None:
            return Histogram(np.array([self._zeros], np.int64), np.zeros(2))
        return Histogram(self._counts, self._edges)

    def _start(self, samples: np.ndarray[Any, Any]) -> None:
        # Zeros that came before are outside the range unless one is put into it.
        zero = np.zeros(int(self._zeros > 0), samples.dtype)
        counts, edges = np.histogram(np.concatenate((samples, zero)), self._first_bins)
        self._counts, self._edges = counts.astype(np.int64), edges.astype(np.float64)
        if self._zeros:
            at = int(np.searchsorted(self._edges, 0.0, side="right")) - 1
            self._counts[min(at, len(counts) - 1)] += self._zeros - 1

    def _grow(self, low: float, high: float) -> None:
        edges, counts = self._edges, self._counts
        assert edges is not None
        first, last = float(edges[0]), float(edges[-1])
        if first <= low and high <= last:
            return
        width = (last - first) / len(counts)
        while max(high, last) - min(low, first) > MOST_BINS * width:
            counts = np.pad(counts, (0, len(counts) % 2)).reshape(-1, 2).sum(1)
            width *= 2
        left = max(int(np.ceil((first - low) / width)), 0)
        right = max(int(np.ceil((high - first) / width)) - len(counts), 0)
        self._counts = np.pad(counts, (left, right))
        self._edges = first + np.arange(-left, len(counts) + right + 1, dtype=np.float64) * width
