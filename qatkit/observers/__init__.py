"""Range estimators that run on each forward, by name in `OBSERVERS`."""

from __future__ import annotations

from qatkit.observers.memory import is_empty, update
from qatkit.observers.observer import Observer, Range
from qatkit.observers.registry import OBSERVERS

__all__ = ["OBSERVERS", "Observer", "Range", "is_empty", "update"]
