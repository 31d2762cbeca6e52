"""Where a grid ends among the floats, and gradients that stop there."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qatkit.kernels import portable
from qatkit.kernels.cpu.compiled import compiled_loops


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


def first_outside(scale: float, low: int, high: int) -> tuple[float, float]:
    """Return the floats nearest to zero whose codes are below ``low`` and above ``high``.

    An element is outside when ``round(x * (1 / scale))``, in float32 and half to even, is outside
    ``low..high``.

    >>> first_outside(1.0, -128, 127)
    (-128.50001525878906, 127.5)
    """
    loops = compiled_loops()
    if loops is not None:
        below, above = loops.first_outside(scale, low, high)
        return float(below), float(above)
    inverse = reciprocal(scale)
    return -_first_above(inverse, -low), _first_above(inverse, high)


def _first_above(inverse: float, high: int) -> float:
    step, most = np.float32(inverse), np.float32(high)
    with np.errstate(over="ignore"):
        x = (most + np.float32(0.5)) / step  # this one or a neighbour
        while np.rint(x * step) > most:
            x = np.nextafter(x, np.float32(0))
        while np.rint(x * step) <= most:
            x = np.nextafter(x, np.float32(np.inf))
    return float(x)


def reciprocal(scale: float) -> float:
    """Return 1 / scale, as float32 arithmetic gives it."""
    return float(np.float32(1) / np.float32(scale))


def has_reciprocal(scale: float) -> bool:
    """Tell whether a scale and its reciprocal are normal float32 numbers."""
    return portable.SMALLEST_SCALE <= scale <= portable.LARGEST_SCALE
