"""Fake quantization of rows, each with a scale of its own: weights, mostly."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from qatkit.kernels.cpu.compiled import compiled_loops
from qatkit.kernels.cpu.gradients import (
    SMALL,
    carrier,
    needs_gradient,
    stopped_by_channel,
    straight,
    with_gradient,
)
from qatkit.kernels.cpu.listing import room_for, round_and_list
from qatkit.kernels.cpu.state import State, is_lazy, is_numbers, is_state, read_address
from qatkit.kernels.cpu.threads import in_threads, pieces
from qatkit.kernels.layout import is_dense
from qatkit.kernels.portable import along

_SHORT = 8
"""Rows with fewer elements are not worth a loop each."""


def fake_quantize_rows(x: Tensor, quant_max: int, state: State | None) -> Tensor | None:
    """Fake-quantize each row with the symmetric grid that just covers it.

    Args:
        x: (C, ...) float32, not empty.
        quant_max: highest code; the lowest one is its opposite or below.
        state: buffers ``(min, max, count)``: (C,) float32 twice, () int64; they get the extremes of
            the rows and one more batch. ``None`` for nothing.

    Returns:
        The result. ``None`` where that takes more care or more passes; the remembered range means
        nothing then, for it was that of an earlier tensor.
    """
    loops, rows = compiled_loops(), x.shape[0]
    length = x.numel() // rows
    if loops is None or not _has_rows(x, 0, length):
        return None
    if state is not None and not is_state(state, x.shape[:1]):
        return None
    y = carrier(x)
    data = read_address(x), y.data_ptr()
    ends = (0, 0) if state is None else (state[0].data_ptr(), state[1].data_ptr())

    counter = 0 if state is None else state[2].data_ptr()

    def part(some: slice) -> bool:
        at = (address + 4 * some.start * length for address in data)
        to = (address and address + 4 * some.start for address in ends)
        sizes = some.stop - some.start, length
        finite: bool = loops.round_rows(*at, *sizes, quant_max, *to, 0)
        return finite

    parts = pieces(x.numel(), rows)
    if len(parts) == 1:
        if not loops.round_rows(*data, rows, length, quant_max, *ends, counter):
            return None
    elif all(in_threads(part, parts, (x, y, state))):
        if state is not None:
            state[2].add_(1)
    else:
        return None
    return with_gradient(x, y)


def observe_rows(x: Tensor, state: State) -> bool:
    """Let the extremes of the rows of ``x`` be the remembered ranges.

    Args:
        x: (C, ...) float32, not empty.
        state: buffers ``(min, max, count)``: (C,) float32 twice, () int64.

    Returns:
        Whether that is done; else it takes more care, and the remembered ranges mean nothing.
    """
    loops, rows = compiled_loops(), x.shape[0]
    length = x.numel() // rows
    if loops is None or not _has_rows(x, 0, length) or not is_state(state, x.shape[:1]):
        return False
    done: bool = loops.observe_rows(
        read_address(x), rows, length, *(each.data_ptr() for each in state)
    )
    return done


def fake_quantize_rows_in_ranges(
    x: Tensor, state: State, quant_min: int, quant_max: int
) -> Tensor | None:
    """Fake-quantize each row with the symmetric grid of its remembered range.

    Args:
        x: (C, ...) float32, not empty.
        state: buffers ``(min, max, count)``: (C,) float32 twice, () int64.
        quant_min: lowest code, below 0.
        quant_max: highest code.

    Returns:
        The result, ``None`` where that takes more care or more passes.
    """
    loops, rows = compiled_loops(), x.shape[0]
    if loops is None or not _has_rows(x, 0, x.numel() // rows):
        return None
    if not is_state(state, x.shape[:1]):
        return None
    (low, high, _), length = state, x.numel() // rows
    listing = needs_gradient(x) and x.numel() <= SMALL and x.is_contiguous()
    scale, places = torch.empty_like(low), room_for(x) if listing else None
    ends, codes = (read_address(low), read_address(high)), (quant_min, quant_max)
    room = (0, 0) if places is None else (places.data_ptr(), places.numel())
    data = read_address(x), rows, length
    count = loops.list_rows_outside(*data, *ends, scale.data_ptr(), *codes, *room)
    if count < 0:
        return None
    if places is None or count > places.numel():
        return _round_rows(x, scale, quant_min, quant_max, 0, length)
    y = x.clone() if count == 0 else _stopped_at(x, places[0, :count])
    sizes = x.numel(), length, read_address(scale), rows, 0
    loops.round_clamp_rows(read_address(x), y.data_ptr(), *sizes, *codes, 0, 0)
    return y


def _stopped_at(x: Tensor, places: Tensor) -> Tensor:
    """Return a tensor that gives ``x`` its gradient, but for some elements."""
    return x.view(-1).index_fill(0, places.clone(), 0.0).view(x.shape)  # not the room for more


def fake_quantize_rows_on_grids(
    x: Tensor, scale: Tensor, low: int, high: int, axis: int
) -> Tensor | None:
    """Fake-quantize with a scale for each row, where the rows are parts of memory."""
    length = _length_of_rows(x, scale, axis)
    return _round_rows(x, scale, low, high, axis, length) if length else None


def fake_quantize_rows_unclipped(x: Tensor, scale: Tensor, axis: int) -> Tensor | None:
    """Do the same on grids without ends; the gradient passes everywhere."""
    length = _length_of_rows(x, scale, axis)
    if not length:
        return None
    y = carrier(x)
    round_and_list(x.detach(), y, length, scale, (-math.inf, math.inf))
    return with_gradient(x, y)


def _length_of_rows(x: Tensor, scale: Tensor, axis: int) -> int:
    """Return how many neighbours in memory share a scale, 0 for too few."""
    axis = axis % x.dim()
    length = math.prod(x.shape[axis + 1 :])
    plain = x.dtype == torch.float32 and is_numbers(scale, x.shape[axis : axis + 1])
    if compiled_loops() is None or not plain or length < _SHORT or not _has_rows(x, axis, length):
        return 0
    return length


def _round_rows(x: Tensor, scale: Tensor, low: int, high: int, axis: int, length: int) -> Tensor:
    """Fake-quantize rows of ``length`` elements, which are parts of memory, with their scales."""
    y = torch.empty_like(x)
    places = round_and_list(x, y, length, scale, (low, high))
    if not needs_gradient(x):
        return y
    if places is None:
        return stopped_by_channel(x, cast(Tensor, along(scale, x, axis)), low, high, y)
    return straight(x, y, places)


def _has_rows(x: Tensor, axis: int, length: int) -> bool:
    """Tell whether what is behind ``axis`` are runs of ``length`` elements in memory, in order."""
    if not x.numel() or is_lazy(x):
        return False
    if x.is_contiguous():
        return True
    return axis == 0 and is_dense(x) and (len(x) == 1 or x.stride(0) == length)
