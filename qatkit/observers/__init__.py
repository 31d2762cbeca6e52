"""Range estimators that run on each forward (`OBSERVERS`), and calibrators of a whole data set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qatkit.observers.eager import join_of, observing_of, remember, saw_nothing
from qatkit.observers.estimators import percentile_of
from qatkit.observers.learned import (
    Grid,
    gradient_of,
    grid_of,
    grid_of_range,
    range_of,
    to_parameters,
)
from qatkit.observers.memory import is_empty, update
from qatkit.observers.observer import Observer, Range
from qatkit.observers.observing import observe
from qatkit.observers.registry import OBSERVERS
from qatkit.observers.starts import start
from qatkit.observers.stored import holds_range, names_of, translated

if TYPE_CHECKING:
    from qatkit.observers.calibrators import CALIBRATORS, histogram_threshold

__all__ = [
    "CALIBRATORS",
    "OBSERVERS",
    "Grid",
    "Observer",
    "Range",
    "gradient_of",
    "grid_of",
    "grid_of_range",
    "histogram_threshold",
    "holds_range",
    "is_empty",
    "join_of",
    "names_of",
    "observe",
    "observing_of",
    "percentile_of",
    "range_of",
    "remember",
    "saw_nothing",
    "start",
    "to_parameters",
    "translated",
    "update",
]


def __getattr__(name: str) -> object:
    """Import the calibrators at their first use: training and export do without them."""
    if name not in ("CALIBRATORS", "histogram_threshold"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qatkit.observers import calibrators

    return getattr(calibrators, name)
