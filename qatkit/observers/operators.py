"""``qatkit::observe`` for graphs that ``torch.compile`` records; importing this registers it.

A hundred operations for each quantizer become one call, which does what an eager forward does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from qatkit.kernels.cpu.state import State
from qatkit.kernels.library import register_call
from qatkit.observers import eager
from qatkit.observers.observer import Range
from qatkit.spec import Memory, QuantSpec

SCHEMA = (
    "observe(Tensor x, Tensor(a!) min_val, Tensor(b!) max_val, Tensor(c!) count, str observer,"
    " float percentile, int? axis, float sigma, float? momentum, float[]? fixed_range,"
    " str memory) -> (Tensor, Tensor)"
)


def observe(x: Tensor, state: State, spec: QuantSpec) -> Range:
    """Record `qatkit.observers.observe`."""
    numbers = spec.percentile, spec.axis, spec.sigma, spec.momentum, spec.fixed_range
    low, high = torch.ops.qatkit.observe(x, *state, spec.observer, *numbers, spec.memory)
    return low, high


def _observe(
    x: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    count: Tensor,
    observer: str,
    percentile: float,
    axis: int | None,
    sigma: float,
    momentum: float | None,
    fixed_range: Sequence[float] | None,
    memory: Memory,
) -> Range:
    bounds = None if fixed_range is None else (fixed_range[0], fixed_range[1])
    spec = _spec(observer, percentile, axis, sigma, momentum, bounds, memory)
    return eager.observe(x, (min_val, max_val, count), spec)


@functools.lru_cache(maxsize=256)
def _spec(
    observer: str,
    percentile: float,
    axis: int | None,
    sigma: float,
    momentum: float | None,
    fixed_range: tuple[float, float] | None,
    memory: Memory,
) -> QuantSpec:
    return QuantSpec(
        observer=observer,
        percentile=percentile,
        axis=axis,
        sigma=sigma,
        momentum=momentum,
        fixed_range=fixed_range,
        memory=memory,
    )


def _shapes(x: Tensor, min_val: Tensor, max_val: Tensor, *others: object) -> Range:
    return torch.empty_like(min_val), torch.empty_like(max_val)


register_call(SCHEMA, _observe, _shapes)
