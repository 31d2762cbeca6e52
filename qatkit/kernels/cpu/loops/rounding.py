"""Rounding to a grid, with one scale or one for each row."""

from __future__ import annotations

import numpy as np

from qatkit.kernels.cpu.loops.extremes import LANES, extremes
from qatkit.kernels.cpu.loops.grids import ends_of_grid, symmetric_scale
from qatkit.kernels.cpu.loops.memory import (
    F32,
    INFINITY,
    compiled,
    floats,
    inner,
    integers,
)

_BATCH = 1024


@compiled
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
    step = F32(scale)
    round_to(floats(x, length), floats(y, length), step, F32(low), F32(high))


@inner
def round_to(x, y, scale, low, high):
    """Do the same with arrays."""
    inverse = F32(1) / scale
    for i in range(x.size):
        code = np.rint(x[i] * inverse)
        code = low if code < low else code
        code = high if code > high else code
        y[i] = code * scale


@compiled
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
        room: K; 0 for no list.

    Returns:
        How many are outside, if at most K; ``places`` holds them.
    """
    x_N, y_N, steps = floats(x, total), floats(y, total), floats(scale, scales)
    found, lowest, highest = integers(places, room), F32(low), F32(high)
    excess, lanes = np.zeros(_BATCH, np.float32), np.empty(LANES, np.float32)
    run = min(length, _BATCH)
    count, begin, used = 0 if room else 1, 0, 0
    for start in range(0, total, length):
        end, step = min(start + length, total), steps[first]
        first = first + 1 if first + 1 < scales else 0
        for at in range(start, end, run):
            to = min(at + run, end)
            if count > room:  # too many to be listed
                round_to(x_N[at:to], y_N[at:to], step, lowest, highest)
                continue
            if used + to - at > _BATCH:
                count = _list_outside(excess, used, begin, found, count, lanes)
                begin, used = at, 0
            _round_excess(x_N[at:to], y_N[at:to], excess[used:], step, lowest, highest)
            used += to - at
    return count if count > room else _list_outside(excess, used, begin, found, count, lanes)


@inner
def _round_excess(x, y, excess, scale, low, high):
    """Write ``x`` on the grid to ``y``, and to ``excess`` by how many steps it is outside."""
    inverse = F32(1) / scale
    for i in range(x.size):
        code = np.rint(x[i] * inverse)
        inside = low if code < low else code
        inside = high if inside > high else inside
        excess[i] = abs(code - inside)
        y[i] = inside * scale


@inner
def _list_outside(excess, used, begin, found, count, lanes):
    """Put the places with an excess on the list, ``begin`` being that of the first, and count them.

    Each lane adds up what it sees, and only the lanes with a sum are searched.
    """
    rows = -(-used // LANES)
    excess[used : rows * LANES] = F32(0)
    lanes[:] = F32(0)
    for i in range(rows):
        row = excess[i * LANES : (i + 1) * LANES]
        for j in range(LANES):
            lanes[j] += row[j]
    total = F32(0)
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


@compiled
def list_rows_outside(x, rows, length, low, high, scale, quant_min, quant_max, places, room):
    """Write the scales of symmetric grids for the rows to ``scale``; list what is outside of them.

    Args:
        x: address of (R, M).
        rows: R.
        length: M.
        low: address of (R,), the lower ends of the ranges.
        high: address of (R,), the upper ends.
        scale: address of (R,).
        quant_min: lowest code, below 0.
        quant_max: highest code.
        places: as for `round_clamp_rows`.
        room: as there; 0 for no list.

    Returns:
        As there; -1 if a range is not finite.
    """
    lows, highs, scales = floats(low, rows), floats(high, rows), floats(scale, rows)
    x_RM, found, count = floats(x, (rows, length)), integers(places, room), 0
    for r in range(rows):
        if not (np.isfinite(lows[r]) and np.isfinite(highs[r])):
            return -1
        scales[r] = symmetric_scale(lows[r], highs[r], True, F32(quant_max))
        if room == 0:
            continue
        below, above = ends_of_grid(scales[r], quant_min, quant_max)
        row, outside = x_RM[r], 0
        for m in range(length):
            outside += 1 if row[m] <= below or row[m] >= above else 0
        for m in range(length if outside else 0):
            if row[m] <= below or row[m] >= above:
                if count < room:
                    found[count] = r * length + m
                count += 1
    return count


@compiled
def round_rows(x, y, rows, length, quant_max, low, high, count):
    """Write each row of ``x``, rounded to the symmetric grid that just covers it, to ``y``.

    Args:
        x: address of (R, M).
        y: address of (R, M), that of ``x`` too.
        rows: R.
        length: M.
        quant_max: highest code; the lowest one is its opposite or below.
        low: address of (R,), where the smallest element of each row goes; 0 for nowhere.
        high: address of (R,), where the largest one goes.
        count: address of an int64 that becomes larger by 1; 0 for none.

    Returns:
        Whether all elements are finite; else the results mean nothing.
    """
    x_RM, y_RM = floats(x, (rows, length)), floats(y, (rows, length))
    kept = rows if low != 0 else 0
    lows, highs = floats(low, kept), floats(high, kept)
    lanes = np.empty((3, LANES), np.float32)
    for r in range(rows):
        row = x_RM[r]
        smallest, largest, finite = extremes(row, lanes)
        if not finite:
            return False
        scale = symmetric_scale(smallest, largest, True, F32(quant_max))
        round_to(row, y_RM[r], scale, -INFINITY, INFINITY)
        if kept:
            lows[r], highs[r] = smallest, largest
    if count != 0:
        integers(count, 1)[0] += 1
    return True
