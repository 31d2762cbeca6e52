"""The integers of a layer's weight, with the batch norm behind it folded in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qatkit.errors import QatkitError
from qatkit.functional import fold_factor
from qatkit.kernels.portable import SMALLEST_SCALE, along
from qatkit.nn.quantized import QuantizedWeight
from qatkit.nn.weights import Weight


@dataclass(frozen=True, eq=False)
class FoldedLayer:
    """What a layer and its batch norm compute together.

    Attributes:
        weight: float32 in the shape of the layer's weight, ``None`` if it is quantized: then it is
            ``codes * scale``.
        bias: (C_out,) float32, ``None`` for none.
        codes: int32 in the shape of the weight, ``None`` for a float weight.
        scale: () or (C,) float32.
        axis: the axis that ``scale`` runs along, ``None`` for per-tensor.
        batch_norm: the batch norm that is in it, ``None`` for none.
    """

    weight: Tensor | None
    bias: Tensor | None
    codes: Tensor | None
    scale: Tensor | None
    axis: int | None
    batch_norm: nn.Module | None


def fold_layer(layer: QuantizedWeight, norm: nn.Module | None) -> FoldedLayer:
    """Fold a batch norm into a quantized layer without changing a single code, where that works.

    The codes are those that the layer computes with: of ``w * s`` where its quantizer sees the
    fold, else of ``w``; in the second case ``Q(w) * s`` has the same codes on the scale ``scale *
    |s|``, negated where ``s < 0``. That needs scales along the output channels, or one, and a grid
    that holds the negated codes; else the batch norm is left out. A channel with ``s = 0``, or
    whose scale is no normal number, has only zeros and the scale 1.

    Args:
        layer: the layer; it is not changed.
        norm: the batch norm behind it, ``None`` for none.

    Raises:
        QatkitError: the layer computes with a batch norm folded in, and ``norm`` is ``None``.
    """
    with torch.no_grad():
        quantizer = layer.weight_quantizer
        if not quantizer.quantize:
            weight, bias = _fold_float(layer, norm)
            return FoldedLayer(weight, bias, None, None, None, norm)
        seen = layer.weight_fold_scale()
        raw = layer.weight.float() if seen is None else layer.weight.float() * seen
        grid = quantizer.grid_for(raw)
        assert grid is not None, "a weight always has a range"
        scale, axis = grid[0].float(), quantizer.spec.axis
        codes = torch.round(quantizer(raw) / along(scale, raw, axis)).to(torch.int32)
        bias = None if layer.bias is None else layer.bias.float()
        if norm is None and seen is not None:
            raise QatkitError(
                f"{quantizer.name}: sees a batch norm that is not in the model; "
                "export the module that holds both"
            )
        if norm is None:
            return _finish(codes, scale, axis, bias, None)
        factor, folded_bias = _factor_and_bias(layer, norm)
        if seen is not None:
            dead = layer.along_output(factor == 0).expand_as(codes)
            return _finish(codes.masked_fill(dead, 0), scale, axis, folded_bias, norm)
        if layer.groups_of_output > 1 or axis not in (None, layer.output_axis):
            return _finish(codes, scale, axis, bias, None)
        signed = codes * layer.along_output(torch.sign(factor)).to(torch.int32)
        if int(signed.max()) > quantizer.spec.quant_max:  # -128 has no positive counterpart
            return _finish(codes, scale, axis, bias, None)
        return _finish(signed, scale * factor.abs(), layer.output_axis, folded_bias, norm)


def fold_weight(weight: Weight, norm: nn.Module | None) -> FoldedLayer:
    """Return the integers of a weight, with the batch norm behind its layer folded in.

    Raises:
        QatkitError: as `fold_layer`.
    """
    if weight.layer is not None:
        return fold_layer(weight.layer, norm)
    with torch.no_grad():
        raw = weight.seen.detach().float()
        if not weight.quantizer.quantize:
            return FoldedLayer(raw, None, None, None, None, None)
        grid = weight.quantizer.grid_for(raw)
        assert grid is not None, "a weight always has a range"
        scale, axis = grid[0].float(), weight.quantizer.spec.axis
        codes = torch.round(weight.quantizer(raw) / along(scale, raw, axis)).to(torch.int32)
        return _finish(codes, scale, axis, None, None)


def _finish(
    codes: Tensor, scale: Tensor, axis: int | None, bias: Tensor | None, norm: nn.Module | None
) -> FoldedLayer:
    """Give dead channels zeros and the scale 1, and put the weight on the grid."""
    alive = torch.isfinite(scale) & (scale >= SMALLEST_SCALE)
    scale = torch.where(alive, scale, 1.0)
    codes = codes * along(alive.to(torch.int32), codes, axis)
    return FoldedLayer(None, bias, codes, scale, axis, norm)


def _fold_float(layer: QuantizedWeight, norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    weight = layer.weight.float().clone()
    if norm is None:
        return weight, None if layer.bias is None else layer.bias.float()
    factor, bias = _factor_and_bias(layer, norm)
    return (weight.double() * layer.along_output(factor.double())).float(), bias


def _factor_and_bias(layer: QuantizedWeight, norm: Any) -> tuple[Tensor, Tensor]:
    """Return the factor of the norm for each output channel and the bias of layer and norm.

    Both are (C_out,) float32. The bias is what the norm itself makes of the layer's bias, bit for
    bit: a channel whose inputs are all zero is constant in the model and in the file, and must
    round to the same code in both.
    """
    factor = fold_factor(norm.weight, norm.running_var, norm.eps).float()
    bias = torch.zeros_like(factor) if layer.bias is None else layer.bias.float()
    pixel = bias.reshape(1, -1, *[1] * (layer.weight.dim() - 2))
    if isinstance(norm, _BatchNorm):
        statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return factor, F.batch_norm(pixel, *statistics, training=False, eps=norm.eps).flatten()
    return factor, norm(pixel).flatten()
