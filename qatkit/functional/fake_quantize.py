"""Fake quantization: round to the integer grid and back, with a straight-through gradient.

| x | result | gradient |
|---|---|---|
| on or between codes | the nearest code times the scale, ties to even | passes |
| rounds to a code outside | the end of the grid | 0 |
| +Inf, -Inf | the end of the grid | 0 |
| NaN | NaN | undefined |
"""

from __future__ import annotations

from torch import Tensor

from qatkit import kernels
from qatkit.errors import QatkitError, QatkitTypeError


def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
) -> Tensor:
    """Round ``x`` to the grid of ``quant_min..quant_max`` codes and back.

    ``q = clamp(round(x * (1 / scale)) + zero_point, quant_min, quant_max)`` and
    ``y = (q - zero_point) * scale``, in float32 whatever the dtype of ``x``. The gradient of ``x``
    passes where the code is inside the grid before the clamp and is zero elsewhere (clipped
    straight-through estimator); scale and zero point get none.

    Args:
        x: any shape, memory format and float dtype.
        scale: () or (C,) float32, or a number; positive.
        zero_point: an integer tensor of the shape of ``scale``, or an integer, inside the grid.
        quant_min: the lowest code.
        quant_max: the highest code.
        axis: the axis of ``x`` with C indices, ``None`` for one scale.

    Returns:
        A tensor like ``x``.

    Raises:
        QatkitError: the grid is empty, ``axis`` is out of range, or a shape does not fit.

    Source: Bengio et al. 2013 (arXiv:1308.3432) for the estimator; Jacob et al. 2018
        (arXiv:1712.05877) for the grid. Values and gradients of finite ``x`` equal those of
        ``torch.fake_quantize_per_tensor_affine`` and ``torch.fake_quantize_per_channel_affine``.

    >>> import torch
    >>> fake_quantize(torch.tensor([-1.0, 0.26, 0.74]), 0.5, 0, -1, 1)
    tensor([-0.5000,  0.5000,  0.5000])
    """
    if quant_min >= quant_max:
        raise QatkitError(
            f"fake_quantize(quant_min={quant_min}, quant_max={quant_max}): no codes,"
            " give quant_min < quant_max"
        )
    _check(x, scale, axis, "scale")
    _check(x, zero_point, axis, "zero_point")
    return kernels.fake_quantize(x, scale, zero_point, quant_min, quant_max, axis)


def fake_quantize_learned(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    *,
    offset: Tensor | None = None,
    rule: kernels.Gradient = kernels.STE,
) -> Tensor:
    """Do the same as `fake_quantize`, with gradients of scale and offset, and another of ``x``.

    Args:
        x: any shape, memory format and float dtype.
        scale: () or (C,) float32; positive.
        zero_point: an integer tensor of the shape of ``scale``, or an integer, inside the grid.
        quant_min: the lowest code.
        quant_max: the highest code.
        axis: the axis of ``x`` with C indices, ``None`` for one scale.
        offset: the learned value of code 0 that ``zero_point`` was made of, for its gradient;
            the shape of ``scale``.
        rule: the choices of the backward pass.

    Returns:
        A tensor like ``x``.

    Raises:
        QatkitError: as `fake_quantize`.

    Source: see `qatkit.kernels.learned` and `qatkit.kernels.gradient`.

    >>> import torch
    >>> scale = torch.tensor(0.5, requires_grad=True)
    >>> fake_quantize_learned(torch.tensor([0.3, 9.0]), scale, 0, -4, 3).sum().backward()
    >>> round(scale.grad.item(), 4)  # (1 - 0.6) inside, 3 clipped
    3.4
    """
    _check(x, scale, axis, "scale")
    _check(x, zero_point, axis, "zero_point")
    return kernels.fake_quantize_learned(
        x, scale, zero_point, offset, quant_min, quant_max, axis, rule
    )


def fake_quantize_unclipped(x: Tensor, scale: Tensor | float, axis: int | None = None) -> Tensor:
    """Round ``x`` to a symmetric grid that contains all of it, as when scale = amax / quant_max.

    ``y = round(x * (1 / scale)) * scale`` and the gradient passes: the same as `fake_quantize` in
    that situation, in fewer passes and without keeping ``x`` for the backward pass.

    Args:
        x: any shape, memory format and float dtype, finite.
        scale: () or (C,) float32, or a number; positive.
        axis: the axis of ``x`` with C indices, ``None`` for one scale.

    Returns:
        A tensor like ``x``.

    Raises:
        QatkitError: ``axis`` is out of range, or the shape of ``scale`` does not fit.

    >>> import torch
    >>> fake_quantize_unclipped(torch.tensor([-1.0, 0.26, 0.74]), 0.5)
    tensor([-1.0000,  0.5000,  0.5000])
    """
    _check(x, scale, axis, "scale")
    return kernels.fake_quantize_unclipped(x, scale, axis)


def _check(x: Tensor, values: Tensor | float | int, axis: int | None, name: str) -> None:
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise QatkitTypeError(f"fake_quantize(x): got {kind}, give a floating point tensor")
    if axis is not None and not -x.dim() <= axis < x.dim():
        raise QatkitError(
            f"fake_quantize(axis={axis}): x has shape {tuple(x.shape)}, give an axis of it or None"
        )
    if not isinstance(values, Tensor) or values.dim() == 0:
        return
    if axis is None:
        if values.numel() != 1:
            raise QatkitError(
                f"fake_quantize({name} of shape {tuple(values.shape)}): give the axis it belongs to"
            )
    elif tuple(values.shape) != (x.shape[axis],):
        raise QatkitError(
            f"fake_quantize({name} of shape {tuple(values.shape)}): x of shape {tuple(x.shape)}"
            f" with axis={axis} needs shape ({x.shape[axis]},)"
        )
