"""Activations whose step is learned while a block is reconstructed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qatkit.quantizer import TensorQuantizer


class LearnedStep(nn.Module):
    """Stands in for the quantizer of an activation: its step is learned, its zero point stays.

    The step is ``start * exp(growth)``, so that one learning rate fits all tensors.

    Args:
        quantizer: with a range, which it does not share.
        keep: share of the elements that stay in float, at random, while `dropping`.

    Attributes:
        growth: () what is learned.
        dropping: whether elements stay in float.

    Source: Esser et al. 2020 (arXiv:1902.08153), the gradient; Wei et al. 2022 (arXiv:2203.05740),
        QDrop.
    """

    def __init__(self, quantizer: TensorQuantizer, keep: float) -> None:
        """Start at the range that there is."""
        super().__init__()
        self.quantizer = quantizer
        self.start = quantizer.scale.detach().float()
        self.zero_point = quantizer.zero_point.detach().float()
        self.growth = torch.zeros_like(self.start).requires_grad_()
        self.keep = keep
        self.dropping = keep > 0

    def step(self) -> Tensor:
        """Return the step as it is now."""
        return self.start * self.growth.exp()

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the range that makes this step."""
        spec, step = self.quantizer.spec, self.step().detach()
        if not spec.symmetric:
            low = (spec.quant_min - self.zero_point) * step
            return low, (spec.quant_max - self.zero_point) * step
        high = spec.quant_max * step
        return (-high if spec.signed else torch.zeros_like(high)), high

    def forward(self, x: Tensor, part: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """Quantize as `TensorQuantizer` does, but for the elements that are dropped."""
        return self.unobserved(x if part is None else part)

    def unobserved(self, x: Tensor) -> Tensor:
        """Do the same."""
        spec = self.quantizer.spec
        ends = (spec.quant_min - self.zero_point, spec.quant_max - self.zero_point)
        mask = random_mask(x, self.keep) if self.dropping else None
        y: Tensor = _Rounded.apply(x, self.step(), *ends, mask)
        return y


def random_mask(x: Tensor, share: float) -> Tensor:
    """Return ones at a random ``share`` of the places of a sample, the same for all samples."""
    return (torch.rand_like(x[:1]) < share).to(x.dtype)


def can_learn(quantizer: TensorQuantizer) -> bool:
    """Tell whether a quantizer has a step of its own that may change."""
    spec = quantizer.spec
    free = spec.observer != "fixed" and not spec.power_of_two and not spec.per_channel
    return quantizer.quantize and quantizer.calibrated and free and not quantizer.peers


class _Rounded(torch.autograd.Function):
    """``clamp(round(x / step), low, high) * step``, and x where the mask is 1."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, low: Tensor, high: Tensor, mask: Tensor | None
    ) -> Tensor:
        steps = x.float() / step
        codes = steps.clamp(low, high).round_()
        ctx.save_for_backward(steps, codes, mask)
        ctx.ends = low, high
        y = (codes * step).to(x.dtype)
        return y if mask is None else y.lerp_(x, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        steps, codes, mask = ctx.saved_tensors
        low, high = ctx.ends
        quantized = grad if mask is None else grad * (1 - mask)
        through = torch.ops.aten.hardtanh_backward(
            quantized, steps.to(grad.dtype), float(low) - 0.5, float(high) + 0.5
        )
        # Not flattened: that would copy where the memory format is channels_last.
        of_step = (quantized * codes).sum() - (through * steps).sum()
        if mask is not None:
            through = torch.addcmul(through, grad, mask)
        return through, of_step.to(steps.dtype), None, None, None
