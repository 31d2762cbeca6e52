"""Fake quantization whose scale and offset learn, and whose gradient of x can be chosen.

The forward values are those of `qatkit.kernels.fake_quantize`, bit for bit. With ``v = x / scale``
the local gradient of the result is

| x | by the scale | by the offset |
|---|---|---|
| inside | round(v) - v, or 0 with ``inside=False`` | 0 |
| clipped | the lowest or the highest code | 1 |

Source: Esser et al. 2020 (arXiv:1902.08153) for the scale; Bhalgat et al. 2020 (arXiv:2004.09576)
    for the offset; Choi et al. 2018 (arXiv:1805.06085) for ``inside=False``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qatkit.kernels import cpu, portable
from qatkit.kernels.gradient import Gradient, normalization, through_rounding
from qatkit.kernels.portable import along


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | int,
    offset: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    rule: Gradient,
    fast: bool,
) -> Tensor:
    """Fake-quantize ``x``; arguments already checked, ``fast`` for eager on the CPU."""
    function: Any = _Portable
    arguments: tuple[Any, ...]
    if fast and offset is None and isinstance(zero_point, int) and x.dtype == torch.float32:
        function = _OneScale if axis is None else _Channels
        arguments = scale, quant_min - zero_point, quant_max - zero_point, axis, rule
    else:
        if not isinstance(zero_point, Tensor):
            zero_point = torch.full((), zero_point, dtype=torch.int32, device=x.device)
        arguments = scale, zero_point, offset, quant_min, quant_max, axis, rule
    result: Tensor = function.apply(x, *arguments)
    return result


class _Kept:
    """The result of a forward pass, for the backward pass unless it was overwritten meanwhile.

    Whatever reads the result keeps it too, so that this costs no memory.
    """

    def __init__(self, result: Tensor) -> None:
        self._result: Tensor | None = result.detach()
        self._version = result._version

    def take(self) -> Tensor | None:
        """Return the result if it is there and intact, and let go of it."""
        result, self._result = self._result, None
        return result if result is not None and result._version == self._version else None


class _OneScale(torch.autograd.Function):
    """One scale, zero point 0, float32, eager on the CPU."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, axis: None, rule: Gradient
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.scale, ctx.shape = float(scale), scale.shape
        ctx.grid = low, high, rule
        result = cpu.round_clamp(x, ctx.scale, low, high)
        ctx.kept = _Kept(result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        (low, high, rule), scale = ctx.grid, ctx.scale
        by_x, by_scale = ctx.needs_input_grad[:2]
        bounds = (low * scale, high * scale)
        if rule.by_code:
            bounds = cpu.first_outside(scale, low, high)
        passed = cpu.gate(grad, x, *bounds) if by_x else None
        result = ctx.kept.take()
        if by_scale or rule.estimator != "ste":
            if result is None:
                result = cpu.round_clamp(x, scale, low, high)
            # The local gradient times the scale: result - x inside, result outside.
            local = cpu.gate(x, x, *bounds)
            torch.sub(result, local, out=local)
            if passed is not None and rule.estimator != "ste":
                passed = through_rounding(passed, local, rule, -scale)
        by_scale = None if not by_scale else _dot(grad, _clipped(local, result, x, bounds, rule))
        if by_scale is not None:
            factor = normalization(rule, x.numel(), 1, high) / scale
            by_scale = (by_scale * factor).reshape(ctx.shape)
        return passed, by_scale, None, None, None, None


class _Channels(torch.autograd.Function):
    """One scale for each channel, zero point 0, float32, eager on the CPU."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, axis: int, rule: Gradient
    ) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.grid = low, high, axis, rule
        wide = along(scale, x, axis)
        assert isinstance(wide, Tensor)
        result = cpu.round_clamp(x, wide, low, high)
        ctx.kept = _Kept(result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        low, high, axis, rule = ctx.grid
        by_x, by_scale = ctx.needs_input_grad[:2]
        wide: Any = along(scale, x, axis)
        inverse = wide.reciprocal()
        steps = x * inverse
        bounds = cpu.first_outside(1.0, low, high) if rule.by_code else (low, high)
        passed = cpu.gate(grad, steps, *bounds) if by_x else None
        result = ctx.kept.take()
        if by_scale or rule.estimator != "ste":
            if result is None:
                result = cpu.round_clamp(x, wide, low, high)
            local = cpu.gate(x, steps, *bounds)
            torch.sub(result, local, out=local)
            if passed is not None and rule.estimator != "ste":
                passed = through_rounding(passed, local * -inverse, rule)
        if not by_scale:
            return passed, None, None, None, None, None
        local = _clipped(local, result, steps, bounds, rule)
        factor = normalization(rule, x.numel(), scale.numel(), high)
        others = [d for d in range(x.dim()) if d != axis % x.dim()]
        summed = (local.mul_(grad)).sum(others) if others else local.mul_(grad)
        return passed, summed * scale.reciprocal() * factor, None, None, None, None


def _clipped(
    local: Tensor, result: Tensor, x: Tensor, bounds: tuple[float, float], rule: Gradient
) -> Tensor:
    """Return the local gradient as it is, or only where elements are clipped."""
    return local if rule.inside else result - cpu.gate(result, x, *bounds)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of the products, in one pass where the layouts agree."""
    if a.dtype != b.dtype or a.stride() != b.stride():
        return (a * b).sum()
    order = sorted(range(a.dim()), key=a.stride, reverse=True)
    return torch.dot(a.permute(order).reshape(-1), b.permute(order).reshape(-1))


class _Portable(torch.autograd.Function):
    """Tensor operations only, on any device."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        offset: Tensor | None,
        quant_min: int,
        quant_max: int,
        axis: int | None,
        rule: Gradient,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.grid = quant_min, quant_max, axis, rule
        wide, shift = along(scale, x, axis), along(zero_point, x, axis)
        shifted = (portable.codes(x, wide) + shift).clamp_(quant_min, quant_max)
        return (shifted - shift).mul_(wide).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        quant_min, quant_max, axis, rule = ctx.grid
        by_x, by_scale, _, by_offset = ctx.needs_input_grad[:4]
        wide, shift = along(scale, x, axis), along(zero_point, x, axis)
        steps = x.to(torch.float32) * portable.inverse(wide, x)
        rounded = steps.round()
        shifted = rounded + shift
        if rule.by_code:
            inside = (shifted >= quant_min) & (shifted <= quant_max)
        else:
            inside = (steps + shift > quant_min) & (steps + shift < quant_max)
        error = torch.where(inside, steps - rounded, 0.0)
        wide_grad = grad.to(torch.float32)
        none: list[Tensor | None] = [None] * 4
        if by_x:
            passed = torch.where(inside, wide_grad, 0.0)
            none[0] = through_rounding(passed, error, rule).to(grad.dtype)
        factor = normalization(rule, x.numel(), scale.numel(), quant_max)
        if by_scale:
            ends = torch.where(inside, 0.0, shifted.clamp(quant_min, quant_max))
            local = ends - error if rule.inside else ends
            none[1] = _sum_to(wide_grad * local, scale, axis) * factor
        if by_offset:
            none[3] = _sum_to(torch.where(inside, 0.0, wide_grad), scale, axis) * factor
        return *none, None, None, None, None


def _sum_to(values: Tensor, like: Tensor, axis: int | None) -> Tensor:
    """Sum over all axes but one, or over all."""
    if axis is None:
        return values.sum().reshape(like.shape)
    others = [d for d in range(values.dim()) if d != axis % values.dim()]
    return values.sum(others) if others else values
