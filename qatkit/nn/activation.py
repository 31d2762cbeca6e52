"""Activations with a quantized input, for engines that want every convolution's result quantized.

They compute in float (rule F20).
"""

from __future__ import annotations

from torch import Tensor, nn

from qatkit.nn.quantized import QuantizedInput
from qatkit.nn.registry import quantizes


class QuantizedActivation(QuantizedInput):
    """What the activations share."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation to the quantized input."""
        output: Tensor = super().forward(self.quantized_input(input))
        return output


@quantizes(nn.ReLU)
class QuantReLU(QuantizedActivation, nn.ReLU):
    """``torch.nn.ReLU`` with a quantized input.

    >>> import torch
    >>> QuantReLU()(torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """


@quantizes(nn.ReLU6)
class QuantReLU6(QuantizedActivation, nn.ReLU6):
    """``torch.nn.ReLU6`` with a quantized input.

    >>> import torch
    >>> QuantReLU6()(torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """


@quantizes(nn.LeakyReLU)
class QuantLeakyReLU(QuantizedActivation, nn.LeakyReLU):
    """``torch.nn.LeakyReLU`` with a quantized input.

    >>> import torch
    >>> QuantLeakyReLU()(torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """


@quantizes(nn.ELU)
class QuantELU(QuantizedActivation, nn.ELU):
    """``torch.nn.ELU`` with a quantized input.

    >>> import torch
    >>> QuantELU()(torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """


@quantizes(nn.GELU)
class QuantGELU(QuantizedActivation, nn.GELU):
    """``torch.nn.GELU`` with a quantized input.

    >>> import torch
    >>> QuantGELU()(torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """


@quantizes(nn.SiLU)
class QuantSiLU(QuantizedActivation, nn.SiLU):
    """``torch.nn.SiLU`` with a quantized input.

    >>> import torch
    >>> QuantSiLU()(torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """


@quantizes(nn.Mish)
class QuantMish(QuantizedActivation, nn.Mish):
    """``torch.nn.Mish`` with a quantized input.

    >>> import torch
    >>> QuantMish()(torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """


@quantizes(nn.Hardswish)
class QuantHardswish(QuantizedActivation, nn.Hardswish):
    """``torch.nn.Hardswish`` with a quantized input.

    >>> import torch
    >>> QuantHardswish()(torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """


@quantizes(nn.Hardsigmoid)
class QuantHardsigmoid(QuantizedActivation, nn.Hardsigmoid):
    """``torch.nn.Hardsigmoid`` with a quantized input.

    >>> import torch
    >>> QuantHardsigmoid()(torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """


@quantizes(nn.Sigmoid)
class QuantSigmoid(QuantizedActivation, nn.Sigmoid):
    """``torch.nn.Sigmoid`` with a quantized input.

    >>> import torch
    >>> QuantSigmoid()(torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """


@quantizes(nn.Tanh)
class QuantTanh(QuantizedActivation, nn.Tanh):
    """``torch.nn.Tanh`` with a quantized input.

    >>> import torch
    >>> QuantTanh()(torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """


@quantizes(nn.Softplus)
class QuantSoftplus(QuantizedActivation, nn.Softplus):
    """``torch.nn.Softplus`` with a quantized input.

    >>> import torch
    >>> QuantSoftplus()(torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """
