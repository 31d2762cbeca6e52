"""A collector: the histogram that a calibrator wants, and the range that comes out of it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qatkit.errors import QatkitError
from qatkit.observers.calibrators.growing import GrowingHistogram, GrowingSignedHistogram
from qatkit.observers.calibrators.histogram import Histogram, Settings, check_settings
from qatkit.observers.calibrators.registry import CALIBRATORS, Calibrator
from qatkit.observers.calibrators.streaming import StreamingHistogram
from qatkit.spec import QuantSpec


class Collector:
    """Sees all tensors of one quantizer and estimates its range from all of them.

    Args:
        method: a name in `CALIBRATORS`.
        spec: the grid to estimate the range for, without an axis.
        percentile: see `qatkit.observers.histogram_threshold`.
        coverage: see there.

    Attributes:
        batches: how many tensors it has seen.

    Raises:
        QatkitError: a setting is out of its range.

    >>> collector = Collector("percentile", QuantSpec(), percentile=60.0)
    >>> collector.add(torch.tensor([-8.0, 1.0, 2.0, 2.5]))
    >>> collector.range()
    (-2.5, 2.5)
    """

    def __init__(
        self, method: str, spec: QuantSpec, *, percentile: float = 99.99, coverage: float = 0.99
    ) -> None:
        """Start with nothing."""
        self.batches = 0
        self._spec = spec
        self._calibrator = CALIBRATORS[method]
        self._settings = Settings(spec.num_bits, False, percentile, coverage, spec.sigma)
        check_settings(self._settings, "calibrate")
        self._samples = _start(self._calibrator)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Count the elements of ``x``; those that are not finite are ignored."""
        self.batches += 1
        self._samples.add(x)

    @property
    def samples(self) -> StreamingHistogram | GrowingHistogram | GrowingSignedHistogram:
        """The histogram of all samples so far."""
        return self._samples

    def merge(self, other: Collector) -> None:
        """Add what the collector of another process has seen: exact, in any order.

        Raises:
            QatkitError: for the ``-exact`` methods, whose bins depend on the first tensor.
        """
        mine, theirs = self._samples, other._samples
        if not (isinstance(mine, StreamingHistogram) and isinstance(theirs, StreamingHistogram)):
            raise QatkitError(
                f"{self._calibrator.name}: its histograms cannot be merged, give all data to one "
                f"process or take {self._calibrator.name.removesuffix('-exact')!r}"
            )
        self.batches += other.batches
        mine.merge(theirs)

    def range(self) -> tuple[float, float]:
        """Return ``(min, max)``: the threshold on both sides of zero, never wider than the data."""
        low, high = self._samples.extremes.min_val, self._samples.extremes.max_val
        spec = self._spec
        # An affine grid spends all its codes on the side of zero where the data is.
        unsigned = not spec.signed if spec.symmetric else low >= 0 or high <= 0
        histogram = self._histogram(unsigned=spec.symmetric and not spec.signed)
        settings = replace(self._settings, unsigned=unsigned)
        end = self._calibrator.threshold(histogram, settings) if histogram.top else 0.0
        return min(max(low, -end), end), max(min(high, end), -end)

    def _histogram(self, *, unsigned: bool) -> Histogram:
        if not isinstance(self._samples, StreamingHistogram):
            return self._samples.histogram()
        bins = self._calibrator.bins
        if self._calibrator.source == "signed":
            return self._samples.signed(bins)
        if self._calibrator.source == "rounded":
            return self._samples.rounded(bins, unsigned=unsigned)
        return self._samples.magnitude(bins, unsigned=unsigned)


def _start(
    calibrator: Calibrator,
) -> StreamingHistogram | GrowingHistogram | GrowingSignedHistogram:
    if calibrator.source == "growing":
        return GrowingHistogram()
    if calibrator.source == "growing-signed":
        return GrowingSignedHistogram()
    return StreamingHistogram(count_zeros=calibrator.source == "rounded")
