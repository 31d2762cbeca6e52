"""What all kernels compute with, the same bits compiled and in Triton's interpreter."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

EXACT = {"enable_fp_fusion": False}
"""Launch options: a fused multiply-add rounds once where the CPU rounds twice."""


def device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which kernels are launched on the device of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@triton.jit
def nearest_even(v):
    """Round float32 to the nearest integer, ties to even; from 2^23 on all are integers."""
    size = tl.abs(v)
    whole = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    return tl.where(v < 0, -whole, whole)


@triton.jit
def is_finite(x):
    """Tell where float32 is neither infinite nor NaN."""
    return tl.abs(x) < float("inf")


@triton.jit
def store(pointer, y, mask):
    """Store float32 in the dtype of ``pointer``, to the nearest, ties to even."""
    if pointer.dtype.element_ty == tl.bfloat16:
        bits = y.to(tl.int32, bitcast=True)
        rounded = (bits + 32767 + ((bits >> 16) & 1)) & -65536
        rounded = tl.where(y == y, rounded, bits | 4194304)
        y = rounded.to(tl.float32, bitcast=True)
    tl.store(pointer, y.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def usable(scale):
    """Return a scale, or 1 where it or its reciprocal is no normal number."""
    alive = (scale >= 1.1754943508222875e-38) & (scale <= 8.507059173023462e37)
    return tl.where(alive, scale, 1.0)
