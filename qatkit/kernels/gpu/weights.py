"""A weight on the symmetric grid of its own range: extremes, scales and rounding in one kernel."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qatkit.kernels.gpu.arithmetic import EXACT, device_of, is_finite, nearest_even, store, usable
from qatkit.kernels.layout import is_dense

LONGEST = 16384
"""Elements of a row that one program holds in registers."""


def fits(w: Tensor, axis: int | None) -> bool:
    """Tell whether each index along ``axis`` is one piece of memory that a program can hold."""
    if not w.numel() or not is_dense(w):
        return False
    if axis is None:
        return w.numel() <= LONGEST
    length = w.numel() // w.shape[axis]
    return length <= LONGEST and (w.shape[axis] == 1 or w.stride(axis) == length)


@triton.jit
def _quantize_rows(
    w_ptr, y_ptr, min_ptr, max_ptr, length, quant_max, KEEP: tl.constexpr, SIZE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    here = tl.arange(0, SIZE)
    inside = here < length
    w = tl.load(w_ptr + row * length + here, mask=inside, other=0.0).to(tl.float32)
    seen = inside & is_finite(w)
    low = tl.min(tl.where(seen, w, float("inf")), 0)
    high = tl.max(tl.where(seen, w, float("-inf")), 0)
    some = low <= high
    low, high = tl.where(some, low, 0.0), tl.where(some, high, 0.0)
    amax = tl.maximum(tl.abs(low), tl.abs(high))
    scale = usable(tl.div_rn(amax, quant_max))
    steps = nearest_even(w * tl.div_rn(1.0, scale))
    store(y_ptr + row * length + here, steps * scale, inside)
    if KEEP:
        tl.store(min_ptr + row, low)
        tl.store(max_ptr + row, high)


class _QuantizeRows(torch.autograd.Function):
    """The straight-through estimator where nothing is outside the grid: nothing is kept."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, axis: int | None, quant_max: int, state: Any) -> Tensor:
        channels = 1 if axis is None else w.shape[axis]
        length = w.numel() // channels
        size = triton.next_power_of_2(length)
        y = torch.empty_like(w)
        low, high = (w, w) if state is None else state[:2]
        sizes = {"KEEP": state is not None, "SIZE": size, "num_warps": 8 if size > 4096 else 4}
        with device_of(w):
            _quantize_rows[(channels,)](w, y, low, high, length, float(quant_max), **sizes, **EXACT)
            if state is not None:
                state[2].add_(1)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad, None, None, None


def quantize_rows(
    w: Tensor,
    axis: int | None,
    quant_max: int,
    state: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Return ``w`` on the symmetric grid of its own range; the gradient passes.

    Args:
        w: (C, ...) any float dtype; see `fits`.
        axis: one scale for each index along this axis, ``None`` for one scale.
        quant_max: the highest code; the lowest is at most its negative.
        state: buffers ``(min, max, count)`` that take the range and count up: () or (C,) float32
            twice, () int64; contiguous.
    """
    result: Tensor = _QuantizeRows.apply(w, axis, quant_max, state)
    return result
