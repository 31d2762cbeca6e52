"""The range of one tensor, of its finite elements; (0, 0) where there are none."""

from __future__ import annotations

import torch
from torch import Tensor

from qatkit.functional.shrink import shrink_range
from qatkit.kernels.layout import rows
from qatkit.observers.observer import Range
from qatkit.spec import QuantSpec


def percentile_of(spec: QuantSpec) -> float | None:
    """Return the percentile that the observer cuts, ``None`` where the extremes are not enough.

    >>> percentile_of(QuantSpec()), percentile_of(QuantSpec(observer="ema"))
    (0.01, 0.0)
    """
    if spec.observer == "shrink":
        return spec.percentile
    return 0.0 if spec.observer in ("minmax", "ema", "average") else None


def estimate_shrink(x: Tensor, spec: QuantSpec) -> Range:
    """Return the range without the outermost ``spec.percentile`` percent on each side."""
    return shrink_range(x, spec.percentile, axis=spec.axis)


def estimate_minmax(x: Tensor, spec: QuantSpec) -> Range:
    """Return the smallest and the largest element."""
    return shrink_range(x, 0.0, axis=spec.axis)


def estimate_sigma(x: Tensor, spec: QuantSpec) -> Range:
    """Return mean - sigma * std .. mean + sigma * std, never wider than the data.

    The moments are those of the sample (n - 1), in float64.

    Source: TI edgeai-modeloptimization, ``range_utils.py``.
    """
    x_CM = rows(x.detach(), spec.axis).to(torch.float32)
    low, high = estimate_minmax(x, spec)
    finite = torch.isfinite(x_CM)
    count = finite.sum(1)
    wide = torch.where(finite, x_CM, 0.0).double()
    mean = wide.sum(1) / count.clamp(min=1)
    squares = torch.where(finite, wide - mean[:, None], 0.0).square().sum(1)
    reach = (squares / (count - 1).clamp(min=1)).sqrt() * spec.sigma
    ends = [end.to(torch.float32).reshape(low.shape) for end in (mean - reach, mean + reach)]
    return torch.clamp(ends[0], low, high), torch.clamp(ends[1], low, high)


def estimate_channel_mean(x: Tensor, spec: QuantSpec) -> Range:
    """Return the mean over the channels (axis 1) of their smallest and of their largest elements.

    Channels without a finite element do not count; with ``spec.axis`` each index is its own
    channel.

    Source: TI edgeai-modeloptimization, ``range_utils.py``.
    """
    if spec.axis is not None or x.dim() < 2:
        return estimate_minmax(x, spec)
    low, high = shrink_range(x, 0.0, axis=1)
    some = torch.isfinite(x.detach()).movedim(1, 0).flatten(1).any(1)
    count = some.sum().clamp(min=1)
    return (low.double().sum() / count).to(low.dtype), (high.double().sum() / count).to(low.dtype)


def estimate_lsq(x: Tensor, spec: QuantSpec) -> Range:
    """Return the range whose step is ``2 * mean(abs(x)) / sqrt(quant_max)``, inside the data.

    Source: Esser et al. 2020 (arXiv:1902.08153), section 2.1.
    """
    x_CM = rows(x.detach(), spec.axis).to(torch.float32)
    low, high = estimate_minmax(x, spec)
    finite = torch.isfinite(x_CM)
    mean = torch.where(finite, x_CM.abs(), 0.0).double().sum(1) / finite.sum(1).clamp(min=1)
    amax = (mean * (2.0 * spec.quant_max**0.5)).to(torch.float32).reshape(low.shape)
    return torch.clamp(-amax, low, high), torch.clamp(amax, low, high)


def estimate_fixed(x: Tensor, spec: QuantSpec) -> Range:
    """Return ``spec.fixed_range``, whatever the tensor is."""
    low, high = spec.fixed_range or (0.0, 0.0)
    shape = () if spec.axis is None else (x.shape[spec.axis],)
    ends = x.new_empty(shape, dtype=torch.float32)
    return torch.full_like(ends, low), torch.full_like(ends, high)
