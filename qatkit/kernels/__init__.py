"""The fast paths behind `qatkit.functional`, chosen here and nowhere else.

Every path gives the same values and gradients. `qatkit.kernels.portable` is the reference: tensor
operations only, no host sync. `qatkit.kernels.cpu` is eager on the CPU, where reading a scalar is
free. `qatkit.kernels.gpu` holds Triton kernels, imported with the first CUDA tensor. Where
``torch.compile`` records a graph, it records the operators of `qatkit.kernels.operators`: one for
each call instead of a hundred.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qatkit.kernels import dispatch
from qatkit.kernels.dispatch import fake_quantize_learned, is_eager_cpu, is_gpu
from qatkit.kernels.gradient import STE, Gradient

__all__ = [
    "STE",
    "Gradient",
    "fake_quantize",
    "fake_quantize_learned",
    "fake_quantize_unclipped",
    "is_eager_cpu",
    "is_gpu",
    "shrink",
]


def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    axis: int | None,
) -> Tensor:
    """Fake-quantize ``x`` with the clipped straight-through gradient, arguments already checked."""
    if torch.compiler.is_dynamo_compiling():
        from qatkit.kernels import operators

        return operators.fake_quantize(x, scale, zero_point, quant_min, quant_max, axis)
    return dispatch.fake_quantize(x, scale, zero_point, quant_min, quant_max, axis)


def fake_quantize_unclipped(x: Tensor, scale: Tensor | float, axis: int | None) -> Tensor:
    """Fake-quantize ``x``, all of it inside the grid, arguments already checked."""
    if torch.compiler.is_dynamo_compiling():
        from qatkit.kernels import operators

        return operators.fake_quantize_unclipped(x, scale, axis)
    return dispatch.fake_quantize_unclipped(x, scale, axis)


def shrink(x: Tensor, percentile: float, axis: int | None) -> tuple[Tensor, Tensor]:
    """Return the range of ``x`` without ``percentile`` percent on each side, () or (C,) float32.

    Args:
        x: any shape and float dtype.
        percentile: percent of the elements that may be cut on each side, 0 <= p < 50.
        axis: one range for each index along this axis, ``None`` for one range.
    """
    if torch.compiler.is_dynamo_compiling():
        from qatkit.kernels import operators

        return operators.shrink(x, percentile, axis)
    return dispatch.shrink(x, percentile, axis)
