"""Quantized pooling.

Average pools compute in INT8 if their input is quantized (rule F7), max pools only select.
"""

from __future__ import annotations

from torch import Tensor, nn

from qatkit.nn.quantized import QuantizedInput
from qatkit.nn.registry import quantizes


class QuantizedPool(QuantizedInput):
    """What the pools share."""

    def forward(self, input: Tensor) -> Tensor:
        """Pool the quantized input."""
        output: Tensor = super().forward(self.quantized_input(input))
        return output


@quantizes(nn.AvgPool1d)
class QuantAvgPool1d(QuantizedPool, nn.AvgPool1d):
    """``torch.nn.AvgPool1d`` with a quantized input.

    >>> import torch
    >>> QuantAvgPool1d(2)(torch.randn(2, 3, 8)).shape
    torch.Size([2, 3, 4])
    """


@quantizes(nn.AvgPool2d)
class QuantAvgPool2d(QuantizedPool, nn.AvgPool2d):
    """``torch.nn.AvgPool2d`` with a quantized input.

    >>> import torch
    >>> QuantAvgPool2d(2)(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 3, 4, 4])
    """


@quantizes(nn.AvgPool3d)
class QuantAvgPool3d(QuantizedPool, nn.AvgPool3d):
    """``torch.nn.AvgPool3d`` with a quantized input.

    >>> import torch
    >>> QuantAvgPool3d(2)(torch.randn(2, 3, 8, 8, 8)).shape
    torch.Size([2, 3, 4, 4, 4])
    """


@quantizes(nn.AdaptiveAvgPool1d)
class QuantAdaptiveAvgPool1d(QuantizedPool, nn.AdaptiveAvgPool1d):
    """``torch.nn.AdaptiveAvgPool1d`` with a quantized input.

    >>> import torch
    >>> QuantAdaptiveAvgPool1d(1)(torch.randn(2, 3, 8)).shape
    torch.Size([2, 3, 1])
    """


@quantizes(nn.AdaptiveAvgPool2d)
class QuantAdaptiveAvgPool2d(QuantizedPool, nn.AdaptiveAvgPool2d):
    """``torch.nn.AdaptiveAvgPool2d`` with a quantized input.

    >>> import torch
    >>> QuantAdaptiveAvgPool2d(1)(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 3, 1, 1])
    """


@quantizes(nn.AdaptiveAvgPool3d)
class QuantAdaptiveAvgPool3d(QuantizedPool, nn.AdaptiveAvgPool3d):
    """``torch.nn.AdaptiveAvgPool3d`` with a quantized input.

    >>> import torch
    >>> QuantAdaptiveAvgPool3d(1)(torch.randn(2, 3, 8, 8, 8)).shape
    torch.Size([2, 3, 1, 1, 1])
    """


@quantizes(nn.MaxPool1d)
class QuantMaxPool1d(QuantizedPool, nn.MaxPool1d):
    """``torch.nn.MaxPool1d`` with a quantized input.

    >>> import torch
    >>> QuantMaxPool1d(2)(torch.randn(2, 3, 8)).shape
    torch.Size([2, 3, 4])
    """


@quantizes(nn.MaxPool2d)
class QuantMaxPool2d(QuantizedPool, nn.MaxPool2d):
    """``torch.nn.MaxPool2d`` with a quantized input.

    >>> import torch
    >>> QuantMaxPool2d(2)(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 3, 4, 4])
    """


@quantizes(nn.MaxPool3d)
class QuantMaxPool3d(QuantizedPool, nn.MaxPool3d):
    """``torch.nn.MaxPool3d`` with a quantized input.

    >>> import torch
    >>> QuantMaxPool3d(2)(torch.randn(2, 3, 8, 8, 8)).shape
    torch.Size([2, 3, 4, 4, 4])
    """
