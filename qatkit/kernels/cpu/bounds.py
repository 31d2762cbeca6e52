"""Where a grid ends among the floats, and gradients that stop there."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from qatkit.kernels import portable

_LARGEST = float(np.finfo(np.float32).max)


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
