"""Quantized transposed convolutions: per-tensor weights by default (rule F2b)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from qatkit.nn.quantized import QuantizedWeight
from qatkit.nn.registry import quantizes


class QuantizedTransposed(QuantizedWeight, _ConvTransposeNd):
    """What the transposed convolutions share; the weight is (C_in, C_out / groups, *kernel)."""

    default_axis: ClassVar[int | None] = None
    dimensions: ClassVar[int]
    convolve: ClassVar[Callable[..., Tensor]]

    @property
    def output_axis(self) -> int:
        """The axis of the weight that runs over output channels of a group."""
        return 1

    @property
    def groups_of_output(self) -> int:
        """Every group of output channels shares the indices of axis 1."""
        return self.groups

    def along_output(self, vector: Tensor) -> Tensor:
        """Shape a (C_out,) vector so that it multiplies the weight.

        Each group of inputs has its own outputs.
        """
        per_group = vector.reshape(self.groups, 1, -1)
        inputs = self.in_channels // self.groups
        rows = per_group.expand(-1, inputs, -1).reshape(self.in_channels, -1)
        return rows.reshape(*rows.shape, *([1] * self.dimensions))

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve (N, C, *spatial) or (C, *spatial) to ``output_size`` if given."""
        x = self.quantized_input(input)
        extra = self._output_padding(
            x,
            output_size,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            self.dimensions,
            self.dilation,  # type: ignore[arg-type]
        )
        settings = (self.stride, self.padding, extra, self.groups, self.dilation)
        return type(self).convolve(x, self.quantized_weight(), self.bias, *settings)


@quantizes(nn.ConvTranspose1d)
class QuantConvTranspose1d(QuantizedTransposed, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` with a quantized input and weight.

    >>> import torch
    >>> QuantConvTranspose1d(4, 8, 3, stride=2)(torch.randn(2, 4, 5)).shape
    torch.Size([2, 8, 11])
    """

    dimensions = 1
    convolve = staticmethod(F.conv_transpose1d)


@quantizes(nn.ConvTranspose2d)
class QuantConvTranspose2d(QuantizedTransposed, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` with a quantized input and weight.

    >>> import torch
    >>> QuantConvTranspose2d(4, 8, 2, stride=2)(torch.randn(2, 4, 5, 5)).shape
    torch.Size([2, 8, 10, 10])
    """

    dimensions = 2
    convolve = staticmethod(F.conv_transpose2d)


@quantizes(nn.ConvTranspose3d)
class QuantConvTranspose3d(QuantizedTransposed, nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` with a quantized input and weight.

    >>> import torch
    >>> QuantConvTranspose3d(4, 8, 2, stride=2)(torch.randn(2, 4, 3, 5, 5)).shape
    torch.Size([2, 8, 6, 10, 10])
    """

    dimensions = 3
    convolve = staticmethod(F.conv_transpose3d)
