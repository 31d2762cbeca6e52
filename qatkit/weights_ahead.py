"""The small weights of a model quantized in one go when its forward starts.

Quantizing a small weight is a handful of small calls. Between two convolutions each of them finds
the caches of the processor full of other things and takes several times as long as when the same
calls come one after the other. The layers then take what is ready, and only if the weight and the
quantizer are still as they were; else they quantize as they do without this.

Only for training steps, eager on the CPU: without gradient a layer should drop its quantized weight
when it is done, and in a part that is computed again (`qatkit.recompute`) both runs must do the
same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qatkit.nn.weights import Weight, weights_of
from qatkit.plain_numbers import scales_of
from qatkit.quantizer import TensorQuantizer
from qatkit.recompute import is_recomputing, may_be_recomputed

LARGEST = 2**17
"""Elements of the largest weight worth it: a larger one is better still in the cache when used."""


class WeightsAhead:
    """Quantizes the small weights of a model when its forward starts; hangs on it as hooks.

    Args:
        model: its calls are the forwards.
    """

    def __init__(self, model: nn.Module) -> None:
        """Hang on the model."""
        found = [weight for weight in weights_of(model) if _is_parameter(weight)]
        self._weights = [(weight, weight.layer) for weight in found]
        self._quantizers = [each for each in model.modules() if isinstance(each, TensorQuantizer)]
        # Kept because a pickled hook without its handle may lose its number to another hook.
        self._handles = (
            model.register_forward_pre_hook(self._start),
            model.register_forward_hook(self._end, always_call=True),
        )

    def _start(self, model: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling() or not model.training:
            return
        if is_recomputing() or may_be_recomputed():
            return
        together: dict[int, list[tuple[TensorQuantizer, Tensor]]] = {}
        for weight, layer in self._weights:
            parameter = weight.owner._parameters.get(weight.name)
            if parameter is None or parameter.numel() > LARGEST:
                continue
            if not (layer is None or layer.reads_its_parameter):
                continue
            if weight.quantizer.is_plain_weight(parameter):
                quant_max = weight.quantizer.spec.quant_max
                together.setdefault(quant_max, []).append((weight.quantizer, parameter))
        for quant_max, members in together.items():
            _quantize_together(members, quant_max)

    def _end(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            for quantizer in self._quantizers:
                quantizer.forget_ahead()


def _quantize_together(members: list[tuple[TensorQuantizer, Tensor]], quant_max: int) -> None:
    """Compute the scales of all weights at once."""
    ranges = [quantizer.ranges_of_rows(parameter) for quantizer, parameter in members]
    low, high = (torch.cat(ends) for ends in zip(*ranges, strict=True))
    scales = scales_of(low, high, quant_max)
    if scales is None:
        return
    parts = scales.split_with_sizes([len(ends[0]) for ends in ranges])
    for (quantizer, parameter), ends, part in zip(members, ranges, parts, strict=True):
        quantizer.quantize_ahead(parameter, ends, part)


def _is_parameter(weight: Weight) -> bool:
    return weight.owner._parameters.get(weight.name) is not None
