"""The quantized linear layer."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from qatkit.nn.quantized import QuantizedWeight
from qatkit.nn.registry import quantizes


@quantizes(nn.Linear)
class QuantLinear(QuantizedWeight, nn.Linear):
    """``torch.nn.Linear`` with a quantized input and weight.

    Takes the arguments of ``torch.nn.Linear``, then ``weight_spec`` and ``input_spec``.

    >>> import torch
    >>> QuantLinear(4, 8)(torch.randn(2, 4)).shape
    torch.Size([2, 8])
    """

    bias: Any  # A Parameter or None; torch.nn.Linear declares only the first.

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)
