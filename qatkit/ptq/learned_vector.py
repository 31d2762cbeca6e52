"""Biases and scales of batch norms that are learned while a block is reconstructed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.nn.weights import Weight


class LearnedVector:
    """One value for each channel: ``parameter = start + change * unit``, one rate for all layers.

    Args:
        parameter: (C,) of the model, which is written to.
        unit: what a change of 1 means, broadcast to (C,).

    Attributes:
        parameter: as given.
        change: (C,) what is learned; its gradient is that of the parameter until `scale_gradient`.
    """

    def __init__(self, parameter: nn.Parameter, unit: Tensor) -> None:
        """Start at the parameter as it is."""
        self.parameter = parameter
        self.change = torch.zeros_like(parameter)
        self._start = parameter.detach().clone()
        self._unit = unit.to(parameter.dtype)

    def scale_gradient(self) -> None:
        """Turn the gradient of the parameter into that of the change."""
        if self.change.grad is not None:
            self.change.grad = self.change.grad * self._unit

    def write(self) -> None:
        """Put the change into the parameter."""
        with torch.no_grad():
            self.parameter.copy_(self._start + self.change * self._unit)


def vectors_of(weights: list[Weight], norms: Mapping[nn.Module, Any]) -> list[LearnedVector]:
    """Return the biases behind weights, and the scales of folded batch norms that may change.

    They may where the weight quantizer does not see them: with one symmetric range for each output
    channel. A scale changes in proportion to itself: one that is almost zero belongs to
    a dead channel, whose variance is almost zero too.
    """
    found: dict[nn.Parameter, Tensor] = {}
    for weight in weights:
        layer = weight.layer
        if layer is None:
            continue
        norm = norms.get(layer)
        if norm is None:
            if isinstance(layer.bias, nn.Parameter):
                size = layer.weight.detach().float().flatten(1).norm(dim=1).mean()
                found[layer.bias] = size
        elif norm.weight is not None:
            found[norm.bias] = norm.weight.detach().abs().mean()
            if layer.weight_fold_scale() is None:
                found[norm.weight] = norm.weight.detach().clone()
    return [LearnedVector(parameter, unit) for parameter, unit in found.items()]
