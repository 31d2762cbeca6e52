"""Range estimators that run on each forward (`OBSERVERS`), and calibrators of a whole data set."""

from __future__ import annotations

from qatkit.observers.calibrators import CALIBRATORS, histogram_threshold
from qatkit.observers.memory import is_empty, update
from qatkit.observers.observer import Observer, Range
from qatkit.observers.registry import OBSERVERS

__all__ = [
    "CALIBRATORS",
    "OBSERVERS",
    "Observer",
    "Range",
    "histogram_threshold",
    "is_empty",
    "update",
]
