"""Where a learned range starts, of a weight or of the first batch of an activation."""

from __future__ import annotations

import torch
from torch import Tensor

from qatkit.kernels.layout import rows
from qatkit.observers.observer import Range
from qatkit.observers.registry import OBSERVERS
from qatkit.spec import QuantSpec

_CANDIDATES = 8
_REFINEMENTS = 4


def start(x: Tensor, spec: QuantSpec) -> Range:
    """Return where a learned range starts that nobody calibrated: of a weight, or of a first batch.

    A weight is all there is to see of it, so that its own error decides.
    """
    if spec.memory == "latest" and spec.symmetric:
        return least_squares(x, spec)
    return OBSERVERS[spec.observer].estimate(x.detach(), spec)


def least_squares(x: Tensor, spec: QuantSpec) -> Range:
    """Return the symmetric range with about the least squared error of the quantized tensor.

    Of some thresholds below the largest magnitude the best is taken, and refined as in Lloyd's
    algorithm: with the codes ``c`` held, the best scale is ``<x, c> / <c, c>``.

    Args:
        x: finite elements count.
        spec: a symmetric grid.

    Returns:
        ``(-amax, amax)``, or ``(0, amax)`` of an unsigned grid, () or (C,) float32.

    >>> low, high = least_squares(torch.linspace(-1, 1, 999), QuantSpec(2, narrow_range=True))
    >>> round(high.item(), 2)
    0.67
    """
    x_CM = torch.nan_to_num(rows(x.detach(), spec.axis).to(torch.float32), 0.0, 0.0, 0.0)
    top = float(spec.quant_max)
    if not x_CM.shape[1]:
        x_CM = x_CM.new_zeros(len(x_CM), 1)
    amax = (x_CM.abs() if spec.signed else x_CM).amax(1).clamp(min=0.0)
    usable = torch.where(amax > 0, amax, 1.0)
    best, least = usable / top, torch.full_like(usable, torch.inf)
    lowest = 0.2 if spec.num_bits < 6 else 0.6
    for index in range(_CANDIDATES):
        scale = usable * ((lowest + (1.0 - lowest) * (index + 1) / _CANDIDATES) / top)
        best, least = _better(x_CM, _codes(x_CM, scale, spec), scale, best, least)
    for _ in range(_REFINEMENTS):
        codes = _codes(x_CM, best, spec)
        scale = (x_CM * codes).sum(1) / codes.square().sum(1).clamp(min=1.0)
        scale = torch.where(scale > 0, scale, best)
        best, least = _better(x_CM, _codes(x_CM, scale, spec), scale, best, least)
    high = torch.where(amax > 0, best * top, 0.0).reshape(() if spec.axis is None else (-1,))
    return (-high if spec.signed else torch.zeros_like(high)), high


def _codes(x_CM: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    return (x_CM * scale.reciprocal()[:, None]).round_().clamp_(spec.quant_min, spec.quant_max)


def _better(
    x_CM: Tensor, codes: Tensor, scale: Tensor, best: Tensor, least: Tensor
) -> tuple[Tensor, Tensor]:
    error = codes.mul_(scale[:, None]).sub_(x_CM).square_().sum(1)
    smaller = error < least
    return torch.where(smaller, scale, best), torch.where(smaller, error, least)
