"""Fake quantization of ``clip(x)``, both in one pass, forward and backward.

A large result is written over ``x``, and what is kept for the backward pass is a bit for each
element. On a small one it costs less to let PyTorch record a ``hardtanh``.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from qatkit.kernels.cpu.compiled import compiled_loops
from qatkit.kernels.cpu.gradients import SMALL, is_batched, needs_gradient
from qatkit.kernels.cpu.grids import ActivationNumbers, Clip, GridNumbers
from qatkit.kernels.cpu.sharing import is_unshared
from qatkit.kernels.cpu.state import is_lazy, read_address
from qatkit.kernels.cpu.tensors import fake_quantize_inside
from qatkit.kernels.cpu.threads import in_threads, pieces
from qatkit.kernels.layout import is_dense


def may_overwrite(x: Tensor) -> bool:
    """Tell whether a result may take the place of ``x``, which nothing else is going to read."""
    leaf = x.requires_grad and x.grad_fn is None
    return not leaf and not x._is_view() and is_dense(x) and not is_lazy(x)


def fake_quantize_activated(
    x: Tensor, numbers: ActivationNumbers, grid: GridNumbers, clip: Clip
) -> Tensor:
    """Return ``clip(x)`` on the grid; where that pays, it is written over ``x``.

    Args:
        x: float32 that `may_overwrite` holds for.
        numbers: the codes.
        grid: the grid.
        clip: the activation.
    """
    ends = max(clip.floor, grid.below), min(clip.ceiling, grid.above)
    recorded = needs_gradient(x)
    if recorded and x.numel() <= SMALL:
        return fake_quantize_inside(x, grid.scale, numbers.low, numbers.high, ends)
    bits = torch.empty(-(-x.numel() // 8) if recorded else 0, dtype=torch.uint8, device="cpu")
    _overwrite(x, bits, (grid.scale, numbers.low, numbers.high, *clip, *ends))
    y: Tensor = _Overwritten.apply(x, bits) if recorded else x
    return y


def _overwrite(x: Tensor, bits: Tensor, how: tuple[float, ...]) -> None:
    loops = cast(ModuleType, compiled_loops())
    total, data, packed = x.numel(), x.data_ptr(), bits.data_ptr() if len(bits) else 0

    def part(some: slice) -> None:
        start, stop = (min(end * loops.PASSING_BLOCK, total) for end in (some.start, some.stop))
        here = packed and packed + some.start * loops.BLOCK_BYTES
        loops.round_activated(data + 4 * start, here, stop - start, *how)

    in_threads(part, pieces(total, -(-total // loops.PASSING_BLOCK)), (x, bits))


class _Overwritten(torch.autograd.Function):
    """The gradient goes where the bit is 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        ctx.save_for_backward(bits)
        ctx.stride = x.stride()
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (bits,) = ctx.saved_tensors
        if is_batched(grad) or torch.is_grad_enabled() or grad.dtype != torch.float32:
            return torch.where(_unpacked(bits, grad.shape, ctx.stride), grad, 0.0), None
        if grad.stride() != ctx.stride or not is_unshared(grad):
            own = torch.empty_strided(grad.shape, ctx.stride, dtype=grad.dtype, device="cpu")
            grad = own.copy_(grad)
        loops = cast(ModuleType, compiled_loops())
        total, data, packed = grad.numel(), grad.data_ptr(), read_address(bits)

        def part(some: slice) -> None:
            start, stop = (min(end * loops.PASSING_BLOCK, total) for end in (some.start, some.stop))
            here = packed + some.start * loops.BLOCK_BYTES
            loops.pass_where(data + 4 * start, here, stop - start)

        in_threads(part, pieces(total, -(-total // loops.PASSING_BLOCK)), (grad, bits))
        return grad, None


def _unpacked(bits: Tensor, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """Return the bits as booleans in the layout of what was overwritten."""
    passing = torch.empty_strided(shape, stride, dtype=torch.bool, device="cpu")
    loops = cast(ModuleType, compiled_loops())
    loops.unpack(read_address(bits), passing.data_ptr(), passing.numel())
    return passing
