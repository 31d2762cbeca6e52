"""Which path a tensor with numbers takes: by its device, nothing being compiled."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qatkit.kernels import cpu, learned, portable
from qatkit.kernels.gradient import Gradient
from qatkit.kernels.layout import dense_order, rows

_torch_c: Any = torch._C
_is_traced = _torch_c._get_tracing_state
_count_modes = _torch_c._len_torch_dispatch_stack
_level_of_transform = _torch_c._functorch.maybe_current_level


def is_eager_cpu(x: Tensor) -> bool:
    """Tell whether ``x`` is on the CPU and only computed with: reading its memory is free then."""
    plain = type(x) is Tensor or type(x) is torch.nn.Parameter
    return plain and x.is_cpu and not _is_recorded() and _has_memory(x)


def _has_memory(x: Tensor) -> bool:
    """Tell whether the memory of ``x`` holds its elements."""
    if x.layout is not torch.strided or x.is_neg() or x._is_zerotensor():
        return False
    return x.untyped_storage().nbytes() > 0 or x.numel() == 0


def _is_recorded() -> bool:
    """Tell whether somebody wants to see each operator: a compiler, a tracer, a transform."""
    return bool(
        torch.compiler.is_compiling()
        or _is_traced() is not None
        or _count_modes()
        or _level_of_transform() is not None
        or forward_ad._current_level >= 0
    )


def is_gpu(x: Tensor) -> bool:
    """Tell whether ``x`` is on a CUDA device, for which there are Triton kernels."""
    plain = type(x) is Tensor or type(x) is torch.nn.Parameter
    return plain and x.is_cuda and not torch.compiler.is_compiling() and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    axis: int | None,
) -> Tensor:
    """Fake-quantize ``x`` with the clipped straight-through gradient, arguments already checked."""
    if is_eager_cpu(x):
        return cpu.fake_quantize(x, scale, zero_point, quant_min, quant_max, axis)
    if is_gpu(x):
        from qatkit.kernels import gpu

        return gpu.fake_quantize(x, scale, zero_point, quant_min, quant_max, axis)
    return portable.fake_quantize(x, scale, zero_point, quant_min, quant_max, axis)


def fake_quantize_unclipped(x: Tensor, scale: Tensor | float, axis: int | None) -> Tensor:
    """Fake-quantize ``x``, all of it inside the grid, arguments already checked."""
    if is_eager_cpu(x):
        return cpu.fake_quantize_unclipped(x, scale, axis)
    if is_gpu(x):
        from qatkit.kernels import gpu

        return gpu.fake_quantize_unclipped(x, scale, axis)
    return portable.fake_quantize_unclipped(x, scale, axis)


def fake_quantize_learned(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | int,
    offset: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    rule: Gradient,
) -> Tensor:
    """Fake-quantize ``x`` with gradients by ``rule``, arguments already checked."""
    fast = is_eager_cpu(x)
    return learned.fake_quantize(
        x, scale, zero_point, offset, quant_min, quant_max, axis, rule, fast
    )


def shrink(x: Tensor, percentile: float, axis: int | None) -> tuple[Tensor, Tensor]:
    """Return the range of ``x`` without ``percentile`` percent on each side, () or (C,) float32."""
    if is_gpu(x):
        from qatkit.kernels import gpu

        return gpu.shrink(x, percentile, axis)
    if axis is None and x.numel() and x.dtype is torch.float32 and is_eager_cpu(x):
        ends = cpu.shrink_row(dense_order(x), percentile)
        if ends is not None:
            low, high = (torch.tensor(e, dtype=torch.float32, device="cpu") for e in ends)
            return low, high
    x_CM = rows(x, axis).to(torch.float32)
    if not x_CM.numel():
        low, high = x_CM.new_zeros(x_CM.shape[0]), x_CM.new_zeros(x_CM.shape[0])
    elif is_eager_cpu(x_CM):
        low, high = cpu.shrink(x_CM, percentile)
    else:
        low, high = portable.shrink(x_CM, percentile)
    return (low, high) if axis is not None else (low[0], high[0])
