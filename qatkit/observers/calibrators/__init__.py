"""Calibrators: from the histogram of a data set to a range, by name in `CALIBRATORS`."""

from __future__ import annotations

from qatkit.observers.calibrators.collector import Collector
from qatkit.observers.calibrators.histogram import Histogram, Settings, check_settings
from qatkit.observers.calibrators.registry import CALIBRATORS, Calibrator, histogram_threshold
from qatkit.observers.calibrators.streaming import StreamingHistogram

__all__ = [
    "CALIBRATORS",
    "Calibrator",
    "Collector",
    "Histogram",
    "Settings",
    "StreamingHistogram",
    "check_settings",
    "histogram_threshold",
]
