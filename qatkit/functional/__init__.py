"""Pure functions: fake quantization, scale and zero point, range shrink, batch norm folding."""

from __future__ import annotations

from qatkit.functional.batch_norm import fold_factor, fold_scale, folded_weight_and_bias
from qatkit.functional.fake_quantize import (
    fake_quantize,
    fake_quantize_learned,
    fake_quantize_unclipped,
)
from qatkit.functional.qparams import power_of_two_ceil, qparams
from qatkit.functional.shrink import count_nonfinite, shrink_range

__all__ = [
    "count_nonfinite",
    "fake_quantize",
    "fake_quantize_learned",
    "fake_quantize_unclipped",
    "fold_factor",
    "fold_scale",
    "folded_weight_and_bias",
    "power_of_two_ceil",
    "qparams",
    "shrink_range",
]
