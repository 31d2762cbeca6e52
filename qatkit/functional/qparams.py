"""From a range to scale and zero point.

| range | scale | zero point |
|---|---|---|
| symmetric | amax / quant_max | 0 |
| power of two | 2^ceil(log2 amax) / 2^(bits - 1), / 2^bits unsigned | 0 |
| asymmetric, 0 inside | (max - min) / (quant_max - quant_min) | round(quant_min - min / scale) |
| dead: zero, scale not a normal number, not finite | 1 | 0 |
"""

from __future__ import annotations

import torch
from torch import Tensor

from qatkit.functional.scales import power_of_two_ceil, scale_and_zero_point
from qatkit.spec import QuantSpec

__all__ = ["power_of_two_ceil", "qparams"]


def qparams(min_val: Tensor, max_val: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point with which the grid of ``spec`` covers ``min_val..max_val``.

    Args:
        min_val: () or (C,) float32.
        max_val: the same shape; a range that leaves out 0 is extended to it.
        spec: the grid.

    Returns:
        ``(scale, zero_point)`` of the shape of ``min_val``, float32 and int32; the scale is a
        positive normal number and so is its reciprocal.

    Source: Jacob et al. 2018 (arXiv:1712.05877), section 3 (nudging); TI edgeai-modeloptimization,
        PAct2 (power of two).

    >>> scale, zero_point = qparams(torch.tensor(-1.0), torch.tensor(2.54), QuantSpec())
    >>> round(scale.item(), 6), zero_point.item()
    (0.02, 0)
    """
    if torch.compiler.is_dynamo_compiling():
        from qatkit.functional import operators

        return operators.qparams(min_val, max_val, spec)
    return scale_and_zero_point(min_val, max_val, spec)
