"""Calibration on several ranks: each runs over its part of the data, all get the same ranges.

Nothing is sent while the data runs, so that the ranks may have different numbers of batches, also
none. At the end each rank tells the others what it has seen: the ranges of its batches, which every
rank then remembers in the order batch 0 of all ranks, batch 1 of all ranks ..., as one process
would have that gets the batches in this order; or its histograms, whose integer counts are summed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import torch

from qatkit.errors import QatkitError, shorten
from qatkit.observers import OBSERVERS, update
from qatkit.observers.calibrators import Collector, StreamingHistogram
from qatkit.quantizer import TensorQuantizer
from qatkit.ranks import stacked_over_ranks, summed_over_ranks, values_of_ranks, world_size
from qatkit.spec import QuantSpec

Ranges = list["np.ndarray[Any, np.dtype[np.float32]]"]
"""For each batch the ranges that a quantizer estimated in it, (calls, 2, ...)."""

Recorded = tuple[Ranges, int]
"""The ranges, and how many there were: of a weight only the last is kept."""


@dataclass(frozen=True)
class Seen:
    """What a calibration has seen.

    Attributes:
        batches: how many batches.
        samples: how many samples.
        nonfinite: for each quantizer that was reached how many NaN and Inf it got.
        error: why it failed, empty if it did not.
    """

    batches: int = 0
    samples: int = 0
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    error: str = ""


class ShardedRanges:
    """Keeps the ranges of each batch of this rank; in a run of one process it does nothing.

    As a context it lets the quantizers queue what they estimate.

    Args:
        quantizers: by path.
    """

    def __init__(self, quantizers: Mapping[str, TensorQuantizer]) -> None:
        """Start with nothing."""
        self._quantizers = quantizers if world_size() > 1 else {}
        self._sizes: dict[str, list[int]] = {path: [] for path in self._quantizers}
        self._calls: Counter[str] = Counter()

    def __enter__(self) -> ShardedRanges:
        """Open the queues."""
        for quantizer in self._quantizers.values():
            quantizer.queue = []
        return self

    def __exit__(self, *_: object) -> None:
        """Close the queues."""
        for quantizer in self._quantizers.values():
            quantizer.queue = None

    def end_batch(self) -> None:
        """Mark where the ranges of a batch end."""
        for path, quantizer in self._quantizers.items():
            queue = quantizer.queue or []
            new = len(queue) - sum(self._sizes[path])
            self._calls[path] += new
            if quantizer.spec.memory == "latest":
                del queue[:-1]
                new = int(len(queue) > sum(self._sizes[path]))
            self._sizes[path].append(new)

    def exchange(self, mine: Seen) -> Seen:
        """Give each quantizer the range that all ranks together have seen; all ranks call this.

        Returns:
            what all ranks have seen together.

        Raises:
            QatkitError: another rank has failed, or has another model.
        """
        if world_size() == 1:
            return mine
        recorded = {} if mine.error else {path: self._recorded(path) for path in self._quantizers}
        found = values_of_ranks((mine, recorded))
        if mine.error:
            return mine
        for number, (seen, ranges) in enumerate(found):
            if seen.error:
                raise QatkitError(f"calibrate: rank {number} failed: {seen.error}")
            if ranges.keys() != recorded.keys():
                raise QatkitError(
                    f"calibrate: rank {number} has other quantizers than this one; "
                    "prepare the same model in the same way on all ranks"
                )
        for path, quantizer in self._quantizers.items():
            _remember(quantizer, [ranges[path] for _, ranges in found])
        return _together(seen for seen, _ in found)

    def _recorded(self, path: str) -> Recorded:
        quantizer = self._quantizers[path]
        queue, shape = quantizer.queue or [], quantizer.range[0].shape
        ends = torch.stack([torch.stack(each) for each in queue]).cpu() if queue else None
        rows = np.zeros((0, 2, *shape), np.float32) if ends is None else ends.numpy()
        of_batches = np.split(rows, np.cumsum(self._sizes[path])[:-1]) if len(rows) else []
        return of_batches, self._calls[path]


def merge_over_ranks(collectors: list[Collector], device: torch.device) -> None:
    """Let each collector have what all ranks counted; all ranks call this, by two collectives.

    Args:
        collectors: in the same order on all ranks.
        device: one that the process group works on.
    """
    histograms = [each.samples for each in collectors]
    if world_size() == 1 or not histograms:
        return
    rows = [(*_ends(each.samples), each.batches) for each in collectors]
    ends = stacked_over_ranks(torch.tensor(rows, dtype=torch.float64, device=device)).tolist()
    counts = []
    for index, histogram in enumerate(histograms):
        assert isinstance(histogram, StreamingHistogram)
        of_ranks = [rank[index] for rank in ends]
        collectors[index].batches = int(sum(batches for *_, batches in of_ranks))
        histogram.zeros = int(sum(zeros for _, _, _, zeros, _ in of_ranks))
        for low, high, seen, _, _ in of_ranks:
            if seen:
                histogram.extend(low, high, device)
        counts.append(histogram.counts.to(device))
    totals = summed_over_ranks(torch.stack(counts))
    for histogram, total in zip(histograms, totals, strict=True):
        assert isinstance(histogram, StreamingHistogram)
        histogram.counts.copy_(total)


def check_mergeable(method: str) -> None:
    """Raise a `QatkitError` if the histograms of a calibrator depend on the order of the data."""
    if world_size() > 1:
        Collector(method, QuantSpec()).merge(Collector(method, QuantSpec()))


def _ends(histogram: object) -> tuple[float, float, float, float]:
    assert isinstance(histogram, StreamingHistogram)
    ends = histogram.extremes
    return ends.min_val, ends.max_val, float(histogram.total > 0), float(histogram.zeros)


def _remember(quantizer: TensorQuantizer, of_ranks: list[Recorded]) -> None:
    """Set the range of a quantizer to what one process would have got from all these batches."""
    spec = quantizer.spec
    nothing_seen = torch.zeros(quantizer.range[0].shape)
    state = nothing_seen, nothing_seen.clone(), torch.zeros((), dtype=torch.int64)
    nothing = np.zeros((0, 2), np.float32)
    for batch in zip_longest(*(ranges for ranges, _ in of_ranks), fillvalue=nothing):
        for low, high in (pair for ranges in batch for pair in ranges):
            new = torch.from_numpy(np.array(low)), torch.from_numpy(np.array(high))
            if spec.memory == "latest":
                state[0].copy_(new[0])
                state[1].copy_(new[1])
                state[2].fill_(sum(calls for _, calls in of_ranks))
            else:
                update(OBSERVERS[spec.observer].remember, state, new, spec)
    if state[2]:
        quantizer.set_range(state[0], state[1])
        quantizer.num_batches.copy_(state[2])


def _together(of_ranks: Iterable[Seen]) -> Seen:
    batches = samples = 0
    nonfinite: Counter[str] = Counter()
    for seen in of_ranks:
        batches += seen.batches
        samples += seen.samples
        nonfinite.update(seen.nonfinite)
    return Seen(batches, samples, nonfinite)


def failure(error: Exception) -> Seen:
    """Return what a rank tells the others when it fails."""
    return Seen(error=shorten(str(error)))
