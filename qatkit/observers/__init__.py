"""Range estimators that run on each forward (`OBSERVERS`), and calibrators of a whole data set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qatkit.observers.memory import is_empty, update
from qatkit.observers.observer import Observer, Range
from qatkit.observers.registry import OBSERVERS

if TYPE_CHECKING:
    from qatkit.observers.calibrators import CALIBRATORS, histogram_threshold

__all__ = [
    "CALIBRATORS",
    "OBSERVERS",
    "Observer",
    "Range",
    "histogram_threshold",
    "is_empty",
    "update",
]


def __getattr__(name: str) -> object:
    """Import the calibrators at their first use: training and export do without them."""
    if name not in ("CALIBRATORS", "histogram_threshold"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qatkit.observers import calibrators

    return getattr(calibrators, name)
