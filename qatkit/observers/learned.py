"""Ranges that are trained: how each learned observer writes a range into parameters, and back.

| observer | parameters | scale of a symmetric grid |
|---|---|---|
| lsq | step | step |
| lsq+ | step, and offset unless symmetric | step |
| pact | threshold | threshold / quant_max |
| tqt | log2_threshold | 2^log2_threshold / quant_max |

An offset is the value of code 0; the zero point is ``round(-offset / step)``, inside the grid. With
``power_of_two`` the scale is rounded up as for every observer, and its gradient passes. A step or
threshold counts by its magnitude, between 2^-100 and 2^100, so that no step of an optimizer can
make a scale that is zero, negative or not a number.

Source: Esser et al. 2020 (arXiv:1902.08153), LSQ; Bhalgat et al. 2020 (arXiv:2004.09576), LSQ+;
    Choi et al. 2018 (arXiv:1805.06085), PACT; Jain et al. 2020 (arXiv:1903.08066), TQT.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qatkit.functional.qparams import qparams
from qatkit.kernels.gradient import Gradient
from qatkit.spec import QuantSpec

_SMALLEST, _LARGEST, _LOG2_LARGEST = 2.0**-100, 2.0**100, 100.0


class Grid(NamedTuple):
    """The grid to quantize with.

    Attributes:
        scale: () or (C,) float32, with a gradient where it is learned.
        zero_point: the same shape, int32.
        offset: the value of code 0 where that is learned, ``None`` elsewhere.
    """

    scale: Tensor
    zero_point: Tensor
    offset: Tensor | None = None

    def at(self, index: Tensor) -> Grid:
        """Return the grids of some channels."""
        offset = None if self.offset is None else self.offset[index]
        return Grid(self.scale[index], self.zero_point[index], offset)

    def detach(self) -> Grid:
        """Return the same numbers without gradient."""
        return Grid(self.scale.detach(), self.zero_point)


def parameter_names(spec: QuantSpec) -> tuple[str, ...]:
    """Return the names of the learned parameters, none for an observer that only watches.

    >>> parameter_names(QuantSpec(observer="lsq+", symmetric=False))
    ('step', 'offset')
    """
    if not spec.learned:
        return ()
    if spec.observer in ("lsq", "lsq+"):
        return ("step",) if spec.symmetric else ("step", "offset")
    return ("threshold",) if spec.observer == "pact" else ("log2_threshold",)


def to_parameters(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, ...]:
    """Return the learned parameters that make the grid of a range.

    A channel without a range gets the mean scale of the others, or 1 where there are none.

    Args:
        low: () or (C,) float32.
        high: the same shape.
        spec: with a learned observer.

    >>> to_parameters(torch.tensor(-1.27), torch.tensor(1.0), QuantSpec(observer="lsq"))
    (tensor(0.0100),)
    """
    if not spec.symmetric:
        scale, zero_point = qparams(low, high, spec)
        return scale, -(zero_point * scale)
    amax = torch.maximum(low.abs(), high.abs()) if spec.signed else high.clamp(min=0.0)
    amax = amax.detach().to(torch.float32)
    alive = (amax >= _SMALLEST) & (amax <= _LARGEST)
    mean = torch.where(alive, amax, 0.0).sum() / alive.sum().clamp(min=1)
    amax = torch.where(alive, amax, torch.where(alive.any(), mean, float(spec.quant_max)))
    if spec.power_of_two:  # or the rounding of a parameter could double the range
        amax = amax * (1.0 - 2.0**-20)
    if spec.observer == "pact":
        return (amax,)
    return (amax.log2() if spec.observer == "tqt" else amax / float(spec.quant_max),)


def grid_of(parameters: tuple[Tensor, ...], spec: QuantSpec) -> Grid:
    """Return the grid of learned parameters; gradients go to them."""
    if not spec.symmetric:
        step, offset = _magnitude(parameters[0]), parameters[1]
        code = torch.nan_to_num(-(offset.detach() / step.detach())).round()
        zero_point = code.clamp(spec.quant_min, spec.quant_max).to(torch.int32)
        return Grid(step, zero_point, offset)
    if spec.observer in ("lsq", "lsq+") and not spec.power_of_two:
        step = _magnitude(parameters[0])
        return Grid(step, torch.zeros_like(step, dtype=torch.int32))
    amax = _amax(parameters, spec)
    scale = amax / float(spec.quant_max)
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    if not spec.power_of_two:
        return Grid(scale, zero_point)
    rounded = qparams(-amax, amax, spec)[0]
    if spec.observer == "tqt":  # d scale / d log2_threshold = scale * ln 2, of the rounded one
        scale = amax * (rounded / amax.detach())
    return Grid(_replaced(scale, rounded), zero_point)


def grid_of_range(low: Tensor, high: Tensor, spec: QuantSpec) -> Grid:
    """Return the grid of a range that has gradients, as the union of learned ranges has."""
    scale, zero_point = qparams(low, high, spec)
    if spec.symmetric:
        amax = torch.maximum(-low, high) if spec.signed else high
        return Grid(_replaced(amax / float(spec.quant_max), scale), zero_point)
    step = _replaced((high - low) / float(spec.quant_max - spec.quant_min), scale)
    offset = _replaced(low - step * spec.quant_min, -(zero_point * scale))
    return Grid(step, zero_point, offset)


def range_of(parameters: tuple[Tensor, ...], spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return the range of learned parameters, () or (C,); gradients go to them."""
    if spec.symmetric:
        amax = _amax(parameters, spec)
        return (-amax if spec.signed else torch.zeros_like(amax)), amax
    step, zero_point, offset = grid_of(parameters, spec)
    assert offset is not None
    # The offset in whole steps, as the grid has it.
    offset = _replaced(offset, -(zero_point * step.detach()))
    return step * spec.quant_min + offset, step * spec.quant_max + offset


def gradient_of(spec: QuantSpec) -> Gradient:
    """Return how gradients go through the rounding to the grid of ``spec``."""
    strength = {"ewgs": spec.ewgs_delta, "dsq": spec.dsq_alpha}.get(spec.gradient, 0.0)
    of_lsq = spec.observer in ("lsq", "lsq+")
    of_pact = spec.observer == "pact"
    return Gradient(
        spec.gradient,
        strength,
        inside=not of_pact,
        by_code=not (of_lsq or of_pact),
        normalized=of_lsq,
    )


def _amax(parameters: tuple[Tensor, ...], spec: QuantSpec) -> Tensor:
    (parameter,) = parameters
    if spec.observer == "tqt":
        finite = torch.nan_to_num(parameter).clamp(-_LOG2_LARGEST, _LOG2_LARGEST)
        return torch.exp2(finite)
    amax = _magnitude(parameter)
    return amax if spec.observer == "pact" else amax * float(spec.quant_max)


class _Magnitude(torch.autograd.Function):
    """The absolute value inside the limits; the gradient also comes back from outside of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.nan_to_num(x.abs(), nan=1.0).clamp_(_SMALLEST, _LARGEST)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where(x < 0, -grad, grad)


class _Replace(torch.autograd.Function):
    """Another value with the gradient of the first: the straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _magnitude(x: Tensor) -> Tensor:
    result: Tensor = _Magnitude.apply(x)
    return result


def _replaced(x: Tensor, value: Tensor) -> Tensor:
    result: Tensor = _Replace.apply(x, value.detach())
    return result
