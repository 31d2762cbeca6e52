"""The kernels for eager mode on the CPU: few passes, and branches on scalars where they save one.

| step | passes over x |
|---|---|
| fake quantize, forward | 1, or 2 on a small tensor |
| fake quantize, backward | 1; none for rows of which no element is outside the grid |
| shrink, small percentile | 1 over x, the rest on a few blocks |
| shrink, large percentile | 2 over x |

The passes are the loops of `qatkit.kernels.cpu.loops`. Where Numba is not installed, tensor
operations do the same in more passes (`round_clamp`), or the portable kernels do.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from qatkit.kernels import portable
from qatkit.kernels.cpu.activated import fake_quantize_activated, may_overwrite
from qatkit.kernels.cpu.bounds import first_outside, gate, has_reciprocal, reciprocal
from qatkit.kernels.cpu.gradients import (
    Kept,
    kept_from,
    needs_gradient,
    stopped,
    stopped_by_channel,
    straight,
)
from qatkit.kernels.cpu.grids import (
    ActivationNumbers,
    Clip,
    GridNumbers,
    Observing,
    observe,
    remembered_grid,
)
from qatkit.kernels.cpu.ranges import shrink, shrink_row
from qatkit.kernels.cpu.rows import (
    fake_quantize_rows,
    fake_quantize_rows_in_ranges,
    fake_quantize_rows_on_grids,
    fake_quantize_rows_unclipped,
    observe_rows,
)
from qatkit.kernels.cpu.tensors import fake_quantize_number, fake_quantize_on_grid, round_clamp
from qatkit.kernels.portable import along

__all__ = [
    "ActivationNumbers",
    "Clip",
    "GridNumbers",
    "Kept",
    "Observing",
    "fake_quantize",
    "fake_quantize_activated",
    "fake_quantize_on_grid",
    "fake_quantize_rows",
    "fake_quantize_rows_in_ranges",
    "fake_quantize_unclipped",
    "first_outside",
    "gate",
    "has_reciprocal",
    "kept_from",
    "may_overwrite",
    "needs_gradient",
    "observe",
    "observe_rows",
    "reciprocal",
    "remembered_grid",
    "round_clamp",
    "shrink",
    "shrink_row",
    "straight",
]


def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    axis: int | None,
) -> Tensor:
    """Fake-quantize ``x`` in few passes."""
    if axis is None:
        value, shift = float(scale), int(zero_point)
        low, high = quant_min - shift, quant_max - shift
        if low <= 0 <= high and has_reciprocal(value):
            if x.dtype == torch.float32:
                return fake_quantize_number(x, value, low, high)
            y = round_clamp(x.detach(), value, low, high)
            return stopped(x, value, low, high, y)
    elif isinstance(scale, Tensor) and not isinstance(zero_point, Tensor):
        low, high = quant_min - zero_point, quant_max - zero_point
        result = fake_quantize_rows_on_grids(x, scale, low, high, axis)
        if result is not None:
            return result
        wide = cast(Tensor, along(scale, x, axis))
        y = round_clamp(x.detach(), wide, low, high)
        return stopped_by_channel(x, wide, low, high, y)
    return portable.fake_quantize(x, scale, zero_point, quant_min, quant_max, axis)


def fake_quantize_unclipped(x: Tensor, scale: Tensor | float, axis: int | None) -> Tensor:
    """Fake-quantize ``x``, all of it inside the grid."""
    if x.dtype != torch.float32:
        return portable.fake_quantize_unclipped(x, scale, axis)
    if axis is not None and isinstance(scale, Tensor):
        result = fake_quantize_rows_unclipped(x, scale, axis)
        if result is not None:
            return result
    wide = along(scale, x, axis)
    inverse = wide.reciprocal() if isinstance(wide, Tensor) else reciprocal(wide)
    y = x.clone()
    y.detach().mul_(inverse).round_().mul_(wide)
    return y
