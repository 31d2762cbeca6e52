"""A progress bar like that of `qatkit.calibrate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def progress_bar(items: Sequence[T], what: str, unit: str, progress: bool) -> Sequence[T]:
    """Return ``items``, with a bar on a terminal if tqdm is installed."""
    if not progress:
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    bar: Sequence[T] = tqdm(items, desc=what, unit=unit, leave=False, disable=None)
    return bar
