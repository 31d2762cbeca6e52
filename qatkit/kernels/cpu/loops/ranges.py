"""The range of many numbers without their tails, and how it joins the remembered one."""

from __future__ import annotations

import numpy as np

from qatkit.kernels.cpu.loops.extremes import LANES, extremes, lane_extremes
from qatkit.kernels.cpu.loops.memory import F32, INFINITY, compiled, floats, inner, integers
from qatkit.kernels.portable import LAST_BIN

DEPTH = 64
"""What one lane sees of as many rows is represented by its extremes."""
BLOCK = LANES * DEPTH
BLOCKS_PER_ELEMENT = 16
"""So many peaks for each element that may be dropped, else all elements are put into bins."""
_SMALLEST_SPAN = F32(2.0**-99)  # below, the bins need scaling (`portable.bins`)
_LARGEST_SPAN = F32(np.finfo(F32).max)
_BATCH = 1024
RULES = {"blend": 0, "extremes": 1}
"""How a range joins the remembered one; see `observe`."""


@compiled
def observe(
    x, length, most, floor, ceiling, remembered_low, remembered_high, batches, rule, least, greatest
):
    """Estimate a range as `shrink` does and let it join the remembered one.

    Args:
        x: address of (N,).
        length: N > 0.
        most: how many elements may be dropped on each side.
        floor: elements below it count as it.
        ceiling: elements above it count as it.
        remembered_low: address of the remembered minimum.
        remembered_high: that of the maximum.
        batches: address of the number of batches, int64.
        rule: one of `RULES`.
        least: the smallest weight of a new range, for ``blend``.
        greatest: the largest one.

    Returns:
        ``(usual, low, high)``, as `shrink`; nothing is remembered if ``usual`` is false.
    """
    usual, low, high = _shrink(floats(x, length), most, F32(floor), F32(ceiling))
    if usual:
        _join(low, high, remembered_low, remembered_high, batches, rule, F32(least), F32(greatest))
    return usual, low, high


@compiled
def join(low, high, remembered_low, remembered_high, batches, rule, least, greatest):
    """Let the range ``low..high`` join the remembered one; see `observe`."""
    ends = F32(low), F32(high), F32(least), F32(greatest)
    _join(ends[0], ends[1], remembered_low, remembered_high, batches, rule, ends[2], ends[3])


@inner
def _join(new_low, new_high, remembered_low, remembered_high, batches, rule, least, greatest):
    low, high = floats(remembered_low, 1), floats(remembered_high, 1)
    count = integers(batches, 1)
    nothing = new_low == 0 and new_high == 0
    first = count[0] == 0 or (low[0] == 0 and high[0] == 0)
    if not nothing:
        if first:
            low[0], high[0] = new_low, new_high
        elif rule == 1:
            low[0], high[0] = min(low[0], new_low), max(high[0], new_high)
        else:
            new = F32(1) / (F32(count[0]) + F32(1))
            new = min(max(new, least), greatest)
            old = F32(1) - new
            low[0] = low[0] * old + new_low * new
            high[0] = high[0] * old + new_high * new
    count[0] += 1


@compiled
def shrink(x, length, most, floor, ceiling):
    """Return ``(usual, low, high)``, the shrunk range of a row; see `portable.shrink`.

    Args:
        x: address of (N,).
        length: N > 0.
        most: how many elements may be dropped on each side.
        floor: elements below it count as it.
        ceiling: elements above it count as it.

    Returns:
        ``usual`` is false for a row that holds NaN or an infinity, is constant while something may
        be dropped, or spans next to nothing or more than float32 can add up.
    """
    return _shrink(floats(x, length), most, F32(floor), F32(ceiling))


@inner
def _shrink(x, most, floor, ceiling):
    blocks = x.size // BLOCK * LANES
    low_peaks, high_peaks = np.empty(blocks, np.float32), np.empty(blocks, np.float32)
    finite = _find_peaks(x, low_peaks, high_peaks)
    return _shrink_from_peaks(x, most, low_peaks, high_peaks, finite, floor, ceiling)


@compiled
def observe_rows(x, rows, length, low, high, batches):
    """Write the extremes of each row to ``low`` and ``high`` and count one batch.

    Args:
        x: address of (R, M).
        rows: R.
        length: M > 0.
        low: address of (R,).
        high: address of (R,).
        batches: address of the number of batches, int64.

    Returns:
        Whether all elements are finite; else the ranges mean nothing, and no batch is counted.
    """
    x_RM, lows, highs = floats(x, (rows, length)), floats(low, rows), floats(high, rows)
    lanes = np.empty((3, LANES), np.float32)
    for r in range(rows):
        lows[r], highs[r], finite = extremes(x_RM[r], lanes)
        if not finite:
            return False
    integers(batches, 1)[0] += 1
    return True


@compiled
def find_peaks(x, length, low, high, blocks):
    """Write the extremes of each block to ``low`` and ``high``, and tell whether all are finite.

    Args:
        x: address of (N,); the elements behind the last whole block are only checked.
        length: N.
        low: address of (B,), B a multiple of `LANES`.
        high: address of (B,).
        blocks: B.
    """
    ends = floats(low, blocks), floats(high, blocks)
    return _find_peaks(floats(x, length), ends[0], ends[1])


@inner
def _find_peaks(x, low, high):
    odd = np.zeros(LANES, np.float32)
    for start in range(0, low.size, LANES):
        part = x[start * DEPTH : (start + LANES) * DEPTH]
        lane_extremes(part, low[start : start + LANES], high[start : start + LANES], odd)
    check = F32(0)
    for j in range(LANES):
        check += odd[j]
    rest = x[low.size * DEPTH :]
    for i in range(rest.size):
        check += rest[i] * F32(0)
    return check == 0


@compiled
def shrink_from_peaks(x, length, most, low, high, blocks, finite, floor, ceiling):
    """Return what `shrink` does, with the peaks of the blocks at hand; see `find_peaks`."""
    ends = floats(low, blocks), floats(high, blocks)
    cut = F32(floor), F32(ceiling)
    return _shrink_from_peaks(floats(x, length), most, ends[0], ends[1], finite, cut[0], cut[1])


@inner
def _shrink_from_peaks(x, most, low_peaks, high_peaks, finite, floor, ceiling):
    low, high = F32(0), F32(0)
    if not finite:
        return False, low, high
    rest = x[low_peaks.size * DEPTH :]
    low, high = INFINITY, -INFINITY
    for i in range(low_peaks.size):
        low_peaks[i] = _cut(low_peaks[i], floor, ceiling)
        high_peaks[i] = _cut(high_peaks[i], floor, ceiling)
        low, high = min(low, low_peaks[i]), max(high, high_peaks[i])
    for i in range(rest.size):
        value = _cut(rest[i], floor, ceiling)
        low, high = min(low, value), max(high, value)
    if most == 0:
        return True, low, high
    span = high - low
    if not (span >= _SMALLEST_SPAN and span <= _LARGEST_SPAN):
        return False, low, high
    factor = F32(1) / span * F32(LAST_BIN)
    if (x.size // DEPTH) >= BLOCKS_PER_ELEMENT * (most + 1):
        left = -_kth_largest(x, low_peaks, most + 1, F32(-1), floor, ceiling)
        right = _kth_largest(x, high_peaks, most + 1, F32(1), floor, ceiling)
        first, last = int(np.rint((left - low) * factor)), int(np.rint((right - low) * factor))
    else:
        counts = np.zeros(LAST_BIN + 1, np.int64)
        _count_bins(x, low, factor, counts, floor, ceiling)
        first, last = _ends_of_tails(counts, most)
    back = F32(1) / factor
    new_low, new_high = low, high
    if first > 1:
        new_low = max(low, F32(first - 1) * back + low)
    if last < LAST_BIN - 1:
        new_high = min(high, F32(last + 1) * back + low)
    return True, new_low, new_high


@inner
def _cut(value, floor, ceiling):
    value = floor if value < floor else value
    return ceiling if value > ceiling else value


@inner
def _kth_largest(x, peaks, k, sign, floor, ceiling):
    """Return the ``k``-th largest of ``sign * x``, ``x`` and its peaks being cut to floor..ceiling.

    The ``k``-th largest peak is a bound, and only blocks with a larger one are looked into.
    """
    heap = np.full(k, -INFINITY)
    for i in range(peaks.size):
        if sign * peaks[i] > heap[0]:
            _replace_smallest(heap, sign * peaks[i])
    bound = heap[0]
    heap[:] = bound
    for i in range(peaks.size):
        if sign * peaks[i] > bound:
            start = i // LANES * LANES * DEPTH + i % LANES
            for row in range(DEPTH):
                value = sign * _cut(x[start + row * LANES], floor, ceiling)
                if value > heap[0]:
                    _replace_smallest(heap, value)
    for i in range(peaks.size * DEPTH, x.size):
        value = sign * _cut(x[i], floor, ceiling)
        if value > heap[0]:
            _replace_smallest(heap, value)
    return heap[0]


@inner
def _replace_smallest(heap, value):
    """Put ``value`` into a heap, whose smallest element stands first, in place of that one."""
    place = 0
    while True:
        child = 2 * place + 1
        if child >= heap.size:
            break
        if child + 1 < heap.size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= value:
            break
        heap[place] = heap[child]
        place = child
    heap[place] = value


@inner
def _count_bins(x, low, factor, counts, floor, ceiling):
    """Add the number of elements in each bin to ``counts``, (256,) int64.

    Neighbours are often equal, so each of four goes to counters of its own: none waits for another.
    """
    bins = np.empty(_BATCH, np.int32)
    four = np.zeros((4, counts.size), np.int64)
    for start in range(0, x.size, _BATCH):
        part = x[start : start + _BATCH]
        for i in range(part.size):
            bins[i] = np.int32(np.rint((_cut(part[i], floor, ceiling) - low) * factor))
        whole = part.size // 4 * 4
        for i in range(0, whole, 4):
            four[0, bins[i]] += 1
            four[1, bins[i + 1]] += 1
            four[2, bins[i + 2]] += 1
            four[3, bins[i + 3]] += 1
        for i in range(whole, part.size):
            four[0, bins[i]] += 1
    for i in range(counts.size):
        counts[i] += four[0, i] + four[1, i] + four[2, i] + four[3, i]


@inner
def _ends_of_tails(counts, most):
    """Return the first and the last bin that cannot be dropped; see `portable.Tails`."""
    first, seen = 0, counts[0]
    while seen <= most:
        first += 1
        seen += counts[first]
    last, seen = LAST_BIN, counts[LAST_BIN]
    while seen <= most:
        last -= 1
        seen += counts[last]
    return first, last
