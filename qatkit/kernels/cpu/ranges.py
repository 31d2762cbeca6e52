"""The range of a tensor without its tails."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from qatkit.kernels import portable
from qatkit.kernels.cpu.compiled import compiled_loops
from qatkit.kernels.cpu.state import read_address
from qatkit.kernels.cpu.threads import in_threads, pieces


def shrink(x_CM: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """Return the shrunk range of each row, (C,); see `qatkit.kernels.portable.shrink`.

    Rows that hold anything unusual go the portable way.
    """
    channels, total = x_CM.shape
    if channels == 1:
        ends = shrink_row(x_CM[0], percentile)
        if ends is not None:
            low, high = (torch.tensor([end], dtype=torch.float32, device="cpu") for end in ends)
            return low, high
    elif portable.droppable(total, percentile) == 0:
        low, high = x_CM.amin(1), x_CM.amax(1)
        if np.isfinite(low.numpy()).all() and np.isfinite(high.numpy()).all():
            return low, high
    return portable.shrink(x_CM, percentile)


def shrink_row(
    x_M: Tensor, percentile: float, clip: tuple[float, float] = (-math.inf, math.inf)
) -> tuple[float, float] | None:
    """Return the shrunk range of one row as float32 numbers, ``None`` where that takes more care.

    That is for a row that holds NaN or an infinity, is constant, or spans next to nothing or more
    than float32 can add up: see `qatkit.kernels.portable.shrink`.

    Args:
        x_M: (M,) float32, not empty.
        percentile: percent of the row that may be cut on each side.
        clip: elements outside count as these.
    """
    loops = compiled_loops()
    if loops is None:
        return None
    x_M, most = x_M.contiguous(), portable.droppable(len(x_M), percentile)
    parts = pieces(len(x_M), len(x_M) // loops.BLOCK)
    if len(parts) == 1:
        usual, low, high = loops.shrink(read_address(x_M), len(x_M), most, *clip)
    else:
        usual, low, high = _shrink_in_threads(x_M, most, parts, loops, clip)
    return (low, high) if usual else None


def _shrink_in_threads(
    x_M: Tensor, most: int, parts: list[slice], loops: ModuleType, clip: tuple[float, float]
) -> tuple[bool, float, float]:
    """Do the same, the pass over the whole row shared by several threads."""
    blocks = parts[-1].stop * loops.LANES
    peaks = np.empty((2, blocks), np.float32)
    low, high = peaks[0].ctypes.data, peaks[1].ctypes.data

    def find(part: slice) -> bool:
        start = part.start * loops.BLOCK
        stop = len(x_M) if part is parts[-1] else part.stop * loops.BLOCK
        skip = 4 * part.start * loops.LANES
        here, some = read_address(x_M) + 4 * start, (part.stop - part.start) * loops.LANES
        finite: bool = loops.find_peaks(here, stop - start, low + skip, high + skip, some)
        return finite

    finite = all(in_threads(find, parts, (x_M, peaks)))
    found: tuple[bool, float, float] = loops.shrink_from_peaks(
        read_address(x_M), len(x_M), most, low, high, blocks, finite, *clip
    )
    return found
