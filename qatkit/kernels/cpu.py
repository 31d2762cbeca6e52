"""The kernels for eager mode on the CPU: few passes, and branches on scalars where they save one.

| step | passes over x |
|---|---|
| fake quantize, forward | 4 to 5, all but the first in place on one buffer |
| fake quantize, backward | 1, on x itself per-tensor, on x / scale per-channel |
| shrink, small percentile | 2 over x, the rest on a few blocks |
| shrink, large percentile | 1 over x, then about 4 that count |

With one scale the gradient of fake quantization is that of ``clip(x)``, and with a grid that holds
all of x that of ``clone(x)``. So PyTorch records only this first pass, and the others write to its
result unseen: no `torch.autograd.Function` has to come back to Python, which costs more than small
tensors themselves.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qatkit.kernels import portable
from qatkit.kernels.counting import ends_of_tails
from qatkit.kernels.portable import along


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
            return _apply(_PerTensor, x, value, low, high)
    elif isinstance(scale, Tensor) and not isinstance(zero_point, Tensor):
        low, high = quant_min - zero_point, quant_max - zero_point
        result = _rows_hardly_clipped(x, scale, low, high) if axis == 0 else None
        if result is not None:
            return result
        return _apply(_PerChannel, x, along(scale, x, axis), low, high)
    return portable.fake_quantize(x, scale, zero_point, quant_min, quant_max, axis)


def fake_quantize_number(x: Tensor, scale: float, low: int, high: int) -> Tensor:
    """Fake-quantize ``x``, float32, with one scale and a zero point of 0.

    Args:
        x: any shape and memory format.
        scale: a number of float32 that has a reciprocal.
        low: the lowest code, not above 0.
        high: the highest code, not below 0.
    """
    y = functional.hardtanh(x, *first_outside(scale, low, high))
    y.detach().mul_(reciprocal(scale)).round_().clamp_(low, high).mul_(scale)
    return y


def fake_quantize_unclipped(x: Tensor, scale: Tensor | float, axis: int | None) -> Tensor:
    """Fake-quantize ``x``, all of it inside the grid."""
    if x.dtype != torch.float32:
        return portable.fake_quantize_unclipped(x, scale, axis)
    wide = along(scale, x, axis)
    inverse = wide.reciprocal() if isinstance(wide, Tensor) else reciprocal(wide)
    y = x.clone()
    y.detach().mul_(inverse).round_().mul_(wide)
    return y


def _rows_hardly_clipped(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor | None:
    """Fake-quantize a weight of whose rows few reach outside the grid, else return ``None``.

    The extremes of the rows tell which; only those are searched for the elements outside. The
    backward pass then sets a few elements to zero, or none, where `_PerChannel` compares them all.
    """
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    if x.dtype != torch.float32 or x.numel() < _SMALL or order[0]:
        return None
    x_CM = x.detach().permute(order).reshape(len(x), -1)
    inverse = scale.reciprocal()
    steps = [np.rint(end.numpy()) for end in (x_CM.amin(1) * inverse, x_CM.amax(1) * inverse)]
    outside = np.flatnonzero(~((steps[0] >= low) & (steps[1] <= high)))
    if not len(outside):
        return fake_quantize_unclipped(x, scale, 0)
    if _MANY * len(outside) > len(x):
        return None
    some = torch.from_numpy(outside)
    codes = x_CM[some].mul_(inverse[some, None]).round_()
    row, column = (~((codes >= low) & (codes <= high))).nonzero(as_tuple=True)
    clipped = some[row] * x_CM.shape[1] + column
    y = x.permute(order).reshape(-1).index_fill(0, clipped, 0.0)
    y_CM = y.detach().view_as(x_CM)
    y_CM.mul_(inverse[:, None]).round_().mul_(scale[:, None])
    y_CM.view(-1)[clipped] = codes[row, column].clamp_(low, high).mul_(scale[some[row]])
    back = sorted(range(x.dim()), key=order.__getitem__)
    return y.view([x.shape[axis] for axis in order]).permute(back)


_SMALL, _MANY = 2**16, 4  # elements for which `_PerChannel` is as fast; one row of so many


def shrink(x_CM: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """Return the shrunk range of each row, (C,); see `qatkit.kernels.portable.shrink`.

    The few numbers left after the passes over ``x_CM`` are worked on in NumPy, whose calls cost
    less. Rows that hold anything unusual go the portable way.
    """
    channels, total = x_CM.shape
    if channels == 1:
        ends = shrink_row(x_CM[0], percentile)
        if ends is not None:
            low, high = (torch.tensor([end], dtype=torch.float32) for end in ends)
            return low, high
    elif portable.droppable(total, percentile) == 0:
        low, high = x_CM.amin(1), x_CM.amax(1)
        if np.isfinite(low.numpy()).all() and np.isfinite(high.numpy()).all():
            return low, high
    return portable.shrink(x_CM, percentile)


def shrink_row(x_M: Tensor, percentile: float) -> tuple[float, float] | None:
    """Return the shrunk range of one row as float32 numbers, ``None`` where that takes more care.

    That is for a row that holds NaN or an infinity, is constant, or spans next to nothing or more
    than float32 can add up: see `qatkit.kernels.portable.shrink`.
    """
    most = portable.droppable(len(x_M), percentile)
    if most == 0:
        low, high = (end.item() for end in torch.aminmax(x_M))
        return (low, high) if -_LARGEST <= low <= high <= _LARGEST else None
    block = portable.block_size(len(x_M), most)
    if block:
        blocks = len(x_M) // block
        whole, rest = (x_M, None) if len(x_M) % block == 0 else x_M.tensor_split([blocks * block])
        x_RB = whole.view(blocks, block)
        low, left = _two_extremes(x_RB, rest, most + 1, largest=False)
        high, right = _two_extremes(x_RB, rest, most + 1, largest=True)
    else:
        low, high = (end.item() for end in torch.aminmax(x_M))
    if not _SMALLEST_SPAN <= high - low <= _LARGEST:  # false for NaN too
        return None
    start, factor = np.float32(low), _bins_per_unit(low, high)
    if block:
        first = round(float((np.float32(left) - start) * factor))
        last = round(float((np.float32(right) - start) * factor))
    else:
        first, last = ends_of_tails(x_M, start, factor, most)
    back = np.float32(1) / factor
    if first > 1:
        low = max(low, float(np.float32(first - 1) * back + start))
    if last < portable.LAST_BIN - 1:
        high = min(high, float(np.float32(last + 1) * back + start))
    return low, high


_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST_SPAN = 2.0**-99  # below, the bins need scaling (`portable.bins`)


def _bins_per_unit(low: float, high: float) -> np.float32:
    span = np.float32(high) - np.float32(low)
    factor: np.float32 = np.float32(1) / span * np.float32(portable.LAST_BIN)
    return factor


def _two_extremes(
    x_RB: Tensor, rest: Tensor | None, k: int, *, largest: bool
) -> tuple[float, float]:
    """Return the most extreme element and the ``k``-th of them; see `portable.extremes`."""
    peaks = (x_RB.amax(1) if largest else x_RB.amin(1)).numpy()
    end = float(peaks.max() if largest else peaks.min())
    if math.isnan(end):
        return end, end
    if rest is None and np.count_nonzero(peaks == end) >= k:  # zeros behind a ReLU
        return end, end
    place = len(peaks) - k if largest else k - 1
    order = np.argpartition(peaks, place)
    chosen = order[place:] if largest else order[:k]  # these blocks hold the k elements
    candidates = x_RB.numpy()[chosen].ravel()
    if rest is not None:
        candidates = np.concatenate([candidates, rest.numpy()])
    bound = peaks[order[place]]
    candidates = np.sort(candidates[candidates >= bound if largest else candidates <= bound])
    ends = (candidates[-1], candidates[-k]) if largest else (candidates[0], candidates[k - 1])
    return float(ends[0]), float(ends[1])


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
    inverse = reciprocal(scale)
    return -_first_above(inverse, -low), _first_above(inverse, high)


def _first_above(inverse: float, high: int) -> float:
    middle, is_above = _rounds_above(high)
    x = middle / inverse
    if x > _LARGEST:
        return math.inf
    x = float(np.float32(x))  # this one or a neighbour; products are exact in float64
    mantissa, exponent = math.frexp(x)
    step = math.ldexp(1.0, max(exponent - 24, -149))
    if _is_inside(x * inverse, middle, is_above):
        return x + step
    before = x - (step / 2 if mantissa == 0.5 and exponent > -125 else step)
    return x if _is_inside(before * inverse, middle, is_above) else before


def _is_inside(product: float, middle: float, is_above: bool) -> bool:
    return product < middle or (product == middle and not is_above)


@functools.lru_cache(maxsize=256)
def _rounds_above(high: int) -> tuple[float, bool]:
    """Return the least product that float32 and then ``round`` take above ``high``.

    It is a bound in float64, and whether it is above ``high`` itself.
    """
    limit = np.float32(high + 0.5)
    if high % 2 == 0:  # half to even: high + 0.5 rounds to high, which is inside
        limit = np.nextafter(limit, np.float32(np.inf))
    before = np.nextafter(limit, np.float32(0))
    return (float(limit) + float(before)) / 2, int(limit.view(np.int32)) % 2 == 0


def reciprocal(scale: float) -> float:
    """Return 1 / scale, as float32 arithmetic gives it."""
    return float(np.float32(1) / np.float32(scale))


def has_reciprocal(scale: float) -> bool:
    """Tell whether a scale and its reciprocal are normal float32 numbers."""
    return portable.SMALLEST_SCALE <= scale <= portable.LARGEST_SCALE
