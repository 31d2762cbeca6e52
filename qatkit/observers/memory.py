"""How a new range joins the remembered one.

| rule | weight of batch n (from 0) | for |
|---|---|---|
| cumulative | max(1 / (n + 1), momentum or 0.001) | shrink, sigma, channel-mean |
| moving | 1 for the first, then momentum or 0.1 | ema |
| average | 1 / (n + 1) | average |
| extremes | the smallest and the largest so far | minmax |
| fixed | the fixed range, whatever came | fixed |

In all but the last a range ``(0, 0)`` means that nothing was seen: a new one changes nothing, an
old one is replaced. ``count`` is 0-d float32, the number of batches before this one.
The rules work on tensors and on NumPy arrays alike.

Source: TI edgeai-modeloptimization, PAct2. Its weights are 1, 1, 1/2, 1/3 ..., so that the second
batch overwrites the first; here the first batch counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qatkit import kernels
from qatkit.observers.observer import Array, Range, Remember
from qatkit.spec import QuantSpec


def update(
    rule: Remember, state: tuple[Tensor, Tensor, Tensor], new: Range, spec: QuantSpec
) -> None:
    """Let a new range join the remembered one, in place; the count goes up by one.

    Eager on the CPU the few numbers are worked on in NumPy, whose calls cost a third.

    Args:
        rule: one of the rules of this file.
        state: buffers ``(min, max, count)``: () or (C,) float32 twice, () int64.
        new: the range of one batch.
        spec: the spec of the quantizer.
    """
    old_min, old_max, count = state
    if kernels.is_eager_cpu(old_min):
        if old_min.dim() == 0:
            _update_numbers(rule, state, (new[0].item(), new[1].item()), spec)
            return
        views = [tensor.detach().numpy() for tensor in (*state, *new)]
        low, high = rule(views[0], views[1], np.float32(views[2]), views[3], views[4], spec)
        views[0][...], views[1][...] = low, high
        views[2][...] += 1
        return
    low, high = rule(old_min, old_max, count.to(torch.float32), *new, spec)
    old_min.copy_(low)
    old_max.copy_(high)
    count.add_(1)


def _update_numbers(
    rule: Remember, state: tuple[Tensor, Tensor, Tensor], new: tuple[float, float], spec: QuantSpec
) -> None:
    """Do the same for one range on the CPU.

    Args:
        rule: one of the rules of this file.
        state: buffers ``(min, max, count)``: () float32 twice, () int64.
        new: the range of one batch, two numbers of float32.
        spec: the spec of the quantizer.
    """
    old_min, old_max, count = (np.float32(each.item()) for each in state)
    ends = rule(old_min, old_max, count, np.float32(new[0]), np.float32(new[1]), spec)
    state[0].fill_(float(ends[0]))
    state[1].fill_(float(ends[1]))
    state[2].add_(1)


def is_empty(min_val: Array, max_val: Array) -> Array:
    """Tell where a range is ``(0, 0)``, that is, where nothing was seen.

    >>> is_empty(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0]))
    tensor([ True, False])
    """
    return (min_val == 0) & (max_val == 0)


def cumulative_weight(count: Array, spec: QuantSpec) -> Array:
    """Return max(1 / (count + 1), momentum): an average that ends as a moving one.

    >>> cumulative_weight(torch.tensor(3.0), QuantSpec()).item()
    0.25
    """
    floor = 0.001 if spec.momentum is None else spec.momentum
    return average_weight(count, spec).clip(floor, 1.0)


def moving_weight(count: Array, spec: QuantSpec) -> Array:
    """Return the momentum."""
    momentum = 0.1 if spec.momentum is None else spec.momentum
    return count * 0.0 + momentum


def average_weight(count: Array, spec: QuantSpec) -> Array:
    """Return 1 / (count + 1)."""
    return 1.0 / (count + 1.0)


def blending(weight: Callable[[Array, QuantSpec], Array]) -> Remember:
    """Return the memory ``old * (1 - w) + new * w`` with ``w = weight(count, spec)``.

    >>> old, new = torch.tensor(2.0), torch.tensor(5.0)
    >>> blending(cumulative_weight)(old, old, torch.tensor(2.0), new, new, QuantSpec())
    (tensor(3.), tensor(3.))
    """

    def remember(
        old_min: Array,
        old_max: Array,
        count: Array,
        new_min: Array,
        new_max: Array,
        spec: QuantSpec,
    ) -> tuple[Array, Array]:
        new_share = weight(count, spec)
        old_share = 1.0 - new_share
        # Not old + (new - old) * w: the difference of two finite numbers can be infinite.
        low = old_min * old_share + new_min * new_share
        high = old_max * old_share + new_max * new_share
        return _unless_empty((old_min, old_max), count, (new_min, new_max), (low, high))

    return remember


def remember_extremes(
    old_min: Array,
    old_max: Array,
    count: Array,
    new_min: Array,
    new_max: Array,
    spec: QuantSpec,
) -> tuple[Array, Array]:
    """Return the smallest and the largest end so far."""
    library = _library(old_min)
    wider = library.minimum(old_min, new_min), library.maximum(old_max, new_max)
    return _unless_empty((old_min, old_max), count, (new_min, new_max), wider)


def remember_fixed(
    old_min: Array,
    old_max: Array,
    count: Array,
    new_min: Array,
    new_max: Array,
    spec: QuantSpec,
) -> tuple[Array, Array]:
    """Return ``spec.fixed_range``."""
    low, high = spec.fixed_range or (0.0, 0.0)
    return old_min * 0.0 + low, old_max * 0.0 + high


_Pair = tuple[Array, Array]


def _unless_empty(old: _Pair, count: Array, new: _Pair, joined: _Pair) -> _Pair:
    first, skip = (count == 0) | is_empty(*old), is_empty(*new)
    if isinstance(old[0], np.float32):  # one number, which NumPy's functions are slow on
        return old if skip else new if first else joined
    where = _library(old[0]).where
    low, high = (
        where(skip, before, where(first, now, both))
        for before, now, both in zip(old, new, joined, strict=True)
    )
    return low, high


def _library(array: Array) -> Any:
    """Return the library that ``array`` belongs to."""
    return torch if isinstance(array, Tensor) else np
