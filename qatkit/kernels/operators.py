"""Operators for graphs that ``torch.compile`` records; importing this module registers them.

| operator | in the graph behind Dynamo |
|---|---|
| ``shrink`` | stays one call: the search of a range runs as it does eager |
| ``round_to_grid``, ``round_unclipped`` | tensor operations, fused with those around them |
| ``round_rows`` | one call for a kernel of taps on the CPU, which inductor gathers one by one |
| ``round_to_grid_backward`` | on the CPU one call, so that ``x`` is kept for the backward and no \
mask: storing masks of booleans takes inductor ten times as long as the fake quantization |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qatkit.kernels import cpu, dispatch, portable
from qatkit.kernels.library import register_call, register_decomposed
from qatkit.kernels.portable import along

GRID = "Tensor scale, Tensor? zero_points, int zero_point, int quant_min, int quant_max"


def shrink(x: Tensor, percentile: float, axis: int | None) -> tuple[Tensor, Tensor]:
    """Record `qatkit.kernels.shrink`."""
    low, high = torch.ops.qatkit.shrink(x, percentile, axis)
    return low, high


def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    axis: int | None,
) -> Tensor:
    """Record `qatkit.kernels.fake_quantize`."""
    scale = _tensor(scale, x)
    codes = (zero_point, 0) if isinstance(zero_point, Tensor) else (None, zero_point)
    result: Tensor = torch.ops.qatkit.round_to_grid(x, scale, *codes, quant_min, quant_max, axis)
    return result


def fake_quantize_unclipped(x: Tensor, scale: Tensor | float, axis: int | None) -> Tensor:
    """Record `qatkit.kernels.fake_quantize_unclipped`."""
    result: Tensor = torch.ops.qatkit.round_unclipped(x, _tensor(scale, x), axis)
    return result


def _tensor(scale: Tensor | float, x: Tensor) -> Tensor:
    if isinstance(scale, Tensor):
        return scale
    return torch.full((), scale, dtype=torch.float32, device=x.device)


def _shrink(x: Tensor, percentile: float, axis: int | None) -> tuple[Tensor, Tensor]:
    return dispatch.shrink(x, percentile, axis)


def _shapes_of_shrink(x: Tensor, percentile: float, axis: int | None) -> tuple[Tensor, Tensor]:
    shape = () if axis is None else (x.shape[axis],)
    low, high = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return low, high


def _round_to_grid(
    x: Tensor,
    scale: Tensor,
    zero_points: Tensor | None,
    zero_point: int,
    quant_min: int,
    quant_max: int,
    axis: int | None,
) -> Tensor:
    center = zero_point if zero_points is None else zero_points
    if x.device.type != "cpu" or dispatch.is_eager_cpu(x):
        return dispatch.fake_quantize(x, scale, center, quant_min, quant_max, axis)
    wide, shift = along(scale, x, axis), along(center, x, axis)
    result: Tensor = _RoundToGrid.apply(x, wide, shift, quant_min, quant_max)
    return result


class _RoundToGrid(torch.autograd.Function):
    """Tensor operations forward, one operator backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Any, low: int, high: int) -> Tensor:
        codes = portable.codes(x, scale)
        if isinstance(shift, Tensor):
            ctx.save_for_backward(x, scale, shift)
            ctx.grid = 0, low, high
            return ((codes + shift).clamp(low, high) - shift).mul(scale).to(x.dtype)
        ctx.save_for_backward(x, scale, None)
        ctx.grid = shift, low, high
        return codes.clamp(low - shift, high - shift).mul(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift = ctx.saved_tensors
        passed = torch.ops.qatkit.round_to_grid_backward(grad, x, scale, shift, *ctx.grid)
        return passed, None, None, None, None


def _round_to_grid_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_points: Tensor | None,
    zero_point: int,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    """Return the gradient of ``x``; scale and zero point are numbers or broadcast against it."""
    found = _passed(grad, x, scale, zero_points, zero_point, quant_min, quant_max)
    wanted = _like_gradient(grad, x)
    return found if found.stride() == wanted.stride() else wanted.copy_(found)


def _passed(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_points: Tensor | None,
    zero_point: int,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    if zero_points is not None:
        if zero_points.numel() > 1 or scale.numel() > 1:
            return portable.passed(grad, x, scale, zero_points, quant_min, quant_max)
        zero_point = int(zero_points)
    low, high = quant_min - zero_point, quant_max - zero_point
    step = float(scale) if scale.numel() == 1 else 1.0
    if not (low <= 0 <= high and cpu.has_reciprocal(step)):
        return portable.passed(grad, x, scale, zero_point, quant_min, quant_max)
    if scale.numel() > 1:
        x = x.to(torch.float32) * scale.reciprocal()
    rounded = x.to(torch.float32) if x.dtype == torch.float64 else x
    return cpu.gate(grad, rounded, *cpu.first_outside(step, low, high))


def _like_gradient(grad: Tensor, x: Tensor, *grid: Any) -> Tensor:
    return torch.empty_like(x, dtype=grad.dtype)


def _round_unclipped(x: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    if x.device.type == "cpu" and axis == 0 and _is_transposed(x) and not dispatch.is_eager_cpu(x):
        result: Tensor = _RoundRows.apply(x, scale)
        return result
    return dispatch.fake_quantize_unclipped(x, scale, axis)


def _is_transposed(weight: Tensor) -> bool:
    """Tell whether inductor, whose convolutions are channels last, moves the elements of a row."""
    return weight.dim() > 2 and weight.shape[1] > 1 and weight[0, 0].numel() > 1


class _RoundRows(torch.autograd.Function):
    """One operator forward, nothing backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        result: Tensor = torch.ops.qatkit.round_rows(x, scale)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _round_rows(x: Tensor, scale: Tensor) -> Tensor:
    return dispatch.fake_quantize_unclipped(x, scale, 0)


def _like(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


register_call(
    "shrink(Tensor x, float percentile, int? axis) -> (Tensor, Tensor)", _shrink, _shapes_of_shrink
)
register_call(
    f"round_to_grid_backward(Tensor grad, Tensor x, {GRID}) -> Tensor",
    _round_to_grid_backward,
    _like_gradient,
)
register_call("round_rows(Tensor x, Tensor scale) -> Tensor", _round_rows, _like)
register_decomposed(f"round_to_grid(Tensor x, {GRID}, int? axis) -> Tensor", _round_to_grid)
register_decomposed(
    "round_unclipped(Tensor x, Tensor scale, int? axis) -> Tensor", _round_unclipped
)
