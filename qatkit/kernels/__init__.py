"""The fast paths behind `qatkit.functional`, chosen here and nowhere else.

Every path gives the same values and gradients. `qatkit.kernels.portable` is the reference: tensor
operations only, no host sync, whole under ``torch.compile``. `qatkit.kernels.cpu` is eager on the
CPU, where reading a scalar is free.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qatkit.kernels import cpu, learned, portable
from qatkit.kernels.gradient import STE, Gradient

__all__ = [
    "STE",
    "Gradient",
    "fake_quantize",
    "fake_quantize_learned",
    "fake_quantize_unclipped",
    "is_eager_cpu",
    "shrink",
]


def is_eager_cpu(x: Tensor) -> bool:
    """Tell whether ``x`` is on the CPU and nothing is being compiled: reading a scalar is free."""
    plain = type(x) is Tensor or type(x) is torch.nn.Parameter
    return plain and x.device.type == "cpu" and not torch.compiler.is_compiling()


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
    return portable.fake_quantize(x, scale, zero_point, quant_min, quant_max, axis)


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


def fake_quantize_unclipped(x: Tensor, scale: Tensor | float, axis: int | None) -> Tensor:
    """Fake-quantize ``x``, all of it inside the grid, arguments already checked."""
    if is_eager_cpu(x):
        return cpu.fake_quantize_unclipped(x, scale, axis)
    return portable.fake_quantize_unclipped(x, scale, axis)


def shrink(x_CM: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """Return the range of each row without ``percentile`` percent on each side, (C,) float32."""
    if is_eager_cpu(x_CM):
        return cpu.shrink(x_CM, percentile)
    return portable.shrink(x_CM, percentile)
