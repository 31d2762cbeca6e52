"""Loops that Numba compiles: one pass over memory where tensor operations take one each.

The functions that others call take the addresses of float32 numbers that lie dense in memory, and
let other threads run: a quantizer makes one call to observe and one to round.

The arithmetic is that of `qatkit.kernels.portable`, operation by operation, so the results are the
same bits: Numba neither reorders nor fuses float operations unless told to.

What is compiled is kept on disk for each file, until that file changes: touch a file when you
change what it imports from another one.
"""

from qatkit.kernels.cpu.loops.activated import (
    BLOCK_BYTES,
    PASSING_BLOCK,
    pass_where,
    round_activated,
    unpack,
)
from qatkit.kernels.cpu.loops.extremes import LANES
from qatkit.kernels.cpu.loops.grids import first_outside, grid
from qatkit.kernels.cpu.loops.ranges import (
    BLOCK,
    RULES,
    find_peaks,
    join,
    observe,
    observe_rows,
    shrink,
    shrink_from_peaks,
)
from qatkit.kernels.cpu.loops.rounding import (
    list_rows_outside,
    round_clamp,
    round_clamp_rows,
    round_rows,
)

__all__ = [
    "BLOCK",
    "BLOCK_BYTES",
    "LANES",
    "PASSING_BLOCK",
    "RULES",
    "find_peaks",
    "first_outside",
    "grid",
    "join",
    "list_rows_outside",
    "observe",
    "observe_rows",
    "pass_where",
    "round_activated",
    "round_clamp",
    "round_clamp_rows",
    "round_rows",
    "shrink",
    "shrink_from_peaks",
    "unpack",
]
