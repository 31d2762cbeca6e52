"""The arithmetic of `qatkit.functional.qparams`."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from qatkit import kernels
from qatkit.kernels.portable import LARGEST_SCALE, SMALLEST_SCALE
from qatkit.spec import QuantSpec

_Array: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"


def scale_and_zero_point(
    min_val: Tensor, max_val: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point with which the grid of ``spec`` covers a range."""
    low, high = min_val.detach().to(torch.float32), max_val.detach().to(torch.float32)
    if not spec.symmetric:
        return _asymmetric(low, high, spec)
    if kernels.is_eager_cpu(low) and not spec.power_of_two:
        scale = torch.from_numpy(np.asarray(_symmetric_scale(low.numpy(), high.numpy(), spec)))
        return scale, torch.zeros(scale.shape, dtype=torch.int32)
    amax = torch.maximum(low.abs(), high.abs()) if spec.signed else high.clamp(min=0.0)
    steps = float(spec.quant_max)
    if spec.power_of_two:
        amax, steps = power_of_two_ceil(amax), 2.0 ** (spec.num_bits - int(spec.signed))
    scale = amax / steps
    zero_point = torch.zeros_like(low, dtype=torch.int32)
    return torch.where(_alive(scale), scale, 1.0), zero_point


def power_of_two_ceil(x: Tensor) -> Tensor:
    """Return the smallest power of two that is not below each element, exactly; 0 stays 0.

    >>> power_of_two_ceil(torch.tensor([0.3, 0.5, 5.9]))
    tensor([0.5000, 0.5000, 8.0000])
    """
    mantissa, exponent = torch.frexp(x)
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    return torch.where(x > 0, torch.ldexp(torch.ones_like(x), exponent), x)


def _symmetric_scale(low: _Array, high: _Array, spec: QuantSpec) -> _Array:
    """Return the symmetric scale; NumPy's calls cost a third of PyTorch's on a few numbers."""
    with np.errstate(all="ignore"):
        amax = (
            np.maximum(np.abs(low), np.abs(high))
            if spec.signed
            else np.maximum(high, np.float32(0))
        )
        scale = amax / np.float32(spec.quant_max)
        alive = (scale >= SMALLEST_SCALE) & (scale <= LARGEST_SCALE)
        usable: _Array = np.where(alive, scale, np.float32(1))
    return usable


def _asymmetric(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    steps = float(spec.quant_max - spec.quant_min)
    scale = high / steps - low / steps
    alive = _alive(scale)
    scale = torch.where(alive, scale, 1.0)
    zero_point = (spec.quant_min - low / scale).round().clamp(spec.quant_min, spec.quant_max)
    return scale, torch.where(alive, zero_point, 0.0).to(torch.int32)


def _alive(scale: Tensor) -> Tensor:
    # Also false for NaN.
    return (scale >= SMALLEST_SCALE) & (scale <= LARGEST_SCALE)
