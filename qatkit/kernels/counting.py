"""The bins at which the tails of many numbers end, found by counting, eager on the CPU.

Putting every element into its bin takes six passes. Bins keep the order, though, so counting the
elements up to the last float of a bin says the same in one pass: a sample names a bin for each
side, and counting tells whether it is the one. Exact for any data; where the sample is wrong, it is
a walk to the right bin.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from qatkit.kernels.portable import LAST_BIN

_CHUNK = 1024
_SAMPLE = 16
"""One chunk of so many goes to the sample."""
_SMALL = 2**16
"""With fewer elements, putting all into bins is as fast."""
_Counts: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"


def ends_of_tails(x_M: Tensor, low: np.float32, factor: np.float32, most: int) -> tuple[int, int]:
    """Return the first and the last bin that cannot be dropped; see `portable.Tails`.

    Args:
        x_M: (M,) float32, contiguous, finite.
        low: the smallest element.
        factor: bins per unit length.
        most: how many elements may be dropped on each side.
    """
    if len(x_M) < _SMALL:
        counts = _histogram(x_M, low, factor)
        first, dropped = (int((side.cumsum() <= most).sum()) for side in (counts, counts[::-1]))
        return first, LAST_BIN - dropped
    counter = _Counter(x_M, low, factor)
    counts, share = counter.sampled(most)
    first = min(LAST_BIN, int(np.count_nonzero(counts.cumsum() <= share)))
    while first > 0 and counter.at_most(first - 1) > most:
        first -= 1
    while counter.at_most(first) <= most:
        first += 1
    total = len(x_M)
    last = max(0, LAST_BIN - int(np.count_nonzero(counts[::-1].cumsum() <= share)))
    while last < LAST_BIN and total - counter.at_most(last) > most:
        last += 1
    while total - counter.at_most(last - 1) <= most:
        last -= 1
    return first, last


class _Counter:
    """Counts the elements of the lower bins, each number of bins once."""

    def __init__(self, x_M: Tensor, low: np.float32, factor: np.float32) -> None:
        self._tensor, self._x_M = x_M, x_M.numpy()
        self._low, self._factor = low, factor
        self._known = {-1: 0, LAST_BIN: len(x_M)}

    def sampled(self, most: int) -> tuple[_Counts, float]:
        """Return the counts of all bins in a sample, and how much of it may be dropped."""
        chunks = len(self._x_M) // _CHUNK
        part = self._tensor[: chunks * _CHUNK].view(chunks, _CHUNK)[::_SAMPLE].reshape(-1)
        counts = _histogram(part, self._low, self._factor)
        return counts, most * len(part) / len(self._x_M)

    def at_most(self, code: int) -> int:
        """Return how many elements are in the bins up to ``code``."""
        if code not in self._known:
            self._known[code] = int(np.count_nonzero(self._x_M <= self._last_float(code)))
        return self._known[code]

    def _last_float(self, code: int) -> np.float32:
        """Return the largest float whose bin, round((x - low) * factor), is at most ``code``."""
        near = self._low + np.float32(code + 0.5) / self._factor
        around = np.spacing(np.maximum(np.abs(near), np.abs(self._low)))  # what x - low rounds to
        below, above = _place(near - 4 * around), _place(near + 4 * around)
        while above - below > 1:
            middle = (below + above) // 2
            inside = np.rint((_at(middle) - self._low) * self._factor) <= code
            below, above = (middle, above) if inside else (below, middle)
        return _at(below)


def _histogram(x_M: Tensor, low: np.float32, factor: np.float32) -> _Counts:
    bins = (x_M - float(low)).mul_(float(factor)).round_().int()
    return np.bincount(bins.numpy(), minlength=LAST_BIN + 1)


def _place(x: np.float32) -> int:
    """Return the place of a float among all of them."""
    bits = int(np.float32(x).view(np.int32))
    return bits if bits >= 0 else -(bits & 0x7FFFFFFF)


def _at(place: int) -> np.float32:
    """Return the float at a place."""
    bits = place if place >= 0 else -place | -0x80000000
    number: np.float32 = np.int32(bits).view(np.float32)
    return number
