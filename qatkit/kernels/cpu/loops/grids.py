"""From a range to the grid that covers it: scales, and where a grid ends among the floats."""

from __future__ import annotations

import numpy as np

from qatkit.kernels.cpu.loops.memory import F32, INFINITY, compiled, floats, inner
from qatkit.kernels.portable import LARGEST_SCALE, SMALLEST_SCALE

_SMALLEST, _LARGEST = F32(SMALLEST_SCALE), F32(LARGEST_SCALE)


@compiled
def grid(low, high, signed, quant_min, quant_max):
    """Return ``(scale, below, above)`` for a remembered range; see `observe`.

    Args:
        low: address of its lower end.
        high: address of its upper end.
        signed: whether there are codes below 0.
        quant_min: lowest code.
        quant_max: highest code.
    """
    ends = floats(low, 1)[0], floats(high, 1)[0]
    return grid_of(ends[0], ends[1], signed, quant_min, quant_max)


@compiled
def first_outside(scale, quant_min, quant_max):
    """Return `qatkit.kernels.cpu.bounds.first_outside`."""
    return ends_of_grid(F32(scale), quant_min, quant_max)


@inner
def symmetric_scale(low, high, signed, quant_max):
    """Return the scale for a range; see `qatkit.functional.qparams`."""
    amax = max(abs(low), abs(high)) if signed else max(high, F32(0))
    scale = amax / quant_max
    return scale if scale >= _SMALLEST and scale <= _LARGEST else F32(1)


@inner
def grid_of(low, high, signed, quant_min, quant_max):
    """Return ``(scale, below, above)`` for a range."""
    scale = symmetric_scale(low, high, signed, F32(quant_max))
    below, above = ends_of_grid(scale, quant_min, quant_max)
    return scale, below, above


@inner
def ends_of_grid(scale, quant_min, quant_max):
    """Return the first floats outside, see `qatkit.kernels.cpu.bounds.first_outside`."""
    return -_first_above(scale, F32(-quant_min)), _first_above(scale, F32(quant_max))


@inner
def _first_above(scale, high):
    """Return the smallest float whose code is above ``high``."""
    inverse = F32(1) / scale
    x = (high + F32(0.5)) * scale
    while np.rint(x * inverse) > high:
        x = np.nextafter(x, F32(0))
    while np.rint(x * inverse) <= high:
        x = np.nextafter(x, INFINITY)
    return x
