"""Quantized convolutions."""

from __future__ import annotations

from torch import Tensor, nn

from qatkit.nn.quantized import QuantizedWeight
from qatkit.nn.registry import quantizes


@quantizes(nn.Conv1d)
class QuantConv1d(QuantizedWeight, nn.Conv1d):
    """``torch.nn.Conv1d`` with a quantized input and weight.

    Takes the arguments of ``torch.nn.Conv1d``, then ``weight_spec`` and ``input_spec``.

    >>> import torch
    >>> QuantConv1d(4, 8, 3, padding="same")(torch.randn(2, 4, 10)).shape
    torch.Size([2, 8, 10])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (N, C, L) or (C, L)."""
        x, weight = self.quantized_input(input), self.quantized_weight()
        output: Tensor = self._conv_forward(x, weight, self.bias)
        return output


@quantizes(nn.Conv2d)
class QuantConv2d(QuantizedWeight, nn.Conv2d):
    """``torch.nn.Conv2d`` with a quantized input and weight.

    Takes the arguments of ``torch.nn.Conv2d``, then ``weight_spec`` and ``input_spec``.

    >>> import torch
    >>> QuantConv2d(3, 8, 3, stride=2, padding=1)(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 8, 4, 4])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (N, C, H, W) or (C, H, W)."""
        x, weight = self.quantized_input(input), self.quantized_weight()
        output: Tensor = self._conv_forward(x, weight, self.bias)
        return output


@quantizes(nn.Conv3d)
class QuantConv3d(QuantizedWeight, nn.Conv3d):
    """``torch.nn.Conv3d`` with a quantized input and weight.

    Takes the arguments of ``torch.nn.Conv3d``, then ``weight_spec`` and ``input_spec``.

    >>> import torch
    >>> QuantConv3d(3, 8, 3)(torch.randn(2, 3, 4, 8, 8)).shape
    torch.Size([2, 8, 2, 6, 6])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (N, C, D, H, W) or (C, D, H, W)."""
        x, weight = self.quantized_input(input), self.quantized_weight()
        output: Tensor = self._conv_forward(x, weight, self.bias)
        return output
