"""A loop over a large tensor, shared by as many threads as PyTorch uses."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")
SHARE = 2**18
"""Elements worth a thread."""


def pieces(elements: int, count: int) -> list[slice]:
    """Return slices of ``range(count)``, one for each thread.

    Args:
        elements: how many numbers there are.
        count: how many rows, or whatever must not be divided, hold them.

    >>> pieces(1000, 10)
    [slice(0, 10, None)]
    """
    if elements < 2 * SHARE:
        return [slice(0, count)]
    number = max(1, min(torch.get_num_threads(), elements // SHARE, count))
    ends = [count * i // number for i in range(number + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


def in_threads(
    function: Callable[[slice], _T], parts: list[slice], held: tuple[Any, ...]
) -> list[_T]:
    """Return ``function(part)`` for each part; it should let other threads run.

    Args:
        function: what to do with a part.
        parts: see `pieces`.
        held: the tensors whose memory it works on; they live for as long as any thread does, also
            when the caller is interrupted.
    """
    if len(parts) == 1:
        return [function(parts[0])]

    def work(part: slice, held: tuple[Any, ...] = held) -> _T:
        return function(part)

    return list(_pool(os.getpid()).map(work, parts))


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Return the threads of a process; a forked one has none of its parent's."""
    return ThreadPoolExecutor(os.cpu_count(), "qatkit")
