"""A checked histogram and the settings of a calibrator, with what several calibrators need."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from qatkit.errors import QatkitError

Floats: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
Ints: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"

FIRST_CUT = 128
"""The narrowest range that the searching calibrators consider, in bins."""


@dataclass(frozen=True)
class Settings:
    """What a calibrator may be told.

    Attributes:
        num_bits: width of a code, 2..16.
        unsigned: codes from 0.
        percentile: percent of the samples to keep, for ``percentile``.
        coverage: share of the samples to keep, for the two-pointer methods.
        deviations: half width of the range in standard deviations, for ``sigma``.
    """

    num_bits: int = 8
    unsigned: bool = False
    percentile: float = 99.99
    coverage: float = 0.99
    deviations: float = 3.0

    @property
    def levels(self) -> int:
        """How many steps of the grid there are from 0 to the threshold, 2^(bits - 1 + unsigned)."""
        return 1 << (self.num_bits - 1 + int(self.unsigned))


@dataclass(frozen=True)
class Histogram:
    """Counts between edges; both arrays are the calibrator's own and it must not write to them.

    Attributes:
        counts: (N,) int64.
        edges: (N + 1,) float64, ascending; bin k is ``edges[k] <= x < edges[k + 1]``.
    """

    counts: Ints
    edges: Floats

    @property
    def centers(self) -> Floats:
        """The middle of each bin, (N,) float64."""
        middle: Floats = self.edges[:-1] / 2 + self.edges[1:] / 2
        return middle

    @property
    def width(self) -> float:
        """The width of a bin (all but the first have it)."""
        return float(self.edges[-1] - self.edges[-2])

    @property
    def top(self) -> float:
        """The largest magnitude that a counted sample can have; 0.0 where nothing was counted."""
        used = np.flatnonzero(self.counts)
        if not used.size:
            return 0.0
        return float(max(-self.edges[used[0]], self.edges[used[-1] + 1], 0.0))

    def without_zeros(self) -> Histogram:
        """Return it with the first bin lowered to the second, without trailing empty bins.

        ReLU and sparsity put a spike into the bin of zero. Zero lies on every grid, so that the
        spike says nothing about the range; counted, it would drown the rest.
        """
        used = np.flatnonzero(self.counts)
        last = int(used[-1]) + 1 if used.size else 1
        counts = self.counts[:last].copy()
        if last > 1:
            counts[0] = min(counts[0], counts[1])
        return Histogram(counts, self.edges[: last + 1])


def checked(counts: object, bin_edges: object, where: str) -> Histogram:
    """Return a histogram of its own arrays.

    Raises:
        QatkitError: the arrays have the wrong shape or hold what no histogram holds; the message
            starts with ``where``.
    """
    numbers, edges = _floats(counts, f"{where}(counts)"), _floats(bin_edges, f"{where}(bin_edges)")
    if edges.size != numbers.size + 1 or not numbers.size:
        raise QatkitError(
            f"{where}: {numbers.size} counts and {edges.size} bin_edges, give N >= 1 counts and "
            "N + 1 edges"
        )
    if (numbers < 0).any() or (numbers != np.floor(numbers)).any() or numbers.sum() >= 2.0**62:
        odd = int(np.argmax((numbers < 0) | (numbers != np.floor(numbers))))
        raise QatkitError(
            f"{where}: counts[{odd}] is {numbers[odd]:g}, give whole numbers, none negative"
        )
    if (np.diff(edges) < 0).any():
        odd = int(np.argmax(np.diff(edges) < 0))
        raise QatkitError(
            f"{where}: bin_edges[{odd + 1}] is below bin_edges[{odd}], give ascending edges"
        )
    return Histogram(_array(counts).astype(np.int64), edges)


def check_settings(settings: Settings, where: str) -> None:
    """Raise a `QatkitError` that starts with ``where`` if a setting is out of its range."""
    bits = settings.num_bits
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 16:
        raise QatkitError(f"{where}(num_bits={bits!r}): give an integer from 2 to 16")
    if not isinstance(settings.unsigned, bool):
        raise QatkitError(f"{where}(unsigned={settings.unsigned!r}): give True or False")
    if not _within(settings.percentile, 100.0):
        raise QatkitError(
            f"{where}(percentile={settings.percentile!r}): percent of the samples to keep, "
            "give 0 < percentile <= 100"
        )
    if not _within(settings.coverage, 1.0):
        raise QatkitError(
            f"{where}(coverage={settings.coverage!r}): share of the samples to keep, "
            "give 0 < coverage <= 1"
        )


def _within(number: object, most: float) -> bool:
    plain = isinstance(number, int | float) and not isinstance(number, bool)
    return plain and 0 < number <= most and math.isfinite(number)  # type: ignore[operator, arg-type]


def _array(values: object) -> np.ndarray[Any, Any]:
    return np.array(values.detach().cpu().numpy() if isinstance(values, Tensor) else values)


def _floats(values: object, where: str) -> Floats:
    try:
        array = _array(values).astype(np.float64)
    except (TypeError, ValueError):
        raise QatkitError(f"{where}: a {type(values).__name__}, give an array of numbers") from None
    if array.ndim != 1 or not np.isfinite(array).all():
        raise QatkitError(f"{where}: shape {array.shape}, give a 1-d array of finite numbers")
    return array
