"""Triton kernels for CUDA tensors, imported with the first of them.

| kernel | bytes moved for each element of s bytes |
|---|---|
| fake quantize, forward | 2 s: one read, one write |
| fake quantize, backward | 3 s: gradient and input read, gradient written; no mask is kept |
| extremes of a range | s |
| histogram of a percentile range | s more |
| weight quantized with its own range, rows of up to 16384 | 2 s |

A forward with a percentile range on each batch thus moves 4 s: extremes, histogram, and read and
write of the fake quantize. That is the floor for a tensor that does not fit on the chip: the bins
lie between the extremes of all elements, and the grid depends on all bins.

Everything runs on the current stream with shapes that depend on shapes alone: nothing is read back
to the host and a step can be captured into a CUDA graph. Offsets are 64 bit.

The arithmetic is that of `qatkit.kernels.portable`, operation for operation. To keep it so the
kernels are compiled without fused multiply-add, divide with correct rounding, and round to nearest
even by adding and subtracting 2^23.
"""

from __future__ import annotations

from qatkit.kernels.gpu.grid import fake_quantize, fake_quantize_unclipped
from qatkit.kernels.gpu.ranges import Join, observe, shrink
from qatkit.kernels.gpu.weights import fits, quantize_rows

__all__ = [
    "Join",
    "fake_quantize",
    "fake_quantize_unclipped",
    "fits",
    "observe",
    "quantize_rows",
    "shrink",
]
