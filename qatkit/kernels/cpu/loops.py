"""Loops that Numba compiles: one pass over memory where tensor operations take one each.

The functions that others call take the addresses of float32 numbers that lie dense in memory, and
let other threads run. An address is one number where an array is an object to be made and taken
apart, which costs more than a small tensor itself: a quantizer makes one call to observe and one to
round. The caller keeps the tensors alive.

The arithmetic is that of `qatkit.kernels.portable`, operation by operation, so the results are the
same bits: Numba neither reorders nor fuses float operations unless told to. Extremes are searched
in `LANES` at a time, each lane by itself, which is what lets the compiler use vector instructions
without reordering anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic
from numba.np.numpy_support import carray

from qatkit.kernels.portable import LARGEST_SCALE, LAST_BIN, SMALLEST_SCALE

_Function = TypeVar("_Function", bound=Callable[..., Any])
LANES = 64
DEPTH = 64
"""What one lane sees of as many rows is represented by its extremes."""
BLOCK = LANES * DEPTH
BLOCKS_PER_ELEMENT = 16
"""So many peaks for each element that may be dropped, else all elements are put into bins."""
_F = np.float32
_INFINITY = _F(np.inf)
_SMALLEST, _LARGEST = _F(SMALLEST_SCALE), _F(LARGEST_SCALE)
_SMALLEST_SPAN = _F(2.0**-99)  # below, the bins need scaling (`portable.bins`)
_LARGEST_SPAN = _F(np.finfo(_F).max)
_BATCH = 1024
RULES = {"blend": 0, "extremes": 1}
"""How a range joins the remembered one; see `observe`."""


def _inner(function: _Function) -> _Function:
    """Compile as a part of what calls it."""
    compiled: Any = numba.njit(nogil=True, error_model="numpy")(function)
    return cast(_Function, compiled)


def _compiled(function: _Function) -> _Function:
    """Compile at the first call, and keep the result on disk if there is a place for it."""
    try:
        compiled: Any = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # no folder that can be written to
        return _inner(function)
    return cast(_Function, compiled)


def _float_pointer(typing: Any, address: Any) -> Any:
    return types.CPointer(types.float32)(types.int64), _to_pointer


def _integer_pointer(typing: Any, address: Any) -> Any:
    return types.CPointer(types.int64)(types.int64), _to_pointer


def _byte_pointer(typing: Any, address: Any) -> Any:
    return types.CPointer(types.uint8)(types.int64), _to_pointer


def _to_pointer(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))


_as_floats: Any = intrinsic(_float_pointer)
_as_integers: Any = intrinsic(_integer_pointer)
_as_bytes: Any = intrinsic(_byte_pointer)


@_inner
def _floats(address, shape):
    """Return the float32 array at an address."""
    return carray(_as_floats(address), shape)


@_inner
def _integers(address, shape):
    """Return the int64 array at an address."""
    return carray(_as_integers(address), shape)


@_inner
def _bytes(address, shape):
    """Return the uint8 array at an address."""
    return carray(_as_bytes(address), shape)


@_compiled
def round_clamp(x, y, length, scale, low, high):
    """Write ``clamp(round(x * (1 / scale)), low, high) * scale`` to ``y``.

    Args:
        x: address of (N,).
        y: address of (N,), that of ``x`` too.
        length: N.
        scale: the step.
        low: lowest code.
        high: highest code.
    """
    step = _F(scale)
    _round_clamp(_floats(x, length), _floats(y, length), step, _F(low), _F(high))


@_inner
def _round_clamp(x, y, scale, low, high):
    inverse = _F(1) / scale
    for i in range(x.size):
        code = np.rint(x[i] * inverse)
        code = low if code < low else code
        code = high if code > high else code
        y[i] = code * scale


@_compiled
def round_clamp_rows(x, y, total, length, scale, scales, first, low, high, places, room):
    """Do the same with a scale for each row, and list the elements outside the grid.

    Args:
        x: address of (N,), rows of M elements, of which the last one may be shorter.
        y: address of (N,).
        total: N.
        length: M.
        scale: address of (C,), which apply to the rows in turn, over and over.
        scales: C.
        first: the scale of the first row.
        low: lowest code.
        high: highest code.
        places: address of (K,) int64, where the places of the elements outside go.
        room: K.

    Returns:
        How many are outside, if at most K; ``places`` holds them.
    """
    x_N, y_N, steps = _floats(x, total), _floats(y, total), _floats(scale, scales)
    found, lowest, highest = _integers(places, room), _F(low), _F(high)
    excess, lanes = np.zeros(_BATCH, np.float32), np.empty(LANES, np.float32)
    run = min(length, _BATCH)
    count = begin = used = 0
    for start in range(0, total, length):
        end, step = min(start + length, total), steps[first]
        first = first + 1 if first + 1 < scales else 0
        for at in range(start, end, run):
            to = min(at + run, end)
            if count > room:  # too many to be listed
                _round_clamp(x_N[at:to], y_N[at:to], step, lowest, highest)
                continue
            if used + to - at > _BATCH:
                count = _list_outside(excess, used, begin, found, count, lanes)
                begin, used = at, 0
            _round_excess(x_N[at:to], y_N[at:to], excess[used:], step, lowest, highest)
            used += to - at
    return count if count > room else _list_outside(excess, used, begin, found, count, lanes)


@_inner
def _round_excess(x, y, excess, scale, low, high):
    """Write ``x`` on the grid to ``y``, and to ``excess`` by how many steps it is outside."""
    inverse = _F(1) / scale
    for i in range(x.size):
        code = np.rint(x[i] * inverse)
        inside = low if code < low else code
        inside = high if inside > high else inside
        excess[i] = abs(code - inside)
        y[i] = inside * scale


@_inner
def _list_outside(excess, used, begin, found, count, lanes):
    """Put the places with an excess on the list, ``begin`` being that of the first, and count them.

    Each lane adds up what it sees, and only the lanes with a sum are searched.
    """
    rows = -(-used // LANES)
    excess[used : rows * LANES] = _F(0)
    lanes[:] = _F(0)
    for i in range(rows):
        row = excess[i * LANES : (i + 1) * LANES]
        for j in range(LANES):
            lanes[j] += row[j]
    total = _F(0)
    for j in range(LANES):
        total += lanes[j]
    if total != 0:
        for j in range(LANES):
            if lanes[j] != 0:
                for m in range(j, used, LANES):
                    if excess[m] != 0:
                        if count < found.size:
                            found[count] = begin + m
                        count += 1
    return count


@_compiled
def round_clamp_masked(x, y, outside, total, length, scale, scales, low, high):
    """Do the same, and write to ``outside`` whether each element is outside the grid.

    Args:
        x: address of (N,), rows of M elements.
        y: address of (N,).
        outside: address of (N,) bytes.
        total: N.
        length: M.
        scale: address of (C,), which apply to the rows in turn, over and over.
        scales: C.
        low: lowest code.
        high: highest code.
    """
    steps, lowest, highest = _floats(scale, scales), _F(low), _F(high)
    x_N, y_N, outside_N = _floats(x, total), _floats(y, total), _bytes(outside, total)
    for r in range(total // length):
        start, stop = r * length, (r + 1) * length
        x_M, y_M, outside_M = x_N[start:stop], y_N[start:stop], outside_N[start:stop]
        step = steps[r % scales]
        inverse = _F(1) / step
        for m in range(length):
            code = np.rint(x_M[m] * inverse)
            clamped = lowest if code < lowest else code
            clamped = highest if clamped > highest else clamped
            outside_M[m] = 0 if code == clamped else 1
            y_M[m] = clamped * step


@_compiled
def round_rows(x, y, rows, length, quant_max, low, high):
    """Write each row of ``x``, rounded to the symmetric grid that just covers it, to ``y``.

    Args:
        x: address of (R, M).
        y: address of (R, M), that of ``x`` too.
        rows: R.
        length: M.
        quant_max: highest code; the lowest one is its opposite or below.
        low: address of (R,), where the smallest element of each row goes; 0 for nowhere.
        high: address of (R,), where the largest one goes.

    Returns:
        Whether all elements are finite; else the results mean nothing.
    """
    x_RM, y_RM = _floats(x, (rows, length)), _floats(y, (rows, length))
    kept = rows if low != 0 else 0
    lows, highs = _floats(low, kept), _floats(high, kept)
    lanes = np.empty((3, LANES), np.float32)
    for r in range(rows):
        row = x_RM[r]
        smallest, largest, finite = _extremes(row, lanes)
        if not finite:
            return False
        scale = _symmetric_scale(smallest, largest, True, _F(quant_max))
        _round_clamp(row, y_RM[r], scale, -_INFINITY, _INFINITY)
        if kept:
            lows[r], highs[r] = smallest, largest
    return True


@_compiled
def symmetric_scales(low, high, scale, length, quant_max):
    """Write the scales for (C,) ranges to ``scale`` and tell whether all ranges are finite.

    Args:
        low: address of (C,).
        high: address of (C,).
        scale: address of (C,).
        length: C.
        quant_max: highest code; the lowest one is its opposite or below.
    """
    lows, highs, scales = _floats(low, length), _floats(high, length), _floats(scale, length)
    finite = True
    for c in range(length):
        finite = finite and np.isfinite(lows[c]) and np.isfinite(highs[c])
        scales[c] = _symmetric_scale(lows[c], highs[c], True, _F(quant_max))
    return finite


@_inner
def _symmetric_scale(low, high, signed, quant_max):
    """Return the scale for a range; see `qatkit.functional.qparams`."""
    amax = max(abs(low), abs(high)) if signed else max(high, _F(0))
    scale = amax / quant_max
    return scale if scale >= _SMALLEST and scale <= _LARGEST else _F(1)


@_compiled
def observe(x, length, most, state, rule, least, greatest, signed, quant_min, quant_max):
    """Estimate a range, let it join the remembered one, and return the grid of that.

    Args:
        x: address of (N,).
        length: N > 0.
        most: how many elements may be dropped on each side.
        state: addresses of the remembered minimum, maximum, and number of batches (int64).
        rule: one of `RULES`.
        least: the smallest weight of a new range, for ``blend``.
        greatest: the largest one.
        signed: whether there are codes below 0.
        quant_min: lowest code.
        quant_max: highest code.

    Returns:
        ``(usual, scale, below, above)``; nothing is remembered if ``usual`` is false, see
        `shrink`. For the last two see `qatkit.kernels.cpu.bounds.first_outside`.
    """
    low = _floats(state[0], 1)
    high = _floats(state[1], 1)
    count = _integers(state[2], 1)
    usual, new_low, new_high = _shrink(_floats(x, length), most)
    if not usual:
        return False, _F(1), _F(0), _F(0)
    nothing = new_low == 0 and new_high == 0
    first = count[0] == 0 or (low[0] == 0 and high[0] == 0)
    if not nothing:
        if first:
            low[0], high[0] = new_low, new_high
        elif rule == 1:
            low[0], high[0] = min(low[0], new_low), max(high[0], new_high)
        else:
            new = _F(1) / (_F(count[0]) + _F(1))
            new = min(max(new, _F(least)), _F(greatest))
            old = _F(1) - new
            low[0] = low[0] * old + new_low * new
            high[0] = high[0] * old + new_high * new
    count[0] += 1
    scale, below, above = _grid(low[0], high[0], signed, quant_min, quant_max)
    return True, scale, below, above


@_compiled
def grid(low, high, signed, quant_min, quant_max):
    """Return ``(scale, below, above)`` for a remembered range; see `observe`.

    Args:
        low: address of its lower end.
        high: address of its upper end.
        signed: whether there are codes below 0.
        quant_min: lowest code.
        quant_max: highest code.
    """
    ends = _floats(low, 1)[0], _floats(high, 1)[0]
    return _grid(ends[0], ends[1], signed, quant_min, quant_max)


@_inner
def _grid(low, high, signed, quant_min, quant_max):
    scale = _symmetric_scale(low, high, signed, _F(quant_max))
    below, above = -_first_above(scale, _F(-quant_min)), _first_above(scale, _F(quant_max))
    return scale, below, above


@_inner
def _first_above(scale, high):
    """Return the smallest float whose code is above ``high``."""
    inverse = _F(1) / scale
    x = (high + _F(0.5)) * scale
    while np.rint(x * inverse) > high:
        x = np.nextafter(x, _F(0))
    while np.rint(x * inverse) <= high:
        x = np.nextafter(x, _INFINITY)
    return x


@_compiled
def shrink(x, length, most):
    """Return ``(usual, low, high)``, the shrunk range of a row; see `portable.shrink`.

    Args:
        x: address of (N,).
        length: N > 0.
        most: how many elements may be dropped on each side.

    Returns:
        ``usual`` is false for a row that holds NaN or an infinity, is constant while something may
        be dropped, or spans next to nothing or more than float32 can add up.
    """
    return _shrink(_floats(x, length), most)


@_inner
def _shrink(x, most):
    blocks = x.size // BLOCK * LANES
    low_peaks, high_peaks = np.empty(blocks, np.float32), np.empty(blocks, np.float32)
    finite = _find_peaks(x, low_peaks, high_peaks)
    return _shrink_from_peaks(x, most, low_peaks, high_peaks, finite)


@_compiled
def find_peaks(x, length, low, high, blocks):
    """Write the extremes of each block to ``low`` and ``high``, and tell whether all are finite.

    Args:
        x: address of (N,); the elements behind the last whole block are only checked.
        length: N.
        low: address of (B,), B a multiple of `LANES`.
        high: address of (B,).
        blocks: B.
    """
    ends = _floats(low, blocks), _floats(high, blocks)
    return _find_peaks(_floats(x, length), ends[0], ends[1])


@_inner
def _find_peaks(x, low, high):
    odd = np.zeros(LANES, np.float32)
    for start in range(0, low.size, LANES):
        part = x[start * DEPTH : (start + LANES) * DEPTH]
        _lane_extremes(part, low[start : start + LANES], high[start : start + LANES], odd)
    check = _F(0)
    for j in range(LANES):
        check += odd[j]
    rest = x[low.size * DEPTH :]
    for i in range(rest.size):
        check += rest[i] * _F(0)
    return check == 0


@_compiled
def shrink_from_peaks(x, length, most, low, high, blocks, finite):
    """Return what `shrink` does, with the peaks of the blocks at hand; see `find_peaks`."""
    ends = _floats(low, blocks), _floats(high, blocks)
    return _shrink_from_peaks(_floats(x, length), most, ends[0], ends[1], finite)


@_inner
def _shrink_from_peaks(x, most, low_peaks, high_peaks, finite):
    low, high = _F(0), _F(0)
    if not finite:
        return False, low, high
    rest = x[low_peaks.size * DEPTH :]
    low, high = _INFINITY, -_INFINITY
    for i in range(low_peaks.size):
        low, high = min(low, low_peaks[i]), max(high, high_peaks[i])
    for i in range(rest.size):
        low, high = min(low, rest[i]), max(high, rest[i])
    if most == 0:
        return True, low, high
    span = high - low
    if not (span >= _SMALLEST_SPAN and span <= _LARGEST_SPAN):
        return False, low, high
    factor = _F(1) / span * _F(LAST_BIN)
    if (x.size // DEPTH) >= BLOCKS_PER_ELEMENT * (most + 1):
        left = -_kth_largest(x, low_peaks, most + 1, _F(-1))
        right = _kth_largest(x, high_peaks, most + 1, _F(1))
        first, last = int(np.rint((left - low) * factor)), int(np.rint((right - low) * factor))
    else:
        counts = np.zeros(LAST_BIN + 1, np.int64)
        _count_bins(x, low, factor, counts)
        first, last = _ends_of_tails(counts, most)
    back = _F(1) / factor
    new_low, new_high = low, high
    if first > 1:
        new_low = max(low, _F(first - 1) * back + low)
    if last < LAST_BIN - 1:
        new_high = min(high, _F(last + 1) * back + low)
    return True, new_low, new_high


@_inner
def _lane_extremes(x, low, high, odd):
    """Find the extremes of each lane; ``odd`` becomes NaN where one is not finite."""
    for j in range(LANES):
        low[j], high[j] = _INFINITY, -_INFINITY
    for i in range(x.size // LANES):
        row = x[i * LANES : (i + 1) * LANES]
        for j in range(LANES):
            value = row[j]
            low[j] = value if value < low[j] else low[j]
            high[j] = value if value > high[j] else high[j]
            odd[j] += value * _F(0)


@_inner
def _extremes(x, lanes):
    """Return the smallest and the largest element and whether all are finite.

    Args:
        x: (N,).
        lanes: (3, `LANES`), room to work.
    """
    whole = x.size // LANES * LANES
    low, high, check = _INFINITY, -_INFINITY, _F(0)
    if whole:
        lanes[2] = _F(0)
        _lane_extremes(x[:whole], lanes[0], lanes[1], lanes[2])
        for j in range(LANES):
            low, high = min(low, lanes[0, j]), max(high, lanes[1, j])
            check += lanes[2, j]
    for i in range(whole, x.size):
        low, high = min(low, x[i]), max(high, x[i])
        check += x[i] * _F(0)
    return low, high, check == 0


@_inner
def _kth_largest(x, peaks, k, sign):
    """Return the ``k``-th largest of ``sign * x``.

    The ``k``-th largest peak is a bound, and only blocks with a larger one are looked into.
    """
    heap = np.full(k, -_INFINITY)
    for i in range(peaks.size):
        if sign * peaks[i] > heap[0]:
            _replace_smallest(heap, sign * peaks[i])
    bound = heap[0]
    heap[:] = bound
    for i in range(peaks.size):
        if sign * peaks[i] > bound:
            start = i // LANES * LANES * DEPTH + i % LANES
            for row in range(DEPTH):
                value = sign * x[start + row * LANES]
                if value > heap[0]:
                    _replace_smallest(heap, value)
    for i in range(peaks.size * DEPTH, x.size):
        if sign * x[i] > heap[0]:
            _replace_smallest(heap, sign * x[i])
    return heap[0]


@_inner
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


@_inner
def _count_bins(x, low, factor, counts):
    """Add the number of elements in each bin to ``counts``, (256,) int64.

    Neighbours are often equal, so each of four goes to counters of its own: none waits for another.
    """
    bins = np.empty(_BATCH, np.int32)
    four = np.zeros((4, counts.size), np.int64)
    for start in range(0, x.size, _BATCH):
        part = x[start : start + _BATCH]
        for i in range(part.size):
            bins[i] = np.int32(np.rint((part[i] - low) * factor))
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


@_inner
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
