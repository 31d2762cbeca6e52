"""The arithmetic of folding a batch norm into the layer before it; neither layer is changed."""

from __future__ import annotations

import torch
from torch import Tensor


def fold_scale(gamma: Tensor | None, running_var: Tensor, eps: float) -> Tensor:
    """Return what a batch norm multiplies each channel with, to quantize the weight after the fold.

    ``s = gamma / sqrt(running_var + eps)``; the layer uses ``Q(w * s) / s``, so 1 stands where s is
    0 or not finite.

    Args:
        gamma: (C,) the weight of the batch norm, ``None`` for one without.
        running_var: (C,) variance.
        eps: added to the variance.

    Returns:
        (C,) float32, detached, nowhere zero.

    Source: Jacob et al. 2018 (arXiv:1712.05877), section 3.2; Krishnamoorthi 2018
        (arXiv:1806.08342).

    >>> fold_scale(torch.tensor([2.0, 0.0]), torch.tensor([4.0, 4.0]), 0.0)
    tensor([1., 1.])
    """
    scale = torch.rsqrt(running_var.detach().to(torch.float32) + eps)
    if gamma is not None:
        scale = scale * gamma.detach().to(torch.float32)
    usable = torch.isfinite(scale) & torch.isfinite(scale.reciprocal())
    return torch.where(usable, scale, 1.0)


def fold_factor(gamma: Tensor | None, var: Tensor, eps: float) -> Tensor:
    """Return ``gamma / sqrt(var + eps)``, what a batch norm multiplies each channel with.

    Args:
        gamma: (C,) weight of the batch norm, ``None`` for one without.
        var: (C,) running variance.
        eps: added to the variance.

    Returns:
        (C,) float64, detached.

    >>> fold_factor(torch.tensor([2.0, 0.0]), torch.tensor([4.0, 4.0]), 0.0)
    tensor([1., 0.], dtype=torch.float64)
    """
    factor = (var.detach().double() + eps).rsqrt()
    return factor if gamma is None else factor * gamma.detach().double()


def folded_weight_and_bias(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    channel_axis: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return weight and bias of one layer that does the work of a layer and its batch norm.

    ``W' = W * gamma / sqrt(var + eps)`` and ``b' = beta + (b - mean) * gamma / sqrt(var + eps)``,
    computed in float64 and rounded once. Zero gammas give zero weights.

    Args:
        weight: the weight, C indices along ``channel_axis``.
        bias: (C,), ``None`` for zero.
        gamma: (C,) weight of the batch norm, ``None`` for one.
        beta: (C,) bias of the batch norm, ``None`` for zero.
        mean: (C,) running mean.
        var: (C,) running variance.
        eps: added to the variance.
        channel_axis: the output axis of the weight.

    Returns:
        ``(W', b')``, float32, detached.

    Source: Jacob et al. 2018 (arXiv:1712.05877), equation 14.

    >>> one = torch.ones(1)
    >>> folded_weight_and_bias(torch.ones(1, 1), None, 2 * one, one, 3 * one, 4 * one, 0.0)
    (tensor([[1.]]), tensor([-2.]))
    """
    factor = fold_factor(gamma, var, eps)
    shape = [-1 if d == channel_axis % weight.dim() else 1 for d in range(weight.dim())]
    folded = weight.detach().double() * factor.reshape(shape)
    centered = -mean.detach().double() if bias is None else bias.detach().double() - mean.detach()
    shifted = centered * factor
    if beta is not None:
        shifted = shifted + beta.detach().double()
    return folded.to(torch.float32), shifted.to(torch.float32)
