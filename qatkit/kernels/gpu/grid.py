"""Fake quantize: one read and one write forward, the mask computed again backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qatkit.kernels.gpu.arithmetic import EXACT, device_of, nearest_even, store
from qatkit.kernels.layout import is_dense

BLOCK = 4096


@triton.jit
def _steps(x_ptr, scale_ptr, zero_ptr, start, inside, inner, channels, low, high, ZERO, AXIS, SIZE):
    """Return rounded steps, the scale, and the ends of the grid in steps."""
    here = tl.arange(0, SIZE)
    x = tl.load(x_ptr + start + here, mask=inside, other=0.0).to(tl.float32)
    if AXIS:
        channel = ((start + here) // inner) % channels
        scale = tl.load(scale_ptr + channel, mask=inside, other=1.0)
    else:
        channel = 0
        scale = tl.load(scale_ptr)
    center = 0.0
    if ZERO and AXIS:
        center = tl.load(zero_ptr + channel, mask=inside, other=0).to(tl.float32)
    elif ZERO:
        center = tl.load(zero_ptr).to(tl.float32)
    steps = nearest_even(x * tl.div_rn(1.0, scale))
    return steps, scale, low - center, high - center


@triton.jit
def _forward(
    x_ptr,
    scale_ptr,
    zero_ptr,
    y_ptr,
    count,
    inner,
    channels,
    low,
    high,
    ZERO: tl.constexpr,
    AXIS: tl.constexpr,
    CLIP: tl.constexpr,
    SIZE: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * SIZE
    here = tl.arange(0, SIZE)
    inside = here < count - start
    steps, scale, first, last = _steps(
        x_ptr, scale_ptr, zero_ptr, start, inside, inner, channels, low, high, ZERO, AXIS, SIZE
    )
    if CLIP:
        clipped = tl.minimum(tl.maximum(steps, first), last)
        steps = tl.where(steps == steps, clipped, steps)
    store(y_ptr + start + here, steps * scale, inside)


@triton.jit
def _backward(
    x_ptr,
    scale_ptr,
    zero_ptr,
    grad_ptr,
    passed_ptr,
    count,
    inner,
    channels,
    low,
    high,
    ZERO: tl.constexpr,
    AXIS: tl.constexpr,
    SIZE: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * SIZE
    here = tl.arange(0, SIZE)
    inside = here < count - start
    steps, _, first, last = _steps(
        x_ptr, scale_ptr, zero_ptr, start, inside, inner, channels, low, high, ZERO, AXIS, SIZE
    )
    grad = tl.load(grad_ptr + start + here, mask=inside, other=0.0)
    passes = (steps >= first) & (steps <= last)
    tl.store(passed_ptr + start + here, tl.where(passes, grad, 0.0), mask=inside)


class _FakeQuantize(torch.autograd.Function):
    """The clipped straight-through estimator; what is kept is the input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zeros: Tensor | None, low: int, high: int, axis: Any
    ) -> Tensor:
        x = x if is_dense(x) else x.contiguous()
        ctx.save_for_backward(x, scale, zeros)
        ctx.grid = low, high, axis
        y = torch.empty_like(x)
        _launch(_forward, x, scale, zeros, (y,), ctx.grid, CLIP=True)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zeros = ctx.saved_tensors
        passed = torch.empty_like(x, dtype=grad.dtype)
        if grad.stride() != passed.stride():
            grad = torch.empty_like(passed).copy_(grad)
        _launch(_backward, x, scale, zeros, (grad, passed), ctx.grid)
        return passed, None, None, None, None, None


class _Unclipped(torch.autograd.Function):
    """The straight-through estimator where nothing is outside the grid: nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, axis: int | None) -> Tensor:
        x = x if is_dense(x) else x.contiguous()
        y = torch.empty_like(x)
        _launch(_forward, x, scale, None, (y,), (0, 0, axis), CLIP=False)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def _launch(
    kernel: Any,
    x: Tensor,
    scale: Tensor,
    zeros: Tensor | None,
    others: tuple[Tensor, ...],
    grid: tuple[int, int, int | None],
    **options: bool,
) -> None:
    low, high, axis = grid
    if axis is not None and scale.numel() == 1:
        axis = None
    count = x.numel()
    if not count:
        return
    channels = 1 if axis is None else x.shape[axis]
    inner = 1 if axis is None else max(x.stride(axis), 1)
    with device_of(x):
        kernel[(triton.cdiv(count, BLOCK),)](
            x,
            scale.contiguous(),
            scale if zeros is None else zeros.contiguous(),
            *others,
            count,
            inner,
            channels,
            low,
            high,
            ZERO=zeros is not None,
            AXIS=axis is not None,
            SIZE=BLOCK,
            **options,
            **EXACT,
        )


def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    axis: int | None,
) -> Tensor:
    """Fake-quantize ``x`` with the clipped straight-through gradient."""
    zeros = zero_point if isinstance(zero_point, Tensor) else None
    shift = 0 if isinstance(zero_point, Tensor) else zero_point
    grid = quant_min - shift, quant_max - shift, axis
    result: Tensor = _FakeQuantize.apply(x, _tensor(scale, x), zeros, *grid)
    return result


def fake_quantize_unclipped(x: Tensor, scale: Tensor | float, axis: int | None) -> Tensor:
    """Fake-quantize ``x``, all of it inside the grid."""
    result: Tensor = _Unclipped.apply(x, _tensor(scale, x), axis)
    return result


def _tensor(scale: Tensor | float, x: Tensor) -> Tensor:
    if isinstance(scale, Tensor):
        return scale.to(torch.float32)
    return torch.full((), scale, dtype=torch.float32, device=x.device)
