"""``qatkit::qparams`` for graphs that ``torch.compile`` records; importing this registers it.

Behind Dynamo it is tensor operations again.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qatkit.functional.scales import scale_and_zero_point
from qatkit.kernels.library import register_decomposed
from qatkit.spec import QuantSpec

SCHEMA = (
    "qparams(Tensor min_val, Tensor max_val, int num_bits, bool signed, bool symmetric,"
    " bool narrow_range, bool power_of_two) -> (Tensor, Tensor)"
)


def qparams(min_val: Tensor, max_val: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Record `qatkit.functional.qparams`."""
    grid = spec.num_bits, spec.signed, spec.symmetric, spec.narrow_range, spec.power_of_two
    scale, zero_point = torch.ops.qatkit.qparams(min_val, max_val, *grid)
    return scale, zero_point


def _qparams(min_val: Tensor, max_val: Tensor, *grid: int) -> tuple[Tensor, Tensor]:
    return scale_and_zero_point(min_val, max_val, _spec(*grid))


@functools.lru_cache(maxsize=64)
def _spec(
    num_bits: int, signed: bool, symmetric: bool, narrow_range: bool, power_of_two: bool
) -> QuantSpec:
    return QuantSpec(
        num_bits=num_bits,
        signed=signed,
        symmetric=symmetric,
        narrow_range=narrow_range,
        power_of_two=power_of_two,
    )


register_decomposed(SCHEMA, _qparams)
