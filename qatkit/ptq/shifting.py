"""Add a constant to each output channel of a layer, where that is stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qatkit.functional import fold_factor
from qatkit.nn.quantized import QuantizedWeight


def shift_output(
    layer: QuantizedWeight, norm: Any, shift: Tensor, *, behind_norm: bool = False
) -> bool:
    """Add ``shift`` to what a layer returns, by its bias or by the batch norm that belongs to it.

    Args:
        layer: the layer.
        norm: the batch norm behind it, ``None`` for none.
        shift: (C_out,) float32.
        behind_norm: the shift is meant for the result of the batch norm.

    Returns:
        whether there is a place for it.
    """
    with torch.no_grad():
        if norm is None:
            if not isinstance(layer.bias, nn.Parameter):
                return False
            layer.bias.add_(shift.to(layer.bias.dtype))
            return True
        factor = fold_factor(norm.weight, norm.running_var, norm.eps).float()
        if norm.bias is not None:
            norm.bias.add_((shift if behind_norm else shift * factor).to(norm.bias.dtype))
            return True
        if behind_norm:
            shift = torch.where(factor == 0, 0.0, shift / torch.where(factor == 0, 1.0, factor))
        norm.running_mean.sub_(shift)
        return True


def axes_but_channels(x: Tensor, layer: QuantizedWeight) -> tuple[int, ...]:
    """Return the axes of an output of a layer that are not channels."""
    channel = x.dim() - layer.weight.dim() + 1  # the last one behind a linear layer
    return tuple(axis for axis in range(x.dim()) if axis != channel)
