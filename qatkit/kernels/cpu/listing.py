"""A loop that notes which elements are outside the grid."""

from __future__ import annotations

from types import ModuleType
from typing import cast

import numpy as np
from torch import Tensor

from qatkit.kernels.cpu.compiled import compiled_loops
from qatkit.kernels.cpu.gradients import Array, needs_gradient
from qatkit.kernels.cpu.state import read_address
from qatkit.kernels.cpu.threads import in_threads, pieces

_FEW = 512
"""One element of so many may be listed."""


def round_and_list(
    x: Tensor, y: Tensor, length: int, scale: Tensor, codes: tuple[int, int]
) -> Array | None:
    """Write ``x`` on the grid to ``y`` and return the places of the elements outside.

    Args:
        x: float32, dense.
        y: the same, in the same order.
        length: elements of a row.
        scale: (C,) float32, the scales of the rows, which apply in turn.
        codes: the lowest and the highest one.

    Returns:
        Places in the order of memory, ``None`` for too many.
    """
    loops = cast(ModuleType, compiled_loops())
    total, data = x.numel(), (read_address(x), y.data_ptr())
    parts = pieces(total, -(-total // length))
    places = np.empty((len(parts), total // _FEW + 1 if needs_gradient(x) else 0), np.int64)
    address, room = places.ctypes.data, places.shape[1]

    def part(some: slice) -> int:
        start, stop = some.start * length, min(some.stop * length, total)
        at = (each + 4 * start for each in data)
        steps = read_address(scale), len(scale), some.start % len(scale)
        here = address + 8 * room * parts.index(some)
        count: int = loops.round_clamp_rows(*at, stop - start, length, *steps, *codes, here, room)
        return count

    counts = in_threads(part, parts, (x, y, scale, places))
    if max(counts) > room:
        return None
    starts = [some.start * length for some in parts]
    listed = zip(places, counts, starts, strict=True)
    return np.concatenate([row[:count] + start for row, count, start in listed])
