"""The kernels for eager mode on the CPU: few passes, and branches on scalars where they save one.

| step | passes over x |
|---|---|
| fake quantize, forward | 4 in place on one buffer |
| fake quantize, backward | 1, on x itself per-tensor, on x / scale per-channel |
| shrink, small percentile | 2 over x, the rest on a few blocks |
| shrink, large percentile | 2 over x, 4 for the bins and 1 over bytes for the histogram |
"""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from qatkit.kernels import portable
from qatkit.kernels.portable import along

_Array: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"


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
        if low <= 0 <= high and _has_reciprocal(value):
            return _apply(_PerTensor, x, value, low, high)
    elif not isinstance(zero_point, Tensor):
        low, high = quant_min - zero_point, quant_max - zero_point
        return _apply(_PerChannel, x, along(scale, x, axis), low, high)
    return portable.fake_quantize(x, scale, zero_point, quant_min, quant_max, axis)


def shrink(x_CM: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """Return the shrunk range of each row, (C,); see `qatkit.kernels.portable.shrink`.

    The few numbers left after the passes over ``x_CM`` are worked on in NumPy, whose calls cost
    less. Rows that hold anything unusual go the portable way.
    """
    channels, total = x_CM.shape
    most = portable.droppable(total, percentile)
    block = portable.block_size(total, most)
    if most and block:
        smallest = portable.extremes(x_CM, most + 1, block, largest=False)[:, ::most]
        biggest = portable.extremes(x_CM, most + 1, block, largest=True)[:, ::most]
        low, left = smallest.numpy().T
        high, right = biggest.numpy().T
        if _ordinary(low, high):
            factor = _bins_per_unit(low, high)
            first, last = np.rint((left - low) * factor), np.rint((right - low) * factor)
            return _centers(low, high, first, last)
    elif most == 0 or channels == 1:
        low_C, high_C = x_CM.amin(1), x_CM.amax(1)
        low, high = low_C.numpy(), high_C.numpy()
        if most == 0 and np.isfinite(low).all() and np.isfinite(high).all():
            return low_C, high_C
        if most and _ordinary(low, high):
            return _centers(low, high, *_histogram_ends(x_CM, low, high, most))
    return portable.shrink(x_CM, percentile)


def _ordinary(low: _Array, high: _Array) -> bool:
    # Neither NaN nor infinite nor constant, and the bins need no scaling (`portable.bins`).
    with np.errstate(over="ignore", invalid="ignore"):
        span = high - low
    return bool(((span >= 2.0**-100) & (span < np.inf)).all())


def _bins_per_unit(low: _Array, high: _Array) -> _Array:
    factor: _Array = np.float32(1) / (high - low) * np.float32(portable.LAST_BIN)
    return factor


def _centers(low: _Array, high: _Array, first: _Array, last: _Array) -> tuple[Tensor, Tensor]:
    back = np.float32(1) / _bins_per_unit(low, high)
    start = np.maximum(first - np.float32(1), np.float32(0))
    stop = np.minimum(last + np.float32(1), np.float32(portable.LAST_BIN))
    from_low = np.where(start == 0, low, np.maximum(low, start * back + low))
    to_high = np.where(stop == portable.LAST_BIN, high, np.minimum(high, stop * back + low))
    return torch.from_numpy(from_low), torch.from_numpy(to_high)


def _histogram_ends(x_1M: Tensor, low: _Array, high: _Array, most: int) -> tuple[_Array, _Array]:
    factor = _bins_per_unit(low, high)
    codes = (x_1M - float(low[0])).mul_(float(factor[0])).round_().to(torch.uint8).flatten()
    counts = torch.bincount(codes, minlength=portable.LAST_BIN + 1).numpy()
    first = np.count_nonzero(counts.cumsum() <= most)
    last = portable.LAST_BIN - np.count_nonzero(counts[::-1].cumsum() <= most)
    return np.array([first], np.float32), np.array([last], np.float32)


class _PerTensor(torch.autograd.Function):
    """One scale: the backward pass compares ``x`` itself with the first floats outside the grid."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.grid = scale, low, high
        return round_clamp(x, reciprocal(scale), scale, low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        below, above = first_outside(*ctx.grid)
        rounded = x.to(torch.float32) if x.dtype == torch.float64 else x
        return gate(grad, rounded, below, above), None, None, None


class _PerChannel(torch.autograd.Function):
    """One scale for each channel and one zero point: the backward pass compares ``x / scale``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.grid = low, high
        return round_clamp(x, scale.reciprocal(), scale, low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, scale = ctx.saved_tensors
        below, above = first_outside(1.0, *ctx.grid)
        steps = x.to(torch.float32) * scale.reciprocal()
        return gate(grad, steps, below, above), None, None, None


def _apply(function: Any, x: Tensor, *grid: Any) -> Tensor:
    result: Tensor = function.apply(x, *grid)
    return result


def round_clamp(
    x: Tensor, inverse: Tensor | float, scale: Tensor | float, low: int, high: int
) -> Tensor:
    """Return ``clamp(round(x * inverse), low, high) * scale`` in a buffer of its own."""
    steps = x.to(torch.float32).mul(inverse).round_().clamp_(low, high)
    return steps.mul_(scale).to(x.dtype)


def gate(grad: Tensor, x: Tensor, below: float, above: float) -> Tensor:
    """Return the gradient where below < x < above, else 0, in one pass.

    ``torch.where`` takes 25 times as long.
    """
    if grad.dtype == x.dtype:
        gated: Tensor = torch.ops.aten.hardtanh_backward(grad, x, below, above)
        return gated
    common = torch.promote_types(grad.dtype, x.dtype)
    gated = torch.ops.aten.hardtanh_backward(grad.to(common), x.to(common), below, above)
    return gated.to(grad.dtype)


@functools.lru_cache(maxsize=4096)
def first_outside(scale: float, low: int, high: int) -> tuple[float, float]:
    """Return the floats nearest to zero whose codes are below ``low`` and above ``high``.

    An element is outside when ``round(x * (1 / scale))``, in float32 and half to even, is outside
    ``low..high``.

    >>> first_outside(1.0, -128, 127)
    (-128.50001525878906, 127.5)
    """
    return -_first_above(scale, -low), _first_above(scale, high)


def _first_above(scale: float, high: int) -> float:
    inverse, limit = np.float32(reciprocal(scale)), np.float32(high + 0.5)
    if high % 2 == 0:  # half to even: high + 0.5 rounds to high, which is inside
        limit = np.nextafter(limit, np.float32(np.inf))
    with np.errstate(over="ignore"):
        x = np.float32(float(limit) / float(inverse))
        while x * inverse >= limit:
            x = np.nextafter(x, np.float32(0))
        while x * inverse < limit:
            x = np.nextafter(x, np.float32(np.inf))
    return float(x)


def reciprocal(scale: float) -> float:
    """Return 1 / scale, as float32 arithmetic gives it."""
    return float(np.float32(1) / np.float32(scale))


def _has_reciprocal(scale: float) -> bool:
    return portable.SMALLEST_SCALE <= scale <= portable.LARGEST_SCALE
