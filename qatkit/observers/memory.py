"""How a new range joins the remembered one.

| rule | weight of batch n (from 0) | for |
|---|---|---|
| cumulative | max(1 / (n + 1), momentum or 0.001) | shrink, sigma, channel-mean |
| moving | 1 for the first, then momentum or 0.1 | ema |
| average | 1 / (n + 1) | average |
| extremes | the smallest and the largest so far | minmax |
| fixed | the fixed range, whatever came | fixed |

In all but the last a range ``(0, 0)`` means that nothing was seen: a new one changes nothing, an
old one is replaced. ``count`` is a 0-d tensor, the number of batches before this one.

Source: TI edgeai-modeloptimization, PAct2. Its weights are 1, 1, 1/2, 1/3 ..., so that the second
batch overwrites the first; here the first batch counts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qatkit.observers.observer import Range, Remember
from qatkit.spec import QuantSpec


def is_empty(min_val: Tensor, max_val: Tensor) -> Tensor:
    """Tell where a range is ``(0, 0)``, that is, where nothing was seen.

    >>> is_empty(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0]))
    tensor([ True, False])
    """
    return (min_val == 0) & (max_val == 0)


def cumulative_weight(count: Tensor, spec: QuantSpec) -> Tensor:
    """Return max(1 / (count + 1), momentum): an average that ends as a moving one.

    >>> cumulative_weight(torch.tensor(3), QuantSpec()).item()
    0.25
    """
    floor = 0.001 if spec.momentum is None else spec.momentum
    return average_weight(count, spec).clamp(min=floor)


def moving_weight(count: Tensor, spec: QuantSpec) -> Tensor:
    """Return the momentum."""
    momentum = 0.1 if spec.momentum is None else spec.momentum
    return torch.full_like(count, momentum, dtype=torch.float32)


def average_weight(count: Tensor, spec: QuantSpec) -> Tensor:
    """Return 1 / (count + 1)."""
    return (count.to(torch.float32) + 1.0).reciprocal()


def blending(weight: Callable[[Tensor, QuantSpec], Tensor]) -> Remember:
    """Return the memory ``old * (1 - w) + new * w`` with ``w = weight(count, spec)``.

    >>> old, new = torch.tensor(2.0), torch.tensor(5.0)
    >>> blending(cumulative_weight)(old, old, torch.tensor(2), new, new, QuantSpec())
    (tensor(3.), tensor(3.))
    """

    def remember(
        old_min: Tensor,
        old_max: Tensor,
        count: Tensor,
        new_min: Tensor,
        new_max: Tensor,
        spec: QuantSpec,
    ) -> Range:
        new_share = weight(count, spec)
        old_share = 1.0 - new_share
        # Not old + (new - old) * w: the difference of two finite numbers can be infinite.
        low = old_min * old_share + new_min * new_share
        high = old_max * old_share + new_max * new_share
        return _unless_empty((old_min, old_max), count, (new_min, new_max), (low, high))

    return remember


def remember_extremes(
    old_min: Tensor,
    old_max: Tensor,
    count: Tensor,
    new_min: Tensor,
    new_max: Tensor,
    spec: QuantSpec,
) -> Range:
    """Return the smallest and the largest end so far."""
    wider = torch.minimum(old_min, new_min), torch.maximum(old_max, new_max)
    return _unless_empty((old_min, old_max), count, (new_min, new_max), wider)


def remember_fixed(
    old_min: Tensor,
    old_max: Tensor,
    count: Tensor,
    new_min: Tensor,
    new_max: Tensor,
    spec: QuantSpec,
) -> Range:
    """Return ``spec.fixed_range``."""
    low, high = spec.fixed_range or (0.0, 0.0)
    return torch.full_like(old_min, low), torch.full_like(old_max, high)


def _unless_empty(old: Range, count: Tensor, new: Range, joined: Range) -> Range:
    first, skip = (count == 0) | is_empty(*old), is_empty(*new)
    low, high = (
        torch.where(skip, before, torch.where(first, now, both))
        for before, now, both in zip(old, new, joined, strict=True)
    )
    return low, high
