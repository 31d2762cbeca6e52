"""The small weights of a model quantized in one go when its forward starts.

Quantizing a small weight is a handful of small calls. Between two convolutions each of them finds
the caches of the processor full of other things and takes several times as long as when the same
calls come one after the other. The layers then take what is ready, and only if the weight and the
quantizer are still as they were; else they quantize as they do without this.

Only for training steps, eager on the CPU: without gradient a layer should drop its quantized
weight when it is done, and a layer with a hook before its forward may get another weight there. One
thing is seen a forward late: a block around a layer that writes to ``weight.data`` in place while
it runs, which leaves no trace in the tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qatkit.nn.quantized import QuantizedWeight
from qatkit.plain_numbers import scales_of
from qatkit.quantizer import TensorQuantizer
from qatkit.recompute import is_recomputing, may_be_recomputed

LARGEST = 2**17
"""Elements of the largest weight worth it: a larger one is better still in the cache when used."""


def quantize_weights_ahead(model: nn.Module) -> None:
    """Let the small weights of a prepared model be quantized when its forward starts."""
    model.register_forward_pre_hook(_start)


def _start(model: nn.Module, *_: Any) -> None:
    if torch.compiler.is_compiling() or not model.training:
        return
    if is_recomputing() or may_be_recomputed():
        return
    together: dict[int, list[tuple[TensorQuantizer, Tensor]]] = {}
    for layer in model.modules():
        if not isinstance(layer, QuantizedWeight) or layer._forward_pre_hooks:
            continue
        parameter, quantizer = layer._parameters.get("weight"), layer.weight_quantizer
        if (
            parameter is not None
            and parameter.numel() <= LARGEST
            and layer.reads_its_parameter
            and isinstance(quantizer, TensorQuantizer)
            and quantizer.is_plain_weight(parameter)
        ):
            together.setdefault(quantizer.spec.quant_max, []).append((quantizer, parameter))
    for members in together.values():
        _quantize_together(members)


def _quantize_together(members: list[tuple[TensorQuantizer, Tensor]]) -> None:
    """Compute the scales of all weights, with the same highest code, at once."""
    ranges = [quantizer.ranges_of_rows(parameter) for quantizer, parameter in members]
    low, high = (torch.cat(ends) for ends in zip(*ranges, strict=True))
    scales = scales_of(low, high, members[0][0].spec)
    if scales is None:
        return
    parts = scales.split_with_sizes([len(ends[0]) for ends in ranges])
    for (quantizer, parameter), ends, part in zip(members, ranges, parts, strict=True):
        quantizer.quantize_ahead(parameter, ends, part)
