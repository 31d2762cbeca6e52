"""The quantizers of most tensors, eager on the CPU, in a call or two.

A step runs some hundred quantizers, and each has a handful of numbers to compute: on small tensors
the calls cost more than the passes over the data. What the observers and `qparams` do is part of
loops in `qatkit.kernels.cpu`, for one symmetric range of a tensor and for the ranges of the rows of
a weight. They return ``None`` where the data are unusual; the general way decides then.
"""

from __future__ import annotations

import functools

from torch import Tensor

from qatkit.kernels import cpu
from qatkit.kernels.cpu.state import State
from qatkit.observers import observing_of
from qatkit.spec import QuantSpec


@functools.lru_cache(maxsize=1024)
def knows_activation(spec: QuantSpec) -> cpu.ActivationNumbers | None:
    """Return the numbers of a quantizer for the loops, ``None`` if it is no such one.

    >>> knows_activation(QuantSpec(observer="sigma")) is None
    True
    """
    observing = observing_of(spec)
    if observing is None or not _plain(spec):
        return None
    return cpu.ActivationNumbers(observing, spec.signed, spec.quant_min, spec.quant_max)


@functools.lru_cache(maxsize=1024)
def knows_weight(spec: QuantSpec) -> bool:
    """Tell whether `quantize_weight` is for weights with this spec.

    >>> knows_weight(QuantSpec(axis=0, observer="minmax", memory="latest"))
    True
    """
    kind = spec.axis == 0 and spec.observer == "minmax" and spec.memory == "latest"
    return kind and spec.signed and _plain(spec)


def _plain(spec: QuantSpec) -> bool:
    return spec.symmetric and not spec.power_of_two and spec.gradient == "ste"


def quantize_weight(
    x: Tensor, state: State, spec: QuantSpec, *, own: bool, remember: bool
) -> Tensor | None:
    """Fake-quantize a weight (C, ...), each row with a range of its own.

    Args:
        x: float32, not empty.
        state: buffers ``(min, max, count)``: (C,) float32 twice, () int64.
        spec: one that `knows_weight`.
        own: whether the range is that of the row at hand, else the remembered one.
        remember: whether to remember it.
    """
    if own:
        return cpu.fake_quantize_rows(x, spec.quant_max, state if remember else None)
    return cpu.fake_quantize_rows_in_ranges(x, state, spec.quant_min, spec.quant_max)
