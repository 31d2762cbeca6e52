"""The grid of a tensor with one symmetric range, in plain numbers: remembered, or observed anew."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qatkit.kernels import portable
from qatkit.kernels.cpu.compiled import compiled_loops
from qatkit.kernels.cpu.ranges import shrink_row
from qatkit.kernels.cpu.state import State, is_state, read_address
from qatkit.kernels.cpu.threads import pieces
from qatkit.kernels.layout import dense_order, is_dense

_ONE = torch.Size([])


class Observing(NamedTuple):
    """How the range of a tensor is estimated and remembered, in numbers.

    Attributes:
        percentile: percent of the elements that may be cut on each side.
        rule: ``blend`` or ``extremes``: how a range joins the remembered one.
        least: the smallest weight of a new range, for ``blend``.
        greatest: the largest one.
    """

    percentile: float
    rule: str
    least: float
    greatest: float


class ActivationNumbers(NamedTuple):
    """What a quantizer of activations does, in numbers.

    Attributes:
        observing: the observer.
        signed: whether there are codes below 0.
        low: the lowest code, not above 0.
        high: the highest code, not below 0.
    """

    observing: Observing
    signed: bool
    low: int
    high: int


class Clip(NamedTuple):
    """An activation that does nothing but ``min(max(x, floor), ceiling)``.

    Its gradient is 0 where ``x`` is at an end or beyond.
    """

    floor: float = -math.inf
    ceiling: float = math.inf


NO_CLIP = Clip()


class GridNumbers(NamedTuple):
    """A grid with a zero point of 0.

    Attributes:
        scale: the step.
        below: the float nearest to zero whose code is below the lowest one, see `first_outside`.
        above: the float nearest to zero whose code is above the highest one.
    """

    scale: float
    below: float
    above: float


def observe(
    x: Tensor, state: State, how: Observing, clip: Clip = NO_CLIP
) -> tuple[float, float] | None:
    """Estimate the range of ``clip(x)`` and let it join the remembered one.

    Args:
        x: float32, not empty.
        state: buffers ``(min, max, count)``: () float32 twice, () int64.
        how: the observer.
        clip: an activation that is still to come.

    Returns:
        The range of ``clip(x)``. ``None``, with nothing remembered, where that takes more care, see
        `shrink_row`.
    """
    loops = compiled_loops()
    if loops is None or not is_state(state, _ONE):
        return None
    low, high, count = state
    join = low.data_ptr(), high.data_ptr(), count.data_ptr(), loops.RULES[how.rule], *how[2:]
    row = x if is_dense(x) else dense_order(x).contiguous()
    total = row.numel()
    if len(pieces(total, total)) > 1:
        ends = shrink_row(dense_order(row), how.percentile, clip)
        if ends is not None:
            loops.join(*ends, *join)
        return ends
    most = portable.droppable(total, how.percentile)
    usual, *found = loops.observe(read_address(row), total, most, *clip, *join)
    return (found[0], found[1]) if usual else None


def remembered_grid(state: State, numbers: ActivationNumbers) -> GridNumbers | None:
    """Return the grid of the remembered range.

    Args:
        state: buffers ``(min, max, count)``: () float32 twice, () int64.
        numbers: the codes.
    """
    loops = compiled_loops()
    if loops is None or not is_state(state, _ONE):
        return None
    low, high, _ = state
    codes = numbers.signed, numbers.low, numbers.high
    return GridNumbers(*loops.grid(read_address(low), read_address(high), *codes))
