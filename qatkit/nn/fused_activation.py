"""ReLUs that return their result already on the grid of the quantizer that reads it.

Clipping at the ends of the activation and at those of the grid is one clip, for the value and for
the gradient. Only in training steps, eager on the CPU; else the activation and the quantizer do
their work one after the other, with the same result.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from qatkit.quantizer import TensorQuantizer


class FusedActivation(nn.Module):
    """Base of the ReLUs that `fuse_activation` makes.

    Attributes:
        bounds: what the activation clips at.
    """

    bounds: ClassVar[tuple[float, float]]
    _reader: tuple[TensorQuantizer]
    _around: tuple[nn.Module, ...]

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation."""
        if not torch.compiler.is_compiling() and self.training and not self._is_watched():
            quantized = self._reader[0].quantize_clipped_ahead(input, self.bounds)
            if quantized is not None:
                return quantized
        output: Tensor = super().forward(input)
        return output

    def _is_watched(self) -> bool:
        """Whether a hook sees the result: it gets that of the activation itself."""
        if torch_module._global_forward_hooks:
            return True
        return any(module._forward_hooks for module in self._around)


class FusedReLU(FusedActivation, nn.ReLU):
    """``torch.nn.ReLU`` before a quantizer."""

    bounds = 0.0, math.inf


class FusedReLU6(FusedActivation, nn.ReLU6):
    """``torch.nn.ReLU6`` before a quantizer."""

    bounds = 0.0, 6.0


_FUSED: dict[type[nn.Module], type[FusedActivation]] = {nn.ReLU: FusedReLU, nn.ReLU6: FusedReLU6}


def fuse_activation(
    activation: nn.Module, reader: TensorQuantizer, around: tuple[nn.Module, ...]
) -> None:
    """Let a ReLU in place do the work of the one quantizer that reads its result.

    Args:
        activation: a ``torch.nn.ReLU`` or ``torch.nn.ReLU6``.
        reader: the quantizer.
        around: the modules that return the result as well, with the activation itself.
    """
    activation.__class__ = _FUSED[type(activation)]
    activation.__dict__.update(_reader=(reader,), _around=around)
