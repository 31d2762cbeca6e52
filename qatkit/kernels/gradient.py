"""How a gradient goes through the rounding of a fake quantization.

With ``v = x / scale``, the rounding error ``e = v - round(v)`` in steps, and a gradient ``g`` of
the result, the gradient of an ``x`` inside the grid is ``g`` times

| name | factor | source |
|---|---|---|
| ste | 1 | Bengio et al. 2013 (arXiv:1308.3432) |
| ewgs | 1 + delta * sign(g) * e | Lee et al. 2021 (arXiv:2104.00903) |
| dsq | k / (2 tanh(k/2)) * (1 - tanh(k * (1/2 - abs(e)))^2) | Gong et al. 2019 |

and 0 outside. In the last one, of arXiv:1908.05033, k = ln(2/alpha - 1); its mean over a step is 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Gradient(NamedTuple):
    """The choices of the backward pass.

    Attributes:
        estimator: ``ste``, ``ewgs`` or ``dsq``.
        strength: delta of ewgs, alpha of dsq.
        inside: whether elements inside the grid move the scale by their rounding error (LSQ), or
            only those that are clipped do (PACT).
        by_code: an element is inside if its rounded code is in the grid (as in PyTorch, and TQT);
            else only if it is so before rounding, between the lowest and the highest value (LSQ).
        normalized: multiply the gradients of scale and offset by ``1 / sqrt(N * quant_max)`` with N
            elements for each scale (LSQ).
    """

    estimator: str = "ste"
    strength: float = 0.0
    inside: bool = True
    by_code: bool = True
    normalized: bool = False


STE = Gradient()


def through_rounding(grad: Tensor, error: Tensor, rule: Gradient, unit: float = 1.0) -> Tensor:
    """Return the gradient in front of the rounding; ``grad`` may be overwritten with it.

    Args:
        grad: behind it, zero where ``x`` was clipped.
        error: ``e * unit`` of the same shape; anything finite where ``x`` was clipped.
        rule: which estimator.
        unit: in what the error is given, not zero.

    >>> import torch
    >>> through_rounding(torch.tensor([2.0, -2.0]), torch.tensor([0.5, 0.5]), Gradient("ewgs", 0.1))
    tensor([ 2.1000, -1.9000])
    """
    if rule.estimator == "ewgs":
        return grad.addcmul_(grad.abs(), error, value=rule.strength / unit)
    if rule.estimator == "dsq":
        k = math.log(2.0 / rule.strength - 1.0)
        top = k / (2.0 * math.tanh(k / 2.0))
        slope = error.abs().mul_(-k / abs(unit)).add_(k / 2.0).tanh_().square_()
        return slope.mul_(-top).add_(top).mul_(grad)
    return grad


def normalization(rule: Gradient, elements: int, scales: int, quant_max: int) -> float:
    """Return what the gradient of a scale is multiplied with.

    Source: Esser et al. 2020 (arXiv:1902.08153), section 2.2.

    >>> normalization(Gradient(normalized=True), 100, 1, 4)
    0.05
    """
    if not rule.normalized or not elements:
        return 1.0
    return float((elements / scales * quant_max) ** -0.5)
