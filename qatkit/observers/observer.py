"""An observer: how a tensor becomes a range, and how the ranges of many batches become one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qatkit.spec import QuantSpec

Range = tuple[Tensor, Tensor]
Estimate = Callable[[Tensor, QuantSpec], Range]
Array = Any
"""A tensor, or on the CPU a NumPy array."""
Remember = Callable[[Array, Array, Array, Array, Array, QuantSpec], tuple[Array, Array]]


@dataclass(frozen=True)
class Observer:
    """Two pure functions; the state lives in the buffers of the quantizer.

    The range ``(0, 0)`` stands for "nothing was seen": `estimate` gives it for a tensor without a
    finite element (and for one of zeros, which needs no range), and `remember` then keeps the old
    range, or takes the new one where it is the old range that is ``(0, 0)``.

    Attributes:
        name: its name in a `qatkit.spec.QuantSpec`.
        estimate: ``(x, spec) -> (min, max)``, float32 of shape () or (C,), finite, min <= max.
        remember: ``(old_min, old_max, count, new_min, new_max, spec) -> (min, max)``; ``count`` is
            0-d float32, the number of batches before this one.
    """

    name: str
    estimate: Estimate
    remember: Remember
