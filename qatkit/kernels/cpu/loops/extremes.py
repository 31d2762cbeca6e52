"""The smallest and the largest of many numbers.

They are searched in `LANES` at a time, each lane by itself, which is what lets the compiler use
vector instructions without reordering anything.
"""

from __future__ import annotations

from qatkit.kernels.cpu.loops.memory import F32, INFINITY, inner

LANES = 64


@inner
def lane_extremes(x, low, high, odd):
    """Find the extremes of each lane; ``odd`` becomes NaN where one is not finite."""
    for j in range(LANES):
        low[j], high[j] = INFINITY, -INFINITY
    for i in range(x.size // LANES):
        row = x[i * LANES : (i + 1) * LANES]
        for j in range(LANES):
            value = row[j]
            low[j] = value if value < low[j] else low[j]
            high[j] = value if value > high[j] else high[j]
            odd[j] += value * F32(0)


@inner
def extremes(x, lanes):
    """Return the smallest and the largest element and whether all are finite.

    Args:
        x: (N,).
        lanes: (3, `LANES`), room to work.
    """
    whole = x.size // LANES * LANES
    low, high, check = INFINITY, -INFINITY, F32(0)
    if whole:
        lanes[2] = F32(0)
        lane_extremes(x[:whole], lanes[0], lanes[1], lanes[2])
        for j in range(LANES):
            low, high = min(low, lanes[0, j]), max(high, lanes[1, j])
            check += lanes[2, j]
    for i in range(whole, x.size):
        low, high = min(low, x[i]), max(high, x[i])
        check += x[i] * F32(0)
    return low, high, check == 0
