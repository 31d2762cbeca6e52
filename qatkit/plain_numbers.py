"""The quantizers of most tensors, eager on the CPU, in plain numbers.

A step runs some hundred quantizers, and each has a handful of numbers to compute: on small tensors
the calls cost more than the passes over the data. These functions do what the observers and
`qparams` do, for one symmetric range for a tensor and for the ranges of the rows of a weight, in
few calls. They return ``None`` where the data are unusual; the general way decides then.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qatkit.functional.scales import symmetric_scale
from qatkit.kernels import cpu
from qatkit.kernels.layout import dense_order, rows
from qatkit.kernels.portable import LARGEST_SCALE, SMALLEST_SCALE
from qatkit.observers import OBSERVERS, percentile_of, update_numbers
from qatkit.observers.eager import State
from qatkit.spec import QuantSpec


def knows_activation(spec: QuantSpec) -> bool:
    """Tell whether `observed_range` and `scale_of` are for tensors with this spec.

    >>> knows_activation(QuantSpec()), knows_activation(QuantSpec(observer="sigma"))
    (True, False)
    """
    kind = spec.axis is None and spec.memory == "running" and percentile_of(spec) is not None
    return kind and _plain(spec)


def knows_weight(spec: QuantSpec) -> bool:
    """Tell whether `ranges_of_rows` and `scales_of` are for weights with this spec.

    >>> knows_weight(QuantSpec(axis=0, observer="minmax", memory="latest"))
    True
    """
    kind = spec.axis == 0 and spec.observer == "minmax" and spec.memory == "latest"
    return kind and spec.signed and _plain(spec)


def _plain(spec: QuantSpec) -> bool:
    return spec.symmetric and not spec.power_of_two and spec.gradient == "ste"


def observed_range(x: Tensor, state: State, spec: QuantSpec) -> tuple[float, float] | None:
    """Estimate the range of ``x``, remember it, and return the remembered range.

    Args:
        x: any shape and memory format, float32, not empty, without gradient.
        state: buffers ``(min, max, count)``: () float32 twice, () int64.
        spec: one that `knows_activation`.
    """
    found = cpu.shrink_row(dense_order(x), percentile_of(spec) or 0.0)
    if found is None:
        return None
    return update_numbers(OBSERVERS[spec.observer].remember, state, found, spec)


def scale_of(low: float, high: float, spec: QuantSpec) -> float:
    """Return the scale for a symmetric range; see `qatkit.functional.qparams`.

    >>> scale_of(-1.0, 0.5, QuantSpec(num_bits=3))
    0.3333333432674408
    """
    amax = max(abs(low), abs(high)) if spec.signed else max(high, 0.0)
    scale = float(np.float32(amax) / np.float32(spec.quant_max))
    return scale if SMALLEST_SCALE <= scale <= LARGEST_SCALE else 1.0


def ranges_of_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest element of each row of a weight (C, ...), (C,) float32.

    >>> ranges_of_rows(torch.tensor([[1.0, -2.0], [0.0, 3.0]]))
    (tensor([-2.,  0.]), tensor([1., 3.]))
    """
    w_CM = rows(w, 0)
    return w_CM.amin(1), w_CM.amax(1)


def scales_of(low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor | None:
    """Return the scales for the ranges of rows, ``None`` if one is not finite.

    Args:
        low: (C,) float32, on the CPU.
        high: the same.
        spec: one that `knows_weight`.
    """
    ends = low.numpy(), high.numpy()
    if not all(np.isfinite(end).all() for end in ends):
        return None
    return torch.from_numpy(symmetric_scale(*ends, spec))
