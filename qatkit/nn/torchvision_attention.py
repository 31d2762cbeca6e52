"""Quantized forms of torchvision's attention layers whose forward is one opaque function.

The only place that names model code of another package; nothing of it is imported.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from qatkit.nn.attention import OPERANDS
from qatkit.nn.quantized import QuantizedComposite, QuantizedWeight
from qatkit.nn.registry import quantizes
from qatkit.nn.slots import Slots

_SWIN = "torchvision.models.swin_transformer"
_SWIN_3D = "torchvision.models.video.swin_transformer"
_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


@quantizes(f"{_SWIN}.ShiftedWindowAttention")
@quantizes(f"{_SWIN}.ShiftedWindowAttentionV2")
@quantizes(f"{_SWIN_3D}.ShiftedWindowAttention3d")
class QuantShiftedWindowAttention(QuantizedComposite):
    """Attention within shifted windows of (N, H, W, C) or (N, T, H, W, C), dot-product or cosine.

    The float forward runs as it is; its two projections and its two matrix products get quantized
    operands.
    """

    @classmethod
    def slots(cls, layer: nn.Module) -> Slots:
        """Return the quantizers of the projections and the matrix products."""
        return Slots(inputs={}, inner=OPERANDS, layers=("qkv", "proj"))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the float forward on quantized operands."""
        with _QuantizedOperands(self):
            return super().forward(*args, **kwargs)


class _QuantizedOperands(TorchFunctionMode):
    """Quantizes what the functions of one forward multiply."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        children = (layer.qkv, layer.proj)
        quantized = [child for child in children if isinstance(child, QuantizedWeight)]
        self._layers = {id(child.weight): child for child in quantized}
        self._operands = [tuple(layer.get_submodule(name) for name in pair) for pair in OPERANDS]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and id(args[1]) in self._layers:
            layer = self._layers[id(args[1])]
            args = (layer.quantized_input(args[0]), layer.quantized_weight(), *args[2:])
        elif func in _PRODUCTS:
            left, right = self._operands.pop(0)
            args = (left(args[0]), right(args[1]))
        return func(*args, **(kwargs or {}))
