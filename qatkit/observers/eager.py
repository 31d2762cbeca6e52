"""One forward of an observer on tensors with numbers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qatkit import kernels
from qatkit.kernels import cpu
from qatkit.kernels.cpu.state import State
from qatkit.observers.estimators import percentile_of
from qatkit.observers.memory import update
from qatkit.observers.observer import Range
from qatkit.observers.registry import OBSERVERS
from qatkit.spec import QuantSpec


def observe(x: Tensor, state: State, spec: QuantSpec) -> Range:
    """Return the range of ``x``, which joins the remembered one; see `qatkit.observers.observe`."""
    if x.numel() and kernels.is_gpu(x) and percentile_of(spec) is not None:
        return _observe_on_device(x, state, spec)
    if x.numel() and x.dtype is torch.float32 and kernels.is_eager_cpu(x):
        known = _observe_in_loops(x, state, spec)
        if known is not None:
            return known
    low, high = OBSERVERS[spec.observer].estimate(x, spec)
    if not saw_nothing(x, high):
        remember(low, high, state, spec)
    return low, high


def remember(low: Tensor, high: Tensor, state: State, spec: QuantSpec) -> None:
    """Let a range join the remembered one in place; one of the latest tensor takes its place."""
    if spec.memory != "latest":
        update(OBSERVERS[spec.observer].remember, state, (low, high), spec)
        return
    state[0].copy_(low.expand_as(state[0]))
    state[1].copy_(high.expand_as(state[1]))
    state[2].add_(1)


def _observe_on_device(x: Tensor, state: State, spec: QuantSpec) -> Range:
    """Do the same in three kernels."""
    from qatkit.kernels import gpu

    percentile = percentile_of(spec) or 0.0
    return gpu.observe(x, state, percentile, spec.axis, gpu.Join(*join_of(spec)))


def _observe_in_loops(x: Tensor, state: State, spec: QuantSpec) -> Range | None:
    """Do the same in one call, ``None`` where the data or the observer take more care."""
    how = observing_of(spec)
    if how is not None:
        ends = cpu.observe(x, state, how)
        if ends is None:
            return None
        low, high = (torch.tensor(end, dtype=torch.float32, device="cpu") for end in ends)
        return low, high
    extremes = spec.memory == "latest" and percentile_of(spec) == 0.0
    if spec.axis == 0 and extremes and cpu.observe_rows(x, state):
        return state[0].clone(), state[1].clone()
    return None


@functools.lru_cache(maxsize=1024)
def observing_of(spec: QuantSpec) -> cpu.Observing | None:
    """Return an observer of whole tensors in numbers, ``None`` if extremes are not enough for it.

    >>> observing_of(QuantSpec()), observing_of(QuantSpec(observer="sigma"))
    (Observing(percentile=0.01, rule='blend', least=0.001, greatest=1.0), None)
    """
    percentile = percentile_of(spec)
    if spec.axis is not None or spec.memory != "running" or percentile is None:
        return None
    return cpu.Observing(percentile, *join_of(spec))


def join_of(spec: QuantSpec) -> tuple[str, float, float]:
    """Return how ranges join the memory: ``blend`` and the ends of its weight, or another rule.

    >>> join_of(QuantSpec(observer="shrink", momentum=0.01))
    ('blend', 0.01, 1.0)
    """
    if spec.memory == "latest":
        return "latest", 0.0, 1.0
    if spec.observer == "minmax":
        return "extremes", 0.0, 1.0
    if spec.observer == "ema":
        momentum = 0.1 if spec.momentum is None else spec.momentum
        return "blend", momentum, momentum
    if spec.observer == "average":
        return "blend", 0.0, 1.0
    return "blend", 0.001 if spec.momentum is None else spec.momentum, 1.0


def saw_nothing(x: Tensor, high: Tensor) -> bool:
    """Tell whether ``x`` has no finite element; where that would cost a host sync, no element."""
    if x.numel() == 0:
        return True
    if not kernels.is_eager_cpu(x) or high.dim() or high != 0:
        return False
    return not bool(torch.isfinite(x).any())
