"""Progress bars: on a terminal, if tqdm is installed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def progress_bar(
    items: Iterable[T], verb: str, unit: str, progress: bool, total: int | None = None
) -> Iterable[T]:
    """Return ``items``, with a bar if one is wanted and can be shown.

    Args:
        items: what is worked on.
        verb: what happens to them.
        unit: what one of them is.
        progress: whether a bar is wanted.
        total: how many there are; ``None`` for their length, if they have one.
    """
    if not progress:
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    bar: Iterable[T] = tqdm(items, desc=verb, unit=unit, total=total, leave=False, disable=None)
    return bar
