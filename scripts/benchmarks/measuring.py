"""How times are taken: variants in turn, process CPU time, medians, one allocator for all."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping

MALLOC = {
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_MMAP_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
"""Let glibc keep the memory that it has: page faults otherwise decide such ratios."""

Run = Callable[[], object]


def restart_with_memory_kept() -> None:
    """Start this script again with an allocator that keeps its memory, unless it has one."""
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)


def default_allocator() -> dict[str, str]:
    """Return the environment of this process without what `MALLOC` sets."""
    return {name: value for name, value in os.environ.items() if name not in MALLOC}


def take_turns(
    runs: Mapping[str, Run], rounds: int, *, warm_up: int = 1, in_a_row: int = 1, rest: int = 0
) -> dict[str, list[float]]:
    """Return the CPU seconds of each run, taken in turn.

    A slow moment of the machine then hits all of them.

    Args:
        runs: what is measured, by label.
        rounds: how many times each has its turn.
        warm_up: rounds before those that count.
        in_a_row: runs of one turn.
        rest: runs at the start of each turn that do not count.
    """
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    for turn in range(rounds + warm_up):
        for label, run in runs.items():
            for number in range(rest + in_a_row):
                started = time.process_time()
                run()
                if turn >= warm_up and number >= rest:
                    seconds[label].append(time.process_time() - started)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the median by label."""
    return {label: statistics.median(values) for label, values in seconds.items()}


def quartiles(values: list[float]) -> tuple[float, float]:
    """Return the first and the third quartile."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return low, high
