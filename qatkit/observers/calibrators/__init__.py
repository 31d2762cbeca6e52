"""Calibrators: from the histogram of a data set to a range, by name in `CALIBRATORS`."""

from __future__ import annotations

from qatkit.observers.calibrators.histogram import Histogram, Settings
from qatkit.observers.calibrators.registry import CALIBRATORS, Calibrator, histogram_threshold

__all__ = ["CALIBRATORS", "Calibrator", "Histogram", "Settings", "histogram_threshold"]
