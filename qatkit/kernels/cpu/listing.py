"""A loop that notes which elements are outside the grid."""

from __future__ import annotations

from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from qatkit.kernels.cpu.compiled import compiled_loops
from qatkit.kernels.cpu.gradients import needs_gradient
from qatkit.kernels.cpu.state import read_address
from qatkit.kernels.cpu.threads import in_threads, pieces

_FEW = 64
"""One element of so many may be listed."""


def room_for(x: Tensor, parts: int = 1) -> Tensor:
    """Return room for a list of elements of ``x`` in each of some parts; none without gradient."""
    length = x.numel() // parts // _FEW + 8 if needs_gradient(x) else 0
    return torch.empty((parts, length), dtype=torch.int64, device="cpu")


def round_and_list(
    x: Tensor, y: Tensor, length: int, scale: Tensor, codes: tuple[float, float]
) -> Tensor | None:
    """Write ``x`` on the grid to ``y`` and return the places of the elements outside.

    Without gradient nothing is listed.

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
    places = room_for(x, len(parts))
    address, room = places.data_ptr(), places.shape[1]

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
    if len(parts) == 1:
        return places[0, : counts[0]].clone()  # not the room for more
    starts = [some.start * length for some in parts]
    found = zip(places, counts, starts, strict=True)
    return torch.cat([row[:count] + start for row, count, start in found])
